"""``dit-build``: a bundle in, audited engines for one target out."""

from __future__ import annotations

import argparse
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dit_runtime.commands.common import (
    Parser,
    image_size,
    positive,
    print_json,
    run,
    say,
)
from dit_runtime.core.errors import BuildError

if TYPE_CHECKING:  # imported after the arguments are parsed
    from dit_engines.build_host import BuildHost
    from dit_engines.recipe import Recipe
    from dit_runtime.bundle.reader import Bundle

EXAMPLES = (
    "dit-build my.bundle --target rtx",
    "dit-build my.bundle --target rtx-50 --batch 1,4,8 --branches 1,2 --explain",
    "dit-build my.bundle --target this --store /var/lib/dit/engines",
    "dit-build my.bundle --target orin-nano --batch 1 --print-trtexec",
    "dit-build --list-targets",
)


@dataclass(frozen=True)
class BuildRequest:
    """The checked arguments of ``dit-build``.

    ``command`` is the command line itself, for a message that says to run it on another device.
    """

    command: str
    bundle: Path
    target: str
    compute_capability: str | None
    batches: tuple[int, ...]
    branches: tuple[int, ...]
    rows: int
    static: bool
    size: tuple[int, int] | None
    decode_tile: int | None
    aux_streams: int | None
    timing_cache: Path | None
    store: Path | None
    explain: bool
    repeat: int | None
    tensorrt_version: tuple[int, ...] | None
    json: bool


def main(argv: list[str] | None = None) -> None:
    """Entry point of the command."""
    run("dit-build", lambda: _run_command(sys.argv[1:] if argv is None else argv))


def _run_command(argv: list[str]) -> int:
    parser = _make_parser()
    args = parser.parse_args(argv)
    if args.list_targets:
        return _print_targets(args.json)
    request = _request_from_args(parser, args, shlex.join(["dit-build", *argv]))
    if args.print_trtexec:
        return _print_trtexec(request)
    return _print_spread(request) if request.repeat else _print_engine(request)


def _make_parser() -> Parser:
    parser = Parser(
        "dit-build",
        "Compile a bundle's graphs for a target and audit what the builder made. TensorRT-RTX builds ahead of time: no "
        "GPU is needed. TensorRT builds on the device itself.",
        EXAMPLES,
    )
    parser.add_argument("bundle", type=Path, nargs="?", help="a bundle that dit-export wrote")
    parser.add_argument("--target", default="rtx", help="one of --list-targets; this is the GPU present")
    parser.add_argument("--list-targets", action="store_true", help="print the targets and what is known of them")
    parser.add_argument(
        "--compute-capability", help="of the GPU, for target rtx: 8.9 is Ada, 12.0 is Blackwell (default: 8.9)"
    )
    _add_shapes(parser)
    parser.add_argument(
        "--aux-streams", type=int, metavar="N", help="most streams beside the first (default: the library's choice)"
    )
    parser.add_argument(
        "--timing-cache", type=Path, metavar="FILE", help="of an earlier build (default: the store's last one here)"
    )
    parser.add_argument("--store", type=Path, help="where engines are kept (default: BUNDLE/engines)")
    parser.add_argument("--explain", action="store_true", help="say why a stored engine was not used")
    parser.add_argument(
        "--repeat", type=positive, metavar="N", help="build N times, keep nothing, and print how much differs"
    )
    parser.add_argument(
        "--print-trtexec", action="store_true", help="print trtexec's commands for the build, and build nothing"
    )
    parser.add_argument(
        "--tensorrt-version", type=_version, metavar="X.Y", help="that trtexec is of (default: the target's oldest)"
    )
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    return parser


def _add_shapes(parser: Parser) -> None:
    parser.add_argument(
        "--batch", type=_numbers, default="4", help="most images in one call; 1,4,8 are profiles of 1, 2-4 and 5-8"
    )
    parser.add_argument("--branches", type=_numbers, default="1,2", help="guidance branches, a profile for each")
    parser.add_argument("--rows", type=positive, default=1024, help="most rows of the conditioning table")
    parser.add_argument("--static", action="store_true", help="for the numbers of --batch and --branches only")
    parser.add_argument("--size", type=image_size, metavar="HEIGHTxWIDTH", help="of images (default: the bundle's)")
    parser.add_argument(
        "--decode-tile", type=positive, metavar="N", help="a decoder for tiles of NxN latents, which needs less memory"
    )


def _request_from_args(parser: Parser, args: argparse.Namespace, command: str) -> BuildRequest:
    if args.bundle is None:
        parser.error("expected a bundle, or --list-targets")
    if args.aux_streams is not None and args.aux_streams < 0:
        parser.error(f"--aux-streams {args.aux_streams}: expected a whole number from 0")
    return BuildRequest(
        command=command,
        bundle=args.bundle,
        target=args.target,
        compute_capability=args.compute_capability,
        batches=args.batch,
        branches=args.branches,
        rows=args.rows,
        static=args.static,
        size=args.size,
        decode_tile=args.decode_tile,
        aux_streams=args.aux_streams,
        timing_cache=args.timing_cache,
        store=args.store,
        explain=args.explain,
        repeat=args.repeat,
        tensorrt_version=args.tensorrt_version,
        json=args.json,
    )


