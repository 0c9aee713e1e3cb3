"""``dit-sample``: pictures from a bundle, without torch."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile

from dit_runtime.command import Parser, positive, print_json, run

if TYPE_CHECKING:
    from dit_runtime.images import Pictures
    from dit_runtime.loop import Picture
    from dit_runtime.noise import Float32
    from dit_runtime.pipeline import Pipeline, Settings
    from dit_runtime.provenance import Place
    from dit_runtime.table import Schedule

EXAMPLES = (
    "dit-sample my.bundle --labels 0 1 2 3 --seed 7 -o pictures.png",
    'dit-sample my.bundle --labels "golden retriever" --steps 250 --sampler ddpm --guidance 4 -o pictures/',
    "dit-sample my.bundle --labels all --count 1000 --sampler dpmpp-2m --steps 20 -o many/",
    "dit-sample my.bundle --labels 3:0.7+5:0.3 --guidance-interval 0.1 0.7 -o mixed.png",
    "dit-sample my.bundle --from-image pictures/00000_class207_seed0.png -o again.png",
)


def main(argv: list[str] | None = None) -> None:
    """Entry point of the command."""
    run("dit-sample", lambda: _main(argv))


def _parser() -> Parser:
    parser = Parser("dit-sample", "Sample pictures from a bundle. Torch is not needed.", EXAMPLES)
    parser.add_argument("bundle", type=Path, help="a bundle that dit-export wrote")
    what = parser.add_argument_group("what")
    what.add_argument(
        "--labels", nargs="+", metavar="LABEL", help="class numbers, names, or mixtures such as 3:0.7+5:0.3; 'all'"
    )
    what.add_argument("--count", type=positive, default=1, metavar="N", help="pictures of each label")
    what.add_argument("--from-image", type=Path, metavar="PNG", help="make a picture again, from its record")
    seeds = what.add_mutually_exclusive_group()
    seeds.add_argument("--seed", type=int, default=0, help="seed of the first picture; the next ones count up")
    seeds.add_argument("--seeds", type=int, nargs="+", metavar="SEED", help="one seed per picture")
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
        help="one scale, or one per picture; 1 is none, at half the cost (default: the bundle's)",
    )
    how.add_argument(
        "--guidance-interval",
        type=float,
        nargs=2,
        default=(0.0, 1.0),
        metavar=("LO", "HI"),
        help="noise times between which to guide: 1 is pure noise, 0 the picture; outside, a step costs half",
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
    where = parser.add_argument_group("where")
    where.add_argument("--engine", default="auto", help="auto or onnxruntime; auto takes a verified engine only")
    where.add_argument(
        "--threads", type=positive, help="of the CPU (default: the engine's choice; with --from-image, the record's)"
    )
    where.add_argument("--batch-size", type=positive, default=16, help="pictures per engine call")
    where.add_argument("--columns", type=positive, help="columns of the grid (default: near-square)")
    where.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path("samples.png"),
        help="FILE.png for a grid, else a folder of files, where pictures that are there already are not made again",
    )
    where.add_argument("--overwrite", action="store_true", help="make all pictures of a folder again")
    where.add_argument(
        "--write-table", type=Path, metavar="JSON", help="write the sampler's table, and make no picture"
    )
    where.add_argument("--json", action="store_true", help="print what was made as JSON")
    return parser


@dataclass(frozen=True)
class Group:
    """One batch: its pictures, and those to keep, as index among all, place in the batch and record."""

    batch: list[Picture]
    keep: list[tuple[int, Place, dict[str, Any]]]


@dataclass(frozen=True)
class Work:
    """Groups, each made when its turn comes; how many there are, and how many steps each takes."""

    groups: Iterable[Group]
    count: int
    steps: int


def _main(argv: list[str] | None) -> int:
    parser = _parser()
    args = parser.parse_args(argv)
    if (args.labels is None) == (args.from_image is None) and not args.write_table:
        parser.error("expected --labels, or --from-image with a picture of dit-sample")
    if args.from_image and not args.write_table:
        _refuse_recorded(parser, args)

    from dit_runtime.errors import OutputError
    from dit_runtime.files import check_writable
    from dit_runtime.pipeline import Pipeline

    if args.write_table:
        return _write_table(args)
    single = args.output.suffix.lower() == ".png"
    if single and args.output.is_dir():
        raise OutputError(f"{args.output}: is a folder, expected a file; choose another --output")
    if args.from_image and args.output.resolve() == args.from_image.resolve():
        raise OutputError(f"{args.output}: is the picture to be made again; choose another --output")
    check_writable(args.output if single else args.output / "picture.png")
    noise, table = _noise(args.noise), _table(args.sampler)
    threads = args.threads or _recorded_threads(args.from_image)
    pipe = Pipeline(args.bundle, args.engine, threads)
    if args.from_image:
        work = _recorded(pipe, args.from_image, noise, table)
    else:
        work = _asked(pipe, args, noise, table, None if single else args.output)
    return _sampled(pipe, args, work, single)


def _refuse_recorded(parser: Parser, args: argparse.Namespace) -> None:
    """With --from-image, an option that the picture's record decides is a mistake."""
    recorded = (
        *("count", "seed", "seeds", "steps", "spacing", "eta", "guidance", "guidance_interval", "guidance_schedule"),
        *("negative_label", "noise_device", "noise_dtype", "cuda_threads", "batch_size"),
    )
    given = [name for name in recorded if getattr(args, name) != parser.get_default(name)]
    if args.sampler is not None and not args.sampler.endswith(".json"):
        given.append("sampler")
    if given:
        option = f"--{given[0].replace('_', '-')}"
        parser.error(f"{option} with --from-image: the picture's own record says how it was made; leave it out")


