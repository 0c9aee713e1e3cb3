"""Sampler tables for models whose time runs to the noise, with guidance, against REPA's samplers in float64.

The oracle (``support/repa.py``) is written from REPA's own formulas, in REPA's own time; it knows nothing of tables,
branches or SiT.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from support import repa
from support.grids import grid
from support.schedules import DIFFUSION, FIXED, MIX, Float64, assert_close, normal
from support.sit import noise_of_rows

from dit_runtime.bundle.manifest import NOISE_AT_1, DiffusionSpec
from dit_runtime.samplers.by_name import schedule_for
from dit_runtime.samplers.guidance import Guidance, branches_from_labels
from dit_runtime.samplers.schedule import Schedule

PATHS = {"linear": "linear", "cosine": "gvp"}  # REPA's name of a path, and a bundle's
SHAPE = (2, 4, 3)  # images, channels, pixels
LIMIT = 5e-6  # of the last latents, relative to the largest; measured: 2.0e-6, the rounding of tables and weights
TIME_LIMIT = 6e-8


def spec_of(path: str) -> DiffusionSpec:
    return replace(
        DIFFUSION, betas=(), prediction_type="velocity", guidance_channels=4, path=PATHS[path], time=NOISE_AT_1
    )


def velocity(x: Float64, t: float, null: bool) -> Float64:
    """Smooth and nonlinear; it mixes channels, and is another at each time and for the null class."""
    mixed = np.einsum("ij,bjk->bik", MIX, x)
    return 0.7 * x + 0.4 * np.tanh(0.5 * mixed + 2 * t - 1 + (0.8 if null else 0.0))


def run(schedule: Schedule, z: Float64, noise: Float64, guidance: Guidance, path: str) -> list[Float64]:
    """The latents after each step of a table with the weights of its guidance, in float64, and no work of no weight."""
    branches = branches_from_labels({3: 1.0}, guidance, schedule, FIXED, spec_of(path))
    state, found = np.zeros((3, *z.shape)), []
    state[0] = z
    for index, (at, row) in enumerate(zip(schedule.rows, schedule.coefficients.astype(np.float64), strict=True)):
        t = float(schedule.timesteps[at])
        weights = branches.weights[index].astype(np.float64)[: branches.needed[index]]
        e = sum(w[:, None] * velocity(state[0], t, bool(branch)) for branch, w in enumerate(weights))
        state = np.tensordot(row[2:11].reshape(3, 3), state, axes=1) + np.multiply.outer(row[11:14], e)
        state[0] += row[16] * noise[index]
        if schedule.completes_step[index]:
            found.append(state[0].copy())
    return found


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("sampler", "steps"),
    grid(
        [(sampler, steps) for sampler in ("euler", "heun", "sde-euler") for steps in (2, 5, 10, 20, 50, 250)],
        fast=lambda sampler, steps: steps in (2, 5, 20),
    ),
)
@pytest.mark.parametrize(
    "guidance", [Guidance(1.0), Guidance(1.8), Guidance(2.5, (0.2, 0.7)), Guidance(4.0, (0.0, 0.5))]
)
def test_tables_are_repas(path: str, sampler: str, steps: int, guidance: Guidance) -> None:
    """Fails if a step, the last one, its guidance or the interval is another than REPA's, or time runs to the data."""
    schedule = schedule_for(sampler, FIXED, spec_of(path), steps)
    draws = normal(8, steps + 1, *SHAPE)
    z, noise = noise_of_rows(schedule, draws)
    if sampler == "sde-euler":
        wanted = list(repa.sde(velocity, z, steps, path, iter(draws[1:]), guidance.scale, guidance.interval))
    else:
        wanted = list(repa.ode(velocity, z, steps, sampler == "heun", guidance.scale, guidance.interval))
    found = run(schedule, z, noise, guidance, path)
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert_close(one, other, LIMIT)


def test_times_run_from_noise_at_1() -> None:
    """Fails if the network is asked at other times than REPA's, or the last step of Heun is corrected."""
    found = schedule_for("heun", FIXED, spec_of("linear"), 20)
    times = found.timesteps[found.rows].astype(np.float64)
    expected = [t for now in np.linspace(1, 0, 21)[:-2] for t in (now, now - 0.05)] + [0.05]
    assert np.abs(times - expected).max() <= TIME_LIMIT
    sde = schedule_for("sde-euler", FIXED, spec_of("linear"), 20)
    assert np.abs(sde.timesteps - np.linspace(1, 0.04, 20)).max() <= TIME_LIMIT


def test_clean_latents_are_the_datas() -> None:
    """Fails if the estimate of the image is in the other time: x = x_t − t·v on the linear path."""
    schedule = schedule_for("euler", FIXED, spec_of("linear"), 8)
    for at, row in zip(schedule.rows, schedule.coefficients, strict=True):
        t = schedule.timesteps[at]
        np.testing.assert_allclose(row[:2], [1, -t], atol=1e-7)
        np.testing.assert_allclose(schedule.initial[at], [1 - t, t], atol=1e-7)
