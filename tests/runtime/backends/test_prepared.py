"""Prepared graphs lie in the store and nowhere else, whatever the store holds already."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from dit_runtime.backends.prepared import Facts, _folder_of, find_prepared, prepare_graph

FACTS = Facts("b", "graphs/step.onnx", {}, "1", "p", ())


def write(folder: Path) -> None:
    (folder / "model").write_text("model")


def store_with(tmp_path: Path, make: Callable[[Path, Path], None]) -> Path:
    """A store where ``make(lock, elsewhere)`` put something in the lock's place, and a folder outside it."""
    folder, elsewhere = tmp_path / "store" / "backend", tmp_path / "elsewhere"
    folder.mkdir(parents=True)
    elsewhere.mkdir()
    make(folder / f".{_folder_of(folder, FACTS).name}.lock", elsewhere)
    return folder


@pytest.mark.parametrize(
    "make",
    [
        lambda lock, elsewhere: lock.symlink_to(elsewhere / "made"),
        lambda lock, elsewhere: lock.symlink_to(lock.parent / "inside"),
        lambda lock, elsewhere: os.mkfifo(lock),
        lambda lock, elsewhere: lock.mkdir(),
    ],
    ids=["link out", "link inside", "pipe", "folder"],
)
def test_a_lock_that_is_no_plain_file(tmp_path: Path, make: Callable[[Path, Path], None]) -> None:
    """Fails by making the link's target, or by waiting for the pipe's other end: it does without the store instead."""
    folder = store_with(tmp_path, make)
    before = sorted(folder.iterdir())
    assert prepare_graph(folder, FACTS, write) is None
    assert sorted(folder.iterdir()) == before
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_backends_folder_that_is_a_link(tmp_path: Path) -> None:
    """No file is made where a link in the store leads."""
    (tmp_path / "store").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "store" / "backend").symlink_to(tmp_path / "elsewhere")
    assert prepare_graph(tmp_path / "store" / "backend", FACTS, write) is None
    assert list((tmp_path / "elsewhere").iterdir()) == []


@pytest.mark.parametrize("name", ["model", "prepared.json"])
def test_files_that_are_no_plain_files(tmp_path: Path, name: str) -> None:
    """A pipe or a link in the place of a file makes the graph a damaged one, at once."""
    folder = tmp_path / "store" / "backend"
    made = prepare_graph(folder, FACTS, write)
    assert made is not None
    assert find_prepared(folder, FACTS) == made
    target = made.folder
    content = (target / name).read_bytes()
    (tmp_path / "elsewhere").write_bytes(content)
    for replace in (os.mkfifo, lambda path: path.symlink_to(tmp_path / "elsewhere")):
        (target / name).unlink()
        replace(target / name)
        assert find_prepared(folder, FACTS) is None
        made = prepare_graph(folder, FACTS, write)  # again
        assert made is not None
        assert find_prepared(folder, FACTS) == made
