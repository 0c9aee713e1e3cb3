"""Which training timesteps a sampler visits, and the noise levels there: in falling order, from noise to image."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from dit_runtime.bundle.manifest import DiffusionSpec
from dit_runtime.core.errors import SamplingError
from dit_runtime.samplers.options import LEVELS, SolverSettings
from dit_runtime.samplers.schedule import Float64

DIFFUSERS = ("leading", "trailing", "linspace")
OFFICIAL = ("official", "official-ddim")
KARRAS, LU, EXPONENTIAL = LEVELS.values()  # noise levels are chosen, and the timesteps follow from them
# The spacing of a bundle whose checkpoint states none: each sampler then has the default of its diffusers class.
UNSTATED = "default"

Int64 = NDArray[np.int64]

# A terminal signal of zero has no logarithm: diffusers' multistep and Euler schedulers put this ᾱ in its place.
LEAST_ALPHA_BAR = 2.0**-24
NO_SIGNAL = (
    "epsilon prediction at a terminal signal-to-noise ratio of zero: the noise says nothing about the image there; "
    "such a schedule needs a model with v prediction"
)


def cumulative_alphas(diffusion: DiffusionSpec) -> Float64:
    """ᾱ_t, the product of 1 − β, for every training timestep."""
    return np.cumprod(1.0 - np.array(diffusion.betas, np.float64), dtype=np.float64)


def noise_levels(diffusion: DiffusionSpec) -> Float64:
    """σ = √((1−ᾱ)/ᾱ), noise over signal, for every training timestep; finite even where the last ᾱ is 0.

    Raises:
        SamplingError: the last ᾱ is 0, and the model predicts ε.
    """
    alpha_bar = cumulative_alphas(diffusion)
    if alpha_bar[-1] == 0 and diffusion.prediction_type == "epsilon":
        raise SamplingError(NO_SIGNAL)
    alpha_bar[alpha_bar == 0] = LEAST_ALPHA_BAR
    return np.sqrt((1 - alpha_bar) / alpha_bar)


def choose_ddim_spacing(diffusion: DiffusionSpec, spacing: str | None) -> str:
    """The spacing of DDIM: the given one, or the bundle's own, or ``leading`` where the checkpoint states none."""
    if spacing is not None:
        return spacing
    return "leading" if diffusion.timestep_spacing == UNSTATED else diffusion.timestep_spacing


def choose_solver_spacing(diffusion: DiffusionSpec, spacing: str | None) -> str:
    """The spacing of a multistep or Euler solver: the given one, or the bundle's own.

    A bundle whose checkpoint states none gets ``linspace``, the default of diffusers' solvers. So does a bundle with
    an official spacing: the official code has no such solver, and its spacings suit none.
    """
    if spacing is not None:
        return spacing
    return "linspace" if diffusion.timestep_spacing in (*OFFICIAL, UNSTATED) else diffusion.timestep_spacing


