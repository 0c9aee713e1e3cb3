"""``dit-export``: a checkpoint in, a verified bundle out."""

from __future__ import annotations

import argparse
from pathlib import Path

from dit_export.api import ExportResult, check_installed, export_request
from dit_export.checkpoints.libraries import import_libraries
from dit_export.request import ALL, ExportRequest
from dit_runtime.bundle.precision import EXPORTED, Precision
from dit_runtime.commands.common import Parser, image_size, natural, positive, print_json, run, say
from dit_runtime.core.files import named

EXAMPLES = (
    "dit-export facebook/DiT-XL-2-256 --fp16 -o dit-xl.bundle",
    "dit-export DiT-XL-2-512x512.pt --vae sd-vae-ft-mse/ --fp16 --encoder -o dit-xl-512.bundle",
    "dit-export SiT-XL-2-256.pt --family sit --path linear --time noise-at-0 --vae sd-vae-ft-mse/ -o sit.bundle",
    "dit-export DiT-XL/2-256 --conditioning cross-attention --dry-run",
    "dit-export DiT-XL/2-256 --random-weights 0 --fp16 -o xl-random.bundle",
    "dit-export facebook/DiT-XL-2-256 --bisect dit-xl.bundle -o keep.txt",
    "dit-export facebook/DiT-XL-2-256 --fp16 --keep-fp32 keep.txt -o dit-xl.bundle",
    "dit-export facebook/DiT-XL-2-256 --bf16 -o dit-xl-bf16.bundle",
    "dit-export facebook/DiT-XL-2-256 --int8 -o dit-xl-int8.bundle",
    "dit-export facebook/DiT-XL-2-256 --bisect dit-xl-int8.bundle -o keep.txt",
    "dit-export facebook/DiT-XL-2-256 --int8 --keep-fp16 keep.txt -o dit-xl-int8.bundle",
)


def main(argv: list[str] | None = None) -> None:
    """Entry point of the command."""
    run("dit-export", lambda: _main(argv))


def _main(argv: list[str] | None) -> int:
    parser = _make_parser()
    args = parser.parse_args(argv)
    if args.checkpoint is None and args.bisect is None:
        parser.error("a checkpoint is required")
    _check_precision(parser, args)
    if args.bisect is None and (args.most_fp16 is not None or args.least_psnr is not None):
        parser.error("--most-fp16 and --least-psnr say how much --bisect keeps; add --bisect BUNDLE")
    check_installed()
    import_libraries()
    request = None if args.checkpoint is None else _request_from_arguments(args)
    if args.bisect is not None:
        return _bisect(args, request)
    assert request is not None
    return _dry_run(request, args.json) if args.dry_run else _export(request, args.json)


def _check_precision(parser: Parser, args: argparse.Namespace) -> None:
    asked = [name for name in EXPORTED if getattr(args, name, False)]
    if len(asked) > 1:
        parser.error(
            f"{' and '.join(f'--{name}' for name in asked)}: choose one; with --int8 and --fp8 all else is FP16"
        )
    args.precision = asked[0] if asked else Precision.FP32
    if args.keep_fp32 and not asked:
        parser.error("--keep-fp32 is for FP16 and BF16 graphs, whose other units are of 16 bits; add --fp16 or --bf16")


def _make_parser() -> Parser:
    parser = Parser(
        "dit-export",
        "Export a Diffusion Transformer and its VAE to a bundle: ONNX graphs, golden records of the PyTorch "
        "reference, and a manifest. Prints how the graphs compare with PyTorch.",
        EXAMPLES,
    )
    parser.add_argument(
        "checkpoint",
        nargs="?",
        help="a diffusers DiTPipeline folder or hub id (owner/name or owner/name@revision); a .pt or .safetensors file "
        "with the official names; or with --random-weights a preset such as DiT-XL/2-256",
    )
    _add_checkpoint_options(parser)
    _add_preset_options(parser)
    _add_graph_options(parser)
    _add_task_options(parser)
    return parser


