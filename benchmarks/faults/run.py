"""Seed faults, one at a time; show which rung of the verification fails first, and what the fault does to images.

    python benchmarks/faults/run.py FP32.bundle FP16.bundle INT8.bundle [--only TEXT]

The script prints a line for each fault and bundle, and writes results.json, from which ``report.py`` makes README.md.
Of a precision whose bundle is not named, results.json keeps what the same engine gave. INT8 bundles have faults of
their own.
No file of a bundle is changed. ``tests/benchmarks/test_faults.py`` checks the rung of every fault.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from damage import damage_of, make_sound_images
from engine_faults import ENGINE_FAULTS
from fault import BELOW, IN_FP16_ONLY, NONE, PASSES, Fault
from faulty_engine import Array
from graph_faults import GRAPH_FAULTS
from quantization_faults import QUANTIZATION_FAULTS
from report import HERE, format_document
from runtime_faults import RUNTIME_FAULTS

from dit_runtime.backends.onnxruntime.engine import OnnxRuntimeEngine
from dit_runtime.bundle.manifest import ENCODER
from dit_runtime.bundle.reader import Bundle, open_bundle
from dit_runtime.core.replace import replace_file

FAULTS = (*GRAPH_FAULTS, *RUNTIME_FAULTS, *ENGINE_FAULTS, *QUANTIZATION_FAULTS)
REASONS = {
    BELOW: "the fault is smaller than what rounding to FP16 does; the FP32 bundle is there to catch it",
    IN_FP16_ONLY: "in FP32 the function is the same",
    "no fault in FP16": "the weights are FP16 in any case",
}


def judge(fault: Fault, bundle: Bundle, sound: dict[bool, list[Array]]) -> dict[str, Any]:
    """The first rung that fails, the damage, and why the fault passes where it does."""
    # Where no record is, the records' rungs have nothing to say, and take most of the time.
    rung = (fault.first_broken_relation if fault in ENGINE_FAULTS else fault.first_failure)(bundle)
    encodes = fault.graph == ENCODER
    if encodes not in sound:
        sound[encodes] = make_sound_images(fault, bundle)
    damage: float | str | None = damage_of(fault, bundle, sound[encodes])
    if isinstance(damage, float):
        damage = round(damage, 1) if math.isfinite(damage) else None
    wanted = fault.expected(bundle.manifest.precision.name)
    found = PASSES if rung is None else rung.name
    if found != (PASSES if wanted in NONE else wanted):
        print(f"expected {wanted}, not {found}: {rung.detail if rung else ''}")
    why = (fault.why or REASONS.get(wanted, "unknown")) if rung is None else ""
    return {"rung": found, "damage": damage, "why": why}


def merge(found: dict[str, Any]) -> dict[str, Any]:
    """The results with those of results.json for other bundles, if the engine is the same, in the faults' order."""
    before = json.loads((HERE / "results.json").read_text(encoding="utf-8"))
    if before["engine"] != found["engine"]:
        return found
    kept = [title for title in before["bundles"] if title not in found["bundles"]]
    faults = {}
    for name in (fault.name for fault in FAULTS):
        old = {title: cell for title, cell in before["faults"].get(name, {}).items() if title in kept}
        faults[name] = old | found["faults"].get(name, {})
    order = ("FP32", "FP16", "INT8")
    return {**found, "bundles": sorted((*kept, *found["bundles"]), key=order.index), "faults": faults}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", type=Path, nargs="+")
    parser.add_argument("--only", metavar="TEXT", default="", help="faults whose name has this text; writes no file")
    args = parser.parse_args()
    results: dict[str, dict[str, Any]] = {}
    bundles = {bundle.manifest.precision.name.upper(): bundle for bundle in map(open_bundle, args.bundles)}
    for title, bundle in bundles.items():
        sound: dict[bool, list[Array]] = {}
        for fault in FAULTS:
            if args.only in fault.name and fault.is_in(bundle):
                cell = results.setdefault(fault.name, {})[title] = judge(fault, bundle, sound)
                print(f"{title} {fault.name}: {cell}", flush=True)
    if not args.only:
        engine = OnnxRuntimeEngine(next(iter(bundles.values()))).info.name
        content = merge({"engine": engine, "bundles": list(bundles), "faults": results})
        with replace_file(HERE / "results.json") as file:
            file.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        with replace_file(HERE / "README.md") as file:
            file.write_text(format_document(), encoding="utf-8")


if __name__ == "__main__":
    main()
