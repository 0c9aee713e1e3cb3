"""Compare each sampler's schedule with its reference: the same noise and the same network, run to the end.

    python benchmarks/samplers.py            # a Markdown table, about a minute
    python benchmarks/samplers.py --json

The reference is diffusers' own scheduler in its own loop. The network is a smooth dummy in float64, so only the
schedulers' arithmetic differs: diffusers computes its numbers in float32, and ours are computed in float64 and rounded
once. The tests in ``tests/runtime/samplers`` compare the same schedules with derivations in float64. They compare the
samplers of velocity models with derivations alone, because the reference of these is not on the package index.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    UniPCMultistepScheduler,
)
from diffusers.schedulers import scheduling_ddpm as ddpm
from diffusers.schedulers import scheduling_euler_ancestral_discrete as ancestral

from dit_runtime import SAMPLERS, DiTError, schedule_for
from dit_runtime.bundle.manifest import DiffusionSpec, ModelSpec
from dit_runtime.samplers.by_name import FLOW_SAMPLERS
from dit_runtime.samplers.spacing import official_timesteps

COUNTS = (1, 2, 10, 50, 250, 1000)
BETAS = np.linspace(1e-4, 0.02, 1000)
CONFIG = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
DIFFUSION = DiffusionSpec(tuple(BETAS.tolist()), "epsilon", 4, "leading", 0, True)
MODEL = ModelSpec("adaln-zero", 4, (8, 8), 2, 64, 2, 2, 256, 10, learned_variance=True)
SHAPE = (2, 4, 8, 8)
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("ddim", {}),
    "ddim, eta 1": ("ddim", {"eta": 1.0}),
    "ddim, trailing": ("ddim", {"spacing": "trailing"}),
    "ddpm": ("ddpm", {}),
    **{name: (name, {}) for name in SAMPLERS if name not in ("ddim", "ddpm", *FLOW_SAMPLERS)},
    "dpmpp-2m, karras": ("dpmpp-2m", {"spacing": "karras"}),
    "unipc, karras": ("unipc", {"spacing": "karras"}),
    "euler-ancestral, linspace": ("euler-ancestral", {"spacing": "linspace"}),
}


def predict(z: np.ndarray, t: float) -> tuple[np.ndarray, np.ndarray]:
    """Predict (ε, v) with a smooth dummy model."""
    mixed = z + 0.5 * np.roll(z, 1, axis=1)
    return 0.7 * z + 0.4 * np.tanh(0.5 * mixed + t / 400 - 1), np.sin(mixed + t / 100)


def scheduler_for(sampler: str, spacing: str, steps: int) -> Any:
    """diffusers' scheduler for a sampler, set to ``steps``."""
    if sampler == "ddpm":
        scheduler = DDPMScheduler(**CONFIG, clip_sample=False, variance_type="learned_range")
        scheduler.set_timesteps(timesteps=official_timesteps(1000, steps, "official").tolist())
        return scheduler
    config: dict[str, Any] = {**CONFIG, "timestep_spacing": "leading" if spacing == "karras" else spacing}
    karras = {"use_karras_sigmas": spacing == "karras"}
    kinds: dict[str, Callable[[], Any]] = {
        "ddim": lambda: DDIMScheduler(**config, clip_sample=False),
        "dpmpp-2m": lambda: DPMSolverMultistepScheduler(**config, **karras),
        "dpmpp-2m-sde": lambda: DPMSolverMultistepScheduler(**config, **karras, algorithm_type="sde-dpmsolver++"),
        "dpmpp-3m": lambda: DPMSolverMultistepScheduler(**config, **karras, solver_order=3),
        "unipc": lambda: UniPCMultistepScheduler(**config, **karras),
        "euler-ancestral": lambda: EulerAncestralDiscreteScheduler(**config),
    }
    scheduler = kinds[sampler]()
    scheduler.set_timesteps(steps)
    return scheduler


def run_reference(sampler: str, spacing: str, steps: int, eta: float, noise: np.ndarray) -> np.ndarray:
    """Run diffusers' scheduler to the end; return the latents. ``noise [T+1, …]`` takes the place of its generator."""
    scheduler = scheduler_for(sampler, spacing, steps)
    z = torch.from_numpy(noise[0]) * scheduler.init_noise_sigma
    with (
        mock.patch.multiple(ancestral, randn_tensor=mock.DEFAULT) as one,
        mock.patch.multiple(ddpm, randn_tensor=mock.DEFAULT) as two,
    ):
        for t, given in zip(scheduler.timesteps, map(torch.from_numpy, noise[1:]), strict=True):
            one["randn_tensor"].return_value = two["randn_tensor"].return_value = given
            e, v = predict(scheduler.scale_model_input(z, t).double().numpy(), float(t))
            output = torch.from_numpy(np.concatenate([e, v], axis=1) if sampler == "ddpm" else e)
            options: dict[str, Any] = {"variance_noise": given} if sampler in ("ddim", "dpmpp-2m-sde") else {}
            if sampler == "ddim":
                options["eta"] = eta
            z = scheduler.step(output, t, z, **options).prev_sample.double()
    return z.numpy()


def run_ours(sampler: str, spacing: str | None, steps: int, eta: float, noise: np.ndarray) -> np.ndarray:
    """Evaluate the schedule's rows as the step graph does, in float64; return the last latents."""
    schedule = schedule_for(sampler, MODEL, DIFFUSION, steps, eta, spacing)
    state = np.zeros((3, *SHAPE))
    state[0] = schedule.start[0] * noise[0]
    for index, numbers in enumerate(schedule.coefficients.astype(np.float64)):
        e, v = predict(state[0], float(schedule.timesteps[schedule.rows[index]]))
        matrix, inputs, (g, h, k) = numbers[2:11].reshape(3, 3), numbers[11:14], numbers[14:]
        state = np.tensordot(matrix, state, axes=1) + np.multiply.outer(inputs, e)
        state[0] += np.exp(g + h * v) * k * noise[index + 1]
    return state[0]


def compare(name: str, steps: int) -> str:
    """max |Δ| of the last latents divided by their largest value, or ``refused`` where the sampler has no schedule."""
    sampler, settings = SETTINGS[name]
    noise = np.random.default_rng(steps).standard_normal((steps + 1, *SHAPE))
    eta, spacing = settings.get("eta", 0.0), settings.get("spacing")
    try:
        found = run_ours(sampler, spacing, steps, eta, noise)
    except DiTError:
        return "refused"
    expected = run_reference(sampler, spacing or "leading", steps, eta, noise)
    return f"{np.abs(found - expected).max() / np.abs(expected).max():.1e}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    figures = {name: {steps: compare(name, steps) for steps in COUNTS} for name in SETTINGS}
    if args.json:
        print(json.dumps(figures, indent=1))
        return
    print("| sampler | " + " | ".join(f"{steps} steps" for steps in COUNTS) + " |")
    print("|---" * (len(COUNTS) + 1) + "|")
    for name, row in figures.items():
        print(f"| {name} | " + " | ".join(row.values()) + " |")


if __name__ == "__main__":
    main()
