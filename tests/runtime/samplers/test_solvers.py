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
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    UniPCMultistepScheduler,
)
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_schedule import (
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
)

from dit_runtime.bundle.manifest import DiffusionSpec, ModelSpec
from dit_runtime.core.errors import SamplingError
from dit_runtime.samplers.by_name import schedule_for
from dit_runtime.samplers.schedule import Schedule

# All relative to max|reference| of the step.
FLOAT64_LIMIT = 5e-7  # measured: 4.3e-7; the table is float32 of float64
FREE_LIMIT = 1.4e-6  # measured: 8.9e-7 (UniPC, 1000 steps), 6.2e-7 elsewhere
# diffusers' tables are float32: a product of up to a thousand factors, and differences of what is nearly equal.
DIFFUSERS_LIMIT = {
    "dpmpp-2m": 2.3e-6,  # measured: 1.3e-6
    "dpmpp-2m-sde": 9e-6,  # measured: 5.8e-6, the noise scale's 1 − e⁻²ʰ at 250 and 1000 steps
    "dpmpp-3m": 2.3e-6,  # measured: 1.5e-6
    "unipc": 3.5e-6,  # measured: 2.2e-6 at 1000 steps
    "euler-ancestral": 6e-6,  # measured: 4.1e-6
}
ANCESTRAL_ZERO_SNR_LIMIT = 7e-5  # measured: 4.4e-5: from 4096 down to the next noise level by a difference
KARRAS_LIMIT = {  # all levels follow from the lowest σ, of which float32's 1 − ᾱ at the first timestep keeps 4 digits
    "epsilon": 4e-5,  # measured: 2.4e-5
    "v_prediction": 1.6e-4,  # measured: 1.1e-4
    "zero_snr": 1e-6,  # measured: 5.0e-7
}
DDIM_LIMIT = 6e-6  # measured: 3.8e-6
DDIM_ZERO_SNR_LIMIT = 6e-4  # measured: 3.5e-4 at eta 1: √(1 − ᾱ − σ²) of a 0 that float32 rounds to 6e-8
DDPM_LIMIT = 8e-6  # measured: 4.8e-6
INITIAL_LIMIT = 1e-6  # measured: 3.9e-7; Karras 1.4e-5, within its own limit
HALF = 5e-3  # measured: 3.4e-3 of a timestep, by which float32 takes a noise level over a half

COUNTS = [1, 2, 10, 14, 15, 16, 50, 250, 1000]
FEW = [1, 2, 10, 15, 50]
SPACINGS = [("leading", 0), ("leading", 1), ("trailing", 0), ("linspace", 0), ("karras", 0)]
SOLVERS = ["dpmpp-2m", "dpmpp-2m-sde", "dpmpp-3m", "unipc", "euler-ancestral"]
CASES = [
    (sampler, *spacing)
    for sampler in SOLVERS
    for spacing in SPACINGS
    if (sampler, spacing[0]) != ("euler-ancestral", "karras")
]
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
ZERO_SNR_BETAS = tuple(rescale_zero_terminal_snr(torch.linspace(1e-4, 0.02, 1000)).tolist())  # the last is 1
NODES, WEIGHTS = np.polynomial.legendre.leggauss(64)


def spec_for(spacing: str, offset: int = 0, prediction: str = "epsilon") -> DiffusionSpec:
    """A bundle's diffusion; "zero_snr" is v-prediction on betas whose last is 1. Karras goes by argument."""
    return replace(
        DIFFUSION,
        betas=ZERO_SNR_BETAS if prediction == "zero_snr" else DIFFUSION.betas,
        prediction_type="epsilon" if prediction == "epsilon" else "v_prediction",
        timestep_spacing="leading" if spacing == "karras" else spacing,
        steps_offset=offset,
    )


def table_for(sampler: str, spec: DiffusionSpec, steps: int, spacing: str, skipped: int = 0) -> Schedule:
    named = "karras" if spacing == "karras" else None
    return schedule_for(sampler, LEARNED, spec, steps, spacing=named, skipped=skipped)


