"""FP8: its numbers against arithmetic on bits, in graph, reference and rung; what an FP8 bundle stores and passes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from dit_export.graphs.quantize import quantize_weight
from dit_export.reference.emulation import _round
from onnx import TensorProto, numpy_helper
from support.commands import run_command

from dit_runtime.bundle.precision import Precision
from dit_runtime.bundle.quantization import FORMATS, linears_of
from dit_runtime.bundle.reader import Bundle, open_bundle
from dit_runtime.verify.quantization_rungs import E4M3, weights
from dit_runtime.verify.replay import Replay

FP8 = FORMATS[Precision.FP8]


def e4m3(value: float) -> float:
    """The nearest number of E4M3FN, ties to even, by the definition: 3 bits after the first, exponents from -6 to 8."""
    if value == 0:
        return 0.0
    exponent = max(math.floor(math.log2(abs(value))), -6)
    step = 2.0 ** (exponent - 3)
    return math.copysign(min(round(abs(value) / step) * step, 448.0), value)  # Python rounds ties to even


def sample() -> np.ndarray:
    """Numbers of all sizes, ties of every step among them, and what is beyond the largest."""
    random = np.random.default_rng(0)
    ties = [(8 + m + 0.5) * 2.0**e for m in range(8) for e in range(-10, 6)]
    small = [m * 2.0**-10 for m in range(20)]
    return np.float32(
        [*ties, *small, 448, 460, 1000, *(random.standard_normal(500) * 10.0 ** random.uniform(-4, 3, 500))]
    )


def test_numbers_are_those_of_the_definition() -> None:
    """Graph, reference and rung have one E4M3, each by its own means; FP8's largest is no infinity or NaN."""
    values = np.concatenate([sample(), -sample()])
    expected = np.float32([e4m3(float(value)) for value in values])
    assert np.array_equal(_round(torch.from_numpy(values), "fp8").numpy(), expected)
    row = np.concatenate([values, np.float32([448])]).clip(-448, 448)[None]  # of scale 1
    numbers, scales = quantize_weight(row, FP8)
    assert scales.tolist() == [1]
    assert np.array_equal(numbers[0, :-1].astype(np.float32), expected)
    assert np.array_equal(E4M3[numbers.view(np.uint8)[0, :-1]] * FP8.step, expected)
    assert (np.abs(E4M3[[0x7F, 0xFF]]) > 448 / FP8.step).all()


def test_a_weights_rows_reach_448() -> None:
    """A scale for each output channel; a channel of zeros stays 0."""
    numbers, scales = quantize_weight(np.float32([[0, 0], [1, -2], [1e-3, 0]]), FP8)
    assert np.array_equal(np.abs(numbers.astype(np.float32)).max(axis=1), [0, 448, 448])
    assert np.allclose(
        numbers.astype(np.float32) * scales.astype(np.float32)[:, None], [[0, 0], [1, -2], [1e-3, 0]], 0.04
    )


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Callable[[str], Path]) -> Bundle:
    return open_bundle(tiny_bundle("fp8"))


@pytest.mark.slow  # an export
def test_the_blocks_layers_multiply_fp8(bundle: Bundle) -> None:
    """Both sides of each product are FP8 with FP16 scales, ONNX's checker allows it, and no other tensor is."""
    onnx.checker.check_model(str(bundle.graph("step")), full_check=True)
    step = onnx.load(bundle.graph("step"))
    made = {name: node for node in step.graph.node for name in node.output}
    stored = {tensor.name: tensor for tensor in step.graph.initializer}
    scales = dict(zip(linears_of("adaln-zero", 2), bundle.records("calibration")["scales"], strict=True))
    for node in step.graph.node:
        if (layer := node.name.removesuffix("/MatMul")) not in scales:
            continue
        x, weight = (made[name] for name in node.input)
        assert [each.op_type for each in (made[x.input[0]], x, weight)] == ["QuantizeLinear", *["DequantizeLinear"] * 2]
        assert numpy_helper.to_array(stored[x.input[1]]) == np.float16(scales.pop(layer))
        kinds = [stored[name].data_type for name in (x.input[2], *weight.input)]
        assert kinds == [TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT16]
    assert scales == {}
    eight = [name for name, tensor in stored.items() if tensor.data_type == TensorProto.FLOAT8E4M3FN]
    assert len(eight) == 1 + len(linears_of("adaln-zero", 2))


@pytest.mark.slow  # an export and a verification
def test_it_is_pytorchs_fp8(bundle: Bundle, tmp_path: Path) -> None:
    """ONNX Runtime's results are within the limits of PyTorch's own FP8, the weights equal."""
    done = run_command("dit-verify", bundle.path, "--engine", "onnxruntime", "--quick", "--json", "--store", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    rungs = {rung["name"]: rung for rung in json.loads(done.stdout)["rungs"]}
    assert rungs["FP8 weights"]["value"] == 0


@pytest.mark.slow  # an export
def test_a_weight_that_is_off_by_one_step_is_seen(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sums are of FP8's numbers in their least step: one that differs is not equal."""
    from dit_runtime.backends.onnxruntime.engine import OnnxRuntimeEngine
    from dit_runtime.bundle.stored_numbers import numbers_of_graph

    replay = Replay(bundle, OnnxRuntimeEngine(bundle, threads=1))
    assert weights(replay).passed
    changed = {name: np.array(array) for name, array in numbers_of_graph(bundle, "step").items()}
    changed["blocks.1.mlp.fc1.weight"][3, 5] ^= 1
    monkeypatch.setattr("dit_runtime.verify.quantization_rungs.numbers_of_graph", lambda *_: changed)
    rung = weights(replay)
    assert not rung.passed
    assert "blocks.1.mlp.fc1" in rung.detail
