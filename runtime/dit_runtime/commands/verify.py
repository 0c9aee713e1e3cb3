"""``dit-verify``: does this engine, on this machine, make PyTorch's images? Without torch."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from dit_runtime.commands.common import (
    ENGINE_HELP,
    PRECISION_HELP,
    PRECISIONS,
    STORE_HELP,
    Parser,
    image_size,
    print_json,
    run,
)

if TYPE_CHECKING:
    from dit_runtime.bundle.reader import Bundle

EXAMPLES = (
    "dit-verify my.bundle",
    "dit-verify my.bundle --engine onnxruntime --json",
    "dit-verify my.bundle --report report.html",
    "dit-verify my.bundle --info",
    "dit-verify my.bundle --polygraphy records/",
)


def main(argv: list[str] | None = None) -> None:
    """Entry point of the command."""
    run("dit-verify", lambda: _main(argv))


def _main(argv: list[str] | None) -> int:
    parser = Parser(
        "dit-verify",
        "Replay a bundle's golden records on an engine and compare with what PyTorch computed, from single blocks up "
        "to images. Exits with 1 when anything fails. Torch is not needed.",
        EXAMPLES,
    )
    parser.add_argument("bundle", type=Path, help="a bundle that dit-export wrote")
    parser.add_argument("--engine", default="auto", help=ENGINE_HELP)
    parser.add_argument("--precision", choices=PRECISIONS, metavar="{fp32,bf16}", help=PRECISION_HELP)
    parser.add_argument("--size", type=image_size, metavar="HEIGHTxWIDTH", help="of images (default: each there is)")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="whether there is a fault, not where: without single steps and conditioner",
    )
    parser.add_argument("--report", type=Path, metavar="FILE", help="write an HTML page; of the first size there is")
    parser.add_argument(
        "--polygraphy",
        type=Path,
        metavar="DIR",
        help="write the records as Polygraphy's inputs and outputs instead of verifying",
    )
    parser.add_argument(
        "--info", action="store_true", help="say what the bundle is and what engines it has, without verifying"
    )
    parser.add_argument("--store", type=Path, metavar="DIR", help=STORE_HELP)
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    args = parser.parse_args(argv)

    from dit_runtime.bundle.reader import open_bundle

    bundle = open_bundle(args.bundle, args.store)
    if args.info:
        return _info(bundle, args.json)
    bundle.check()
    if args.polygraphy is not None:
        return _polygraphy(bundle.at(args.size), args.polygraphy, args.json)
    return _verify(bundle, args)


def _verify(bundle: Bundle, args: argparse.Namespace) -> int:
    from dit_runtime.backends.base import Engine
    from dit_runtime.backends.open import engine_for
    from dit_runtime.core.environment import environment
    from dit_runtime.core.files import check_writable, replace_file
    from dit_runtime.core.machine import machine
    from dit_runtime.verify.auto import check_choice, open_first_engine
    from dit_runtime.verify.rung import format_table
    from dit_runtime.verify.verdicts import join_rungs, verify_each_size

    if args.report is not None:
        check_writable(args.report)
    sizes = bundle.manifest.image_sizes if args.size is None else (args.size,)
    check_choice(args.engine, args.precision)

    def opened(at: Bundle) -> Engine:
        return open_first_engine(at) if args.engine == "auto" else engine_for(at, args.engine, 0, args.precision)

    found = verify_each_size(bundle, sizes, opened, args.quick)
    first, rungs = found[0], join_rungs(found)
    failed = [rung.name for rung in rungs if not rung.passed]
    if args.report is not None:
        from dit_runtime.verify.report import page

        hashes = {name: spec.sha256 for name, spec in bundle.manifest.files.items()}
        with replace_file(args.report) as file:
            file.write_text(page(first, environment(), hashes, found[1:]), encoding="utf-8")
    if args.json:
        print_json(
            {
                **first.as_json(),
                "image_sizes": [list(each.image_size) for each in found],
                "passed": not failed,
                "machine": machine(),
                "environment": environment(),
                "rungs": [rung.as_json() for rung in rungs],
            }
        )
    else:
        print(f"{args.bundle}: {first.model}, {first.precision}, on {first.engine}")
        print(f"reference: {first.reference}")
        print(format_table(rungs))
        print(
            f"FAIL: {', '.join(failed)}"
            if failed
            else f"pass{', quick' if args.quick else ''}: this engine matches the reference here"
        )
    return 1 if failed else 0


def _info(bundle: Bundle, as_json: bool) -> int:
    from dit_runtime.commands.info import bundle_info, format_info

    info = bundle_info(bundle)
    if as_json:
        print_json(info)
    else:
        print(format_info(bundle.path, info))
    return 0


def _polygraphy(bundle: Bundle, folder: Path, as_json: bool) -> int:
    from dit_runtime.verify.polygraphy import write_run_results

    written = write_run_results(bundle, folder)
    if as_json:
        print_json({"bundle": bundle.digest, "files": [str(path) for path in written]})
    else:
        manifest = bundle.manifest
        graph, limit = (
            bundle.path / manifest.graphs["step"].file,
            manifest.tolerances[manifest.precision.name]["forward"],
        )
        print(f"{folder}: {', '.join(path.name for path in written)}")
        print(
            f"polygraphy run {graph} --onnxrt --load-inputs {folder}/step-inputs.json "
            f"--load-outputs {folder}/step-outputs.json --rtol {limit:g} --atol {limit:g}"
        )
    return 0
