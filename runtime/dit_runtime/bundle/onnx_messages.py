"""The messages of an ONNX file: which fields each has, by ``onnx.proto``, and which of them no bundle's graph has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple


class Field(NamedTuple):
    """A field of a message; ``refused`` are those that no bundle's graph has."""

    name: str
    kind: Literal["number", "numbers", "float", "floats", "text", "bytes", "refused"]
    repeated: bool = False


Table = Mapping[int, Field]
_NAME, _DOC = Field("name", "text"), Field("doc_string", "text")
_NOTES = Field("metadata_props", "bytes", repeated=True)


def _refuse(**numbers: int) -> Table:
    return {number: Field(name, "refused") for name, number in numbers.items()}


MODEL = {
    **{1: Field("ir_version", "number"), 5: Field("model_version", "number"), 6: _DOC, 14: _NOTES},
    **{2: Field("producer_name", "text"), 3: Field("producer_version", "text"), 4: Field("domain", "text")},
    **{7: Field("graph", "bytes"), 8: Field("opset_import", "bytes", repeated=True)},
    **_refuse(training_info=20, functions=25, configuration=26),
}
OPSET_ID = {1: Field("domain", "text"), 2: Field("version", "number")}
GRAPH = {
    **{1: Field("node", "bytes", repeated=True), 2: _NAME, 10: _DOC, 16: _NOTES},
    **{5: Field("initializer", "bytes", repeated=True), 13: Field("value_info", "bytes", repeated=True)},
    **{11: Field("input", "bytes", repeated=True), 12: Field("output", "bytes", repeated=True)},
    **_refuse(quantization_annotation=14, sparse_initializer=15),
}
NODE = {
    **{1: Field("input", "text", repeated=True), 2: Field("output", "text", repeated=True), 3: _NAME, 6: _DOC},
    **{4: Field("op_type", "text"), 5: Field("attribute", "bytes", repeated=True), 7: Field("domain", "text")},
    **{9: _NOTES, **_refuse(overload=8, device_configurations=10)},
}
ATTRIBUTE = {
    **{1: _NAME, 2: Field("f", "float"), 3: Field("i", "number"), 4: Field("s", "bytes"), 5: Field("t", "bytes")},
    **{7: Field("floats", "floats"), 8: Field("ints", "numbers"), 9: Field("strings", "bytes", repeated=True)},
    **{10: Field("tensors", "bytes", repeated=True), 13: _DOC, 20: Field("type", "number")},
    **_refuse(g=6, graphs=11, tp=14, type_protos=15, ref_attr_name=21, sparse_tensor=22, sparse_tensors=23),
}
TENSOR = {
    **{1: Field("dims", "numbers"), 2: Field("data_type", "number"), 8: _NAME, 9: Field("raw_data", "bytes")},
    **{12: _DOC, 13: Field("external_data", "bytes", repeated=True), 14: Field("data_location", "number")},
    **{16: _NOTES, **_refuse(segment=3, float_data=4, int32_data=5, string_data=6, int64_data=7, double_data=10)},
    **_refuse(uint64_data=11),
}
TYPED_DATA = {4: "float_data", 5: "int32_data", 7: "int64_data", 10: "double_data", 11: "uint64_data"}
WRITTEN_TENSOR = {**TENSOR, **{number: Field(name, "bytes", repeated=True) for number, name in TYPED_DATA.items()}}
ENTRY = {1: Field("key", "text"), 2: Field("value", "text")}
VALUE_INFO = {1: _NAME, 2: Field("type", "bytes"), 3: _DOC, 4: _NOTES}
TYPE = {1: Field("tensor_type", "bytes"), 6: Field("denotation", "text")}
TENSOR_TYPE = {1: Field("elem_type", "number"), 2: Field("shape", "bytes")}
