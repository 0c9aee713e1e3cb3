"""Multistep and ancestral samplers, v-prediction and the official timesteps against diffusers' schedulers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support.diffusers_schedulers import (
    ANCESTRAL_ZERO_SNR_LIMIT,
    DIFFUSERS_LIMIT,
    KARRAS_LIMIT,
    follow,
    reference,
    reference_can_run,
    reference_spec,
)
from support.grids import grid
from support.optional import diffusers, torch
from support.papers import (
    CASES,
    EVERY_CASE,
    FEW,
    FREE_LIMIT,
    REFUSED,
    SOLVERS,
    SPACINGS,
    Papers,
    alpha_bars,
    ddim,
    karras,
    noise_of,
    sigmas_for,
    table_for,
)
from support.schedules import (
    FIXED,
    LEARNED,
    SHAPE,
    Float64,
    Step,
    assert_close,
    network,
    normal,
    official_timesteps,
    run_table,
    timesteps_of,
)

from dit_runtime.bundle.manifest import DiffusionSpec, ModelSpec
from dit_runtime.core.errors import SamplingError
from dit_runtime.samplers.by_name import schedule_for
from dit_runtime.samplers.schedule import Schedule

# All relative to max|reference| of the step.
FLOAT64_LIMIT = 5e-7  # measured: 4.3e-7; the table is float32 of float64

DDIM_LIMIT = 6e-6  # measured: 3.8e-6
DDIM_ZERO_SNR_LIMIT = 6e-4  # measured: 3.5e-4 at eta 1: √(1 − ᾱ − σ²) of a 0 that float32 rounds to 6e-8
DDPM_LIMIT = 8e-6  # measured: 4.8e-6
INITIAL_LIMIT = 1e-6  # measured: 3.9e-7; Karras 1.4e-5, within its own limit
HALF = 5e-3  # measured: 3.4e-3 of a timestep, by which float32 takes a noise level over a half


def inputs_of(z: Float64, steps: Sequence[Step]) -> list[Float64]:
    """What the network saw in a free run that began at z."""
    return [z, *(step.sample for step in steps[:-1])]


def assert_timesteps(schedule: Schedule, scheduler: Any, spec: DiffusionSpec) -> None:
    """diffusers' timesteps exactly; in Karras spacing the float32 tables may round an exact half the other way."""
    found, expected = np.array(timesteps_of(schedule)), scheduler.timesteps.numpy().astype(np.float64)
    assert len(found) == len(expected)
    if schedule.spacing == "karras":
        _, places = karras(spec, len(expected))
        assert (np.abs(found - places) <= 0.5 + HALF).all()
        tie = np.abs(places - np.floor(places) - 0.5) <= HALF
        found, expected = found[~tie], expected[~tie]
    assert np.array_equal(found, expected)


@pytest.mark.parametrize(
    ("sampler", "spacing", "offset", "prediction", "steps"),
    grid(
        EVERY_CASE,
        fast=lambda sampler, spacing, offset, prediction, steps: steps == 15 and prediction != "v_prediction",
    ),
)
def test_solvers_are_diffusers(sampler: str, spacing: str, offset: int, prediction: str, steps: int) -> None:
    """Every step gives diffusers' sample and x_0 at diffusers' timesteps, drawing noise exactly where it does.

    What diffusers cannot walk down to 0 (timesteps outside training, noise levels that repeat) is refused.
    """
    scheduler = reference(sampler, spacing, offset, prediction)
    scheduler.set_timesteps(steps)
    spec = reference_spec(spacing, offset, prediction)
    if not reference_can_run(scheduler, steps):
        assert (sampler, spacing, offset, prediction, steps) in REFUSED
        with pytest.raises(SamplingError, match=rf"\b{steps}\b"):
            table_for(sampler, spec, steps, spacing)
        return
    assert (sampler, spacing, offset, prediction, steps) not in REFUSED
    schedule = table_for(sampler, spec, steps, spacing)
    assert_timesteps(schedule, scheduler, spec)
    z = normal(1, *SHAPE)
    expected = follow(sampler, scheduler, z, timesteps_of(schedule))
    assert schedule.draws_noise.tolist() == expected.drew
    assert expected.drew == [sampler in ("dpmpp-2m-sde", "euler-ancestral")] * steps
    teacher = None if sampler == "unipc" else expected.inputs
    found = run_table(schedule, z, expected.noise, network, teacher)
    limit = KARRAS_LIMIT[prediction] if spacing == "karras" else DIFFUSERS_LIMIT[sampler]
    if (sampler, prediction) == ("euler-ancestral", "zero_snr"):
        limit = ANCESTRAL_ZERO_SNR_LIMIT
    for step, x_0, sample in zip(found, expected.denoised, expected.samples, strict=True):
        assert_close(step.denoised, x_0, limit)
        assert_close(step.sample, sample, limit)


