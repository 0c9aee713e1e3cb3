"""Schedules that start inside, from an image, against diffusers' schedulers.

diffusers' image-to-image pipelines leave out the first steps (``get_timesteps``), tell the scheduler
(``set_begin_index``), add noise to the encoded image (``add_noise``) and run the rest. That is done here with its
schedulers and a seeded dummy network.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from support.diffusers_schedulers import (
    ANCESTRAL_ZERO_SNR_LIMIT,
    DIFFUSERS_LIMIT,
    KARRAS_LIMIT,
    diffusers_ddim,
    follow,
    reference,
    reference_can_run,
    reference_spec,
)
from support.grids import grid
from support.optional import torch
from support.papers import CASES, SPACINGS, noise_of, table_for
from support.schedules import (
    DIFFUSION,
    LEARNED,
    STRENGTHS,
    asked,
    assert_close,
    network,
    run_table,
    started,
    steps_left_out,
    timesteps_of,
)

from dit_runtime.samplers.by_name import schedule_for

# Relative to the largest value of the reference.

# Relative to the largest value of the reference.
START_LIMIT = 1e-6  # measured: 9.2e-7; Karras 1.4e-5, of diffusers' float32 levels
DDIM_LIMIT = 4e-6  # measured: 2.3e-6
FREE_KARRAS_LIMIT = 1.1e-4  # measured: 7.1e-5; teacher forced the same float32 levels give 2.4e-5


@pytest.mark.parametrize(
    ("sampler", "spacing", "offset", "prediction"),
    grid(
        [(*case, prediction) for case in CASES for prediction in ("epsilon", "zero_snr")],
        fast=lambda sampler, spacing, offset, prediction: prediction == "epsilon",
    ),
)
def test_solvers_from_an_image_are_diffusers(sampler: str, spacing: str, offset: int, prediction: str) -> None:
    """Fails if a sampler started inside differs from diffusers' by ``set_begin_index`` and ``add_noise`` in any step.

    The runs are free: what the memory holds at the start, and at which order it is used, shows in every step after.
    """
    spec, scheduler = reference_spec(spacing, offset, prediction), reference(sampler, spacing, offset, prediction)
    x_0, noise = torch.from_numpy(noise_of(30, 1)[0]), torch.from_numpy(noise_of(31, 1)[0])
    limit = DIFFUSERS_LIMIT[sampler]
    if spacing == "karras":
        limit = FREE_KARRAS_LIMIT if prediction == "epsilon" else KARRAS_LIMIT[prediction]
    elif (sampler, prediction) == ("euler-ancestral", "zero_snr"):
        limit = ANCESTRAL_ZERO_SNR_LIMIT
    for steps in (2, 4, 10, 14, 15, 16, 50):
        scheduler.set_timesteps(steps)
        if not reference_can_run(scheduler, steps):
            continue
        for strength in STRENGTHS:
            skipped = steps_left_out(steps, strength)
            if skipped == steps:
                continue
            schedule = table_for(sampler, spec, steps, spacing, skipped)
            scheduler.set_timesteps(steps)
            scheduler.set_begin_index(skipped)
            added = scheduler.add_noise(x_0, noise, scheduler.timesteps[skipped : skipped + 1])
            scale = np.sqrt(1 + float(scheduler.sigmas[skipped]) ** 2) if sampler == "euler-ancestral" else 1.0
            z = started(schedule, x_0.numpy(), noise.numpy())
            assert_close(z, added.numpy() / scale, max(limit, START_LIMIT))
            expected = follow(sampler, scheduler, z, timesteps_of(schedule), skipped=skipped)
            assert schedule.draws_noise.tolist() == expected.drew
            found = run_table(schedule, z, expected.noise, network)
            for step, denoised, sample in zip(found, expected.denoised, expected.samples, strict=True):
                assert_close(step.denoised, denoised, limit)
                assert_close(step.sample, sample, limit)


@pytest.mark.parametrize(
    ("steps", "spacing", "offset", "eta"),
    grid(
        [(steps, *case, eta) for steps, case, eta in product((1, 2, 10, 50, 250), SPACINGS[:-1], (0.0, 0.7))],
        fast=lambda steps, spacing, offset, eta: steps == 10,
    ),
)
def test_ddim_from_an_image_is_diffusers(steps: int, spacing: str, offset: int, eta: float) -> None:
    """Fails if DDIM started inside differs from diffusers' on the timesteps that its pipelines keep."""
    spec = replace(DIFFUSION, timestep_spacing=spacing, steps_offset=offset)
    scheduler = diffusers_ddim(spec)
    scheduler.set_timesteps(steps)
    x_0, noise = noise_of(34, 1)[0], noise_of(35, steps + 1)
    for strength in STRENGTHS:
        skipped = steps_left_out(steps, strength)
        if skipped == steps:
            continue
        schedule = schedule_for("ddim", LEARNED, spec, steps, eta, skipped=skipped)
        kept = scheduler.timesteps[skipped:]
        assert asked(schedule) == kept.tolist()
        x = scheduler.add_noise(torch.from_numpy(x_0), torch.from_numpy(noise[-1]), kept[:1])
        z = started(schedule, x_0, noise[-1])
        assert_close(z, x.numpy(), START_LIMIT)
        found = run_table(schedule, z, noise[skipped:steps], network)
        for step, t, drawn in zip(found, kept, noise[skipped:steps], strict=True):
            e = torch.from_numpy(network(x.numpy(), float(t))[0])
            x = scheduler.step(e, t, x, eta=eta, variance_noise=torch.from_numpy(drawn)).prev_sample
            assert_close(step.sample, x.numpy(), DDIM_LIMIT)