def _print_targets(json: bool) -> int:
    from dit_engines.targets import TARGETS, format_targets

    if json:
        print_json([target.as_json() for target in TARGETS.values()])
    else:
        print(format_targets())
    return 0


def _print_trtexec(request: BuildRequest) -> int:
    from dit_engines.targets import check_precision
    from dit_engines.trtexec import trtexec_commands
    from dit_runtime.core.text import printable

    bundle, recipe = _open_for_build(request), _recipe_for(request)
    check_precision(bundle.manifest.precision.name, recipe.compute_capability, str(bundle.path))
    commands = trtexec_commands(bundle, recipe)
    if request.json:
        print_json(commands)
    else:
        print("\n".join(map(printable, commands)))
    return 0


def _print_spread(request: BuildRequest) -> int:
    """Build several times, keep nothing, and print how much the builds differ."""
    bundle, host, recipe = _prepare_build(request)

    from dit_engines.repeat import format_spread, measure_on_gpu, repeat_builds

    assert request.repeat is not None
    measure = measure_on_gpu(bundle, recipe, host) if _can_be_verified(bundle, request) else None
    spread = repeat_builds(bundle, recipe, host, request.repeat, request.timing_cache, measure)
    if request.json:
        print_json(spread.as_json())
    else:
        print(format_spread(spread))
    return 0


def _print_engine(request: BuildRequest) -> int:
    """Build the engine, or find it in the store, and print what it is."""
    bundle, host, recipe = _prepare_build(request)

    from dit_engines.build import as_json, engine_from_bundle
    from dit_engines.listings import format_engine
    from dit_engines.preflight import need_at, stored_graphs_from_built

    engine = engine_from_bundle(bundle, recipe, request.store, host, request.timing_cache, _say)
    need = need_at(bundle, recipe, stored_graphs_from_built(engine.graphs), recipe.batch, estimated=False)
    if request.json:
        print_json({**as_json(engine), "memory_bytes": need.total})
    else:
        print(format_engine(engine, bundle, need, request.explain))
    return 0


def _prepare_build(request: BuildRequest) -> tuple[Bundle, BuildHost, Recipe]:
    """Everything that can be refused before a build; says on stderr what does not stop it."""
    from dit_engines.build import graphs_of
    from dit_engines.build_host import build_host_for
    from dit_engines.preflight import check_memory
    from dit_engines.targets import check_precision, target_named

    bundle = _open_for_build(request)
    known = request.compute_capability or target_named(request.target).compute_capability
    if known is not None:  # before it is asked for a device
        check_precision(bundle.manifest.precision.name, known, str(bundle.path))
    host = build_host_for(request.target, request.compute_capability, command=request.command)
    recipe = _recipe_for(request, host)
    check_precision(bundle.manifest.precision.name, recipe.compute_capability, str(bundle.path))
    check_memory(bundle, recipe, host, graphs_of(bundle))
    if not _can_be_verified(bundle, request):
        _say(
            f"{bundle.path} has no record of tiles of {request.decode_tile}, so dit-verify cannot judge this engine; "
            f"dit-export --decode-tile {request.decode_tile} makes one"
        )
    return bundle, host, recipe


def _open_for_build(request: BuildRequest) -> Bundle:
    """The bundle at the size that was asked for. Raises BuildError for tiles of a decoder that it does not have."""
    from dit_runtime.bundle.reader import open_bundle

    bundle = open_bundle(request.bundle).at(request.size)
    if request.decode_tile is not None and not bundle.manifest.has_decoder:
        raise BuildError(f"{bundle.path}: is a policy's bundle, without a decoder; leave --decode-tile out")
    return bundle


def _recipe_for(request: BuildRequest, host: BuildHost | None = None) -> Recipe:
    """The recipe of a build on ``host``, or without one as trtexec builds it."""
    from dit_engines.recipe import recipe_for

    return recipe_for(
        request.target,
        host.compute_capability if host else request.compute_capability,
        request.batches,
        request.branches,
        request.rows,
        request.decode_tile,
        static=request.static,
        version=host.numbers if host else request.tensorrt_version,
        library=host.library if host else None,
        workspace_bytes=host.workspace_bytes if host else None,
        auxiliary_streams=request.aux_streams,
    )


def _can_be_verified(bundle: Bundle, request: BuildRequest) -> bool:
    """Whether the bundle has records of what the engine will decode at once: an image, or a tile of that size."""
    from dit_runtime.bundle.reader import TILE

    tile = request.decode_tile
    whole = tile is None or tile >= max(bundle.manifest.model.latent_size)
    return whole or bundle.has_records(f"{TILE}{tile}")


def _say(line: str) -> None:
    say("dit-build", line)


def _version(text: str) -> tuple[int, ...]:
    parts = text.split(".")
    if len(parts) < 2 or not all(part.isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a version such as 10.3")
    return tuple(map(int, parts))


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(item) for item in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected whole numbers such as 1,2") from error


if __name__ == "__main__":
    main()
