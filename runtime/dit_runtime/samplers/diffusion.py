"""Samplers of diffusion models (ε and v prediction): one pure function for each, from settings to a schedule.

Each function follows its paper in float64, and writes x₀ and ε as combinations of the latents z and the network's
output. Below, α = √ᾱ and σ = √(1−ᾱ); a paper's σ that is noise over signal is called ``level``.
"""

from __future__ import annotations

import numpy as np

from dit_runtime.bundle.manifest import DiffusionSpec
from dit_runtime.core.errors import SamplingError
from dit_runtime.samplers.options import LEVELS, SolverSettings
from dit_runtime.samplers.schedule import (
    NOTHING,
    S0,
    S1,
    S2,
    E,
    Float64,
    Schedule,
    check_skipped,
    make_row,
    schedule_from_rows,
)
from dit_runtime.samplers.spacing import (
    DIFFUSERS,
    NO_SIGNAL,
    OFFICIAL,
    choose_ddim_spacing,
    choose_multistep_spacing,
    choose_solver_spacing,
    cumulative_alphas,
    euler_timesteps,
    multistep_timesteps,
    noise_levels,
    space_timesteps,
)

FEW_STEPS = 15  # with fewer steps, diffusers' DPM-Solver++ lowers its order at the end
NO_STEP = 1e-6  # in log(α/σ): a step to the level where the latents are already changes nothing
LEAST_VARIANCE = 1e-20


def clean_and_noise(prediction_type: str, alpha: float, sigma: float) -> tuple[Float64, Float64]:
    """The clean latents x₀ and the noise ε as combinations of z and the network's output.

    v prediction is from Salimans & Ho 2022 (arXiv 2202.00512): v = α·ε − σ·x₀.
    """
    if prediction_type == "epsilon":
        if alpha == 0:
            raise SamplingError(NO_SIGNAL)
        return (S0 - sigma * E) / alpha, E
    if prediction_type == "v_prediction":
        return alpha * S0 - sigma * E, sigma * S0 + alpha * E
    if prediction_type == "sample":
        return E, (S0 - alpha * E) / sigma
    raise SamplingError(
        f"prediction type {prediction_type!r} is not supported by this sampler; expected 'epsilon', 'v_prediction' or "
        "'sample'"
    )


def ddim(diffusion: DiffusionSpec, steps: int, eta: float = 0.0, spacing: str | None = None) -> Schedule:
    """DDIM (Song et al. 2020, arXiv 2010.02502, equations 12 and 16), as diffusers' ``DDIMScheduler``.

    Where the bundle's options say so, x₀ is clipped and ε stays the network's, as by default there. ``eta`` is in
    [0, 1]: with 0 the sampler is deterministic, above 0 it draws noise at every row, the last included.
    With an official spacing this is the official code's ``ddim_sample``: each step leads to the next timestep of the
    list, and the last step to x₀.
    """
    if not 0 <= eta <= 1:
        raise SamplingError(f"eta {eta:g}: expected 0 to 1")
    spacing = choose_ddim_spacing(diffusion, spacing)
    alpha_bars = cumulative_alphas(diffusion)
    timesteps = space_timesteps(diffusion, steps, spacing)
    if spacing in OFFICIAL:
        after = np.append(timesteps[1:], -1)
        final = 1.0
    else:
        after = timesteps - len(alpha_bars) // steps
        final = 1.0 if diffusion.set_alpha_to_one else float(alpha_bars[0])
    rows = []
    for t, s in zip(timesteps, after, strict=True):
        now, then = float(alpha_bars[t]), float(alpha_bars[s]) if s >= 0 else final
        x_0, noise = clean_and_noise(diffusion.prediction_type, np.sqrt(now), np.sqrt(1 - now))
        # Rounding could leave a variance of zero slightly negative.
        spread = eta * np.sqrt(max((1 - then) / (1 - now) * (1 - now / then), 0.0))
        direction = np.sqrt(max(1 - then - spread**2, 0.0)) * noise
        rows.append(_row_from_clean(diffusion, x_0, np.sqrt(then), direction, noise=spread))
    return schedule_from_rows("ddim", spacing, timesteps, rows, _signal_and_noise(alpha_bars[timesteps]), draws=eta > 0)


