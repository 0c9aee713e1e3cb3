"""Reads an ONNX file's structure and checks it, before any library reads the file or follows the paths in it.

An ONNX file is a Protocol Buffers message (protobuf.dev, Encoding); the field numbers are those of ``onnx.proto``. A
file of a bundle is refused when it holds anything that ``dit-export`` does not write: unknown fields, subgraphs,
functions, other domains, sparse or text tensors. So no loop in it can run for ever, and no weight can lie anywhere
else than in the bytes whose hash the manifest has.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from dit_runtime.bundle.manifest import GraphSpec, TensorSpec
from dit_runtime.bundle.onnx_messages import (
    ATTRIBUTE,
    ENTRY,
    GRAPH,
    MODEL,
    NODE,
    OPSET_ID,
    TENSOR,
    TENSOR_TYPE,
    TYPE,
    VALUE_INFO,
    WRITTEN_TENSOR,
    Field,
    Table,
)
from dit_runtime.bundle.operators import DIVIDING, INPUTS, WHOLE_TYPES, makes_whole
from dit_runtime.core.decode import DecodeError

OPSET = 20
IR_VERSIONS = range(8, 14)  # opset 20 came with 9; 13 is the newest that onnx 1.21 knows
MOST_FIELDS = 2_000_000  # of a file: DiT-XL's step has 30,000
MOST_NODES = 10_000  # a block has 28: DiT-XL's step has 900
MOST_AXES = 16
MOST_VALUES = 1 << 48  # of a tensor
DTYPES = {  # TensorProto.DataType: what a tensor may hold, as numpy names it
    **{1: "float32", 2: "uint8", 3: "int8", 4: "uint16", 5: "int16", 6: "int32", 7: "int64", 9: "bool"},
    **{10: "float16", 11: "float64", 12: "uint32", 13: "uint64", 16: "bfloat16"},
}
# What a constant may make of a tensor, so that a graph takes the memory that its own inputs and weights call for.
MOST_MADE = 1 << 28  # elements of a constant shape; an axis that the batch decides counts 1
MOST_SCALED = 64  # times as many elements by Resize: the autoencoder's has 4
MOST_LISTED = 256  # pads, strides, kernel or axes of a node: the autoencoder's kernels have 3
SHAPES = {"Expand": (1,), "Reshape": (1,), "Resize": (2, 3), "Pad": (1,)}  # inputs that decide the result's shape
EXTERNAL = 1  # TensorProto.DataLocation

Span = tuple[int, int]  # where a text, some bytes or a message begins and ends in the file


_Values = dict[str, list[Any]]


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of an ONNX file.

    Attributes:
        name: of the tensor; one in a node's attribute may have none.
        dtype: one of ``DTYPES``.
        shape: its axes.
        inline_bytes: how many bytes of it lie in the ONNX file.
        external: key and value of each entry that says where else it lies; empty for a tensor in the file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    inline_bytes: int
    external: tuple[tuple[str, str], ...]

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * (2 if self.dtype == "bfloat16" else np.dtype(self.dtype).itemsize)


def check_graph(content: bytes, spec: GraphSpec, weights_bytes: int) -> None:
    """Check an ONNX file's content before a library reads it.

    Args:
        content: of the file.
        spec: what the manifest says about the graph.
        weights_bytes: size of the file ``spec.weights``.

    Raises:
        DecodeError: the content is damaged, its inputs and outputs are not the manifest's, or a tensor does not lie
            wholly in this file or in ``spec.weights`` beside it.
    """
    reader = _Reader(content)
    graph = reader.read_graph()
    for kind, tensors in (("input", spec.inputs), ("output", spec.outputs)):
        found = [reader.read_value(span) for span in graph[kind]]
        if expected := _find_other(found, tensors):
            raise DecodeError(f"{kind}s: got {_show(found)}, expected {expected}")
    beside = PurePosixPath(spec.weights)
    location = beside.name if beside.parent == PurePosixPath(spec.file).parent else None
    for tensor in reader.read_tensors(graph):
        _check_tensor(tensor, location, weights_bytes)


def check_places(content: bytes, weights: str, weights_bytes: int) -> None:
    """Check where the tensors lie of a graph that ONNX Runtime wrote, before ONNX Runtime reads it again.

    Such a graph has operators, versions and forms of data of ONNX Runtime's own, which are not looked at.

    Args:
        content: of the ONNX file.
        weights: name of the one other file that tensors may lie in, in the same folder.
        weights_bytes: size of that file.

    Raises:
        DecodeError: the content is damaged, has a subgraph or a function, or a tensor does not lie wholly in this file
            or in ``weights``.
    """
    reader = _Reader(content)
    for tensor in reader.read_written_tensors():
        if not tensor.external:
            continue
        packed = [entry for entry in tensor.external if re.fullmatch(r"prepacked_[0-9]{1,4}", entry[0], re.ASCII)]
        plain = tuple(entry for entry in tensor.external if entry not in packed)
        _check_tensor(replace(tensor, external=plain), weights, weights_bytes)
        for _, text in packed:  # NAME|OFFSET;LENGTH;HASH|OFFSET;LENGTH;HASH…
            for part in text.split("|")[1:]:
                offset, length = (_natural(number) for number in [*part.split(";"), "", ""][:2])
                if offset is None or length is None or offset + length > weights_bytes:
                    raise DecodeError(f"tensor {tensor.name!r:.60} is packed at {part!r:.60} of {weights_bytes} bytes")


def read_tensors(content: bytes) -> Iterator[StoredTensor]:
    """Every tensor of an ONNX file: initializers, then those in its nodes' attributes. Raises DecodeError."""
    reader = _Reader(content)
    yield from reader.read_tensors(reader.read_graph())


