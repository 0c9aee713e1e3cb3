"""Classifier-free guidance as data: weights per branch, picture and channel, and table rows."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]
Int32 = NDArray[np.int32]


def guidance_weights(scale: float, batch: int, channels: int, guided_channels: int) -> Float32:
    """Weights ``[G, B, C]`` for ε_∅ + s·(ε_c − ε_∅) (Ho & Salimans 2022, arXiv 2207.12598).

    Branch 0 is the conditional one with weight s, branch 1 the null one with 1 − s, on the first ``guided_channels``
    channels; the others keep the conditional prediction. A scale of 1 needs no null branch: G = 1.
    """
    if scale == 1:
        return np.ones((1, batch, channels), np.float32)
    weights = np.zeros((2, batch, channels), np.float32)
    weights[0] = 1
    weights[0, :, :guided_channels] = scale
    weights[1, :, :guided_channels] = 1 - scale
    return weights


def branch_rows(labels: Int32, null_class: int, branches: int) -> tuple[Int32, Int32]:
    """The distinct conditions ``[K]`` of labels ``[B]``, and which of them each branch uses ``[G, B]``."""
    wanted = labels[None] if branches == 1 else np.stack([labels, np.full_like(labels, null_class)])
    conditions, rows = np.unique(wanted, return_inverse=True)
    return conditions.astype(np.int32), rows.reshape(wanted.shape).astype(np.int32)
