"""On a device, with a driver and TensorRT: what ``test_device`` shows on the double, on the real thing.

    make gpu-test                                                       # with a first run, and one folder of all found
    DIT_BUNDLE=my.bundle python -m pytest -m gpu tests/runtime/backends/test_gpu.py

``DIT_BUNDLE`` is a bundle of a diffusion model; without it a tiny model is exported, with PyTorch. Nothing else here
imports PyTorch or ONNX Runtime. ``DIT_GPU=1`` makes a failure of what would be skipped.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.batches import mixed
from support.commands import run_command
from support.device import SessionsOnly, latents_of, time_steps

from dit_runtime import Pipeline, open_bundle
from dit_runtime.backends.tensorrt import api as tensorrt_api
from dit_runtime.backends.tensorrt import cuda
from dit_runtime.backends.tensorrt.engine import TensorRtEngine
from dit_runtime.backends.tensorrt.store import StoredEngine, read_engines
from dit_runtime.bundle.reader import Bundle
from dit_runtime.core.errors import EngineError
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
TIMED_STEPS = 50


class Device:
    """A GPU, its library, and a bundle with engines built for it."""

    def __init__(
        self, library: tensorrt_api.TensorRT, bundle: Bundle, stored: StoredEngine, gpu: cuda.Cuda | None = None
    ) -> None:
        self.library, self.bundle, self.stored = library, bundle, stored
        self.cuda = gpu or cuda.CudaRuntime()

    def engine(self, **options: Any) -> TensorRtEngine:
        return TensorRtEngine(self.bundle, self.stored, self.library, self.cuda, **options)


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


@pytest.fixture(scope="module", params=[os.environ["DIT_BUNDLE"]] if "DIT_BUNDLE" in os.environ else ["fp32", "fp16"])
def device(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Device:
    """The bundle, built here by the command itself."""
    library = present_library()
    path = Path(request.param) if "DIT_BUNDLE" in os.environ else request.getfixturevalue("bundles")[request.param]
    several = library.name == "tensorrt_rtx" or library.numbers >= (10, 8)
    store = tmp_path_factory.mktemp("store")
    if "DIT_GPU_STORE" in os.environ:  # its texts are kept whatever happens here
        store = Path(os.environ["DIT_GPU_STORE"]) / path.stem
    options = ["--batch", "1,4" if several else "4", "--branches", "1,2,3", "--rows", "128", "--store", store]
    done = run_command("dit-build", path, "--target", "this", *options)
    print(done.stderr + done.stdout)  # the doubts of the audit too
    assert done.returncode == 0, done.stderr + done.stdout
    bundle = open_bundle(path)
    (stored,) = read_engines(bundle, store)
    return Device(library, bundle, stored)


@pytest.fixture
def engine(device: Device) -> Iterator[TensorRtEngine]:
    with device.engine() as engine:
        yield engine


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


def test_a_replayed_decoder_is_the_decoder(device: Device, engine: TensorRtEngine) -> None:
    """The decoder's graph, from the second call of a batch on, gives the images of the first call."""
    model = device.bundle.manifest.model
    latents = np.random.default_rng(0).standard_normal((3, model.latent_channels, *model.latent_size), np.float32)
    session = engine.session("decoder")
    first = {count: session.run({"latents": latents[:count]}, ["images", "decoded"]) for count in (1, 3)}
    for count in (1, 3, 1, 3):
        for found, same in zip(
            session.run({"latents": latents[:count]}, ["images", "decoded"]), first[count], strict=True
        ):
            assert np.array_equal(found, same)


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


def test_the_time_of_a_step(device: Device, engine: TensorRtEngine) -> None:
    """Printed and kept, not judged: p50 and p95 of a step, and how long the device waits for the host."""
    found = {}
    for batch in (1, min(4, engine.info.batch_of(4))):
        for name, guidance in (("guided", 4.0), ("plain", 1.0)):
            found[f"batch {batch}, {name}"] = time_steps(engine, batch, TIMED_STEPS, sampler="ddim", guidance=guidance)
    with device.engine(captured=False) as queued:
        found["batch 1, guided, without CUDA graphs"] = time_steps(queued, 1, TIMED_STEPS, sampler="ddim", guidance=4.0)
    for name, times in found.items():
        print(f"{name}: {times}")
    if "DIT_GPU_REPORT" in os.environ:
        file = Path(os.environ["DIT_GPU_REPORT"], f"speed-{device.bundle.path.stem}.json")
        file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    assert all(times["step_p95_ms"] > 0 for times in found.values())
