"""``dit-sample``: images from a bundle, without torch."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dit_runtime.commands.common import (
    ENGINE_HELP,
    PRECISION_HELP,
    PRECISIONS,
    STORE_HELP,
    Parser,
    image_size,
    positive,
    print_json,
    run,
    say,
    seed_number,
    thread_count,
)
from dit_runtime.core.text import join_lines
from dit_runtime.output.request import (
    ClusterRequest,
    DecodeSettings,
    InputPaths,
    LabelledImages,
    OutputRequest,
    RecordedImages,
    SampleRequest,
    ShardSettings,
    TableRequest,
)
from dit_runtime.samplers.by_name import AVERAGE_SAMPLERS, DIFFUSION_SAMPLERS, FLOW_SAMPLERS

if TYPE_CHECKING:
    from dit_runtime.output.writer import Written

EXAMPLES = (
    "dit-sample my.bundle --labels 0 1 2 3 --seed 7 -o images.png",
    'dit-sample my.bundle --labels "golden retriever" --steps 250 --sampler ddpm --guidance 4 -o images/',
    "dit-sample my.bundle --labels all --count 1000 --sampler dpmpp-2m --steps 20 -o many/",
    "dit-sample my.bundle --labels all --count 1000 --ray auto --workers 8 --shard-size 1000 -o shards/",
    "dit-sample my.bundle --labels 3:0.7+5:0.3 --guidance-interval 0.1 0.7 -o mixed.png",
    "dit-sample my.bundle --labels 3 --init photo.png --strength 0.6 -o changed.png",
    "dit-sample my.bundle --from-image images/00000_class207_seed0.png -o again.png",
)


def main(argv: list[str] | None = None) -> None:
    """Entry point of the command."""
    run("dit-sample", lambda: _main(argv))


def _main(argv: list[str] | None) -> int:
    request = _parse(argv)
    return _write_table(request) if isinstance(request, TableRequest) else _sample(request)


def _sample(request: SampleRequest) -> int:
    written = _write_images(request) if request.output.shards is None else _write_shards(request)
    if request.output.list_all:
        print_json(_json_from_written(written))
    else:
        print(_text_from_written(request, written))
    return 0


def _write_images(request: SampleRequest) -> Written:
    from dit_runtime.core.progress import Progress
    from dit_runtime.output.jobs import jobs_from_request
    from dit_runtime.output.writer import count_work, write_images

    jobs = jobs_from_request(request)
    for warning in jobs.warnings:
        say("dit-sample", warning)
    with Progress("sampling", count_work(jobs)) as bar:
        return write_images(jobs, request.output, bar)


def _write_shards(request: SampleRequest) -> Written:
    from dit_runtime.core.progress import Progress
    from dit_runtime.output.ray_shards import write_shards_on_ray
    from dit_runtime.output.shards import ShardMaker, write_shards

    if request.cluster is not None:
        return write_shards_on_ray(request)
    maker = ShardMaker(request)
    with Progress("sampling", maker.count_work(maker.plan.missing())) as bar:
        return write_shards(maker, bar)


def _write_table(request: TableRequest) -> int:
    """``--write-table`` needs no engine."""
    from dit_runtime.bundle.reader import open_bundle
    from dit_runtime.samplers.by_name import count_default_steps, schedule_for
    from dit_runtime.samplers.schedule import write_table

    manifest = open_bundle(request.bundle).manifest
    sampler = manifest.defaults.sampler if request.sampler is None else request.sampler
    model, diffusion, steps = manifest.model, manifest.diffusion, request.steps
    if steps is None:
        steps = count_default_steps(sampler, model, diffusion, manifest.defaults.steps, request.spacing)
    schedule = schedule_for(sampler, model, diffusion, steps, request.eta, request.spacing)
    write_table(schedule, request.path)
    rows = f"{len(schedule)} rows of {schedule.coefficients.shape[1]} numbers"
    line = f"{request.path}: {schedule.sampler}, {schedule.steps} steps, {rows}"
    print(join_lines([line]))
    return 0


def _json_from_written(written: Written) -> dict[str, Any]:
    return {
        "files": [str(file) for file in written.files],
        "pictures": list(written.entries),
        "seconds": round(written.seconds, 3),
        "difference": written.difference,
        "torch_imported": "torch" in sys.modules,
    }


def _text_from_written(request: SampleRequest, written: Written) -> str:
    output = request.output.path
    if not written.count:
        how = "--overwrite makes" if request.output.shards is None else "without the folder the command makes"
        return join_lines([f"{output}: every image is there already; {how} them again"])
    entry = written.entries[0]
    strength = "" if entry["strength"] is None else f" at strength {entry['strength']:g}"
    packed = "" if request.output.shards is None else f" in {len(written.files)} shards"
    text = (
        f"{output}: {written.count} images{packed}, {entry['sampler']} {entry['steps']} steps{strength}, guidance "
        f"{entry['guidance']:g}, {entry['precision']} on {entry['engine']}, {written.seconds:.1f} s"
    )
    if not isinstance(request.images, RecordedImages):
        return join_lines([text])
    original = request.images.path
    if written.difference is None:
        compared = f"arranged differently from {original}: not compared"
    elif written.difference:
        compared = f"differs by up to {written.difference} of 255 levels"
    else:
        compared = f"the same as {original}"
    return join_lines([text, compared])


def _parse(argv: list[str] | None) -> SampleRequest | TableRequest:
    """The request of the arguments; arguments that contradict each other end the command."""
    parser = Parser("dit-sample", "Sample images from a bundle. Torch is not needed.", EXAMPLES)
    parser.add_argument("bundle", type=Path, help="a bundle that dit-export wrote")
    _add_image_arguments(parser)
    _add_sampling_arguments(parser)
    _add_noise_arguments(parser)
    _add_engine_arguments(parser)
    _add_output_arguments(parser)
    args = parser.parse_args(argv)
    if args.write_table:
        _refuse_beside_table(args)
        return TableRequest(args.bundle, args.write_table, args.sampler, args.steps, args.eta, args.spacing)
    if (args.labels is None) == (args.from_image is None):
        parser.error("expected --labels, or --from-image with an image of dit-sample")
    if args.from_image:
        _refuse_recorded(parser, args)
    _check_shards(parser, args)
    return _request_from_arguments(args)


def _request_from_arguments(args: argparse.Namespace) -> SampleRequest:
    table = Path(args.sampler) if (args.sampler or "").endswith(".json") else None
    shards = None if args.shard_size is None else ShardSettings(args.shard_size, args.shard_format == "folder")
    return SampleRequest(
        bundle=args.bundle,
        images=RecordedImages(args.from_image) if args.from_image else _labelled_images_from_arguments(args),
        output=OutputRequest(args.output, args.columns, args.overwrite, list_all=args.json, shards=shards),
        inputs=InputPaths(args.noise, table, args.init),
        engine=args.engine,
        precision=args.precision,
        threads=args.threads or 0,
        store=args.store,
        cluster=None if args.ray is None else ClusterRequest(args.ray, args.workers),
    )


def _labelled_images_from_arguments(args: argparse.Namespace) -> LabelledImages:
    return LabelledImages(
        labels=tuple(args.labels),
        count=args.count,
        seeds=tuple(args.seeds) if args.seeds else args.seed,
        settings={
            "steps": args.steps,
            "sampler": args.sampler,
            "spacing": args.spacing,
            "eta": args.eta,
            "guidance_interval": (args.guidance_interval[0], args.guidance_interval[1]),
            "guidance_schedule": args.guidance_schedule,
            "negative_label": args.negative_label,
            "noise_device": args.noise_device,
            "noise_dtype": args.noise_dtype,
            "cuda_threads": args.cuda_threads,
            "strength": args.strength,
        },
        guidance=tuple(args.guidance) if args.guidance else None,
        decoding=DecodeSettings(args.decode_tile, args.decode_batch),
        batch_size=args.batch_size,
        size=args.size,
        shard=args.shard or (1, 1),
    )


def _check_shards(parser: Parser, args: argparse.Namespace) -> None:
    """Options that mean nothing without others are mistakes."""
    for option, needed in (("shard_format", "shard_size"), ("ray", "shard_size"), ("workers", "ray")):
        if vars(args)[option] is not None and vars(args)[needed] is None:
            names = [f"--{name.replace('_', '-')}" for name in (option, needed)]
            parser.error(f"{names[0]} without {names[1]}: expected both")


def _refuse_beside_table(args: argparse.Namespace) -> None:
    """With --write-table, an option that changes no sampler table is a mistake."""
    from dit_runtime.core.errors import SamplingError

    for option in ("labels", "from_image", "guidance", "noise", "init", "strength", "shard_size"):
        if vars(args)[option] is not None:
            name = option.replace("_", "-")
            raise SamplingError(
                f"--{name} with --write-table: a table has none of it, and no image is made; leave it out"
            )


def _refuse_recorded(parser: Parser, args: argparse.Namespace) -> None:
    """With --from-image, an option that the image's record decides is a mistake."""
    recorded = (
        *("count", "seed", "seeds", "steps", "spacing", "eta", "guidance", "guidance_interval", "guidance_schedule"),
        *("negative_label", "noise_device", "noise_dtype", "cuda_threads", "batch_size", "strength", "size"),
        *("decode_tile", "decode_batch", "shard", "shard_size"),
    )
    given = [name for name in recorded if vars(args)[name] != parser.get_default(name)]
    if args.sampler is not None and not args.sampler.endswith(".json"):
        given.append("sampler")
    if given:
        option = f"--{given[0].replace('_', '-')}"
        parser.error(f"{option} with --from-image: the image's own record says how it was made; leave it out")


