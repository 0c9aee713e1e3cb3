"""The step's graph rearranged for OpenVINO computes what it did, and is left alone where it looks otherwise."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.optional import openvino

from dit_runtime.backends.openvino.engine import OpenVinoEngine, load_core
from dit_runtime.backends.openvino.passes import rearrange
from dit_runtime.bundle.precision import Precision
from dit_runtime.bundle.reader import Bundle, open_bundle
from dit_runtime.verify.speed import make_step_inputs


def operations(model: Any) -> Counter[str]:
    return Counter(node.get_type_name() for node in model.get_ops())


def computed(model: Any, inputs: dict[str, Any]) -> list[Any]:
    """All outputs in FP32."""
    compiled = load_core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return [np.array(value) for value in compiled.create_infer_request().infer(inputs).values()]


def inputs_of(bundle: Bundle) -> dict[str, Any]:
    """A step that updates its state, under a table that opens the gates."""
    inputs, table = make_step_inputs(bundle.manifest), bundle.manifest.table.name
    inputs["coefficients"][:] = np.linspace(0.1, 1, 17, dtype=np.float32)
    inputs[table] = np.random.default_rng(1).standard_normal(inputs[table].shape).astype(inputs[table].dtype)
    return inputs


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_same_function_in_other_pieces(bundles: dict[str, Path], precision: str) -> None:
    """Four products for each of an MLP's two, three for one of attention, no softmax between casts; equal outputs."""
    bundle = open_bundle(bundles[precision])
    engine = OpenVinoEngine(bundle, precision=Precision.FP32)  # which leaves the graph as it is
    model, changed = (engine._retype("step") for _ in range(2))
    spec, before = bundle.manifest.model, operations(model)
    rearrange(changed, spec.width)
    after = operations(changed)
    assert spec.mlp_width == 4 * spec.width
    assert after["MatMul"] - before["MatMul"] == spec.depth * (2 * 3 + 2)
    assert after["Softmax"] == before["Softmax"] == spec.depth
    softmaxes = [node for node in changed.get_ops() if node.get_type_name() == "Softmax"]
    assert {node.input_value(0).get_node().get_type_name() for node in softmaxes} == {"MatMul"}
    inputs = inputs_of(bundle)
    for found, expected in zip(computed(changed, inputs), computed(model, inputs), strict=True):
        assert np.abs(expected).max() > 0.1
        assert np.abs(found - expected).max() <= 2e-6 * np.abs(expected).max()  # measured 2e-7 to 5e-7


def test_only_in_bf16(bundles: dict[str, Path]) -> None:
    """FP32 keeps the bundle's graph, whose weights are mapped."""
    bundle = open_bundle(bundles["fp32"])
    plain = operations(OpenVinoEngine(bundle, precision=Precision.FP32)._read(bundle.graph("step")))
    assert plain == operations(load_core().read_model(bundle.graph("step"))) - Counter(
        Multiply=operations(load_core().read_model(bundle.graph("step")))["Multiply"] - plain["Multiply"]
    )


def mlp(hidden: int, activation: str = "tanh", readers: int = 1, width: int = 8) -> Any:
    """``x [5, width]`` through a hidden layer; ``readers`` of that layer's result."""
    random = np.random.default_rng(0)

    def linear(x: Any, inner: int, out: int) -> Any:
        weight, bias = random.standard_normal((inner, out)), random.standard_normal(out)
        product = openvino.opset13.matmul(x, openvino.opset13.constant(weight.astype(np.float32)), False, False)
        return openvino.opset13.add(product, openvino.opset13.constant(bias.astype(np.float32)))

    x = openvino.opset13.parameter([5, width], np.float32, name="x")
    active = openvino.opset13.gelu(linear(x, width, hidden), activation)
    results = [linear(active, hidden, width), *[openvino.opset13.relu(active) for _ in range(1, readers)]]
    return openvino.Model([openvino.opset13.result(value) for value in results], [x])


@pytest.mark.parametrize(
    ("model", "products"),
    [(mlp(32), 8), (mlp(24, "erf"), 6), (mlp(8), 2), (mlp(12), 2), (mlp(32, readers=2), 2)],
    ids=["four times as wide", "three times, exact GELU", "as wide", "no multiple", "read twice"],
)
def test_mlps(model: Any, products: int) -> None:
    """An MLP is cut where its hidden layer is a multiple of its width and nothing else reads it; with its own GELU."""
    x = {"x": np.random.default_rng(2).standard_normal((5, 8)).astype(np.float32)}
    expected = computed(model, x)
    rearrange(model, wide=8)
    assert operations(model)["MatMul"] == products
    for found, before in zip(computed(model, x), expected, strict=True):
        assert np.abs(found - before).max() <= 1e-5 * np.abs(before).max()  # measured at most 4e-7


@pytest.mark.parametrize(("width", "products"), [(768, 2), (1024, 8)], ids=["B", "L"])
def test_only_wide_models_are_cut(width: int, products: int) -> None:
    """By default products are cut from L's width on, and whole at B's."""
    model = mlp(4 * width, width=width)
    rearrange(model)
    assert operations(model)["MatMul"] == products
