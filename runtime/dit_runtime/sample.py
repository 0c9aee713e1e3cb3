"""``dit-sample``: pictures from a bundle, without torch."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from dit_runtime.command import Parser, positive, print_json, run

EXAMPLES = (
    "dit-sample my.bundle --labels 0 1 2 3 --seed 7 -o pictures.png",
    'dit-sample my.bundle --labels "golden retriever" --steps 250 --sampler ddpm --guidance 4 -o pictures/',
)


def main(argv: list[str] | None = None) -> None:
    """Entry point of the command."""
    run("dit-sample", lambda: _main(argv))


def _main(argv: list[str] | None) -> int:
    parser = Parser("dit-sample", "Sample pictures from a bundle. Torch is not needed.", EXAMPLES)
    parser.add_argument("bundle", type=Path, help="a bundle that dit-export wrote")
    parser.add_argument("--labels", nargs="+", required=True, metavar="LABEL", help="class numbers or names, one each")
    seeds = parser.add_mutually_exclusive_group()
    seeds.add_argument("--seed", type=int, default=0, help="seed of the first picture; the next ones count up")
    seeds.add_argument("--seeds", type=int, nargs="+", metavar="SEED", help="one seed per label")
    parser.add_argument("--steps", type=int, help="sampling steps (default: the bundle's)")
    parser.add_argument("--guidance", type=float, help="guidance scale; 1 is none (default: the bundle's)")
    parser.add_argument("--sampler", help="ddim or ddpm (default: the bundle's)")
    parser.add_argument("--eta", type=float, default=0.0, help="DDIM's stochasticity, 0 to 1")
    parser.add_argument("--engine", default="auto", help="auto or onnxruntime; auto takes a verified engine only")
    parser.add_argument("--batch-size", type=positive, default=16, help="pictures per engine call")
    parser.add_argument("--columns", type=positive, help="columns of the grid (default: near-square)")
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("samples.png"), help="FILE.png for a grid, else a folder of files"
    )
    parser.add_argument("--json", action="store_true", help="print what was made as JSON")
    args = parser.parse_args(argv)

    import numpy as np

    from dit_runtime.errors import OutputError
    from dit_runtime.files import check_writable
    from dit_runtime.images import grid, write_png
    from dit_runtime.pipeline import Pipeline
    from dit_runtime.progress import Progress

    single = args.output.suffix.lower() == ".png"
    if single and args.output.is_dir():
        raise OutputError(f"{args.output}: is a folder, expected a file; choose another --output")
    check_writable(args.output if single else args.output / "picture.png")
    pipe = Pipeline(args.bundle, args.engine)
    count = len(args.labels)
    each = args.seeds or list(range(args.seed, args.seed + count))
    if len(each) != count:
        parser.error(f"{len(each)} seeds for {count} labels: expected one seed per label")
    # Everything is checked before the first picture is made; the engine sees one batch at a time.
    numbers = [pipe.label_number(label) for label in args.labels]
    head = slice(0, args.batch_size)
    request = pipe.request(numbers[head], each[head], args.steps, args.guidance, args.sampler, args.eta)
    settings = (len(request.schedule), request.guidance, request.schedule.sampler, args.eta)

    start = time.monotonic()
    pictures, files = [], []
    batches = range(0, count, args.batch_size)
    with Progress("sampling", len(batches) * (len(request.schedule) + 1)) as bar:
        for first in batches:
            chunk = slice(first, first + args.batch_size)
            for _, latents, _ in pipe.trajectory(numbers[chunk], each[chunk], *settings):
                final = latents
                bar.advance()
            images = pipe.decode(final)
            bar.advance()
            if single:
                pictures.append(images)
                continue
            for offset, image in enumerate(images):
                index = first + offset
                file = args.output / f"{index:05d}_class{numbers[index]}_seed{each[index]}.png"
                write_png(file, image)
                files.append(file)
    if single:
        write_png(args.output, grid(np.concatenate(pictures), args.columns))
        files.append(args.output)
    seconds = time.monotonic() - start
    steps, guidance, sampler, eta = settings
    if args.json:
        print_json(
            {
                "files": [str(file) for file in files],
                "labels": numbers,
                "seeds": each,
                "steps": steps,
                "guidance": guidance,
                "sampler": sampler,
                "eta": eta,
                "engine": pipe.engine.name,
                "precision": pipe.manifest.precision.name,
                "bundle": pipe.bundle.digest,
                "seconds": round(seconds, 3),
                "torch_imported": "torch" in sys.modules,
            }
        )
    else:
        print(
            f"{args.output}: {count} pictures, {sampler} {steps} steps, guidance {guidance:g}, "
            f"{pipe.manifest.precision.name} on {pipe.engine.name}, {seconds:.1f} s"
        )
    return 0