class _Reader:
    """Reads the messages of one file; in all of them together at most ``MOST_FIELDS`` fields."""

    def __init__(self, content: bytes) -> None:
        self._content, self._left = content, MOST_FIELDS

    def read_graph(self) -> _Values:
        """The graph's fields, with the versions of the file checked."""
        model = self._read_model()
        if (version := _one(model, "ir_version", 0)) not in IR_VERSIONS:
            raise DecodeError(f"IR version {version}, expected {IR_VERSIONS[0]} to {IR_VERSIONS[-1]}")
        imports = [self._read(span, OPSET_ID, "opset_import") for span in model["opset_import"]]
        opsets = [(_one(each, "domain", ""), _one(each, "version", 0)) for each in imports]
        if opsets not in ([("", OPSET)], [("ai.onnx", OPSET)]):
            shown = ", ".join(f"{domain!r:.60} {number}" for domain, number in opsets[:3]) or "none"
            raise DecodeError(f"opsets {shown}, expected ONNX's {OPSET} alone")
        if not model["graph"]:
            raise DecodeError("no graph in it")
        return self._read(model["graph"][0], GRAPH, "graph")

    def _read_model(self) -> _Values:
        return self._read((0, len(self._content)), MODEL, "model")

    def read_written_tensors(self) -> Iterator[StoredTensor]:
        """Every tensor of a graph of any operators and versions, with data of any form."""
        for graph in (self._read(span, GRAPH, "graph") for span in self._read_model()["graph"]):
            spans = list(graph["initializer"])
            for node in (self._read(span, NODE, "node") for span in graph["node"]):
                for attribute in (self._read(span, ATTRIBUTE, "attribute") for span in node["attribute"]):
                    spans += (*attribute["t"], *attribute["tensors"])
            for span in spans:
                yield self._read_tensor(span, WRITTEN_TENSOR)

    def read_value(self, span: Span) -> tuple[str, str]:
        """Name and dtype of an input or output."""
        value = self._read(span, VALUE_INFO, "value_info")
        of_type = self._read(_one(value, "type", (0, 0)), TYPE, "type")
        tensor = self._read(_one(of_type, "tensor_type", (0, 0)), TENSOR_TYPE, "tensor_type")
        return _one(value, "name", ""), DTYPES.get(_one(tensor, "elem_type", 0), "unknown")

    def read_tensors(self, graph: _Values) -> Iterator[StoredTensor]:
        """Every tensor of the graph; checks the nodes too."""
        made = {self.read_value(span)[0] for span in graph["input"]}
        constants: dict[str, Span] = {}
        whole = {name for name, dtype in map(self.read_value, graph["input"]) if _is_whole(dtype)}
        for span in graph["initializer"]:
            tensor = self._read_tensor(span)
            _add_names(made, [tensor.name], "an initializer")
            constants[tensor.name] = span
            if _is_whole(tensor.dtype):
                whole.add(tensor.name)
            yield tensor
        if len(graph["node"]) > MOST_NODES:
            raise DecodeError(f"{len(graph['node'])} nodes, expected at most {MOST_NODES}")
        for span in graph["node"]:
            node = self._read(span, NODE, "node")
            _check_node(node, made)
            attributes = [self._read(inner, ATTRIBUTE, "attribute") for inner in node["attribute"]]
            _check_attributes(node, attributes)
            for attribute in attributes:
                yield from map(self._read_tensor, (*attribute["t"], *attribute["tensors"]))
            if self._makes_whole(node, attributes, whole, constants):
                whole.update(node["output"])
            if node["op_type"] == ["Constant"]:
                if [_one(each, "name", "") for each in attributes if each["t"]] != ["value"]:
                    raise DecodeError(f"node {_one(node, 'name', '')!r:.60} is a constant without a tensor")
                constants[node["output"][0]] = next(each["t"][0] for each in attributes if each["t"])
            self._check_shapes(node, constants)
        if lost := [name for name in (self.read_value(span)[0] for span in graph["output"]) if name not in made]:
            raise DecodeError(f"output {lost[0]!r:.60} is made by no node")

    def _makes_whole(
        self, node: _Values, attributes: list[_Values], whole: set[str], constants: Mapping[str, Span]
    ) -> bool:
        """Whether a node makes whole numbers; ``whole`` are the names of those before it.

        Raises:
            DecodeError: it divides whole numbers by anything but constants from 1.
        """
        operator, inputs = node["op_type"][0], [name in whole for name in node["input"]]
        if operator == "Constant":
            return any(_is_whole(self._read_tensor(span).dtype) for each in attributes for span in each["t"])
        if operator in DIVIDING and inputs[0]:
            span = constants.get(node["input"][1]) if operator == "Div" else None
            if min(self._read_values(span) if span else [], default=0) < 1:
                raise DecodeError(f"node {_one(node, 'name', '')!r:.60} divides whole numbers by what may be 0 or less")
        return makes_whole(operator, inputs, next((one for each in attributes for one in each["i"]), 0))

    def _check_shapes(self, node: _Values, constants: Mapping[str, Span]) -> None:
        """Raises DecodeError for a constant that makes a tensor far larger than any that a graph has."""
        operator, what = node["op_type"][0], f"node {_one(node, 'name', '')!r:.60}"
        for place in SHAPES.get(operator, ()):
            span = constants.get(node["input"][place]) if place < len(node["input"]) else None
            if span is None:
                continue
            values = self._read_values(span)
            if not values:
                raise DecodeError(f"{what} reads {node['input'][place]!r:.60}, which is no short list in the file")
            if not all(map(math.isfinite, values)):
                raise DecodeError(f"{what} makes a tensor by {values[:MOST_AXES]}, expected finite numbers")
            if operator == "Pad":
                largest, most = max(map(abs, values)), MOST_LISTED
            else:
                largest = math.prod(max(1.0, number) for number in values)
                most = MOST_SCALED if operator == "Resize" and place == 2 else MOST_MADE
            if largest > most:
                raise DecodeError(f"{what} makes a tensor by {[f'{one:g}' for one in values]}, expected at most {most}")

    def _read_values(self, span: Span) -> list[float]:
        """The numbers of a short tensor in the file; none of any other."""
        start, end = _one(self._read(span, TENSOR, "tensor"), "raw_data", (0, 0))
        dtype = np.dtype(self._read_tensor(span).dtype.replace("bfloat16", "uint16"))
        if (end - start) % dtype.itemsize or end - start > 8 * 2 * MOST_AXES:
            return []
        return [float(number) for number in np.frombuffer(self._content[start:end], dtype)]

    def _read_tensor(self, span: Span, table: Table = TENSOR) -> StoredTensor:
        tensor = self._read(span, table, "tensor")
        name, code, shape = _one(tensor, "name", ""), _one(tensor, "data_type", 0), tuple(tensor["dims"])
        if code not in DTYPES:
            raise DecodeError(f"tensor {name!r:.60} of data type {code}, expected numbers of a known type")
        if len(shape) > MOST_AXES or any(axis < 0 for axis in shape) or math.prod(shape) > MOST_VALUES:
            raise DecodeError(f"tensor {name!r:.60} has shape {shape[:4]}{'…' * (len(shape) > 4)}, which none can have")
        entries = [self._read(entry, ENTRY, "external_data") for entry in tensor["external_data"]]
        external = tuple((_one(entry, "key", ""), _one(entry, "value", "")) for entry in entries)
        location = _one(tensor, "data_location", 0)
        if location not in (0, EXTERNAL) or bool(external) != (location == EXTERNAL):
            raise DecodeError(f"tensor {name!r:.60} lies at place {location} with {len(external)} entries about it")
        start, end = _one(tensor, "raw_data", (0, 0))
        return StoredTensor(name, DTYPES[code], shape, end - start, external)

    def _read(self, span: Span, table: Table, what: str) -> _Values:
        """The values of a message's fields by name: numbers and text as they are, all else as its place."""
        values: _Values = {field.name: [] for field in table.values()}
        position, end = span
        while position < end:
            self._left -= 1
            if self._left < 0:
                raise DecodeError(f"more than {MOST_FIELDS} fields")
            key, position = self._varint(position, end)
            field, wire = table.get(key >> 3), key & 7
            if field is None:
                raise DecodeError(f"damaged: field {key >> 3} of the {what} is unknown")
            if field.kind == "refused":
                raise DecodeError(f"the {what} has {field.name}, which no graph of a bundle has")
            found = values[field.name]
            if found and not field.repeated and field.kind not in ("numbers", "floats"):
                raise DecodeError(f"damaged: {field.name} is there twice in the {what}")
            if wire == 0 and field.kind in ("number", "numbers"):
                value, position = self._varint(position, end)
                found.append(value - (1 << 64) if value >> 63 else value)
            elif wire == 5 and field.kind in ("float", "floats"):
                position += 4
                found.append(0.0)  # no number of an attribute is asked for
            elif wire == 2 and field.kind not in ("number", "float"):
                length, position = self._varint(position, end)
                start, position = position, position + length
                if position <= end:
                    found.extend(self._unpack(field, start, position, what))
            else:
                raise DecodeError(f"damaged: {field.name} of the {what} is encoded as kind {wire}")
            if position > end:
                raise DecodeError(f"damaged or cut short: {field.name} of the {what} ends after its {what}")
        return values

    def _unpack(self, field: Field, start: int, end: int, what: str) -> list[Any]:
        """The values of a field of some length."""
        if field.kind == "text":
            try:
                return [self._content[start:end].decode()]
            except UnicodeDecodeError as error:
                raise DecodeError(f"damaged: {field.name} of the {what} is not text") from error
        if field.kind == "floats":
            return [0.0]
        if field.kind != "numbers":
            return [(start, end)]
        found = []
        self._left -= end - start  # a number takes at least a byte
        if self._left < 0:
            raise DecodeError(f"more than {MOST_FIELDS} fields")
        while start < end:
            value, start = self._varint(start, end)
            found.append(value - (1 << 64) if value >> 63 else value)
        return found

    def _varint(self, position: int, end: int) -> tuple[int, int]:
        """A number of at most 64 bits, and the position after it."""
        value = 0
        for shift in range(0, 70, 7):
            if position >= end:
                raise DecodeError("damaged or cut short: it ends within a number")
            byte = self._content[position]
            position += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                if value >> 64:
                    break
                return value, position
        raise DecodeError("damaged: a number of more than 64 bits")


