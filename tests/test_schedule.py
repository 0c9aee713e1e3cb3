"""Sampler tables against diffusers' schedulers and against float64 derivations written here, from the formulas.

Every comparison is step by step from the same latents, with a seeded dummy network: no weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_runtime.bundle import DiffusionSpec, ModelSpec
from dit_runtime.errors import SamplingError
from dit_runtime.schedule import Schedule, schedule_for

BETAS = np.linspace(1e-4, 0.02, 1000)
DIFFUSION = DiffusionSpec(tuple(BETAS), "epsilon", 4, "leading", 0, True)
MODEL = ModelSpec("adaln-zero", 4, (8, 8), 2, 64, 2, 2, 256, 10, True)
FIXED = replace(MODEL, learned_variance=False)
CONFIG = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02, "clip_sample": False}
COUNTS = [1, 2, 10, 50, 250, 1000]
# diffusers' tables are float32: near t = 0, 1 − ᾱ = 1e-4 carries 6e-8. Measured: 4.4e-6 at eta 0, 1.1e-5 above.
DDIM_LIMIT, DDIM_NOISY_LIMIT = 1e-5, 2e-5
DDPM_LIMIT = 2e-5  # measured: 9.0e-6
# Our table is float32 of a float64 one. Measured: 2 to 3e-7.
FLOAT64_LIMIT = 5e-7

Network = Callable[[np.ndarray, float], tuple[np.ndarray, np.ndarray]]


def network(z: np.ndarray, t: float) -> tuple[np.ndarray, np.ndarray]:
    """A smooth stand-in: (ε, v), with v in [-1, 1]."""
    e = z * 0.8 + 0.3 * np.tanh(z * 2 + t / 500) - 0.1
    return e, np.sin(3 * z + t / 100)


def table_step(
    schedule: Schedule, index: int, z: np.ndarray, e: np.ndarray, v: np.ndarray, noise: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """A row of the table as the bundle format defines it: (next z, denoised)."""
    c = schedule.coefficients[index].astype(np.float64)
    sigma = np.exp(c[14] + c[15] * v) * c[16]
    return c[2] * z + c[11] * e + sigma * noise, c[0] * z + c[1] * e


def difference(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("steps", COUNTS)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(
    ("spacing", "offset", "to_one"),
    [("leading", 0, True), ("leading", 0, False), ("leading", 1, False), ("trailing", 0, True), ("linspace", 0, True)],
)
def test_ddim_is_diffusers(steps: int, eta: float, spacing: str, offset: int, to_one: bool) -> None:
    """Each step of DDIM equals diffusers', for every spacing and eta, wherever diffusers itself runs."""
    spec = replace(DIFFUSION, timestep_spacing=spacing, steps_offset=offset, set_alpha_to_one=to_one)
    scheduler = DDIMScheduler(**CONFIG, timestep_spacing=spacing, steps_offset=offset, set_alpha_to_one=to_one)
    scheduler.set_timesteps(steps)
    if int(scheduler.timesteps.max()) >= 1000:  # diffusers fails on its first step with an index error
        with pytest.raises(SamplingError, match="past timestep 999"):
            schedule_for("ddim", MODEL, spec, steps, eta)
        return
    schedule = schedule_for("ddim", MODEL, spec, steps, eta)
    assert np.array_equal(schedule.timesteps[schedule.rows], scheduler.timesteps.numpy())
    z, random = np.random.default_rng(0).standard_normal((2, 4, 4)), np.random.default_rng(1)
    for index, t in enumerate(scheduler.timesteps):
        e, v = network(z, float(t))
        noise = random.standard_normal(z.shape)
        result = scheduler.step(
            torch.from_numpy(e), t, torch.from_numpy(z), eta=eta, variance_noise=torch.from_numpy(noise)
        )
        following, denoised = table_step(schedule, index, z, e, v, noise)
        expected = result.prev_sample.numpy()
        assert difference(denoised, result.pred_original_sample.numpy()) <= DDIM_LIMIT
        if np.isfinite(expected).all():
            assert difference(following, expected) <= (DDIM_NOISY_LIMIT if eta else DDIM_LIMIT)
        z = following