def timesteps_of(schedule: Schedule) -> list[float]:
    """The timestep of each evaluation; a fraction in linspace spacing of the ancestral sampler."""
    return schedule.timesteps[schedule.rows].astype(np.float64).tolist()


def inputs_of(z: Float64, steps: Sequence[Step]) -> list[Float64]:
    """What the network saw in a free run that began at z."""
    return [z, *(step.sample for step in steps[:-1])]


def training_sigmas(spec: DiffusionSpec) -> Float64:
    """σ/α of every training timestep in float64; diffusers' 2⁻²⁴ stands in for an ᾱ of 0."""
    betas = np.array(spec.betas)
    with np.errstate(divide="ignore"):
        log_alpha_bar = np.cumsum(np.log1p(-betas))
    if betas[-1] == 1:
        log_alpha_bar[-1] = -24 * math.log(2)
    return np.sqrt(np.expm1(-log_alpha_bar))


def karras(spec: DiffusionSpec, steps: int) -> tuple[Float64, Float64]:
    """Noise levels of arXiv 2206.00364, equation 5 at ρ = 7, and their places among the timesteps by log σ."""
    training = training_sigmas(spec)
    high, low = training[-1] ** (1 / 7), training[0] ** (1 / 7)
    sigmas = np.linspace(high, low if steps > 1 else high, steps) ** 7
    # The last timestep below a level counts: beside the 2⁻²⁴ for a terminal ᾱ of 0 (σ 4096) there are levels above it.
    below = [np.flatnonzero(training < sigma * (1 - 1e-12)) for sigma in sigmas]
    low = np.array([indices[-1] if len(indices) else 0 for indices in below])
    share = np.log(sigmas / training[low]) / np.log(training[low + 1] / training[low])
    return sigmas, low + np.clip(share, 0, 1)


def sigmas_for(spec: DiffusionSpec, spacing: str, timesteps: Sequence[float]) -> Float64:
    """σ/α before each step, and the 0 after the last."""
    training = training_sigmas(spec)
    if spacing == "karras":
        sigmas, _ = karras(spec, len(timesteps))
    else:
        sigmas = np.interp(timesteps, np.arange(len(training)), training)
    return np.append(sigmas, 0.0)


