"""A bundle's ONNX graphs on torch tensors: an interpreter, operator by operator.

Shapes and what is computed from them are numpy arrays on the host, everything else is tensors on the device. So a run
never waits for the device and copies nothing from the host, once it has run at the same shapes before: a CUDA graph can
capture it. An operator or attribute that is not known here raises NotImplementedError.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from onnx import numpy_helper

DTYPES = {
    onnx.TensorProto.FLOAT: torch.float32,
    onnx.TensorProto.FLOAT16: torch.float16,
    onnx.TensorProto.UINT8: torch.uint8,
    onnx.TensorProto.INT32: torch.int32,
    onnx.TensorProto.INT64: torch.int64,
    onnx.TensorProto.BOOL: torch.bool,
}
# The operands of an operator that decide shapes: they are read on the host.
HOST_OPERANDS = {
    "Reshape": {1},
    "Expand": {1},
    "Slice": {1, 2, 3, 4},
    "Squeeze": {1},
    "Unsqueeze": {1},
    "ReduceSum": {1},
    "Split": {1},
    "Clip": {1, 2},
    "Resize": {1, 2, 3},
}


class Constant(NamedTuple):
    """A value that is known when the graph is loaded, on the host and on the device."""

    host: np.ndarray
    device: torch.Tensor


class Node(NamedTuple):
    """An operator of the graph, its attributes, and the values that nothing reads after it."""

    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: dict[str, Any]
    done: tuple[str, ...]


class Network:
    """A graph whose weights are on a device.

    Args:
        path: the ONNX file, with its weights beside it.
        device: of the tensors, such as ``cuda`` or ``cpu``.
    """

    def __init__(self, path: Path, device: str) -> None:
        model = onnx.load(path)
        self._device, self._sent = device, dict[tuple[Any, ...], torch.Tensor]()
        self._constants: dict[str, Any] = {}
        for tensor in model.graph.initializer:
            host = numpy_helper.to_array(tensor)
            self._constants[tensor.name] = Constant(host, torch.from_numpy(host.copy()).to(device))
        self._outputs = [output.name for output in model.graph.output]
        self._nodes = _nodes_of(model.graph, {*self._constants, *self._outputs})

    def run(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The graph's outputs by name. They may share memory with inputs and constants: copy them."""
        values: dict[str, Any] = {**self._constants, **inputs}
        for node in self._nodes:
            given = [values[name] if name else None for name in node.inputs]
            if node.kind == "Shape":
                start, end = node.attributes.get("start", 0), node.attributes.get("end")
                shape = given[0].device.shape if isinstance(given[0], Constant) else given[0].shape
                results: Any = np.array(shape[start:end], np.int64)
            elif all(value is None or isinstance(value, np.ndarray | Constant) for value in given):
                results = self._run_on_host(node, given)
            else:
                host = HOST_OPERANDS.get(node.kind, set())
                operands = [
                    _on_host(node, value) if index in host else self._on_device(value)
                    for index, value in enumerate(given)
                ]
                if node.kind == "Gather" and isinstance(given[1], np.ndarray | Constant):
                    operands[1] = _index_from(given[1])  # a number takes a part, and no kernel runs
                results = OPERATORS[node.kind](node.attributes, *operands)
            results = results if isinstance(results, tuple) else (results,)
            values.update(zip(node.outputs, results, strict=False))  # of a normalization's three, the first is used
            for name in node.done:
                values.pop(name, None)
        return {name: self._on_device(values[name]) for name in self._outputs}

    def _run_on_host(self, node: Node, given: list[Any]) -> Any:
        host = HOST_OPERANDS.get(node.kind, set())
        arrays = [None if value is None else _on_host(node, value) for value in given]
        operands = [
            torch.from_numpy(np.array(array)) if array is not None and index not in host else array
            for index, array in enumerate(arrays)
        ]
        results = OPERATORS[node.kind](node.attributes, *operands)
        return tuple(part.numpy() for part in results) if isinstance(results, tuple) else results.numpy()

    def _on_device(self, value: Any) -> Any:
        """A tensor on the device. An array of the host is sent once: a later run finds it there."""
        if isinstance(value, Constant):
            return value.device
        if isinstance(value, np.ndarray):
            key = (str(value.dtype), value.shape, value.tobytes())
            if key not in self._sent:
                self._sent[key] = torch.from_numpy(np.array(value)).to(self._device)
            return self._sent[key]
        return value


