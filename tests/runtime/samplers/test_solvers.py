"""Multistep and ancestral samplers, v-prediction and the official spacings, against the papers and the references.

Two oracles, neither of which knows the other or the table. ``Papers`` is written here in float64 from the papers, as
integrals over λ = log(α/σ) of the interpolated prediction of x_0 (DPM-Solver++ 2M and SDE-DPM-Solver++ 2M: arXiv
2211.01095; its 3M as the authors' code has it; UniPC with B(h) = expm1(h): arXiv 2302.04867; ancestral sampling: the
posterior of arXiv 2006.11239, equation 6). The other is diffusers itself, with its float32 tables. The official
spacings are held against float64 formulas of the official respacing.

The runs are teacher forced except UniPC's, whose memory holds corrected samples: it runs freely in both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support.diffusers_schedulers import (
    ANCESTRAL_ZERO_SNR_LIMIT,
    DIFFUSERS_LIMIT,
    KARRAS_LIMIT,
    follow,
    reference,
    reference_can_run,
)
from support.papers import (
    CASES,
    FREE_LIMIT,
    SOLVERS,
    SPACINGS,
    ZERO_SNR_BETAS,
    Papers,
    karras,
    noise_of,
    sigmas_for,
    spec_for,
    table_for,
)
from support.schedules import (
    DIFFUSION,
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

COUNTS = [1, 2, 10, 14, 15, 16, 50, 250, 1000]
FEW = [1, 2, 10, 15, 50]
# Where 2⁻²⁴ stands in for an ᾱ of 0 at timestep 999, it is more than the ᾱ of 996 to 998: diffusers keeps those.
NEXT_TO_PURE_NOISE = [
    (sampler, spacing, 0, "zero_snr", steps)
    for sampler, spacing, steps in [
        ("dpmpp-2m", "leading", 249),
        ("dpmpp-2m", "trailing", 500),
        ("unipc", "leading", 249),
        ("unipc", "linspace", 499),
        ("euler-ancestral", "leading", 250),
        ("euler-ancestral", "leading", 500),
        ("euler-ancestral", "linspace", 250),
        ("euler-ancestral", "trailing", 1000),
    ]
]


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
    [(*case, "epsilon", steps) for case in CASES for steps in (FEW if case[2] else COUNTS)]
    + [(*case, prediction, steps) for case in CASES for prediction in ("v_prediction", "zero_snr") for steps in FEW]
    + NEXT_TO_PURE_NOISE,
)
def test_solvers_are_diffusers(sampler: str, spacing: str, offset: int, prediction: str, steps: int) -> None:
    """Every step gives diffusers' sample and x_0 at diffusers' timesteps, drawing noise exactly where it does.

    What diffusers cannot walk down to 0 (timesteps outside training, noise levels that repeat) is refused.
    """
    scheduler = reference(sampler, spacing, offset, prediction)
    scheduler.set_timesteps(steps)
    spec = spec_for(spacing, offset, prediction)
    if not reference_can_run(scheduler, steps):
        with pytest.raises(SamplingError, match=rf"\b{steps}\b"):
            table_for(sampler, spec, steps, spacing)
        return
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


@pytest.mark.parametrize(
    ("sampler", "spacing", "offset", "prediction", "steps"),
    [(*case, "epsilon", steps) for case in CASES for steps in (FEW if case[2] else COUNTS)]
    + [(*case, prediction, steps) for case in CASES for prediction in ("v_prediction", "zero_snr") for steps in FEW]
    + NEXT_TO_PURE_NOISE,
)
def test_solvers_are_the_papers(sampler: str, spacing: str, offset: int, prediction: str, steps: int) -> None:
    """Every step is the papers' integral in float64: x_0, mean and noise scale, each by itself."""
    scheduler = reference(sampler, spacing, offset, prediction)
    scheduler.set_timesteps(steps)
    if not reference_can_run(scheduler, steps):
        pytest.skip("refused: test_solvers_are_diffusers")
    spec = spec_for(spacing, offset, prediction)
    schedule = table_for(sampler, spec, steps, spacing)
    asked = timesteps_of(schedule)
    inputs, noise = noise_of(2, steps), noise_of(3, steps)
    teacher = None if sampler == "unipc" else list(inputs)
    papers = Papers(sampler, spec.prediction_type, sigmas_for(spec, spacing, asked))
    found = run_table(schedule, inputs[0], noise, network, teacher)
    for step, expected in zip(found, papers.run(inputs[0], noise, asked, teacher), strict=True):
        for value, reference_value in zip(step, expected, strict=True):
            assert_close(value, reference_value, FREE_LIMIT if teacher is None else FLOAT64_LIMIT)