def _write_table(args: argparse.Namespace) -> int:
    """``--write-table``: no engine is needed."""
    from dit_runtime.bundle import open_bundle
    from dit_runtime.errors import SamplingError
    from dit_runtime.schedule import schedule_for
    from dit_runtime.table import write_table

    for option in ("labels", "from_image", "guidance", "noise"):
        if getattr(args, option) is not None:
            name = option.replace("_", "-")
            raise SamplingError(
                f"--{name} with --write-table: a table has none of it, and no picture is made; leave it out"
            )
    manifest = open_bundle(args.bundle).manifest
    sampler = args.sampler or manifest.defaults.sampler
    steps = manifest.defaults.steps if args.steps is None else args.steps
    schedule = schedule_for(sampler, manifest.model, manifest.diffusion, steps, args.eta, args.spacing)
    write_table(schedule, args.write_table)
    print(f"{args.write_table}: {schedule.sampler}, {schedule.steps} steps, {len(schedule)} rows of 17 numbers")
    return 0


def _with(settings: Settings, **changes: Any) -> Settings:
    changed = settings.copy()
    changed.update(changes)  # type: ignore[typeddict-item]  # keys of Settings
    return changed


def _settings(args: argparse.Namespace, table: Schedule | None) -> Settings:
    scales = args.guidance
    return {
        "steps": args.steps,
        "sampler": table or args.sampler,
        "spacing": args.spacing,
        "eta": args.eta,
        "guidance": scales[0] if scales and len(scales) == 1 else scales,
        "guidance_interval": tuple(args.guidance_interval),
        "guidance_schedule": args.guidance_schedule,
        "negative_label": args.negative_label,
        "noise_device": args.noise_device,
        "noise_dtype": args.noise_dtype,
        "cuda_threads": args.cuda_threads,
    }


def _asked(
    pipe: Pipeline, args: argparse.Namespace, noise: Float32 | None, table: Schedule | None, folder: Path | None
) -> Work:
    """The pictures of the arguments, batch by batch, without those that the folder has already.

    Everything is checked before the first group is given.
    """
    from dit_runtime.errors import SamplingError
    from dit_runtime.provenance import described, is_same, places

    settings = _settings(args, table)
    named = list(range(pipe.manifest.model.classes)) if args.labels == ["all"] else args.labels
    labels = [label for label in named for _ in range(args.count)]
    count = len(labels)
    seeds = args.seeds or range(args.seed, args.seed + count)
    if len(seeds) != count:
        raise SamplingError(
            f"{len(seeds)} seeds for {count} labels: expected one seed per picture, or --seed for the first"
        )
    if args.guidance and len(args.guidance) not in (1, count):
        raise SamplingError(
            f"{len(args.guidance)} guidance scales for {count} pictures: expected one, or one per picture"
        )
    pipe.checked_noise(noise, count)
    distinct = list(dict.fromkeys(labels))
    for scale in dict.fromkeys(args.guidance or [None]):
        schedule = pipe.pictures(distinct, 0, **_with(settings, guidance=scale))[0].schedule
    size = min(args.batch_size, count)
    pipe.check_batch(size)

    def grouped(first: int) -> Group:
        chunk = slice(first, first + size)
        scales = args.guidance[chunk] if args.guidance and len(args.guidance) > 1 else settings["guidance"]
        given = None if noise is None else noise[chunk]
        pictures = pipe.pictures(labels[chunk], seeds[chunk], **_with(settings, guidance=scales, noise=given))
        made = [
            folder is not None
            and (file := folder / _file_name(first + offset, picture)).exists()
            and not args.overwrite
            and (found := _recorded_entry(file)) is not None
            and is_same(found, described(pipe, picture, None, args.eta))
            for offset, picture in enumerate(pictures)
        ]
        batch = [picture for picture, done in zip(pictures, made, strict=True) if not done]
        missing = [first + offset for offset, done in enumerate(made) if not done]
        kept = zip(missing, batch, places(batch), strict=True) if batch else ()
        return Group(
            batch, [(index, place, described(pipe, picture, place, args.eta)) for index, picture, place in kept]
        )

    starts = range(0, count, size)
    return Work(map(grouped, starts), len(starts), schedule.steps)