class Papers:
    """The samplers in float64: each step integrates the interpolated prediction of x_0 over λ."""

    def __init__(self, sampler: str, prediction_type: str, sigmas: Float64) -> None:
        self.sampler, self.prediction_type, self.ratio = sampler, prediction_type, sigmas
        self.count = self.total = len(sigmas) - 1  # total: with the steps that image-to-image leaves out
        self.alpha = 1 / np.sqrt(1 + sigmas**2)
        self.sigma = sigmas * self.alpha
        with np.errstate(divide="ignore"):
            self.log_snr = -np.log(sigmas)  # λ

    def run(self, z: Float64, noise: Float64, timesteps: Sequence[float], teacher: Any = None) -> list[Step]:
        self.predictions: list[Float64] = []  # of x_0, one an evaluation
        self.corrected = z
        steps: list[Step] = []
        for index, t in enumerate(timesteps):
            z = z if teacher is None else teacher[index]
            e, _ = network(z, t)
            alpha, sigma = self.alpha[index], self.sigma[index]
            x_0 = (z - sigma * e) / alpha if self.prediction_type == "epsilon" else alpha * z - sigma * e
            self.predictions.append(x_0)
            mean, scale = self.advance(index, z)
            z = mean + scale * noise[index]
            steps.append(Step(x_0, mean, np.full_like(z, scale), z))
        return steps

    def advance(self, index: int, z: Float64) -> tuple[Float64, float]:
        """Mean and noise scale of what the network sees next."""
        if self.sampler == "euler-ancestral":
            return self.posterior(index, z)
        if self.sampler == "unipc":
            self.corrected = self.unic(index) if index else z
            return self.multistep(index, self.corrected, 2), 0.0
        if self.sampler == "dpmpp-2m-sde":
            h = self.log_snr[index + 1] - self.log_snr[index]
            held = self.midpoint(index, h) if 0 < index < self.count - 1 else self.predictions[index]
            shrink = self.sigma[index + 1] / self.sigma[index] * math.exp(-h)
            grown = -math.expm1(-2 * h)
            return shrink * z + self.alpha[index + 1] * grown * held, self.sigma[index + 1] * math.sqrt(grown)
        return self.multistep(index, z, int(self.sampler[len("dpmpp-")])), 0.0

    def multistep(self, index: int, z: Float64, order: int) -> Float64:
        """DPM-Solver++: x_t = σ_t/σ_s·x_s + σ_t·∫e^λ·x_θ dλ, at a lower order where the memory or the steps end."""
        h = self.log_snr[index + 1] - self.log_snr[index]
        left = self.count - index
        order = min(order, index + 1, left if self.total < 15 or left == 1 else order)
        if order == 3:
            # The quadratic through three predictions, its u² weighted by a half as in the authors' code and diffusers:
            # the weight of order 3 would be 1; with a half the method is of order 2.
            (f0, slope, curve), u = self.newton(index), moments(h)
            slope = slope + (self.log_snr[index] - self.log_snr[index - 1]) * curve
            integral = u[0] * f0 + u[1] * slope + u[2] * curve / 2
        else:
            held = self.midpoint(index, h) if order == 2 else self.predictions[index]
            integral = -math.expm1(-h) * held
        return self.sigma[index + 1] / self.sigma[index] * z + self.alpha[index + 1] * integral

    def midpoint(self, index: int, h: float) -> Float64:
        """The line through the last two predictions, halfway through the step."""
        before = self.log_snr[index] - self.log_snr[index - 1]
        now, then = self.predictions[index], self.predictions[index - 1]
        return now + h / 2 * (now - then) / before

    def newton(self, index: int) -> tuple[Float64, Float64, Float64]:
        """The last three predictions as divided differences."""
        l0, l1, l2 = self.log_snr[index], self.log_snr[index - 1], self.log_snr[index - 2]
        f0, f1, f2 = (self.predictions[index - back] for back in range(3))
        first, second = (f0 - f1) / (l0 - l1), (f1 - f2) / (l1 - l2)
        return f0, first, (first - second) / (l0 - l2)

    def unic(self, index: int) -> Float64:
        """UniC: the step before once more, now that the prediction at its end is known.

        Order 2 solves R·ρ = b for two unknowns: then the quadratic through all three predictions is integrated
        exactly, for any B(h). Order 1 takes ρ = 1/2 instead: the mean of both ends.
        """
        h = self.log_snr[index] - self.log_snr[index - 1]
        if index == 1:
            integral = -math.expm1(-h) * (self.predictions[0] + self.predictions[1]) / 2
        else:
            (f0, slope, curve), u = self.newton(index), moments(h)
            # Newton's form about the end of the step, at u from its beginning: u − h, then (u − h)·u.
            integral = u[0] * f0 + (u[1] - h * u[0]) * slope + (u[2] - h * u[1]) * curve
        return self.sigma[index] / self.sigma[index - 1] * self.corrected + self.alpha[index] * integral

    def posterior(self, index: int, z: Float64) -> tuple[Float64, float]:
        """q(x_s | x_t, x_0) in the scale x_0 + σ·noise, then as the network sees it."""
        before, after, x_0 = self.ratio[index], self.ratio[index + 1], self.predictions[index]
        kept = (after / before) ** 2
        mean = x_0 + kept * (z / self.alpha[index] - x_0)
        return self.alpha[index + 1] * mean, self.alpha[index + 1] * after * math.sqrt(1 - kept)