@pytest.mark.parametrize("steps", [10, 250])
@pytest.mark.parametrize("sampler", SOLVERS)
def test_free_runs_end_where_the_references_end(sampler: str, steps: int, record_property: Any) -> None:
    """From the same noise the table, diffusers and the papers reach the same image: no error feeds on itself."""
    scheduler, spec, z = reference(sampler, "trailing"), spec_for("trailing"), normal(4, *SHAPE)
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
    spec = replace(spec_for("trailing"), betas=tuple(betas))
    usual = reference(sampler, "trailing")
    scheduler = type(usual).from_config(usual.config, trained_betas=betas, num_train_timesteps=200)
    scheduler.set_timesteps(20)
    schedule, z = schedule_for(sampler, LEARNED, spec, 20), normal(5, *SHAPE)
    assert_timesteps(schedule, scheduler, spec)
    expected = follow(sampler, scheduler, z, timesteps_of(schedule))
    found = run_table(schedule, z, expected.noise, network, None if sampler == "unipc" else expected.inputs)
    for step, sample in zip(found, expected.samples, strict=True):
        assert_close(step.sample, sample, DIFFUSERS_LIMIT[sampler])


@pytest.mark.parametrize("sampler", ["dpmpp-2m", "unipc", "euler-ancestral"])
@pytest.mark.parametrize(("spacing", "offset"), SPACINGS[:-1])
def test_every_count_has_the_timesteps_of_diffusers_or_is_refused(sampler: str, spacing: str, offset: int) -> None:
    """No count between those above asks for other timesteps, or is run where diffusers' noise levels repeat."""
    scheduler, spec = reference(sampler, spacing, offset), spec_for(spacing, offset)
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
    scheduler, spec = reference(sampler, "karras", 0, prediction), spec_for("karras", 0, prediction)
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
    scheduler, spec = reference(sampler, spacing, offset, prediction), spec_for(spacing, offset, prediction)
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


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("steps", [1, 10, 50, 1000])
def test_ancestral_sampling_is_ddim_with_eta_one(prediction: str, steps: int) -> None:
    """In the network's scale an ancestral step is DDIM's at eta 1, at the same timesteps; they were derived apart."""
    spec = spec_for("leading", 0, prediction)
    ancestral, ddim = (
        schedule_for("euler-ancestral", LEARNED, spec, steps),
        schedule_for("ddim", LEARNED, spec, steps, 1.0),
    )
    inputs, noise = noise_of(8, steps), noise_of(9, steps)
    assert timesteps_of(ancestral) == timesteps_of(ddim)
    for step, expected in zip(
        run_table(ancestral, inputs[0], noise, network, list(inputs)),
        run_table(ddim, inputs[0], noise, network, list(inputs)),
        strict=True,
    ):
        assert_close(step.mean, expected.mean, FLOAT64_LIMIT)
        assert_close(step.scale, expected.scale, FLOAT64_LIMIT)


