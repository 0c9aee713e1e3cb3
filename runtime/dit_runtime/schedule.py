"""Samplers as tables: one pure function per sampler, computed in float64 and stored as float32.

With the state's slots s₀ (the latents z_t), s₁ and s₂ (the sampler's memory), e the guided network output and v the
learned-variance channels, one row of 17 numbers (a, b, A row by row, B, g, h, k) means

    denoised = a·s₀ + b·e
    s'ᵢ      = Σⱼ Aᵢⱼ·sⱼ + Bᵢ·e          i = 0, 1, 2
    s'₀     += exp(g + h·v)·k·noise

The step graph evaluates one row per picture; there is nothing else a sampler does at run time.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dit_runtime.bundle import DiffusionSpec, ModelSpec
from dit_runtime.errors import SamplingError

COEFFICIENTS = 17
SAMPLERS = ("ddim", "ddpm")

# Columns of a row.
A_Z, B_E = 0, 1  # denoised = a·s₀ + b·e
MATRIX = 2  # nine numbers, row by row
INPUT = 11  # three numbers
LOG_SIGMA, LOG_SIGMA_V, NOISE = 14, 15, 16  # g, h, k

Float64 = NDArray[np.float64]


@dataclass(frozen=True)
class Schedule:
    """A sampler's work for one picture.

    Attributes:
        timesteps: float32 ``[U]``, the distinct training timesteps that the network is asked about.
        rows: int32 ``[T]``, which of them each evaluation uses.
        coefficients: float32 ``[T, 17]``.
        initial: float32 ``[T, 2]``, scale of signal and of noise in z before each row: where image-to-image starts.
        draws_noise: bool ``[T]``, whether the reference draws noise at this row (so that seeds agree).
        completes_step: bool ``[T]``, False for inner evaluations, which a viewer does not see.
        uses_variance: whether any row depends on v.
    """

    sampler: str
    timesteps: NDArray[np.float32]
    rows: NDArray[np.int32]
    coefficients: NDArray[np.float32]
    initial: NDArray[np.float32]
    draws_noise: NDArray[np.bool_]
    completes_step: NDArray[np.bool_]

    @property
    def uses_variance(self) -> bool:
        return bool(np.any(self.coefficients[:, LOG_SIGMA_V] != 0))

    def __len__(self) -> int:
        return len(self.rows)


def schedule_for(sampler: str, model: ModelSpec, diffusion: DiffusionSpec, steps: int, eta: float = 0.0) -> Schedule:
    """The schedule of a named sampler.

    Raises:
        SamplingError: an unknown sampler, or settings that it or its reference cannot run.
    """
    if sampler not in SAMPLERS:
        raise SamplingError(f"sampler {sampler!r} is unknown; choose one of {', '.join(SAMPLERS)}")
    if sampler == "ddpm" and eta:
        raise SamplingError(f"eta {eta:g} with sampler ddpm: eta is DDIM's; leave it out or use --sampler ddim")
    total = len(diffusion.betas)
    if not 1 <= steps <= total:
        raise SamplingError(f"{steps} steps: expected 1 to {total}, the number of training timesteps")
    if diffusion.prediction_type != "epsilon":
        raise SamplingError(f"prediction type {diffusion.prediction_type!r} is not supported; expected 'epsilon'")
    if sampler == "ddim":
        return ddim(diffusion, steps, eta)
    return ddpm(diffusion, steps, model.learned_variance)


def spaced_timesteps(diffusion: DiffusionSpec, steps: int) -> NDArray[np.int64]:
    """Descending timesteps as diffusers' ``DDIMScheduler.set_timesteps`` spaces them."""
    total = len(diffusion.betas)
    if diffusion.timestep_spacing == "leading":
        timesteps = np.arange(steps)[::-1] * (total // steps) + diffusion.steps_offset
    elif diffusion.timestep_spacing == "trailing":
        timesteps = np.round(np.arange(total, 0, -total / steps)).astype(np.int64) - 1
    elif diffusion.timestep_spacing == "linspace":
        timesteps = np.linspace(0, total - 1, steps).round()[::-1].astype(np.int64)
    else:
        raise SamplingError(
            f"timestep spacing {diffusion.timestep_spacing!r} is not supported; expected leading, trailing or linspace"
        )
    # diffusers' trailing spacing accumulates in floating point: for 61, 103, 121, … steps it has one timestep too many.
    if len(timesteps) != steps or timesteps.min() < 0 or timesteps.max() >= total:
        raise SamplingError(
            f"{steps} steps with {diffusion.timestep_spacing} spacing and offset {diffusion.steps_offset} leave the "
            f"training timesteps 0 to {total - 1}, in diffusers too; use another number of steps"
        )
    return timesteps.astype(np.int64)


def cumulative_alphas(diffusion: DiffusionSpec) -> Float64:
    """ᾱ_t, the product of 1 − β, for every training timestep."""
    betas = np.array(diffusion.betas, np.float64)
    return np.cumprod(1.0 - betas, dtype=np.float64)


def ddim(diffusion: DiffusionSpec, steps: int, eta: float = 0.0) -> Schedule:
    """DDIM (Song et al. 2020, arXiv 2010.02502, equations 12 and 16), as diffusers' ``DDIMScheduler`` without clipping.

    ``eta`` in [0, 1]: 0 is deterministic; above 0 noise is drawn at every row, the last included.
    """
    if not 0 <= eta <= 1:
        raise SamplingError(f"eta {eta:g}: expected 0 to 1")
    alpha_bars = cumulative_alphas(diffusion)
    timesteps = spaced_timesteps(diffusion, steps)
    previous = timesteps - len(alpha_bars) // steps
    final = 1.0 if diffusion.set_alpha_to_one else alpha_bars[0]
    alpha_bar = alpha_bars[timesteps]
    alpha_bar_prev = np.where(previous >= 0, alpha_bars[np.maximum(previous, 0)], final)
    # Rounding could leave a variance of zero slightly negative.
    variance = (1 - alpha_bar_prev) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_prev)
    sigma = eta * np.sqrt(np.maximum(variance, 0))
    rows = np.zeros((steps, COEFFICIENTS))
    rows[:, A_Z], rows[:, B_E] = _denoised(alpha_bar)
    direction = np.sqrt(1 - alpha_bar_prev - sigma**2)
    rows[:, MATRIX] = np.sqrt(alpha_bar_prev) * rows[:, A_Z]
    rows[:, INPUT] = np.sqrt(alpha_bar_prev) * rows[:, B_E] + direction
    rows[:, NOISE] = sigma
    return _schedule("ddim", timesteps, rows, alpha_bar, np.full(steps, eta > 0))


