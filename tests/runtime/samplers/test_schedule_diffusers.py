"""DDIM and DDPM against diffusers' schedulers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support.diffusers_schedulers import diffusers_ddim
from support.grids import grid
from support.optional import diffusers, torch
from support.schedules import (
    ALPHA_BAR,
    DIFFUSION,
    ETAS,
    FIXED,
    LEARNED,
    SCHEDULER,
    SHAPE,
    Float64,
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
from dit_runtime.samplers.spacing import space_timesteps

# All relative to max|reference| of the step.
FLOAT64_LIMIT = 5e-7  # measured: 3.4e-7 (DDIM), 3.2e-7 (DDPM); the table is float32 of float64
# diffusers' tables are float32, a product of up to a thousand factors; next to t = 0 little is left of 1 − ᾱ.
DDIM_LIMIT = 6e-6  # measured: 4.0e-6 at 1000 steps and eta above 0, 1.9e-6 elsewhere
DDPM_LIMIT = 1.5e-5  # measured: 9.8e-6 at 250 steps, 3.7e-6 at 50
DDPM_1000_LIMIT = 1e-4  # measured: 8.0e-5
INITIAL_LIMIT = 1e-6  # measured: 5.5e-7
SPACINGS = [("leading", 0), ("leading", 1), ("trailing", 0), ("linspace", 0)]
COUNTS = [1, 2, 10, 50, 250, 1000]


def diffusers_ddpm(model: ModelSpec, steps: int) -> diffusers.DDPMScheduler:
    """diffusers' DDPM on the official timesteps, as the golden records are made."""
    kind = "learned_range" if model.learned_variance else "fixed_large"
    scheduler = diffusers.DDPMScheduler(**SCHEDULER, variance_type=kind)
    scheduler.set_timesteps(timesteps=official_timesteps(steps)[::-1])
    return scheduler


def diffusers_can_run(scheduler: diffusers.DDIMScheduler, steps: int) -> bool:
    """Whether ``set_timesteps`` gave as many timesteps as asked for, all of them training timesteps."""
    timesteps = scheduler.timesteps.numpy()
    return len(timesteps) == steps and timesteps.min() >= 0 and timesteps.max() < len(scheduler.betas)


def follow_ddim(
    scheduler: diffusers.DDIMScheduler, eta: float, z: Float64, noise: Float64
) -> tuple[list[Float64], list[Any]]:
    """diffusers' own trajectory from z: the latents before each step, and its results."""
    inputs, results = [], []
    for t, drawn in zip(scheduler.timesteps.tolist(), noise, strict=True):
        inputs.append(z)
        output, _ = network(z, t)
        result = scheduler.step(
            torch.from_numpy(output), t, torch.from_numpy(z), eta=eta, variance_noise=torch.from_numpy(drawn)
        )
        results.append(result)
        z = result.prev_sample.numpy()
    return inputs, results


@pytest.mark.parametrize("steps", grid(COUNTS, fast=lambda steps: steps == 50))
@pytest.mark.parametrize("eta", ETAS)
@pytest.mark.parametrize("to_one", [True, False], ids=["to_one", "to_first"])
@pytest.mark.parametrize(("spacing", "offset"), SPACINGS)
def test_ddim_is_diffusers(steps: int, eta: float, to_one: bool, spacing: str, offset: int) -> None:
    """Every step of DDIM gives diffusers' sample and diffusers' x_0, at exactly diffusers' timesteps."""
    spec = replace(DIFFUSION, timestep_spacing=spacing, steps_offset=offset, set_alpha_to_one=to_one)
    scheduler = diffusers_ddim(spec)
    scheduler.set_timesteps(steps)
    z, noise = normal(1, *SHAPE), normal(2, steps, *SHAPE)
    if not diffusers_can_run(scheduler, steps):  # 1000 leading steps with offset 1: the first one is timestep 1000
        with pytest.raises(IndexError):
            follow_ddim(scheduler, eta, z, noise)
        with pytest.raises(SamplingError, match="offset"):
            schedule_for("ddim", LEARNED, spec, steps, eta)
        return
    schedule = schedule_for("ddim", LEARNED, spec, steps, eta)
    assert asked(schedule) == scheduler.timesteps.tolist()
    inputs, results = follow_ddim(scheduler, eta, z, noise)
    for step, result in zip(run_table(schedule, z, noise, network, inputs), results, strict=True):
        assert_close(step.denoised, result.pred_original_sample.numpy(), DDIM_LIMIT)
        assert_close(step.sample, result.prev_sample.numpy(), DDIM_LIMIT)