def _check_node(node: _Values, made: set[str]) -> None:
    """Check a node against ``made``, the names of what there is before it, and add its outputs to them.

    A library that finds too few inputs can end the process: OpenVINO does at a Conv without weights.

    Raises:
        DecodeError: an operator that no bundle's graph has, another number of inputs, or an input that comes later.
    """
    operator, domain, inputs = _one(node, "op_type", ""), _one(node, "domain", ""), node["input"]
    what = f"node {_one(node, 'name', '')!r:.60}"
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


def _is_whole(dtype: str) -> bool:
    return dtype in {DTYPES[code] for code in WHOLE_TYPES}


def _check_attributes(node: _Values, attributes: list[_Values]) -> None:
    """Raises DecodeError for an attribute that is there twice, or has a number far too large.

    A library takes memory for pads and strides as large as they are.
    """
    what = f"node {_one(node, 'name', '')!r:.60}"
    _add_names(set(), [_one(attribute, "name", "") for attribute in attributes], "an attribute")
    if large := [number for attribute in attributes for number in attribute["ints"] if abs(number) > MOST_LISTED]:
        raise DecodeError(f"{what} has {large[0]} in an attribute, expected at most {MOST_LISTED}")


def _add_names(known: set[str], names: list[str], what: str) -> None:
    """Raises DecodeError for a name that is empty, or there already."""
    for name in names:
        if not name or name in known:
            raise DecodeError(f"{what} has the name {name!r:.60}, which is empty or there twice")
        known.add(name)


