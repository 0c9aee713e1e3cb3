"""Time the step on a CPU with one choice of its design changed, or one setting of ONNX Runtime.

    python benchmarks/cpu/ablations.py --model xl --work build/cpu [--repeat 9]

All variants are timed in turn, in one process, on the bundle that ``run.py`` made. Writes MODEL-ablations.json, from
which ``report.py`` makes the table.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import onnxruntime
import openvino
from contenders import GUIDANCE, STEPS
from openvino import opset13

from dit_runtime import open_bundle
from dit_runtime.backends.openvino import engine as openvino_engine
from dit_runtime.backends.openvino.engine import OpenVinoEngine, load_core
from dit_runtime.backends.openvino.passes import rearrange
from dit_runtime.bench.timing import time_calls
from dit_runtime.bundle.precision import Precision, precision_named
from dit_runtime.bundle.reader import Bundle
from dit_runtime.core.environment import describe_environment
from dit_runtime.core.errors import EngineError
from dit_runtime.core.replace import replace_file
from dit_runtime.samplers.by_name import schedule_for
from dit_runtime.samplers.guidance import branch_rows, guidance_weights

HERE = Path(__file__).parent
DESIGNED = "as designed: static shapes, batch 1, G=2"
Array = np.ndarray[Any, Any]
Call = Callable[[], Any]


def make_step_inputs(bundle: Bundle, engine: OpenVinoEngine, batch: int, guided: bool) -> dict[str, Array]:
    """The inputs of one DDIM step for images of class 0, 1, …, with a conditioning table of this step alone."""
    model, diffusion = bundle.manifest.model, bundle.manifest.diffusion
    schedule = schedule_for("ddim", model, diffusion, STEPS)
    labels = (np.arange(batch) % model.classes).astype(np.int32)
    weights = guidance_weights(GUIDANCE if guided else 1.0, batch, model.latent_channels, diffusion.guidance_channels)
    conditions, rows = branch_rows(labels, model.null_class, len(weights))
    state = np.zeros((batch, 3, model.latent_channels, *model.latent_size), np.float32)
    state[:, 0] = np.random.default_rng(0).standard_normal(state[:, 0].shape)
    table = bundle.manifest.table.name
    (modulation,) = engine.session("conditioner").run(
        make_conditioner_inputs(schedule.timesteps[0], conditions), [table]
    )
    return {
        "state": state,
        "noise": np.zeros_like(state[:, 0]),
        "coefficients": np.repeat(schedule.coefficients[:1], batch, axis=0),
        "guidance": weights,
        "rows": rows,
        table: modulation,
    }


def make_conditioner_inputs(timestep: float, labels: Array) -> dict[str, Array]:
    return {"timesteps": np.full(len(labels), timestep, np.float32), "labels": labels}


def shapes_of(inputs: dict[str, Array], table: str) -> dict[str, list[int]]:
    return {name: [-1 if name == table and not axis else size for axis, size in enumerate(value.shape)]
            for name, value in inputs.items()}  # fmt: skip


def network_of(model: Any) -> Any:
    """The step without guidance and sampler: a model whose output is the factor of the guidance weights."""
    (node,) = (node for node in model.get_parameters() if node.output(0).get_any_name() == "guidance")
    before = node
    while node.get_type_name() != "Multiply":
        before = node
        readers = [reader.get_node() for reader in node.output(0).get_target_inputs()]
        (node,) = (reader for reader in readers if reader.get_type_name() != "ShapeOf")
    (source,) = (value for value in node.input_values() if value.get_node() != before)
    used = [each for each in model.get_parameters() if each.output(0).get_any_name() not in OUTSIDE]
    return openvino.Model([opset13.result(source)], used)


OUTSIDE = ("noise", "coefficients")  # inputs that only the sampler reads; the network reads the shape of ``guidance``


def make_openvino_variants(bundle: Bundle, precision: str) -> dict[str, Call]:
    """Calls that each do the work of one guided step for one image; the last does it without guidance."""
    engine = OpenVinoEngine(bundle, precision=precision_named(precision, EngineError))
    table, model = bundle.manifest.table.name, bundle.manifest.model
    designed = make_step_inputs(bundle, engine, 1, guided=True)
    plain = make_step_inputs(bundle, engine, 1, guided=False)
    # Two images without guidance are the doubled batch: the patches are embedded twice, and the sampler runs twice.
    doubled = make_step_inputs(bundle, engine, 2, guided=False)

    def call(shapes: dict[str, list[int]], inputs: dict[str, Array]) -> Call:
        request = engine.compile("step", shapes).create_infer_request()
        return lambda: request.infer(inputs, share_inputs=True, share_outputs=True)

    own = call(shapes_of(designed, table), designed)
    open_axes = {
        "state": [-1, *designed["state"].shape[1:]],
        "noise": [-1, *designed["noise"].shape[1:]],
        "coefficients": [-1, designed["coefficients"].shape[1]],
        "guidance": [-1, -1, model.latent_channels],
        "rows": [-1, -1],
        table: [-1, *designed[table].shape[1:]],
    }
    timestep = schedule_for("ddim", model, bundle.manifest.diffusion, STEPS).timesteps[0]
    pair = make_conditioner_inputs(timestep, np.array([0, model.null_class], np.int32))
    conditioner = engine.session("conditioner")

    def with_conditioner() -> None:
        conditioner.run(pair, [table])
        own()

    outside = dict(designed)
    network = engine._core.read_model(bundle.graph("step"))
    network = network_of(network)
    network.reshape({name: shape for name, shape in shapes_of(designed, table).items() if name not in OUTSIDE})
    hint = {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY"}
    request = engine._core.compile_model(network, "CPU", hint).create_infer_request()
    reads = {name: value for name, value in outside.items() if name not in OUTSIDE}
    coefficients = designed["coefficients"][0]

    def sampler_outside() -> Array:
        output = np.asarray(request.infer(reads, share_inputs=True)[0])[:, :, : model.latent_channels]
        weights = designed["guidance"][..., None, None]
        e = (weights * output.reshape(2, 1, model.latent_channels, *model.latent_size)).sum(0)
        state = designed["state"]
        mixed = np.einsum("ij,bj...->bi...", coefficients[2:11].reshape(3, 3), state)
        return np.asarray(mixed + coefficients[11:14, None, None, None] * e[:, None])

    other = {"MLP and attention not cut": sys.maxsize, "MLP and attention cut": 0}
    arranged = {}
    for name, wide in other.items() if precision == "bf16" else ():
        with patch.object(openvino_engine, "rearrange", partial(rearrange, wide=wide)):
            arranged[name] = call(shapes_of(designed, table), designed)
    expected = own()["next_state"].copy()
    apart = float(np.abs(sampler_outside() - expected).max() / np.abs(expected).max())
    assert apart < 0.02, f"the step with its sampler in numpy differs by {apart}"
    return {
        DESIGNED: own,
        **arranged,
        "dynamic shapes": call(open_axes, designed),
        "conditioner in every step (not hoisted)": with_conditioner,
        "guidance and sampler in numpy": sampler_outside,
        "doubled batch (patches embedded and sampled twice)": call(shapes_of(doubled, table), doubled),
        "G=1, outside a guidance interval": call(shapes_of(plain, table), plain),
    }


def make_onnxruntime_variants(bundle: Bundle, inputs: dict[str, Array]) -> dict[str, Call]:
    """Calls of the step, each with one setting changed."""
    level = onnxruntime.GraphOptimizationLevel
    cores = len(os.sched_getaffinity(0))
    changes: dict[str, Callable[[Any], None]] = {
        "as opened: all optimizations, its own threads": lambda options: None,
        "optimizations: extended": set_option("graph_optimization_level", level.ORT_ENABLE_EXTENDED),
        "optimizations: basic": set_option("graph_optimization_level", level.ORT_ENABLE_BASIC),
        "optimizations: none": set_option("graph_optimization_level", level.ORT_DISABLE_ALL),
        f"threads: {cores}": set_option("intra_op_num_threads", cores),
        "threads: 1": set_option("intra_op_num_threads", 1),
        "no memory arena": set_option("enable_cpu_mem_arena", False),
        "no memory pattern": set_option("enable_mem_pattern", False),
        "weights not packed": lambda options: options.add_session_config_entry("session.disable_prepacking", "1"),
        "threads do not spin": lambda options: options.add_session_config_entry("session.intra_op.allow_spinning", "0"),
    }
    found: dict[str, Call] = {}
    for name, change in changes.items():
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        change(options)
        session = onnxruntime.InferenceSession(
            os.fspath(bundle.graph("step")), options, providers=["CPUExecutionProvider"]
        )
        found[name] = lambda session=session: session.run(["next_state"], inputs)
        if name.startswith("as opened"):
            found["I/O binding"] = bind(session, inputs)
    return found


def set_option(name: str, value: Any) -> Callable[[Any], None]:
    return lambda options: setattr(options, name, value)


def bind(session: Any, inputs: dict[str, Array]) -> Call:
    """A call whose inputs and outputs are bound once, to arrays that it keeps."""
    binding = session.io_binding()
    for name, value in inputs.items():
        binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(value))
    outputs = [onnxruntime.OrtValue.ortvalue_from_numpy(inputs[name].copy()) for name in ("state", "noise")]
    for name, value in zip(("next_state", "denoised"), outputs, strict=True):
        binding.bind_ortvalue_output(name, value)
    return lambda: session.run_with_iobinding(binding)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("demo", "b", "xl"), default="xl")
    parser.add_argument("--work", type=Path, default=Path("build/cpu"))
    parser.add_argument("--repeat", type=int, default=9)
    parser.add_argument(
        "--no-onnxruntime", action="store_true", help="leave out ONNX Runtime, whose variants each hold the weights"
    )
    parser.add_argument("--output", type=Path, help="default: MODEL-ablations.json beside this file")
    args = parser.parse_args()
    bundle = open_bundle(args.work / args.model / "fp32.bundle")
    able = load_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    report: dict[str, Any] = {
        "model": bundle.manifest.source.name,
        "environment": describe_environment(0),
        "openvino": {},
    }
    for precision in ("bf16", "f32") if "BF16" in able else ("f32",):
        found = time_calls(make_openvino_variants(bundle, precision), args.repeat, f"OpenVINO {precision}")
        report["openvino"][precision] = {name: asdict(timing) for name, timing in found.items()}
    if not args.no_onnxruntime:
        inputs = make_step_inputs(bundle, OpenVinoEngine(bundle, precision=Precision.FP32), 1, guided=True)
        found = time_calls(make_onnxruntime_variants(bundle, inputs), args.repeat, "ONNX Runtime")
        report["onnxruntime"] = {name: asdict(timing) for name, timing in found.items()}
    target = args.output or HERE / f"{args.model}-ablations.json"
    with replace_file(target) as file:
        file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(target)


if __name__ == "__main__":
    main()
