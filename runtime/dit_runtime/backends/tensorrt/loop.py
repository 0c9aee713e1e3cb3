"""The sampling loop on a device: latents, noise, coefficients, guidance, rows and conditioning table stay there.

The device is never left without work until an image is finished or its latents are read. The host queues at most two
steps ahead of it, so that progress is what it seems and an interrupt ends soon. The small inputs of a step are copied
to the address that its graph reads: on the device, from a whole run's inputs that were uploaded once, or else from
pinned memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from dit_runtime.backends.base import Int32, RunInputs
from dit_runtime.backends.conditioning import ConditioningTable, TableLimits
from dit_runtime.backends.profiles import Fit, shapes_of_tensors
from dit_runtime.backends.step import STATE_SLOTS
from dit_runtime.backends.tensorrt.buffers import (
    DeviceBuffer,
    Layout,
    PinnedBuffer,
    Staging,
    put,
)
from dit_runtime.backends.tensorrt.conditioning import DeviceTable
from dit_runtime.backends.tensorrt.device import Device
from dit_runtime.backends.tensorrt.graphs import StepGraphs
from dit_runtime.core.errors import EngineError, SamplingError
from dit_runtime.samplers.noise import Float32

FLOAT32 = np.dtype(np.float32)
SMALL = ("coefficients", "guidance", "rows")  # inputs of the step that change in every call and lie together


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

    def __init__(
        self, device: Device, limits: TableLimits, closed: Callable[[DeviceLoop], None], captured: bool = True
    ) -> None:
        self._device, self.limits, self._closed = device, limits, closed
        model = device.manifest.model
        self._image = (model.latent_channels, *model.latent_size)
        ranges = device.profiles_of("step").ranges()
        self._most = max(each.largest[0] for each in ranges)
        self._image_bytes = size = FLOAT32.itemsize * math.prod(self._image)
        self._widest = self._layout_of(self._most, max(each.largest[1] for each in ranges))
        cuda, stream = device.cuda, device.stream
        buffers = Layout(
            {
                "state": ((self._most, STATE_SLOTS, *self._image), FLOAT32),
                "noise": ((self._most, *self._image), FLOAT32),
                "next_state": ((self._most, STATE_SLOTS, *self._image), FLOAT32),
                "denoised": ((self._most, *self._image), FLOAT32),
                "inputs": ((self._widest.size,), np.dtype(np.uint8)),
            }
        )
        self._buffers, self._staging = DeviceBuffer(cuda, stream, device.make_room), Staging(cuda, stream)
        self._results = PinnedBuffer(cuda, stream)
        self._inputs: RunInputs | None = None
        self._rows, self._rows_host = DeviceBuffer(cuda, stream, device.make_room), PinnedBuffer(cuda, stream)
        self._memory = DeviceTable(device, limits)
        self.table = ConditioningTable(self._memory, limits.table_bytes)
        self._at: dict[str, int] = {}
        self._graphs = StepGraphs(device, self._memory, self._at, captured)
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

    def add(self, latents: Float32) -> None:
        """As ``Steps.join``."""
        device, cuda, stream = self._device, self._device.cuda, self._device.stream
        with device.lock:
            device.running = None
            device.check_memory(self._count + len(latents))
            count, size = len(latents), self._image_bytes
            assert self._count + count <= self._most  # the pipeline has checked
            first = self._at["state"] + self._count * STATE_SLOTS * size
            cuda.clear(first, count * STATE_SLOTS * size, stream)
            cuda.clear(self._at["noise"], self._most * size, stream)
            memory = self._staging.take()
            views = memory[: count * size].view(np.float32).reshape(latents.shape)
            views[...] = latents
            for index, view in enumerate(views):
                cuda.upload(first + index * STATE_SLOTS * size, view, stream)
            self._staging.mark_sent()
            self._count += count

    def keep(self, positions: Sequence[int]) -> None:
        """As ``Steps.leave``."""
        device, size = self._device, self._image_bytes
        with device.lock:
            for place, index in enumerate(positions):
                if place != index:
                    for name, each in (("state", STATE_SLOTS * size), ("noise", size)):
                        target, source = self._at[name] + place * each, self._at[name] + index * each
                        device.cuda.copy(target, source, each, device.stream)
            self._count = len(positions)

    def run_row(self, inputs: RunInputs, row: int, noise: Float32 | None) -> DeviceStepResult:
        """As ``Steps.planned``: the inputs of all rows are uploaded once, and copied on the device from then on."""
        device, cuda, stream = self._device, self._device.cuda, self._device.stream
        with device.lock:
            if inputs is not self._inputs:
                self._upload(inputs)
            fit, layout = self._find_fit(self._count, inputs.needed[row])
            memory = self._staging.take()
            cuda.copy(self._at["inputs"], self._rows.address + row * self._widest.size, layout.size, stream)
            if noise is not None:
                self._upload_noise(memory, noise, range(self._count))
            return self._advance(fit, layout)

    def run_step(
        self, coefficients: Float32, guidance: Float32, rows: Int32, noise: Float32 | None, drawing: Sequence[int]
    ) -> DeviceStepResult:
        """As ``Loop.run_step``."""
        device = self._device
        with device.lock:
            fit, layout = self._find_fit(self._count, len(guidance))
            memory = self._staging.take()
            values = {"coefficients": coefficients, "guidance": guidance, "rows": rows}
            for name, value in values.items():
                put(layout[name].view(memory), value)
            device.cuda.upload(self._at["inputs"], memory[: layout.size], device.stream)
            if noise is not None:
                self._upload_noise(memory, noise, drawing)
            return self._advance(fit, layout)

    def read(self, count: int, number: int) -> tuple[Float32, Float32]:
        """``state`` and ``denoised`` of the call with that number, which must be the last.

        Raises:
            SamplingError: another call came after it.
        """
        device, cuda, stream = self._device, self._device.cuda, self._device.stream
        with device.lock:
            if number != self._number:
                raise SamplingError("latents of a step before the last are no longer on the device; read them in time")
            layout = Layout(
                {
                    "next_state": ((count, STATE_SLOTS, *self._image), FLOAT32),
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
        with self._device.lock:
            try:
                self._device.cuda.synchronize(self._device.stream)  # a step that was interrupted may have left copies
            finally:
                self._count, self._inputs, self._number = 0, None, self._number + 1
                self._closed(self)

    def drop_graphs(self) -> None:
        """Give back what holds the step's weights. It is made again when the batch goes on."""
        self._graphs.free()

    def free(self) -> None:
        """Give everything on the device back."""
        self._graphs.free()
        for memory in (self._buffers, self._staging, self._results, self._rows, self._rows_host, self._memory):
            memory.free()

    def _layout_of(self, batch: int, branches: int) -> Layout:
        """How a step's small inputs lie together, to be copied at once."""
        inputs = {tensor.name: tensor for tensor in self._device.manifest.graphs["step"].inputs}
        shapes = shapes_of_tensors((inputs[name] for name in SMALL), {"batch": batch, "branches": branches})
        return Layout({name: (shape, np.dtype(inputs[name].dtype)) for name, shape in shapes.items()})

    def _find_fit(self, batch: int, branches: int) -> tuple[Fit, Layout]:
        """The profile for so many images and branches, and how the small inputs lie in it."""
        key = (batch, branches, self._memory.moves)
        if key not in self._fits:
            sizes = {"batch": batch, "branches": branches, "rows": self._memory.shape[0]}
            fit = self._device.find_fit("step", shapes_of_tensors(self._device.manifest.graphs["step"].inputs, sizes))
            self._fits[key] = fit, self._layout_of(fit.shapes["rows"][1], fit.shapes["rows"][0])
        return self._fits[key]

    def _upload(self, inputs: RunInputs) -> None:
        """The inputs of all rows to the device, each laid out as its step reads it."""
        device, stride, count = self._device, self._widest.size, len(inputs.coefficients)
        size = stride * count
        device.cuda.synchronize(device.stream)  # the inputs before
        memory = self._rows_host.reserve(size)[:size].reshape(count, stride)
        self._rows.reserve(size)
        for row, branches in enumerate(inputs.needed):
            _, layout = self._find_fit(self._count, branches)
            values: Mapping[str, Any] = {
                "coefficients": inputs.coefficients[row],
                "guidance": inputs.guidance[row, :branches],
                "rows": inputs.rows[row, :branches],
            }
            for name, value in values.items():
                put(layout[name].view(memory[row]), value)
        device.cuda.upload(self._rows.address, memory.reshape(-1), device.stream)
        self._inputs = inputs

    def _upload_noise(self, memory: Any, noise: Float32, places: Sequence[int]) -> None:
        """Noise ``[N, C, H, W]`` of these places, through staged memory."""
        device, size, first = self._device, self._image_bytes, self._widest.size
        views = memory[first : first + noise.nbytes].view(np.float32).reshape(noise.shape)
        views[...] = noise
        if len(places) == self._count:
            device.cuda.upload(self._at["noise"], views, device.stream)
            return
        for place, view in zip(places, views, strict=True):
            device.cuda.upload(self._at["noise"] + place * size, view, device.stream)

    def _advance(self, fit: Fit, layout: Layout) -> DeviceStepResult:
        """Queue the step. What it reads is queued already, of it what is staged since the last ``take``."""
        self._memory.settle()
        self._graphs.launch(fit, layout)
        self._staging.mark_sent()
        self._number += 1
        return DeviceStepResult(self, self._count, self._number)