def _nodes_of(graph: onnx.GraphProto, kept: set[str]) -> list[Node]:
    last = {name: index for index, node in enumerate(graph.node) for name in node.input}
    nodes = []
    for index, node in enumerate(graph.node):
        if node.op_type != "Shape" and (node.op_type not in OPERATORS or node.domain):
            raise NotImplementedError(f"operator {node.domain} {node.op_type}")
        done = tuple(name for name in {*node.input, *node.output} - kept if last.get(name, index) == index)
        attributes = {item.name: onnx.helper.get_attribute_value(item) for item in node.attribute}
        nodes.append(Node(node.op_type, tuple(node.input), tuple(node.output), attributes, done))
    return nodes


def _on_host(node: Node, value: Any) -> np.ndarray | None:
    if isinstance(value, torch.Tensor):
        raise NotImplementedError(f"{node.kind} with a shape that the device computes")
    return value.host if isinstance(value, Constant) else value


def _index_from(value: Any) -> Any:
    """A single index as a number, several as a tensor on the device."""
    host = value.host if isinstance(value, Constant) else value
    if not host.ndim:
        return int(host)
    if (host < 0).any() or not isinstance(value, Constant):
        raise NotImplementedError("Gather with indices that are negative or computed from shapes")
    return value.device


def _gather(given: dict[str, Any], data: torch.Tensor, index: Any) -> torch.Tensor:
    axis = given.get("axis", 0) % data.ndim
    if isinstance(index, int):
        return data.select(axis, index)
    if index.device.type == "cpu":
        index = torch.where(index < 0, index + data.shape[axis], index)
    if not index.ndim:
        index, squeeze = index.reshape(1), True
    else:
        squeeze = False
    found = data.index_select(axis, index.reshape(-1))
    shape = () if squeeze else tuple(index.shape)
    return found.reshape(*data.shape[:axis], *shape, *data.shape[axis + 1 :])


def _slice(
    _: dict[str, Any],
    data: torch.Tensor,
    starts: np.ndarray,
    ends: np.ndarray,
    axes: np.ndarray | None = None,
    steps: np.ndarray | None = None,
) -> torch.Tensor:
    parts = [slice(None)] * data.ndim
    chosen = range(len(starts)) if axes is None else axes.tolist()
    strides = [1] * len(starts) if steps is None else steps.tolist()
    for axis, start, end, stride in zip(chosen, starts.tolist(), ends.tolist(), strides, strict=True):
        parts[axis] = slice(*slice(start, end, stride).indices(data.shape[axis]))  # an end may be the largest number
    return data[tuple(parts)]


def _reshape(given: dict[str, Any], data: torch.Tensor, shape: np.ndarray) -> torch.Tensor:
    sizes = shape.tolist()
    if not given.get("allowzero", 0):
        sizes = [data.shape[axis] if size == 0 else size for axis, size in enumerate(sizes)]
    return data.reshape(sizes)


def _squeeze(_: dict[str, Any], data: torch.Tensor, axes: np.ndarray | None = None) -> torch.Tensor:
    return data.squeeze() if axes is None else data.squeeze(tuple(axes.tolist()))


def _unsqueeze(_: dict[str, Any], data: torch.Tensor, axes: np.ndarray) -> torch.Tensor:
    ndim = data.ndim + axes.size
    for axis in sorted(axis % ndim for axis in axes.tolist()):
        data = data.unsqueeze(axis)
    return data


def _reduce_sum(given: dict[str, Any], data: torch.Tensor, axes: np.ndarray | None = None) -> torch.Tensor:
    if axes is None or not axes.size:
        if given.get("noop_with_empty_axes", 0):
            return data
        axes = np.arange(data.ndim)
    return data.sum(tuple(axes.tolist()), keepdim=bool(given.get("keepdims", 1)))


def _expand(_: dict[str, Any], data: torch.Tensor, shape: np.ndarray) -> torch.Tensor:
    return data.broadcast_to(torch.broadcast_shapes(data.shape, tuple(shape.tolist())))


