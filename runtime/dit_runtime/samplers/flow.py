"""Samplers of velocity models: SiT's fixed-step ODE and SDE solvers (Ma et al. 2024, arXiv 2401.08740), in float64.

Time t runs from 0, noise, to 1, the image: x_t = α_t·x₁ + σ_t·x₀ where x₀ is the noise. The network gets t itself, not
scaled, and predicts the velocity dx/dt = α'_t·x₁ + σ'_t·x₀.

REPA's models (Yu et al. 2024, arXiv 2410.06940) have the time ``noise-at-1``: the network gets 1 − t, and its output is
the velocity in that time, −dx/dt. Their tables are these in that time, except where REPA's ``samplers.py`` does
otherwise: Heun's method does not correct its last step, and the SDE's diffusion is ``linear`` on every path.

MeanFlow's models (Geng et al. 2025, arXiv 2505.13447) have REPA's time and a second one: they predict the average
velocity between two times, so a step between them has no error of a solver.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from dit_runtime.bundle.manifest import INTERVAL, NOISE_AT_0, NOISE_AT_1, PATHS
from dit_runtime.core.errors import SamplingError
from dit_runtime.samplers.schedule import (
    B_E,
    COEFFICIENTS,
    INPUT,
    LOG_SIGMA,
    S0,
    S1,
    S2,
    E,
    Float64,
    Schedule,
    check_skipped,
    make_row,
    schedule_from_rows,
)

FORMS = ("constant", "SBDM", "sigma", "linear", "decreasing", "increasing-decreasing")
METHODS = ("euler", "heun")
LAST_STEPS = ("mean", "euler", "tweedie", "none")
UNIFORM = "uniform"

# SiT's VP path. Sampling ends at VP_END, since the velocity grows without bound after it.
BETA_MIN, BETA_MAX, VP_END = 0.1, 20.0, 1 - 1e-3


class Point(NamedTuple):
    """A path at one time: α, its derivative, σ, its derivative."""

    alpha: float
    d_alpha: float
    sigma: float
    d_sigma: float


def path_at(path: str, t: float) -> Point:
    """A path at time t, as SiT's interpolants (``transport/path.py``): ``ICPlan``, ``GVPCPlan``, ``VPCPlan``."""
    if path == "linear":
        return Point(t, 1.0, 1 - t, -1.0)
    if path == "gvp":
        angle = np.pi / 2
        return Point(np.sin(angle * t), angle * np.cos(angle * t), np.cos(angle * t), -angle * np.sin(angle * t))
    if path == "vp":
        left = 1 - t
        log_alpha = -0.25 * left**2 * (BETA_MAX - BETA_MIN) - 0.5 * left * BETA_MIN
        rate = 0.5 * left * (BETA_MAX - BETA_MIN) + 0.5 * BETA_MIN
        alpha, sigma = np.exp(log_alpha), np.sqrt(-np.expm1(2 * log_alpha))
        return Point(alpha, alpha * rate, sigma, -np.exp(2 * log_alpha) * rate / sigma)
    raise SamplingError(f"path {path!r} is unknown; expected one of {', '.join(PATHS)}")


def clean_at(at: Point) -> Float64:
    """The image x₁ as a combination of x and the velocity."""
    return (at.d_sigma * S0 - at.sigma * E) / (at.alpha * at.d_sigma - at.d_alpha * at.sigma)


def score_at(at: Point) -> Float64:
    """∇ log p_t(x) as a combination of x and the velocity (SiT, equation 9)."""
    ratio = at.alpha / at.d_alpha
    return (ratio * E - S0) / (at.sigma**2 - ratio * at.d_sigma * at.sigma)


def diffusion_coefficient(path: str, t: float, form: str, norm: float) -> float:
    """w_t/2 of the SDE dx = (v + w/2·score)·dt + √w·dW; its forms have the names of SiT's ``compute_diffusion``."""
    at = path_at(path, t)
    if form == "SBDM" and at.alpha == 0:
        raise SamplingError(
            f"diffusion form SBDM on the {path} path is infinite at t = 0, where sampling starts; use another form"
        )
    forms: dict[str, Callable[[], float]] = {
        "constant": lambda: norm,
        "SBDM": lambda: norm * (at.d_alpha / at.alpha * at.sigma**2 - at.sigma * at.d_sigma),
        "sigma": lambda: norm * at.sigma,
        "linear": lambda: norm * (1 - t),
        "decreasing": lambda: 0.25 * (norm * np.cos(np.pi * t) + 1) ** 2,
        "increasing-decreasing": lambda: norm * np.sin(np.pi * t) ** 2,
    }
    if form not in forms:
        raise SamplingError(f"diffusion form {form!r} is unknown; expected one of {', '.join(FORMS)}")
    return float(forms[form]())


