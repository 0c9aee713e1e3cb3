"""Noise from numpy against ``torch.randn``."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_runtime.noise import TorchNoise

TOLERANCE = 5e-7  # measured: 4.8e-7 at most (values up to 5); PyTorch's vectorized logarithm and cosine


@pytest.mark.parametrize("seed", [0, 1, 42, 2**31, 2**32 - 1, 2**32 + 7])
@pytest.mark.parametrize("size", [1, 2, 7, 15, 16, 17, 31, 32, 33, 255, 256, 4096, 16389])
def test_one_draw(seed: int, size: int) -> None:
    """A first draw of any size, PyTorch's short, vectorized and ragged paths, equals PyTorch's."""
    expected = torch.randn(size, generator=torch.Generator().manual_seed(seed)).numpy()
    assert np.abs(TorchNoise(seed).normal((size,)) - expected).max() <= TOLERANCE


@given(st.integers(0, 2**63), st.lists(st.integers(1, 70), min_size=1, max_size=8))
@settings(max_examples=60, deadline=None)
def test_consecutive_draws(seed: int, sizes: list[int]) -> None:
    """A stream goes on as PyTorch's generator does, its kept second value of short draws included."""
    generator, stream = torch.Generator().manual_seed(seed), TorchNoise(seed)
    for size in sizes:
        expected = torch.randn(size, generator=generator).numpy()
        assert np.abs(stream.normal((size,)) - expected).max() <= TOLERANCE


def test_shape_and_dtype() -> None:
    """Draws are float32 in the shape asked for, filled in C order."""
    values = TorchNoise(3).normal((2, 4, 8, 8))
    assert values.dtype == np.float32
    assert np.array_equal(values.reshape(-1), TorchNoise(3).normal((512,)))