@pytest.mark.parametrize("steps", [10, 250])
@pytest.mark.parametrize("sampler", SOLVERS)
def test_free_runs_end_where_the_references_end(sampler: str, steps: int, record_property: Any) -> None:
    """From the same noise the table, diffusers and the papers reach the same image: no error feeds on itself."""
    scheduler, spec, z = reference(sampler, "trailing"), reference_spec("trailing"), normal(4, *SHAPE)
    scheduler.set_timesteps(steps)
    schedule = schedule_for(sampler, LEARNED, spec, steps)
    asked = timesteps_of(schedule)
    diffusers = follow(sampler, scheduler, z, asked)
    papers = Papers(sampler, "epsilon", sigmas_for(spec, "trailing", asked)).run(z, diffusers.noise, asked)
    found = run_table(schedule, z, diffusers.noise, network)
    for name, inputs, final, limit in [
        ("papers", inputs_of(z, papers), papers[-1].sample, FREE_LIMIT),
        ("diffusers", diffusers.inputs, diffusers.samples[-1], DIFFUSERS_LIMIT[sampler]),
    ]:
        errors = [
            np.abs(value - expected).max() / np.abs(expected).max()
            for value, expected in zip([*inputs_of(z, found), found[-1].sample], [*inputs, final], strict=True)
        ]
        record_property(f"{sampler}, {steps} steps, max|Δ|/max|{name}|", f"{max(errors):.1e}")
        assert_close(found[-1].sample, final, limit)
        for value, expected in zip(inputs_of(z, found), inputs, strict=True):
            assert_close(value, expected, limit)


@pytest.mark.parametrize("sampler", SOLVERS)
def test_solvers_use_the_betas_of_the_bundle(sampler: str) -> None:
    """Another beta schedule, with another number of training timesteps, gives diffusers' steps too."""
    betas = (np.linspace(0.00085**0.5, 0.012**0.5, 200) ** 2).tolist()
    spec = replace(reference_spec("trailing"), betas=tuple(betas))
    usual = reference(sampler, "trailing")
    scheduler = type(usual).from_config(usual.config, trained_betas=betas, num_train_timesteps=200)
    scheduler.set_timesteps(20)
    schedule, z = schedule_for(sampler, LEARNED, spec, 20), normal(5, *SHAPE)
    assert_timesteps(schedule, scheduler, spec)
    expected = follow(sampler, scheduler, z, timesteps_of(schedule))
    found = run_table(schedule, z, expected.noise, network, None if sampler == "unipc" else expected.inputs)
    for step, sample in zip(found, expected.samples, strict=True):
        assert_close(step.sample, sample, DIFFUSERS_LIMIT[sampler])


@pytest.mark.slow  # a sweep
@pytest.mark.parametrize("sampler", ["dpmpp-2m", "unipc", "euler-ancestral"])
@pytest.mark.parametrize(("spacing", "offset"), SPACINGS[:-1])
def test_every_count_has_the_timesteps_of_diffusers_or_is_refused(sampler: str, spacing: str, offset: int) -> None:
    """No count between those above asks for other timesteps, or is run where diffusers' noise levels repeat."""
    scheduler, spec = reference(sampler, spacing, offset), reference_spec(spacing, offset)
    for steps in range(1, 1001, 7 if sampler == "unipc" else 1):
        scheduler.set_timesteps(steps)
        if not reference_can_run(scheduler, steps):
            with pytest.raises(SamplingError, match=rf"\b{steps}\b"):
                table_for(sampler, spec, steps, spacing)
        elif steps < 30 or steps % 111 == 0 or steps in (499, 500, 1000):
            assert_timesteps(table_for(sampler, spec, steps, spacing), scheduler, spec)


