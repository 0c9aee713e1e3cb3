"""``dit-verify``: does this engine, on this machine, make PyTorch's images? Without torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dit_runtime.commands.common import (
    ENGINE_HELP,
    PRECISION_HELP,
    PRECISIONS,
    STORE_HELP,
    Parser,
    image_size,
    natural,
    print_json,
    run,
)
from dit_runtime.commands.replay import TableRequest, run_replay
from dit_runtime.commands.soak import SoakRequest, duration, run_soak
from dit_runtime.core.errors import ParityError

if TYPE_CHECKING:  # imported when the arguments are parsed, so that --help is quick
    from dit_runtime.bundle.reader import Bundle
    from dit_runtime.verify.results import Results

EXAMPLES = (
    "dit-verify my.bundle",
    "dit-verify my.bundle --engine onnxruntime --json > results.json",
    "dit-verify --report page.html --from results.json",
    "dit-verify my.bundle --report page.html",
    "dit-verify my.bundle --soak 10m",
    "dit-verify my.bundle --sampler few.json",
    "dit-verify my.bundle --info",
    "dit-verify my.bundle --polygraphy records/",
)


@dataclass(frozen=True)
class VerifyRequest:
    """Verify a bundle on an engine; the fields are the command's arguments."""

    bundle: Path
    store: Path | None
    engine: str
    precision: str | None
    size: tuple[int, int] | None
    quick: bool
    report: Path | None
    as_json: bool


@dataclass(frozen=True)
class PageRequest:
    """Make the HTML page ``report`` from the JSON file ``results`` of an earlier verification."""

    results: Path
    report: Path


@dataclass(frozen=True)
class RecordsRequest:
    """Write a bundle's golden records into ``folder``, as Polygraphy's inputs and outputs."""

    bundle: Path
    store: Path | None
    size: tuple[int, int] | None
    folder: Path
    as_json: bool


@dataclass(frozen=True)
class InfoRequest:
    """Say what a bundle is, and which engines and verdicts there are for it."""

    bundle: Path
    store: Path | None
    as_json: bool


Request = VerifyRequest | PageRequest | RecordsRequest | InfoRequest | SoakRequest | TableRequest


def main(argv: list[str] | None = None) -> None:
    """Entry point of the command."""
    run("dit-verify", lambda: _main(argv))


def _main(argv: list[str] | None) -> int:
    request = parse_request(argv)
    if isinstance(request, PageRequest):
        return _make_page(request)
    if isinstance(request, InfoRequest):
        return _show_info(request)
    if isinstance(request, RecordsRequest):
        return _write_records(request)
    if isinstance(request, SoakRequest):
        return run_soak(request)
    return run_replay(request) if isinstance(request, TableRequest) else _verify(request)