def _split(given: dict[str, Any], data: torch.Tensor, sizes: np.ndarray | None = None) -> tuple[torch.Tensor, ...]:
    axis = given.get("axis", 0)
    if sizes is None:
        return data.split(-(-data.shape[axis] // given["num_outputs"]), axis)
    return data.split(sizes.tolist(), axis)


def _clip(
    _: dict[str, Any], data: torch.Tensor, least: np.ndarray | None = None, most: np.ndarray | None = None
) -> torch.Tensor:
    return data.clamp(*(None if bound is None else bound.item() for bound in (least, most)))


def _gemm(given: dict[str, Any], a: torch.Tensor, b: torch.Tensor, c: torch.Tensor | None = None) -> torch.Tensor:
    if (given.get("alpha", 1.0), given.get("beta", 1.0)) != (1.0, 1.0):
        raise NotImplementedError("Gemm with alpha or beta")
    a = a.t() if given.get("transA", 0) else a
    b = b.t() if given.get("transB", 0) else b
    return a @ b if c is None else torch.addmm(c, a, b)


def _conv(given: dict[str, Any], data: torch.Tensor, weight: torch.Tensor, bias: Any = None) -> torch.Tensor:
    if given.get("auto_pad", b"NOTSET") != b"NOTSET":
        raise NotImplementedError(f"Conv with auto_pad {given['auto_pad']!r}")
    axes = weight.ndim - 2
    pads = given.get("pads", [0] * 2 * axes)
    if pads[:axes] != pads[axes:]:
        data = F.pad(data, [pads[axis + side * axes] for axis in reversed(range(axes)) for side in (0, 1)])
        pads = [0] * 2 * axes
    convolve = {1: F.conv1d, 2: F.conv2d}[axes]
    strides, dilations = given.get("strides", [1] * axes), given.get("dilations", [1] * axes)
    return convolve(data, weight, bias, strides, pads[:axes], dilations, given.get("group", 1))


def _instance_norm(given: dict[str, Any], data: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    variance, mean = torch.var_mean(data.float(), tuple(range(2, data.ndim)), correction=0, keepdim=True)
    shape = (1, -1, *[1] * (data.ndim - 2))
    normal = (data.float() - mean) * torch.rsqrt(variance + given.get("epsilon", 1e-5))
    return (normal * scale.reshape(shape).float() + bias.reshape(shape).float()).to(data.dtype)


def _layer_norm(given: dict[str, Any], data: torch.Tensor, scale: torch.Tensor, bias: Any = None) -> torch.Tensor:
    shape = data.shape[given.get("axis", -1) % data.ndim :]
    single = [None if part is None else part.float().reshape(shape) for part in (scale, bias)]
    return F.layer_norm(data.float(), shape, *single, given.get("epsilon", 1e-5)).to(data.dtype)


def _resize(given: dict[str, Any], data: torch.Tensor, _roi: Any = None, scales: Any = None, sizes: Any = None) -> Any:
    how = (given.get("mode"), given.get("coordinate_transformation_mode"), given.get("nearest_mode"))
    if how != (b"nearest", b"asymmetric", b"floor"):
        raise NotImplementedError(f"Resize by {how}")
    if sizes is None or not sizes.size:
        sizes = np.array([math.floor(size * scale) for size, scale in zip(data.shape, scales.tolist(), strict=True)])
    return F.interpolate(data, tuple(sizes.tolist()[2:]), mode="nearest")


def _divide(_: dict[str, Any], a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a / b if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


def _plain(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """An operator without attributes."""
    return lambda given, *operands: function(*operands)


OPERATORS: dict[str, Callable[..., Any]] = {
    **{
        kind: _plain(getattr(torch, name))
        for kind, name in {
            "Add": "add",
            "Sub": "sub",
            "Mul": "mul",
            "Pow": "pow",
            "Exp": "exp",
            "Cos": "cos",
            "Sin": "sin",
            "Sqrt": "sqrt",
            "Neg": "neg",
            "Relu": "relu",
            "Tanh": "tanh",
            "Sigmoid": "sigmoid",
            "Round": "round",
            "MatMul": "matmul",
            "Where": "where",
        }.items()
    },
    "Div": _divide,
    "Cast": lambda given, data: data.to(DTYPES[given["to"]]),
    "Concat": lambda given, *parts: torch.cat(parts, given["axis"]),
    "Transpose": lambda given, data: data.permute(given.get("perm", tuple(reversed(range(data.ndim))))),
    "Softmax": lambda given, data: data.softmax(given.get("axis", -1)),
    "Gelu": lambda given, data: F.gelu(data, approximate=given.get("approximate", b"none").decode()),
    "Gather": _gather,
    "Slice": _slice,
    "Reshape": _reshape,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "ReduceSum": _reduce_sum,
    "Expand": _expand,
    "Split": _split,
    "Clip": _clip,
    "Gemm": _gemm,
    "Conv": _conv,
    "InstanceNormalization": _instance_norm,
    "LayerNormalization": _layer_norm,
    "Resize": _resize,
}
