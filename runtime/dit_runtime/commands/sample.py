"""``dit-sample``: images from a bundle, without torch."""

from __future__ import annotations

import argparse
import sys
import time
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
)

if TYPE_CHECKING:
    from dit_runtime.output.images import Images
    from dit_runtime.output.jobs import Jobs
    from dit_runtime.pipeline import Pipeline

EXAMPLES = (
    "dit-sample my.bundle --labels 0 1 2 3 --seed 7 -o images.png",
    'dit-sample my.bundle --labels "golden retriever" --steps 250 --sampler ddpm --guidance 4 -o images/',
    "dit-sample my.bundle --labels all --count 1000 --sampler dpmpp-2m --steps 20 -o many/",
    "dit-sample my.bundle --labels 3:0.7+5:0.3 --guidance-interval 0.1 0.7 -o mixed.png",
    "dit-sample my.bundle --labels 3 --init photo.png --strength 0.6 -o changed.png",
    "dit-sample my.bundle --from-image images/00000_class207_seed0.png -o again.png",
)


def main(argv: list[str] | None = None) -> None:
    """Entry point of the command."""
    run("dit-sample", lambda: _main(argv))


def _parser() -> Parser:
    parser = Parser("dit-sample", "Sample images from a bundle. Torch is not needed.", EXAMPLES)
    parser.add_argument("bundle", type=Path, help="a bundle that dit-export wrote")
    what = parser.add_argument_group("what")
    what.add_argument(
        "--labels", nargs="+", metavar="LABEL", help="class numbers, names, or mixtures such as 3:0.7+5:0.3; 'all'"
    )
    what.add_argument("--count", type=positive, default=1, metavar="N", help="images of each label")
    what.add_argument("--from-image", type=Path, metavar="PNG", help="make an image again, from its record")
    seeds = what.add_mutually_exclusive_group()
    seeds.add_argument("--seed", type=int, default=0, help="seed of the first image; the next ones count up")
    seeds.add_argument("--seeds", type=int, nargs="+", metavar="SEED", help="one seed per image")
    how = parser.add_argument_group("how")
    how.add_argument("--steps", type=int, help="sampling steps (default: the bundle's)")
    how.add_argument(
        "--sampler",
        help="ddim, ddpm, dpmpp-2m, dpmpp-2m-sde, dpmpp-3m, unipc or euler-ancestral; for velocity models euler, heun, "
        "sde-euler or sde-heun; or a TABLE.json (default: the bundle's)",
    )
    how.add_argument(
        "--spacing",
        help="leading, trailing, linspace, karras, official or official-ddim (default: the bundle's; ddpm: official)",
    )
    how.add_argument("--eta", type=float, default=0.0, help="DDIM's stochasticity, 0 to 1")
    how.add_argument(
        "--guidance",
        type=float,
        nargs="+",
        metavar="SCALE",
        help="one scale, or one per image; 1 is none, at half the cost (default: the bundle's)",
    )
    how.add_argument(
        "--guidance-interval",
        type=float,
        nargs=2,
        default=(0.0, 1.0),
        metavar=("LO", "HI"),
        help="noise times between which to guide: 1 is pure noise, 0 the image; outside, a step costs half",
    )
    how.add_argument("--guidance-schedule", default="constant", help="constant, linear or cosine")
    how.add_argument("--negative-label", metavar="LABEL", help="guide away from this class, not from the null class")
    how.add_argument(
        "--noise", type=Path, metavar="NPY", help="float32 [N,C,H,W] to start from, in place of the seeds'"
    )
    how.add_argument("--noise-device", default="cpu", help="whose PyTorch generator the seeds stand for: cpu or cuda")
    how.add_argument("--noise-dtype", default="float32", help="float32 or float16: what PyTorch would draw in")
    how.add_argument(
        "--cuda-threads", type=positive, metavar="N", help="resident threads of the GPU, for large latents"
    )
    how.add_argument(
        "--init", type=Path, metavar="FILE", help="start from this image (or latents, .npy), not from noise alone"
    )
    how.add_argument(
        "--strength", type=float, help="with --init: the share of the steps to run, above 0 to 1 (default: 0.6)"
    )
    how.add_argument(
        "--size",
        type=image_size,
        metavar="HEIGHTxWIDTH",
        help="of the images, one that the bundle has (default: its first)",
    )
    where = parser.add_argument_group("where")
    where.add_argument("--engine", default="auto", help=f"{ENGINE_HELP}; auto takes a verified one only")
    where.add_argument("--precision", choices=PRECISIONS, metavar="{fp32,bf16}", help=PRECISION_HELP)
    where.add_argument("--store", type=Path, metavar="DIR", help=STORE_HELP)
    where.add_argument(
        "--threads", type=positive, help="of the CPU (default: the engine's choice; with --from-image, the record's)"
    )
    where.add_argument("--batch-size", type=positive, default=16, help="images per engine call")
    where.add_argument(
        "--decode-tile",
        type=positive,
        metavar="N",
        help="decode in tiles of N latent pixels, for less memory; the image differs a little",
    )
    where.add_argument("--decode-batch", type=positive, metavar="N", help="images per decoder call (default: all)")
    where.add_argument("--columns", type=positive, help="columns of the grid (default: near-square)")
    where.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path("samples.png"),
        help="FILE.png for a grid, else a folder of files, where images that are there already are not made again",
    )
    where.add_argument("--overwrite", action="store_true", help="make all images of a folder again")
    where.add_argument("--write-table", type=Path, metavar="JSON", help="write the sampler's table, and make no image")
    where.add_argument("--json", action="store_true", help="print what was made as JSON")
    return parser


