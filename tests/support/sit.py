"""SiT's samplers in float64, derived from the interpolant; they share nothing with the tables."""

from __future__ import annotations

import cmath
import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from dit_runtime.bundle.manifest import DiffusionSpec
from dit_runtime.samplers.schedule import Schedule
from support.schedules import DIFFUSION, Float64, network

PATHS = ["linear", "gvp", "vp"]
FORMS = ["constant", "SBDM", "sigma", "linear", "decreasing", "increasing-decreasing"]
LAST_STEPS = ["mean", "euler", "tweedie", "none"]
FLOW_SAMPLERS = ["euler", "heun", "sde-euler", "sde-heun"]


class Flow(NamedTuple):
    """Settings of one of SiT's samplers: the ODE has no ``form``; its ``steps`` are intervals, an SDE's points."""

    path: str
    method: str
    steps: int
    form: str | None = None
    norm: float = 1.0
    last_step: str = "mean"
    last_step_size: float = 0.04


class Evaluation(NamedTuple):
    """One evaluation of the network, at ``t`` on ``input``; then ``sample = mean + scale · noise``."""

    t: float
    input: Float64
    denoised: Float64
    mean: Float64
    scale: float
    sample: Float64
    draws: bool
    completes: bool


def spec_of(path: str) -> DiffusionSpec:
    return replace(DIFFUSION, betas=(), prediction_type="velocity", guidance_channels=3, path=path)


def network_of_flow(z: Float64, t: float) -> tuple[Float64, Float64]:
    """The dummy network of the diffusion tables, whose timesteps go to 1000."""
    return network(z, 1000 * t)


def alpha_sigma(path: str, t: complex) -> tuple[complex, complex]:
    """α and σ at t, 0 the noise and 1 the data: the linear, the trigonometric and the variance-preserving path."""
    if path == "linear":
        return t, 1 - t
    if path == "gvp":
        return cmath.sin(math.pi / 2 * t), cmath.cos(math.pi / 2 * t)
    left = 1 - t  # log α = −½·∫β over the time left, β = 0.1 + (20 − 0.1)·s
    log_alpha = -(0.1 * left + (20 - 0.1) * left**2 / 2) / 2
    return cmath.exp(log_alpha), cmath.sqrt(-np.expm1(2 * log_alpha))


def interpolant(path: str, t: float) -> tuple[float, float, float, float]:
    """α, σ and their derivatives, by a complex step: exact to the last place, with no difference taken."""
    values, ahead = alpha_sigma(path, t), alpha_sigma(path, t + 1e-30j)
    return values[0].real, values[1].real, ahead[0].imag / 1e-30, ahead[1].imag / 1e-30


def data_and_noise(path: str, t: float, x: Float64, v: Float64) -> tuple[Float64, Float64]:
    """The estimates of x_1 and x_0, which solve x = α·x_1 + σ·x_0 and v = α'·x_1 + σ'·x_0."""
    alpha, sigma, d_alpha, d_sigma = interpolant(path, t)
    both = np.linalg.solve([[alpha, sigma], [d_alpha, d_sigma]], np.stack([x.ravel(), v.ravel()]))
    return both[0].reshape(x.shape), both[1].reshape(x.shape)


def diffusion_coefficient(flow: Flow, t: float) -> float:
    """D(t): the SDE is dx = (v + D·score)·dt + √(2D)·dw."""
    alpha, sigma, d_alpha, d_sigma = interpolant(flow.path, t)
    if flow.form == "constant":
        return flow.norm
    if flow.form == "SBDM":
        return flow.norm * (d_alpha / alpha * sigma**2 - d_sigma * sigma)
    if flow.form == "sigma":
        return flow.norm * sigma
    if flow.form == "linear":
        return flow.norm * (1 - t)
    if flow.form == "decreasing":
        return 0.25 * (flow.norm * math.cos(math.pi * t) + 1) ** 2
    assert flow.form == "increasing-decreasing"
    return flow.norm * math.sin(math.pi * t) ** 2


def end_of(flow: Flow) -> float:
    """Where the grid ends. SiT clips the last 1e-3 of the VP path, and leaves an SDE's last step to a single one."""
    if flow.form is not None and flow.last_step != "none" and flow.last_step_size > 0:
        return 1 - flow.last_step_size
    return 1 - 1e-3 if flow.path == "vp" else 1.0


def grid_of(flow: Flow) -> Float64:
    return np.linspace(0, end_of(flow), flow.steps + 1 if flow.form is None else flow.steps)


def run_flow(
    flow: Flow, draws: Iterator[Float64], network: Any = network_of_flow, skipped: int = 0
) -> Iterator[Evaluation]:
    """SiT's sampler in float64, one draw at a time from ``draws``: first the latents, then each step's noise.

    With ``skipped`` steps left out, the first are the latents at the time where the next step starts.
    """
    stochastic, grid = flow.form is not None, grid_of(flow)

    def evaluate(x: Float64, t: float) -> tuple[Float64, Float64, Float64]:
        """The estimate of the data, the velocity, and the SDE's drift."""
        v, _ = network(x, t)
        x_1, x_0 = data_and_noise(flow.path, t, x, v)
        if not stochastic:
            return x_1, v, v
        score = -x_0 / alpha_sigma(flow.path, t)[1].real
        return x_1, v, v + diffusion_coefficient(flow, t) * score

    def spread(step: int) -> float:
        return math.sqrt(2 * diffusion_coefficient(flow, grid[step]) * (grid[1] - grid[0])) if stochastic else 0.0

    x = next(draws)
    if stochastic and flow.method == "heun" and skipped < len(grid) - 1:
        x = x + spread(skipped) * next(draws)
    for step, (t, after) in enumerate(pairwise(grid.tolist())):
        if step < skipped:
            continue
        x_1, _, drift = evaluate(x, t)
        forward = x + (after - t) * drift
        if flow.method == "euler":
            scale, draw = spread(step), stochastic
        else:
            yield Evaluation(t, x, x_1, forward, 0.0, forward, draws=False, completes=False)
            x_1, _, corrected = evaluate(forward, after)
            draw = stochastic and step < len(grid) - 2  # for the next step
            scale = spread(step + 1) if draw else 0.0
            t, x, forward = after, forward, x + (after - t) * (drift + corrected) / 2
        sample = forward + scale * next(draws) if draw else forward
        yield Evaluation(t, x, x_1, forward, scale, sample, draws=draw, completes=True)
        x = sample
    if stochastic and flow.last_step != "none":
        t = grid[-1]
        x_1, v, drift = evaluate(x, t)
        moves = {"mean": x + flow.last_step_size * drift, "euler": x + flow.last_step_size * v, "tweedie": x_1}
        sample = moves[flow.last_step]
        yield Evaluation(t, x, x_1, sample, 0.0, sample, draws=False, completes=True)


def noise_of_rows(schedule: Schedule, draws: Float64) -> tuple[Float64, Float64]:
    """The latents before the first row and the noise of each row, from consecutive draws."""
    first = len(schedule.start)
    noise = np.full((len(schedule.rows), *draws.shape[1:]), 1e30)  # whatever lies there must not matter
    noise[schedule.draws_noise] = draws[first : first + schedule.draws_noise.sum()]
    return np.tensordot(schedule.start.astype(np.float64), draws[:first], axes=1), noise
