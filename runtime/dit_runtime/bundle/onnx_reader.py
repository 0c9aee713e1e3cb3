"""Reads the messages of an ONNX file without its library, before any library reads the file.

An ONNX file is a Protocol Buffers message (protobuf.dev, Encoding); the field numbers are those of ``onnx.proto``. A
file is refused when it has a field that ``dit-export`` does not write: unknown ones, subgraphs, functions, sparse or
text tensors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

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
from dit_runtime.core.decode import DecodeError

OPSET = 20
IR_VERSIONS = range(8, 14)  # opset 20 came with 9; 13 is the newest that onnx 1.21 knows
MOST_FIELDS = 2_000_000  # of a file: DiT-XL's step has 30,000
MOST_AXES = 16
MOST_VALUES = 1 << 48  # of a tensor
DTYPES = {  # TensorProto.DataType: what a tensor may hold, as numpy names it
    **{1: "float32", 2: "uint8", 3: "int8", 4: "uint16", 5: "int16", 6: "int32", 7: "int64", 9: "bool"},
    **{10: "float16", 11: "float64", 12: "uint32", 13: "uint64", 16: "bfloat16", 17: "float8e4m3fn"},
}
BITS = {"bfloat16": "uint16", "float8e4m3fn": "uint8"}  # what numpy does not have is read as bits
EXTERNAL = 1  # TensorProto.DataLocation

Span = tuple[int, int]  # where a text, some bytes or a message begins and ends in the file
Values = dict[str, list[Any]]  # of a message's fields, by name


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
        return math.prod(self.shape) * np.dtype(BITS.get(self.dtype, self.dtype)).itemsize


class Reader:
    """Reads the messages of one file; in all of them together at most ``MOST_FIELDS`` fields."""

    def __init__(self, content: bytes) -> None:
        self.content, self._left = content, MOST_FIELDS

    def read_graph(self) -> Values:
        """The graph's fields, with the versions of the file checked."""
        model = self._read_model()
        if (version := first_of(model, "ir_version", 0)) not in IR_VERSIONS:
            raise DecodeError(f"IR version {version}, expected {IR_VERSIONS[0]} to {IR_VERSIONS[-1]}")
        imports = [self._read(span, OPSET_ID, "opset_import") for span in model["opset_import"]]
        opsets = [(first_of(each, "domain", ""), first_of(each, "version", 0)) for each in imports]
        if opsets not in ([("", OPSET)], [("ai.onnx", OPSET)]):
            shown = ", ".join(f"{domain!r:.60} {number}" for domain, number in opsets[:3]) or "none"
            raise DecodeError(f"opsets {shown}, expected ONNX's {OPSET} alone")
        if not model["graph"]:
            raise DecodeError("no graph in it")
        return self._read(model["graph"][0], GRAPH, "graph")

    def _read_model(self) -> Values:
        return self._read((0, len(self.content)), MODEL, "model")

    def read_written_tensors(self) -> Iterator[StoredTensor]:
        """Every tensor of a graph of any operators and versions, with data of any form."""
        for graph in (self._read(span, GRAPH, "graph") for span in self._read_model()["graph"]):
            spans = list(graph["initializer"])
            for node in (self._read(span, NODE, "node") for span in graph["node"]):
                for attribute in (self._read(span, ATTRIBUTE, "attribute") for span in node["attribute"]):
                    spans += (*attribute["t"], *attribute["tensors"])
            for span in spans:
                yield self.read_tensor(span, WRITTEN_TENSOR)

    def read_value(self, span: Span) -> tuple[str, str]:
        """Name and dtype of an input or output."""
        value = self._read(span, VALUE_INFO, "value_info")
        of_type = self._read(first_of(value, "type", (0, 0)), TYPE, "type")
        tensor = self._read(first_of(of_type, "tensor_type", (0, 0)), TENSOR_TYPE, "tensor_type")
        return first_of(value, "name", ""), DTYPES.get(first_of(tensor, "elem_type", 0), "unknown")

    def read_node(self, span: Span) -> tuple[Values, list[Values]]:
        """A node, and its attributes."""
        node = self._read(span, NODE, "node")
        return node, [self._read(inner, ATTRIBUTE, "attribute") for inner in node["attribute"]]

    def read_values(self, span: Span) -> list[float]:
        """The numbers of a short tensor in the file; none of any other."""
        start, end = first_of(self._read(span, TENSOR, "tensor"), "raw_data", (0, 0))
        told = self.read_tensor(span).dtype
        dtype = np.dtype(BITS.get(told, told))
        if (end - start) % dtype.itemsize or end - start > 8 * 2 * MOST_AXES:
            return []
        found: list[float] = np.frombuffer(self.content[start:end], dtype).tolist()
        return found

    def read_bytes(self, span: Span) -> bytes:
        """The bytes of a tensor that lie in the file."""
        return self.content[slice(*first_of(self._read(span, TENSOR, "tensor"), "raw_data", (0, 0)))]

    def read_text(self, span: Span) -> str:
        """The text at a place, with other bytes replaced."""
        return self.content[slice(*span)].decode(errors="replace")

    def read_tensor(self, span: Span, table: Table = TENSOR) -> StoredTensor:
        tensor = self._read(span, table, "tensor")
        name, code, shape = first_of(tensor, "name", ""), first_of(tensor, "data_type", 0), tuple(tensor["dims"])
        if code not in DTYPES:
            raise DecodeError(f"tensor {name!r:.60} of data type {code}, expected numbers of a known type")
        if len(shape) > MOST_AXES or any(axis < 0 for axis in shape) or math.prod(shape) > MOST_VALUES:
            raise DecodeError(f"tensor {name!r:.60} has shape {shape[:4]}{'…' * (len(shape) > 4)}, which none can have")
        entries = [self._read(entry, ENTRY, "external_data") for entry in tensor["external_data"]]
        external = tuple((first_of(entry, "key", ""), first_of(entry, "value", "")) for entry in entries)
        location = first_of(tensor, "data_location", 0)
        if location not in (0, EXTERNAL) or bool(external) != (location == EXTERNAL):
            raise DecodeError(f"tensor {name!r:.60} lies at place {location} with {len(external)} entries about it")
        start, end = first_of(tensor, "raw_data", (0, 0))
        return StoredTensor(name, DTYPES[code], shape, end - start, external)

    def _read(self, span: Span, table: Table, what: str) -> Values:
        """The values of a message's fields by name: numbers and text as they are, all else as its place."""
        values: Values = {field.name: [] for field in table.values()}
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
                return [self.content[start:end].decode()]
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
            byte = self.content[position]
            position += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                if value >> 64:
                    break
                return value, position
        raise DecodeError("damaged: a number of more than 64 bits")


def first_of(values: Values, name: str, default: Any) -> Any:
    """The first value of a field; ``default`` where there is none."""
    return values[name][0] if values[name] else default