def _add_checkpoint_options(parser: Parser) -> None:
    group = parser.add_argument_group("what the checkpoint is, if it does not tell this itself")
    group.add_argument(
        "--family",
        help="diffusers, official, sit, repa, lightningdit, meanflow or multi-task-dit (default: as a file's "
        "parameters or training arguments say, else official for files; as the name says for presets; else diffusers)",
    )
    group.add_argument("--heads", type=positive, help="number of attention heads, for shapes that the paper lacks")
    group.add_argument(
        "--vae",
        metavar="FOLDER|FILE",
        help="the autoencoder's folder, file or hub id (default: the pipeline's own; for files "
        "stabilityai/sd-vae-ft-mse, or its -ema for REPA's)",
    )
    group.add_argument(
        "--vae-scaling",
        type=float,
        nargs="+",
        metavar=("FACTOR", "SHIFT"),
        help="of a VAE that is a file: how its latents are scaled, such as 0.18215 for Stable Diffusion 1's",
    )
    group.add_argument(
        "--latent-stats",
        metavar="FILE",
        help="of a file's model: mean and deviation of each channel by which its latents were normalized, as training "
        "code stores them (latents_stats.pt); in place of the VAE's own scaling",
    )
    group.add_argument("--variant", help="variant of a diffusers folder's weights files, such as fp16")
    group.add_argument("--sha256", metavar="HEX", help="refuse the transformer's weights unless this is their SHA-256")
    group.add_argument("--path", help="a velocity model's path: linear, gvp or vp (default: as the file says)")
    group.add_argument(
        "--time",
        help="which way a velocity model's time runs: noise-at-0 as SiT's, or noise-at-1 as REPA's (default: as the "
        "family or the file says)",
    )
    group.add_argument(
        "--second-time",
        help="what a MeanFlow gets beside its time t: t-r, the length of the step, or r, its end (default: as the file "
        "says)",
    )
    group.add_argument(
        "--weights",
        metavar="KEY",
        help="which weights of a file to take, such as model or ema (default: the averaged ones, or the only ones)",
    )
    group.add_argument(
        "--classes", type=positive, help="number of classes, without the null class (default: as the checkpoint says)"
    )
    group.add_argument(
        "--guidance-channels",
        type=_guidance_channels,
        metavar=f"3|{ALL}",
        help="how many latent channels guidance acts on (default: as many as in the reference)",
    )


def _add_preset_options(parser: Parser) -> None:
    group = parser.add_argument_group("presets")
    group.add_argument("--random-weights", type=int, metavar="SEED", help="give a preset random weights with this seed")
    group.add_argument("--conditioning", help="adaln-zero, adaln, cross-attention or in-context (default: adaln-zero)")
    group.add_argument("--fixed-variance", action="store_true", help="make a model without learned variance")


def _add_graph_options(parser: Parser) -> None:
    group = parser.add_argument_group("what to make")
    group.add_argument("--fp16", action="store_true", help="make strongly typed FP16 graphs (default: FP32)")
    group.add_argument(
        "--bf16",
        action="store_true",
        help="make strongly typed BF16 graphs, for numbers beyond FP16's range; decoder and encoder are FP16",
    )
    group.add_argument(
        "--keep-fp32",
        nargs="+",
        default=[],
        metavar="FILE|UNIT",
        help="with --fp16 or --bf16: units that stay FP32, such as blocks.17.attn, or a list that --bisect wrote",
    )
    group.add_argument(
        "--int8",
        action="store_true",
        help="make FP16 graphs whose blocks' linear layers multiply INT8, with ranges of the checkpoint's own samples",
    )
    group.add_argument(
        "--fp8",
        action="store_true",
        help="as --int8 with FP8 (E4M3) in place of INT8, for GPUs from compute capability 8.9",
    )
    group.add_argument(
        "--keep-fp16",
        nargs="+",
        default=[],
        metavar="FILE|UNIT",
        help="with --int8 or --fp8: units whose linear layers stay FP16, such as blocks.0 or blocks.17.mlp.fc2, or a "
        "list",
    )
    group.add_argument(
        "--calibration-images",
        type=positive,
        metavar="N",
        help="with --int8 or --fp8: images on whose trajectories ranges are found, of classes spread evenly (default: "
        "32 for a small model, 4 for others, at most one of each class)",
    )
    group.add_argument(
        "--calibration-seed",
        type=natural,
        default=0,
        metavar="SEED",
        help="with --int8 or --fp8: of these images' noise",
    )
    group.add_argument(
        "--size",
        type=image_size,
        nargs="+",
        default=[],
        metavar="HEIGHTxWIDTH",
        help="sizes of images (default: as trained)",
    )
    group.add_argument(
        "--decode-tile",
        type=positive,
        nargs="+",
        metavar="N",
        help="record how tiles of NxN latents are decoded, so that dit-verify can judge engines that dit-build "
        "--decode-tile makes; only for images larger than a tile (default: 32)",
    )
    group.add_argument("--encoder", action="store_true", help="export the autoencoder's encoder, for image-to-image")


def _add_task_options(parser: Parser) -> None:
    group = parser.add_argument_group("what to do")
    group.add_argument(
        "-o",
        "--output",
        type=Path,
        help="the bundle's folder (default: NAME-PRECISION.bundle); with --bisect the list's file (default: "
        "NAME.keep.txt)",
    )
    group.add_argument("--no-verify", action="store_true", help="do not compare the bundle on ONNX Runtime")
    group.add_argument(
        "--bisect",
        type=Path,
        metavar="BUNDLE",
        help="find the units of an FP16 bundle that break its error budget, and write the list to keep in FP32; of an "
        "INT8 bundle the layers whose quantization costs most, and the list to keep in FP16. Kept units take their "
        "weights from the checkpoint if it is given, else from the bundle, which has them rounded",
    )
    wanted = group.add_mutually_exclusive_group()
    wanted.add_argument(
        "--most-fp16",
        type=float,
        metavar="SHARE",
        help="with --bisect of an INT8 bundle: keep layers that stand out, up to this share of the INT8 multiply-adds "
        "(default: 0.1)",
    )
    wanted.add_argument(
        "--least-psnr",
        type=float,
        metavar="DB",
        help="with --bisect of an INT8 bundle: keep as few layers as give the worst recorded image this PSNR against "
        "the FP32 model's; samples images at each trial",
    )
    group.add_argument("--dry-run", action="store_true", help="print what would be made and what it needs, then stop")
    group.add_argument("--json", action="store_true", help="print the result as JSON")