def _main(argv: list[str] | None) -> int:
    parser = _parser()
    args = parser.parse_args(argv)
    if (args.labels is None) == (args.from_image is None) and not args.write_table:
        parser.error("expected --labels, or --from-image with an image of dit-sample")
    if args.from_image and not args.write_table:
        _refuse_recorded(parser, args)

    if args.write_table:
        return _write_table(args)
    from dit_runtime.bundle.reader import open_bundle
    from dit_runtime.core.errors import OutputError
    from dit_runtime.core.files import check_writable
    from dit_runtime.output.images import read_png
    from dit_runtime.output.jobs import jobs_from_arguments, jobs_from_record, read_input_files
    from dit_runtime.output.provenance import check_bundle, entries_from_text
    from dit_runtime.pipeline import Pipeline

    single = args.output.suffix.lower() == ".png"
    if single and args.output.is_dir():
        raise OutputError(f"{args.output}: is a folder, expected a file; choose another --output")
    if args.from_image and args.output.resolve() == args.from_image.resolve():
        raise OutputError(f"{args.output}: is the image to be made again; choose another --output")
    check_writable(args.output if single else args.output / "image.png")
    given, bundle = read_input_files(args), open_bundle(args.bundle, args.store)
    if args.from_image:
        entries = entries_from_text(args.from_image, read_png(args.from_image)[1])
        check_bundle(bundle, entries[0])
        size = tuple(entries[0]["size"])
        pipe = Pipeline(bundle, args.engine, args.threads or entries[0]["threads"], size, args.precision)
        work = jobs_from_record(pipe, args.from_image, entries, given)
    else:
        pipe = Pipeline(bundle, args.engine, args.threads or 0, args.size, args.precision)
        work = jobs_from_arguments(pipe, args, given, None if single else args.output)
    return _sampled(pipe, args, work, single)


def _refuse_recorded(parser: Parser, args: argparse.Namespace) -> None:
    """With --from-image, an option that the image's record decides is a mistake."""
    recorded = (
        *("count", "seed", "seeds", "steps", "spacing", "eta", "guidance", "guidance_interval", "guidance_schedule"),
        *("negative_label", "noise_device", "noise_dtype", "cuda_threads", "batch_size", "strength", "size"),
        *("decode_tile", "decode_batch"),
    )
    given = [name for name in recorded if getattr(args, name) != parser.get_default(name)]
    if args.sampler is not None and not args.sampler.endswith(".json"):
        given.append("sampler")
    if given:
        option = f"--{given[0].replace('_', '-')}"
        parser.error(f"{option} with --from-image: the image's own record says how it was made; leave it out")