def parse_request(argv: list[str] | None) -> Request:
    """What the arguments ask for; exits with one line where they do not fit together."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.results is not None:
        others = {name for name, value in vars(args).items() if value != parser.get_default(name)}
        if others != {"results", "report"}:
            parser.error("--from takes --report FILE and nothing else: the page is made from the results alone")
        return PageRequest(args.results, args.report)
    if args.bundle is None:
        parser.error("the following arguments are required: bundle")
    if args.info:
        return InfoRequest(args.bundle, args.store, args.json)
    if args.sampler is not None:
        if args.quick or args.report:
            parser.error("--sampler takes --engine, --precision, --size, --store and --json alone")
        names = (args.bundle, args.store, args.engine, args.precision)
        return TableRequest(*names, args.size, args.sampler, args.json)
    if args.polygraphy is not None:
        return RecordsRequest(args.bundle, args.store, args.size, args.polygraphy, args.json)
    if args.soak is not None or args.soak_case is not None:
        if args.quick or (args.soak and args.soak_case) or any((args.size, args.report)):
            parser.error("--soak TIME, or --soak-case, takes --engine, --precision, --seed, --store and --json alone")
        names = (args.bundle, args.store, args.engine, args.precision)
        return SoakRequest(*names, args.soak or 0.0, args.seed, args.soak_case, args.json)
    return VerifyRequest(
        args.bundle, args.store, args.engine, args.precision, args.size, args.quick, args.report, args.json
    )


def _parser() -> Parser:
    parser = Parser(
        "dit-verify",
        "Replay a bundle's golden records on an engine and compare with what PyTorch computed, from single blocks up "
        "to images. Exits with 1 when a rung fails. Torch is not needed.",
        EXAMPLES,
    )
    add = parser.add_argument
    add("bundle", type=Path, nargs="?", help="a bundle that dit-export wrote")
    add("--engine", default="auto", help=ENGINE_HELP)
    add("--precision", choices=PRECISIONS, metavar="{fp32,bf16}", help=PRECISION_HELP)
    add("--size", type=image_size, metavar="HEIGHTxWIDTH", help="of images (default: each size of the bundle)")
    add(
        "--quick", action="store_true", help="find whether there is a fault, not where: no single steps, no conditioner"
    )
    add("--report", type=Path, metavar="FILE", help="write an HTML page (extra: report); images are of the first size")
    add("--from", dest="results", type=Path, metavar="FILE", help="make --report from what --json printed, anywhere")
    add(
        "--polygraphy",
        type=Path,
        metavar="DIR",
        help="write the records as Polygraphy's inputs and outputs instead of verifying (extra: polygraphy)",
    )
    add(
        "--soak",
        type=duration,
        metavar="TIME",
        help="run random work for that time instead, such as 10m, and compare with ONNX Runtime, each image alone",
    )
    add("--seed", type=natural, default=0, metavar="N", help="of the random work")
    add("--soak-case", metavar="JSON", help="run a case that --soak printed")
    add("--sampler", type=Path, metavar="TABLE.json", help="replay this sampler table instead, in float64 beside it")
    add("--info", action="store_true", help="say what the bundle is and which engines it has, without verifying")
    add("--store", type=Path, metavar="DIR", help=STORE_HELP)
    add("--json", action="store_true", help="print the results as JSON: all that the page shows")
    return parser


def _verify(request: VerifyRequest) -> int:
    from dit_runtime.bundle.reader import open_bundle
    from dit_runtime.verify.results import verify_bundle

    bundle = open_bundle(request.bundle, request.store)
    if request.report is not None:
        _check_page(request.report)
    bundle.check()
    results = verify_bundle(bundle, request.engine, request.precision, request.size, request.quick)
    if request.report is not None:
        _write_page(results, request.report)
    if request.as_json:
        print_json(results.as_json())
    else:
        print(format_results(request.bundle, results))
    found = results.verification
    if failed := [rung.name for rung in found.rungs if not rung.passed]:
        raise ParityError(
            f"{request.bundle}: {len(failed)} of {len(found.rungs)} rungs fail on {found.engine}, the first is "
            f"{failed[0]!r}: the fault is there; copy or export the bundle again, or use another engine"
        )
    return 0


def _make_page(request: PageRequest) -> int:
    from dit_runtime.verify.results_reader import read_results

    _check_page(request.report)
    _write_page(read_results(request.results), request.report)
    return 0


def _show_info(request: InfoRequest) -> int:
    from dit_runtime.bundle.reader import open_bundle
    from dit_runtime.commands.info import bundle_info, format_info

    bundle = open_bundle(request.bundle, request.store)
    info = bundle_info(bundle)
    if request.as_json:
        print_json(info)
    else:
        print(format_info(bundle.path, info))
    return 0


def _write_records(request: RecordsRequest) -> int:
    from dit_runtime.bundle.reader import open_bundle
    from dit_runtime.verify.polygraphy import write_run_results

    bundle = open_bundle(request.bundle, request.store)
    bundle.check()
    bundle = bundle.at(request.size)
    written = write_run_results(bundle, request.folder)
    if request.as_json:
        print_json({"bundle": bundle.digest, "files": [str(path) for path in written]})
    else:
        print(format_records(bundle, request.folder, written))
    return 0


def _check_page(path: Path) -> None:
    """Say before the work that the page cannot be made."""
    from dit_runtime.core.extras import check_extra
    from dit_runtime.core.replace import check_writable

    check_extra("--report", "report", "jinja2", "matplotlib")
    check_writable(path, "--report")


def _write_page(results: Results, path: Path) -> None:
    from dit_runtime.core.replace import replace_file
    from dit_runtime.verify.report import page

    with replace_file(path) as file:
        # Results of another machine may hold characters that UTF-8 has no bytes for.
        file.write_text(page(results), encoding="utf-8", errors="replace")


def format_results(bundle: Path, results: Results) -> str:
    """The results for a terminal: what was verified, a line for each rung, and the verdict."""
    from dit_runtime.core.text import join_lines
    from dit_runtime.verify.coverage import format_coverage
    from dit_runtime.verify.rung import format_rungs

    found = results.verification
    failed = [rung.name for rung in found.rungs if not rung.passed]
    passed = f"pass{', quick' if found.quick else ''}: this engine matches the reference here"
    passed += f", up to guidance {found.guidance:g}" if found.guidance > 1 else ", without guidance"
    return join_lines(
        [
            f"{bundle}: {found.model}, {found.precision}, on {found.engine}",
            f"reference: {found.reference}",
            *format_rungs(found.rungs).split("\n"),
            *format_coverage(found.coverage),
            f"FAIL: {', '.join(failed)}" if failed else passed,
        ]
    )


def format_records(bundle: Bundle, folder: Path, written: list[Path]) -> str:
    """The files that were written, and the command that compares the step with them."""
    from dit_runtime.core.text import join_lines

    limit = bundle.manifest.tolerances[bundle.manifest.precision.name]["forward"]
    return join_lines(
        [
            f"{folder}: {', '.join(path.name for path in written)}",
            f"polygraphy run {bundle.path / bundle.manifest.graphs['step'].file} --onnxrt "
            f"--load-inputs {folder}/step-inputs.json --load-outputs {folder}/step-outputs.json "
            f"--rtol {limit:g} --atol {limit:g}",
        ]
    )


if __name__ == "__main__":
    main()