@pytest.mark.parametrize("eta", ETAS)
def test_ddim_uses_the_betas_of_the_bundle(eta: float) -> None:
    """Another beta schedule, with another number of training timesteps, gives diffusers' steps too."""
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 200) ** 2
    spec = replace(DIFFUSION, betas=tuple(betas.tolist()))
    scheduler = diffusers_ddim(spec, trained_betas=betas.tolist(), num_train_timesteps=200)
    scheduler.set_timesteps(30)
    schedule = schedule_for("ddim", LEARNED, spec, 30, eta)
    assert asked(schedule) == scheduler.timesteps.tolist()
    z, noise = normal(6, *SHAPE), normal(7, 30, *SHAPE)
    inputs, results = follow_ddim(scheduler, eta, z, noise)
    for step, result in zip(run_table(schedule, z, noise, network, inputs), results, strict=True):
        assert_close(step.sample, result.prev_sample.numpy(), DDIM_LIMIT)


@pytest.mark.parametrize("steps", grid(COUNTS[1:], fast=lambda steps: steps == 50))
@pytest.mark.parametrize("model", [LEARNED, FIXED], ids=["learned", "fixed_large"])
def test_ddpm_is_diffusers_on_the_official_timesteps(steps: int, model: ModelSpec) -> None:
    """Every step of DDPM is diffusers' DDPMScheduler's, whose generator is drawn from only where the table says so."""
    limit = DDPM_1000_LIMIT if steps == 1000 else DDPM_LIMIT
    scheduler, schedule = diffusers_ddpm(model, steps), schedule_for("ddpm", model, DIFFUSION, steps)
    assert asked(schedule) == scheduler.timesteps.tolist()
    generator, twin = torch.Generator().manual_seed(10), torch.Generator().manual_seed(10)
    z, inputs, noise, results = normal(11, *SHAPE), [], [], []
    for t, draws in zip(scheduler.timesteps.tolist(), schedule.draws_noise, strict=True):
        e, v = network(z, t)
        output = torch.from_numpy(np.concatenate([e, v], axis=1) if model.learned_variance else e)
        inputs.append(z)
        results.append(scheduler.step(output, t, torch.from_numpy(z), generator=generator))
        noise.append(torch.randn(SHAPE, generator=twin, dtype=torch.float64).numpy() if draws else np.zeros(SHAPE))
        z = results[-1].prev_sample.numpy()
    for step, result in zip(run_table(schedule, inputs[0], np.array(noise), network, inputs), results, strict=True):
        assert_close(step.denoised, result.pred_original_sample.numpy(), limit)
        assert_close(step.sample, result.prev_sample.numpy(), limit)


@pytest.mark.slow  # a sweep
@pytest.mark.parametrize(("spacing", "offset"), SPACINGS)
def test_ddim_spacing_of_every_count(spacing: str, offset: int) -> None:
    """DDIM's timesteps equal diffusers' for every count that diffusers can run."""
    spec = replace(DIFFUSION, timestep_spacing=spacing, steps_offset=offset)
    scheduler = diffusers_ddim(spec)
    for steps in range(1, 1001):
        scheduler.set_timesteps(steps)
        if diffusers_can_run(scheduler, steps):
            assert np.array_equal(space_timesteps(spec, steps), scheduler.timesteps.numpy()), f"{steps} steps"


@pytest.mark.slow  # a sweep
@pytest.mark.parametrize(("spacing", "offset", "count"), [("leading", 1, 1), ("trailing", 0, 62)])
def test_counts_that_diffusers_cannot_run_are_refused(spacing: str, offset: int, count: int) -> None:
    """A count for which diffusers leaves 0..999 (trailing 61 has a 62nd timestep, -1) is refused in words."""
    spec = replace(DIFFUSION, timestep_spacing=spacing, steps_offset=offset)
    scheduler, unusable = diffusers_ddim(spec), []
    for steps in range(1, 1001):
        scheduler.set_timesteps(steps)
        if not diffusers_can_run(scheduler, steps):
            unusable.append(steps)
    assert len(unusable) == count
    for steps in unusable:
        with pytest.raises(SamplingError, match=f"{steps} steps"):
            schedule_for("ddim", LEARNED, spec, steps)


