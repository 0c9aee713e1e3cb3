"""The quantization of a graph is checked before a library sees it: symmetric INT8 with stored scales, or one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.bundles import signed
from support.optional import onnx

from dit_runtime.bundle.graph_file import check_graph
from dit_runtime.bundle.manifest import PrecisionSpec
from dit_runtime.bundle.precision import Precision
from dit_runtime.bundle.quantization import is_block_linear, linears_of
from dit_runtime.bundle.reader import Bundle, open_bundle
from dit_runtime.core.decode import DecodeError
from dit_runtime.core.errors import BundleError

Change = Callable[["onnx.ModelProto"], object]


@pytest.fixture(scope="module")
def bundle(int8_bundle: Path) -> Bundle:
    return open_bundle(int8_bundle)


@pytest.fixture
def step(bundle: Bundle) -> onnx.ModelProto:
    return onnx.load(bundle.structure("step"), load_external_data=False)


def check(bundle: Bundle, model: onnx.ModelProto) -> None:
    spec = bundle.manifest.graphs["step"]
    check_graph(model.SerializeToString(), spec, bundle.manifest.files[spec.weights].bytes, bundle.manifest)


def node(model: onnx.ModelProto, operator: str, place: int = 0) -> onnx.NodeProto:
    return [each for each in model.graph.node if each.op_type == operator][place]


def tensor(model: onnx.ModelProto, name: str) -> onnx.TensorProto:
    return next(each for each in model.graph.initializer if each.name == name)


def put(operator: str, place: int, array: np.ndarray[Any, Any]) -> Change:
    """Gives a node another constant as its input ``place``."""

    def change(model: onnx.ModelProto) -> None:
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, "other"))
        node(model, operator).input[place] = "other"

    return change


def take(operator: str, place: int, name: str) -> Change:
    return lambda model: node(model, operator).input.__setitem__(place, name)


QUANTIZE, DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"
ALTERED: dict[str, tuple[Change, str]] = {
    "a zero point": (put(QUANTIZE, 2, np.array(3, np.int8)), "zero point 'other', expected a single 0 of int8"),
    "a zero point of the result": (put(DEQUANTIZE, 2, np.array(-1, np.int8)), "zero point 'other'"),
    "a zero point of UINT8": (put(QUANTIZE, 2, np.array(0, np.uint8)), "zero point 'other'"),
    "zero points": (put(QUANTIZE, 2, np.zeros(64, np.int8)), "zero point 'other'"),
    "no zero point": (lambda m: node(m, QUANTIZE).input.pop(), "has no zero point"),
    "a computed zero point": (take(QUANTIZE, 2, "state"), "reads 'state', expected a scale and a zero point"),
    "a computed scale": (take(QUANTIZE, 1, "state"), "reads 'state', expected a scale and a zero point"),
    **{
        f"a scale of {value}": (put(QUANTIZE, 1, np.array(value, np.float16)), "a scale that is no number above 0")
        for value in (0, -0.5, np.inf, np.nan)
    },
    "a scale of FP64": (put(DEQUANTIZE, 1, np.array(0.5)), "has scales of float64"),
    "a scale of INT8": (put(DEQUANTIZE, 1, np.array(1, np.int8)), "has scales of int8"),
    "too many scales": (put(QUANTIZE, 1, np.ones(65, np.float16)), "scales of .65,. for"),
    "scales of two axes": (put(QUANTIZE, 1, np.ones((1, 64), np.float16)), "scales of .1, 64. for"),
    "an axis that is none": (
        lambda m: (put(QUANTIZE, 1, np.ones(64, np.float16))(m), add(m, "axis", 7)),
        "does not fit its inputs: axis 7",
    ),
    "blocks": (lambda m: add(m, "block_size", 16), "the attribute 'block_size'"),
    "no saturation": (lambda m: add(m, "saturate", 0), "the attribute 'saturate'"),
    "weights of UINT8": (lambda m: setattr(weight(m), "data_type", 2), "which is uint8, expected int8"),
    "numbers that are not quantized": (take(DEQUANTIZE, 0, "_to_copy"), "which is not stored, expected int8"),
    "shapes that are dequantized": (
        lambda m: (
            m.graph.node.insert(0, onnx.helper.make_node("Shape", ["state"], ["sizes"])),
            take(DEQUANTIZE, 0, "sizes")(m),
        ),
        "reads 'sizes', which is not stored",
    ),
    "four inputs": (lambda m: node(m, QUANTIZE).input.append("state"), "has 4 inputs, expected 2 to 3"),
}


def add(model: onnx.ModelProto, name: str, number: int) -> None:
    node(model, QUANTIZE).attribute.append(onnx.helper.make_attribute(name, number))


def weight(model: onnx.ModelProto) -> onnx.TensorProto:
    return tensor(model, "blocks.0.attn.qkv.weight")


@pytest.mark.parametrize("name", ALTERED)
def test_another_quantization_is_refused(bundle: Bundle, step: onnx.ModelProto, name: str) -> None:
    """Fails if a library gets to see a quantization that no export writes."""
    check(bundle, step)
    change, message = ALTERED[name]
    change(step)
    with pytest.raises(DecodeError, match=message):
        check(bundle, step)


def test_a_quantized_size_is_no_size(bundle: Bundle, step: onnx.ModelProto) -> None:
    """A shape that went through INT8 is not followed: libraries round it, and would make a tensor of any size."""
    step.graph.initializer.extend(
        [
            onnx.numpy_helper.from_array(np.array(1.0, np.float32), "one"),
            onnx.numpy_helper.from_array(np.array(0, np.int8), "none"),
        ]
    )
    make = onnx.helper.make_node
    step.graph.node.extend(
        [
            make("Shape", ["state"], ["s"]),
            make("Cast", ["s"], ["f"], to=1),
            make(QUANTIZE, ["f", "one", "none"], ["q"]),
            make(DEQUANTIZE, ["q", "one", "none"], ["d"]),
            make("Cast", ["d"], ["n"], to=7),
            make("Expand", ["state", "n"], ["e"]),
        ]
    )
    with pytest.raises(DecodeError, match="not put together from constants and sizes"):
        check(bundle, step)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.pop("calibration"), "precision int8 without calibration"),
        (lambda m: m["calibration"].update(labels=[]), r"calibration.labels \[\], expected labels"),
        (lambda m: m["calibration"].update(labels=[11]), r"calibration.labels \[11\], expected"),
        (lambda m: m["calibration"].update(labels=[0] * 10_001), "calibration with 10001 labels"),
        (lambda m: m["calibration"].update(steps=0), "calibration.steps"),
        (lambda m: m["precision"].update(keep_fp16=["blocks"]), "every linear layer is kept in FP16"),
        (lambda m: m["tolerances"].pop("int8"), "no limits for .*int8"),
    ],
)
def test_a_manifest_that_does_not_fit(
    int8_bundle: Path, tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    """Calibration, kept units and limits are those of an INT8 bundle, or the bundle is not opened."""
    manifest = json.loads((int8_bundle / "manifest.json").read_text())
    change(manifest)
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match=message):
        open_bundle(tmp_path)


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("scales", lambda a: -a, "scales: expected numbers of FP16 above 0"),
        ("scales", lambda a: a + np.float32(1e-7), "scales: expected numbers of FP16"),
        ("scales", lambda a: a * np.float32(np.nan), "scales: numbers that are not finite"),
        ("scales", lambda a: a[:-1], r"scales: float32 \[7\]"),
        ("factors", lambda a: a * 3, "factors: expected powers of 2"),
        ("factors", lambda a: a * np.float32(2**13), "factors: expected powers of 2 from 1/64"),
        ("factors", lambda a: a * 0, "factors: expected powers"),
        ("ranges", lambda a: -a, "ranges: expected numbers from 0"),
        ("largest", lambda a: -a, "largest: expected numbers from 0"),
        ("ranges", lambda a: a[:, :0], "ranges"),
    ],
)
def test_a_record_of_calibration_that_is_none(
    int8_bundle: Path, tmp_path: Path, key: str, change: Callable[[Any], Any], message: str
) -> None:
    """The scales and ranges of a bundle are checked before a rung reads them."""
    copied = Path(shutil.copytree(int8_bundle, tmp_path / "copied"))
    file = copied / "golden" / "calibration.npz"
    with np.load(file) as record:
        arrays = dict(record)
    np.savez(file, **{**arrays, key: change(arrays[key])})
    with pytest.raises(BundleError, match=message):
        signed(copied).records("calibration")


def test_layers_are_named_as_in_the_graphs(step: onnx.ModelProto) -> None:
    """Fails if a layer that calibration measures is not in the graph, or is kept by another unit's name."""
    products = [each.name.removesuffix("/MatMul") for each in step.graph.node if each.op_type == "MatMul"]
    assert set(linears_of("adaln-zero", 2)) == set(filter(is_block_linear, products))
    kept = PrecisionSpec(Precision.INT8, (), ("blocks.1", "blocks.10.mlp.fc2"))
    assert [name for name in linears_of("cross-attention", 11) if not kept.quantizes(name)] == [
        *(f"blocks.1.{name}" for name in ("attn.qkv", "attn.proj", "cross_attn.q", "cross_attn.proj", "mlp.fc1")),
        "blocks.1.mlp.fc2",
        "blocks.10.mlp.fc2",
    ]
    assert not any(map(kept.quantizes, ("final", "blocks.0.attn", "conditioner", "blocks.0.cross_attn.kv")))
