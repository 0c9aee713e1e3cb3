"""The papers' samplers in float64: integrals over λ = log(α/σ) of the interpolated prediction of x_0."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from dit_runtime.bundle.manifest import DiffusionSpec
from dit_runtime.samplers.by_name import schedule_for
from dit_runtime.samplers.schedule import Schedule
from support.schedules import DIFFUSION, LEARNED, SHAPE, Float64, Step, network, normal

FREE_LIMIT = 1.4e-6  # measured: 8.9e-7 (UniPC, 1000 steps), 6.2e-7 elsewhere
SPACINGS = [("leading", 0), ("leading", 1), ("trailing", 0), ("linspace", 0), ("karras", 0)]
SOLVERS = ["dpmpp-2m", "dpmpp-2m-sde", "dpmpp-3m", "unipc", "euler-ancestral"]
CASES = [
    (sampler, *spacing)
    for sampler in SOLVERS
    for spacing in SPACINGS
    if (sampler, spacing[0]) != ("euler-ancestral", "karras")
]
NODES, WEIGHTS = np.polynomial.legendre.leggauss(64)
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
EVERY_CASE = (
    [(*case, "epsilon", steps) for case in CASES for steps in (FEW if case[2] else COUNTS)]
    + [(*case, prediction, steps) for case in CASES for prediction in ("v_prediction", "zero_snr") for steps in FEW]
    + NEXT_TO_PURE_NOISE
)
# What diffusers cannot walk down to 0: noise levels or timesteps that repeat.
REFUSED = {
    *((sampler, "leading", 0, "epsilon", 1000) for sampler in SOLVERS[:-1]),
    *((sampler, "linspace", 0, "epsilon", 1000) for sampler in SOLVERS[:-1]),
    *((sampler, "karras", 0, "zero_snr", 50) for sampler in SOLVERS[:-1]),
    ("dpmpp-2m", "trailing", 0, "zero_snr", 500),
    ("unipc", "linspace", 0, "zero_snr", 499),
    ("euler-ancestral", "trailing", 0, "zero_snr", 1000),
}


def rescale_to_zero_snr(betas: Float64) -> Float64:
    """Betas whose last is 1, by algorithm 1 of arXiv 2305.08891."""
    root = np.sqrt(np.cumprod(1 - betas))
    alpha_bar = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    return 1 - alpha_bar / np.concatenate([[1.0], alpha_bar[:-1]])


ZERO_SNR_BETAS = tuple(rescale_to_zero_snr(np.array(DIFFUSION.betas)).tolist())


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


def noise_of(seed: int, steps: int) -> Float64:
    return normal(seed, steps, *SHAPE)


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
