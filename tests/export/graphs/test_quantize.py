"""INT8 in a traced step: which products multiply it, and what is stored, computed again from the checkpoint."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from dit_export.checkpoints.sources import Source, load_checkpoint
from dit_export.graphs.quantize import quantize_weight
from onnx.numpy_helper import to_array
from support.exports import export

from dit_runtime.bundle.quantization import linears_of
from dit_runtime.bundle.reader import Bundle, open_bundle


@pytest.fixture(scope="module")
def bundle(int8_bundle: Path) -> Bundle:
    return open_bundle(int8_bundle)


@pytest.fixture(scope="module")
def step(bundle: Bundle) -> onnx.ModelProto:
    return onnx.load(bundle.graph("step"))


def test_the_blocks_layers_multiply_int8(bundle: Bundle, bundles: dict[str, Path], step: onnx.ModelProto) -> None:
    """Each layer of a block reads INT8 on both sides, with the scales of calibration; all else is as in FP16."""
    made = {name: node for node in step.graph.node for name in node.output}
    stored = {tensor.name: to_array(tensor) for tensor in step.graph.initializer}
    scales = dict(zip(linears_of("adaln-zero", 2), bundle.records("calibration")["scales"], strict=True))
    quantized = []
    for node in step.graph.node:
        sides = [made[name] for name in node.input if name in made]
        if node.op_type != "MatMul" or not all(side.op_type == "DequantizeLinear" for side in sides):
            continue
        layer = node.name.removesuffix("/MatMul")
        quantized.append(layer)
        x, weight = sides
        source = made[x.input[0]]
        assert (source.op_type, source.input[1:]) == ("QuantizeLinear", x.input[1:])
        even = made[source.input[0]]
        assert (even.name == f"{layer}/Mul") == layer.endswith("mlp.fc2")  # between GELU and rounding, factors
        assert stored[x.input[1]] == np.float16(scales[layer])
        assert (stored[x.input[2]].dtype, stored[x.input[2]]) == (np.int8, 0)
        assert [stored[name].dtype for name in weight.input] == [np.int8, np.float16]
    assert sorted(quantized) == sorted(scales)
    half = onnx.load(open_bundle(bundles["fp16"]).structure("step"), load_external_data=False)
    own = {f"{layer}/{word}QuantizeLinear{end}" for layer in scales for word in ("", "De") for end in ("", ".1")}
    own |= {f"blocks.{block}.mlp.fc2/Mul" for block in (0, 1)}
    others = [node.name for node in step.graph.node if node.name.replace("Dequantize", "DeQuantize") not in own]
    assert others == [node.name for node in half.graph.node]


def test_weights_are_rounded_from_the_checkpoints(checkpoint: Path, bundle: Bundle, step: onnx.ModelProto) -> None:
    """Fails if weights are rounded to FP16 first, scaled together, or scaled by another axis."""
    weights = load_checkpoint(Source(str(checkpoint))).weights
    stored = {tensor.name: to_array(tensor) for tensor in step.graph.initializer}
    for layer in linears_of("adaln-zero", 2):
        weight = weights[f"{layer}.weight"].double().numpy()
        if not layer.endswith("attn.proj"):
            first, count = {"attn.qkv": (0, 64), "mlp.fc1": (64, 64), "mlp.fc2": (128, 256)}[layer.split(".", 2)[2]]
            factors = bundle.records("calibration")["factors"][int(layer.split(".")[1])][first : first + count]
            assert np.array_equal(stored[f"{layer}.factor"], factors)
            weight = weight / factors
        scale = (np.abs(weight).max(axis=1) / 127).astype(np.float16)
        assert np.array_equal(stored[f"{layer}.weight_scale"], scale)
        assert np.array_equal(stored[f"{layer}.weight"], np.round(weight / scale.astype(float)[:, None]).T), layer


def test_a_channel_of_zeros() -> None:
    """A channel whose weights are all 0 stays 0, and its scale is a number above 0."""
    weight = np.array([[0, 0], [1.1, -2], [1e-12, 0], [6e5, 1]], np.float32)
    numbers, scales = quantize_weight(weight)
    assert numbers.tolist() == [[0, 0], [70, -127], [0, 0], [127, 0]]
    assert (scales > 0).all()
    assert np.isfinite(scales).all()


@pytest.mark.slow  # an export at two sizes
def test_sizes_share_their_scales(checkpoint: Path, tmp_path: Path) -> None:
    """The steps of all sizes have the scales of the largest ranges; each size's record has its own ranges."""
    path = export(checkpoint, tmp_path / "sized.bundle", "--int8", "--no-verify", "--size", "32x32", "48x48")
    bundle = open_bundle(path)
    records = [bundle.at(size).records("calibration") for size in ((32, 32), (48, 48))]
    ranges = np.stack([record["ranges"].max(axis=1) for record in records])
    assert not np.array_equal(*ranges)
    for record, name in zip(records, ("step", "step-12x12"), strict=True):
        assert np.array_equal(record["largest"], ranges.max(axis=0))
        stored = {tensor.name: to_array(tensor) for tensor in onnx.load(bundle.graph(name)).graph.initializer}
        scales = [stored[f"{layer}.scale"] for layer in linears_of("adaln-zero", 2)]
        assert np.array_equal(scales, np.float16(record["largest"] / 127))