def flow_ode(path: str, steps: int, method: str, time: str = NOISE_AT_0, shift: float = 1.0) -> Schedule:
    """The probability-flow ODE by ``euler`` or ``heun`` over uniform steps, as SiT's ``sample_ode`` with torchdiffeq.

    ``steps`` counts steps; SiT's ``num_steps`` counts grid points, which are one more. Heun's method evaluates the
    network at both ends of each step. With the ``time`` of REPA's models it evaluates the last step only at its start,
    as REPA's ``euler_sampler`` does. ``shift`` is LightningDiT's ``timestep_shift``: below 1 it makes the first steps,
    which are in the noise, shorter.
    """
    if method not in METHODS:
        raise SamplingError(f"method {method!r} is unknown; expected one of {', '.join(METHODS)}")
    grid = np.linspace(0, VP_END if path == "vp" else 1.0, steps + 1)
    grid = shift * grid / (1 + (shift - 1) * grid) if shift != 1 else grid
    rows, times = [], []
    corrected = 0 if method == "euler" else steps - (time == NOISE_AT_1)
    for step, (t, after) in enumerate(pairwise(grid.tolist())):
        h = after - t
        times.append(t)
        if step >= corrected:
            rows.append(make_row(clean_at(path_at(path, t)), S0 + h * E))
            continue
        rows.append(make_row(clean_at(path_at(path, t)), S0 + h * E, memory=S0, memory_2=E))
        times.append(after)
        rows.append(make_row(clean_at(path_at(path, after)), S1 + h / 2 * (S2 + E)))
    completes = [False, True] * corrected + [True] * (steps - corrected)
    initial = _signal_and_noise(path, times)
    return schedule_from_rows(method, UNIFORM, *_in_time(time, times, rows), initial, completes=completes)


def flow_sde(
    path: str,
    steps: int,
    method: str,
    form: str = "sigma",
    norm: float = 1.0,
    last_step: str = "mean",
    last_step_size: float = 0.04,
    skipped: int = 0,
    time: str = NOISE_AT_0,
) -> Schedule:
    """The SDE by ``euler`` (Euler–Maruyama) or ``heun``, as SiT's ``sample_sde`` with its defaults for sampling.

    ``steps`` is SiT's ``num_steps``: all but one are steps of the SDE. The last step goes from 1 − ``last_step_size``
    to the image by the drift (``mean``), the velocity (``euler``) or the posterior mean (``tweedie``); ``none`` leaves
    it out. SiT's Heun adds noise before a step's first evaluation: here the row before adds it, or ``start`` where no
    row is before, as after ``skipped`` steps.

    Raises:
        SamplingError: fewer than 2 steps, an unknown method, form or last step, or a size out of range.
    """
    _check_sde(steps, method, last_step, last_step_size)
    size = 0.0 if last_step == "none" else last_step_size
    end = 1 - size if size else VP_END if path == "vp" else 1.0
    grid = np.linspace(0, end, steps).tolist()
    with np.errstate(divide="ignore", invalid="ignore"):
        noise = [_noise_scale(path, t, form, norm, grid[1] - grid[0]) for t in grid[:-1]]
        times, rows = _sde_rows(path, method, form, norm, grid, noise)
        if last_step != "none":
            times.append(end)
            rows.append(_last_row(path, end, form, norm, last_step, size))
    inner = 1 if method == "euler" else 2
    completes = np.array([index % inner == inner - 1 for index in range(inner * (steps - 1))] + [True])[: len(rows)]
    draws = completes.copy()
    draws[-1] = last_step == "none" and method == "euler"
    if method == "heun":
        draws[inner * (steps - 1) - 1] = False
    check_skipped(skipped, int(completes.sum()))
    first = inner * skipped
    start = (1.0, noise[skipped]) if method == "heun" and skipped < len(noise) else (1.0,)
    return schedule_from_rows(
        f"sde-{method}",
        UNIFORM,
        *_in_time(time, times[first:], rows[first:]),
        _signal_and_noise(path, times[first:]),
        draws[first:],
        completes[first:],
        start,
        skipped,
    )


