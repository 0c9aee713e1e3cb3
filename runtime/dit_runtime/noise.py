"""PyTorch's CPU noise from numpy alone: the same seed gives the same picture.

``torch.randn(shape, generator=torch.Generator().manual_seed(seed))`` in float32 is a Mersenne Twister (MT19937) and a
Box-Muller transform (``aten/src/ATen/native/cpu/DistributionTemplates.h``, ``core/DistributionsHelper.h``). PyTorch's
vectorized logarithm and cosine differ from numpy's by up to 9.5e-7, two units in the last place of values above 4
(seed 735 in ``tests/test_noise.py``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]
VECTOR = 16  # draws of at least this many values take PyTorch's vectorized path


class TorchNoise:
    """A stream of normal noise: ``torch.Generator().manual_seed(seed)`` and consecutive ``torch.randn``."""

    def __init__(self, seed: int) -> None:
        # PyTorch seeds its twister with the low 32 bits; RandomState(int) initializes in the same way.
        self._twister = np.random.RandomState(seed & 0xFFFFFFFF)
        self._cached: float | None = None

    def normal(self, shape: Sequence[int]) -> Float32:
        """The next ``torch.randn(shape)``."""
        size = math.prod(shape)
        values = self._vectorized(size) if size >= VECTOR else self._scalar(size)
        return values.astype(np.float32).reshape(shape)

    def _words(self, count: int) -> NDArray[np.uint32]:
        return np.frombuffer(self._twister.bytes(4 * count), dtype="<u4")

    def _uniform(self, count: int) -> Float32:
        """In [0, 1), from the low 24 bits of each word."""
        return ((self._words(count) & 0xFFFFFF) / np.float32(1 << 24)).astype(np.float32)

    def _vectorized(self, size: int) -> NDArray[np.float64]:
        uniform = self._uniform(size)
        whole = size - size % VECTOR
        values = np.concatenate([_box_muller(uniform[:whole]), np.empty(size - whole)])
        if whole < size:  # the tail is drawn anew as the last 16 values
            values[-VECTOR:] = _box_muller(self._uniform(VECTOR))
        return values

    def _scalar(self, size: int) -> NDArray[np.float64]:
        values = np.empty(size)
        for index in range(size):
            if self._cached is not None:
                values[index], self._cached = self._cached, None
                continue
            words = self._words(4).astype(np.uint64)
            doubles = ((words[0::2] << np.uint64(32)) | words[1::2]) & np.uint64((1 << 53) - 1)
            first, second = (float(value) / (1 << 53) for value in doubles)
            radius = math.sqrt(-2 * math.log1p(-second))
            values[index] = radius * math.cos(2 * math.pi * first)
            self._cached = radius * math.sin(2 * math.pi * first)
        return values


def _box_muller(uniform: Float32) -> NDArray[np.float64]:
    """Groups of 16 uniforms → normals: eight radii, then eight angles."""
    groups = uniform.reshape(-1, 2, VECTOR // 2)
    # float32 where PyTorch rounds to float32: the angle's rounding alone is worth 7e-7 in the result.
    radius = np.sqrt(np.float32(-2) * np.log(np.float32(1) - groups[:, 0]))
    angle = (np.float32(2 * np.pi) * groups[:, 1]).astype(np.float64)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(-1)
