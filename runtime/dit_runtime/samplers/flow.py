"""Samplers of velocity models as tables, in float64: SiT's fixed-step ODE and SDE solvers (Ma et al. 2024, 2401.08740).

Time runs from 0, noise, to 1, the image: x_t = α_t·x₁ + σ_t·x₀ with x₀ the noise, and the network predicts the
velocity dx/dt = α'_t·x₁ + σ'_t·x₀ at t itself, not scaled.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from dit_runtime.bundle.manifest import PATHS
from dit_runtime.core.errors import SamplingError
from dit_runtime.samplers.schedule import (
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

# SiT's VP path, and where its sampling ends: beyond, the velocity grows without bound.
BETA_MIN, BETA_MAX, VP_END = 0.1, 20.0, 1 - 1e-3


class Point(NamedTuple):
    """A path at one time: α, its derivative, σ, its derivative."""

    alpha: float
    d_alpha: float
    sigma: float
    d_sigma: float


def point(path: str, t: float) -> Point:
    """SiT's interpolants (``transport/path.py``): ``ICPlan``, ``GVPCPlan``, ``VPCPlan``."""
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


def clean(at: Point) -> Float64:
    """The image x₁ as a combination of x and the velocity."""
    return (at.d_sigma * S0 - at.sigma * E) / (at.alpha * at.d_sigma - at.d_alpha * at.sigma)


def score(at: Point) -> Float64:
    """∇ log p_t(x) as a combination of x and the velocity (SiT, equation 9)."""
    ratio = at.alpha / at.d_alpha
    return (ratio * E - S0) / (at.sigma**2 - ratio * at.d_sigma * at.sigma)


def diffusion_coefficient(path: str, t: float, form: str, norm: float) -> float:
    """w_t/2 of the SDE dx = (v + w/2·score)·dt + √w·dW, as SiT's ``compute_diffusion`` names its forms."""
    at = point(path, t)
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


def flow_ode(path: str, steps: int, method: str) -> Schedule:
    """The probability-flow ODE by ``euler`` or ``heun`` over uniform steps, as SiT's ``sample_ode`` with torchdiffeq.

    ``steps`` counts steps; SiT's ``num_steps`` counts grid points, one more. Heun evaluates both ends of each step.
    """
    if method not in METHODS:
        raise SamplingError(f"method {method!r} is unknown; expected one of {', '.join(METHODS)}")
    grid = np.linspace(0, VP_END if path == "vp" else 1.0, steps + 1)
    rows, times = [], []
    for t, after in pairwise(grid.tolist()):
        h = after - t
        times.append(t)
        if method == "euler":
            rows.append(make_row(clean(point(path, t)), S0 + h * E))
            continue
        rows.append(make_row(clean(point(path, t)), S0 + h * E, memory=S0, memory_2=E))
        times.append(after)
        rows.append(make_row(clean(point(path, after)), S1 + h / 2 * (S2 + E)))
    completes = True if method == "euler" else np.arange(2 * steps) % 2 == 1
    return schedule_from_rows(method, UNIFORM, times, rows, _scales(path, times), completes=completes)


def flow_sde(
    path: str,
    steps: int,
    method: str,
    form: str = "sigma",
    norm: float = 1.0,
    last_step: str = "mean",
    last_step_size: float = 0.04,
    skipped: int = 0,
) -> Schedule:
    """The SDE by ``euler`` (Euler–Maruyama) or ``heun``, as SiT's ``sample_sde`` with its defaults for sampling.

    ``steps`` is SiT's ``num_steps``: all but one are steps of the SDE, and the last goes from 1 − ``last_step_size`` to
    the image, by the drift (``mean``), the velocity (``euler``), the posterior mean (``tweedie``) or not (``none``).
    Heun's noise comes before a step's first evaluation: here at the end of the row before it, or in ``start``, also
    where the first steps are ``skipped``.
    """
    if steps < 2:
        raise SamplingError(f"{steps} steps with sampler sde-{method}: expected at least 2, one of them the last")
    if method not in METHODS:
        raise SamplingError(f"method {method!r} is unknown; expected one of {', '.join(METHODS)}")
    if last_step not in LAST_STEPS:
        raise SamplingError(f"last step {last_step!r} is unknown; expected one of {', '.join(LAST_STEPS)}")
    if not 0 <= last_step_size < 1:
        raise SamplingError(f"last step size {last_step_size:g}: expected 0 to below 1, a share of the path")
    size = 0.0 if last_step == "none" else last_step_size
    end = 1 - size if size else VP_END if path == "vp" else 1.0
    grid = np.linspace(0, end, steps).tolist()
    h = grid[1] - grid[0]
    rows: list[Float64] = []
    times: list[float] = []
    with np.errstate(divide="ignore", invalid="ignore"):
        noise = [_noise_scale(path, t, form, norm, h) for t in grid[:-1]]
        for index, (t, after) in enumerate(pairwise(grid)):
            drift = _drift(path, t, form, norm)
            times.append(t)
            if method == "euler":
                rows.append(make_row(clean(point(path, t)), S0 + h * drift, noise=noise[index]))
                continue
            rows.append(make_row(clean(point(path, t)), S0 + h * drift, memory=S0, memory_2=drift))
            times.append(after)
            following = noise[index + 1] if index + 1 < len(noise) else 0.0
            z = S1 + h / 2 * (S2 + _drift(path, after, form, norm))
            rows.append(make_row(clean(point(path, after)), z, noise=following))
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
        times[first:],
        rows[first:],
        _scales(path, times[first:]),
        draws[first:],
        completes[first:],
        start,
        skipped,
    )


def _drift(path: str, t: float, form: str, norm: float) -> Float64:
    return E + diffusion_coefficient(path, t, form, norm) * score(point(path, t))


def _noise_scale(path: str, t: float, form: str, norm: float, h: float) -> float:
    return float(np.sqrt(2 * diffusion_coefficient(path, t, form, norm) * h))


def _last_row(path: str, t: float, form: str, norm: float, last_step: str, size: float) -> Float64:
    at = point(path, t)
    if last_step == "mean":
        return make_row(clean(at), S0 + size * _drift(path, t, form, norm))
    if last_step == "euler":
        return make_row(clean(at), S0 + size * E)
    return make_row(clean(at), (S0 + at.sigma**2 * score(at)) / at.alpha)


def _scales(path: str, times: list[float]) -> Float64:
    return np.array([(at.alpha, at.sigma) for at in (point(path, t) for t in times)])
