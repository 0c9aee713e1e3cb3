"""What a graph computes is what the manifest says, or an error: a graph may declare one shape and make another."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from support.bundles import edit_graph, signed
from support.optional import onnx

from dit_runtime.backends.open import open_engine
from dit_runtime.backends.outputs import check_outputs
from dit_runtime.bundle.manifest import GraphSpec, TensorSpec
from dit_runtime.core.errors import BundleError, EngineError

SPEC = GraphSpec(
    "g.onnx",
    "g.weights",
    (TensorSpec("images", "uint8", ("batch", "image_height", "image_width", 3)),),
    (TensorSpec("mean", "float32", ("batch", 4, "image_height//8", "2*image_width")),),
)
IMAGES = {"images": np.zeros((2, 24, 16, 3), np.uint8)}


@pytest.mark.parametrize(
    ("shape", "is_right"),
    [
        ((2, 4, 3, 32), True),
        ((1, 4, 3, 32), False),
        ((2, 5, 3, 32), False),
        ((2, 4, 2, 32), False),
        ((2, 4, 3, 16), False),
        ((2, 4, 3), False),
        ((), False),
        ((2, 4, 3, 32, 1), False),
    ],
)
def test_shapes_of_outputs(shape: tuple[int, ...], is_right: bool) -> None:
    """Every axis that the manifest gives, or that follows from the inputs, must be there."""
    found = [np.zeros(shape, np.float32)]
    if is_right:
        check_outputs("engine", SPEC, IMAGES, ["mean"], found)
        return
    with pytest.raises(EngineError, match=r"output mean is .*, expected \[batch, 4, image_height//8, 2\*image_width\]"):
        check_outputs("engine", SPEC, IMAGES, ["mean"], found)


def test_axes_that_say_nothing() -> None:
    """An axis of unknown names, as a damaged manifest may have, is any size: nothing is evaluated."""
    for axis in ("9**9**9", "a//0", "x", "", "1e9", "-1", "image_height//8*2", "9" * 5000):
        spec = GraphSpec("g", "w", SPEC.inputs, (TensorSpec("mean", "float32", (axis,)),))
        check_outputs("engine", spec, IMAGES, ["mean"], [np.zeros(5, np.float32)])


@pytest.fixture
def copied(bundles: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundles["fp32"], tmp_path / "b", ignore=shutil.ignore_patterns("engines")))


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_a_graph_of_other_outputs(copied: Path, engine: str) -> None:
    """A table of other axes with as many numbers is refused by every engine, before anything is computed from it."""
    pytest.importorskip(engine)

    def change(graph: onnx.GraphProto) -> None:
        reshape = next(node for node in graph.node if graph.output[0].name in node.output)
        assert reshape.op_type == "Reshape"
        tensor = onnx.numpy_helper.from_array(np.array([-1, 7, 128]), "other")
        graph.initializer.append(tensor)
        reshape.input[1] = "other"

    edit_graph(copied, "conditioner", change)
    opened = open_engine(signed(copied), engine, threads=1)
    inputs = {"timesteps": np.ones(2, np.float32), "labels": np.ones(2, np.int32)}
    with pytest.raises(EngineError) as raised:
        opened.session("conditioner").run(inputs, ["modulation"])
    assert len(str(raised.value).splitlines()) == 1


def test_a_graph_without_shapes(copied: Path) -> None:
    """dit-build's look at a graph whose nodes do not fit each other is one line, not onnx's traceback."""
    pytest.importorskip("onnx")
    from dit_engines.graph_work import work_of_graph

    def change(graph: onnx.GraphProto) -> None:
        for node in graph.node:
            if node.op_type == "Concat":  # of sizes, which work_of_graph computes itself
                node.ClearField("attribute")

    edit_graph(copied, "decoder", change)
    bundle = signed(copied)
    with pytest.raises(BundleError, match=r"decoder.onnx: no shapes follow from its nodes") as raised:
        work_of_graph(bundle.structure("decoder"), {"latents": (1, 4, 8, 8)})
    assert len(str(raised.value).splitlines()) == 1
