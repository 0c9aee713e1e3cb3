"""The sampling loop on a device: latents, noise, coefficients, guidance, rows and conditioning table stay there.

The device is never left without work until an image is finished or its latents are read. The host queues at most two
steps ahead of it, so that progress is what it seems and an interrupt ends soon. The small inputs of a step are copied
to the address that its graph reads: on the device, from a plan that was uploaded once, or else from pinned memory.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dit_runtime.backends.host_loop import ConditioningTable, Int32, RunInputs
from dit_runtime.backends.tensorrt.buffers import (
    DeviceBuffer,
    Layout,
    PinnedBuffer,
    Staging,
    put,
)
from dit_runtime.backends.tensorrt.conditioning import DeviceTable
from dit_runtime.backends.tensorrt.graphs import StepGraphs
from dit_runtime.core.errors import EngineError, SamplingError
from dit_runtime.samplers.noise import Float32
from dit_runtime.samplers.schedule import COEFFICIENTS

if TYPE_CHECKING:
    from dit_runtime.backends.tensorrt.engine import TensorRtEngine
    from dit_runtime.backends.tensorrt.session import Fit

FLOAT32, INT32 = np.dtype(np.float32), np.dtype(np.int32)


class DeviceStepResult:
    """What a call of the step gave, on the device until it is read."""

    at_hand = False

    def __init__(self, steps: DeviceLoop, count: int, number: int) -> None:
        self._steps, self._count, self._number = steps, count, number
        self._values: tuple[Float32, Float32] | None = None

    @property
    def state(self) -> Float32:
        return self._read()[0]

    @property
    def denoised(self) -> Float32:
        return self._read()[1]

    def _read(self) -> tuple[Float32, Float32]:
        if self._values is None:
            self._values = self._steps.read(self._count, self._number)
        return self._values


class DeviceLoop:
    """``Steps`` on a device, for one batch at a time. Its table and graphs outlast the batch."""

    looks_ahead = True

    def __init__(self, engine: TensorRtEngine, table_bytes: int, conditioner_bytes: int) -> None:
        self._engine, self.bounds = engine, (table_bytes, conditioner_bytes)
        model = engine.bundle.manifest.model
        self._image = (model.latent_channels, *model.latent_size)
        largest = [shape for _, _, shape in engine.profiles("step")]
        self._most = max(batch for batch, _ in largest)
        self._image_bytes = size = FLOAT32.itemsize * math.prod(self._image)
        self._widest = self._block(self._most, max(branches for _, branches in largest))
        cuda, stream = engine.cuda, engine.stream
        buffers = Layout(
            {
                "state": ((self._most, 3, *self._image), FLOAT32),
                "noise": ((self._most, *self._image), FLOAT32),
                "next_state": ((self._most, 3, *self._image), FLOAT32),
                "denoised": ((self._most, *self._image), FLOAT32),
                "inputs": ((self._widest.size,), np.dtype(np.uint8)),
            }
        )
        self._buffers, self._staging = DeviceBuffer(cuda, stream, engine.room), Staging(cuda, stream)
        self._results = PinnedBuffer(cuda, stream)
        self._plan: RunInputs | None = None
        self._planned, self._plan_host = DeviceBuffer(cuda, stream, engine.room), PinnedBuffer(cuda, stream)
        self._memory = DeviceTable(engine, table_bytes, conditioner_bytes)
        self.table = ConditioningTable(self._memory, table_bytes)
        self._at: dict[str, int] = {}
        self._graphs = StepGraphs(engine, self._memory, self._at)
        self._fits: dict[tuple[int, int, int], tuple[Fit, Layout]] = {}
        self._count = self._number = 0
        try:
            self._buffers.reserve(buffers.size)
            self._staging.reserve(self._widest.size + self._most * size)
            # Places without an image are computed too, where a profile begins at more images than there are.
            cuda.clear(self._buffers.address, buffers.size, stream)
        except EngineError:
            self.free()
            raise
        self._at.update({name: self._buffers.address + place.offset for name, place in buffers.regions.items()})

    @property
    def graphs(self) -> list[tuple[int, int]]:
        """(batch, branches) of the steps that are ready."""
        return self._graphs.ready

    def join(self, latents: Float32) -> None:
        """As ``Steps.join``."""
        engine, cuda, stream = self._engine, self._engine.cuda, self._engine.stream
        with engine.lock:
            engine.running = None
            engine.check_memory(self._count + len(latents))
            count, size = len(latents), self._image_bytes
            assert self._count + count <= self._most  # the pipeline has checked
            first = self._at["state"] + self._count * 3 * size
            cuda.clear(first, count * 3 * size, stream)
            cuda.clear(self._at["noise"], self._most * size, stream)
            memory = self._staging.take()
            views = memory[: count * size].view(np.float32).reshape(latents.shape)
            views[...] = latents
            for index, view in enumerate(views):
                cuda.upload(first + index * 3 * size, view, stream)
            self._staging.sent()
            self._count += count

    def leave(self, kept: Sequence[int]) -> None:
        """As ``Steps.leave``."""
        engine, size = self._engine, self._image_bytes
        with engine.lock:
            for place, index in enumerate(kept):
                if place != index:
                    for name, each in (("state", 3 * size), ("noise", size)):
                        target, source = self._at[name] + place * each, self._at[name] + index * each
                        engine.cuda.copy(target, source, each, engine.stream)
            self._count = len(kept)

    def run_planned(self, plan: RunInputs, row: int, noise: Float32 | None) -> DeviceStepResult:
        """As ``Steps.planned``: the plan's rows are uploaded once, and copied on the device from then on."""
        engine, cuda, stream = self._engine, self._engine.cuda, self._engine.stream
        with engine.lock:
            if plan is not self._plan:
                self._upload(plan)
            fit, layout = self._fit(self._count, plan.needed[row])
            memory = self._staging.take()
            cuda.copy(self._at["inputs"], self._planned.address + row * self._widest.size, layout.size, stream)
            if noise is not None:
                self._upload_noise(memory, noise, range(self._count))
            return self._advance(fit, layout)

    def once(
        self, coefficients: Float32, weights: Float32, rows: Int32, noise: Float32 | None, drawing: Sequence[int]
    ) -> DeviceStepResult:
        """As ``Steps.once``."""
        engine = self._engine
        with engine.lock:
            fit, layout = self._fit(self._count, len(weights))
            memory = self._staging.take()
            values = {"coefficients": coefficients, "guidance": weights, "rows": rows}
            for name, value in values.items():
                put(layout[name].view(memory), value)
            engine.cuda.upload(self._at["inputs"], memory[: layout.size], engine.stream)
            if noise is not None:
                self._upload_noise(memory, noise, drawing)
            return self._advance(fit, layout)

    def read(self, count: int, number: int) -> tuple[Float32, Float32]:
        """``state`` and ``denoised`` of the call with that number, which must be the last.

        Raises:
            SamplingError: another call came after it.
        """
        engine, cuda, stream = self._engine, self._engine.cuda, self._engine.stream
        with engine.lock:
            if number != self._number:
                raise SamplingError("latents of a step before the last are no longer on the device; read them in time")
            layout = Layout(
                {
                    "next_state": ((count, 3, *self._image), FLOAT32),
                    "denoised": ((count, *self._image), FLOAT32),
                }
            )
            memory = self._results.reserve(layout.size)
            views = {name: place.view(memory) for name, place in layout.regions.items()}
            for name, view in views.items():
                cuda.download(view, self._at[name], stream)
            cuda.synchronize(stream)
            return views["next_state"].copy(), views["denoised"].copy()

    def close(self) -> None:
        """As ``Steps.close``: what is on the device is for the next batch."""
        with self._engine.lock:
            try:
                self._engine.cuda.synchronize(self._engine.stream)  # a step that was interrupted may have left copies
            finally:
                self._count, self._plan, self._number = 0, None, self._number + 1
                self._engine.give_back(self)

    def drop_graphs(self) -> None:
        """Give back what holds the step's weights. It is made again when the batch goes on."""
        self._graphs.free()

    def free(self) -> None:
        """Give everything on the device back."""
        self._graphs.free()
        for memory in (self._buffers, self._staging, self._results, self._planned, self._plan_host, self._memory):
            memory.free()

    def _block(self, batch: int, branches: int) -> Layout:
        """How a step's small inputs lie together, to be copied at once."""
        return Layout(
            {
                "coefficients": ((batch, COEFFICIENTS), FLOAT32),
                "guidance": ((branches, batch, self._image[0]), FLOAT32),
                "rows": ((branches, batch), INT32),
            }
        )

    def _fit(self, batch: int, branches: int) -> tuple[Fit, Layout]:
        """The profile for so many images and branches, and how the small inputs lie in it."""
        key = (batch, branches, self._memory.moves)
        if key not in self._fits:
            shapes = {
                "state": (batch, 3, *self._image),
                "noise": (batch, *self._image),
                "coefficients": (batch, COEFFICIENTS),
                "guidance": (branches, batch, self._image[0]),
                "rows": (branches, batch),
                self._engine.bundle.manifest.table.name: self._memory.shape,
            }
            fit = self._engine.fit("step", shapes)
            self._fits[key] = fit, self._block(fit.shapes["rows"][1], fit.shapes["rows"][0])
        return self._fits[key]

    def _upload(self, plan: RunInputs) -> None:
        """All rows of a plan to the device, each laid out as its step reads it."""
        engine, stride, count = self._engine, self._widest.size, len(plan.coefficients)
        size = stride * count
        engine.cuda.synchronize(engine.stream)  # the plan before
        memory = self._plan_host.reserve(size)[:size].reshape(count, stride)
        self._planned.reserve(size)
        for row, branches in enumerate(plan.needed):
            _, layout = self._fit(self._count, branches)
            values: Mapping[str, Any] = {
                "coefficients": plan.coefficients[row],
                "guidance": plan.weights[row, :branches],
                "rows": plan.rows[row, :branches],
            }
            for name, value in values.items():
                put(layout[name].view(memory[row]), value)
        engine.cuda.upload(self._planned.address, memory.reshape(-1), engine.stream)
        self._plan = plan

    def _upload_noise(self, memory: Any, noise: Float32, places: Sequence[int]) -> None:
        """Noise ``[N, C, H, W]`` of these places, through staged memory."""
        engine, size, first = self._engine, self._image_bytes, self._widest.size
        views = memory[first : first + noise.nbytes].view(np.float32).reshape(noise.shape)
        views[...] = noise
        if len(places) == self._count:
            engine.cuda.upload(self._at["noise"], views, engine.stream)
            return
        for place, view in zip(places, views, strict=True):
            engine.cuda.upload(self._at["noise"] + place * size, view, engine.stream)

    def _advance(self, fit: Fit, layout: Layout) -> DeviceStepResult:
        """Queue the step. What it reads is queued already, of it what is staged since the last ``take``."""
        self._memory.settle()
        self._graphs.launch(fit, layout)
        self._staging.sent()
        self._number += 1
        return DeviceStepResult(self, self._count, self._number)