def _guidance_channels(text: str) -> int | str:
    """An argparse type: a number of channels, or ``all``."""
    if text == ALL:
        return ALL
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a number of channels, such as 3, or {ALL}")
    return int(text)


def _request_from_arguments(args: argparse.Namespace) -> ExportRequest:
    return ExportRequest(
        source=args.checkpoint,
        output=args.output,
        precision=args.precision,
        keep_fp32=tuple(args.keep_fp32),
        family=args.family,
        heads=args.heads,
        vae=args.vae,
        vae_scaling=None if args.vae_scaling is None else tuple(args.vae_scaling),
        latent_stats=args.latent_stats,
        variant=args.variant,
        sha256=args.sha256,
        path=args.path,
        time=args.time,
        second_time=args.second_time,
        weights=args.weights,
        guidance_channels=args.guidance_channels,
        random_weights=args.random_weights,
        conditioning=args.conditioning,
        classes=args.classes,
        fixed_variance=args.fixed_variance,
        sizes=tuple(args.size),
        decode_tiles=None if args.decode_tile is None else tuple(args.decode_tile),
        encoder=args.encoder,
        verify=not args.no_verify,
        keep_fp16=tuple(args.keep_fp16),
        calibration_images=args.calibration_images,
        calibration_seed=args.calibration_seed,
    )


def _export(request: ExportRequest, as_json: bool) -> int:
    result = export_request(request)
    if result.not_verified is not None:
        say("dit-export", f"parity was not checked: {result.not_verified}")
    if as_json:
        print_json(result.as_json())
    else:
        print(_format_result(result))
    failed = [rung.name for rung in result.rungs if not rung.passed]
    if failed:
        say(
            "dit-export",
            f"{result.path} was written, but does not match PyTorch on {result.engine}: {', '.join(failed)}",
        )
    return 1 if failed else 0


def _format_result(result: ExportResult) -> str:
    from dit_runtime.core.text import join_lines
    from dit_runtime.verify.rung import format_rungs

    manifest, sizes = result.manifest, result.weights_bytes
    weights = ", ".join(
        f"{name} {sizes[name] / 1e6:.1f} MB" for name in ("conditioner", "step", "decoder") if name in sizes
    )
    lines = [f"{result.path}: {manifest.source.name}, {manifest.precision.name}; weights: {weights}"]
    if result.rungs:
        lines.append(f"against {manifest.source.reference}, on {result.engine}:")
        lines += format_rungs(result.rungs).split("\n")
    return join_lines(lines)


def _dry_run(request: ExportRequest, as_json: bool) -> int:
    """Print what the export would make: nothing is converted, traced or written."""
    from dit_export.dry_run import dry_run_of_request
    from dit_export.dry_run_report import format_dry_run
    from dit_runtime.core.text import join_lines

    checkpoint, estimate = dry_run_of_request(request)
    if as_json:
        print_json({"source": checkpoint.name, "reference": checkpoint.reference, **estimate.as_json()})
    else:
        head = [checkpoint.name, f"reference: {checkpoint.reference}"]
        print(f"{join_lines(head)}\n{format_dry_run(estimate)}")
    return 0


def _bisect(args: argparse.Namespace, request: ExportRequest | None) -> int:
    """Find the units of a bundle to keep in FP32 or FP16; with a checkpoint, kept units have its weights."""
    from dit_export.bisect.keep_list import find_keep_list
    from dit_export.bisect.quantization_bisection import MOST_FP16, QuantizationBisection, Wanted
    from dit_export.bisect.report import format_bisection, format_quantization_bisection
    from dit_runtime.bundle.reader import open_bundle

    wanted = None
    if args.most_fp16 is not None or args.least_psnr is not None:
        wanted = Wanted(MOST_FP16 if args.most_fp16 is None else args.most_fp16, args.least_psnr)
    bundle = open_bundle(args.bisect)
    output = args.output or Path(f"{named(args.bisect).stem}.keep.txt")
    found = find_keep_list(bundle, None if request is None else request.checkpoint, output, wanted)
    if args.json:
        print_json({"bundle": str(args.bisect), "output": str(output) if found.findings else None, **found.as_json()})
    elif isinstance(found, QuantizationBisection):
        print(format_quantization_bisection(found, bundle, output))
    else:
        print(format_bisection(found, bundle, output))
    return 0


if __name__ == "__main__":
    main()