def ddpm(diffusion: DiffusionSpec, steps: int, learned_variance: bool, spacing: str | None = None) -> Schedule:
    """Ancestral sampling of a respaced DDPM.

    Where the checkpoint states no ``variance_type``, this is the official code (``respace.py``,
    ``gaussian_diffusion.py``): official spacing, a learned variance, or without one the official default "fixed large".
    Where it states one, this is diffusers' ``DDPMScheduler``, which has DDIM's spacings too. A learned variance
    interpolates log β̃ and log β (Nichol & Dhariwal 2021, arXiv 2102.09672, equation 15). Noise is drawn at every row
    but that of timestep 0.

    Raises:
        SamplingError: a spacing that it does not have, or a learned variance of a model that predicts none.
    """
    stated = diffusion.options.variance_type
    known = OFFICIAL if stated is None else (*DIFFUSERS, *OFFICIAL)
    spacing = OFFICIAL[0] if spacing is None and stated is None else choose_ddim_spacing(diffusion, spacing)
    if spacing not in known:
        raise SamplingError(f"timestep spacing {spacing!r} with sampler ddpm: expected one of {', '.join(known)}")
    if stated == "learned_range" and not learned_variance:
        raise SamplingError(
            "variance_type 'learned_range' with sampler ddpm: this model predicts no variance; choose another sampler, "
            "or set fixed_small or fixed_large in scheduler_config.json and export again"
        )
    variance_type = stated or ("learned_range" if learned_variance else "fixed_large")
    alpha_bars = cumulative_alphas(diffusion)
    timesteps = space_timesteps(diffusion, steps, spacing)
    kept = alpha_bars[timesteps]
    before = np.append(kept[1:], 1.0)
    betas = 1 - kept / before
    # diffusers' least variance, of a step to the image.
    posterior = np.maximum(betas * (1 - before) / (1 - kept), LEAST_VARIANCE)
    rows = []
    for t, now, then, beta, least in zip(timesteps, kept, before, betas, posterior, strict=True):
        x_0, _ = clean_and_noise(diffusion.prediction_type, np.sqrt(now), np.sqrt(1 - now))
        weight, rest = beta * np.sqrt(then) / (1 - now), (1 - then) * np.sqrt(1 - beta) / (1 - now) * S0
        if t == 0:
            rows.append(_row_from_clean(diffusion, x_0, weight, rest))
            continue
        high, low = np.log(beta), np.log(least)
        # Half of fraction·high + (1 − fraction)·low, with fraction = (v + 1)/2.
        learned = ((low + high) / 4, (high - low) / 4)
        fixed = (high / 2 if variance_type == "fixed_large" else low / 2, 0.0)
        spread = learned if variance_type == "learned_range" else fixed
        rows.append(_row_from_clean(diffusion, x_0, weight, rest, noise=1.0, log_sigma=spread))
    return schedule_from_rows("ddpm", spacing, timesteps, rows, _signal_and_noise(kept), draws=timesteps > 0)


def _row_from_clean(
    diffusion: DiffusionSpec,
    x_0: Float64,
    weight: float,
    rest: Float64,
    noise: float = 0.0,
    log_sigma: tuple[float, float] = (0.0, 0.0),
) -> Float64:
    """The row of a sampler that goes to ``weight``·x₀ + ``rest``, with x₀ clipped where the bundle's options say so."""
    bound = diffusion.options.clip_bound
    if bound is None:
        return make_row(x_0, weight * x_0 + rest, noise=noise, log_sigma=log_sigma)
    return make_row(x_0, rest, noise=noise, log_sigma=log_sigma, clip=(bound, weight))