def _one(values: _Values, name: str, default: Any) -> Any:
    return values[name][0] if values[name] else default


def _find_other(found: list[tuple[str, str]], expected: tuple[TensorSpec, ...]) -> str:
    """What was expected, where the found names and dtypes are others."""
    wanted = [(tensor.name, tensor.dtype) for tensor in expected]
    return "" if sorted(found) == sorted(wanted) else _show(wanted)


def _show(tensors: list[tuple[str, str]]) -> str:
    return ", ".join(f"{name!r:.40} {dtype:.20}" for name, dtype in tensors[:12]) or "none"


def _check_tensor(tensor: StoredTensor, location: str | None, weights_bytes: int) -> None:
    """Raises DecodeError for a tensor that is not as large as its shape, or does not lie in its file."""
    what, size = f"tensor {tensor.name!r:.60}", tensor.size_bytes
    if not tensor.external:
        if tensor.inline_bytes != size:
            raise DecodeError(f"{what} has {tensor.inline_bytes} bytes, expected {size} for {list(tensor.shape)}")
        return
    entries = dict(tensor.external)
    if tensor.inline_bytes or len(entries) != len(tensor.external) or set(entries) != {"location", "offset", "length"}:
        keys = ", ".join(f"{key!r:.40}" for key, _ in tensor.external[:6])
        raise DecodeError(f"{what} lies outside by {keys}, expected 'location', 'offset' and 'length' once each")
    if entries["location"] != location:
        raise DecodeError(f"{what} lies in {entries['location']!r:.80}, expected {location!r:.80}")
    offset, length = (_natural(entries[key]) for key in ("offset", "length"))
    if offset is None or length is None:
        raise DecodeError(f"{what}: offset {entries['offset']!r:.40}, length {entries['length']!r:.40}: not numbers")
    if length != size or offset + length > weights_bytes:
        raise DecodeError(
            f"{what} of {size} bytes lies at {offset} to {offset + length} of {location!r:.80}, which has "
            f"{weights_bytes}"
        )


def _natural(text: str) -> int | None:
    return int(text) if re.fullmatch(r"[0-9]{1,19}", text, re.ASCII) else None
