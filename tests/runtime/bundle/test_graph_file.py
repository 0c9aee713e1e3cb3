"""An ONNX file is checked before a library sees it: damaged, or weights elsewhere, is one line."""

from __future__ import annotations

import math
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.bundles import edit_graph, signed
from support.optional import onnx

from dit_runtime.backends.open import open_engine
from dit_runtime.bundle.graph_file import check_graph, read_tensors
from dit_runtime.bundle.graph_shapes import shapes_of_node
from dit_runtime.bundle.onnx_reader import DTYPES
from dit_runtime.bundle.operators import INPUTS, MANY
from dit_runtime.bundle.reader import Bundle, open_bundle
from dit_runtime.core.decode import DecodeError
from dit_runtime.core.errors import BundleError

Change = Callable[["onnx.ModelProto"], object]


@pytest.fixture(scope="module")
def bundle(bundles: dict[str, Path]) -> Bundle:
    return open_bundle(bundles["fp16"])


@pytest.fixture
def step(bundle: Bundle) -> onnx.ModelProto:
    return onnx.load(bundle.structure("step"), load_external_data=False)


def check(bundle: Bundle, content: bytes) -> None:
    spec = bundle.manifest.graphs["step"]
    check_graph(content, spec, bundle.manifest.files[spec.weights].bytes, bundle.manifest)


def outside(model: onnx.ModelProto) -> onnx.TensorProto:
    return next(tensor for tensor in model.graph.initializer if tensor.external_data)


def inside(model: onnx.ModelProto) -> onnx.TensorProto:
    return next(tensor for tensor in model.graph.initializer if tensor.raw_data)


def place(key: str, value: str) -> Change:
    """Changes an entry that says where a tensor lies."""

    def change(model: onnx.ModelProto) -> None:
        next(entry for entry in outside(model).external_data if entry.key == key).value = value

    return change


def with_tensor(hold: Callable[[onnx.ModelProto, onnx.TensorProto], object]) -> Change:
    """Adds a tensor that lies in a file of its own, wherever ``hold`` puts it."""

    def change(model: onnx.ModelProto) -> None:
        tensor = onnx.TensorProto(name="secret", dims=[4], data_type=1, data_location=1)
        for key, value in (("location", "../secret.bin"), ("offset", "0"), ("length", "16")):
            tensor.external_data.add(key=key, value=value)
        hold(model, tensor)

    return change


def constant(tensor: onnx.TensorProto) -> onnx.NodeProto:
    return onnx.helper.make_node("Constant", [], ["secret"], value=tensor)


def hold_in_list(model: onnx.ModelProto, tensor: onnx.TensorProto) -> None:
    model.graph.node.add(op_type="Constant", output=["secret"]).attribute.add(name="value", type=9).tensors.append(
        tensor
    )


def hold_in_subgraph(model: onnx.ModelProto, tensor: onnx.TensorProto) -> None:
    model.graph.node[0].attribute.add(name="body", type=5).g.node.append(constant(tensor))


def hold_in_function(model: onnx.ModelProto, tensor: onnx.TensorProto) -> None:
    model.functions.add(name="f", domain="own").node.append(constant(tensor))


def hold_in_sparse(model: onnx.ModelProto, tensor: onnx.TensorProto) -> None:
    model.graph.sparse_initializer.add(dims=[1 << 40]).values.CopyFrom(tensor)


def set_dims(tensor: onnx.TensorProto, *dims: int) -> None:
    tensor.dims[:] = dims


def of_kind(model: onnx.ModelProto, operator: str) -> onnx.NodeProto:
    return next(node for node in model.graph.node if node.op_type == operator)


def set_input(node: onnx.NodeProto, name: str) -> None:
    node.input[1] = name


def of_number(number: int) -> onnx.NodeProto:
    return onnx.helper.make_node("Constant", [], ["number"], value_int=number)


def grow(operator: str, place: int, shape: np.ndarray[Any, Any]) -> Change:
    """Adds a node that makes a tensor of a constant shape, which is its input ``place``."""

    def change(model: onnx.ModelProto) -> None:
        model.graph.initializer.append(onnx.numpy_helper.from_array(shape, "shape"))
        inputs = [model.graph.input[0].name, *[""] * (place - 1), "shape"]
        model.graph.node.append(onnx.helper.make_node(operator, inputs, ["grown"]))

    return change


