"""Sampler tables against the papers and the official respacing in float64, and against diffusers' schedulers.

Every comparison is teacher forced, the same latents into both sides at each step, with a seeded dummy network: no
weights. The float64 oracles are written here from the formulas (DDIM: arXiv 2010.02502, equations 7, 9 and 16; DDPM:
arXiv 2006.11239, equations 6 and 7; learned variance: arXiv 2102.09672, equation 15) and share nothing with the table.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.grids import grid
from support.schedules import (
    ALPHA_BAR,
    BETAS,
    DIFFUSION,
    ETAS,
    FIXED,
    LEARNED,
    SHAPE,
    Float64,
    Step,
    asked,
    assert_close,
    assert_sound,
    network,
    normal,
    official_timesteps,
    run_table,
)

from dit_runtime.bundle.manifest import ModelSpec
from dit_runtime.core.errors import SamplingError
from dit_runtime.samplers.by_name import schedule_for
from dit_runtime.samplers.spacing import official_timesteps as respaced

# All relative to max|reference| of the step.
FLOAT64_LIMIT = 5e-7  # measured: 3.4e-7 (DDIM), 3.2e-7 (DDPM); the table is float32 of float64
FREE_LIMIT = 1e-6  # measured: 4.1e-7 after 250 steps


SPACINGS = [("leading", 0), ("leading", 1), ("trailing", 0), ("linspace", 0)]
COUNTS = [1, 2, 10, 15, 50, 250, 1000]


def ddim_in_float64(t: int, steps: int, eta: float, to_one: bool, z: Float64, noise: Float64) -> Step:
    """The posterior q_σ(x_s | x_t, x_0) of the DDIM paper, equation 7, at x_0 from equation 9 and σ from 16.

    As in diffusers, s is t less the integer stride, also where the spacing's next timestep is another.
    """
    s = t - 1000 // steps
    now = float(ALPHA_BAR[t])
    before = float(ALPHA_BAR[s]) if s >= 0 else 1.0 if to_one else float(ALPHA_BAR[0])
    e, _ = network(z, float(t))
    x_0 = (z - math.sqrt(1 - now) * e) / math.sqrt(now)
    sigma = eta * math.sqrt((1 - before) / (1 - now) * (1 - now / before))
    toward = math.sqrt(1 - before - sigma**2) / math.sqrt(1 - now)
    mean = math.sqrt(before) * x_0 + toward * (z - math.sqrt(now) * x_0)
    return Step(x_0, mean, np.full_like(z, sigma), mean + sigma * noise)


class OfficialDiffusion:
    """Ancestral sampling of the official code in float64, on the betas that keep ᾱ of the chosen timesteps."""

    def __init__(self, steps: int, learned: bool) -> None:
        self.timesteps, self.learned = official_timesteps(steps), learned
        kept = np.cumprod(1.0 - BETAS)[self.timesteps]
        self.betas = 1.0 - kept / np.concatenate([[1.0], kept[:-1]])
        self.alpha_bar = np.cumprod(1.0 - self.betas)
        self.before = np.concatenate([[1.0], self.alpha_bar[:-1]])
        self.posterior = self.betas * (1.0 - self.before) / (1.0 - self.alpha_bar)

    def step(self, index: int, z: Float64, noise: Float64) -> Step:
        """From latents at the chosen timestep ``index``, counted from the clean end."""
        beta, now, before = self.betas[index], self.alpha_bar[index], self.before[index]
        e, v = network(z, float(self.timesteps[index]))
        x_0 = math.sqrt(1 / now) * z - math.sqrt(1 / now - 1) * e
        mean = beta * math.sqrt(before) / (1 - now) * x_0 + (1 - before) * math.sqrt(1 - beta) / (1 - now) * z
        least = math.log(self.posterior[max(index, 1)])  # its first value is 0: the second stands in
        if self.learned:
            fraction = (v + 1) / 2
            log_variance = fraction * math.log(beta) + (1 - fraction) * least
        else:
            log_variance = np.full_like(z, math.log(beta) if index else least)
        scale = np.exp(0.5 * log_variance) * (index > 0)
        return Step(x_0, mean, scale, mean + scale * noise)

    def run(self, z: Float64, noise: Float64) -> tuple[list[Float64], list[Step]]:
        inputs, steps = [], []
        for index, drawn in zip(reversed(range(len(self.timesteps))), noise, strict=True):
            inputs.append(z)
            steps.append(self.step(index, z, drawn))
            z = steps[-1].sample
        return inputs, steps


@pytest.mark.parametrize("eta", ETAS)
@pytest.mark.parametrize("to_one", [True, False], ids=["to_one", "to_first"])
@pytest.mark.parametrize(
    ("spacing", "offset", "steps"),
    grid(
        [(*spacing, steps) for spacing in SPACINGS for steps in COUNTS if (*spacing, steps) != ("leading", 1, 1000)],
        fast=lambda spacing, offset, steps: steps in (1, 2, 15, 50),
    ),
)
def test_ddim_is_the_paper(eta: float, to_one: bool, spacing: str, offset: int, steps: int) -> None:
    """Every step of DDIM is the paper's posterior in float64: x_0, mean and noise scale, each by itself."""
    spec = replace(DIFFUSION, timestep_spacing=spacing, steps_offset=offset, set_alpha_to_one=to_one)
    schedule = schedule_for("ddim", LEARNED, spec, steps, eta)
    inputs, noise = normal(3, steps, *SHAPE), normal(4, steps, *SHAPE)
    found = run_table(schedule, inputs[0], noise, network, list(inputs))
    for index, t in enumerate(asked(schedule)):
        expected = ddim_in_float64(t, steps, eta, to_one, inputs[index], noise[index])
        for value, reference in zip(found[index], expected, strict=True):
            assert_close(value, reference, FLOAT64_LIMIT)


