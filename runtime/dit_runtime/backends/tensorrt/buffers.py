"""Device memory and pinned host memory. Each block has one owner, which frees it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dit_runtime.backends.tensorrt.cuda import ALIGNMENT, Bytes, Cuda
from dit_runtime.core.errors import EngineError


def align(size: int) -> int:
    """Round a size in bytes up to a multiple of ``ALIGNMENT``."""
    return -(-size // ALIGNMENT) * ALIGNMENT


class Region(NamedTuple):
    """A tensor's part of a memory block: its first byte, its shape and its dtype."""

    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def size(self) -> int:
        """Bytes."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    def view(self, memory: Bytes) -> NDArray[Any]:
        """The tensor as a view of host memory that holds the block."""
        return memory[self.offset : self.offset + self.size].view(self.dtype).reshape(self.shape)


class Layout:
    """The regions of several tensors in one memory block, each aligned. ``size`` is the block's size in bytes."""

    def __init__(self, tensors: Mapping[str, tuple[tuple[int, ...], np.dtype[Any]]]) -> None:
        self.size, self.regions = 0, {}
        for name, (shape, dtype) in tensors.items():
            region = self.regions[name] = Region(self.size, tuple(shape), np.dtype(dtype))
            self.size += align(region.size)

    def __getitem__(self, name: str) -> Region:
        return self.regions[name]


def put(target: NDArray[Any], values: NDArray[Any]) -> None:
    """Write values into a tensor that may be larger, and zeros into its rest."""
    if target.shape != values.shape:
        target[...] = 0
    target[tuple(map(slice, values.shape))] = values


class DeviceBuffer:
    """A block of device memory that can grow.

    Args:
        cuda: the GPU.
        stream: the stream on which all work with the memory is queued.
        make_room: called with the number of bytes before they are allocated.

    Attributes:
        address: of the block; 0 for none.
        size: of the block in bytes.
        moves: how often the address has changed.
    """

    def __init__(self, cuda: Cuda, stream: int, make_room: Callable[[int], None] = lambda size: None) -> None:
        self._cuda, self._stream, self._make_room = cuda, stream, make_room
        self.address = self.size = self.moves = 0

    def reserve(self, size: int, keep: int = 0) -> None:
        """Allocate at least ``size`` bytes. When the block has to move, its first ``keep`` bytes are copied."""
        if size <= self.size:
            return
        self.moves += 1  # also when the allocation fails: the old content may be lost by then
        if not keep:
            self.free()
        self._make_room(size)
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
    """A block of pinned host memory that can grow. It loses its content when it grows."""

    def __init__(self, cuda: Cuda, stream: int) -> None:
        self._cuda, self._stream = cuda, stream
        self._memory: Bytes | None = None

    def reserve(self, size: int) -> Bytes:
        """The block, with at least ``size`` bytes. Before you write to it, wait for copies that still read it."""
        if self._memory is None or len(self._memory) < size:
            self.free()
            self._memory = self._cuda.allocate_pinned(size)
        return self._memory

    def free(self) -> None:
        """Give the memory back, once the stream's work is done."""
        if self._memory is not None:
            self._cuda.synchronize(self._stream)
            self._cuda.free_pinned(self._memory)
            self._memory = None


class Staging:
    """Two blocks of pinned memory that take turns: the host writes one while queued copies read the other."""

    def __init__(self, cuda: Cuda, stream: int) -> None:
        self._cuda, self._stream, self._turn = cuda, stream, 0
        self._blocks: list[tuple[Bytes, int]] = []

    def reserve(self, size: int) -> None:
        """Allocate the two blocks, each of ``size`` bytes."""
        while len(self._blocks) < 2:
            event = self._cuda.create_event()
            try:
                self._blocks.append((self._cuda.allocate_pinned(size), event))
            except EngineError:
                self._cuda.destroy_event(event)
                raise

    def take(self) -> Bytes:
        """Wait until no work reads the next block, and return that block."""
        self._turn = 1 - self._turn
        memory, event = self._blocks[self._turn]
        self._cuda.wait(event)
        return memory

    def mark_sent(self) -> None:
        """Say that all work that reads the taken block is queued."""
        self._cuda.record(self._blocks[self._turn][1], self._stream)

    def free(self) -> None:
        """Give the memory back, once the stream's work is done."""
        self._cuda.synchronize(self._stream)
        while self._blocks:
            memory, event = self._blocks.pop()
            self._cuda.free_pinned(memory)
            self._cuda.destroy_event(event)