def _recorded(pipe: Pipeline, path: Path, noise: Float32 | None, table: Schedule | None) -> Work:
    """The pictures of a file's record, in batches of the shape they were made in."""
    from dit_runtime.errors import SamplingError
    from dit_runtime.images import read_png
    from dit_runtime.provenance import company, described, from_text, picture_from

    entries = from_text(path, read_png(path)[1])
    if noise is not None and len(noise) != len(entries):
        raise SamplingError(f"noise of {len(noise)} pictures, expected {len(entries)}, as in {path}")
    groups: list[Group] = []
    for index, entry in enumerate(entries):
        place = entry["place"]
        picture = picture_from(pipe, entry, None if noise is None else noise[index], table)
        pipe.check_batch(place.size)
        around = company(picture, place)
        if not groups or place.position <= groups[-1].keep[-1][1].position:
            groups.append(Group(around, []))
        if len(around) != len(groups[-1].batch):
            raise SamplingError(f"{path}: its record is damaged: pictures of one batch disagree about its size")
        groups[-1].batch[place.position] = around[place.position]
        groups[-1].keep.append((index, place, described(pipe, picture, place, entry["eta"])))
    then, now = entries[0], groups[0].keep[0][2]
    for what in ("engine", "threads", "cpus"):
        if then[what] != now[what]:
            print(
                f"dit-sample: {path} was made with {what} {then[what]}, this is {now[what]}: the last bits may differ",
                file=sys.stderr,
            )
    return Work(groups, len(groups), groups[0].batch[0].schedule.steps)


def _sampled(pipe: Pipeline, args: argparse.Namespace, work: Work, single: bool) -> int:
    """Make the pictures, write each batch as soon as it is decoded, and say what was done."""
    import numpy as np

    from dit_runtime.errors import SamplingError
    from dit_runtime.images import grid, read_png, write_png
    from dit_runtime.progress import Progress
    from dit_runtime.provenance import as_text

    start = time.monotonic()
    before = read_png(args.from_image)[0] if args.from_image else None
    pictures: list[Pictures] = []
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
                for _, latents, _ in pipe.advanced(group.batch):
                    final = latents
                    bar.advance()
                images = pipe.decode(final)
                for index, place, entry in group.keep:
                    count += 1
                    file = args.output
                    if single:
                        pictures.append(images[place.position])
                    else:
                        file = args.output / _file_name(index, group.batch[place.position])
                        write_png(file, images[place.position], as_text([entry]))
                    if single or args.json or not entries:
                        entries.append(entry)
                    if args.json and not single:
                        files.append(file)
                bar.advance()
        except SamplingError as error:
            failure = error
    if single and pictures:
        columns = args.columns or (before.shape[1] // pictures[0].shape[1] if before is not None else None)
        write_png(args.output, grid(np.stack(pictures), columns), as_text(entries))
        files = [args.output]
    if failure is not None:
        finished = f"; {count} finished pictures are in {args.output}" if count else ""
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
        print(f"{args.output}: every picture is there already; --overwrite makes them again")
        return 0
    entry = entries[0]
    print(
        f"{args.output}: {count} pictures, {entry['sampler']} {entry['steps']} steps, guidance "
        f"{entry['guidance']:g}, {entry['precision']} on {entry['engine']}, {seconds:.1f} s"
    )
    if difference is not None:
        print(f"the same as {args.from_image}" if not difference else f"differs by up to {difference} of 255 levels")
    elif before is not None:
        print(f"arranged differently from {args.from_image}: not compared")
    return 0


def _file_name(index: int, picture: Picture) -> str:
    return f"{index:05d}_class{'+'.join(str(label) for label in picture.labels)}_seed{picture.seed}.png"


def _recorded_entry(file: Path) -> dict[str, Any] | None:
    """The record of a picture that exists; None where it has none, or is not readable."""
    from dit_runtime.errors import DiTError
    from dit_runtime.images import read_png
    from dit_runtime.provenance import from_text

    try:
        (entry,) = from_text(file, read_png(file)[1])
    except (DiTError, ValueError):
        return None
    return entry


def _recorded_threads(path: Path | None) -> int:
    """The thread setting that a picture was made with; 0, the engine's choice, without one."""
    from dit_runtime.images import read_png
    from dit_runtime.provenance import from_text

    return from_text(path, read_png(path)[1])[0]["threads"] if path else 0


def _noise(path: Path | None) -> Float32 | None:
    """Noise from a file, one picture's or several.

    Raises:
        SamplingError: unreadable, or not an array of numbers.
    """
    if path is None:
        return None
    import numpy as np

    from dit_runtime.errors import SamplingError

    try:
        noise: Float32 = np.load(path, allow_pickle=False)
        if noise.ndim not in (3, 4):
            raise ValueError(f"it has {noise.ndim} axes")
        return noise[None] if noise.ndim == 3 else noise
    except (OSError, ValueError, AttributeError, EOFError, BadZipFile) as error:
        raise SamplingError(
            f"{path}: cannot be read as noise ({error}); expected float32 [N,C,H,W] of numpy.save"
        ) from error


def _table(sampler: str | None) -> Schedule | None:
    if sampler is None or not sampler.endswith(".json"):
        return None
    from dit_runtime.table import read_table

    return read_table(Path(sampler))
