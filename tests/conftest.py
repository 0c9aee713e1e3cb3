"""Small checkpoints and bundles, made once a session; none is trained, all parts of each act."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from support.checkpoints import make_checkpoint
from support.commands import run_command

if TYPE_CHECKING:
    from diffusers import DiTTransformer2DModel

    from dit_runtime import Pipeline

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test never asks the network
# A shell starts background jobs with SIGINT ignored, and so would the commands be that a test interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoints") / "tiny")


@pytest.fixture(scope="session")
def bundles(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny checkpoint exported in both precisions by the command itself."""
    folder = tmp_path_factory.mktemp("bundles")
    paths = {}
    for precision, flags in (("fp32", []), ("fp16", ["--fp16"])):
        paths[precision] = folder / f"{precision}.bundle"
        done = run_command("dit-export", checkpoint, *flags, "-o", paths[precision])
        assert done.returncode == 0, done.stderr + done.stdout
        print(done.stdout)
    return paths


@pytest.fixture(params=["fp32", "fp16"])
def bundle_path(request: pytest.FixtureRequest, bundles: dict[str, Path]) -> Path:
    return bundles[request.param]


@pytest.fixture(scope="session")
def transformer(checkpoint: Path) -> DiTTransformer2DModel:
    """The tiny checkpoint's own transformer, unpatched: what guidance and the loop are compared with."""
    from diffusers import DiTTransformer2DModel

    return DiTTransformer2DModel.from_pretrained(checkpoint / "transformer").eval()


@pytest.fixture(scope="module")
def pipe(bundles: dict[str, Path]) -> Pipeline:
    """The tiny FP32 bundle on one thread of ONNX Runtime."""
    from dit_runtime import Pipeline

    return Pipeline(bundles["fp32"], "onnxruntime", threads=1)
