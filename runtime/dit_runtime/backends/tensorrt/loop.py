"""The sampling loop on a device: latents, noise, coefficients, guidance, rows and conditioning table stay there.

The device always has queued work, until an image is finished or latents are read. The host queues at most two steps
ahead of the device, so that the progress bar is right and an interrupt ends soon. The small inputs of a step are copied
to the addresses that its CUDA graph reads. For a run, the inputs of all steps are uploaded once, and copied within the
device. Otherwise they are copied from pinned memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from dit_runtime.backends.base import Int32, RunInputs
from dit_runtime.backends.conditioning import ConditioningTable, TableLimits
from dit_runtime.backends.profiles import Fit, shapes_of_tensors
from dit_runtime.backends.step import STATE_SLOTS, refuse_earlier_step
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
from dit_runtime.core.errors import EngineError
from dit_runtime.samplers.noise import Float32

FLOAT32 = np.dtype(np.float32)
SMALL = ("coefficients", "guidance", "rows")  # the step's inputs that change in every call; they share one layout


class DeviceStepResult:
    """``StepResult`` on the device. Reading it copies ``count`` images to the host.

    ``number`` counts the loop's steps. Only the result of the last step can be read.
    """

    at_hand = False

    def __init__(self, loop: DeviceLoop, count: int, number: int) -> None:
        self._loop, self._count, self._number = loop, count, number
        self._values: tuple[Float32, Float32] | None = None

    @property
    def state(self) -> Float32:
        return self._read()[0]

    @property
    def denoised(self) -> Float32:
        return self._read()[1]

    def _read(self) -> tuple[Float32, Float32]:
        if self._values is None:
            self._values = self._loop.read(self._count, self._number)
        return self._values


class DeviceLoop:
    """``base.Loop`` on a device, for one batch at a time. Its conditioning table and CUDA graphs outlast the batch.

    Args:
        device: that runs the step and the conditioner.
        limits: of the conditioning table's memory.
        closed: called with this loop when its batch is over.
        captured: whether the steps are captured as CUDA graphs.
    """

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
            # A profile may begin at more images than there are. The positions without an image are computed too.
            cuda.clear(self._buffers.address, buffers.size, stream)
        except EngineError:
            self.free()
            raise
        self._at.update({name: self._buffers.address + region.offset for name, region in buffers.regions.items()})

    @property
    def graphs(self) -> list[tuple[int, int]]:
        """(batch, branches) of the steps that are prepared."""
        return self._graphs.ready

    def add(self, latents: Float32) -> None:
        """As ``Loop.add``."""
        device, cuda, stream = self._device, self._device.cuda, self._device.stream
        with device.lock:
            device.running = None
            device.check_memory(self._count + len(latents))
            count, size = len(latents), self._image_bytes
            assert self._count + count <= self._most  # Pipeline.check_batch made sure of it
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
        """As ``Loop.keep``."""
        device, size = self._device, self._image_bytes
        with device.lock:
            for position, index in enumerate(positions):
                if position != index:
                    for name, each in (("state", STATE_SLOTS * size), ("noise", size)):
                        target, source = self._at[name] + position * each, self._at[name] + index * each
                        device.cuda.copy(target, source, each, device.stream)
            self._count = len(positions)

    def run_row(self, inputs: RunInputs, row: int, noise: Float32 | None) -> DeviceStepResult:
        """As ``Loop.run_row``. The inputs of all rows are uploaded at the first call, and then copied on the device."""
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
        """Copy ``state [B, 3, C, H, W]`` and ``denoised [B, C, H, W]`` of the last step to the host.

        Args:
            count: images B.
            number: of the step; it must be the last one.

        Raises:
            SamplingError: the step is not the last one.
        """
        device, cuda, stream = self._device, self._device.cuda, self._device.stream
        with device.lock:
            if number != self._number:
                refuse_earlier_step()
            layout = Layout(
                {
                    "next_state": ((count, STATE_SLOTS, *self._image), FLOAT32),
                    "denoised": ((count, *self._image), FLOAT32),
                }
            )
            memory = self._results.reserve(layout.size)
            views = {name: region.view(memory) for name, region in layout.regions.items()}
            for name, view in views.items():
                cuda.download(view, self._at[name], stream)
            cuda.synchronize(stream)
            return views["next_state"].copy(), views["denoised"].copy()

    def close(self) -> None:
        """As ``Loop.close``. The device memory is kept for the next batch."""
        with self._device.lock:
            try:
                self._device.cuda.synchronize(self._device.stream)  # an interrupted step may have left queued copies
            finally:
                self._count, self._inputs, self._number = 0, None, self._number + 1
                self._closed(self)

    def drop_graphs(self) -> None:
        """Free the CUDA graphs, which refer to the step's weights. They are made again in the batch's next step."""
        self._graphs.free()

    def free(self) -> None:
        """Free all memory of the loop."""
        self._graphs.free()
        for memory in (self._buffers, self._staging, self._results, self._rows, self._rows_host, self._memory):
            memory.free()

    def _layout_of(self, batch: int, branches: int) -> Layout:
        """The layout of a step's small inputs in one block, which is copied as a whole."""
        inputs = {tensor.name: tensor for tensor in self._device.manifest.graphs["step"].inputs}
        shapes = shapes_of_tensors((inputs[name] for name in SMALL), {"batch": batch, "branches": branches})
        return Layout({name: (shape, np.dtype(inputs[name].dtype)) for name, shape in shapes.items()})

    def _find_fit(self, batch: int, branches: int) -> tuple[Fit, Layout]:
        """Find the step's profile for a batch, and the layout of the small inputs in that profile's shapes."""
        key = (batch, branches, self._memory.moves)
        if key not in self._fits:
            sizes = {"batch": batch, "branches": branches, "rows": self._memory.shape[0]}
            fit = self._device.find_fit("step", shapes_of_tensors(self._device.manifest.graphs["step"].inputs, sizes))
            self._fits[key] = fit, self._layout_of(fit.shapes["rows"][1], fit.shapes["rows"][0])
        return self._fits[key]

    def _upload(self, inputs: RunInputs) -> None:
        """Upload the small inputs of all rows of a run, each in the layout of its step."""
        device, stride, count = self._device, self._widest.size, len(inputs.coefficients)
        size = stride * count
        device.cuda.synchronize(device.stream)  # until the inputs of the run before are uploaded
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

    def _upload_noise(self, memory: Any, noise: Float32, positions: Sequence[int]) -> None:
        """Upload noise ``[N, C, H, W]`` of the images at these positions, through pinned memory."""
        device, size, first = self._device, self._image_bytes, self._widest.size
        views = memory[first : first + noise.nbytes].view(np.float32).reshape(noise.shape)
        views[...] = noise
        if len(positions) == self._count:
            device.cuda.upload(self._at["noise"], views, device.stream)
            return
        for position, view in zip(positions, views, strict=True):
            device.cuda.upload(self._at["noise"] + position * size, view, device.stream)

    def _advance(self, fit: Fit, layout: Layout) -> DeviceStepResult:
        """Queue the step. The copies of its inputs are queued already, some of them from the staged memory."""
        self._memory.settle()
        self._graphs.launch_step(fit, layout)
        self._staging.mark_sent()
        self._number += 1
        return DeviceStepResult(self, self._count, self._number)