def dpm_solver_pp(
    diffusion: DiffusionSpec,
    steps: int,
    settings: SolverSettings,
    stochastic: bool = False,
    spacing: str | None = None,
    skipped: int = 0,
) -> Schedule:
    """DPM-Solver++ multistep (Lu et al. 2022, arXiv 2211.01095), as diffusers' ``DPMSolverMultistepScheduler``.

    ``stochastic`` is SDE-DPM-Solver++ 2M, which draws noise at every row, the last included. The memory holds the last
    two x₀. After ``skipped`` steps the order rises from 1, as after diffusers' ``set_begin_index``.
    """
    check_skipped(skipped, steps)
    spacing = choose_multistep_spacing(diffusion, spacing, settings)
    timesteps, levels = multistep_timesteps(diffusion, steps, spacing, settings)
    end = 0.0 if settings.ends_at_zero else float(noise_levels(diffusion)[0])
    alphas, sigmas, log_snr = _half_log_snr(np.append(levels, end))
    falls = settings.lower_order_final and steps < FEW_STEPS
    rows = []
    for i in range(skipped, steps):
        x_0, _ = clean_and_noise(diffusion.prediction_type, alphas[i], sigmas[i])
        used = min(settings.order, i - skipped + 1)
        h = log_snr[i + 1] - log_snr[i]
        if i == steps - 1 and (settings.ends_at_zero or settings.euler_at_final or falls):
            used = 1
        elif i == steps - 2 and falls:
            used = min(used, 2)
        if abs(h) < NO_STEP:
            rows.append(make_row(x_0, S0))
            continue
        slope, curvature = NOTHING, NOTHING
        if used >= 2:
            r_0 = (log_snr[i] - log_snr[i - 1]) / h
            slope = (x_0 - S1) / r_0
        if used == 3:
            r_1 = (log_snr[i - 1] - log_snr[i - 2]) / h
            earlier = (S1 - S2) / r_1
            curvature = (slope - earlier) / (r_0 + r_1)
            slope = slope + r_0 * curvature
        ratio = sigmas[i + 1] / sigmas[i]
        if stochastic:
            gain = -np.expm1(-2 * h)
            weight = 1 - gain / (2 * h) if settings.solver_type == "heun" else gain / 2
            z = ratio * np.exp(-h) * S0 + alphas[i + 1] * (gain * x_0 + weight * slope)
            rows.append(make_row(x_0, z, x_0, noise=sigmas[i + 1] * np.sqrt(gain)))
            continue
        gain = -np.expm1(-h)
        z = ratio * S0 + alphas[i + 1] * gain * x_0
        if used == 2:
            weight = 1 - gain / h if settings.solver_type == "heun" else gain / 2
            z = z + alphas[i + 1] * weight * slope
        elif used == 3:
            z = z + alphas[i + 1] * ((1 - gain / h) * slope - ((h - gain) / h**2 - 0.5) * curvature)
        rows.append(make_row(x_0, z, x_0, S1 if i > skipped and settings.order == 3 else NOTHING))
    name = "dpmpp-2m-sde" if stochastic else f"dpmpp-{settings.order}m"
    initial = np.stack([alphas, sigmas], 1)[skipped:-1]
    return schedule_from_rows(name, spacing, timesteps[skipped:], rows, initial, draws=stochastic, skipped=skipped)


