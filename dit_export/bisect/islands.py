"""FP32 islands in strongly typed FP16 graphs, FP16 emulated in FP32, and parts of graphs.

A unit of the precision policy is a set of nodes. Made FP32, a set takes FP32 weights, and casts stand around it; next
to a cast that the policy put there, the FP32 side of that cast is used, as an export with the unit kept in FP32 would.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedNodesPass

from dit_export.bisect.operations import is_fp16_operation, scope_of
from dit_export.graphs.tracing import INLINE_BYTES

Array = NDArray[Any]


def make_fp32(
    model: ir.Model,
    inside: Callable[[ir.Node], bool],
    weight: Callable[[ir.Node, ir.Value], Array],
    inputs: Iterable[str] = (),
) -> None:
    """Make the nodes that are ``inside`` FP32, in place.

    ``weight``: an FP16 initializer's FP32 value, for the node that uses it. ``inputs``: FP16 inputs of the graph that
    become FP32 too.
    """
    half, single = ir.DataType.FLOAT16, ir.DataType.FLOAT
    chosen = [node for node in model.graph if inside(node)]
    members = set(chosen)
    for entry in [value for value in model.graph.inputs if value.name in set(inputs) and value.dtype == half]:
        entry.dtype = single
        _cast(model, entry, _outside(entry, members), half)
    for node in chosen:
        for index, value in enumerate(node.inputs):
            if value is None or value.dtype != half:
                continue
            producer = value.producer()
            if value.is_initializer():
                node.replace_input_with(index, _initializer(model, f"{node.name}:{index}", weight(node, value)))
            elif producer is None or producer not in members:
                source = producer.inputs[0] if producer is not None and producer.op_type == "Cast" else None
                if source is not None and source.dtype == single:  # the policy's own border: take its FP32 side
                    node.replace_input_with(index, source)
                else:
                    _cast(model, value, [(node, index)], single)
    for node in chosen:
        if node.op_type == "Cast" and node.attributes["to"].as_int() == half:
            node.attributes["to"] = ir.AttrInt64("to", single)
        for result in node.outputs:
            if result.dtype == half:
                result.dtype = single
                _cast(model, result, _outside(result, members), half)
    for name in [name for name, value in model.graph.initializers.items() if not value.uses()]:
        del model.graph.initializers[name]


def _outside(value: ir.Value, members: Collection[ir.Node]) -> list[tuple[ir.Node, int]]:
    """The uses that need FP16 still; a cast that follows has nothing left to do and stays."""
    return [(node, index) for node, index in value.uses() if node not in members and node.op_type != "Cast"]


def _cast(model: ir.Model, value: ir.Value, uses: Sequence[tuple[ir.Node, int]], to: ir.DataType) -> None:
    """Give ``uses`` of a value its cast."""
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


def _initializer(model: ir.Model, name: str, array: Array) -> ir.Value:
    value = ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(array.shape))
    value.const_value = ir.Tensor(array, name=name)
    model.graph.register_initializer(value)
    return value


def make_emulated(
    graph: str, model: ir.Model, kept: Callable[[ir.Node], bool], exact: Callable[[ir.Node, ir.Value], Array]
) -> None:
    """Compute all of a graph in FP32 and round the results of FP16 operations that are not ``kept`` to FP16, in place.

    So every result that FP16 must hold is rounded and can overflow. ONNX Runtime's own FP16 on a CPU leaves roundings
    out between operations that it computes in FP32. ``exact``: as ``weight`` of ``make_fp32``, for what is kept.
    """
    rounded = [node for node in model.graph if is_fp16_operation(graph, node) and not kept(node)]

    def weight(node: ir.Node, value: ir.Value) -> Array:
        assert value.const_value is not None
        return exact(node, value) if kept(node) else value.const_value.numpy().astype(np.float32)

    make_fp32(model, lambda node: True, weight, [value.name or "" for value in model.graph.inputs])
    for node in rounded:
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


def add_magnitudes(model: ir.Model, tensors: Sequence[str]) -> list[str]:
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


def find_crossing(model: ir.Model, block: int) -> list[ir.Value]:
    """What a block of the network reads from outside itself, weights and constants excepted."""
    found: dict[str, ir.Value] = {}
    for node in model.graph:
        if not _in_block(node, block):
            continue
        for value in node.inputs:
            if value is None or value.is_initializer():
                continue
            producer = value.producer()
            if producer is None or not _in_block(producer, block):
                assert value.name is not None
                found[value.name] = value
    return list(found.values())


def cut_block(model: ir.Model, block: int) -> None:
    """Leave one block of the probe, in place: its inputs are what crosses into it, its output ``blocks.N``."""
    for value in find_crossing(model, block):
        if value.producer() is None:
            continue
        entry = ir.Value(name=f"{value.name}:in", type=value.type, shape=value.shape)
        for node, index in [use for use in value.uses() if _in_block(use[0], block)]:
            node.replace_input_with(index, entry)
        model.graph.inputs.append(entry)
    kept = [value for value in model.graph.outputs if value.name == f"blocks.{block}"]
    del model.graph.outputs[:]
    model.graph.outputs.extend(kept)
    RemoveUnusedNodesPass()(model)


def _in_block(node: ir.Node, block: int) -> bool:
    scope = scope_of(node)
    return scope == f"blocks.{block}" or scope.startswith(f"blocks.{block}.")


def exact_weights(state: Mapping[str, Array], constants: Sequence[float]) -> Callable[[ir.Node, ir.Value], Array]:
    """FP32 values of FP16 initializers: from ``state``, a module's FP32 weights by name, else the FP16 value.

    A weight is taken only if it rounds to what the graph holds. ``constants``: scalars that graphs hold rounded.
    """

    def weight(node: ir.Node, value: ir.Value) -> Array:
        assert value.const_value is not None
        held = value.const_value.numpy()
        candidates: list[Array] = [np.asarray(constant, np.float32) for constant in constants] if held.ndim == 0 else []
        for kind in ("weight", "bias"):
            for name in (f"{scope_of(node)}.{kind}", value.name or ""):
                if name in state:
                    candidates += [state[name], state[name].T]
        for candidate in candidates:
            if candidate.shape == held.shape:
                with np.errstate(over="ignore"):
                    if np.array_equal(candidate.astype(np.float16), held):
                        return np.ascontiguousarray(candidate, np.float32)
        return held.astype(np.float32)

    return weight


def detach(model: ir.Model) -> tuple[bytes, dict[str, Array]]:
    """A model's bytes without its large initializers, and those by name: ONNX Runtime takes them from memory."""
    arrays = {}
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        assert tensor is not None
        if tensor.nbytes >= INLINE_BYTES:
            arrays[name] = np.ascontiguousarray(tensor.numpy())
            shape = ir.Shape(arrays[name].shape)
            value.const_value = ir.ExternalTensor("weights", 0, tensor.nbytes, tensor.dtype, shape=shape, name=name)
    return ir.to_proto(model).SerializeToString(), arrays
