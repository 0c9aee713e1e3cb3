"""Prepared graphs that others delete or alter, and processes that end while they make one: the results stay right."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dit_runtime.backends import prepared
from dit_runtime.backends.onnxruntime.engine import OnnxRuntimeEngine
from dit_runtime.backends.prepared import Facts, load_prepared, prepare_graph
from dit_runtime.bundle.precision import Precision
from dit_runtime.bundle.reader import open_bundle
from dit_runtime.core.errors import BundleError
from dit_runtime.verify.speed import make_step_inputs

FACTS = Facts("b", "graphs/step.onnx", {}, "1", "p", ())


def make(folder: Path) -> None:
    (folder / "model").write_text("nodes")
    (folder / "weights").write_text("1 2 3")


def read(folder: Path) -> str:
    return (folder / "model").read_text() + (folder / "weights").read_text()


def delete(folder: Path) -> None:
    shutil.rmtree(folder)


def empty(folder: Path) -> None:
    (folder / "weights").write_text("")


def alter(folder: Path) -> None:
    """Size and modification time stay."""
    path = folder / "weights"
    before = path.stat()
    path.write_text("1 2 4")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


changed = pytest.mark.parametrize("change", [delete, empty, alter])


@changed
@pytest.mark.parametrize("made", [True, False], ids=["made before", "made now"])
def test_changed_while_it_is_loaded(made: bool, change: Callable[[Path], None], tmp_path: Path) -> None:
    """It is made again and loaded; where that happens each time, there is none, and nothing raises."""
    if made:
        prepare_graph(tmp_path, FACTS, make)
    changes = []

    def load(folder: Path) -> str:
        if len(changes) < most:
            changes.append(folder)
            change(folder)
        return read(folder)

    for most, expected in ((1, "nodes1 2 3"), (9, None)):
        changes.clear()
        assert load_prepared(tmp_path, FACTS, make, load) == expected
        assert len(changes) == min(most, 2)


def test_what_cannot_be_loaded_is_not_made_again(tmp_path: Path) -> None:
    """A library that does not read what it wrote would have it written at every start, and twice."""
    made = []

    def load(folder: Path) -> str:
        raise RuntimeError("no such operator")

    for _ in range(2):
        assert load_prepared(tmp_path, FACTS, lambda folder: (made.append(folder), make(folder))[-1], load) is None
    assert len(made) == 1


def test_what_cannot_be_made(tmp_path: Path) -> None:
    """A library's own error, as ONNX Runtime's on a full disk, is no reason not to sample; a damaged bundle is."""

    def fail(error: Exception) -> Callable[[Path], None]:
        def make_half(folder: Path) -> None:
            (folder / "model").write_text("no")
            raise error

        return make_half

    assert load_prepared(tmp_path, FACTS, fail(RuntimeError("out of space")), read) is None
    with pytest.raises(BundleError, match="altered"):
        load_prepared(tmp_path, FACTS, fail(BundleError("altered")), read)
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]
    name = prepared._folder_of(tmp_path, FACTS)
    name.write_text("a file in the graph's place")
    assert load_prepared(tmp_path, FACTS, make, read) == "nodes1 2 3"
    assert load_prepared(name / "model", FACTS, make, read) is None  # below a file


@changed
@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_sampling_goes_on(
    name: str,
    change: Callable[[Path], None],
    bundles: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The engine's own files are changed after their check, once or each time: the step computes the same."""
    bundle = open_bundle(bundles["fp16"])
    inputs = make_step_inputs(bundle.manifest)
    check, changes = prepared._check_graph, list[Path]()

    def check_and_change(target: Path, facts: Facts) -> prepared.CheckedGraph | None:
        found = check(target, facts)
        if found is not None and len(changes) < most:
            changes.append(target)
            if change is delete:
                delete(target)
            else:
                for path in target.iterdir():
                    path.write_bytes(bytes(path.stat().st_size if change is alter else 0))
        return found

    def step() -> np.ndarray:
        if name == "onnxruntime":
            engine = OnnxRuntimeEngine(bundle, threads=1, store=tmp_path)
        else:
            openvino = pytest.importorskip("dit_runtime.backends.openvino.engine")
            engine = openvino.OpenVinoEngine(bundle, precision=Precision.FP32, store=tmp_path)
        return engine.session("step").run(inputs, ["denoised"])[0]

    most = 0
    expected = step()
    monkeypatch.setattr(prepared, "_check_graph", check_and_change)
    for most in (1, 9):  # noqa: B007  # check_and_change reads it
        changes.clear()
        assert np.array_equal(step(), expected)
        assert changes