def _write_table(args: argparse.Namespace) -> int:
    """``--write-table``: no engine is needed."""
    from dit_runtime.bundle.reader import open_bundle
    from dit_runtime.core.errors import SamplingError
    from dit_runtime.samplers.by_name import schedule_for
    from dit_runtime.samplers.schedule import write_table

    for option in ("labels", "from_image", "guidance", "noise", "init", "strength"):
        if getattr(args, option) is not None:
            name = option.replace("_", "-")
            raise SamplingError(
                f"--{name} with --write-table: a table has none of it, and no image is made; leave it out"
            )
    manifest = open_bundle(args.bundle).manifest
    sampler = args.sampler or manifest.defaults.sampler
    steps = manifest.defaults.steps if args.steps is None else args.steps
    schedule = schedule_for(sampler, manifest.model, manifest.diffusion, steps, args.eta, args.spacing)
    write_table(schedule, args.write_table)
    print(f"{args.write_table}: {schedule.sampler}, {schedule.steps} steps, {len(schedule)} rows of 17 numbers")
    return 0


def _sampled(pipe: Pipeline, args: argparse.Namespace, work: Jobs, single: bool) -> int:
    """Make the images, write each batch as soon as it is decoded, and say what was done."""
    import numpy as np

    from dit_runtime.core.errors import SamplingError
    from dit_runtime.core.progress import Progress
    from dit_runtime.output.images import grid, read_png, write_png
    from dit_runtime.output.jobs import file_name
    from dit_runtime.output.provenance import text_from_entries

    start = time.monotonic()
    pipe.once = work.count == 1
    before = read_png(args.from_image)[0] if args.from_image else None
    collected: list[Images] = []
    entries: list[dict[str, Any]] = []  # of a long run into a folder only the first, unless they are to be printed
    files: list[Path] = []
    count = 0
    failure: SamplingError | None = None
    with Progress("sampling", work.count * (work.steps + 1)) as bar:
        try:
            for group in work.groups:
                if not group.batch:
                    bar.skip(work.steps + 1)
                    continue
                final = pipe.sample_latents(group.batch, bar.advance)
                images = pipe.decode(final, work.asked.decode_tile, work.asked.decode_batch)
                for index, place, entry in group.keep:
                    count += 1
                    file = args.output
                    if single:
                        collected.append(images[place.position])
                    else:
                        file = args.output / file_name(index, group.batch[place.position])
                        write_png(file, images[place.position], text_from_entries([entry]))
                    if single or args.json or not entries:
                        entries.append(entry)
                    if args.json and not single:
                        files.append(file)
                bar.advance()
        except SamplingError as error:
            failure = error
    if single and collected:
        columns = args.columns or (before.shape[1] // collected[0].shape[1] if before is not None else None)
        write_png(args.output, grid(np.stack(collected), columns), text_from_entries(entries))
        files = [args.output]
    if failure is not None:
        finished = f"; {count} finished images are in {args.output}" if count else ""
        raise SamplingError(f"{failure}{finished}") from failure
    seconds = time.monotonic() - start
    difference = None
    if before is not None:
        made = read_png(file)[0]
        if made.shape == before.shape:
            difference = int(np.abs(before.astype(int) - made).max())
    if args.json:
        print_json(
            {
                "files": [str(file) for file in files],
                "pictures": entries,
                "seconds": round(seconds, 3),
                "difference": difference,
                "torch_imported": "torch" in sys.modules,
            }
        )
        return 0
    if not count:
        print(f"{args.output}: every image is there already; --overwrite makes them again")
        return 0
    entry = entries[0]
    strength = "" if entry["strength"] is None else f" at strength {entry['strength']:g}"
    print(
        f"{args.output}: {count} images, {entry['sampler']} {entry['steps']} steps{strength}, guidance "
        f"{entry['guidance']:g}, {entry['precision']} on {entry['engine']}, {seconds:.1f} s"
    )
    if difference is not None:
        print(f"the same as {args.from_image}" if not difference else f"differs by up to {difference} of 255 levels")
    elif before is not None:
        print(f"arranged differently from {args.from_image}: not compared")
    return 0
