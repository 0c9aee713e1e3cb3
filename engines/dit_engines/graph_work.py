"""The work of an ONNX graph at given input shapes: multiply-adds of each node, and the memory alive at once.

The file is read without its weights; ONNX's own shape inference gives the shapes.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dit_runtime.core.errors import BundleError

if TYPE_CHECKING:
    import onnx

Shape = tuple[int, ...]
SHAPE_ARITHMETIC = ("Add", "Concat", "Div", "Gather", "Mul", "Reshape", "Slice", "Squeeze", "Sub", "Unsqueeze")
MOST_SIZES = 64  # in a constant of arithmetic on shapes
VIEWS = ("Reshape", "Squeeze", "Unsqueeze")  # the same memory under another shape


@dataclass(frozen=True)
class GraphWork:
    """The work of one graph at one set of input shapes.

    Attributes:
        macs: multiply-adds of each MatMul, Gemm and Conv, by node name.
        live_bytes: the largest sum of tensors alive at once, without the graph's inputs and outputs. A tensor is alive
            from the node that makes it to the last node that reads it. A builder that fuses nodes needs less; its
            workspace comes on top.
    """

    macs: dict[str, int]
    live_bytes: int


def work_of_graph(onnx_path: Path, shapes: Mapping[str, Shape]) -> GraphWork:
    """The work of a graph for inputs of ``shapes``. A node with an unknown shape counts for nothing.

    Raises:
        BundleError: the file, from ``Bundle.structure``, has nodes that no shapes follow from.
    """
    import onnx

    try:
        return _work_of_model(onnx.load(onnx_path, load_external_data=False), shapes)
    except Exception as error:  # of many types: onnx has a checker for each operator, and trusts what it has checked
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BundleError(
            f"{onnx_path}: no shapes follow from its nodes ({reason}); copy or export the bundle again"
        ) from error


def _work_of_model(model: onnx.ModelProto, shapes: Mapping[str, Shape]) -> GraphWork:
    graph = model.graph
    del graph.value_info[:]
    for value in graph.input:
        for axis, size in zip(value.type.tensor_type.shape.dim, shapes[value.name], strict=True):
            axis.Clear()
            axis.dim_value = size
    for value in graph.output:
        value.type.tensor_type.ClearField("shape")
    known = _infer_shapes(model)
    while _fold_constants(graph, {name: sizes for name, (sizes, _) in known.items()}):
        known = _infer_shapes(model)
    weights = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}

    def shape(name: str) -> Shape | None:
        return weights.get(name) or (known[name][0] if name in known else None)

    macs = {node.name: count for node in graph.node if (count := _macs_of(node, shape)) is not None}
    outside = {value.name for value in (*graph.input, *graph.output)} | weights.keys()
    for node in reversed(graph.node):
        if node.op_type in VIEWS and node.output[0] in outside:
            outside.add(node.input[0])
    return GraphWork(macs, _live_bytes_of(graph, {name: sizes for name, sizes in known.items() if name not in outside}))


def _infer_shapes(model: onnx.ModelProto) -> dict[str, tuple[Shape, int]]:
    """Shape and bytes of an element of each tensor whose axes are all known."""
    import onnx

    graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    known = {}
    for value in (*graph.input, *graph.value_info, *graph.output):
        tensor = value.type.tensor_type
        sizes = tuple(axis.dim_value for axis in tensor.shape.dim if axis.HasField("dim_value"))
        if tensor.HasField("shape") and len(sizes) == len(tensor.shape.dim):
            known[value.name] = sizes, onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).itemsize
    return known


def _fold_constants(graph: onnx.GraphProto, shapes: Mapping[str, Shape]) -> bool:
    """Replace arithmetic on known shapes with its result, which inference does not compute; whether any was left."""
    import onnx
    from onnx.reference import ReferenceEvaluator

    constants = {
        tensor.name: onnx.numpy_helper.to_array(tensor)
        for tensor in graph.initializer
        if tensor.data_type == onnx.TensorProto.INT64
        and tensor.data_location != onnx.TensorProto.EXTERNAL
        and math.prod(tensor.dims) <= MOST_SIZES
    }
    kept = []
    for node in graph.node:
        value = None
        if node.op_type == "Shape" and node.input[0] in shapes:
            options = {item.name: item.i for item in node.attribute}
            value = np.array(shapes[node.input[0]], np.int64)[options.get("start", 0) : options.get("end")]
        elif node.op_type in SHAPE_ARITHMETIC and all(name in constants for name in node.input):
            feeds = {name: constants[name] for name in node.input}
            value = np.asarray(ReferenceEvaluator(node).run(None, feeds)[0])  # type: ignore[index]  # a list
        if value is None:
            kept.append(node)
        else:
            constants[node.output[0]] = value
            graph.initializer.append(onnx.numpy_helper.from_array(value, node.output[0]))
    changed = len(kept) < len(graph.node)
    del graph.node[:]
    graph.node.extend(kept)
    return changed


def _macs_of(node: onnx.NodeProto, shape: Callable[[str], Shape | None]) -> int | None:
    if node.op_type not in ("MatMul", "Gemm", "Conv"):
        return None
    left, right, out = shape(node.input[0]), shape(node.input[1]), shape(node.output[0])
    if left is None or right is None or out is None:
        return None
    if node.op_type == "Conv":
        return math.prod(out) * math.prod(right[1:])
    transposed = node.op_type == "Gemm" and any(item.name == "transA" and item.i for item in node.attribute)
    return math.prod(out) * left[0 if transposed else -1]


def _live_bytes_of(graph: onnx.GraphProto, tensors: Mapping[str, tuple[Shape, int]]) -> int:
    last = {name: index for index, node in enumerate(graph.node) for name in node.input}
    readers = Counter(name for node in graph.node for name in node.input)
    joined = {name for node in graph.node if node.op_type == "Concat" for name in node.input if readers[name] == 1}
    ending: dict[int, list[str]] = {}
    for name, index in last.items():
        ending.setdefault(index, []).append(name)

    def size(name: str) -> int:
        if name in joined:  # the builder writes it where the result lies
            return 0
        sizes, itemsize = tensors.get(name, ((0,), 0))
        return math.prod(sizes) * itemsize

    now = most = 0
    for index, node in enumerate(graph.node):
        now += sum(size(name) for name in node.output)
        most = max(most, now)
        now -= sum(size(name) for name in ending.get(index, ()))
    return most
