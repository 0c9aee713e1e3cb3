"""``dit-build``: a bundle in, audited engines for one target out."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from dit_runtime.command import Parser, image_size, positive, print_json, run

if TYPE_CHECKING:
    from dit_engines.build import BuiltEngine

EXAMPLES = ("dit-build my.bundle --target rtx", "dit-build my.bundle --target rtx --compute-capability 12.0 --batch 8")


def main(argv: list[str] | None = None) -> None:
    """Entry point of the command."""
    run("dit-build", lambda: _main(argv))


def _main(argv: list[str] | None) -> int:
    parser = Parser(
        "dit-build",
        "Compile a bundle's graphs for a target and audit what the builder made. TensorRT-RTX builds ahead of time: no "
        "GPU is needed.",
        EXAMPLES,
    )
    parser.add_argument("bundle", type=Path, help="a bundle that dit-export wrote")
    parser.add_argument("--target", default="rtx", help="rtx: GeForce and RTX GPUs, through TensorRT-RTX")
    parser.add_argument("--compute-capability", default="8.9", help="of the GPU: 8.9 is Ada, 12.0 is Blackwell")
    parser.add_argument("--batch", type=positive, default=4, help="most pictures in one call")
    parser.add_argument("--branches", type=_numbers, default="1,2", help="guidance branches, a profile for each")
    parser.add_argument("--rows", type=positive, default=1024, help="most rows of the conditioning table")
    parser.add_argument("--size", type=image_size, metavar="HEIGHTxWIDTH", help="of pictures (default: the bundle's)")
    parser.add_argument(
        "--decode-tile", type=positive, metavar="N", help="a decoder for tiles of NxN latents, which needs less memory"
    )
    parser.add_argument("--store", type=Path, help="where engines are kept (default: BUNDLE/engines)")
    parser.add_argument("--json", action="store_true", help="print the audit as JSON")
    args = parser.parse_args(argv)

    from dit_engines.build import engine_from_bundle
    from dit_engines.recipe import recipe_for
    from dit_runtime.bundle import open_bundle

    bundle = open_bundle(args.bundle).at(args.size)
    recipe = recipe_for(args.target, args.compute_capability, args.batch, args.branches, args.rows, args.decode_tile)
    engine = engine_from_bundle(bundle, recipe, args.store)
    if args.json:
        print_json({**asdict(engine), "folder": str(engine.folder)})
    else:
        print(_table(engine, bundle.manifest.model.attentions))
    return 0


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(item) for item in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected whole numbers such as 1,2") from error


def _table(engine: BuiltEngine, attentions: int) -> str:
    state = "already built" if engine.reused else "built"
    recipe = engine.recipe
    lines = [
        f"{engine.folder}: {state} with {engine.builder} for sm_{recipe.compute_capability.replace('.', '')}, "
        f"batch ≤ {recipe.batch} (the builder's own figures)",
        f"{'graph':<20} {'weights':>10} {'activations':>12} {'kernels':>8} {'fused attention':>16} {'in FP16':>8}",
    ]
    for built in engine.graphs:
        for index, profile in enumerate(built.audit.profiles):
            name = built.graph
            if built.graph == "step":
                name = f"step G={recipe.branches[index]}"
            fused = f"{profile.fused_attention} of {attentions}" if built.graph == "step" else "-"
            lines.append(
                f"{name:<20} {built.audit.weights_bytes / 1e6:>7.1f} MB {profile.activation_bytes / 1e6:>9.1f} MB "
                f"{profile.kernels:>8} {fused:>16} {profile.fp16_share:>8.1%}"
            )
    return "\n".join(lines)