@pytest.mark.parametrize("sampler", ["dpmpp-2m", "unipc"])
@pytest.mark.parametrize("prediction", ["epsilon", "zero_snr"])
@pytest.mark.parametrize("steps", [5, 18, 20, 32, 33, 100, 300])
def test_karras_spacing_is_diffusers(sampler: str, prediction: str, steps: int) -> None:
    """Low noise levels may share a timestep; a first timestep that comes twice, which diffusers leaves out, is refused.

    At 18 and 300 steps some noise level lies halfway between two timesteps and float32 decides, in diffusers.
    """
    scheduler, spec = reference(sampler, "karras", 0, prediction), reference_spec("karras", 0, prediction)
    scheduler.set_timesteps(steps)
    if reference_can_run(scheduler, steps):
        assert_timesteps(table_for(sampler, spec, steps, "karras"), scheduler, spec)
        return
    assert prediction == "zero_snr"
    with pytest.raises(SamplingError, match=rf"\b{steps}\b"):
        table_for(sampler, spec, steps, "karras")


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "zero_snr"])
@pytest.mark.parametrize(("sampler", "spacing", "offset"), CASES)
def test_initial_is_add_noise_and_start_is_the_first_noise(
    sampler: str, spacing: str, offset: int, prediction: str
) -> None:
    """Image-to-image starts at diffusers' add_noise, and pure noise at its init_noise_sigma, as the network sees them.

    The ancestral sampler's own scale is x_0 + σ·noise, whose network input is divided by √(σ² + 1).
    """
    scheduler, spec = reference(sampler, spacing, offset, prediction), reference_spec(spacing, offset, prediction)
    scheduler.set_timesteps(10)
    schedule = table_for(sampler, spec, 10, spacing)
    sigmas = sigmas_for(spec, spacing, timesteps_of(schedule))[:-1]
    x_0, noise = normal(6, 1, 5), normal(7, 1, 5)
    scales = np.sqrt(1 + sigmas**2) if sampler == "euler-ancestral" else np.ones(10)
    limit = KARRAS_LIMIT["epsilon"] if spacing == "karras" else INITIAL_LIMIT
    assert schedule.initial.shape == (10, 2)
    for index, (signal, spread) in enumerate(schedule.initial.astype(np.float64)):
        assert_close(signal, 1 / np.sqrt(1 + sigmas[index] ** 2), FLOAT64_LIMIT)
        assert_close(spread, sigmas[index] / np.sqrt(1 + sigmas[index] ** 2), FLOAT64_LIMIT)
        scheduler.set_begin_index(index)
        added = scheduler.add_noise(
            torch.from_numpy(x_0), torch.from_numpy(noise), scheduler.timesteps[index : index + 1]
        )
        assert_close((signal * x_0 + spread * noise) * scales[index], added.numpy(), limit)
    assert schedule.start.shape == (1,)
    assert_close(schedule.start[0] * scales[0], np.array(float(scheduler.init_noise_sigma)), INITIAL_LIMIT)
    expected = sigmas[0] / scales[0] if sampler == "euler-ancestral" and spacing != "leading" else 1.0
    assert_close(schedule.start[0], np.array(expected), FLOAT64_LIMIT)