def unipc(
    diffusion: DiffusionSpec, steps: int, settings: SolverSettings, spacing: str | None = None, skipped: int = 0
) -> Schedule:
    """UniPC with corrector (Zhao et al. 2023, arXiv 2302.04867), as diffusers' ``UniPCMultistepScheduler``.

    B(h) is e^h − 1 (``bh2``) or h (``bh1``). The network's output of a step first corrects the latents that it was
    computed at, then predicts the next latents. The part of the correction that is known a step earlier is kept in the
    memory (s₁), beside the last x₀ (s₂). After ``skipped`` steps the first step corrects nothing and the order rises
    from 1, as after diffusers' ``set_begin_index``.
    """
    check_skipped(skipped, steps)
    spacing = choose_multistep_spacing(diffusion, spacing, settings)
    timesteps, levels = multistep_timesteps(diffusion, steps, spacing, settings)
    lowest = float(levels[-1] if spacing in LEVELS.values() else noise_levels(diffusion)[0])
    end = 0.0 if settings.ends_at_zero else lowest
    alphas, sigmas, log_snr = _half_log_snr(np.append(levels, end))
    rows, correction = [], 0.0  # weight of the newest x₀ in the correction of this step's latents
    for i in range(skipped, steps):
        x_0, _ = clean_and_noise(diffusion.prediction_type, alphas[i], sigmas[i])
        corrects = i > skipped and i - 1 not in settings.uncorrected
        corrected = S1 + correction * x_0 if corrects else S0
        order = min(settings.order, i - skipped + 1, steps - i if settings.lower_order_final else settings.order)
        h = log_snr[i + 1] - log_snr[i]
        if abs(h) < NO_STEP:
            rows.append(make_row(x_0, corrected))
            continue
        gain = -alphas[i + 1] * np.expm1(-h)
        scale = alphas[i + 1] * h if settings.solver_type == "bh1" else gain  # −α·B(−h)
        base = sigmas[i + 1] / sigmas[i] * corrected + gain * x_0
        slope, r = NOTHING, 0.0
        if order == 2:
            r = (log_snr[i - 1] - log_snr[i]) / h
            slope = (S2 - x_0) / r
        z = base + scale / 2 * slope if order == 2 else base
        if i == steps - 1:
            rows.append(make_row(x_0, z))
            break
        earlier, correction = 0.0, scale / 2
        if order == 2:
            earlier, correction = (gain * weight for weight in _corrector_weights(h, r))
        rows.append(make_row(x_0, z, base + earlier * slope - correction * x_0, x_0))
    initial = np.stack([alphas, sigmas], 1)[skipped:-1]
    return schedule_from_rows("unipc", spacing, timesteps[skipped:], rows, initial, skipped=skipped)


def _corrector_weights(h: float, r: float) -> tuple[float, float]:
    """Weights of the earlier and the newest difference in UniC-2 (equation 9 of the paper; data prediction, so −h).

    They are relative to 1 − e⁻ʰ; B(h) cancels out.
    """
    phi_1 = np.expm1(-h)
    phi_2 = phi_1 / -h - 1
    phi_3 = phi_2 / -h - 1 / 2
    earlier, newest = np.linalg.solve(np.array([[1, 1], [r, 1]]), np.array([phi_2, 2 * phi_3]) / phi_1)
    return float(earlier), float(newest)


def euler_ancestral(diffusion: DiffusionSpec, steps: int, spacing: str | None = None) -> Schedule:
    """Euler's method with ancestral noise, as k-diffusion and diffusers' ``EulerAncestralDiscreteScheduler``.

    The reference keeps z/α and scales it for the network. Here the latents are z, as in every other sampler, so that
    image-to-image and previews need not know which sampler runs. Noise is drawn at every row, the last included.
    """
    spacing = choose_solver_spacing(diffusion, spacing)
    timesteps, levels = euler_timesteps(diffusion, steps, spacing)
    alphas, sigmas, _ = _half_log_snr(np.append(levels, 0.0))
    rows = []
    for i, level in enumerate(levels):
        x_0, noise = clean_and_noise(diffusion.prediction_type, alphas[i], sigmas[i])
        then = levels[i + 1] if i + 1 < steps else 0.0
        up = np.sqrt(max(then**2 * (level**2 - then**2) / level**2, 0.0))
        down = np.sqrt(max(then**2 - up**2, 0.0))
        rows.append(make_row(x_0, alphas[i + 1] * (x_0 + down * noise), noise=alphas[i + 1] * up))
    # diffusers starts from σ·noise, or with leading spacing from √(σ² + 1)·noise, in the scale of z/α.
    start = 1.0 if spacing == "leading" else float(sigmas[0])
    initial = np.stack([alphas, sigmas], 1)[:-1]
    return schedule_from_rows("euler-ancestral", spacing, timesteps, rows, initial, draws=True, start=(start,))


def _half_log_snr(levels: Float64) -> tuple[Float64, Float64, Float64]:
    """α, σ and λ = log(α/σ) at noise levels σ/α; λ is infinite at level 0."""
    alphas = 1 / np.sqrt(levels**2 + 1)
    with np.errstate(divide="ignore"):
        return alphas, levels * alphas, -np.log(levels)


def _signal_and_noise(alpha_bar: Float64) -> Float64:
    """The scales of signal and noise ``[T, 2]`` at ᾱ ``[T]``."""
    return np.stack([np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar)], axis=1)