@pytest.mark.parametrize("sampler", ["ddim", *SOLVERS])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_a_spacing_argument_overrides_the_bundles(sampler: str, spacing: str) -> None:
    """A spacing asked for gives the table of a bundle that records it; none gives the recorded one."""
    for recorded in ("leading", "trailing"):
        asked = schedule_for(sampler, LEARNED, spec_for(recorded, 1), 12, spacing=spacing)
        expected = schedule_for(sampler, LEARNED, spec_for(spacing, 1), 12)
        assert asked.spacing == expected.spacing == spacing
        for name in ("timesteps", "rows", "coefficients", "initial", "start", "draws_noise", "completes_step"):
            np.testing.assert_array_equal(getattr(asked, name), getattr(expected, name))


def alpha_bars(spec: DiffusionSpec) -> Float64:
    with np.errstate(divide="ignore"):
        return np.exp(np.cumsum(np.log1p(-np.array(spec.betas))))


def predictions(prediction_type: str, z: Float64, e: Float64, now: float) -> tuple[Float64, Float64]:
    """(x_0, ε) at ᾱ = now; v-prediction is v = √ᾱ·ε − √(1−ᾱ)·x_0 of arXiv 2202.00512."""
    if prediction_type == "epsilon":
        return (z - math.sqrt(1 - now) * e) / math.sqrt(now), e
    return math.sqrt(now) * z - math.sqrt(1 - now) * e, math.sqrt(1 - now) * z + math.sqrt(now) * e


def ddim(prediction_type: str, z: Float64, t: float, now: float, before: float, eta: float, noise: Float64) -> Step:
    """arXiv 2010.02502, equation 12, with σ of equation 16."""
    x_0, eps = predictions(prediction_type, z, network(z, t)[0], now)
    sigma = eta * math.sqrt((1 - before) / (1 - now) * (1 - now / before))
    mean = math.sqrt(before) * x_0 + math.sqrt(max(0.0, 1 - before - sigma**2)) * eps
    return Step(x_0, mean, np.full_like(z, sigma), mean + sigma * noise)


def ddpm(prediction_type: str, learned: bool, z: Float64, t: float, now: float, before: float, noise: Float64) -> Step:
    """The posterior as a product of two Gaussians, with the learned or the larger variance of arXiv 2102.09672.

    From x_0 the latents are √before·x_0 with variance 1 − before; from z they are z/√α with variance β/α.
    """
    e, v = network(z, t)
    x_0, _ = predictions(prediction_type, z, e, now)
    if before == 1:
        return Step(x_0, x_0, np.zeros_like(z), x_0)
    alpha, beta = now / before, 1 - now / before
    variance = 1 / (1 / (1 - before) + alpha / beta)
    mean = variance * (math.sqrt(before) * x_0 / (1 - before) + math.sqrt(alpha) * z / beta)
    scale = np.sqrt(beta ** ((1 + v) / 2) * variance ** ((1 - v) / 2)) if learned else np.full_like(z, math.sqrt(beta))
    return Step(x_0, mean, scale, mean + scale * noise)


def strided_timesteps(steps: int) -> list[int]:
    """The official respacing "ddimN", ascending: multiples of the smallest stride with N of them; [] if none has."""
    for stride in range(1, 1000):
        if math.ceil(1000 / stride) == steps:
            return [index * stride for index in range(steps)]
    return []


def respaced(spacing: str, steps: int, spec: DiffusionSpec) -> list[tuple[int, float, float]]:
    """(t, ᾱ, ᾱ at the next kept timestep or 1), in sampling order."""
    kept = official_timesteps(steps) if spacing == "official" else strided_timesteps(steps)
    now = alpha_bars(spec)[kept].tolist()
    return list(zip(kept, now, [1.0, *now[:-1]], strict=True))[::-1]


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("spacing", ["official", "official-ddim"])
@pytest.mark.parametrize(
    ("prediction", "steps"),
    [("epsilon", steps) for steps in COUNTS[1:]]
    + [(prediction, steps) for prediction in ("v_prediction", "zero_snr") for steps in FEW[1:]],
)
def test_ddim_is_the_official_ddim_sample(spacing: str, steps: int, eta: float, prediction: str) -> None:
    """On the official timesteps a DDIM step goes to the next kept timestep, where diffusers' goes a fixed stride."""
    spec = spec_for("leading", 0, prediction)
    schedule = schedule_for("ddim", LEARNED, spec, steps, eta, spacing)
    inputs, noise, places = noise_of(10, steps), noise_of(11, steps), respaced(spacing, steps, spec)
    assert timesteps_of(schedule) == [t for t, _, _ in places]
    found = run_table(schedule, inputs[0], noise, network, list(inputs))
    for step, (t, now, before), z, drawn in zip(found, places, inputs, noise, strict=True):
        expected = ddim(spec.prediction_type, z, float(t), now, before, eta, drawn)
        for value, reference_value in zip(step, expected, strict=True):
            assert_close(value, reference_value, FLOAT64_LIMIT)
    np.testing.assert_allclose(schedule.initial, [[now**0.5, (1 - now) ** 0.5] for _, now, _ in places], rtol=1e-6)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "zero_snr"])