def ddpm(diffusion: DiffusionSpec, steps: int, learned_variance: bool) -> Schedule:
    """Ancestral sampling of a respaced DDPM, as the official code does it (``respace.py``, ``gaussian_diffusion.py``).

    Learned variance interpolates log β̃ and log β (Nichol & Dhariwal 2021, arXiv 2102.09672, equation 15); without it
    the variance is the official default, fixed large. Noise is drawn at every row but the last.
    """
    if steps < 2:
        raise SamplingError("1 step with sampler ddpm: the official respacing needs at least 2; use --sampler ddim")
    alpha_bars = cumulative_alphas(diffusion)
    # Evenly spaced with both ends, rounded half to even, accumulating as space_timesteps does.
    stride, position, taken = (len(alpha_bars) - 1) / (steps - 1), 0.0, []
    for _ in range(steps):
        taken.append(round(position))
        position += stride
    kept = alpha_bars[taken]
    previous = np.append(1.0, kept[:-1])
    betas = 1 - kept / previous
    posterior = betas * (1 - previous) / (1 - kept)
    rows = np.zeros((steps, COEFFICIENTS))
    rows[:, A_Z], rows[:, B_E] = _denoised(kept)
    from_x0 = betas * np.sqrt(previous) / (1 - kept)
    from_xt = (1 - previous) * np.sqrt(1 - betas) / (1 - kept)
    rows[:, MATRIX] = from_x0 * rows[:, A_Z] + from_xt
    rows[:, INPUT] = from_x0 * rows[:, B_E]
    low, high = np.log(posterior[1:]), np.log(betas[1:])
    if learned_variance:
        rows[1:, LOG_SIGMA] = (low + high) / 4
        rows[1:, LOG_SIGMA_V] = (high - low) / 4
    else:
        rows[1:, LOG_SIGMA] = high / 2
    rows[1:, NOISE] = 1
    draws = np.arange(steps) > 0
    return _schedule("ddpm", np.array(taken)[::-1], rows[::-1], kept[::-1], draws[::-1])


def _denoised(alpha_bar: Float64) -> tuple[Float64, Float64]:
    """x₀ = (z − √(1−ᾱ)·ε)/√ᾱ as (a, b)."""
    return 1 / np.sqrt(alpha_bar), -np.sqrt(1 - alpha_bar) / np.sqrt(alpha_bar)


def _schedule(
    sampler: str, timesteps: NDArray[np.int64], rows: Float64, alpha_bar: Float64, draws: NDArray[np.bool_]
) -> Schedule:
    count = len(timesteps)
    return Schedule(
        sampler=sampler,
        timesteps=timesteps.astype(np.float32),
        rows=np.arange(count, dtype=np.int32),
        coefficients=rows.astype(np.float32),
        initial=np.stack([np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar)], axis=1).astype(np.float32),
        draws_noise=draws.copy(),
        completes_step=np.ones(count, dtype=np.bool_),
    )
