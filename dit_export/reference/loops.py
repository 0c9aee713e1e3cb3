"""The references' sampling loops, step by step, for golden records.

The diffusers family uses diffusers' schedulers as they are. For official checkpoints this module has the respaced
diffusion of facebookresearch/DiT (``respace.py``, ``gaussian_diffusion.py``), for SiT its fixed-step ODE and SDE
(``transport/``), each written after its source. Nothing here knows about sampler tables.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler
from diffusers.schedulers import scheduling_ddpm
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

Generators = list[torch.Generator]
# (e, v, z) → the next z and the current estimate of the clean latents.
Advance = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]

LAST_STEP = 0.04  # SiT's default size of its SDE's last step


@dataclass(frozen=True)
class LoopStep:
    """One network evaluation: its timestep, and the function that turns its output into the next latents.

    ``t`` is both times of a model that gets two.
    """

    t: float | tuple[float, float]
    advance: Advance

    @property
    def time(self) -> float:
        """The timestep, or the first of two times."""
        return float(self.t[0] if isinstance(self.t, tuple) else self.t)

    def times_of(self, count: int) -> Tensor:
        """The timesteps ``[count]`` of so many images, or ``[count, 2]``."""
        return torch.stack([torch.tensor(self.t)] * count)


def diffusers_ddim(
    scheduler: Any, steps: int, generators: Generators, betas: Sequence[float] | None = None
) -> Iterator[LoopStep]:
    """The checkpoint's own ``DDIMScheduler``; with ``betas`` its arrays are made from them in float64."""
    if betas is not None:
        scheduler = _copy_in_float64(scheduler, betas)
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:

        def advance(e: Tensor, _: Tensor, z: Tensor, t: Tensor = t) -> tuple[Tensor, Tensor]:
            result = scheduler.step(e, t, z, generator=generators)
            return result.prev_sample, result.pred_original_sample

        yield LoopStep(float(t), advance)


def diffusers_ddpm(
    config: Any, steps: int, learned: bool, generators: Generators, betas: Sequence[float] | None = None
) -> Iterator[LoopStep]:
    """``DDPMScheduler`` as the checkpoint's configuration has it, if that states a ``variance_type``.

    Otherwise with the official spacing as custom timesteps and the official variance: it then agrees with the official
    code. With ``betas`` the scheduler's arrays are made from them in float64.
    """
    stated = config.get("variance_type")
    variance_type = stated or ("learned_range" if learned else "fixed_large")
    scheduler: Any = DDPMScheduler.from_config(config, variance_type=variance_type)
    if betas is not None:
        scheduler = _copy_in_float64(scheduler, betas)
    if stated is None:
        scheduler.set_timesteps(timesteps=official_timesteps(config.num_train_timesteps, steps)[::-1])
    else:
        scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:

        def advance(e: Tensor, v: Tensor, z: Tensor, t: Tensor = t) -> tuple[Tensor, Tensor]:
            output = torch.cat([e, v], dim=1) if variance_type == "learned_range" else e
            with _draw_in_float32() if betas is not None else contextlib.nullcontext():
                result = scheduler.step(output, t, z, generator=generators)
            return result.prev_sample, result.pred_original_sample

        yield LoopStep(float(t), advance)


def _copy_in_float64(scheduler: Any, betas: Sequence[float]) -> Any:
    """A copy of a diffusers scheduler whose arrays have float64's precision instead of float32's."""
    wide = copy.deepcopy(scheduler)
    wide.betas = torch.tensor(betas, dtype=torch.float64)
    wide.alphas = 1 - wide.betas
    wide.alphas_cumprod = torch.cumprod(wide.alphas, dim=0)
    wide.one = torch.tensor(1.0, dtype=torch.float64)
    if not scheduler.config.get("set_alpha_to_one", True):
        wide.final_alpha_cumprod = wide.alphas_cumprod[0]
    return wide


