"""Look for false alarms: export random checkpoints of every kind, and verify each on every engine that is installed.

    python benchmarks/false_alarms.py --seeds 3 --output benchmarks/false_alarms.json

A sound engine must pass whatever the weights are. Seeds draw the models' shapes and weights (``random_models.py``), and
even ones are exported in FP16, odd ones in FP32. The script prints a line for each verification: the rung that comes
closest to its limit, and what fails. Models that the output already has are not verified again.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from dit_export.bundle import bundle_from_checkpoint
from dit_export.graphs.precision import FP16, FP32

from budget import engines_for
from dit_runtime.core.environment import describe_environment
from dit_runtime.core.replace import replace_file
from dit_runtime.verify.verification import verification_of
from random_models import KINDS, Kind, make_random_source

PRECISIONS = (FP16, FP32)  # of even and odd seeds
DEPTHS = (2, 3, 4)


def verify_model(kind: Kind, seed: int, folder: Path) -> list[dict[str, Any]]:
    """Export a model, and verify it on each engine."""
    found = []
    source, precision = make_random_source(kind, seed, folder, DEPTHS), PRECISIONS[seed % 2]
    bundle = bundle_from_checkpoint(source, folder / f"{precision.name}.bundle", precision, encoder=True)
    for engine in engines_for(bundle):
        rungs = verification_of(bundle, engine).rungs
        closest = max(rungs, key=lambda rung: rung.used)
        facts = {"model": kind.name, "seed": seed, "bundle": str(precision.name), "engine": engine.info.name}
        failed = [f"{rung.name}: {rung.detail}" for rung in rungs if not rung.passed]
        found.append({**facts, "closest": closest.name, "used": round(closest.used, 3), "failed": failed})
        print(
            f"{kind.name} {seed} {precision.name} on {engine.info.name}: {'FAIL' if failed else 'pass'}, "
            f"{closest.name} uses {closest.used:.2f} of its limit {'; '.join(failed)}",
            flush=True,
        )
        engine.close()
    return found


def count_models(results: list[dict[str, Any]]) -> int:
    return len({(result["model"], result["seed"]) for result in results})


def write_results(results: list[dict[str, Any]], output: Path) -> None:
    with replace_file(output) as file:
        content = {"environment": describe_environment(), "models": count_models(results), "results": results}
        file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="models of each kind")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--only", default="", help="kinds of model whose name has this text")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "false_alarms.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results: list[dict[str, Any]] = []
    if args.output.exists():
        results = json.loads(args.output.read_text(encoding="utf-8"))["results"]
    known = {(result["model"], result["seed"]) for result in results}
    for seed in range(args.first, args.first + args.seeds):
        for kind in KINDS:
            if args.only in kind.name and (kind.name, seed) not in known:
                with tempfile.TemporaryDirectory() as work:
                    results += verify_model(kind, seed, Path(work))
                write_results(results, args.output)
    alarms = [result for result in results if result["failed"]]
    print(f"{count_models(results)} models, {len(results)} verifications, {len(alarms)} fail")


if __name__ == "__main__":
    main()
