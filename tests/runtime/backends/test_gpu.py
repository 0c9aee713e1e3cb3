"""On a device, with a driver and TensorRT: what ``test_device`` shows on the double, on the real thing.

    python -m pytest -m gpu tests/runtime/backends/test_gpu.py
    DIT_BUNDLE=my.bundle python -m pytest -m gpu tests/runtime/backends/test_gpu.py

The first builds engines of a tiny model, which it exports with PyTorch; a device without PyTorch is given a bundle of a
diffusion model by ``DIT_BUNDLE``. Nothing here imports PyTorch or ONNX Runtime.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.commands import run_command

from dit_runtime import Pipeline, open_bundle
from dit_runtime.backends.base import Session
from dit_runtime.backends.conditioning import TableLimits
from dit_runtime.backends.host_loop import HostLoop
from dit_runtime.backends.tensorrt import api as tensorrt_api
from dit_runtime.backends.tensorrt import cuda
from dit_runtime.backends.tensorrt.engine import TensorRtEngine
from dit_runtime.backends.tensorrt.store import StoredEngine, read_engines
from dit_runtime.bundle.reader import Bundle
from dit_runtime.core.errors import EngineError
from dit_runtime.sampling.requests import ImageRequest
from dit_runtime.verify.rung import format_rungs
from dit_runtime.verify.verification import verification_of

pytestmark = pytest.mark.gpu

SETTINGS: dict[str, dict[str, Any]] = {
    "ddim": {"sampler": "ddim", "steps": 8, "guidance": 1.5},
    "ddpm": {"sampler": "ddpm", "steps": 8, "guidance": 2.5},
    "interval": {"sampler": "ddpm", "steps": 9, "guidance": 2.0, "guidance_interval": (0.4, 1.0)},
    "unguided": {"sampler": "dpmpp-3m", "steps": 6, "guidance": 1.0},
}
# What CUDA and the library keep of a device for the process once they have run: kernels, not weights. Not measured yet.
KEPT_BYTES = 256 << 20


class Device:
    """A GPU, its library, and a bundle with engines built for it."""

    def __init__(self, library: tensorrt_api.TensorRT, bundle: Bundle, stored: StoredEngine) -> None:
        self.library, self.bundle, self.stored = library, bundle, stored
        self.cuda = cuda.CudaRuntime()

    def engine(self, **options: Any) -> TensorRtEngine:
        return TensorRtEngine(self.bundle, self.stored, self.library, self.cuda, **options)


class SessionsOnly:
    """An engine without its resident loop: each step goes to the device and back."""

    def __init__(self, engine: TensorRtEngine) -> None:
        self.info, self._engine = replace(engine.info, loop_on_device=False), engine

    def session(self, graph: str) -> Session:
        return self._engine.session(graph)

    def release(self, graph: str) -> None:
        self._engine.release(graph)

    def open_loop(self, limits: TableLimits) -> HostLoop:
        return HostLoop(self, self._engine.bundle.manifest, limits)

    def close(self) -> None:
        self._engine.close()


def present_library() -> tensorrt_api.TensorRT:
    """TensorRT, or else TensorRT-RTX; skips without a GPU or either."""
    try:
        facts = cuda.read_device()
        print(f"{facts.name}, compute capability {facts.compute_capability}, driver {facts.driver}")
    except EngineError as error:
        pytest.skip(str(error))
    reasons = []
    for name in tensorrt_api.LIBRARIES:
        try:
            return tensorrt_api.import_library(name)
        except EngineError as error:
            reasons.append(str(error))
    pytest.skip("; ".join(reasons))


def mixed(pipe: Pipeline) -> list[ImageRequest]:
    """Images of several samplers and lengths, guided and not, one of two labels."""
    asked: list[tuple[Any, dict[str, Any]]] = [(label, settings) for label, settings in enumerate(SETTINGS.values())]
    asked.append(({3: 0.7, 5: 0.3}, {"sampler": "unipc", "steps": 4, "guidance": 2.0}))
    asked.append((7, {"sampler": "euler-ancestral", "steps": 6, "guidance": 3.0, "guidance_schedule": "cosine"}))
    return [pipe.prepare([label], seed, **settings)[0] for seed, (label, settings) in enumerate(asked)]


@pytest.fixture(scope="module", params=[os.environ["DIT_BUNDLE"]] if "DIT_BUNDLE" in os.environ else ["fp32", "fp16"])
def device(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Device:
    """The bundle, built here by the command itself."""
    library = present_library()
    path = Path(request.param) if "DIT_BUNDLE" in os.environ else request.getfixturevalue("bundles")[request.param]
    several = library.name == "tensorrt_rtx" or library.numbers >= (10, 8)
    store = tmp_path_factory.mktemp("store")
    options = ["--batch", "1,4" if several else "4", "--branches", "1,2,3", "--rows", "128", "--store", store]
    done = run_command("dit-build", path, "--target", "this", *options)
    assert done.returncode == 0, done.stderr + done.stdout
    print(done.stdout)
    bundle = open_bundle(path)
    (stored,) = read_engines(bundle, store)
    return Device(library, bundle, stored)


@pytest.fixture
def engine(device: Device) -> Iterator[TensorRtEngine]:
    with device.engine() as engine:
        yield engine


def latents_of(pipe: Pipeline, labels: list[Any], **settings: Any) -> list[np.ndarray]:
    """Latents and denoised estimate after each step."""
    return [value for _, *values in pipe.trajectory(labels, 5, **settings) for value in values]


def test_the_bundles_own_records(device: Device, engine: TensorRtEngine) -> None:
    """The engine matches the PyTorch reference at every shape of its profiles."""
    rungs = verification_of(device.bundle, engine).rungs
    print(format_rungs(rungs))
    assert [rung.name for rung in rungs if not rung.passed] == []


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_replayed_graph_is_the_step(device: Device, engine: TensorRtEngine, settings: str) -> None:
    """Captured graphs, the loop without them and single calls through the host give the same numbers."""
    with device.engine(captured=False) as uncaptured:
        for labels in ([3], [1, 2, 3]):
            replayed = latents_of(Pipeline(device.bundle, engine), labels, **SETTINGS[settings])
            queued = latents_of(Pipeline(device.bundle, uncaptured), labels, **SETTINGS[settings])
            called = latents_of(Pipeline(device.bundle, SessionsOnly(engine)), labels, **SETTINGS[settings])
            for one, other, third in zip(replayed, queued, called, strict=True):
                assert np.array_equal(one, other)
                assert np.array_equal(one, third)


def test_a_second_run_is_the_first(device: Device, engine: TensorRtEngine) -> None:
    """What a run leaves on the device does not show in the next, nor does a run without reading in one with."""
    pipe = Pipeline(device.bundle, engine)
    first = pipe([1, 2, 3], 7, **SETTINGS["ddpm"])
    pipe([4], 8, **SETTINGS["interval"])
    assert np.array_equal(pipe([1, 2, 3], 7, **SETTINGS["ddpm"]), first)
    final = latents_of(pipe, [1, 2, 3], **SETTINGS["ddpm"])[-2]
    assert np.array_equal(pipe.sample_latents(pipe.prepare([1, 2, 3], 5, **SETTINGS["ddpm"])), final)


def test_continuous_batching(device: Device, engine: TensorRtEngine) -> None:
    """Images that join and leave a running batch are those of single calls through the host."""
    pipe, host = Pipeline(device.bundle, engine), Pipeline(device.bundle, SessionsOnly(engine))
    images = mixed(pipe)
    expected = dict(host.stream(images, 3))
    for index, latents in pipe.stream(images, 3):
        assert np.array_equal(latents, expected[index]), f"image {index}"


def test_threads_take_turns(device: Device, engine: TensorRtEngine) -> None:
    """Batches in threads on one engine do not see each other."""
    pipe = Pipeline(device.bundle, engine)
    expected = {seed: pipe([seed], seed, **SETTINGS["ddpm"]) for seed in range(4)}
    found: dict[int, np.ndarray] = {}

    def sample(seed: int) -> None:
        found[seed] = pipe([seed], seed, **SETTINGS["ddpm"])

    threads = [threading.Thread(target=sample, args=(seed,)) for seed in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(found[seed], expected[seed]) for seed in expected)


def test_memory_is_given_back(device: Device) -> None:
    """Engines that are closed leave nothing on the device but what CUDA keeps for the process, however many."""
    with device.engine() as warm:
        Pipeline(device.bundle, warm)([1], **SETTINGS["ddim"])
    before = device.cuda.read_device().free_bytes
    for _ in range(5):
        with device.engine() as engine:
            Pipeline(device.bundle, engine)([1, 2], **SETTINGS["ddim"])
    after = device.cuda.read_device().free_bytes
    print(f"free before {before}, after {after}")
    assert before - after <= KEPT_BYTES
    if not device.cuda.read_device().integrated:  # there the system takes and gives meanwhile
        assert before - after <= 8 << 20


def test_an_altered_plan_is_refused(device: Device, tmp_path: Path) -> None:
    """A plan that is not what was built is never given to the library."""
    for file in device.stored.folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    plan = tmp_path / device.stored.graphs["step"].plan
    plan.write_bytes(plan.read_bytes()[:-1] + b"?")
    stored = replace(device.stored, folder=tmp_path)
    with (
        TensorRtEngine(device.bundle, stored, device.library, device.cuda) as engine,
        pytest.raises(EngineError, match="altered"),
    ):
        Pipeline(device.bundle, engine)([1], **SETTINGS["ddim"])
