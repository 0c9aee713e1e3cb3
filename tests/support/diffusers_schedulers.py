"""diffusers' schedulers as an oracle: the one that has a sampler's settings, and its own trajectories."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from dit_runtime.bundle.manifest import DiffusionSpec
from support.optional import diffusers, torch
from support.papers import spec_for
from support.schedules import SCHEDULER, Float64, network

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


def diffusers_ddim(spec: DiffusionSpec, **changes: Any) -> diffusers.DDIMScheduler:
    return diffusers.DDIMScheduler(
        **{**SCHEDULER, **changes},
        timestep_spacing=spec.timestep_spacing,
        steps_offset=spec.steps_offset,
        set_alpha_to_one=spec.set_alpha_to_one,
    )


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
        return diffusers.EulerAncestralDiscreteScheduler(**options)
    options["use_karras_sigmas"] = spacing == "karras"
    if sampler == "unipc":
        return diffusers.UniPCMultistepScheduler(**options)
    kind = "sde-dpmsolver++" if sampler.endswith("-sde") else "dpmsolver++"
    return diffusers.DPMSolverMultistepScheduler(
        **options, algorithm_type=kind, solver_order=3 if "3m" in sampler else 2
    )


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


@cache
def zero_snr_betas() -> tuple[float, ...]:
    """diffusers' own float32 betas whose last is 1."""
    return tuple(
        diffusers.schedulers.scheduling_ddim.rescale_zero_terminal_snr(torch.linspace(1e-4, 0.02, 1000)).tolist()
    )


def reference_spec(spacing: str, offset: int = 0, prediction: str = "epsilon") -> DiffusionSpec:
    """The bundle's diffusion of ``reference``: with diffusers' own float32 betas where the last is 1."""
    spec = spec_for(spacing, offset, prediction)
    return replace(spec, betas=zero_snr_betas()) if prediction == "zero_snr" else spec