def moments(h: float) -> Float64:
    """∫e^(u−h)·uᵏ du over 0..h for k = 0, 1, 2, by Gauss-Legendre quadrature."""
    u = (NODES + 1) * h / 2
    return np.array([(WEIGHTS * np.exp(u - h) * u**k).sum() * h / 2 for k in range(3)])


@cache
def reference(sampler: str, spacing: str, offset: int = 0, prediction: str = "epsilon") -> Any:
    """diffusers' scheduler; ``set_timesteps`` starts it anew."""
    options: dict[str, Any] = {
        "beta_schedule": "linear",
        "beta_start": 1e-4,
        "beta_end": 0.02,
        "timestep_spacing": "leading" if spacing == "karras" else spacing,
        "steps_offset": offset,
        "prediction_type": "epsilon" if prediction == "epsilon" else "v_prediction",
        "rescale_betas_zero_snr": prediction == "zero_snr",
    }
    if sampler == "euler-ancestral":
        return EulerAncestralDiscreteScheduler(**options)
    options["use_karras_sigmas"] = spacing == "karras"
    if sampler == "unipc":
        return UniPCMultistepScheduler(**options)
    kind = "sde-dpmsolver++" if sampler.endswith("-sde") else "dpmsolver++"
    return DPMSolverMultistepScheduler(**options, algorithm_type=kind, solver_order=3 if "3m" in sampler else 2)


def reference_can_run(scheduler: Any, steps: int) -> bool:
    """Whether ``set_timesteps`` gave what a sampler can walk down from its first timestep.

    A first timestep that comes twice makes diffusers begin at the second and leave the schedule at its end.
    """
    timesteps, sigmas = scheduler.timesteps, scheduler.sigmas.numpy()
    return (
        len(timesteps) == steps
        and float(timesteps.min()) >= 0
        and float(timesteps.max()) < scheduler.config.num_train_timesteps
        and scheduler.index_for_timestep(timesteps[0]) == 0
        and bool((np.diff(sigmas) < 0).all())
    )


class Trajectory(NamedTuple):
    """A run of diffusers: inputs as the network saw them, samples in the scale of the next input."""

    inputs: list[Float64]
    noise: Float64
    denoised: list[Float64]
    samples: list[Float64]
    drew: list[bool]


def follow(
    sampler: str, scheduler: Any, z: Float64, asked: Sequence[float], seed: int = 0, skipped: int = 0
) -> Trajectory:
    """diffusers' own trajectory from the network input z, its network asked at the table's timesteps.

    ``skipped`` steps are left out before, as its image-to-image pipelines do.
    """
    scales = np.sqrt(1 + scheduler.sigmas.numpy().astype(np.float64)[skipped:] ** 2)
    if skipped:
        scheduler.set_begin_index(skipped)
    generator, twin = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed)
    options = {} if sampler == "unipc" else {"generator": generator}
    kind = torch.float64 if sampler == "euler-ancestral" else torch.float32
    x = torch.from_numpy(z * scales[0] if sampler == "euler-ancestral" else z)
    found = Trajectory([], np.zeros((len(scheduler.timesteps) - skipped, *z.shape)), [], [], [])
    for index, t in enumerate(scheduler.timesteps[skipped:]):
        seen = scheduler.scale_model_input(x, t).numpy()
        e, _ = network(seen, asked[index])
        before = generator.get_state()
        result = scheduler.step(torch.from_numpy(e), t, x, **options)
        found.drew.append(not torch.equal(before, generator.get_state()))
        if found.drew[-1]:
            found.noise[index] = torch.randn(z.shape, generator=twin, dtype=kind).numpy()
        x = result.prev_sample
        if sampler == "euler-ancestral":
            found.denoised.append(result.pred_original_sample.numpy())
            found.samples.append(x.numpy() / scales[index + 1])
        else:
            found.denoised.append(scheduler.model_outputs[-1].numpy())
            found.samples.append(x.numpy())
        found.inputs.append(seen)
    return found


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


def noise_of(seed: int, steps: int) -> Float64:
    return normal(seed, steps, *SHAPE)


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
