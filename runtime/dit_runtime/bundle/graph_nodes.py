"""Checks the nodes of a graph: known operators, each after what it reads, and no division that ends a process."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from dit_runtime.bundle.onnx_reader import DTYPES, Reader, Span, StoredTensor, Values, first_of
from dit_runtime.bundle.operators import DIVIDING, INPUTS, QUANTIZING, WHOLE_TYPES, makes_whole
from dit_runtime.bundle.quantization import FORMATS
from dit_runtime.core.decode import DecodeError

QUANTIZED_TYPES = tuple(each.dtype for each in FORMATS.values())
_TYPES = " or ".join(QUANTIZED_TYPES)
MOST_NODES = 10_000  # a block has 28: DiT-XL's step has 900
MOST_LISTED = 256  # pads, strides, kernel or axes of a node: the autoencoder's kernels have 3


def read_checked_tensors(reader: Reader, graph: Values) -> Iterator[StoredTensor]:
    """Every tensor of a graph as ``graph_file.read_tensors``. Raises DecodeError at a wrong node."""
    made = {reader.read_value(span)[0] for span in graph["input"]}
    constants: dict[str, Span] = {}
    quantized: set[str] = set()
    whole = {name for name, dtype in map(reader.read_value, graph["input"]) if _is_whole(dtype)}
    for span in graph["initializer"]:
        tensor = reader.read_tensor(span)
        _add_names(made, [tensor.name], "an initializer")
        constants[tensor.name] = span
        if _is_whole(tensor.dtype):
            whole.add(tensor.name)
        yield tensor
    if len(graph["node"]) > MOST_NODES:
        raise DecodeError(f"{len(graph['node'])} nodes, expected at most {MOST_NODES}")
    for span in graph["node"]:
        node, attributes = reader.read_node(span)
        _check_node(node, made)
        _check_attributes(node, attributes)
        for attribute in attributes:
            yield from map(reader.read_tensor, (*attribute["t"], *attribute["tensors"]))
        if node["op_type"][0] in QUANTIZING:
            _check_quantization(reader, node, attributes, constants, quantized)
        if _makes_whole(reader, node, attributes, whole, constants):
            whole.update(node["output"])
        if node["op_type"] == ["Constant"]:
            if [first_of(each, "name", "") for each in attributes if each["t"]] != ["value"]:
                raise DecodeError(f"node {first_of(node, 'name', '')!r:.60} is a constant without a tensor")
            constants[node["output"][0]] = next(each["t"][0] for each in attributes if each["t"])
    if lost := [name for name in (reader.read_value(span)[0] for span in graph["output"]) if name not in made]:
        raise DecodeError(f"output {lost[0]!r:.60} is made by no node")


def _check_node(node: Values, made: set[str]) -> None:
    """Check a node against ``made``, the names of what there is before it, and add its outputs to them.

    A library that finds too few inputs can end the process: OpenVINO does at a Conv without weights.

    Raises:
        DecodeError: an operator that no bundle's graph has, another number of inputs, or an input that comes later.
    """
    operator, domain, inputs = first_of(node, "op_type", ""), first_of(node, "domain", ""), node["input"]
    what = f"node {first_of(node, 'name', '')!r:.60}"
    if domain not in ("", "ai.onnx") or operator not in INPUTS:
        raise DecodeError(f"{what} is {operator!r:.40} of domain {domain!r:.40}, which no graph of a bundle has")
    least, most = INPUTS[operator]
    if not least <= len(inputs) <= most or not all(inputs[:least]):
        raise DecodeError(f"{what} has {len(inputs)} inputs, expected {least} to {most} of {operator}")
    if lost := [name for name in inputs if name and name not in made]:
        raise DecodeError(f"{what} reads {lost[0]!r:.60}, which nothing before it makes")
    if not any(node["output"]):
        raise DecodeError(f"{what} has no output")
    _add_names(made, [name for name in node["output"] if name], what)


def _check_attributes(node: Values, attributes: list[Values]) -> None:
    """Raises DecodeError for an attribute that is there twice, or has a number far too large.

    A library takes memory for pads and strides as large as they are.
    """
    what = f"node {first_of(node, 'name', '')!r:.60}"
    _add_names(set(), [first_of(attribute, "name", "") for attribute in attributes], "an attribute")
    if large := [number for attribute in attributes for number in attribute["ints"] if abs(number) > MOST_LISTED]:
        raise DecodeError(f"{what} has {large[0]} in an attribute, expected at most {MOST_LISTED}")


def _check_quantization(
    reader: Reader, node: Values, attributes: list[Values], constants: Mapping[str, Span], quantized: set[str]
) -> None:
    """Check a QuantizeLinear or DequantizeLinear: symmetric INT8 or FP8, stored scales, as ``dit-export`` writes it.

    ``quantized``: the names of what QuantizeLinear made before it; its own outputs are added.

    Raises:
        DecodeError: a scale or zero point that is not stored, another type than these, a zero point other than 0, a
            scale that is no number above 0, or an attribute besides the axis.
    """
    what, operator = f"node {first_of(node, 'name', '')!r:.60}", node["op_type"][0]
    if others := [name for each in attributes if (name := first_of(each, "name", "")) != "axis"]:
        raise DecodeError(f"{what} has the attribute {others[0]!r:.40}, which no quantization of a bundle has")
    numbers, scales, *zero_points = node["input"]
    if lost := [name for name in (scales, *zero_points) if name not in constants]:
        raise DecodeError(f"{what} reads {lost[0]!r:.60}, expected a scale and a zero point that are stored")
    if operator == "QuantizeLinear":
        quantized.update(node["output"])
        if not zero_points:
            raise DecodeError(f"{what} has no zero point, expected one of {_TYPES}")
    elif numbers not in quantized:
        dtype = reader.read_tensor(constants[numbers]).dtype if numbers in constants else "not stored"
        if dtype not in QUANTIZED_TYPES:
            raise DecodeError(f"{what} reads {numbers!r:.60}, which is {dtype}, expected {_TYPES}")
    for name in zero_points:
        found = reader.read_tensor(constants[name])
        if found.dtype not in QUANTIZED_TYPES or found.shape or reader.read_values(constants[name]) != [0]:
            raise DecodeError(f"{what} has the zero point {name!r:.60}, expected a single 0 of {_TYPES}")
    scale = reader.read_tensor(constants[scales])
    if scale.dtype not in ("float16", "float32"):
        raise DecodeError(f"{what} has scales of {scale.dtype}, expected float16 or float32")
    if not scale.shape and not 0 < (reader.read_values(constants[scales]) or [0])[0] < math.inf:
        raise DecodeError(f"{what} has a scale that is no number above 0")


def _add_names(known: set[str], names: list[str], what: str) -> None:
    """Raises DecodeError for a name that is empty, or there already."""
    for name in names:
        if not name or name in known:
            raise DecodeError(f"{what} has the name {name!r:.60}, which is empty or there twice")
        known.add(name)


def _makes_whole(
    reader: Reader, node: Values, attributes: list[Values], whole: set[str], constants: Mapping[str, Span]
) -> bool:
    """Whether a node makes whole numbers; ``whole`` are the names of those before it.

    Raises:
        DecodeError: it divides whole numbers by anything but constants from 1.
    """
    operator, inputs = node["op_type"][0], [name in whole for name in node["input"]]
    if operator == "Constant":
        return any(_is_whole(reader.read_tensor(span).dtype) for each in attributes for span in each["t"])
    if operator in DIVIDING and inputs[0]:
        span = constants.get(node["input"][1]) if operator == "Div" else None
        if min(reader.read_values(span) if span else [], default=0) < 1:
            raise DecodeError(f"node {first_of(node, 'name', '')!r:.60} divides whole numbers by what may be 0 or less")
    return makes_whole(operator, inputs, next((one for each in attributes for one in each["i"]), 0))


def _is_whole(dtype: str) -> bool:
    return dtype in {DTYPES[code] for code in WHOLE_TYPES}
