"""``dit-bench``: how long a verified engine takes, part by part and image by image. Without torch."""

from __future__ import annotations

import argparse
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
    thread_count,
)

EXAMPLES = (
    "dit-bench my.bundle",
    "dit-bench my.bundle --batch 1,2,4 --sweep --markdown bench.md --plot bench.png",
    "dit-bench my.bundle --engine onnxruntime --repeat 50 --json > bench.json",
)


def main(argv: list[str] | None = None) -> None:
    """Entry point of the command."""
    run("dit-bench", lambda: _main(argv))


def _main(argv: list[str] | None) -> int:
    args = _parser().parse_args(argv)

    from dit_runtime.bench.benchmark import BenchmarkRequest, benchmark

    _check_outputs(args.markdown, args.plot)
    report = benchmark(
        BenchmarkRequest(
            bundle=args.bundle,
            engine=args.engine,
            precision=args.precision,
            store=args.store,
            threads=args.threads,
            batches=args.batch,
            steps=args.steps,
            repeat=args.repeat,
            image_runs=args.pictures,
            sweep=args.sweep,
            gemm=not args.no_gemm,
        )
    )
    _write_outputs(report, args.markdown, args.plot)
    _print(report, args.json)
    return 0


def _parser() -> Parser:
    parser = Parser(
        "dit-bench",
        "Time a verified engine: conditioner, step with and without guidance, decoder, and whole images with the time "
        "that is spent outside the engine; of a policy, the worst of 1000 whole calls and their jitter. "
        "An engine that does not match the reference is refused. Torch is not "
        "needed.",
        EXAMPLES,
    )
    parser.add_argument("bundle", type=Path, help="a bundle that dit-export wrote")
    parser.add_argument("--engine", default="auto", help=ENGINE_HELP)
    parser.add_argument("--precision", choices=PRECISIONS, metavar="{fp32,bf16}", help=PRECISION_HELP)
    parser.add_argument("--store", type=Path, metavar="DIR", help=STORE_HELP)
    parser.add_argument("--threads", type=thread_count(0), default=0, help="of the CPU; 0 lets the engine choose")
    parser.add_argument("--batch", type=_batches, default="1", help="images in a call, one number or several: 1,2,4")
    parser.add_argument(
        "--steps", type=positive, help="sampling steps of a whole image (default: 50, or what the model has)"
    )
    parser.add_argument("--repeat", type=positive, default=20, help="timed calls of each part, after the warm-up")
    parser.add_argument("--pictures", type=int, default=3, help="timed runs of whole images; 0 leaves them out")
    parser.add_argument("--sweep", action="store_true", help="also time whole images of other step counts and sizes")
    parser.add_argument("--no-gemm", action="store_true", help="do not measure the rate of matrix products")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables as Markdown")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw the figures (.png, .svg or .pdf; needs matplotlib)"
    )
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    return parser


def _check_outputs(markdown: Path | None, plot: Path | None) -> None:
    """Raises OutputError, before minutes of timing, for a file that cannot be written."""
    from dit_runtime.bench.report import check_plot
    from dit_runtime.core.replace import check_writable

    for file in (markdown, plot):
        if file is not None:
            check_writable(file)
    if plot is not None:
        check_plot(plot)


def _write_outputs(report: dict[str, Any], markdown: Path | None, plot: Path | None) -> None:
    from dit_runtime.bench.report import draw_plot, markdown_from_report
    from dit_runtime.core.replace import replace_file

    if markdown is not None:
        with replace_file(markdown) as file:
            file.write_text(markdown_from_report(report), encoding="utf-8")
    if plot is not None:
        draw_plot(report, plot)


def _print(report: dict[str, Any], as_json: bool) -> None:
    from dit_runtime.bench.report import text_from_report

    if as_json:
        print_json(report)
    else:
        print(text_from_report(report))


def _batches(text: str) -> tuple[int, ...]:
    """An argparse type: several whole numbers from 1, in rising order."""
    try:
        batches = tuple(sorted({int(item) for item in text.split(",")}))
    except ValueError:
        batches = ()
    if not batches or batches[0] < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected whole numbers from 1, such as 1,2,4")
    return batches


if __name__ == "__main__":
    main()
