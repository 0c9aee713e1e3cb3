"""Writes INT8 or FP8 into a traced step: its blocks' linear layers get explicit QuantizeLinear and DequantizeLinear.

    x → QuantizeLinear → DequantizeLinear → MatMul ← DequantizeLinear ← stored weight

Builders read this pattern as one product of 8 bits: TensorRT calls it explicit quantization. Zero points are 0. The
input has one scale, from calibration. The weight has one for each output channel, and is stored as INT8 or FP8. Scales
have the dtype of the product, FP16. The factors of an input's channels are in the weights that make it (``smoothing``),
or are written here: in place of the 1 that adaLN adds to its scale, or as a Mul.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from dit_runtime.bundle.precision import Precision
from dit_runtime.bundle.quantization import FORMATS, MULTIPLIED, NumberFormat

ONNX_TYPES = {"int8": ir.DataType.INT8, "float8e4m3fn": ir.DataType.FLOAT8E4M3FN}
LEAST_SCALE = np.float16(2.0**-24)  # FP16's least number above 0: of a channel whose weights are all 0


def quantize_step(
    model: ir.Model,
    scales: Mapping[str, float],
    factors: Mapping[str, NDArray[np.float32]],
    weight: Callable[[str], NDArray[np.float32]],
    numbers_in: NumberFormat = FORMATS[Precision.INT8],
) -> None:
    """Quantize linear layers of a step or probe, in place.

    Args:
        model: the traced graph, in FP16.
        scales: of the input of each layer to quantize, by name; numbers that FP16 holds.
        factors: powers of 2 for the channels of a layer's input, for the layers whose factors the step stores.
        weight: gives a layer's weight ``[out, in]`` in FP32, by its factors: rounding it to FP16 first would move
            numbers across a rounding boundary of 8 bits.
        numbers_in: the format of the products.
    """
    graph = model.graph
    dtype = ONNX_TYPES[numbers_in.dtype]
    zero = _add_initializer(graph, "zero_point", np.zeros((), dtype.numpy()))
    products = {node.name.rpartition("/")[0]: node for node in graph if node.op_type == "MatMul" and node.name}
    for name, scale in scales.items():
        product = products[name]  # a block's other products are named attn/MatMul
        x, old = product.inputs
        assert x is not None
        assert old is not None
        matrix = weight(name)
        if name in factors and name.endswith(MULTIPLIED):
            factor = _add_initializer(graph, f"{name}.factor", factors[name].astype(np.float16))
            even = ir.node("Mul", [x, factor], name=f"{name}/Mul")
            _describe(even, f"{name}/even", ir.DataType.FLOAT16, x.shape)
            graph.insert_before(product, even)
            x = even.outputs[0]
        elif name in factors:
            node, index = _find_one(x)
            node.replace_input_with(index, _add_initializer(graph, f"{name}.factor", factors[name]))
        numbers, weight_scales = quantize_weight(matrix, numbers_in)
        at = _add_initializer(graph, f"{name}.scale", np.array(scale, np.float16))
        quantized = _make_node("QuantizeLinear", name, "quantized", x, at, zero, dtype)
        restored = _make_node("DequantizeLinear", name, "rounded", quantized.outputs[0], at, zero, ir.DataType.FLOAT16)
        rounded = ir.node(
            "DequantizeLinear",
            [
                _add_initializer(graph, f"{name}.weight", numbers.T.copy()),
                _add_initializer(graph, f"{name}.weight_scale", weight_scales),
            ],
            {"axis": 1},
            name=f"{name}/DequantizeLinear.1",
        )
        _describe(rounded, f"{name}/weight", ir.DataType.FLOAT16, old.shape)
        graph.insert_before(product, [quantized, restored, rounded])
        product.replace_input_with(0, restored.outputs[0])
        product.replace_input_with(1, rounded.outputs[0])
        if not old.uses():
            assert old.name is not None
            del graph.initializers[old.name]


def _find_one(x: ir.Value) -> tuple[ir.Node, int]:
    """The node that adds 1 to adaLN's scale, and which of its inputs is the 1, from the modulated tokens in FP16."""
    cast = x.producer()
    assert cast is not None
    shifted = cast.predecessors()[0]
    scaled = next(node for node in shifted.predecessors() if node.op_type == "Mul")
    node = next(node for node in scaled.predecessors() if node.op_type == "Add")
    constants = [each.const_value if each is not None else None for each in node.inputs]
    (index,) = (at for at, each in enumerate(constants) if each is not None and each.size == 1 and each.numpy() == 1)
    return node, index


def quantize_weight(
    weight: NDArray[np.float32], numbers_in: NumberFormat = FORMATS[Precision.INT8]
) -> tuple[NDArray[np.generic], NDArray[np.float16]]:
    """The numbers ``[out, in]`` of a weight, and the scale ``[out]`` of each output channel."""
    end, dtype = numbers_in.largest, ONNX_TYPES[numbers_in.dtype]
    scales = np.maximum((np.abs(weight).max(axis=1) / end).astype(np.float16), LEAST_SCALE)
    numbers = np.clip(weight / scales.astype(np.float32)[:, None], -end, end)
    numbers = np.rint(numbers) if dtype == ir.DataType.INT8 else numbers  # a cast to FP8 rounds to the nearest
    return numbers.astype(dtype.numpy()), scales


def _add_initializer(graph: ir.Graph, name: str, array: NDArray[np.generic]) -> ir.Value:
    value = ir.Value(name=name, type=ir.TensorType(ir.DataType.from_numpy(array.dtype)), shape=ir.Shape(array.shape))
    value.const_value = ir.Tensor(array, name=name)
    graph.register_initializer(value)
    return value


def _make_node(
    operator: str, layer: str, result: str, x: ir.Value, scale: ir.Value, zero: ir.Value, dtype: ir.DataType
) -> ir.Node:
    node = ir.node(operator, [x, scale, zero], name=f"{layer}/{operator}")
    _describe(node, f"{layer}/{result}", dtype, x.shape)
    return node


def _describe(node: ir.Node, name: str, dtype: ir.DataType, shape: ir.Shape | None) -> None:
    result = node.outputs[0]
    result.name, result.dtype, result.shape = name, dtype, shape
