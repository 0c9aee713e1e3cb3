"""Memory of a device and pinned memory of the host, each with one owner that gives it back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dit_runtime.backends.tensorrt.cuda import ALIGNMENT, Bytes, Cuda
from dit_runtime.core.errors import EngineError


def align(size: int) -> int:
    """The next multiple of ``ALIGNMENT`` bytes."""
    return -(-size // ALIGNMENT) * ALIGNMENT


class Region(NamedTuple):
    """Where a tensor lies in a block of memory: its first byte, and its shape and dtype."""

    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def size(self) -> int:
        """Bytes."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    def view(self, memory: Bytes) -> NDArray[Any]:
        """The tensor in host memory that holds the block."""
        return memory[self.offset : self.offset + self.size].view(self.dtype).reshape(self.shape)


class Layout:
    """Tensors one after the other in a block of memory, each aligned. ``size`` is the block's in bytes."""

    def __init__(self, tensors: Mapping[str, tuple[tuple[int, ...], np.dtype[Any]]]) -> None:
        self.size, self.regions = 0, {}
        for name, (shape, dtype) in tensors.items():
            place = self.regions[name] = Region(self.size, tuple(shape), np.dtype(dtype))
            self.size += align(place.size)

    def __getitem__(self, name: str) -> Region:
        return self.regions[name]


def put(target: NDArray[Any], values: NDArray[Any]) -> None:
    """Write values into a tensor that may be larger, zeros after them along each axis."""
    if target.shape != values.shape:
        target[...] = 0
    target[tuple(map(slice, values.shape))] = values


class DeviceBuffer:
    """A block of device memory that grows.

    Args:
        cuda, stream: where it is, and on what its work is queued.
        room: told how many bytes are about to be taken.

    Attributes:
        moves: how often the address changed.
    """

    def __init__(self, cuda: Cuda, stream: int, room: Callable[[int], None] = lambda size: None) -> None:
        self._cuda, self._stream, self._room = cuda, stream, room
        self.address = self.size = self.moves = 0

    def reserve(self, size: int, keep: int = 0) -> None:
        """Have at least ``size`` bytes; where it has to move, the first ``keep`` bytes go along."""
        if size <= self.size:
            return
        self.moves += 1  # whether or not there is room: what was there is gone
        if not keep:
            self.free()
        self._room(size)
        address = self._cuda.allocate(size)
        if self.address:
            self._cuda.copy(address, self.address, keep, self._stream)
            self.free()
        self.address, self.size = address, size

    def free(self) -> None:
        """Give the memory back, once the stream's work is done."""
        if self.address:
            self._cuda.synchronize(self._stream)
            self._cuda.free(self.address)
            self.address = self.size = 0


class PinnedBuffer:
    """A block of pinned host memory that grows and keeps nothing when it does."""

    def __init__(self, cuda: Cuda, stream: int) -> None:
        self._cuda, self._stream = cuda, stream
        self._memory: Bytes | None = None

    def reserve(self, size: int) -> Bytes:
        """``size`` bytes or more. Wait for copies that still use it before writing to it."""
        if self._memory is None or len(self._memory) < size:
            self.free()
            self._memory = self._cuda.pinned(size)
        return self._memory

    def free(self) -> None:
        """Give the memory back, once the stream's work is done."""
        if self._memory is not None:
            self._cuda.synchronize(self._stream)
            self._cuda.free_pinned(self._memory)
            self._memory = None


class Staging:
    """Two blocks of pinned memory used in turn: while one's work is queued or running, the other is written."""

    def __init__(self, cuda: Cuda, stream: int) -> None:
        self._cuda, self._stream, self._turn = cuda, stream, 0
        self._blocks: list[tuple[Bytes, int]] = []

    def reserve(self, size: int) -> None:
        """Have the two blocks, of that size."""
        while len(self._blocks) < 2:
            event = self._cuda.event()
            try:
                self._blocks.append((self._cuda.pinned(size), event))
            except EngineError:
                self._cuda.destroy_event(event)
                raise

    def take(self) -> Bytes:
        """The block whose turn it is, once the work that reads it is done."""
        self._turn = 1 - self._turn
        memory, event = self._blocks[self._turn]
        self._cuda.wait(event)
        return memory

    def sent(self) -> None:
        """All work with the block that was taken is queued."""
        self._cuda.record(self._blocks[self._turn][1], self._stream)

    def free(self) -> None:
        """Give the memory back, once the stream's work is done."""
        self._cuda.synchronize(self._stream)
        while self._blocks:
            memory, event = self._blocks.pop()
            self._cuda.free_pinned(memory)
            self._cuda.destroy_event(event)