@pytest.mark.parametrize("steps", COUNTS)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_is_the_paper(steps: int, eta: float) -> None:
    """Each step equals equation 12 of the DDIM paper in float64."""
    schedule = schedule_for("ddim", MODEL, DIFFUSION, steps, eta)
    alphas = [math.prod(1 - beta for beta in BETAS[: t + 1]) for t in range(0, 1000, 1000 // steps)][:steps]
    random = np.random.default_rng(2)
    for index in range(steps):
        now = alphas[steps - 1 - index]
        before = alphas[steps - 2 - index] if index < steps - 1 else 1.0
        z, e, noise = random.standard_normal((3, 5))
        sigma = eta * math.sqrt((1 - before) / (1 - now)) * math.sqrt(1 - now / before)
        x_0 = (z - math.sqrt(1 - now) * e) / math.sqrt(now)
        expected = math.sqrt(before) * x_0 + math.sqrt(1 - before - sigma**2) * e + sigma * noise
        following, denoised = table_step(schedule, index, z, e, np.zeros(5), noise)
        scale = np.abs(z).max() / math.sqrt(now)  # the terms cancel: errors are relative to them
        assert np.abs(following - expected).max() <= FLOAT64_LIMIT * scale
        assert np.abs(denoised - x_0).max() <= FLOAT64_LIMIT * scale


def official_timesteps(steps: int) -> list[int]:
    """``space_timesteps(1000, str(steps))`` of the official code."""
    stride, current, taken = 999 / (steps - 1), 0.0, []
    for _ in range(steps):
        taken.append(round(current))
        current += stride
    return taken


def official_steps(steps: int, learned: bool, z: np.ndarray, noises: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """The official respaced ancestral sampler in float64: (sample, x_0) of each step."""
    kept = official_timesteps(steps)
    bars = np.cumprod(1 - BETAS)
    betas, last = [], 1.0
    for t in kept:  # SpacedDiffusion: betas of the kept timesteps
        betas.append(1 - bars[t] / last)
        last = bars[t]
    betas = np.array(betas)
    bar = np.cumprod(1 - betas)
    bar_prev = np.append(1.0, bar[:-1])
    posterior = betas * (1 - bar_prev) / (1 - bar)
    low, high = np.log(np.append(posterior[1], posterior[1:])), np.log(betas)
    large = np.log(np.append(posterior[1], betas[1:]))
    results = []
    for index in reversed(range(steps)):
        e, v = network(z, kept[index])
        x_0 = np.sqrt(1 / bar[index]) * z - np.sqrt(1 / bar[index] - 1) * e
        mean = betas[index] * np.sqrt(bar_prev[index]) / (1 - bar[index]) * x_0
        mean = mean + (1 - bar_prev[index]) * np.sqrt(1 - betas[index]) / (1 - bar[index]) * z
        fraction = (v + 1) / 2
        log_variance = fraction * high[index] + (1 - fraction) * low[index] if learned else large[index]
        z = mean + (index != 0) * np.exp(0.5 * log_variance) * noises[steps - 1 - index]
        results.append((z, x_0))
    return results


@pytest.mark.parametrize("steps", COUNTS[1:])
@pytest.mark.parametrize("model", [MODEL, FIXED], ids=["learned", "fixed"])
def test_ddpm_is_the_official_code(steps: int, model: ModelSpec) -> None:
    """Respacing, mean, learned or fixed-large variance: each step equals the official sampler in float64."""
    schedule = schedule_for("ddpm", model, DIFFUSION, steps)
    assert list(schedule.timesteps[schedule.rows]) == official_timesteps(steps)[::-1]
    start = np.random.default_rng(3).standard_normal((2, 4, 4))
    noises = np.random.default_rng(4).standard_normal((steps, *start.shape))
    z = start
    for index, (sample, x_0) in enumerate(official_steps(steps, model.learned_variance, start, noises)):
        e, v = network(z, float(schedule.timesteps[schedule.rows[index]]))
        following, denoised = table_step(schedule, index, z, e, v, noises[index])
        scale = np.abs(z).max() * abs(schedule.coefficients[index, 0])
        assert np.abs(denoised - x_0).max() <= FLOAT64_LIMIT * scale
        assert np.abs(following - sample).max() <= FLOAT64_LIMIT * max(scale, np.abs(sample).max())
        z = sample


@pytest.mark.parametrize("steps", [2, 10, 50, 250])
@pytest.mark.parametrize("model", [MODEL, FIXED], ids=["learned", "fixed"])
def test_ddpm_is_diffusers_with_the_official_spacing(steps: int, model: ModelSpec) -> None:
    """diffusers' DDPMScheduler, which makes the golden records, gives the same steps."""
    kind = "learned_range" if model.learned_variance else "fixed_large"
    scheduler = DDPMScheduler(**CONFIG, variance_type=kind)
    scheduler.set_timesteps(timesteps=official_timesteps(steps)[::-1])
    schedule = schedule_for("ddpm", model, DIFFUSION, steps)
    z = np.random.default_rng(5).standard_normal((2, 4, 4, 4))
    for index, t in enumerate(scheduler.timesteps):
        e, v = network(z, float(t))
        output = np.concatenate([e, v], axis=1) if model.learned_variance else e
        result = scheduler.step(
            torch.from_numpy(output), t, torch.from_numpy(z), generator=torch.Generator().manual_seed(index)
        )
        noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(index), dtype=torch.float64).numpy()
        following, _ = table_step(schedule, index, z, e, v, noise)
        assert difference(following, result.prev_sample.numpy()) <= DDPM_LIMIT
        z = result.prev_sample.numpy()


def test_noise_is_drawn_when_diffusers_draws() -> None:
    """Seeds agree only when draws happen at the same steps: none at eta 0, all above, DDPM all but the last."""
    z = torch.zeros(1, 4, 2, 2)
    for sampler, eta in (("ddim", 0.0), ("ddim", 0.5), ("ddpm", 0.0)):
        schedule = schedule_for(sampler, FIXED, DIFFUSION, 5, eta)
        if sampler == "ddim":
            scheduler = DDIMScheduler(**CONFIG)
            scheduler.set_timesteps(5)
        else:
            scheduler = DDPMScheduler(**CONFIG, variance_type="fixed_large")
            scheduler.set_timesteps(timesteps=official_timesteps(5)[::-1])
        generator, drawn = torch.Generator().manual_seed(0), []
        for t in scheduler.timesteps:
            before = generator.get_state()
            scheduler.step(z, t, z, generator=generator, **({"eta": eta} if sampler == "ddim" else {}))
            drawn.append(not torch.equal(before, generator.get_state()))
        assert list(schedule.draws_noise) == drawn


def test_official_spacing_of_ten() -> None:
    """The official respacing '10' has both ends, unlike diffusers' leading spacing."""
    schedule = schedule_for("ddpm", MODEL, DIFFUSION, 10)
    assert list(schedule.timesteps[::-1]) == [0, 111, 222, 333, 444, 555, 666, 777, 888, 999]


@given(st.sampled_from(["ddim", "ddpm"]), st.integers(2, 1000), st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_every_table_is_sound(sampler: str, steps: int, eta: float) -> None:
    """Finite, right shapes and dtypes, no exponent without noise (0·NaN is NaN), timesteps descending."""
    schedule = schedule_for(sampler, MODEL, DIFFUSION, steps, eta if sampler == "ddim" else 0.0)
    assert len(schedule) == steps
    assert schedule.coefficients.shape == (steps, 17)
    assert schedule.initial.shape == (steps, 2)
    for array in (schedule.coefficients, schedule.initial, schedule.timesteps):
        assert array.dtype == np.float32
        assert np.isfinite(array).all()
    silent = schedule.coefficients[:, 16] == 0
    assert not schedule.coefficients[silent, 14:16].any()
    assert silent[~schedule.draws_noise].all()
    assert (np.diff(schedule.timesteps) < 0).all()
    assert np.allclose((schedule.initial.astype(np.float64) ** 2).sum(1), 1, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("heun", MODEL, DIFFUSION, 10), "choose one of ddim, ddpm"),
        (("ddim", MODEL, DIFFUSION, 0), "0 steps: expected 1 to 1000"),
        (("ddpm", MODEL, DIFFUSION, 1001), "1001 steps"),
        (("ddpm", MODEL, DIFFUSION, 1), "official respacing needs at least 2"),
        (("ddim", MODEL, DIFFUSION, 10, 1.5), "eta 1.5: expected 0 to 1"),
        (("ddpm", MODEL, DIFFUSION, 10, 0.5), "eta 0.5 with sampler ddpm"),
        (("ddim", MODEL, replace(DIFFUSION, prediction_type="sample"), 10), "prediction type 'sample'"),
        (("ddim", MODEL, replace(DIFFUSION, timestep_spacing="karras"), 10), "timestep spacing 'karras'"),
    ],
)
def test_refusals(arguments: tuple[object, ...], message: str) -> None:
    """What a sampler or its reference cannot run is refused by name."""
    with pytest.raises(SamplingError, match=message):
        schedule_for(*arguments)
