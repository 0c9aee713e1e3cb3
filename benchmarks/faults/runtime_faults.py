"""Faults of a runtime: wrong facts of the forward process, wrong schedules, wrong noise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from fault import Fault, Patch
from faulty_engine import Array

from dit_runtime import pipeline
from dit_runtime.bundle.reader import Bundle
from dit_runtime.samplers.by_name import schedule_for
from dit_runtime.samplers.noise import TorchNoise
from dit_runtime.samplers.schedule import A_Z, INPUT, LOG_SIGMA_V, MATRIX, NOISE, Schedule
from dit_runtime.sampling import requests
from dit_runtime.verify import image_rungs
from dit_runtime.verify import replay as replay_module
from dit_runtime.verify import verification as verify


def use_class_0_against() -> tuple[Patch, Patch]:
    """Guide away from class 0, in the verification and in sampling."""
    rows, branches = replay_module.branch_rows, pipeline.branches_from_labels
    return (
        (replay_module, "branch_rows", lambda labels, _, count: rows(labels, 0, count)),
        (pipeline, "branches_from_labels", lambda *args: branches(*args[:5], 0)),
    )


def change_diffusion(**changes: Any) -> Callable[[Bundle], Bundle]:
    """Change facts of the forward process in the manifest."""

    def changed(bundle: Bundle) -> Bundle:
        manifest = bundle.manifest
        return replace(bundle, manifest=replace(manifest, diffusion=replace(manifest.diffusion, **changes)))

    return changed


def change_schedule(sampler: str, change: Callable[[Array], None]) -> tuple[Patch, Patch]:
    """Change the coefficients ``[T, 17]`` of a sampler, in the verification and in sampling."""

    def faulty(name: str, *args: Any, **options: Any) -> Schedule:
        schedule = schedule_for(name, *args, **options)
        if name == sampler:
            coefficients = schedule.coefficients.copy()
            change(coefficients)
            schedule = replace(schedule, coefficients=coefficients)
        return schedule

    return (verify, "schedule_for", faulty), (pipeline, "schedule_for", faulty)


def shrink_denoised(rows: Array) -> None:
    rows[:, A_Z] *= 0.999


def enlarge_noise(rows: Array) -> None:
    rows[:, NOISE] *= 1.01


def fix_variance(rows: Array) -> None:
    rows[:, LOG_SIGMA_V] = 0


def spoil_step(rows: Array) -> None:
    """Spoil the seventh row, or the last one of fewer."""
    row = min(6, len(rows) - 1)
    rows[row, MATRIX] *= 1.001
    rows[row, INPUT] *= 1.001


def draw_noise_from(stream: Callable[[int], TorchNoise]) -> tuple[Patch, Patch]:
    return (image_rungs, "TorchNoise", stream), (requests, "TorchNoise", stream)


def draw_from_next_seed(seed: int) -> TorchNoise:
    return TorchNoise(seed + 1)


def draw_from_one_stream() -> Callable[[int], TorchNoise]:
    """Draw the noise of the whole batch from one generator, instead of one for each image."""
    shared: list[TorchNoise] = []

    def stream(seed: int) -> TorchNoise:
        if seed == 0:
            shared[:] = [TorchNoise(0)]
        return shared[0]

    return stream


RUNTIME_FAULTS = (
    Fault("wrong null class", "forward G=2", patches=use_class_0_against()),
    Fault(
        "guidance on 3 of 4 channels",
        "forward G=2",
        "channel 3 of 4",
        description=change_diffusion(guidance_channels=3),
    ),
    Fault("noise of another seed", "ddim noise", patches=draw_noise_from(draw_from_next_seed)),
    Fault("one stream of noise for the batch", "ddim noise", patches=draw_noise_from(draw_from_one_stream())),
    Fault(
        "timesteps off by one", "ddim teacher-forced", "first: step 1;", description=change_diffusion(steps_offset=1)
    ),
    Fault(
        "timesteps spaced otherwise", "ddim teacher-forced", description=change_diffusion(timestep_spacing="trailing")
    ),
    Fault(
        "last ᾱ is not one",
        "ddim teacher-forced",
        "first: step 50;",
        description=change_diffusion(set_alpha_to_one=False),
    ),
    Fault(
        "denoised's coefficient",
        "ddim teacher-forced",
        "denoised",
        patches=change_schedule("ddim", shrink_denoised),
    ),
    Fault(
        "one step's coefficients",
        "ddim teacher-forced",
        "first: step 7;",
        patches=change_schedule("ddim", spoil_step),
    ),
    Fault("noise too large", "ddpm teacher-forced", "next latents", patches=change_schedule("ddpm", enlarge_noise)),
    Fault(
        "learned variance ignored", "ddpm teacher-forced", "next latents", patches=change_schedule("ddpm", fix_variance)
    ),
)
