"""The conditioning table on a device: the conditioner writes its rows there, and is then freed."""

from __future__ import annotations

import math
from collections.abc import Sequence

from dit_runtime.backends.conditioning import Condition, TableLimits, bytes_of_row, inputs_from_conditions
from dit_runtime.backends.tensorrt.buffers import (
    DeviceBuffer,
    Layout,
    PinnedBuffer,
    put,
)
from dit_runtime.backends.tensorrt.cuda import ALIGNMENT
from dit_runtime.backends.tensorrt.device import Device


class DeviceTable:
    """The rows of a conditioning table in device memory.

    The conditioner's weights are freed before the next step. If the conditioner was loaded a second time, its weights
    stay on the device while there is room.
    """

    def __init__(self, device: Device, limits: TableLimits) -> None:
        spec = device.manifest.table
        self._device, self._name, self._row = device, spec.name, bytes_of_row(spec)
        self.granule = ALIGNMENT // math.gcd(ALIGNMENT, self._row)
        largest = min(device.profiles_of("step").largest_sizes("rows"))
        at_once = device.profiles_of("conditioner").largest_batch
        self.capacity = max(1, min(limits.table_bytes // self._row, largest))
        chunk = max(1, min(limits.conditioner_bytes // self._row, at_once))
        self._chunk = max(chunk // self.granule, 1) * self.granule
        self._memory = DeviceBuffer(device.cuda, device.stream, device.make_room)
        self._inputs = DeviceBuffer(device.cuda, device.stream, device.make_room)
        self._host = PinnedBuffer(device.cuda, device.stream)

    @property
    def address(self) -> int:
        return self._memory.address

    @property
    def moves(self) -> int:
        """How often the address has changed."""
        return self._memory.moves

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the whole memory. Rows that are not computed are part of it: the step does not read them."""
        _, *rest = self._device.manifest.table.shape
        return (self._memory.size // self._row, *(int(axis) for axis in rest))

    def fill(self, conditions: Sequence[Condition], first: int) -> None:
        """As ``TableMemory.fill``."""
        device = self._device
        with device.lock:
            end, room = first + len(conditions), self._memory.size // self._row
            device.running = "conditioner"
            if end > room:
                size = min(self.capacity, max(end, 2 * room)) * self._row
                self._memory.reserve(size, keep=min(first, room) * self._row)
            for start in range(0, len(conditions), self._chunk):
                self._compute(conditions[start : start + self._chunk], first + start)

    def _compute(self, conditions: Sequence[Condition], first: int) -> None:
        device, cuda, stream = self._device, self._device.cuda, self._device.stream
        cuda.synchronize(stream)  # the call before uses the same context, inputs and pinned memory
        values = inputs_from_conditions(conditions)
        fit = device.find_fit("conditioner", {name: value.shape for name, value in values.items()})
        loaded = device.load("conditioner")
        context = device.context_for(loaded, fit.profile)
        device.give_activations(context, loaded, fit.profile)
        layout = Layout({name: (value.shape, value.dtype) for name, value in values.items()})
        self._inputs.reserve(layout.size)
        host = self._host.reserve(layout.size)
        for name, value in values.items():
            region = layout[name]
            put(region.view(host), value)
            cuda.upload(self._inputs.address + region.offset, region.view(host), stream)
            context.bind(name, self._inputs.address + region.offset, region.shape)
        context.bind(self._name, self.address + first * self._row)
        device.start(context)

    def settle(self) -> None:
        """Free the conditioner's weights before the next step, unless they were loaded more than once."""
        if self._device.count_loads("conditioner") == 1:
            self._device.unload("conditioner")

    def free(self) -> None:
        """Free the memory."""
        for memory in (self._memory, self._inputs, self._host):
            memory.free()
