"""``dit-bench``: how long a verified engine takes, part by part and image by image. Without torch."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dit_runtime.commands.common import (
    ENGINE_HELP,
    PRECISION_HELP,
    PRECISIONS,
    STORE_HELP,
    Parser,
    positive,
    print_json,
    run,
)

EXAMPLES = (
    "dit-bench my.bundle",
    "dit-bench my.bundle --batch 1,2,4 --sweep --markdown bench.md --plot bench.png",
    "dit-bench my.bundle --engine onnxruntime --repeat 50 --json > bench.json",
)
SWEEP_STEPS = (10, 25, 50)


def main(argv: list[str] | None = None) -> None:
    """Entry point of the command."""
    run("dit-bench", lambda: _main(argv))


def _main(argv: list[str] | None) -> int:
    parser = Parser(
        "dit-bench",
        "Time a verified engine: conditioner, step with and without guidance, decoder, and whole images with what is "
        "spent outside the engine. Refuses an engine that does not match the reference. Torch is not needed.",
        EXAMPLES,
    )
    parser.add_argument("bundle", type=Path, help="a bundle that dit-export wrote")
    parser.add_argument("--engine", default="auto", help=ENGINE_HELP)
    parser.add_argument("--precision", choices=PRECISIONS, metavar="{fp32,bf16}", help=PRECISION_HELP)
    parser.add_argument("--store", type=Path, metavar="DIR", help=STORE_HELP)
    parser.add_argument("--threads", type=int, default=0, help="of the CPU; 0 lets the engine choose")
    parser.add_argument("--batch", type=_batches, default="1", help="images in a call, one or several: 1,2,4")
    parser.add_argument("--steps", type=positive, default=50, help="of a whole image")
    parser.add_argument("--repeat", type=positive, default=20, help="timed calls of each part, after the warm-up")
    parser.add_argument("--pictures", type=int, default=3, help="timed runs of whole images; 0 leaves them out")
    parser.add_argument("--sweep", action="store_true", help="also whole images of other step counts and sizes")
    parser.add_argument("--no-gemm", action="store_true", help="do not measure the rate of matrix products")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables as Markdown")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw them (.png, .svg or .pdf; needs matplotlib)")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    args = parser.parse_args(argv)

    from dit_runtime.bench.parts import compare_with_gemm, time_images, time_parts
    from dit_runtime.bench.report import (
        as_markdown,
        as_text,
        check_plot,
        plot,
    )
    from dit_runtime.bench.timing import memory_use
    from dit_runtime.bundle.reader import open_bundle
    from dit_runtime.core.environment import environment
    from dit_runtime.core.files import check_writable, replace_file
    from dit_runtime.verify.auto import choose_engine

    for file in (args.markdown, args.plot):
        if file is not None:
            check_writable(file)
    if args.plot is not None:
        check_plot(args.plot)
    bundle = open_bundle(args.bundle, args.store)
    engine = choose_engine(bundle, args.threads, args.engine, args.precision).engine
    manifest = bundle.manifest
    parts = {batch: time_parts(bundle, engine, batch, args.steps, args.repeat) for batch in args.batch}
    report: dict[str, Any] = {
        "bundle": bundle.digest,
        "model": manifest.source.name,
        "image_size": manifest.image_size,
        "precision": manifest.precision.name,
        "engine": engine.info.name,
        "verified": True,
        "steps": args.steps,
        "environment": environment(args.threads),
        "parts": {batch: {name: asdict(timing) for name, timing in found.items()} for batch, found in parts.items()},
    }
    if args.pictures > 0:
        report["pictures"] = {
            batch: time_images(bundle, engine, batch, args.steps, args.pictures) for batch in args.batch
        }
    if args.sweep:
        batch = args.batch[0]
        report["step_counts"] = {
            steps: time_images(bundle, engine, batch, steps, max(args.pictures, 1)) for steps in SWEEP_STEPS
        }
        report["sizes"] = {}
        for size in manifest.image_sizes:
            at = bundle.at(size)
            other = (
                engine
                if size == manifest.image_size
                else choose_engine(at, args.threads, args.engine, args.precision).engine
            )
            timings = time_parts(at, other, batch, args.steps, args.repeat)
            report["sizes"][f"{size[0]}x{size[1]}"] = {
                "tokens": at.manifest.model.tokens,
                **{name: asdict(timing) for name, timing in timings.items()},
            }
    if not args.no_gemm:
        report["gemm"] = compare_with_gemm(bundle, engine, parts)
    report["memory_bytes"] = memory_use()
    if args.markdown is not None:
        with replace_file(args.markdown) as file:
            file.write_text(as_markdown(report), encoding="utf-8")
    if args.plot is not None:
        plot(report, args.plot)
    if args.json:
        print_json(report)
    else:
        print(as_text(report))
    return 0


def _batches(text: str) -> tuple[int, ...]:
    try:
        batches = tuple(sorted({int(item) for item in text.split(",")}))
    except ValueError:
        batches = ()
    if not batches or batches[0] < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected whole numbers from 1, such as 1,2,4")
    return batches
