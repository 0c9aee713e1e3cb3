"""MeanFlow's sampler step by step, for golden records, written after ``meanflow_sampler.py`` of zhuyu-cs/MeanFlow.

Time runs from 1, noise, to 0, the image. The network predicts u(z_t, r, t), the average velocity from r to t, and gets
t and, as ``second_time`` says, t − r or r.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from torch import Tensor

from dit_export.reference.loops import LoopStep


def mean_flow(steps: int, second_time: str) -> Iterator[LoopStep]:
    """``meanflow_sampler`` of so many steps; one step is z_0 = z_1 − u(z_1, 0, 1).

    The published sampler has no estimate of the clean latents between steps; here it is where u leads from t to 0.
    """
    times = [1 - index / steps for index in range(steps)] + [0.0]
    for t, r in pairwise(times):

        def advance(u: Tensor, _: Tensor, z: Tensor, t: float = t, r: float = r) -> tuple[Tensor, Tensor]:
            return z - (t - r) * u, z - t * u

        yield LoopStep((t, r if second_time == "r" else t - r), advance)