def test_ddim_with_eta_one_is_ddpm() -> None:
    """DDIM at eta 1 over all timesteps is DDPM with the posterior variance β̃, as the DDIM paper says."""
    schedule, official = schedule_for("ddim", LEARNED, DIFFUSION, 1000, 1.0), OfficialDiffusion(1000, learned=False)
    inputs, noise = normal(5, 1000, *SHAPE), np.zeros((1000, *SHAPE))
    for index, step in enumerate(run_table(schedule, inputs[0], noise, network, list(inputs))):
        expected = official.step(999 - index, inputs[index], noise[index])
        assert_close(step.mean, expected.mean, FLOAT64_LIMIT)
        assert_close(step.scale, np.full(SHAPE, math.sqrt(official.posterior[999 - index])), FLOAT64_LIMIT)


@pytest.mark.parametrize("steps", grid(COUNTS[1:], fast=lambda steps: steps in (2, 15, 50)))
@pytest.mark.parametrize("model", [LEARNED, FIXED], ids=["learned", "fixed_large"])
def test_ddpm_is_the_official_diffusion(steps: int, model: ModelSpec) -> None:
    """Every step of DDPM is the official respaced diffusion's in float64: x_0, mean and noise scale."""
    schedule, official = schedule_for("ddpm", model, DIFFUSION, steps), OfficialDiffusion(steps, model.learned_variance)
    assert asked(schedule) == official.timesteps[::-1]
    z, noise = normal(8, *SHAPE), normal(9, steps, *SHAPE)
    inputs, expected = official.run(z, noise)
    for step, reference in zip(run_table(schedule, z, noise, network, inputs), expected, strict=True):
        for value, wanted in zip(step, reference, strict=True):
            assert_close(value, wanted, FLOAT64_LIMIT)