def _add_image_arguments(parser: Parser) -> None:
    group = parser.add_argument_group("what to make")
    group.add_argument(
        "--labels",
        nargs="+",
        metavar="LABEL",
        help="class numbers, class names, or mixtures such as 3:0.7+5:0.3; 'all' is every class",
    )
    group.add_argument("--count", type=positive, default=1, metavar="N", help="images of each label")
    group.add_argument("--from-image", type=Path, metavar="PNG", help="make an image again, from the record in it")
    seeds = group.add_mutually_exclusive_group()
    seeds.add_argument(
        "--seed", type=seed_number, default=0, help="seed of the first image; the next images count up from it"
    )
    seeds.add_argument("--seeds", type=seed_number, nargs="+", metavar="SEED", help="one seed for each image")


def _add_sampling_arguments(parser: Parser) -> None:
    group = parser.add_argument_group("how to sample")
    group.add_argument("--steps", type=int, help="sampling steps (default: the bundle's)")
    group.add_argument(
        "--sampler",
        help=f"{_either(DIFFUSION_SAMPLERS)}; for velocity models {_either(FLOW_SAMPLERS)}; "
        f"for those of two times {_either(AVERAGE_SAMPLERS)}; or a sampler table, TABLE.json (default: the bundle's)",
    )
    group.add_argument(
        "--spacing",
        help="of timesteps: leading, trailing, linspace, karras, lu, exponential, official, official-ddim (default: "
        "the bundle's; ddpm: official)",
    )
    group.add_argument("--eta", type=float, default=0.0, help="DDIM's stochasticity, 0 to 1")
    group.add_argument(
        "--guidance",
        type=float,
        nargs="+",
        metavar="SCALE",
        help="one scale, or one for each image; 1 is no guidance, at half the cost (default: the bundle's)",
    )
    group.add_argument(
        "--guidance-interval",
        type=float,
        nargs=2,
        default=(0.0, 1.0),
        metavar=("LO", "HI"),
        help="guide only at noise times from LO to HI: 1 is pure noise, 0 the image; a step outside costs half",
    )
    group.add_argument("--guidance-schedule", default="constant", help="constant, linear or cosine")
    group.add_argument("--negative-label", metavar="LABEL", help="guide away from this class, not from the null class")