@contextlib.contextmanager
def _draw_in_float32() -> Iterator[None]:
    """Let ``DDPMScheduler`` draw in float32 inside this block.

    It draws in its input's dtype, and a generator of PyTorch draws other numbers in float64.
    """
    original = scheduling_ddpm.randn_tensor

    def draw(shape: Any, generator: Any = None, device: Any = None, dtype: Any = None, **_: Any) -> Tensor:
        noise: Tensor = randn_tensor(shape, generator=generator, device=device).to(dtype)
        return noise

    scheduling_ddpm.randn_tensor = draw
    try:
        yield
    finally:
        scheduling_ddpm.randn_tensor = original


def official_timesteps(total: int, steps: int) -> list[int]:
    """The official ``space_timesteps(total, str(steps))``, in rising order."""
    stride = (total - 1) / (steps - 1)
    taken, at = [], 0.0
    for _ in range(steps):
        taken.append(round(at))
        at += stride
    return taken


class OfficialDiffusion:
    """The official ``SpacedDiffusion`` with epsilon prediction and no clipping; its arrays are float64, as there.

    ``dtype``: a coefficient is rounded to it when it is used; the official code rounds to float32.
    """

    def __init__(self, betas: Sequence[float], steps: int, dtype: torch.dtype = torch.float32) -> None:
        self.dtype = dtype
        self.timesteps = official_timesteps(len(betas), steps)
        kept = np.cumprod(1.0 - np.array(betas, np.float64))[self.timesteps]
        self.alpha_bar, self.alpha_bar_prev = kept, np.append(1.0, kept[:-1])
        self.betas = 1 - self.alpha_bar / self.alpha_bar_prev
        self.posterior_variance = self.betas * (1 - self.alpha_bar_prev) / (1 - self.alpha_bar)
        # The first variance is zero and has no logarithm.
        self.posterior_log_variance = np.log(np.append(self.posterior_variance[1], self.posterior_variance[1:]))

    def x_0_from_eps(self, e: Tensor, z: Tensor, i: int) -> Tensor:
        return self._round(np.sqrt(1 / self.alpha_bar[i])) * z - self._round(np.sqrt(1 / self.alpha_bar[i] - 1)) * e

    def ddim(self) -> Iterator[LoopStep]:
        """``ddim_sample`` at eta 0."""
        for i in reversed(range(len(self.timesteps))):

            def advance(e: Tensor, _: Tensor, z: Tensor, i: int = i) -> tuple[Tensor, Tensor]:
                x_0 = self.x_0_from_eps(e, z, i)
                eps = (self._round(np.sqrt(1 / self.alpha_bar[i])) * z - x_0) / self._round(
                    np.sqrt(1 / self.alpha_bar[i] - 1)
                )
                before = self._round(self.alpha_bar_prev[i])
                return x_0 * before.sqrt() + (1 - before).sqrt() * eps, x_0

            yield LoopStep(self.timesteps[i], advance)

    def ddpm(self, learned: bool, generators: Generators) -> Iterator[LoopStep]:
        """``p_sample`` with the learned range of variances, or else with the fixed large variance."""
        large = np.log(np.append(self.posterior_variance[1], self.betas[1:]))
        for i in reversed(range(len(self.timesteps))):

            def advance(e: Tensor, v: Tensor, z: Tensor, i: int = i) -> tuple[Tensor, Tensor]:
                x_0 = self.x_0_from_eps(e, z, i)
                before, now, beta = self.alpha_bar_prev[i], self.alpha_bar[i], self.betas[i]
                mean = self._round(beta * np.sqrt(before) / (1 - now)) * x_0
                mean = mean + self._round((1 - before) * np.sqrt(1 - beta) / (1 - now)) * z
                if i == 0:
                    return mean, x_0
                log_variance = self._round(large[i])
                if learned:
                    fraction = (v + 1) / 2
                    low, high = self._round(self.posterior_log_variance[i]), self._round(np.log(beta))
                    log_variance = fraction * high + (1 - fraction) * low
                return mean + torch.exp(0.5 * log_variance) * draw_noise(z, generators), x_0

            yield LoopStep(self.timesteps[i], advance)

    def _round(self, value: float) -> Tensor:
        """Round as the official code's ``_extract_into_tensor`` does."""
        return torch.tensor(value, dtype=self.dtype)


