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
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support.diffusers_schedulers import diffusers_ddim
from support.schedules import (
    ALPHA_BAR,
    BETAS,
    DIFFUSION,
    FIXED,
    LEARNED,
    SCHEDULER,
    SHAPE,
    Float64,
    Step,
    asked,
    assert_close,
    network,
    normal,
    official_timesteps,
    run_table,
)

from dit_runtime.bundle.manifest import ModelSpec
from dit_runtime.core.errors import SamplingError
from dit_runtime.samplers.by_name import schedule_for
from dit_runtime.samplers.schedule import Schedule
from dit_runtime.samplers.spacing import official_timesteps as respaced
from dit_runtime.samplers.spacing import space_timesteps

# All relative to max|reference| of the step.
FLOAT64_LIMIT = 5e-7  # measured: 3.4e-7 (DDIM), 3.2e-7 (DDPM); the table is float32 of float64
FREE_LIMIT = 1e-6  # measured: 4.1e-7 after 250 steps
# diffusers' tables are float32, a product of up to a thousand factors; next to t = 0 little is left of 1 − ᾱ.
DDIM_LIMIT = 6e-6  # measured: 4.0e-6 at 1000 steps and eta above 0, 1.9e-6 elsewhere
DDPM_LIMIT = 1.5e-5  # measured: 9.8e-6 at 250 steps, 3.7e-6 at 50
DDPM_1000_LIMIT = 1e-4  # measured: 8.0e-5
INITIAL_LIMIT = 1e-6  # measured: 5.5e-7


COUNTS = [1, 2, 10, 50, 250, 1000]
ETAS = [0.0, 0.5, 1.0]
SPACINGS = [("leading", 0), ("leading", 1), ("trailing", 0), ("linspace", 0)]


def diffusers_ddpm(model: ModelSpec, steps: int) -> DDPMScheduler:
    """diffusers' DDPM on the official timesteps, as the golden records are made."""
    kind = "learned_range" if model.learned_variance else "fixed_large"
    scheduler = DDPMScheduler(**SCHEDULER, variance_type=kind)
    scheduler.set_timesteps(timesteps=official_timesteps(steps)[::-1])
    return scheduler


def diffusers_can_run(scheduler: DDIMScheduler, steps: int) -> bool:
    """Whether ``set_timesteps`` gave as many timesteps as asked for, all of them training timesteps."""
    timesteps = scheduler.timesteps.numpy()
    return len(timesteps) == steps and timesteps.min() >= 0 and timesteps.max() < len(scheduler.betas)


def follow_ddim(scheduler: DDIMScheduler, eta: float, z: Float64, noise: Float64) -> tuple[list[Float64], list[Any]]:
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


@pytest.mark.parametrize("steps", COUNTS)
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
@pytest.mark.parametrize("to_one", [True, False], ids=["to_one", "to_first"])
@pytest.mark.parametrize(
    ("spacing", "offset", "steps"),
    [(*spacing, steps) for spacing in SPACINGS for steps in COUNTS if (*spacing, steps) != ("leading", 1, 1000)],
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


@pytest.mark.parametrize("steps", COUNTS[1:])
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


@pytest.mark.parametrize("steps", COUNTS[1:])
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


def test_official_spacing_of_every_count() -> None:
    """DDPM's timesteps equal the official ones for every count, halves that round to even included."""
    for steps in range(2, 1001):
        expected = official_timesteps(steps)[::-1]
        assert respaced(1000, steps, "official").tolist() == expected, f"{steps} steps"


@pytest.mark.parametrize(("spacing", "offset"), SPACINGS)
def test_ddim_spacing_of_every_count(spacing: str, offset: int) -> None:
    """DDIM's timesteps equal diffusers' for every count that diffusers can run."""
    spec = replace(DIFFUSION, timestep_spacing=spacing, steps_offset=offset)
    scheduler = diffusers_ddim(spec)
    for steps in range(1, 1001):
        scheduler.set_timesteps(steps)
        if diffusers_can_run(scheduler, steps):
            assert np.array_equal(space_timesteps(spec, steps), scheduler.timesteps.numpy()), f"{steps} steps"


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


@given(steps=st.integers(2, 1000), learned=st.booleans())
@settings(max_examples=60, deadline=None)
def test_every_ddpm_table_is_sound(steps: int, learned: bool) -> None:
    """No count that DDPM accepts gives a table the engine cannot run; only learned variance reads v."""
    schedule = schedule_for("ddpm", LEARNED if learned else FIXED, DIFFUSION, steps)
    assert_sound(schedule, "ddpm", steps)
    assert schedule.uses_variance == learned
    a, b, *rest = schedule.coefficients[-1]
    np.testing.assert_allclose((rest[0], rest[9]), (a, b), rtol=1e-5)  # the posterior at ᾱ = 1 is x_0


def assert_sound(schedule: Schedule, sampler: str, steps: int) -> None:
    """What the engine relies on in any table."""
    assert schedule.sampler == sampler
    assert len(schedule) == steps
    expected = {
        "timesteps": (np.float32, (steps,)),
        "rows": (np.int32, (steps,)),
        "coefficients": (np.float32, (steps, 17)),
        "initial": (np.float32, (steps, 2)),
        "draws_noise": (np.bool_, (steps,)),
        "completes_step": (np.bool_, (steps,)),
    }
    for name, (kind, shape) in expected.items():
        array = getattr(schedule, name)
        assert (array.dtype, array.shape) == (kind, shape), name
        assert np.isfinite(array).all(), name
    assert sorted(set(schedule.rows.tolist())) == list(range(steps))
    assert (np.diff(asked(schedule)) < 0).all()
    assert asked(schedule)[0] <= 999
    assert asked(schedule)[-1] >= 0
    assert schedule.completes_step.all()
    g, h, k = schedule.coefficients[:, 14:].T
    assert not g[k == 0].any()  # 0·NaN is NaN
    assert not h[k == 0].any()
    assert not k[~schedule.draws_noise].any()
    assert not schedule.coefficients[0, [3, 4, 6, 7, 9, 10]].any()  # no slot is read before it was written
    np.testing.assert_allclose((schedule.initial.astype(np.float64) ** 2).sum(axis=1), 1, rtol=1e-6)


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
        ("ddim", {"prediction_type": "sample"}, 10, 0.0, r"'sample'.*'epsilon'"),
        ("ddpm", {"prediction_type": "sample"}, 10, 0.0, r"'sample'.*'epsilon'"),
        ("ddim", {"timestep_spacing": "karras"}, 10, 0.0, r"'karras'.*leading.*trailing.*linspace"),
        ("ddim", {"betas": tuple(BETAS[:100].tolist())}, 101, 0.0, r"101 steps.*1 to 100"),
    ],
)
def test_refusals(sampler: str, change: dict[str, Any], steps: int, eta: float, message: str) -> None:
    """What a sampler or its reference cannot run is refused, naming what was found and what was expected."""
    with pytest.raises(SamplingError, match=message) as refusal:
        schedule_for(sampler, LEARNED, replace(DIFFUSION, **change), steps, eta)
    assert "\n" not in str(refusal.value)
