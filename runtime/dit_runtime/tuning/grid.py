"""The teacher's grid: the points between its steps, and what its own table says of each."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dit_runtime.core.errors import SamplingError
from dit_runtime.samplers.schedule import A_Z, B_E, INPUT, MATRIX, Float64, Schedule, drop_clip

NO_SIGNAL = 1e-12  # of the weight of the first latents: a division by less says nothing


@dataclass(frozen=True)
class Grid:
    """K points before the teacher's steps, and the point after the last.

    Attributes:
        schedule: the teacher's.
        times: float64 ``[K]``, the timestep at each point.
        denoised: float64 ``[K, 2]``: the clean latents are the first times z plus the second times e.
        initial: float64 ``[K, 2]``, scales of signal and noise in the latents there.
        signal: float64 ``[K + 1]``. If e were constant, the latents at a point would be ``signal`` times the first
            latents plus ``output`` times e.
        output: float64 ``[K + 1]``.
    """

    schedule: Schedule
    times: Float64
    denoised: Float64
    initial: Float64
    signal: Float64
    output: Float64

    def __len__(self) -> int:
        return len(self.times)

    def classical_row(self, now: int, then: int) -> Float64:
        """The weights of (z, e, e before, e two before) in the latents at the point ``then``, for a constant e.

        This is what the teacher's own rows between the two points amount to: DDIM's row of the long step where the
        teacher is DDIM, Euler's where it is a solver of a velocity model.
        """
        ratio = self.signal[then] / self.signal[now]
        return np.array([ratio, self.output[then] - ratio * self.output[now], 0.0, 0.0])

    def log_ratio(self) -> Float64:
        """log(signal / noise) at each point ``[K]``, finite."""
        signal, noise = np.maximum(np.abs(self.initial), NO_SIGNAL).T
        return np.asarray(np.log(signal / noise), np.float64)


def grid_from_schedule(schedule: Schedule) -> Grid:
    """The grid of a teacher's schedule.

    Raises:
        SamplingError: the schedule draws noise or uses the learned variance, or starts from an image.
    """
    what = f"teacher {schedule.sampler} of {schedule.steps} steps"
    if schedule.uses_variance or schedule.draws_noise.any():
        why = "uses the learned variance" if schedule.uses_variance else "draws noise in its steps"
        raise SamplingError(
            f"{what}: it {why}, so there is no one trajectory to fit; expected a deterministic sampler, such as "
            "ddim:200, or heun:100 for a velocity model"
        )
    if schedule.skipped or len(schedule.start) != 1:
        raise SamplingError(f"{what}: it does not start from one draw of noise; expected a named sampler")
    starts = np.append(0, np.flatnonzero(schedule.completes_step) + 1)
    signal, output = _follow_constant(drop_clip(schedule.coefficients).astype(np.float64), starts)
    if (np.abs(signal[:-1]) < NO_SIGNAL).any():
        raise SamplingError(f"{what}: its rows leave nothing of the first latents; use another teacher")
    first = starts[:-1]
    return Grid(
        schedule=schedule,
        times=schedule.timesteps[schedule.rows[first]].astype(np.float64),
        denoised=schedule.coefficients[first][:, [A_Z, B_E]].astype(np.float64),
        initial=schedule.initial[first].astype(np.float64),
        signal=signal,
        output=output,
    )


def _follow_constant(coefficients: Float64, starts: NDArray[np.int64]) -> tuple[Float64, Float64]:
    """s₀ before the rows ``starts`` as weights of the first latents and of an e that is the same in all rows."""
    state = np.zeros((3, 2))
    state[0, 0] = 1.0
    weights = [state[0]]
    for row in coefficients:
        state = row[MATRIX:INPUT].reshape(3, 3) @ state
        state[:, 1] += row[INPUT : INPUT + 3]
        weights.append(state[0])
    kept = np.array(weights)[starts]
    return kept[:, 0], kept[:, 1]
