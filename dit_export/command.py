"""``dit-export``: a checkpoint in, a verified bundle out."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from dit_runtime.commands.common import (
    Parser,
    image_size,
    positive,
    print_json,
    run,
)
from dit_runtime.core.errors import CheckpointError, EngineError

if TYPE_CHECKING:
    from dit_export.checkpoints.sources import Source
    from dit_export.graphs.precision import Precision

EXAMPLES = (
    "dit-export facebook/DiT-XL-2-256 --fp16 -o dit-xl.bundle",
    "dit-export DiT-XL-2-512x512.pt --vae sd-vae-ft-mse/ --fp16 --encoder -o dit-xl-512.bundle",
    "dit-export SiT-XL-2-256.pt --family sit --vae sd-vae-ft-mse/ --size 256x256 256x384 -o sit.bundle",
    "dit-export DiT-XL/2-256 --conditioning cross-attention --dry-run",
    "dit-export DiT-XL/2-256 --random-weights 0 --fp16 -o xl-random.bundle",
    "dit-export facebook/DiT-XL-2-256 --bisect dit-xl.bundle -o keep.txt",
    "dit-export facebook/DiT-XL-2-256 --fp16 --keep-fp32 keep.txt -o dit-xl.bundle",
)


def main(argv: list[str] | None = None) -> None:
    """Entry point of the command."""
    run("dit-export", lambda: _main(argv))


def _main(argv: list[str] | None) -> int:
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
    what = parser.add_argument_group("what the checkpoint is, where it does not say itself")
    what.add_argument(
        "--family",
        help="diffusers, official or sit (default: official for files, as the name says for presets, else diffusers)",
    )
    what.add_argument("--heads", type=positive, help="attention heads, for shapes that are none of the paper's")
    what.add_argument(
        "--vae",
        metavar="FOLDER",
        help="the autoencoder's folder or hub id (default: the pipeline's own; for files stabilityai/sd-vae-ft-mse)",
    )
    what.add_argument("--variant", help="of a diffusers folder's weights files, such as fp16")
    what.add_argument("--sha256", metavar="HEX", help="refuse the transformer's weights unless this is their SHA-256")
    what.add_argument("--path", help="of a SiT: linear, gvp or vp (default: linear)")
    what.add_argument("--guidance-channels", metavar="3|all", help="which guidance acts on (default: the reference's)")
    preset = parser.add_argument_group("presets")
    preset.add_argument("--random-weights", type=int, metavar="SEED", help="a preset's shape with seeded weights")
    preset.add_argument("--conditioning", help="adaln-zero, adaln, cross-attention or in-context (default: adaln-zero)")
    preset.add_argument("--classes", type=positive, help="how many (default: 1000)")
    preset.add_argument("--fixed-variance", action="store_true", help="without learned variance")
    made = parser.add_argument_group("what to make")
    made.add_argument("--fp16", action="store_true", help="strongly typed FP16 graphs (default: FP32)")
    made.add_argument(
        "--keep-fp32",
        nargs="+",
        metavar="FILE|UNIT",
        help="with --fp16: units that stay FP32, such as blocks.17.attn, or a list that --bisect wrote",
    )
    made.add_argument(
        "--size",
        type=image_size,
        nargs="+",
        metavar="HEIGHTxWIDTH",
        help="of images (default: as trained)",
    )
    made.add_argument(
        "--decode-tile",
        type=positive,
        nargs="+",
        default=[32],
        metavar="N",
        help="record the decoding of tiles of NxN latents, by which dit-verify judges engines that dit-build "
        "--decode-tile makes; of images that are larger (default: 32)",
    )
    made.add_argument("--encoder", action="store_true", help="the autoencoder's encoder too, for image-to-image")
    made.add_argument(
        "-o",
        "--output",
        type=Path,
        help="the bundle's folder (default: NAME-PRECISION.bundle); of --bisect the list (default: NAME.keep.txt)",
    )
    made.add_argument("--no-verify", action="store_true", help="leave out the comparison on ONNX Runtime")
    made.add_argument(
        "--bisect",
        type=Path,
        metavar="BUNDLE",
        help="find which units of an FP16 bundle break its error budget and write the list to keep in FP32; with the "
        "checkpoint, units in FP32 have its weights, otherwise the bundle's",
    )
    made.add_argument("--dry-run", action="store_true", help="print what would be made and needed, and stop")
    made.add_argument("--json", action="store_true", help="print the result as JSON")
    args = parser.parse_args(argv)
    if args.checkpoint is None and args.bisect is None:
        parser.error("a checkpoint is required")
    if args.keep_fp32 and not args.fp16:
        parser.error("--keep-fp32 is for FP16 graphs, whose units are FP16 otherwise; add --fp16")

    missing = [name for name in ("torch", "diffusers", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise EngineError(f"{' and '.join(missing)} not installed; pip install 'dit-export[export]'")
    if args.checkpoint is None:
        return _bisect(args.bisect, None, args.output, args.json)
    from dit_export.checkpoints.sources import PRESET, Source
    from dit_export.export import bundle_from_checkpoint
    from dit_export.graphs.precision import FP32, fp16_keeping, keep_list
    from dit_runtime.sampling.tiles import check_tile

    for tile in args.decode_tile:
        check_tile(tile)
    precision = fp16_keeping(keep_list(args.keep_fp32 or ())) if args.fp16 else FP32
    seed = args.random_weights
    if seed is None and args.dry_run and PRESET.fullmatch(args.checkpoint):
        seed = 0  # a preset's plan needs shapes alone
    source = Source(
        name=args.checkpoint,
        random_seed=seed,
        family=args.family,
        heads=args.heads,
        autoencoder=args.vae,
        variant=args.variant,
        sha256=args.sha256,
        path=args.path,
        guidance_channels=_guidance_channels(args.guidance_channels),
        image_sizes=tuple(args.size or ()),
        conditioning=args.conditioning,
        classes=args.classes,
        learned_variance=False if args.fixed_variance else None,
        tiles=tuple(args.decode_tile),
    )
    if args.bisect is not None:
        return _bisect(args.bisect, source, args.output, args.json)
    if args.dry_run:
        return _dry_run(source, precision, args.encoder, args.json)
    path = Path(args.checkpoint)
    name = args.checkpoint.replace("@", "-").replace("/", "-")
    if path.exists():
        name = path.resolve().stem if path.is_file() else path.resolve().name
    output = args.output or Path(f"{name or 'checkpoint'}-{precision.name}.bundle")
    bundle = bundle_from_checkpoint(source, output, precision, args.encoder)

    from dit_runtime.backends.onnxruntime.engine import OnnxRuntimeEngine
    from dit_runtime.verify.rung import Rung, format_table
    from dit_runtime.verify.verdicts import verify_sizes

    rungs: list[Rung] = []
    engine_name = None
    if not args.no_verify:
        try:
            engine_name, rungs = verify_sizes(bundle, bundle.manifest.image_sizes, OnnxRuntimeEngine)
        except EngineError as error:
            print(f"dit-export: parity was not checked: {error}", file=sys.stderr)
    sizes = {name: bundle.manifest.files[graph.weights].bytes for name, graph in bundle.manifest.graphs.items()}
    passed = all(rung.passed for rung in rungs)
    if args.json:
        print_json(
            {
                "bundle": str(output),
                "digest": bundle.digest,
                "source": bundle.manifest.source.name,
                "precision": precision.name,
                "weights_bytes": sizes,
                "engine": engine_name,
                "passed": passed if rungs else None,
                "rungs": [rung.as_json() for rung in rungs],
            }
        )
    else:
        weights = ", ".join(f"{name} {sizes[name] / 1e6:.1f} MB" for name in ("conditioner", "step", "decoder"))
        print(f"{output}: {bundle.manifest.source.name}, {precision.name}; weights: {weights}")
        if rungs:
            print(f"against {bundle.manifest.source.reference}, on {engine_name}:")
            print(format_table(rungs))
    if not passed:
        failed = ", ".join(rung.name for rung in rungs if not rung.passed)
        print(
            f"dit-export: {output} was written, but does not match PyTorch on {engine_name}: {failed}", file=sys.stderr
        )
        return 1
    return 0


def _dry_run(source: Source, precision: Precision, encoder: bool, as_json: bool) -> int:
    """Print what the export would make: nothing is converted, traced or written."""
    from dit_export.checkpoints.sources import load_checkpoint
    from dit_export.dry_run import dry_run_of, format_dry_run
    from dit_export.graphs.precision import check_units

    checkpoint = load_checkpoint(source)
    check_units(precision, checkpoint.model)
    plan = dry_run_of(
        checkpoint.model,
        precision,
        checkpoint.autoencoder,
        family=checkpoint.family,
        channels=checkpoint.channels,
        trained_size=checkpoint.trained_size,
        copies_differ=checkpoint.copies_differ,
        sizes=checkpoint.sizes,
        encoder=encoder,
    )
    if as_json:
        print_json({"source": checkpoint.name, "reference": checkpoint.reference, **plan.as_json()})
    else:
        print(f"{checkpoint.name}\nreference: {checkpoint.reference}\n{format_dry_run(plan)}")
    return 0


def _bisect(path: Path, source: Source | None, output: Path | None, as_json: bool) -> int:
    """Find what to keep in FP32; with a checkpoint, units in FP32 have its weights."""
    from dit_runtime.bundle.reader import open_bundle
    from dit_runtime.core.files import check_writable

    bundle = open_bundle(path)
    output = output or Path(f"{path.resolve().stem}.keep.txt")
    check_writable(output)
    from dit_export.bisect.search import (
        bisection_of,
        format_bisection,
        kernel_cost,
        write_keep_list,
    )
    from dit_export.bisect.trials import fp32_weights
    from dit_export.checkpoints.sources import load_checkpoint

    weights = None if source is None else fp32_weights(load_checkpoint(source), bundle)
    bisection = bisection_of(bundle, weights)
    if bisection.findings:
        write_keep_list(output, bisection, bundle)
        units = [finding.unit for finding in bisection.findings]
        bisection = replace(bisection, cost=kernel_cost(bundle, units, weights))
    if as_json:
        print_json({"bundle": str(path), "output": str(output) if bisection.findings else None, **bisection.as_json()})
    else:
        print(format_bisection(bisection, bundle, output))
    return 0


def _guidance_channels(text: str | None) -> int | None:
    if text is None or text == "all":
        return None if text is None else 0
    if not text.isdecimal() or int(text) < 1:
        raise CheckpointError(f"--guidance-channels {text}: expected a number of channels, such as 3, or all")
    return int(text)
