"""REPA's samplers step by step, for golden records, written after ``samplers.py`` of sihyun-yu/REPA in its own time.

Time runs from 0, the data x, to 1, noise ε: x_t = α·x + σ·ε, and the network predicts α'·x + σ'·ε.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import Tensor

from dit_export.reference.loops import FlowPath, Generators, LoopStep, draw_noise

LAST_TIME = 0.04  # where the SDE's last step begins


class RepaPath(FlowPath):
    """α, σ and their derivatives on a path by a bundle's name: ``linear``, or ``gvp``, which REPA calls ``cosine``."""

    def __init__(self, path: str) -> None:
        self.path = path

    def coefficients_at(self, t: float) -> tuple[float, float, float, float]:
        """α, α', σ and σ' at time t."""
        if self.path == "linear":
            return 1 - t, -1.0, t, 1.0
        half = math.pi / 2
        return math.cos(half * t), -half * math.sin(half * t), math.sin(half * t), half * math.cos(half * t)

    def ode(self, steps: int) -> Iterator[LoopStep]:
        """``euler_sampler`` without Heun's correction."""
        times = [1 - i / steps for i in range(steps)] + [0.0]
        for i in range(steps):

            def advance(
                e: Tensor, _: Tensor, z: Tensor, t: float = times[i], then: float = times[i + 1]
            ) -> tuple[Tensor, Tensor]:
                return z + (then - t) * e, self.clean_from_velocity(e, z, t)

            yield LoopStep(times[i], advance)

    def sde(self, steps: int, generators: Generators) -> Iterator[LoopStep]:
        """``euler_maruyama_sampler``: diffusion 2t, and the last step by the mean."""
        times = [1 - (1 - LAST_TIME) * i / (steps - 1) for i in range(steps)] + [0.0]
        for i in range(steps):
            t, step = times[i], times[i + 1] - times[i]

            def advance(
                e: Tensor, _: Tensor, z: Tensor, t: float = t, step: float = step, last: bool = i == steps - 1
            ) -> tuple[Tensor, Tensor]:
                diffusion = 2 * t
                mean = z + step * (e - 0.5 * diffusion * self.score_from_velocity(e, z, t))
                clean = self.clean_from_velocity(e, z, t)
                if last:
                    return mean, clean
                return mean + math.sqrt(diffusion) * draw_noise(z, generators) * math.sqrt(abs(step)), clean

            yield LoopStep(t, advance)