def divide(operator: str, how: str) -> Change:
    """Adds a node that divides whole numbers, which are made in some way."""

    def change(model: onnx.ModelProto) -> None:
        first, node = model.graph.input[0].name, onnx.helper.make_node
        nodes = {
            "Shape": [node("Shape", [first], ["n"])],
            "Cast": [node("Cast", [first], ["n"], to=6)],
            "Where": [
                node("Cast", [first], ["m"], to=6),
                node("Cast", [first], ["b"], to=9),
                node("Where", ["b", "m", "m"], ["n"]),
            ],
            "a constant": [constant(onnx.numpy_helper.from_array(np.array([1]))), node("Identity", ["secret"], ["n"])],
        }[how]
        model.graph.node.extend([*nodes, node(operator, ["n", "n"], ["divided"])])

    return change


def by_number(tensor: onnx.TensorProto) -> None:
    tensor.ClearField("raw_data")
    tensor.int64_data.extend([1])


def work(*nodes: tuple[str, str, str], weights: dict[str, np.ndarray[Any, Any]]) -> Change:
    """Adds nodes ``(operator, inputs, output)`` that ask for work or memory; ``weights`` are constants of theirs."""

    def change(model: onnx.ModelProto) -> None:
        for name, array in weights.items():
            model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
        for operator, inputs, output in nodes:
            model.graph.node.append(onnx.helper.make_node(operator, inputs.split(" "), [output]))

    return change


SQUARE = {"w": np.ones((64, 64), np.float32)}
STATE = "state"  # [batch, 3, 4, 8, 8]
# Nodes that each are legal, and what the line says of all of them.
WORK: dict[str, tuple[list[tuple[str, str, str]], dict[str, np.ndarray[Any, Any]], str]] = {
    "a product of constants": ([("MatMul", "w w", "p")], SQUARE, "computes 4096 elements of constants"),
    "sums of constants without end": (
        [("Add", f"{'w' if index == 0 else f's{index - 1}'} w", f"s{index}") for index in range(300)],
        SQUARE,
        "elements of constants, expected to be stored",
    ),
    "a long chain of products": (
        [
            ("Reshape", f"{STATE} one", "m0"),
            ("Expand", "m0 high", "m1"),
            *(("MatMul", f"m{index} w", f"m{index + 1}") for index in range(1, 1000)),
        ],
        {**SQUARE, "one": np.array([-1, 64]), "high": np.array([1000, 1, 64])},
        "multiply-adds up to node .*, expected at most [0-9]+ in all",
    ),
    "a scale again and again": (
        [("Resize", f"{STATE if index == 0 else f'r{index - 1}'}  scales", f"r{index}") for index in range(6)],
        {"scales": np.array([1, 1, 1, 8, 8], np.float32)},
        "makes [0-9]+ elements, expected at most",
    ),
    "each number by each": (
        [
            ("Reshape", f"{STATE} column", "c"),
            ("Reshape", f"{STATE} row", "r"),
            ("Mul", "c r", "square"),
            ("Reshape", "square column", "c2"),
            ("Mul", "c2 r", "cube"),
        ],
        {"column": np.array([-1, 1]), "row": np.array([1, -1])},
        "makes [0-9]+ elements, expected at most",
    ),
    "the batch by itself": (
        [
            ("Shape", STATE, "s"),
            ("Gather", "s first", "b"),
            ("Concat", "b b b b b", "shape"),
            ("Expand", "x shape", "e"),
        ],
        {"first": np.array([0]), "x": np.ones(1, np.float32)},
        "makes 1125899906842624 elements, expected at most",
    ),
    "a shape from numbers": (
        [("Reshape", "rows one", "r"), ("Cast", "r", "n"), ("Expand", "x n", "e")],
        {"one": np.array([-1]), "x": np.ones(1, np.float32)},
        "its input 1 is not put together from constants and sizes",
    ),
    "a difference of sizes": (
        [("Shape", STATE, "s"), ("Sub", "s s", "n"), ("Expand", "x n", "e")],
        {"x": np.ones(1, np.float32)},
        "its input 1 is not put together from constants and sizes",
    ),
    "a product beyond 64 bits": (
        [("Mul", "n n", "p"), ("Mul", "p p", "q"), ("Expand", "x q", "e")],
        {"n": np.array([1 << 39]), "x": np.ones(1, np.float32)},
        "its input 1 is not put together from constants and sizes",
    ),
    "other matrices": (
        [("MatMul", f"{STATE} w", "p")],
        SQUARE,
        r"\(MatMul\) does not fit its inputs: 8 columns times 64 rows",
    ),
    "outputs without a shape": (
        [("Squeeze", STATE, "s")],
        {},
        "its input 0 is not put together from constants and sizes",
    ),
}

