"""``dit-verify``: does this engine, on this machine, make PyTorch's pictures? Without torch."""

from __future__ import annotations

from pathlib import Path

from dit_runtime.command import Parser, image_size, print_json, run

EXAMPLES = ("dit-verify my.bundle", "dit-verify my.bundle --engine onnxruntime --json")


def main(argv: list[str] | None = None) -> None:
    """Entry point of the command."""
    run("dit-verify", lambda: _main(argv))


def _main(argv: list[str] | None) -> int:
    parser = Parser(
        "dit-verify",
        "Replay a bundle's golden records on an engine and compare with what PyTorch computed. Exits with 1 when "
        "anything fails. Torch is not needed.",
        EXAMPLES,
    )
    parser.add_argument("bundle", type=Path, help="a bundle that dit-export wrote")
    parser.add_argument("--engine", default="auto", help="auto or onnxruntime")
    parser.add_argument("--size", type=image_size, metavar="HEIGHTxWIDTH", help="of pictures (default: each there is)")
    parser.add_argument("--quick", action="store_true", help="leave out blocks and teacher-forced steps")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    args = parser.parse_args(argv)

    from dit_runtime.bundle import open_bundle
    from dit_runtime.engines import open_engine
    from dit_runtime.verdicts import machine, verified_sizes
    from dit_runtime.verify import format_table

    bundle = open_bundle(args.bundle)
    bundle.check()
    sizes = bundle.manifest.image_sizes if args.size is None else (args.size,)
    name, rungs = verified_sizes(bundle, sizes, lambda at: open_engine(at, args.engine), args.quick)
    failed = [rung.name for rung in rungs if not rung.passed]
    source, precision = bundle.manifest.source, bundle.manifest.precision.name
    if args.json:
        print_json(
            {
                "bundle": bundle.digest,
                "engine": name,
                "precision": precision,
                "reference": source.reference,
                "machine": machine(),
                "passed": not failed,
                "rungs": [rung.as_json() for rung in rungs],
            }
        )
    else:
        print(f"{args.bundle}: {source.name}, {precision}, on {name}")
        print(f"reference: {source.reference}")
        print(format_table(rungs))
        print(f"FAIL: {', '.join(failed)}" if failed else "pass: this engine matches the reference here")
    return 1 if failed else 0
