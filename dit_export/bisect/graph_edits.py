"""Edits the graphs of a bundle: moves nodes to FP32, emulates FP16, measures results, and cuts out a block.

A unit of the precision policy is a set of nodes. When a set moves to FP32, it gets FP32 weights, and casts around it.
Where the policy already put a cast, the set uses the FP32 side of that cast, as an export with the unit in FP32 would.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedNodesPass

from dit_export.bisect.fp16_operations import is_fp16_operation, scope_of
from dit_export.graphs.tracing import INLINE_BYTES

Array = NDArray[Any]


def move_to_fp32(
    model: ir.Model,
    inside: Callable[[ir.Node], bool],
    weight: Callable[[ir.Node, ir.Value], Array],
    inputs: Iterable[str] = (),
) -> None:
    """Move the nodes for which ``inside`` is true to FP32, in place.

    ``weight``: gives the FP32 value of an FP16 initializer, for the node that uses it. ``inputs``: names of FP16 inputs
    of the graph that become FP32 too.
    """
    half, single = ir.DataType.FLOAT16, ir.DataType.FLOAT
    chosen = [node for node in model.graph if inside(node)]
    members = set(chosen)
    for entry in [value for value in model.graph.inputs if value.name in set(inputs) and value.dtype == half]:
        entry.dtype = single
        _insert_cast(model, entry, _find_fp16_uses(entry, members), half)
    for node in chosen:
        for index, value in enumerate(node.inputs):
            if value is None or value.dtype != half:
                continue
            producer = value.producer()
            if value.is_initializer():
                node.replace_input_with(index, _add_initializer(model, f"{node.name}:{index}", weight(node, value)))
            elif producer is None or producer not in members:
                source = producer.inputs[0] if producer is not None and producer.op_type == "Cast" else None
                if source is not None and source.dtype == single:  # a cast of the policy: take its FP32 side
                    node.replace_input_with(index, source)
                else:
                    _insert_cast(model, value, [(node, index)], single)
    for node in chosen:
        if node.op_type == "Cast" and node.attributes["to"].as_int() == half:
            node.attributes["to"] = ir.AttrInt64("to", single)
        for result in node.outputs:
            if result.dtype == half:
                result.dtype = single
                _insert_cast(model, result, _find_fp16_uses(result, members), half)
    for name in [name for name, value in model.graph.initializers.items() if not value.uses()]:
        del model.graph.initializers[name]


def _find_fp16_uses(value: ir.Value, members: Collection[ir.Node]) -> list[tuple[ir.Node, int]]:
    """The uses of a value outside the moved nodes that still need FP16; a cast among them stays and changes nothing."""
    return [(node, index) for node, index in value.uses() if node not in members and node.op_type != "Cast"]


def _insert_cast(model: ir.Model, value: ir.Value, uses: Sequence[tuple[ir.Node, int]], to: ir.DataType) -> None:
    """Insert a cast of a value before ``uses``, which then use the cast's result."""
    if not uses:
        return
    first = min((node for node, _ in uses), key=list(model.graph).index) if len(uses) > 1 else uses[0][0]
    name = f"{value.name}:{to.name.lower()}:{first.name}"
    scope = scope_of(first)
    cast = ir.node("Cast", [value], {"to": int(to)}, name=f"{scope}/{name.replace('/', ':')}" if scope else name)
    cast.outputs[0].name, cast.outputs[0].dtype, cast.outputs[0].shape = name, to, value.shape
    model.graph.insert_before(first, cast)
    for node, index in uses:
        node.replace_input_with(index, cast.outputs[0])


def _add_initializer(model: ir.Model, name: str, array: Array) -> ir.Value:
    value = ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(array.shape))
    value.const_value = ir.Tensor(array, name=name)
    model.graph.register_initializer(value)
    return value


