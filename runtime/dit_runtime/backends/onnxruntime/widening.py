"""Writes a BF16 graph as an FP32 graph, for ONNX Runtime on a CPU, which has no BF16 products.

The weights stay BF16 in their file and are cast when the graph is loaded; every result is FP32. ONNX's library is not
here, so the messages of the file are edited as bytes (protobuf.dev, Encoding).
"""

from __future__ import annotations

from collections.abc import Iterator

from dit_runtime.bundle.onnx_reader import Reader, first_of

FLOAT, BFLOAT16 = 1, 16  # TensorProto.DataType
STORED = "/bf16"  # ends the name of a BF16 initializer; the name itself is what its cast makes
# Field numbers of onnx.proto.
GRAPH = 7  # of the model
NODE, INITIALIZER, VALUE_INFO = 1, 5, 13  # of the graph
INPUT, OUTPUT, NAME, OPERATOR, ATTRIBUTE = 1, 2, 3, 4, 5  # of a node
ATTRIBUTE_NAME, ATTRIBUTE_NUMBER, ATTRIBUTE_TYPE, INT = 1, 3, 20, 2  # of an attribute, and its type of a number
TENSOR_NAME = 8


def widen_graph(content: bytes) -> bytes:
    """The ONNX file of a graph whose inputs and outputs are not BF16, with FP32 wherever it has BF16.

    Raises:
        DecodeError: the file is damaged.
    """
    reader = Reader(content)
    reader.read_graph()
    return b"".join(
        _encode(number, _widen_graph(reader, start, end)) if number == GRAPH else content[first:end]
        for number, first, start, end in _fields_of(content, 0, len(content))
    )


def _widen_graph(reader: Reader, start: int, end: int) -> bytes:
    content = reader.content
    casts, kept = [], []
    for number, first, begin, stop in _fields_of(content, start, end):
        if number == INITIALIZER and (tensor := reader.read_tensor((begin, stop))).dtype == "bfloat16":
            casts.append(_encode(NODE, _make_cast(tensor.name + STORED, tensor.name)))
            others = [
                content[one:last] for field, one, _, last in _fields_of(content, begin, stop) if field != TENSOR_NAME
            ]
            kept.append(
                _encode(INITIALIZER, b"".join([*others, _encode(TENSOR_NAME, (tensor.name + STORED).encode())]))
            )
        elif number == NODE and _casts_to_bfloat16(reader, begin, stop):
            node, _ = reader.read_node((begin, stop))
            kept.append(_encode(NODE, _make_cast(*node["input"], *node["output"])))
        elif number != VALUE_INFO:  # which would tell the old types
            kept.append(content[first:stop])
    return b"".join([*casts, *kept])


def _casts_to_bfloat16(reader: Reader, start: int, end: int) -> bool:
    node, attributes = reader.read_node((start, end))
    return node["op_type"] == ["Cast"] and [first_of(each, "i", 0) for each in attributes] == [BFLOAT16]


def _make_cast(source: str, result: str) -> bytes:
    """A node that casts ``source`` to FP32."""
    to = [_encode(ATTRIBUTE_NAME, b"to"), _encode_number(ATTRIBUTE_NUMBER, FLOAT), _encode_number(ATTRIBUTE_TYPE, INT)]
    fields = {INPUT: source, OUTPUT: result, NAME: f"{result}/widen", OPERATOR: "Cast"}
    return b"".join(
        [*(_encode(number, text.encode()) for number, text in fields.items()), _encode(ATTRIBUTE, b"".join(to))]
    )


def _fields_of(content: bytes, start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Number, first byte, first byte of the value and end of each field of a message that ``Reader`` accepts."""
    while start < end:
        first = start
        key, start = _read_number(content, start)
        if key & 7 == 2:
            length, start = _read_number(content, start)
            stop = start + length
        else:
            stop = start + 4 if key & 7 == 5 else _read_number(content, start)[1]
        yield key >> 3, first, start, stop
        start = stop


def _read_number(content: bytes, position: int) -> tuple[int, int]:
    """A number as protobuf writes it, and the position after it."""
    value = shift = 0
    while True:
        byte = content[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7


def _encode(number: int, value: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _encode_number(number: int, value: int) -> bytes:
    return _varint(number << 3) + _varint(value)


def _varint(value: int) -> bytes:
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*found, value])