ALTERED: dict[str, tuple[Change, str]] = {
    **{
        f"location {location!r:.30}": (place("location", location), "lies in .*, expected 'step.weights'")
        for location in (
            *("", ".", "..", "/etc/passwd", "../step.weights", "./step.weights", "sub/x", "..\\step.weights"),
            *("*/_ORT_MEM_ADDR_/*", "step.weights\0", "step.weights ", "STEP.WEIGHTS", "decoder.weights"),
            *("conditioner.onnx", "file:step.weights", "golden/../step.weights", "\x1b[31mstep", "x" * 10_000),
        )
    },
    "offset after the end": (place("offset", "99999999"), "which has"),
    "offset is negative": (place("offset", "-1"), "not numbers"),
    "offset is text": (place("offset", "0x10"), "not numbers"),
    "offset in other digits": (place("offset", "٣"), "not numbers"),
    "offset is empty": (place("offset", ""), "not numbers"),
    "offset and length overflow": (place("offset", str((1 << 63) - 1)), "which has"),
    "offset of a hundred digits": (place("offset", "9" * 100), "not numbers"),
    "length is short": (place("length", "4"), "lies at 0 to 4"),
    "length is zero": (place("length", "0"), "lies at 0 to 0"),
    "length is missing": (lambda m: outside(m).external_data.pop(), "expected 'location', 'offset' and 'length'"),
    "an entry twice": (lambda m: outside(m).external_data.add(key="location", value="/etc/passwd"), "once each"),
    "an entry of another name": (lambda m: outside(m).external_data.add(key="checksum", value="0"), "'checksum'"),
    "outside without a place": (lambda m: outside(m).ClearField("external_data"), "at place 1 with 0 entries"),
    "a place, but inside": (lambda m: outside(m).ClearField("data_location"), "at place 0 with 3 entries"),
    "a place that is none": (lambda m: setattr(inside(m), "data_location", 1), "at place 1 with 0"),
    "bytes in both places": (lambda m: setattr(outside(m), "raw_data", b"1234"), "lies outside by"),
    "a constant elsewhere": (
        with_tensor(lambda m, t: m.graph.node.append(constant(t))),
        r"tensor 'secret' lies in '\.\./secret.bin'",
    ),
    "one of several constants": (with_tensor(hold_in_list), "tensor 'secret' lies in"),
    "in a subgraph": (with_tensor(hold_in_subgraph), "the attribute has g, which no graph of a bundle has"),
    "in a function": (with_tensor(hold_in_function), "the model has functions"),
    "in a sparse tensor": (with_tensor(hold_in_sparse), "the graph has sparse_initializer"),
    "in a training step": (
        with_tensor(lambda m, t: m.training_info.add().initialization.node.append(constant(t))),
        "the model has training_info",
    ),
    "in a quantization": (lambda m: m.graph.quantization_annotation.add(tensor_name="x"), "quantization_annotation"),
    "4 TB inside": (lambda m: set_dims(inside(m), 1 << 40), "expected [0-9]{13} for"),
    "4 TB outside": (lambda m: set_dims(outside(m), 1 << 40), "of [0-9]{13} bytes lies at"),
    "the same bytes for many tensors": (
        lambda m: (
            [m.graph.initializer.add().CopyFrom(outside(m)) for _ in range(2)]
            and [setattr(each, "name", f"x{at}") for at, each in enumerate(m.graph.initializer[-2:])]
        ),
        "bytes more than the [0-9]+ of 'step.weights'",
    ),
    "axes that overflow": (lambda m: set_dims(inside(m), *[1 << 32] * 4), "which none can have"),
    "axes without end": (lambda m: set_dims(inside(m), *[1] * 100), "which none can have"),
    "an axis below zero": (lambda m: set_dims(inside(m), -1, -8), "which none can have"),
    "text": (lambda m: setattr(inside(m), "data_type", 8), "of data type 8"),
    "no type": (lambda m: setattr(inside(m), "data_type", 0), "of data type 0"),
    "numbers, not bytes": (lambda m: by_number(inside(m)), "the tensor has int64_data"),
    "opset 999": (lambda m: setattr(m.opset_import[0], "version", 999), "opsets '' 999, expected ONNX's 20 alone"),
    "opset -1": (lambda m: setattr(m.opset_import[0], "version", -1), "opsets '' -1"),
    "no opset": (lambda m: m.ClearField("opset_import"), "opsets none"),
    "an opset of its own": (lambda m: m.opset_import.add(domain="own", version=1), "opsets '' 20, 'own' 1"),
    "IR version 999": (lambda m: setattr(m, "ir_version", 999), "IR version 999, expected 8 to 13"),
    "no graph": (lambda m: m.ClearField("graph"), "no graph in it"),
    "another domain": (lambda m: setattr(m.graph.node[0], "domain", "com.microsoft"), "of domain 'com.microsoft'"),
    "an operator without end": (lambda m: setattr(m.graph.node[0], "op_type", "Loop"), "is 'Loop' of domain ''"),
    "an operator of no kind": (lambda m: m.graph.node[0].ClearField("op_type"), "is '' of domain ''"),
    "an input less": (lambda m: of_kind(m, "Conv").ClearField("input"), r"has 0 inputs, expected 2 to 3 of Conv"),
    "an empty input": (lambda m: set_input(of_kind(m, "MatMul"), ""), "expected 2 to 2 of MatMul"),
    "inputs without end": (lambda m: of_kind(m, "MatMul").input.extend(["x"] * 100), "has 102 inputs"),
    "an input of nothing": (lambda m: set_input(of_kind(m, "MatMul"), "nowhere"), "reads 'nowhere'"),
    "a circle": (lambda m: set_input(of_kind(m, "MatMul"), m.graph.output[0].name), "which nothing before it makes"),
    "a name made twice": (lambda m: m.graph.node.append(m.graph.node[0]), "which is empty or there twice"),
    "an initializer twice": (lambda m: m.graph.initializer.append(inside(m)), "an initializer has the name"),
    "an attribute twice": (
        lambda m: of_kind(m, "Conv").attribute.append(of_kind(m, "Conv").attribute[0]),
        "an attribute has the name",
    ),
    "a node of no output": (lambda m: of_kind(m, "MatMul").ClearField("output"), "has no output"),
    "an output of nothing": (lambda m: m.graph.node.pop(), "is made by no node"),
    "nodes without end": (lambda m: m.graph.node.extend([m.graph.node[0]] * 10_000), "nodes, expected at most 10000"),
    "a constant of a number": (lambda m: m.graph.node.insert(0, of_number(3)), "is a constant without a tensor"),
    **{
        f"{operator} to {list(values)}": (grow(operator, place, np.array(values, dtype)), message)
        for operator, place, dtype, values, message in (
            ("Expand", 1, np.int64, (3000, 1000, 1000), "do not fit each other"),
            ("Expand", 1, np.int64, (3000, *[1] * 5), "makes [0-9]+ elements, expected at most"),
            ("Expand", 1, np.int64, (1 << 62, *[1] * 5), "makes [0-9]+ elements, expected at most"),
            ("Expand", 1, np.int64, (-5, *[1] * 5), r"the shape \(-5"),
            ("Reshape", 1, np.int64, (1 << 62, 1 << 62), r"\(Reshape\) does not fit its inputs: shape .* as "),
            ("Reshape", 1, np.int64, (-1, -1), "the shape"),
            ("Expand", 1, np.int64, [1] * 1000, "not put together from constants and sizes"),
            ("Resize", 2, np.float32, (1, 1, 1, 1e9, 1), "makes [0-9]+ elements, expected at most"),
            ("Resize", 2, np.float32, (1, 1, 1, math.nan, 1), "by scales"),
            ("Resize", 3, np.int64, (1, 1, 1, 1 << 20, 1 << 20), "makes [0-9]+ elements, expected at most"),
            ("Pad", 1, np.int64, (0, 0, 0, 1 << 40, *[0] * 6), "makes [0-9]+ elements, expected at most"),
            ("Pad", 1, np.int64, (0, 0), "2 pads for 5 axes"),
        )
    },
    **{f"work: {name}": (work(*nodes, weights=weights), message) for name, (nodes, weights, message) in WORK.items()},
    **{
        f"{operator} of whole numbers by way of {how}": (
            divide(operator, how),
            "divides whole numbers by what may be 0",
        )
        for operator in ("Div", "Mod", "ReduceMean")
        for how in ("Shape", "Cast", "Where", "a constant")
    },
    "pads without end": (
        lambda m: m.graph.node[0].attribute.append(onnx.helper.make_attribute("sides", [1 << 31] * 4)),
        "has 2147483648 in an attribute",
    ),
    "no input": (lambda m: m.graph.input.pop(), "inputs: got"),
    "another input": (lambda m: setattr(m.graph.input[0], "name", "\x1b[31m\n"), "inputs: got"),
    "an output of another type": (lambda m: setattr(m.graph.output[0].type.tensor_type, "elem_type", 7), "outputs:"),
    "an output more": (lambda m: m.graph.output.add(name="more"), "outputs: got"),
}


