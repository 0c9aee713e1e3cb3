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
from dataclasses import replace

import numpy as np
import pytest
from support.grids import grid
from support.papers import (
    COUNTS,
    EVERY_CASE,
    FEW,
    FREE_LIMIT,
    REFUSED,
    SOLVERS,
    ZERO_SNR_BETAS,
    Papers,
    alpha_bars,
    ddim,
    noise_of,
    predictions,
    sigmas_for,
    spec_for,
    table_for,
)
from support.schedules import (
    DIFFUSION,
    FIXED,
    LEARNED,
    Float64,
    Step,
    assert_close,
    network,
    official_timesteps,
    run_table,
    timesteps_of,
)

from dit_runtime.bundle.manifest import DiffusionSpec, ModelSpec
from dit_runtime.core.errors import SamplingError
from dit_runtime.samplers.by_name import schedule_for

# All relative to max|reference| of the step.
FLOAT64_LIMIT = 5e-7  # measured: 4.3e-7; the table is float32 of float64


@pytest.mark.parametrize(
    ("sampler", "spacing", "offset", "prediction", "steps"),
    grid(
        [case for case in EVERY_CASE if case not in REFUSED],
        fast=lambda sampler, spacing, offset, prediction, steps: (
            steps in ((1, 2, 15, 50) if prediction == "epsilon" else (15,))
        ),
    ),
)
def test_solvers_are_the_papers(sampler: str, spacing: str, offset: int, prediction: str, steps: int) -> None:
    """Every step is the papers' integral in float64: x_0, mean and noise scale, each by itself."""
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
    grid(
        [("epsilon", steps) for steps in COUNTS[1:]]
        + [(prediction, steps) for prediction in ("v_prediction", "zero_snr") for steps in FEW[1:]],
        fast=lambda prediction, steps: steps in ((2, 15, 50) if prediction == "epsilon" else (15,)),
    ),
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
@pytest.mark.parametrize("steps", grid([2, 15, 50, 250], fast=lambda steps: steps == 15))
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


@pytest.mark.slow  # a sweep
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


@pytest.mark.parametrize("spacing", ["official", "default"])
@pytest.mark.parametrize("sampler", SOLVERS)
def test_solvers_of_a_bundle_without_a_spacing_for_them(sampler: str, spacing: str) -> None:
    """The official code has no multistep solvers, and a checkpoint may state no spacing: diffusers' default it is."""
    found = schedule_for(sampler, LEARNED, replace(DIFFUSION, timestep_spacing=spacing), 10)
    expected = schedule_for(sampler, LEARNED, DIFFUSION, 10, spacing="linspace")
    assert found.spacing == "linspace"
    assert np.array_equal(found.coefficients, expected.coefficients)


def test_ddim_of_a_bundle_without_a_stated_spacing() -> None:
    """DDIM's own default in diffusers."""
    found = schedule_for("ddim", LEARNED, replace(DIFFUSION, timestep_spacing="default"), 10)
    expected = schedule_for("ddim", LEARNED, DIFFUSION, 10, spacing="leading")
    assert found.spacing == "leading"
    assert np.array_equal(found.timesteps, expected.timesteps)
    assert np.array_equal(found.coefficients, expected.coefficients)


def test_official_spacing_of_one_step_is_refused() -> None:
    """The official code has no posterior variance for a single step: its DDIM and its DDPM both fail on it."""
    for sampler in ("ddim", "ddpm"):
        with pytest.raises(SamplingError, match=r"\b1 step\b"):
            schedule_for(sampler, LEARNED, DIFFUSION, 1, spacing="official")


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