@pytest.mark.parametrize("prediction", ["v_prediction", "zero_snr"])
@pytest.mark.parametrize(
    ("steps", "spacing", "offset", "to_one", "eta"),
    grid(
        [
            (steps, *case, to_one, eta)
            for steps, case, to_one, eta in product(FEW, SPACINGS[:-1], (True, False), (0.0, 0.5, 1.0))
        ],
        fast=lambda steps, spacing, offset, to_one, eta: steps == 15 and (to_one or eta == 0),
    ),
)
def test_ddim_of_v_is_diffusers(
    steps: int, spacing: str, offset: int, to_one: bool, eta: float, prediction: str
) -> None:
    """Every DDIM step of a v-predicting model is the formula's in float64, and diffusers', also from pure noise.

    At eta 1 from no signal diffusers takes the root of 1 − ᾱ − σ², which is 0: whether float32 makes that NaN depends
    on the machine. Where it does, there is nothing to compare with, and the steps go on from the formula's.
    """
    spec = replace(reference_spec(spacing, offset, prediction), set_alpha_to_one=to_one)
    scheduler = diffusers.DDIMScheduler(
        beta_start=1e-4,
        beta_end=0.02,
        clip_sample=False,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=prediction == "zero_snr",
        timestep_spacing=spacing,
        steps_offset=offset,
        set_alpha_to_one=to_one,
    )
    scheduler.set_timesteps(steps)
    schedule, alpha_bar = schedule_for("ddim", LEARNED, spec, steps, eta), alpha_bars(spec)
    assert timesteps_of(schedule) == scheduler.timesteps.tolist()
    assert schedule.draws_noise.tolist() == [eta > 0] * steps
    z, inputs, noise, samples = normal(14, *SHAPE), [], noise_of(15, steps), []

    def formula(z: Float64, t: float, drawn: Float64) -> Step:
        s = int(t) - 1000 // steps
        before = alpha_bar[s] if s >= 0 else 1.0 if to_one else alpha_bar[0]
        return ddim("v_prediction", z, t, alpha_bar[int(t)], before, eta, drawn)

    for t, drawn in zip(scheduler.timesteps.tolist(), noise, strict=True):
        inputs.append(z)
        e = torch.from_numpy(network(z, t)[0])
        step = scheduler.step(e, t, torch.from_numpy(z), eta=eta, variance_noise=torch.from_numpy(drawn))
        samples.append(step.prev_sample.numpy())
        z = samples[-1] if np.isfinite(samples[-1]).all() else formula(z, t, drawn).sample
        assert z is samples[-1] or (eta, prediction, t) == (1, "zero_snr", 999)
    for step, t, z, drawn, sample in zip(
        run_table(schedule, inputs[0], noise, network, inputs),
        timesteps_of(schedule),
        inputs,
        noise,
        samples,
        strict=True,
    ):
        for value, reference_value in zip(step, formula(z, t, drawn), strict=True):
            assert_close(value, reference_value, FLOAT64_LIMIT)
        if np.isfinite(sample).all():
            limit = DDIM_ZERO_SNR_LIMIT if (eta, prediction) == (1, "zero_snr") else DDIM_LIMIT
            assert_close(step.sample, sample, limit)


@pytest.mark.parametrize("prediction", ["v_prediction", "zero_snr"])
@pytest.mark.parametrize("model", [LEARNED, FIXED], ids=["learned", "fixed_large"])
@pytest.mark.parametrize("steps", [2, 10, 50])
def test_ddpm_of_v_is_diffusers(steps: int, model: ModelSpec, prediction: str) -> None:
    """Every DDPM step of a v-predicting model is DDPMScheduler's on the official timesteps, drawing where it draws."""
    spec = reference_spec("leading", 0, prediction)
    scheduler = diffusers.DDPMScheduler(
        beta_start=1e-4,
        beta_end=0.02,
        clip_sample=False,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=prediction == "zero_snr",
        variance_type="learned_range" if model.learned_variance else "fixed_large",
    )
    scheduler.set_timesteps(timesteps=official_timesteps(steps)[::-1])
    schedule = schedule_for("ddpm", model, spec, steps)
    generator, twin = torch.Generator().manual_seed(16), torch.Generator().manual_seed(16)
    z, inputs, noise, results = normal(17, *SHAPE), [], [], []
    for t, draws in zip(scheduler.timesteps.tolist(), schedule.draws_noise, strict=True):
        output = np.concatenate(network(z, t), axis=1) if model.learned_variance else network(z, t)[0]
        inputs.append(z)
        results.append(scheduler.step(torch.from_numpy(output), t, torch.from_numpy(z), generator=generator))
        noise.append(torch.randn(SHAPE, generator=twin, dtype=torch.float64).numpy() if draws else np.zeros(SHAPE))
        z = results[-1].prev_sample.numpy()
    for step, result in zip(run_table(schedule, inputs[0], np.array(noise), network, inputs), results, strict=True):
        assert_close(step.denoised, result.pred_original_sample.numpy(), DDPM_LIMIT)
        assert_close(step.sample, result.prev_sample.numpy(), DDPM_LIMIT)