@pytest.mark.parametrize("name", ALTERED)
def test_a_graph_that_no_library_should_see(bundle: Bundle, step: onnx.ModelProto, name: str) -> None:
    """What dit-export does not write, and weights anywhere but in their own file, are refused in one short line."""
    change, message = ALTERED[name]
    check(bundle, step.SerializeToString())
    change(step)
    with pytest.raises(DecodeError, match=message) as raised:
        check(bundle, step.SerializeToString())
    assert str(raised.value).isprintable()
    assert len(str(raised.value)) < 800


def test_the_tensors_are_those_that_onnx_finds(bundles: dict[str, Path], sized_bundle: Path) -> None:
    """Read without onnx, every tensor of every graph is as onnx itself reads it."""
    count = 0
    for path in (*bundles.values(), sized_bundle):
        bundle = open_bundle(path)
        for name in bundle.manifest.graphs:
            file = bundle.structure(name)
            model = onnx.load(file, load_external_data=False)
            constants = [item.t for node in model.graph.node for item in node.attribute if item.HasField("t")]
            expected = [
                (
                    tensor.name,
                    str(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)),
                    tuple(tensor.dims),
                    len(tensor.raw_data),
                    tuple((entry.key, entry.value) for entry in tensor.external_data),
                )
                for tensor in (*model.graph.initializer, *constants)
            ]
            read = read_tensors(file.read_bytes())
            found = [(each.name, each.dtype, each.shape, each.inline_bytes, each.external) for each in read]
            assert found == expected
            count += len(found)
    assert count > 500
    assert {onnx.TensorProto.DataType.Name(code).lower() for code in DTYPES} >= {"float", "float16", "int64", "bool"}