class FlowPath:
    """A path z = α·x + σ·ε of a velocity model that predicts α'·x + σ'·ε, in the model's own time."""

    def coefficients_at(self, t: float) -> tuple[float, float, float, float]:
        """α, α', σ and σ' at time t."""
        raise NotImplementedError

    def score_from_velocity(self, velocity: Tensor, z: Tensor, t: float) -> Tensor:
        """``get_score_from_velocity`` of SiT, which REPA's code shares."""
        alpha, d_alpha, sigma, d_sigma = self.coefficients_at(t)
        ratio = alpha / d_alpha
        return (ratio * velocity - z) / (sigma**2 - ratio * d_sigma * sigma)

    def clean_from_velocity(self, velocity: Tensor, z: Tensor, t: float) -> Tensor:
        """x, from z and the velocity."""
        alpha, d_alpha, sigma, d_sigma = self.coefficients_at(t)
        return (d_sigma * z - sigma * velocity) / (alpha * d_sigma - d_alpha * sigma)


class SiTPath(FlowPath):
    """α, σ and their derivatives of SiT's interpolants (``transport/path.py``) at a time from 0, noise, to 1."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.end = 1 - 1e-3 if path == "vp" else 1.0

    def coefficients_at(self, t: float) -> tuple[float, float, float, float]:
        """α, α', σ and σ' at time t."""
        if self.path == "linear":
            return t, 1.0, 1 - t, -1.0
        if self.path == "gvp":
            half = math.pi / 2
            return math.sin(half * t), half * math.cos(half * t), math.cos(half * t), -half * math.sin(half * t)
        low, high = 0.1, 20.0
        log_mean = -0.25 * (1 - t) ** 2 * (high - low) - 0.5 * (1 - t) * low
        slope = 0.5 * (1 - t) * (high - low) + 0.5 * low
        sigma = math.sqrt(1 - math.exp(2 * log_mean))
        return math.exp(log_mean), math.exp(log_mean) * slope, sigma, math.exp(2 * log_mean) * 2 * slope / (-2 * sigma)

    def ode(self, steps: int, shift: float = 1.0) -> Iterator[LoopStep]:
        """``sample_ode`` with torchdiffeq's fixed-step Euler; ``shift`` is LightningDiT's ``timestep_shift``."""
        h = self.end / steps
        for i in range(steps):
            t, then = (shift * at / (1 + (shift - 1) * at) for at in (i * h, (i + 1) * h))
            step = h if shift == 1 else then - t

            def advance(e: Tensor, _: Tensor, z: Tensor, t: float = t, step: float = step) -> tuple[Tensor, Tensor]:
                return z + step * e, self.clean_from_velocity(e, z, t)

            yield LoopStep(t, advance)

    def sde(self, steps: int, generators: Generators) -> Iterator[LoopStep]:
        """``sample_sde`` by Euler–Maruyama with diffusion σ_t and the last step by the mean."""
        last = 1 - LAST_STEP
        h = last / (steps - 1)

        def drift(e: Tensor, z: Tensor, t: float) -> Tensor:
            return e + self.coefficients_at(t)[2] * self.score_from_velocity(e, z, t)

        for i in range(steps - 1):

            def advance(e: Tensor, _: Tensor, z: Tensor, t: float = i * h) -> tuple[Tensor, Tensor]:
                noise = draw_noise(z, generators) * math.sqrt(h)
                return z + drift(e, z, t) * h + math.sqrt(
                    2 * self.coefficients_at(t)[2]
                ) * noise, self.clean_from_velocity(e, z, t)

            yield LoopStep(i * h, advance)
        yield LoopStep(last, lambda e, _, z: (z + drift(e, z, last) * LAST_STEP, self.clean_from_velocity(e, z, last)))


def draw_noise(like: Tensor, generators: Generators) -> Tensor:
    """Noise for each image from its own generator."""
    noise: Tensor = randn_tensor(like.shape, generator=generators).to(like.dtype)
    return noise