@given(
    case=st.sampled_from(CASES),
    prediction=st.sampled_from(["epsilon", "v_prediction", "zero_snr"]),
    steps=st.one_of(st.integers(1, 60), st.integers(1, 1000)),
)
@settings(max_examples=120, deadline=None)
def test_every_table_is_sound(case: tuple[str, str, int], prediction: str, steps: int) -> None:
    """No settings that diffusers can run give a table the engine cannot run or a viewer would misread."""
    sampler, spacing, offset = case
    scheduler = reference(sampler, spacing, offset, prediction)
    scheduler.set_timesteps(steps)
    assume(reference_can_run(scheduler, steps))
    schedule = table_for(sampler, reference_spec(spacing, offset, prediction), steps, spacing)
    assert_sound(schedule, sampler, steps)
    assert schedule.spacing == spacing
    assert schedule.draws_noise.all() == schedule.draws_noise.any() == (sampler in ("dpmpp-2m-sde", "euler-ancestral"))
    a, b, *rest = schedule.coefficients[-1]
    assert schedule.coefficients[-1, 16] == 0  # what is drawn after the last step is not added
    if sampler != "unipc":
        assert (rest[0], rest[9]) == (a, b)  # the last sample is the denoised image itself
        assert not any(rest[1:3])


@pytest.mark.parametrize(("spacing", "steps"), [("trailing", 3), ("linspace", 4)])
def test_cosine_betas_that_float32_cannot_subtract(spacing: str, steps: int) -> None:
    """Where diffusers' float32 takes the root of a difference below 0, the table has the root σ_to²/σ_from itself."""
    scheduler = diffusers.EulerAncestralDiscreteScheduler(beta_schedule="squaredcos_cap_v2", timestep_spacing=spacing)
    scheduler.set_timesteps(steps)
    sigma, following = scheduler.sigmas[:-1], scheduler.sigmas[1:]
    up = following**2 * (sigma**2 - following**2) / sigma**2
    assert (following**2 - up)[0] < 0
    spec = replace(reference_spec(spacing), betas=tuple(scheduler.betas.double().tolist()))
    schedule = schedule_for("euler-ancestral", LEARNED, spec, steps)
    inputs = normal(1, steps, *SHAPE)
    found = run_table(schedule, inputs[0], normal(2, steps, *SHAPE), network, list(inputs))
    alpha_bar = np.append(np.cumprod(1 - np.array(spec.betas))[np.array(timesteps_of(schedule), int)], 1.0)
    sigmas = np.sqrt((1 - alpha_bar) / alpha_bar)
    for n, (z, step) in enumerate(zip(inputs, found, strict=True)):
        e, _ = network(z, timesteps_of(schedule)[n])
        denoised = z / np.sqrt(alpha_bar[n]) - sigmas[n] * e
        mean = np.sqrt(alpha_bar[n + 1]) * (denoised + sigmas[n + 1] ** 2 / sigmas[n] * e)
        np.testing.assert_allclose(step.mean, mean, rtol=0, atol=FLOAT64_LIMIT * np.abs(mean).max())


def assert_sound(schedule: Schedule, sampler: str, steps: int) -> None:
    """What the engine relies on in any table; low Karras noise levels may share a timestep."""
    assert schedule.sampler == sampler
    assert len(schedule) == steps
    expected = {
        "timesteps": (np.float32, (len(set(timesteps_of(schedule))),)),
        "rows": (np.int32, (steps,)),
        "coefficients": (np.float32, (steps, 17)),
        "initial": (np.float32, (steps, 2)),
        "start": (np.float32, (1,)),
        "draws_noise": (np.bool_, (steps,)),
        "completes_step": (np.bool_, (steps,)),
    }
    for name, (kind, shape) in expected.items():
        array = getattr(schedule, name)
        assert (array.dtype, array.shape) == (kind, shape), name
        assert np.isfinite(array).all(), name
    assert sorted(set(schedule.rows.tolist())) == list(range(len(schedule.timesteps)))
    fall = np.diff(timesteps_of(schedule))
    assert (fall <= 0).all() if schedule.spacing == "karras" else (fall < 0).all()
    assert 0 <= timesteps_of(schedule)[-1] <= timesteps_of(schedule)[0] <= 999
    assert schedule.completes_step.all()
    assert not schedule.uses_variance
    g, h, k = schedule.coefficients[:, 14:].T
    assert not h.any()
    assert not g[k == 0].any()  # 0·NaN is NaN
    assert not k[~schedule.draws_noise].any()
    assert not schedule.coefficients[0, [3, 4, 6, 7, 9, 10]].any()  # no slot is read before it was written
    assert (np.diff(schedule.initial[:, 0]) > 0).all()
    np.testing.assert_allclose((schedule.initial.astype(np.float64) ** 2).sum(axis=1), 1, rtol=1e-6)
