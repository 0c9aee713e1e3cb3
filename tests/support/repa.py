"""REPA's samplers (``samplers.py`` of sihyun-yu/REPA, 67f7145), written from their formulas, for arrays of any library.

Time runs from 0, the data, to 1, noise: x_t = α·x + σ·ε, and the network predicts the velocity α'·x + σ'·ε. Nothing is
shared with the sampler tables.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

# (latents, t, whether the branch is the null class's) → velocity
Velocity = Callable[[Any, float, bool], Any]

LAST = 0.04  # where the SDE's last step begins


def interpolant(path: str, t: float) -> tuple[float, float, float, float]:
    """α, α', σ and σ': REPA's path types ``linear`` and ``cosine``."""
    if path == "linear":
        return 1 - t, -1.0, t, 1.0
    half = math.pi / 2
    return math.cos(half * t), -half * math.sin(half * t), math.sin(half * t), half * math.cos(half * t)


def score(path: str, velocity: Any, x: Any, t: float) -> Any:
    """REPA's ``get_score_from_velocity``."""
    alpha, d_alpha, sigma, d_sigma = interpolant(path, t)
    ratio = alpha / d_alpha
    return (ratio * velocity - x) / (sigma**2 - ratio * d_sigma * sigma)


def guided(network: Velocity, x: Any, t: float, scale: float, is_guided: bool, turn: Callable[[Any], Any]) -> Any:
    """What ``turn`` makes of the velocity, guided on all channels."""
    conditional = turn(network(x, t, False))
    if not is_guided:
        return conditional
    null = turn(network(x, t, True))
    return null + scale * (conditional - null)


def ode(
    network: Velocity, x: Any, steps: int, heun: bool, scale: float = 1.0, interval: tuple[float, float] = (0.0, 1.0)
) -> Iterator[Any]:
    """``euler_sampler``: the latents after each step. A step of Heun's is guided as at its start; the last is Euler's.

    Latents may be arrays or tensors.
    """
    times = [1 - index / steps for index in range(steps)] + [0.0]
    for index in range(steps):
        now, then = times[index], times[index + 1]
        is_guided = scale > 1 and interval[0] <= round(now, 9) <= interval[1]
        first = guided(network, x, now, scale, is_guided, lambda v: v)
        following = x + (then - now) * first
        if heun and index < steps - 1:
            second = guided(network, following, then, scale, is_guided, lambda v: v)
            following = x + (then - now) * (0.5 * first + 0.5 * second)
        x = following
        yield x


def sde(
    network: Velocity,
    x: Any,
    steps: int,
    path: str,
    draws: Iterator[Any],
    scale: float = 1.0,
    interval: tuple[float, float] = (0.0, 1.0),
) -> Iterator[Any]:
    """``euler_maruyama_sampler``: the latents after each step; ``draws`` is the noise of all but the last."""
    times = [1 - (1 - LAST) * index / (steps - 1) for index in range(steps)] + [0.0]
    for index in range(steps):
        now, then = times[index], times[index + 1]
        is_guided = scale > 1 and interval[0] <= round(now, 9) <= interval[1]

        def drift(velocity: Any, x: Any = x, now: float = now) -> Any:
            return velocity - 0.5 * (2 * now) * score(path, velocity, x, now)

        x = x + (then - now) * guided(network, x, now, scale, is_guided, drift)
        if index < steps - 1:
            x = x + math.sqrt(2 * now) * math.sqrt(now - then) * next(draws)
        yield x
