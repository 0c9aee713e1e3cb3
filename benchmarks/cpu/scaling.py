"""Cost of a guided step against batch, tokens and model, and how it grows: OpenVINO, random weights.

    python benchmarks/cpu/scaling.py --work build/cpu/scaling [--precision f32] [--repeat 5]

Exports the models once. Writes scaling.json, from which ``report.py`` makes the table and scaling.svg.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ablations import shapes_of, step_inputs

from dit_runtime import open_bundle
from dit_runtime.bundle import Bundle
from dit_runtime.environment import environment
from dit_runtime.files import replaced_file
from dit_runtime.gemm import gemm_rates
from dit_runtime.gemm import shapes_of as gemm_shapes
from dit_runtime.macs import step_gmac
from dit_runtime.openvino_engine import OpenVinoEngine
from dit_runtime.timing import timed

HERE = Path(__file__).parent
SIZES = ("256x256", "512x512", "1024x1024")  # of B/2: 256, 1024 and 4096 tokens
MODELS = {"S/2": "DiT-S/2-256", "B/2": "DiT-B/2-256", "L/2": "DiT-L/2-256", "XL/2": "DiT-XL/2-256"}
BATCHES = (1, 2, 4, 8, 16)


def exported(work: Path, name: str) -> Bundle:
    """The model's bundle, FP32, made once; B/2 at all of ``SIZES``."""
    path = work / f"{name.replace('/', '')}.bundle"
    if not path.exists():
        sizes = ["--size", *SIZES] if name == "B/2" else []
        code = "from dit_export.command import main; import sys; main(sys.argv[1:])"
        argv = [MODELS[name], "--random-weights", "0", "--no-verify", "-o", os.fspath(path), *sizes]
        subprocess.run([sys.executable, "-c", code, *argv], check=True)
    return open_bundle(path)


def measured(bundle: Bundle, batches: tuple[int, ...], precision: str, repeat: int) -> list[dict[str, Any]]:
    """A point for each batch: milliseconds of a guided step, its work, and the rate."""
    points = []
    model, table = bundle.manifest.model, bundle.manifest.table.name
    for batch in batches:
        engine = OpenVinoEngine(bundle, precision=precision)
        inputs = step_inputs(bundle, engine, batch, guided=True)
        request = engine.compiled("step", shapes_of(inputs, table)).create_infer_request()
        call = {"step": lambda request=request, inputs=inputs: request.infer(inputs, share_inputs=True)}
        timing = timed(call, repeat, f"{bundle.manifest.source.name}, {model.tokens} tokens, batch {batch}")["step"]
        attention = 2 * model.depth * model.tokens**2 * model.width / 1e9  # GMAC of its two products
        gflop = 4 * batch * step_gmac(model)  # two branches, two operations each
        points.append(
            {
                "batch": batch,
                "tokens": model.tokens,
                "gflop": round(gflop, 2),
                "attention_share": round(attention / step_gmac(model), 4),
                "gflops": round(gflop / timing.p50_ms * 1e3, 1),
                **asdict(timing),
            }
        )  # fmt: skip
    return points


def exponent(points: list[dict[str, Any]], axis: str) -> float:
    """b of ms = a·axisᵇ, by least squares of the logarithms."""
    x, y = ([math.log(point[name]) for point in points] for name in (axis, "p50_ms"))
    middle_x, middle_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - middle_x) * (b - middle_y) for a, b in zip(x, y, strict=True)) / sum((a - middle_x) ** 2 for a in x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/cpu/scaling"))
    parser.add_argument("--precision", choices=("f32", "bf16"), default="bf16")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--output", type=Path, help="default: scaling.json beside this file")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    bundles = {name: exported(args.work, name) for name in MODELS}
    report: dict[str, Any] = {"precision": args.precision, "environment": environment(0)}
    b = bundles["B/2"]
    report["batch"] = {
        name: measured(bundles[name], BATCHES, args.precision, args.repeat) for name in ("S/2", "B/2", "XL/2")
    }
    report["tokens"] = {
        "B/2": [
            point
            for size in b.manifest.image_sizes
            for point in measured(b.at(size), (1,), args.precision, args.repeat)
        ]
    }
    report["model"] = [
        {"model": name, **measured(bundle, (1,), args.precision, args.repeat)[0]} for name, bundle in bundles.items()
    ]
    report["exponents"] = {
        **{f"batch, {name}": exponent(points, "batch") for name, points in report["batch"].items()},
        "tokens, B/2": exponent(report["tokens"]["B/2"], "tokens"),
        "work, S/2 to XL/2": exponent(report["model"], "gflop"),
    }
    rates = gemm_rates(gemm_shapes(bundles["XL/2"].manifest.model, 2), {"f32": "fp32", "bf16": "bf16"}[args.precision])
    report["gemm"] = [asdict(rate) for rate in rates]
    target = args.output or HERE / "scaling.json"
    with replaced_file(target) as file:
        file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(target)


if __name__ == "__main__":
    main()