@pytest.mark.parametrize(("spacing", "offset"), SPACINGS)
def test_initial_is_the_forward_process(spacing: str, offset: int) -> None:
    """Image-to-image starts a row from √ᾱ·x_0 + √(1−ᾱ)·noise, as the formula and diffusers' add_noise have it."""
    spec = replace(DIFFUSION, timestep_spacing=spacing, steps_offset=offset)
    x_0, noise = normal(14, 5), normal(15, 5)
    for sampler in ("ddim", "ddpm"):
        schedule = schedule_for(sampler, LEARNED, spec, 50)
        for t, (signal, spread) in zip(asked(schedule), schedule.initial.astype(np.float64), strict=True):
            assert_close(signal, np.sqrt(ALPHA_BAR[t]), FLOAT64_LIMIT)
            assert_close(spread, np.sqrt(1 - ALPHA_BAR[t]), FLOAT64_LIMIT)
            added = diffusers_ddim(spec).add_noise(torch.from_numpy(x_0), torch.from_numpy(noise), torch.tensor([t]))
            assert_close(signal * x_0 + spread * noise, added.numpy(), INITIAL_LIMIT)


@pytest.mark.parametrize(
    ("sampler", "model", "eta"),
    [
        ("ddim", LEARNED, 0.0),
        ("ddim", LEARNED, 0.5),
        ("ddim", LEARNED, 1.0),
        ("ddpm", LEARNED, 0.0),
        ("ddpm", FIXED, 0.0),
    ],
)
@pytest.mark.parametrize("steps", [2, 10])
def test_noise_is_drawn_when_diffusers_draws_it(sampler: str, model: ModelSpec, eta: float, steps: int) -> None:
    """A seed means the same image only if both draw at the same steps: never, at each, or at all but the last."""
    schedule, z = schedule_for(sampler, model, DIFFUSION, steps, eta), torch.from_numpy(normal(16, *SHAPE))
    if sampler == "ddim":
        scheduler, options = diffusers_ddim(DIFFUSION), {"eta": eta}
        scheduler.set_timesteps(steps)
        expected = [eta > 0] * steps
    else:
        scheduler, options = diffusers_ddpm(model, steps), {}
        expected = [True] * (steps - 1) + [False]
    generator, drawn = torch.Generator().manual_seed(0), []
    output = torch.cat([z, z], dim=1) if sampler == "ddpm" and model.learned_variance else z
    for t in scheduler.timesteps.tolist():
        before = generator.get_state()
        scheduler.step(output, t, z, generator=generator, **options)
        drawn.append(not torch.equal(before, generator.get_state()))
    assert drawn == expected
    assert schedule.draws_noise.tolist() == drawn


@given(
    steps=st.integers(1, 1000),
    eta=st.one_of(st.sampled_from(ETAS), st.floats(0, 1)),
    spacing=st.sampled_from(SPACINGS),
    to_one=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_every_ddim_table_is_sound(steps: int, eta: float, spacing: tuple[str, int], to_one: bool) -> None:
    """No settings that DDIM accepts give a table the engine cannot run or a viewer would misread."""
    spec = replace(DIFFUSION, timestep_spacing=spacing[0], steps_offset=spacing[1], set_alpha_to_one=to_one)
    scheduler = diffusers_ddim(spec)
    scheduler.set_timesteps(steps)
    assume(diffusers_can_run(scheduler, steps))  # the others: test_counts_that_diffusers_cannot_run_are_refused
    schedule = schedule_for("ddim", LEARNED, spec, steps, eta)
    assert_sound(schedule, "ddim", steps)
    assert not schedule.uses_variance
    assert schedule.draws_noise.all() == (eta > 0)
    if to_one and eta == 0 and asked(schedule)[-1] < 1000 // steps:
        a, b, *rest = schedule.coefficients[-1]
        assert (rest[0], rest[9]) == (a, b)  # the last sample is the denoised image itself
