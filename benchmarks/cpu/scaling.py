"""Time a guided step on OpenVINO against batch, tokens and model, with random weights.

    python benchmarks/cpu/scaling.py [--precision f32] [--repeat 5]

The script also times the step with its products cut and whole, and with one stream and two. It exports only the steps'
graphs, in FP16, without golden records. It writes scaling.json, from which ``report.py`` makes the tables and
scaling.svg.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np

from dit_runtime.backends.openvino import engine as openvino_engine
from dit_runtime.backends.openvino.engine import OpenVinoEngine
from dit_runtime.backends.openvino.passes import rearrange
from dit_runtime.bench.gemm import measure_gemm_rates, shapes_of
from dit_runtime.bench.timing import time_calls
from dit_runtime.bundle.macs import count_step_gmac
from dit_runtime.bundle.manifest import ModelSpec
from dit_runtime.bundle.precision import Precision, precision_named
from dit_runtime.core.environment import describe_environment
from dit_runtime.core.errors import EngineError
from dit_runtime.core.replace import replace_file
from dit_runtime.samplers.guidance import guidance_weights

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from kernels import XL, Ablation, export_step  # noqa: E402  # beside this folder

MODELS = {
    "S/2": replace(XL, width=384, depth=12, heads=6, mlp_width=1536),
    "B/2": replace(XL, width=768, depth=12, heads=12, mlp_width=3072),
    "L/2": replace(XL, width=1024, depth=24, heads=16, mlp_width=4096),
    "XL/2": XL,
}
BATCHES = (1, 2, 4, 8, 16)
STREAMS = ((1, 1), (2, 1), (1, 2))  # streams, and images in each call
SIDES = (32, 64, 128)  # of B/2's latents: 256, 1024 and 4096 tokens


@dataclass(frozen=True)
class StepBundle:
    """The part of a bundle that ``OpenVinoEngine`` reads, for a step alone."""

    path: Path
    manifest: Any

    def graph(self, name: str) -> Path:
        return self.path / self.manifest.graphs[name].file


def trace_step(spec: ModelSpec, folder: Path) -> StepBundle:
    graph = export_step(Ablation("", "as exported"), spec, folder)
    size = SimpleNamespace(bytes=(folder / graph.weights).stat().st_size)
    precision = SimpleNamespace(name="fp16")
    return StepBundle(folder, SimpleNamespace(graphs={"step": graph}, files={graph.weights: size}, precision=precision))


def make_inputs(spec: ModelSpec, batch: int) -> dict[str, Any]:
    image = (batch, spec.latent_channels, *spec.latent_size)
    random = np.random.default_rng(0)
    return {
        "state": random.standard_normal((batch, 3, *image[1:])).astype(np.float32),
        "noise": np.zeros(image, np.float32),
        "coefficients": np.ones((batch, 17), np.float32),
        "guidance": guidance_weights(4.0, batch, spec.latent_channels, spec.latent_channels),
        "rows": np.zeros((2, batch), np.int32),
        "modulation": random.standard_normal((1, 6 * spec.depth + 2, spec.width)).astype(np.float32),
    }


def measure(spec: ModelSpec, batches: tuple[int, ...], precision: str, repeat: int) -> list[dict[str, Any]]:
    """Measure a point for each batch: the milliseconds of a guided step, its work, and the rate."""
    points = []
    with tempfile.TemporaryDirectory() as folder:
        bundle: Any = trace_step(spec, Path(folder))
        engine = OpenVinoEngine(bundle, precision=precision_named(precision, EngineError))
        for batch in batches:
            inputs = make_inputs(spec, batch)
            request = engine.compile("step", {name: value.shape for name, value in inputs.items()})
            request = request.create_infer_request()
            call = {"step": lambda request=request, inputs=inputs: request.infer(inputs, share_inputs=True)}
            timing = time_calls(call, repeat, f"{spec.width} wide, {spec.tokens} tokens, batch {batch}")["step"]
            attention = 2 * spec.depth * spec.tokens**2 * spec.width / 1e9  # GMAC of the attention's two products
            gflop = 4 * batch * count_step_gmac(spec)  # two branches, two operations each
            points.append(
                {
                    "batch": batch,
                    "tokens": spec.tokens,
                    "gflop": round(gflop, 2),
                    "attention_share": round(attention / count_step_gmac(spec), 4),
                    "gflops": round(gflop / timing.p50_ms * 1e3, 1),
                    **asdict(timing),
                }
            )
    return points


def time_cut_and_whole(spec: ModelSpec, repeat: int) -> dict[str, Any]:
    """Time a guided step in BF16 with its products cut (``backends/openvino/passes.py``) and whole, in turn."""
    calls: dict[str, Any] = {}
    inputs = make_inputs(spec, 1)
    with tempfile.TemporaryDirectory() as folder:
        bundle: Any = trace_step(spec, Path(folder))
        engine = OpenVinoEngine(bundle, precision=Precision.BF16)
        for name, wide in {"cut_ms": 0, "whole_ms": sys.maxsize}.items():
            with patch.object(openvino_engine, "rearrange", partial(rearrange, wide=wide)):
                request = engine.compile("step", {name: value.shape for name, value in inputs.items()})
            calls[name] = partial(request.create_infer_request().infer, inputs, share_inputs=True)
        found = time_calls(calls, repeat, f"{spec.width} wide, cut and whole")
    return {"width": spec.width, **{name: timing.p50_ms for name, timing in found.items()}}


def time_streams(spec: ModelSpec, precision: str, repeat: int) -> list[dict[str, Any]]:
    """Measure guided steps a second: with a call in each of two streams, and with one call of one or two images."""
    calls: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as threads:
        bundle: Any = trace_step(spec, Path(folder))
        for streams, batch in STREAMS:
            inputs = make_inputs(spec, batch)
            named = precision_named(precision, EngineError)
            session = OpenVinoEngine(bundle, precision=named, streams=streams).session("step")
            run = partial(session.run, inputs, ["next_state"])
            calls[f"{streams} {batch}"] = partial(call_together, threads, run, streams)
        found = time_calls(calls, repeat, f"{spec.width} wide, streams")
    return [
        {
            "streams": streams,
            "batch": batch,
            "steps_a_second": round(streams * batch / found[f"{streams} {batch}"].p50_ms * 1e3, 3),
        }
        for streams, batch in STREAMS
    ]


def call_together(threads: ThreadPoolExecutor, call: Callable[[], Any], count: int) -> None:
    for done in [threads.submit(call) for _ in range(count)]:
        done.result()


def fit_exponent(points: list[dict[str, Any]], axis: str) -> float:
    """Fit b in ms = a·axisᵇ, by least squares of the logarithms."""
    x, y = ([math.log(point[name]) for point in points] for name in (axis, "p50_ms"))
    middle_x, middle_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - middle_x) * (b - middle_y) for a, b in zip(x, y, strict=True)) / sum((a - middle_x) ** 2 for a in x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", choices=("f32", "bf16"), default="bf16")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--output", type=Path, help="default: scaling.json beside this file")
    args = parser.parse_args()
    how = (args.precision, args.repeat)
    batch = {name: measure(MODELS[name], BATCHES, *how) for name in ("S/2", "B/2", "XL/2")}
    sizes = [replace(MODELS["B/2"], latent_size=(side, side)) for side in SIDES]
    tokens = {"B/2": [measure(spec, (1,), *how)[0] for spec in sizes]}
    model = [{"model": name, **measure(spec, (1,), *how)[0]} for name, spec in MODELS.items()]
    wide = MODELS if args.precision == "bf16" else {}
    cut = [{"model": name, **time_cut_and_whole(spec, 2 * args.repeat)} for name, spec in wide.items()]
    streams = {name: time_streams(MODELS[name], args.precision, 2 * args.repeat) for name in ("S/2", "B/2")}
    report: dict[str, Any] = {
        "precision": args.precision,
        "environment": describe_environment(0),
        "batch": batch,
        "tokens": tokens,
        "model": model,
        "cut": cut,
        "streams": streams,
        "exponents": {
            **{f"batch, {name}": fit_exponent(points, "batch") for name, points in batch.items()},
            "tokens, B/2": fit_exponent(tokens["B/2"], "tokens"),
            "work, S/2 to XL/2": fit_exponent(model, "gflop"),
        },
        "gemm": [
            asdict(rate)
            for rate in measure_gemm_rates(
                shapes_of(XL, 2), Precision.BF16 if args.precision == "bf16" else Precision.FP32
            )
        ],
    }
    target = args.output or HERE / "scaling.json"
    with replace_file(target) as file:
        file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(target)


if __name__ == "__main__":
    main()
