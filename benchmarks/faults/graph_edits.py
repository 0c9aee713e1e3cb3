"""Edits of a bundle's graphs: mistakes that exporters have made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from dit_runtime.bundle.reader import Bundle

Array = np.ndarray[Any, Any]


class Graph:
    """A graph to edit. Its nodes and initializers are found by name."""

    def __init__(self, bundle: Bundle, name: str) -> None:
        self.model = onnx.load(bundle.graph(name))  # with its weights
        self.graph = self.model.graph

    def node(self, name: str) -> onnx.NodeProto:
        return next(node for node in self.graph.node if node.name == name)

    def array(self, name: str) -> Array:
        return numpy_helper.to_array(next(item for item in self.graph.initializer if item.name == name))

    def put(self, name: str, array: Array) -> None:
        """Replace an initializer, or add one."""
        tensor = numpy_helper.from_array(np.array(array, order="C"), name)
        for item in self.graph.initializer:
            if item.name == name:
                item.CopyFrom(tensor)
                return
        self.graph.initializer.append(tensor)

    def weight(self, node: str, change: Callable[[Array], Array]) -> None:
        """Change the weights of a product, its second input."""
        name = self.node(node).input[1]
        self.put(name, change(self.array(name)).astype(self.array(name).dtype))


def set_epsilon(node: str, value: float) -> Callable[[Graph], None]:
    def change(graph: Graph) -> None:
        next(item for item in graph.node(node).attribute if item.name == "epsilon").f = value

    return change


def initializer(name: str, change: Callable[[Array], Array]) -> Callable[[Graph], None]:
    """Change an initializer."""
    return lambda graph: graph.put(name, change(graph.array(name)))


def shift_frequencies(graph: Graph) -> None:
    half = len(graph.array("frequencies"))
    graph.put("frequencies", np.exp(-np.log(10000) * np.arange(half) / half).astype(np.float32))


def swap_features(graph: Graph) -> None:
    node = graph.node("Concat")
    node.input[0], node.input[1] = node.input[1], node.input[0]


def transpose_positions(table: Array) -> Array:
    side = int(np.sqrt(table.shape[1]))
    return table.reshape(1, side, side, -1).transpose(0, 2, 1, 3).reshape(table.shape)


def take_larger_positions(table: Array) -> Array:
    """Take the positions of a grid twice as large, from its first corner."""
    side = int(np.sqrt(table.shape[1]))
    larger = table.reshape(1, side, side, -1).repeat(2, axis=1).repeat(2, axis=2)
    return larger[:, :side, :side].reshape(table.shape)


def swap_shift_and_scale(graph: Graph) -> None:
    """Swap the shift and the scale of the first block's attention."""
    scale, shift = graph.node("blocks.0/Add"), graph.node("blocks.0/Add.1")
    scale.input[0], shift.input[1] = shift.input[1], scale.input[0]


def use_another_gate(graph: Graph) -> None:
    graph.node("blocks.1/Mul.1").input[0] = graph.node("blocks.0/Mul.1").input[0]


def drop_scale(graph: Graph) -> None:
    node = graph.node("blocks.1.attn/Mul")
    graph.put("one", np.ones((), graph.array(node.input[1]).dtype))
    node.input[1] = "one"


def use_exact_gelu(graph: Graph) -> None:
    graph.node("blocks.0.mlp/Gelu").attribute[0].s = b"none"


def permute_head(weight: Array) -> Array:
    """Reverse the order of the first head's values."""
    changed = weight.copy()
    width = weight.shape[0]
    head = slice(2 * width, 2 * width + 32)
    changed[:, head] = weight[:, head][:, ::-1]
    return changed


def swap_queries_and_keys(weight: Array) -> Array:
    width = weight.shape[0]
    return np.concatenate([weight[:, width : 2 * width], weight[:, :width], weight[:, 2 * width :]], axis=1)


def make_overflow(graph: Graph) -> None:
    """Multiply the values by 32768, and divide their projection by it: the same function in FP32."""
    width = graph.array(graph.node("blocks.1.attn.qkv/MatMul").input[1]).shape[0]

    def values(weight: Array) -> Array:
        changed = weight.copy()
        changed[..., 2 * width :] = changed[..., 2 * width :] * weight.dtype.type(32768)
        return changed

    graph.weight("blocks.1.attn.qkv/MatMul", values)
    bias = graph.node("blocks.1.attn.qkv/Add").input[1]
    graph.put(bias, values(graph.array(bias)))
    graph.weight("blocks.1.attn.proj/MatMul", lambda weight: weight / weight.dtype.type(32768))


def transpose_patches(graph: Graph) -> None:
    """Swap rows and columns inside each patch of the output."""
    node = graph.node("Transpose.1")
    order = next(item for item in node.attribute if item.name == "perm")
    n, c, h, p, w, q = order.ints
    del order.ints[:]
    order.ints.extend([n, c, h, q, w, p])


def take_null_variance(graph: Graph) -> None:
    graph.put("last", np.array(-1, np.int64))
    graph.node("Gather.4").input[1] = "last"


def drop_vae_scale(graph: Graph) -> None:
    name = next(item for item in graph.node("Mul").input if item != "latents")
    graph.put(name, np.ones_like(graph.array(name)))


def truncate(graph: Graph) -> None:
    graph.node("Round").op_type = "Floor"