@pytest.mark.parametrize("model", [LEARNED, FIXED], ids=["learned", "fixed_large"])
def test_errors_do_not_grow_along_a_trajectory(model: ModelSpec) -> None:
    """250 steps run freely from the same noise end where the official diffusion ends: no error is fed back."""
    z, noise = normal(12, *SHAPE), normal(13, 250, *SHAPE)
    _, expected = OfficialDiffusion(250, model.learned_variance).run(z, noise)
    found = run_table(schedule_for("ddpm", model, DIFFUSION, 250), z, noise, network)
    assert_close(found[-1].sample, expected[-1].sample, FREE_LIMIT)


def test_official_spacing_of_ten() -> None:
    """The official respacing '10' holds both ends of training, unlike diffusers' leading spacing."""
    expected = [0, 111, 222, 333, 444, 555, 666, 777, 888, 999]
    assert asked(schedule_for("ddpm", LEARNED, DIFFUSION, 10))[::-1] == expected


@pytest.mark.slow  # a sweep
def test_official_spacing_of_every_count() -> None:
    """DDPM's timesteps equal the official ones for every count, halves that round to even included."""
    for steps in range(2, 1001):
        expected = official_timesteps(steps)[::-1]
        assert respaced(1000, steps, "official").tolist() == expected, f"{steps} steps"


@given(steps=st.integers(2, 1000), learned=st.booleans())
@settings(max_examples=60, deadline=None)
def test_every_ddpm_table_is_sound(steps: int, learned: bool) -> None:
    """No count that DDPM accepts gives a table the engine cannot run; only learned variance reads v."""
    schedule = schedule_for("ddpm", LEARNED if learned else FIXED, DIFFUSION, steps)
    assert_sound(schedule, "ddpm", steps)
    assert schedule.uses_variance == learned
    a, b, *rest = schedule.coefficients[-1]
    np.testing.assert_allclose((rest[0], rest[9]), (a, b), rtol=1e-5)  # the posterior at ᾱ = 1 is x_0


@pytest.mark.parametrize(
    ("sampler", "change", "steps", "eta", "message"),
    [
        ("heun3", {}, 10, 0.0, r"'heun3'.*ddim.*ddpm"),
        ("", {}, 10, 0.0, r"ddim.*ddpm"),
        ("ddim", {}, 0, 0.0, r"0 steps.*1 to 1000"),
        ("ddim", {}, -1, 0.0, r"-1 steps.*1 to 1000"),
        ("ddim", {}, 1001, 0.0, r"1001 steps.*1 to 1000"),
        ("ddpm", {}, 0, 0.0, r"0 steps"),
        ("ddpm", {}, -1, 0.0, r"-1 steps"),
        ("ddpm", {}, 1001, 0.0, r"1001 steps"),
        ("ddpm", {}, 1, 0.0, r"1 step\b.*at least 2"),
        ("ddim", {}, 10, -0.1, r"eta -0\.1.*0 to 1"),
        ("ddim", {}, 10, 1.1, r"eta 1\.1.*0 to 1"),
        ("ddim", {}, 10, math.nan, r"eta nan.*0 to 1"),
        ("ddpm", {}, 10, 0.5, r"eta 0\.5.*ddpm"),
        ("ddpm", {}, 10, math.nan, r"eta nan"),
        ("ddim", {"prediction_type": "score"}, 10, 0.0, r"'score'.*'epsilon'"),
        ("ddpm", {"prediction_type": "score"}, 10, 0.0, r"'score'.*'epsilon'"),
        ("ddim", {"timestep_spacing": "karras"}, 10, 0.0, r"'karras'.*leading.*trailing.*linspace"),
        ("ddim", {"betas": tuple(BETAS[:100].tolist())}, 101, 0.0, r"101 steps.*1 to 100"),
    ],
)
def test_refusals(sampler: str, change: dict[str, Any], steps: int, eta: float, message: str) -> None:
    """What a sampler or its reference cannot run is refused, naming what was found and what was expected."""
    with pytest.raises(SamplingError, match=message) as refusal:
        schedule_for(sampler, LEARNED, replace(DIFFUSION, **change), steps, eta)
    assert "\n" not in str(refusal.value)
