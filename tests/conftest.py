"""Small checkpoints and bundles, made once a session; none is trained, all parts of each act."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Generator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from support.shared import shared_folder

if TYPE_CHECKING:
    from diffusers import DiTTransformer2DModel

    from dit_runtime import Pipeline

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test never asks the network
if "PYTEST_XDIST_WORKER" in os.environ:  # workers fill the cores: threads of PyTorch would wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# A shell starts background jobs with SIGINT ignored, and so would the commands be that a test interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup does the same with this one

GIVEN = "DIT_TEST_BUNDLES"  # a folder of tests/support/exports.py, for a Python that cannot export

# Modules that take long, the longest first: a worker that comes to one of them last goes on alone.
LONGEST = (
    "export/graphs/test_variants.py",
    "benchmarks/test_faults.py",
    "test_children.py",
    "export/bisect/test_bisect.py",
    "engines/test_build.py",
    "runtime/sampling/test_image_to_image.py",
    "export/checkpoints/test_checkpoints.py",
    "runtime/backends/test_device.py",
    "export/test_api.py",
    "test_bad_input.py",
    "runtime/samplers/test_prediction.py",
    "runtime/verify/test_verify.py",
    "runtime/backends/test_engines.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest modules first, each module's tests in their order."""
    rank = {Path(__file__).parent / name: index for index, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path, len(rank)))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """On a device that is said to have a GPU (``DIT_GPU=1``), a test of it that is skipped has failed."""
    report = yield
    if report.skipped and os.environ.get("DIT_GPU") == "1" and item.get_closest_marker("gpu"):
        *_, reason = report.longrepr if isinstance(report.longrepr, tuple) else (report.longrepr,)
        report.outcome, report.longrepr = "failed", f"DIT_GPU=1, and this was skipped: {reason}"
    return report


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny DiTPipeline folder."""
    pytest.importorskip("diffusers", reason="checkpoints are made with diffusers")
    from support.checkpoints import make_checkpoint

    return shared_folder(tmp_path_factory, "checkpoint", lambda folder: make_checkpoint(folder / "tiny")) / "tiny"


@pytest.fixture(scope="session")
def tiny_bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The tiny checkpoint's bundle of a name in ``support.exports.TINY``, as the command exports it."""

    def bundle(name: str) -> Path:
        def make(folder: Path) -> None:
            given = Path(os.environ.get(GIVEN, os.devnull)) / f"{name}.bundle"
            if given.is_dir():
                shutil.copytree(given, folder / f"{name}.bundle")
                return
            from support.exports import TINY, export

            export(request.getfixturevalue("checkpoint"), folder / f"{name}.bundle", *TINY[name])

        return shared_folder(tmp_path_factory, name, make) / f"{name}.bundle"

    return cache(bundle)


@pytest.fixture(scope="session")
def bundles(tiny_bundle: Callable[[str], Path]) -> dict[str, Path]:
    """The tiny checkpoint in both precisions."""
    order = ("fp32", "fp16") if os.environ.get("PYTEST_XDIST_WORKER") != "gw1" else ("fp16", "fp32")
    return {precision: tiny_bundle(precision) for precision in order}  # two workers begin with one each


@pytest.fixture(scope="session")
def sized_bundle(tiny_bundle: Callable[[str], Path]) -> Path:
    """The tiny checkpoint in FP32 with its encoder, at three sizes."""
    return tiny_bundle("sized")


@pytest.fixture(scope="session")
def int8_bundle(tiny_bundle: Callable[[str], Path]) -> Path:
    """The tiny checkpoint in INT8."""
    return tiny_bundle("int8")


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