def mean_flow(path: str, steps: int, second_time: str) -> Schedule:
    """MeanFlow's sampler over uniform times from 1, noise, to 0: z_r = z_t − (t − r)·u(z_t, r, t).

    ``second_time`` says whether the network gets t − r beside t, or r. Between steps the clean latents are estimated
    as if the average velocity went on to the image: z_t − t·u.
    """
    rows, times = [], []
    for t, r in pairwise(np.linspace(1, 0, steps + 1).tolist()):
        times.append((t, t - r if second_time == INTERVAL else r))
        rows.append(make_row(S0 - t * E, S0 - (t - r) * E))
    return schedule_from_rows("meanflow", UNIFORM, times, rows, _signal_and_noise(path, [1 - t for t, _ in times]))


def _check_sde(steps: int, method: str, last_step: str, last_step_size: float) -> None:
    if steps < 2:
        raise SamplingError(f"{steps} steps with sampler sde-{method}: expected at least 2, one of them the last")
    if method not in METHODS:
        raise SamplingError(f"method {method!r} is unknown; expected one of {', '.join(METHODS)}")
    if last_step not in LAST_STEPS:
        raise SamplingError(f"last step {last_step!r} is unknown; expected one of {', '.join(LAST_STEPS)}")
    if not 0 <= last_step_size < 1:
        raise SamplingError(f"last step size {last_step_size:g}: expected 0 to below 1, a share of the path")


def _sde_rows(
    path: str, method: str, form: str, norm: float, grid: list[float], noise: list[float]
) -> tuple[list[float], list[Float64]]:
    """Times and rows of the SDE's own steps; ``noise`` is the scale of each step's noise."""
    times: list[float] = []
    rows: list[Float64] = []
    h = grid[1] - grid[0]
    for index, (t, after) in enumerate(pairwise(grid)):
        drift = _drift_at(path, t, form, norm)
        times.append(t)
        if method == "euler":
            rows.append(make_row(clean_at(path_at(path, t)), S0 + h * drift, noise=noise[index]))
            continue
        rows.append(make_row(clean_at(path_at(path, t)), S0 + h * drift, memory=S0, memory_2=drift))
        times.append(after)
        following = noise[index + 1] if index + 1 < len(noise) else 0.0
        z = S1 + h / 2 * (S2 + _drift_at(path, after, form, norm))
        rows.append(make_row(clean_at(path_at(path, after)), z, noise=following))
    return times, rows


def _drift_at(path: str, t: float, form: str, norm: float) -> Float64:
    return E + diffusion_coefficient(path, t, form, norm) * score_at(path_at(path, t))


def _noise_scale(path: str, t: float, form: str, norm: float, h: float) -> float:
    return float(np.sqrt(2 * diffusion_coefficient(path, t, form, norm) * h))


def _last_row(path: str, t: float, form: str, norm: float, last_step: str, size: float) -> Float64:
    at = path_at(path, t)
    if last_step == "mean":
        return make_row(clean_at(at), S0 + size * _drift_at(path, t, form, norm))
    if last_step == "euler":
        return make_row(clean_at(at), S0 + size * E)
    return make_row(clean_at(at), (S0 + at.sigma**2 * score_at(at)) / at.alpha)


def _in_time(time: str, times: list[float], rows: list[Float64]) -> tuple[list[float], list[Float64]]:
    """The same times and rows for a network whose time runs as ``time`` says: its output is then the other way round.

    What the slots hold stays the same.
    """
    if time == NOISE_AT_0:
        return times, rows
    signs = np.ones(COEFFICIENTS)
    signs[[B_E, *range(INPUT, LOG_SIGMA)]] = -1
    return [1 - t for t in times], [signs * row + 0.0 for row in rows]  # + 0.0: no zero with a sign


def _signal_and_noise(path: str, times: list[float]) -> Float64:
    return np.array([(at.alpha, at.sigma) for at in (path_at(path, t) for t in times)])
