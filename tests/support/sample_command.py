"""``dit-sample`` in this process, and the images that it leaves."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from dit_runtime.backends.onnxruntime.engine import _OnnxRuntimeSession
from support.commands import run_command

ENGINE = ("--engine", "onnxruntime", "--threads", "1")  # with auto each bundle would be verified first


class Done(NamedTuple):
    code: int
    out: str
    err: str


def dit_sample(bundle: Path, *argv: object) -> Done:
    """The command in this process, on one thread of ONNX Runtime."""
    done = run_command("dit-sample", bundle, *ENGINE, *(str(item) for item in argv))
    return Done(done.returncode, done.stdout, done.stderr)


def made(bundle: Path, *argv: object) -> str:
    """What a command that succeeds prints."""
    done = dit_sample(bundle, *argv)
    assert done.code == 0, done.err
    return done.out


def refused(message: str, bundle: Path, *argv: object, folder: Path) -> None:
    """The command ends with 1 and one line that says ``message``, and ``folder`` is as it was."""
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    done = dit_sample(bundle, *argv)
    assert (done.code, done.out) == (1, ""), done
    assert len(done.err.strip().splitlines()) == 1, done.err
    assert done.err.startswith("dit-sample: ")
    assert message in done.err
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def record(path: Path) -> dict[str, Any]:
    with Image.open(path) as image:
        return {key: json.loads(value) for key, value in image.text.items()}


def with_record(path: Path, text: dict[str, str], image: np.ndarray | None = None) -> Path:
    """An image, or a small black one, with these text chunks."""
    chunks = PngInfo()
    for key, value in text.items():
        chunks.add_text(key, value)
    Image.fromarray(np.zeros((32, 32, 3), np.uint8) if image is None else image).save(path, pnginfo=chunks)
    return path


@contextlib.contextmanager
def shapes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, ...]]]:
    """(branches, images) of each call of the step, and the shape of what is decoded."""
    calls: list[tuple[int, ...]] = []
    original = _OnnxRuntimeSession.run

    def run(self: _OnnxRuntimeSession, inputs: dict[str, Any], outputs: Sequence[str]) -> list[Any]:
        calls.extend(inputs[name].shape for name in ("rows", "latents") if name in inputs)
        return original(self, inputs, outputs)

    with monkeypatch.context() as patch:
        patch.setattr(_OnnxRuntimeSession, "run", run)
        yield calls
