"""How far two arrays or two images are apart."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

LEVELS = 255.0  # the largest value of a uint8 image
WINDOW, SIGMA = 11, 1.5  # of SSIM's Gaussian, in pixels
K1, K2 = 0.01, 0.03


def relative_error(found: Array, expected: Array, scale: float = 0.0) -> float:
    """max |Δ| over the largest expected magnitude, or over ``scale`` where that is larger.

    Infinite where the shapes differ or an array is not finite.
    """
    if not comparable(found, expected):
        return float("inf")
    difference = np.abs(found.astype(np.float64) - expected.astype(np.float64)).max()
    return float(difference / max(np.abs(expected).max(), scale, 1e-30))


def relative_l2(found: Array, expected: Array) -> float:
    """‖Δ‖₂ over ‖expected‖₂; infinite where the shapes differ or an array is not finite."""
    if not comparable(found, expected):
        return float("inf")
    wanted = expected.astype(np.float64)
    return float(np.linalg.norm(found.astype(np.float64) - wanted) / max(float(np.linalg.norm(wanted)), 1e-30))


def cosine(found: Array, expected: Array) -> float:
    """The cosine of the angle between the arrays as vectors; NaN where the shapes differ or an array is not finite."""
    if not comparable(found, expected):
        return float("nan")
    a, b = found.astype(np.float64).ravel(), expected.astype(np.float64).ravel()
    return float(a @ b / max(float(np.linalg.norm(a) * np.linalg.norm(b)), 1e-30))


def measures(found: Array, expected: Array) -> dict[str, float]:
    """The metrics of a rung: ``max_abs`` = max |Δ|, ``relative_l2`` and ``cosine``."""
    if not comparable(found, expected):
        return {"max_abs": float("inf"), "relative_l2": float("inf"), "cosine": float("nan")}
    return {
        "max_abs": float(np.abs(found.astype(np.float64) - expected.astype(np.float64)).max()),
        "relative_l2": relative_l2(found, expected),
        "cosine": cosine(found, expected),
    }


def comparable(found: Array, expected: Array) -> bool:
    """Whether the arrays have the same shape and are finite."""
    return found.shape == expected.shape and bool(np.isfinite(found).all() and np.isfinite(expected).all())


def psnr(found: NDArray[np.uint8], expected: NDArray[np.uint8]) -> float:
    """Peak signal-to-noise ratio of uint8 images in dB; infinite for identical images, -infinite for other shapes."""
    if found.shape != expected.shape:
        return float("-inf")
    error = float(np.mean((found.astype(np.float64) - expected.astype(np.float64)) ** 2))
    return float("inf") if error == 0 else float(10 * np.log10(LEVELS**2 / error))


def ssim(found: NDArray[np.uint8], expected: NDArray[np.uint8]) -> float:
    """Structural similarity of uint8 images ``[N, H, W, C]``: the mean over images, channels and positions.

    Wang, Bovik, Sheikh & Simoncelli 2004, "Image quality assessment", with the paper's constants and its 11×11 Gaussian
    window of σ = 1.5, at the positions where the window lies inside the image. A smaller image has the largest odd
    window that fits. 0 for other shapes.
    """
    if found.shape != expected.shape:
        return 0.0
    side = min(WINDOW, *found.shape[1:3])
    window = _gaussian(side - (side + 1) % 2)
    x, y = found.astype(np.float64), expected.astype(np.float64)
    mean_x, mean_y = _filter(x, window), _filter(y, window)
    variance_x = _filter(x * x, window) - mean_x**2
    variance_y = _filter(y * y, window) - mean_y**2
    covariance = _filter(x * y, window) - mean_x * mean_y
    c1, c2 = (K1 * LEVELS) ** 2, (K2 * LEVELS) ** 2
    numerator = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return float(np.mean(numerator / ((mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2))))


def _gaussian(side: int) -> NDArray[np.float64]:
    offsets = np.arange(side) - side // 2
    window = np.exp(-(offsets**2) / (2 * SIGMA**2))
    return np.asarray(window / window.sum(), np.float64)


def _filter(images: NDArray[np.float64], window: NDArray[np.float64]) -> NDArray[np.float64]:
    """Images ``[N, H, W, C]`` filtered with the window's outer product with itself, at the positions where it fits."""
    view = np.lib.stride_tricks.sliding_window_view
    rows = view(images, len(window), axis=1) @ window
    return np.asarray(view(rows, len(window), axis=2) @ window, np.float64)