def test_the_shapes_are_those_that_onnx_infers(sized_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 1,024 images of 48x48 pixels, every shape that ONNX's own inference finds is the one that is checked."""
    bundle, made = open_bundle(sized_bundle), list[Any]()

    def note(call: Any) -> Any:
        made.append(shapes_of_node(call))
        return made[-1]

    monkeypatch.setattr("dit_runtime.bundle.graph_size.shapes_of_node", note)
    sizes = dict.fromkeys(("batch", "branches", "rows"), 1024) | dict.fromkeys(("height", "width"), 12)
    sizes |= dict.fromkeys(("image_height", "image_width"), 48)
    compared = 0
    for name in ("conditioner", "step", "decoder", "encoder"):
        made.clear()
        model = onnx.load(bundle.structure(name), load_external_data=False)
        nodes = [node for node in model.graph.node if node.op_type != "Constant"]
        assert len(made) == 2 * len(nodes)
        del model.graph.value_info[:]
        for value, tensor in zip(model.graph.input, bundle.manifest.graphs[name].inputs, strict=True):
            for axis, size in zip(value.type.tensor_type.shape.dim, tensor.shape, strict=True):
                axis.dim_value = sizes[size] if isinstance(size, str) else size
        for value in model.graph.output:
            value.type.tensor_type.ClearField("shape")
        found = {
            value.name: [axis.dim_value if axis.HasField("dim_value") else None for axis in shape.dim]
            for value in onnx.shape_inference.infer_shapes(model, data_prop=True).graph.value_info
            for shape in [value.type.tensor_type.shape]
        }
        for node, ours in zip(nodes, made[len(nodes) :], strict=True):
            for output, sized in zip(node.output, ours.outputs, strict=True):
                if None not in found.get(output, [None]):
                    assert [*sized.shape] == found[output], (name, node.name)
                    compared += 1
    assert compared > 200


def test_the_operators_take_what_onnx_says() -> None:
    """The table of inputs is that of ONNX's own schemas at opset 20."""
    for name, (least, most) in INPUTS.items():
        schema = onnx.defs.get_schema(name, 20, "")
        assert (schema.min_input, min(schema.max_input, MANY)) == (least, most), name


def test_a_damaged_file(bundle: Bundle) -> None:
    """A file that is cut short is refused wherever it ends; flipped bits and noise are refused or are still a graph."""
    content = bundle.structure("step").read_bytes()
    chance = random.Random(0)
    for length in (*range(40), *(chance.randrange(len(content)) for _ in range(60))):
        with pytest.raises(DecodeError):
            check(bundle, content[:length])
    refused = 0
    for _ in range(150):
        altered = bytearray(content)
        position = chance.randrange(min(len(altered), chance.choice((200, 1 << 30))))
        match chance.randrange(3):
            case 0:
                altered[position] ^= 1 << chance.randrange(8)
            case 1:
                altered[position:position] = chance.randbytes(chance.randrange(1, 12))
            case _:
                del altered[position : position + chance.randrange(1, 40)]
        try:
            check(bundle, bytes(altered))
        except DecodeError:
            refused += 1
    assert refused > 75  # 122: the others have other names and constants
    for field in (b"\x0b", b"\x00", b"\xff" * 11, b"\x0a\xff\xff\xff\xff\x0f"):  # a group, field 0, numbers too large
        with pytest.raises(DecodeError):
            check(bundle, content + field)


@pytest.mark.parametrize("content", [b"\x72\x00" * 101, b"\x3a\x72" + b"\x2a\x70" + b"\x0a\x6e" + b"\x01" * 110])
def test_a_file_of_many_fields(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    """Millions of fields that say nothing, or of axes, end the reading after a second, not after an hour."""
    monkeypatch.setattr("dit_runtime.bundle.onnx_reader.MOST_FIELDS", 100)
    with pytest.raises(DecodeError, match="more than 100 fields"):
        list(read_tensors(b"\x08\x0a\x42\x02\x10\x14" + content))


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_every_engine_is_spared(bundles: dict[str, Path], tmp_path: Path, engine: str) -> None:
    """A hostile location, with matching hashes, reaches neither ONNX Runtime, which it would crash, nor OpenVINO."""
    pytest.importorskip(engine)
    path = Path(shutil.copytree(bundles["fp32"], tmp_path / "b", ignore=shutil.ignore_patterns("engines")))

    def change(graph: onnx.GraphProto) -> None:
        tensor = next(item for item in graph.initializer if item.external_data)
        tensor.external_data[0].value = "*/_ORT_MEM_ADDR_/*"

    edit_graph(path, "conditioner", change)
    opened = open_engine(signed(path), engine, threads=1)
    inputs = {"timesteps": np.ones(1, np.float32), "labels": np.ones(1, np.int32)}
    with pytest.raises(BundleError, match=r"conditioner.onnx: not a graph of a bundle .tensor .*_ORT_MEM_ADDR_"):
        opened.session("conditioner").run(inputs, [opened.bundle.manifest.table.name])