@pytest.mark.parametrize("model", [LEARNED, FIXED], ids=["learned", "fixed_large"])
@pytest.mark.parametrize("spacing", [None, "official", "official-ddim"])
@pytest.mark.parametrize("steps", [2, 15, 50, 250])
def test_ddpm_is_the_posterior_on_official_timesteps(
    steps: int, spacing: str | None, model: ModelSpec, prediction: str
) -> None:
    """DDPM's x_0, mean and noise scale for both official spacings and both prediction types; none means official."""
    spec = spec_for("leading", 0, prediction)
    schedule = schedule_for("ddpm", model, spec, steps, spacing=spacing)
    assert schedule.spacing == (spacing or "official")
    inputs, noise, places = noise_of(12, steps), noise_of(13, steps), respaced(schedule.spacing, steps, spec)
    assert timesteps_of(schedule) == [t for t, _, _ in places]
    found = run_table(schedule, inputs[0], noise, network, list(inputs))
    for step, (t, now, before), z, drawn in zip(found, places, inputs, noise, strict=True):
        expected = ddpm(spec.prediction_type, model.learned_variance, z, float(t), now, before, drawn)
        for value, reference_value in zip(step, expected, strict=True):
            assert_close(value, reference_value, FLOAT64_LIMIT)


def test_official_ddim_spacing_of_every_count() -> None:
    """ "ddimN" exists only where an integer stride gives N timesteps; other counts are refused, and so is one step."""
    possible = [steps for steps in range(1, 1001) if strided_timesteps(steps)]
    assert (len(possible), possible[:3], possible[-3:]) == (62, [2, 3, 4], [334, 500, 1000])
    for steps in range(1, 1001):
        sampler = ("ddim", "ddpm")[steps % 2]
        if steps in possible:
            schedule = schedule_for(sampler, LEARNED, DIFFUSION, steps, spacing="official-ddim")
            assert timesteps_of(schedule)[::-1] == strided_timesteps(steps)
            continue
        with pytest.raises(SamplingError, match=rf"\b{steps}\b"):
            schedule_for(sampler, LEARNED, DIFFUSION, steps, spacing="official-ddim")


@pytest.mark.parametrize("sampler", SOLVERS)
def test_solvers_of_an_official_bundle(sampler: str) -> None:
    """The official code has no multistep solvers: its bundles space them as diffusers does by default."""
    official = replace(DIFFUSION, timestep_spacing="official")
    found = schedule_for(sampler, LEARNED, official, 10)
    expected = schedule_for(sampler, LEARNED, DIFFUSION, 10, spacing="linspace")
    assert found.spacing == "linspace"
    assert np.array_equal(found.coefficients, expected.coefficients)


def test_official_spacing_of_one_step_is_refused() -> None:
    """The official code has no posterior variance for a single step: its DDIM and its DDPM both fail on it."""
    for sampler in ("ddim", "ddpm"):
        with pytest.raises(SamplingError, match=r"\b1 step\b"):
            schedule_for(sampler, LEARNED, DIFFUSION, 1, spacing="official")