def emulate_fp16(
    graph: str, model: ir.Model, kept: Callable[[ir.Node], bool], exact: Callable[[ir.Node, ir.Value], Array]
) -> None:
    """Make a graph emulate FP16, in place: it computes in FP32 and rounds the result of each FP16 operation to FP16.

    So every result that FP16 must hold is rounded and can overflow. ONNX Runtime's own FP16 on a CPU does not round
    between operations that it computes in FP32.

    ``kept``: the nodes that are not rounded. ``exact``: gives their FP32 weights, as ``weight`` of ``move_to_fp32``.
    """
    to_round = [node for node in model.graph if is_fp16_operation(graph, node) and not kept(node)]

    def weight(node: ir.Node, value: ir.Value) -> Array:
        assert value.const_value is not None
        return exact(node, value) if kept(node) else value.const_value.numpy().astype(np.float32)

    move_to_fp32(model, lambda node: True, weight, [value.name or "" for value in model.graph.inputs])
    for node in to_round:
        value = node.outputs[0]
        uses, outputs = list(value.uses()), [index for index, each in enumerate(model.graph.outputs) if each is value]
        name = value.name
        for dtype in (ir.DataType.FLOAT16, ir.DataType.FLOAT):
            cast = ir.node("Cast", [value], {"to": int(dtype)}, name=f"{scope_of(node)}/{name}:{dtype.name.lower()}")
            cast.outputs[0].name, cast.outputs[0].dtype = f"{name}:{dtype.name.lower()}", dtype
            cast.outputs[0].shape = value.shape
            model.graph.insert_after(node, cast)
            node, value = cast, cast.outputs[0]
        for user, index in uses:
            user.replace_input_with(index, value)
        for index in outputs:
            model.graph.outputs[index] = value


def add_magnitude_outputs(model: ir.Model, tensors: Sequence[str]) -> list[str]:
    """Add max |x| of each tensor to the graph's outputs, as scalars; returns their names."""
    values = {value.name: value for node in model.graph for value in node.outputs}
    names = []
    for tensor in tensors:
        absolute = ir.node("Abs", [values[tensor]], name=f"{tensor}:abs")
        largest = ir.node("ReduceMax", absolute.outputs, {"keepdims": 0}, name=f"{tensor}:max")
        for node in (absolute, largest):
            node.outputs[0].name, node.outputs[0].dtype = node.name, ir.DataType.FLOAT
            model.graph.append(node)
        largest.outputs[0].shape = ir.Shape([])
        model.graph.outputs.append(largest.outputs[0])
        names.append(f"{tensor}:max")
    return names


def find_block_inputs(model: ir.Model, block: int) -> list[ir.Value]:
    """The values that a block of the network reads from outside itself, without weights and constants."""
    found: dict[str, ir.Value] = {}
    for node in model.graph:
        if not _is_in_block(node, block):
            continue
        for value in node.inputs:
            if value is None or value.is_initializer():
                continue
            producer = value.producer()
            if producer is None or not _is_in_block(producer, block):
                assert value.name is not None
                found[value.name] = value
    return list(found.values())


def cut_block(model: ir.Model, block: int) -> None:
    """Cut the probe down to one block, in place: its inputs are ``find_block_inputs``, its output is ``blocks.N``."""
    for value in find_block_inputs(model, block):
        if value.producer() is None:
            continue
        entry = ir.Value(name=f"{value.name}:in", type=value.type, shape=value.shape)
        for node, index in [use for use in value.uses() if _is_in_block(use[0], block)]:
            node.replace_input_with(index, entry)
        model.graph.inputs.append(entry)
    kept = [value for value in model.graph.outputs if value.name == f"blocks.{block}"]
    del model.graph.outputs[:]
    model.graph.outputs.extend(kept)
    RemoveUnusedNodesPass()(model)


def _is_in_block(node: ir.Node, block: int) -> bool:
    scope = scope_of(node)
    return scope == f"blocks.{block}" or scope.startswith(f"blocks.{block}.")


def detach_weights(model: ir.Model) -> tuple[bytes, dict[str, Array]]:
    """A model's bytes without its large initializers, and these initializers by name.

    ONNX Runtime can take the initializers from memory.
    """
    arrays = {}
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        assert tensor is not None
        if tensor.nbytes >= INLINE_BYTES:
            arrays[name] = np.ascontiguousarray(tensor.numpy())
            shape = ir.Shape(arrays[name].shape)
            value.const_value = ir.ExternalTensor("weights", 0, tensor.nbytes, tensor.dtype, shape=shape, name=name)
    return ir.to_proto(model).SerializeToString(), arrays