def _shard(text: str) -> tuple[int, int]:
    """An argparse type: a part of the images, as ``2/8``."""
    number, _, shards = text.partition("/")
    if not (number.isdecimal() and shards.isdecimal() and len(text) < 20 and 1 <= int(number) <= int(shards)):
        raise argparse.ArgumentTypeError(f"got {text!r:.80}, expected I/N, such as 2/8: the second of eight parts")
    return int(number), int(shards)


def _either(names: Sequence[str]) -> str:
    return " or ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _add_noise_arguments(parser: Parser) -> None:
    group = parser.add_argument_group("from what to start")
    group.add_argument(
        "--noise", type=Path, metavar="NPY", help="start from this float32 [N,C,H,W], not from the seeds' noise"
    )
    group.add_argument(
        "--noise-device", default="cpu", help="the device whose PyTorch noise the seeds give: cpu or cuda"
    )
    group.add_argument("--noise-dtype", default="float32", help="the dtype PyTorch draws noise in: float32 or float16")
    group.add_argument(
        "--cuda-threads", type=positive, metavar="N", help="resident threads of the GPU, for noise of large latents"
    )
    group.add_argument(
        "--init",
        type=Path,
        metavar="FILE",
        help="start from this image (PNG, JPEG, WebP, BMP) or latents (.npy), not from noise alone",
    )
    group.add_argument(
        "--strength", type=float, help="with --init: the share of the steps to run, above 0 to 1 (default: 0.6)"
    )


