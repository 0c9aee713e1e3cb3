"""``dit-build``: a bundle in, audited engines for one target out."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from dit_runtime.commands.common import (
    Parser,
    image_size,
    positive,
    print_json,
    run,
)

EXAMPLES = (
    "dit-build my.bundle --target rtx",
    "dit-build my.bundle --target rtx-50 --batch 1,4,8 --branches 1,2 --explain",
    "dit-build my.bundle --target this --store /var/lib/dit/engines",
    "dit-build my.bundle --target orin-nano --batch 1 --print-trtexec",
    "dit-build --list-targets",
)


def main(argv: list[str] | None = None) -> None:
    """Entry point of the command."""
    run("dit-build", lambda: _main(sys.argv[1:] if argv is None else argv))


def _parser() -> Parser:
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


def _main(argv: list[str]) -> int:
    parser = _parser()
    args = parser.parse_args(argv)
    if args.list_targets:
        return _list_targets(args.json)
    if args.bundle is None:
        parser.error("expected a bundle, or --list-targets")
    if args.aux_streams is not None and args.aux_streams < 0:
        parser.error(f"--aux-streams {args.aux_streams}: expected a whole number from 0")

    from dit_engines.build_host import build_host_for
    from dit_runtime.bundle.reader import TILE, open_bundle

    bundle = open_bundle(args.bundle).at(args.size)
    if args.print_trtexec:
        return _print_trtexec(args)
    place = build_host_for(args.target, args.compute_capability, command=shlex.join(["dit-build", *argv]))

    from dit_engines.build import as_json, engine_from_bundle, graphs_of
    from dit_engines.listings import format_engine
    from dit_engines.preflight import built_graphs, check_memory, need_at
    from dit_engines.recipe import recipe_for
    from dit_engines.repeat import format_spread, measure_on_gpu, repeat_builds

    recipe = recipe_for(
        args.target,
        place.compute_capability,
        args.batch,
        args.branches,
        args.rows,
        args.decode_tile,
        static=args.static,
        version=place.numbers,
        library=place.library,
        workspace_bytes=place.workspace_bytes,
        auxiliary_streams=args.aux_streams,
    )
    check_memory(bundle, recipe, place, graphs_of(bundle))
    tile = args.decode_tile
    unknown = tile is not None and tile < max(bundle.manifest.model.latent_size)
    unknown = unknown and not bundle.has_records(f"{TILE}{tile}")
    if unknown:
        print(
            f"dit-build: {bundle.path} has no record of tiles of {tile}, so that dit-verify cannot judge this engine; "
            f"dit-export --decode-tile {tile} makes one",
            file=sys.stderr,
        )
    if args.repeat:
        measured = None if unknown else measure_on_gpu(bundle, recipe, place)
        spread = repeat_builds(bundle, recipe, place, args.repeat, args.timing_cache, measured)
        if args.json:
            print_json(spread.as_json())
        else:
            print(format_spread(spread))
        return 0
    engine = engine_from_bundle(bundle, recipe, args.store, place, args.timing_cache, _say)
    need = need_at(bundle, recipe, built_graphs(engine.graphs), recipe.batch, estimated=False)
    if args.json:
        print_json({**as_json(engine), "memory_bytes": need.total})
    else:
        print(format_engine(engine, bundle, need, args.explain))
    return 0


def _say(line: str) -> None:
    print(f"dit-build: {line}", file=sys.stderr)


def _list_targets(json: bool) -> int:
    from dit_engines.targets import TARGETS, format_targets

    if json:
        print_json([target.as_json() for target in TARGETS.values()])
    else:
        print(format_targets())
    return 0


def _print_trtexec(args: argparse.Namespace) -> int:
    from dit_engines.recipe import recipe_for
    from dit_engines.trtexec import trtexec_commands
    from dit_runtime.bundle.reader import open_bundle

    recipe = recipe_for(
        args.target,
        args.compute_capability,
        args.batch,
        args.branches,
        args.rows,
        args.decode_tile,
        static=args.static,
        version=args.tensorrt_version,
        auxiliary_streams=args.aux_streams,
    )
    commands = trtexec_commands(open_bundle(args.bundle).at(args.size), recipe)
    if args.json:
        print_json(commands)
    else:
        print("\n".join(commands))
    return 0


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
