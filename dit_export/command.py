"""``dit-export``: a checkpoint in, a verified bundle out."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from dit_runtime.command import Parser, print_json, run
from dit_runtime.errors import EngineError

EXAMPLES = (
    "dit-export facebook/DiT-XL-2-256 --fp16 -o dit-xl.bundle",
    "dit-export DiT-XL/2-256 --random-weights 0 --fp16 -o xl-random.bundle",
)


def main(argv: list[str] | None = None) -> None:
    """Entry point of the command."""
    run("dit-export", lambda: _main(argv))


def _main(argv: list[str] | None) -> int:
    parser = Parser(
        "dit-export",
        "Export a Diffusion Transformer and its VAE to a bundle: ONNX graphs, golden records of the PyTorch "
        "reference, and a manifest. Prints how the graphs compare with PyTorch.",
        EXAMPLES,
    )
    parser.add_argument(
        "checkpoint",
        help="a diffusers DiTPipeline folder, a hub id (owner/name or owner/name@revision), or with --random-weights "
        "a preset such as DiT-XL/2-256",
    )
    parser.add_argument("--fp16", action="store_true", help="strongly typed FP16 graphs (default: FP32)")
    parser.add_argument("--random-weights", type=int, metavar="SEED", help="a preset's shape with seeded weights")
    parser.add_argument("-o", "--output", type=Path, help="the bundle's folder (default: NAME-PRECISION.bundle)")
    parser.add_argument("--no-verify", action="store_true", help="leave out the comparison on ONNX Runtime")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    args = parser.parse_args(argv)

    missing = [name for name in ("torch", "diffusers", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise EngineError(f"{' and '.join(missing)} not installed; pip install 'dit-export[export]'")
    from dit_export.export import Source, bundle_from_checkpoint
    from dit_export.precision import FP16, FP32

    precision = FP16 if args.fp16 else FP32
    name = args.checkpoint.strip("/").replace("@", "-").replace("/", "-") or "checkpoint"
    output = args.output or Path(f"{Path(name).name}-{precision.name}.bundle")
    bundle = bundle_from_checkpoint(Source(args.checkpoint, args.random_weights), output, precision)

    from dit_runtime.engines import OnnxRuntimeEngine
    from dit_runtime.verdicts import store_verdict
    from dit_runtime.verify import format_table, verified

    rungs, engine_name = [], None
    if not args.no_verify:
        try:
            engine = OnnxRuntimeEngine(bundle)
        except EngineError as error:
            print(f"dit-export: parity was not checked: {error}", file=sys.stderr)
        else:
            rungs, engine_name = verified(bundle, engine), engine.name
            store_verdict(bundle, engine, rungs, quick=False)
    sizes = {name: bundle.manifest.files[graph.weights].bytes for name, graph in bundle.manifest.graphs.items()}
    passed = all(rung.passed for rung in rungs)
    if args.json:
        print_json(
            {
                "bundle": str(output),
                "digest": bundle.digest,
                "source": bundle.manifest.source.name,
                "precision": precision.name,
                "weights_bytes": sizes,
                "engine": engine_name,
                "passed": passed if rungs else None,
                "rungs": [rung.as_json() for rung in rungs],
            }
        )
    else:
        weights = ", ".join(f"{name} {sizes[name] / 1e6:.1f} MB" for name in ("conditioner", "step", "decoder"))
        print(f"{output}: {bundle.manifest.source.name}, {precision.name}; weights: {weights}")
        if rungs:
            print(f"against {bundle.manifest.source.reference}, on {engine_name}:")
            print(format_table(rungs))
    if not passed:
        failed = ", ".join(rung.name for rung in rungs if not rung.passed)
        print(
            f"dit-export: {output} was written, but does not match PyTorch on {engine_name}: {failed}", file=sys.stderr
        )
        return 1
    return 0