@pytest.mark.parametrize("prediction", ["v_prediction", "zero_snr"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("to_one", [True, False], ids=["to_one", "to_first"])
@pytest.mark.parametrize(("spacing", "offset"), SPACINGS[:-1])
@pytest.mark.parametrize("steps", FEW)
def test_ddim_of_v_is_diffusers(
    steps: int, spacing: str, offset: int, to_one: bool, eta: float, prediction: str
) -> None:
    """Every DDIM step of a v-predicting model is the formula's in float64, and diffusers', also from pure noise.

    At eta 1 from no signal diffusers takes the root of 1 − ᾱ − σ², which is 0: whether float32 makes that NaN depends
    on the machine. Where it does, there is nothing to compare with, and the steps go on from the formula's.
    """
    spec = replace(spec_for(spacing, offset, prediction), set_alpha_to_one=to_one)
    scheduler = DDIMScheduler(
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
    spec = spec_for("leading", 0, prediction)
    scheduler = DDPMScheduler(
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
    schedule = table_for(sampler, spec_for(spacing, offset, prediction), steps, spacing)
    assert_sound(schedule, sampler, steps)
    assert schedule.spacing == spacing
    assert schedule.draws_noise.all() == schedule.draws_noise.any() == (sampler in ("dpmpp-2m-sde", "euler-ancestral"))
    a, b, *rest = schedule.coefficients[-1]
    assert schedule.coefficients[-1, 16] == 0  # what is drawn after the last step is not added
    if sampler != "unipc":
        assert (rest[0], rest[9]) == (a, b)  # the last sample is the denoised image itself
        assert not any(rest[1:3])


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


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", *SOLVERS])
def test_noise_prediction_from_pure_noise_is_refused(sampler: str) -> None:
    """At an ᾱ of 0 the noise says nothing of x_0: a last beta of 1 goes with v-prediction only."""
    spec = replace(DIFFUSION, betas=ZERO_SNR_BETAS, timestep_spacing="trailing")
    with pytest.raises(SamplingError, match="epsilon"):
        schedule_for(sampler, LEARNED, spec, 10)
    assert len(schedule_for(sampler, LEARNED, replace(spec, prediction_type="v_prediction"), 10)) == 10


@pytest.mark.parametrize(
    ("sampler", "steps", "eta", "spacing", "message"),
    [
        *((sampler, 0, 0.0, None, r"\b0 steps") for sampler in SOLVERS),
        *((sampler, -1, 0.0, None, r"-1 steps") for sampler in SOLVERS),
        *((sampler, 1001, 0.0, None, r"\b1001 steps") for sampler in SOLVERS),
        *((sampler, 10, 0.5, None, r"eta 0\.5") for sampler in SOLVERS),
        *((sampler, 10, math.nan, None, r"eta nan") for sampler in SOLVERS),
        *((sampler, 10, 0.0, "cosine", r"'cosine'") for sampler in ("ddim", "ddpm", *SOLVERS)),
        *((sampler, 10, 0.0, "", r"''") for sampler in ("ddim", "ddpm", *SOLVERS)),
        *((sampler, 10, 0.0, "official", r"'official'") for sampler in SOLVERS),
        *((sampler, 10, 0.0, "official-ddim", r"'official-ddim'") for sampler in SOLVERS),
        *((sampler, 10, 0.0, "karras", r"'karras'") for sampler in ("ddim", "ddpm", "euler-ancestral")),
        ("ddim", 1001, 0.0, "official", r"\b1001 steps"),
        ("ddpm", 1001, 0.0, "official", r"\b1001 steps"),
    ],
)
def test_refusals(sampler: str, steps: int, eta: float, spacing: str | None, message: str) -> None:
    """What a sampler's reference has not is refused in one line that names it."""
    with pytest.raises(SamplingError, match=message) as refusal:
        schedule_for(sampler, LEARNED, DIFFUSION, steps, eta, spacing)
    assert "\n" not in str(refusal.value)
