"""What the checks on a device have in common: an engine without its resident loop, and the time of a step."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import numpy as np

from dit_runtime import Pipeline
from dit_runtime.backends.base import Session
from dit_runtime.backends.conditioning import TableLimits
from dit_runtime.backends.host_loop import HostLoop
from dit_runtime.backends.tensorrt.engine import TensorRtEngine
from dit_runtime.sampling.batch import Batch


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


def latents_of(pipe: Pipeline, labels: list[Any], **settings: Any) -> list[np.ndarray]:
    """Latents and denoised estimate after each step."""
    return [value for _, *values in pipe.trajectory(labels, 5, **settings) for value in values]


def time_steps(engine: TensorRtEngine, batch: int, steps: int = 50, **settings: Any) -> dict[str, float]:
    """How long a step of the loop takes.

    Args:
        engine: open.
        batch: images.
        steps: to be timed, besides the first two and the last.
        settings: of the pipeline.

    Returns:
        step_p50_ms, step_p95_ms: from the call of a step to its end, with nothing queued before it.
        host_us: the part of it until the call returns.
        running_ms: a step of a loop that is not waited for.
        graph_ms, launch_gap_us: where steps are captured, the CUDA graph alone, launched again and again; and by how
            much a step of the loop takes longer than that.
    """
    manifest, device = engine.bundle.manifest, engine.device
    pipe = Pipeline(engine.bundle, engine)
    images = pipe.prepare([index % manifest.model.classes for index in range(batch)], steps=steps + 3, **settings)
    pipe.sample_latents(images)
    host, whole = [], []
    with Batch(engine, manifest) as waited:
        waited.add(list(enumerate(images)))
        for _ in range(steps + 2):
            start = time.perf_counter()
            waited.advance()
            queued = time.perf_counter()
            device.cuda.synchronize(device.stream)
            whole.append(time.perf_counter() - start)
            host.append(queued - start)
    with Batch(engine, manifest) as running:
        running.add(list(enumerate(images)))
        for index in range(steps + 2):
            if index == 2:
                device.cuda.synchronize(device.stream)
                start = time.perf_counter()
            running.advance()
        device.cuda.synchronize(device.stream)
        each = (time.perf_counter() - start) / steps
    found = {
        "step_p50_ms": np.quantile(whole[2:], 0.5) * 1e3,
        "step_p95_ms": np.quantile(whole[2:], 0.95) * 1e3,
        "host_us": np.median(host[2:]) * 1e6,
        "running_ms": each * 1e3,
    }
    prepared = engine._loops[-1]._graphs._prepared
    graph = list(prepared.values())[-1].graph if prepared else None
    if graph is not None:
        start = time.perf_counter()
        for _ in range(steps):
            device.cuda.launch(graph, device.stream)
        device.cuda.synchronize(device.stream)
        alone = (time.perf_counter() - start) / steps
        found |= {"graph_ms": alone * 1e3, "launch_gap_us": (each - alone) * 1e6}
    return {name: round(float(value), 4) for name, value in found.items()}