def _add_engine_arguments(parser: Parser) -> None:
    group = parser.add_argument_group("with what to run")
    group.add_argument("--engine", default="auto", help=f"{ENGINE_HELP}; auto takes only an engine that is verified")
    group.add_argument("--precision", choices=PRECISIONS, metavar="{fp32,bf16}", help=PRECISION_HELP)
    group.add_argument("--store", type=Path, metavar="DIR", help=STORE_HELP)
    group.add_argument(
        "--threads",
        type=thread_count(1),
        help="of the CPU (default: the engine's choice; with --from-image, the number in the record)",
    )
    group.add_argument(
        "--ray",
        metavar="ADDRESS",
        help="make shards on a Ray cluster: auto is this machine's, local is one that is started here, or HOST:PORT",
    )
    group.add_argument(
        "--workers", type=positive, metavar="N", help="of the cluster (default: one for each GPU, else for each node)"
    )


def _add_output_arguments(parser: Parser) -> None:
    group = parser.add_argument_group("what to write")
    group.add_argument(
        "--size",
        type=image_size,
        metavar="HEIGHTxWIDTH",
        help="of the images: one of the bundle's sizes (default: its first)",
    )
    group.add_argument("--batch-size", type=positive, default=16, help="images in one engine call")
    group.add_argument(
        "--decode-tile",
        type=positive,
        metavar="N",
        help="decode in tiles of N latent pixels, for less memory; the image differs a little",
    )
    group.add_argument("--decode-batch", type=positive, metavar="N", help="images in one decoder call (default: all)")
    group.add_argument("--columns", type=positive, help="columns of the grid (default: nearly square)")
    group.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path("samples.png"),
        help="FILE.png for a grid, else a folder of files; images that the folder has are not made again",
    )
    group.add_argument("--overwrite", action="store_true", help="make all images of a folder again")
    group.add_argument(
        "--shard",
        type=_shard,
        metavar="I/N",
        help="make the I-th of N parts of the images, or of the shards; they may share a folder, on several machines",
    )
    group.add_argument(
        "--shard-size",
        type=positive,
        metavar="N",
        help="pack the images into files of N, as WebDataset reads them; the same command goes on where it was stopped",
    )
    group.add_argument(
        "--shard-format", choices=("tar", "folder"), help="a shard is a tar file, or a folder of files (default: tar)"
    )
    group.add_argument(
        "--write-table", type=Path, metavar="JSON", help="write the named sampler's table, and make no image"
    )
    group.add_argument("--json", action="store_true", help="print the files and how they were made as JSON")


if __name__ == "__main__":
    main()