def space_timesteps(diffusion: DiffusionSpec, steps: int, spacing: str | None = None) -> Int64:
    """The timesteps ``[steps]`` of DDIM: of diffusers' ``DDIMScheduler.set_timesteps``, or of the official code for an
    official spacing; None is ``choose_ddim_spacing``.

    Raises:
        SamplingError: an unknown spacing, or a number of steps that its reference cannot run.
    """
    spacing = choose_ddim_spacing(diffusion, spacing)
    total = len(diffusion.betas)
    if spacing in OFFICIAL:
        return official_timesteps(total, steps, spacing)
    if spacing == "leading":
        timesteps = np.arange(steps, dtype=np.float64)[::-1] * (total // steps) + diffusion.steps_offset
    elif spacing == "trailing":
        timesteps = np.arange(total, 0, -total / steps).round() - 1.0
    elif spacing == "linspace":
        timesteps = np.linspace(0, total - 1, steps).round()[::-1]
    else:
        raise _unsupported_spacing(spacing, (*DIFFUSERS, *OFFICIAL))
    return _check_timesteps(timesteps, steps, total, spacing, diffusion.steps_offset)


def choose_multistep_spacing(diffusion: DiffusionSpec, spacing: str | None, settings: SolverSettings) -> str:
    """The spacing of a multistep solver: the given one, or that of the levels in its settings, or the bundle's own."""
    return choose_solver_spacing(diffusion, settings.levels if spacing is None else spacing)


def multistep_timesteps(
    diffusion: DiffusionSpec, steps: int, spacing: str, settings: SolverSettings
) -> tuple[Float64, Float64]:
    """Timesteps and σ ``[steps]`` of diffusers' multistep schedulers, which space one point more and drop the last.

    Raises:
        SamplingError: as ``space_timesteps``, or σ does not fall with every step.
    """
    total, sigmas = len(diffusion.betas), noise_levels(diffusion)
    if spacing in LEVELS.values():
        return _spaced_levels(diffusion, sigmas, steps, spacing, settings)
    # Timesteps whose log(α/σ), which is −log σ here, is below the least are left out.
    last = total - int((-np.log(sigmas) < settings.lambda_min).sum())
    if spacing == "leading":
        points = np.arange(1, steps + 1, dtype=np.float64)[::-1] * (last // (steps + 1)) + diffusion.steps_offset
    elif spacing == "trailing":
        points = np.arange(last, 0, -total / steps).round() - 1.0
    elif spacing == "linspace":
        points = np.linspace(0, last - 1, steps + 1).round()[::-1][:-1]
    else:
        raise _unsupported_spacing(spacing, (*DIFFUSERS, *LEVELS.values()))
    if last < total and (last < 1 or len(points) != steps):
        raise SamplingError(
            f"{steps} steps with {spacing} spacing: lambda_min_clipped {settings.lambda_min:g} of the checkpoint's "
            f"scheduler leaves {len(points) if last > 0 else 0} of them; use another spacing"
        )
    timesteps = _check_timesteps(points, steps, total, spacing, diffusion.steps_offset)
    return timesteps.astype(np.float64), _check_falling(sigmas[timesteps], steps, spacing)


def euler_timesteps(diffusion: DiffusionSpec, steps: int, spacing: str | None = None) -> tuple[Float64, Float64]:
    """Timesteps and σ ``[steps]`` of diffusers' Euler schedulers, which do not round linspace and interpolate σ.

    Raises:
        SamplingError: as ``space_timesteps``, or σ does not fall with every step.
    """
    spacing = choose_solver_spacing(diffusion, spacing)
    if spacing not in DIFFUSERS:
        raise _unsupported_spacing(spacing, DIFFUSERS)
    if spacing == "linspace":
        timesteps = np.linspace(0, len(diffusion.betas) - 1, steps)[::-1]
    else:
        timesteps = space_timesteps(diffusion, steps, spacing).astype(np.float64)
    # diffusers keeps timesteps in float32, and gives the network these float32 values.
    timesteps = timesteps.astype(np.float32).astype(np.float64)
    levels = np.interp(timesteps, np.arange(len(diffusion.betas)), noise_levels(diffusion))
    return timesteps, _check_falling(levels, steps, spacing)


def official_timesteps(total: int, steps: int, spacing: str) -> Int64:
    """Timesteps ``[steps]`` of the official code's ``space_timesteps``: one section, or for ``official-ddim`` an
    integer stride ("ddimN").

    Raises:
        SamplingError: a number of steps that the official code refuses, or fewer than 2.
    """
    if steps < 2:
        raise SamplingError(
            f"{steps} step with {spacing} spacing: the official respacing needs at least 2; use another spacing"
        )
    if spacing == "official-ddim":
        for integer in range(1, total):
            timesteps = np.arange(0, total, integer)
            if len(timesteps) == steps:
                return timesteps[::-1]
        nearest = sorted({len(range(0, total, s)) for s in range(1, total)}, key=lambda count: abs(count - steps))[:2]
        raise SamplingError(
            f"{steps} steps with {spacing} spacing: no integer stride of {total} training timesteps gives as many, and "
            f"the official code refuses 'ddim{steps}' too; the nearest that exist are {min(nearest)} and {max(nearest)}"
        )
    # Evenly spaced from end to end, rounded half to even. Positions are summed up, as in the official code.
    stride, position, taken = (total - 1) / (steps - 1), 0.0, []
    for _ in range(steps):
        taken.append(round(position))
        position += stride
    return np.array(taken[::-1], np.int64)


def _spaced_levels(
    diffusion: DiffusionSpec, sigmas: Float64, steps: int, spacing: str, settings: SolverSettings
) -> tuple[Float64, Float64]:
    """Timesteps and σ where σ itself is spaced: by Karras et al. 2022 (arXiv 2206.00364, equation 5 with ρ = 7), evenly
    in log σ (``exponential``), or so from end to end of the training (``lu``: Lu et al. 2022, arXiv 2206.00927).

    The network gets the timestep near which the level is in training, as in diffusers; the sampler uses σ itself.
    """
    low, high = float(sigmas[0]), float(sigmas[-1])
    if spacing != LU:
        low = low if settings.sigma_min is None else settings.sigma_min
        high = high if settings.sigma_max is None else settings.sigma_max
    if not 0 < low < high:
        raise SamplingError(
            f"{spacing} spacing from sigma_max {high:g} to sigma_min {low:g}: expected a fall to a number above 0; "
            "correct the two in the scheduler's configuration, or use another spacing"
        )
    ramp = np.linspace(0, 1, steps)
    if spacing == KARRAS:
        levels = (high ** (1 / 7) + ramp * (low ** (1 / 7) - high ** (1 / 7))) ** 7
    else:
        levels = np.exp(np.log(high) + ramp * (np.log(low) - np.log(high)))
    # With LEAST_ALPHA_BAR, σ does not rise everywhere: as in diffusers, the last σ below the level counts.
    below = [np.flatnonzero(sigmas < level * (1 - 1e-12)) for level in levels]
    first = np.array([min(found[-1], len(sigmas) - 2) if len(found) else 0 for found in below])
    share = np.log(levels / sigmas[first]) / np.log(sigmas[first + 1] / sigmas[first])
    timesteps: Float64 = first + np.clip(share, 0, 1)
    if spacing in settings.rounded:
        timesteps = timesteps.round()
    else:
        timesteps = np.floor(timesteps + 1e-9)
        if diffusion.options.first_timestep is not None and spacing == settings.levels:
            timesteps[0] = diffusion.options.first_timestep
    if steps > 1 and timesteps[0] == timesteps[1]:
        raise SamplingError(
            f"{steps} steps with {spacing} spacing visit their first timestep twice, which diffusers cannot run; use "
            "fewer"
        )
    return timesteps, levels


def _check_falling(levels: Float64, steps: int, spacing: str) -> Float64:
    """The levels; raises SamplingError where a level is not below the one before."""
    if (np.diff(levels) >= 0).any():
        raise SamplingError(
            f"{steps} steps with {spacing} spacing: the noise level does not fall with every step; use "
            "fewer steps or another spacing"
        )
    return levels


def _check_timesteps(timesteps: Float64, steps: int, total: int, spacing: str, offset: int) -> Int64:
    """The timesteps as integers; raises SamplingError where diffusers' arithmetic gives some that it cannot use."""
    found: Int64 = timesteps.astype(np.int64)
    # Trailing spacing accumulates in floating point: for 61, 103, 121, … steps it has one timestep too many.
    if len(found) != steps or found.min() < 0 or found.max() >= total:
        raise SamplingError(
            f"{steps} steps with {spacing} spacing and offset {offset} leave the training timesteps 0 to {total - 1}, "
            "as diffusers spaces them; use another number of steps"
        )
    if any(first <= second for first, second in pairwise(found)):
        raise SamplingError(
            f"{steps} steps with {spacing} spacing visit a timestep twice, as diffusers spaces them, and a step of no "
            "length has no update; use fewer steps or another spacing"
        )
    return found


def _unsupported_spacing(spacing: str, supported: tuple[str, ...]) -> SamplingError:
    return SamplingError(f"timestep spacing {spacing!r} is not supported here; expected one of {', '.join(supported)}")
