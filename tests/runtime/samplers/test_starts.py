"""Schedules that start inside, from an image, against the papers and SiT: the float64 oracles, started inside."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.grids import grid
from support.papers import CASES, FREE_LIMIT, REFUSED, Papers, noise_of, sigmas_for, spec_for, table_for
from support.schedules import (
    AVERAGE,
    DIFFUSION,
    FIXED,
    LEARNED,
    PAIRED,
    STRENGTHS,
    assert_close,
    assert_same,
    network,
    run_table,
    started,
    steps_left_out,
    timesteps_of,
)
from support.sit import (
    FLOW_SAMPLERS,
    PATHS,
    Flow,
    grid_of,
    interpolant,
    network_of_flow,
    noise_of_rows,
    run_flow,
    spec_of,
)

from dit_runtime import SAMPLERS, schedule_for
from dit_runtime.bundle.manifest import DiffusionSpec, ModelSpec
from dit_runtime.core.errors import SamplingError
from dit_runtime.samplers.by_name import count_skipped_steps

# Relative to the largest value of the reference.

FLOW_LIMIT = 2e-6  # measured: 1.3e-6 (sde-euler), 7.8e-8 elsewhere


@pytest.mark.parametrize(
    ("sampler", "spacing", "offset", "prediction"),
    grid(
        [(*case, prediction) for case in CASES for prediction in ("epsilon", "v_prediction", "zero_snr")],
        fast=lambda sampler, spacing, offset, prediction: prediction == "epsilon",
    ),
)
def test_solvers_from_an_image_are_the_papers(sampler: str, spacing: str, offset: int, prediction: str) -> None:
    """Fails if what is integrated from the start on is not the papers' in float64, the order rising from 1 again."""
    spec = spec_for(spacing, offset, prediction)
    for steps in (2, 4, 10, 14, 15, 16, 50):
        if (sampler, spacing, offset, prediction, steps) in REFUSED:
            continue
        for strength in STRENGTHS:
            skipped = steps_left_out(steps, strength)
            if skipped == steps:
                continue
            schedule = table_for(sampler, spec, steps, spacing, skipped)
            whole = timesteps_of(table_for(sampler, spec, steps, spacing))
            assert timesteps_of(schedule) == whole[skipped:]
            papers = Papers(sampler, spec.prediction_type, sigmas_for(spec, spacing, whole)[skipped:])
            papers.total = steps
            z, noise = noise_of(32, 1)[0], noise_of(33, steps - skipped)
            found = run_table(schedule, z, noise, network)
            for step, expected in zip(found, papers.run(z, noise, whole[skipped:]), strict=True):
                for value, reference_value in zip(step, expected, strict=True):
                    assert_close(value, reference_value, FREE_LIMIT)


@pytest.mark.parametrize(
    ("path", "sampler", "steps"),
    grid(product(PATHS, FLOW_SAMPLERS, (2, 10, 50)), fast=lambda path, sampler, steps: steps == 10),
)
def test_flows_from_an_image_are_sits(path: str, sampler: str, steps: int) -> None:
    """Fails if a velocity model does not start from α·x + σ·noise at a step's time, or draws otherwise then."""
    stochastic, spec = sampler.startswith("sde-"), spec_of(path)
    flow = Flow(path, sampler.removeprefix("sde-"), steps, "sigma" if stochastic else None)
    for strength in (0.05, 0.5, 0.6, 1.0):
        skipped = steps_left_out(steps, strength)
        if skipped == steps:
            continue
        schedule = schedule_for(sampler, FIXED, spec, steps, skipped=skipped)
        assert (schedule.steps, schedule.skipped) == (steps - skipped, skipped)
        x_1, draws = noise_of(36, 1)[0], noise_of(37, steps + 1)
        alpha, sigma, *_ = interpolant(path, grid_of(flow)[skipped])
        first = alpha * x_1 + sigma * draws[0]
        expected = list(run_flow(flow, iter([first, *draws[1:]]), skipped=skipped))
        z, noise = noise_of_rows(schedule, np.concatenate([started(schedule, x_1, draws[0])[None], draws[1:]]))
        assert_close(z, expected[0].input, FLOW_LIMIT)
        assert schedule.draws_noise.tolist() == [evaluation.draws for evaluation in expected]
        assert schedule.completes_step.tolist() == [evaluation.completes for evaluation in expected]
        found = run_table(schedule, z, noise, network_of_flow)
        for step, wanted in zip(found, expected, strict=True):
            assert_close(step.denoised, wanted.denoised, FLOW_LIMIT)
            assert_close(step.sample, wanted.sample, FLOW_LIMIT)


def kind_of(sampler: str) -> tuple[ModelSpec, DiffusionSpec]:
    """A model that the sampler is for."""
    if sampler == "meanflow":
        return PAIRED, AVERAGE
    return (FIXED, spec_of("linear")) if sampler in FLOW_SAMPLERS else (LEARNED, DIFFUSION)


@given(sampler=st.sampled_from(SAMPLERS), steps=st.integers(2, 60), data=st.data())
@settings(max_examples=80, deadline=None)
def test_every_start_is_sound(sampler: str, steps: int, data: st.DataObject) -> None:
    """Fails if the rows after any step read memory of rows before, or are others than the whole schedule's times."""
    model, spec = kind_of(sampler)
    skipped = data.draw(st.integers(0, steps - 1), "skipped")
    whole = schedule_for(sampler, model, spec, steps)
    schedule = schedule_for(sampler, model, spec, steps, skipped=skipped)
    assert (schedule.sampler, schedule.spacing) == (whole.sampler, whole.spacing)
    assert (schedule.skipped, schedule.steps) == (skipped, steps - skipped)
    if not skipped:
        assert_same(schedule, whole)
    assert timesteps_of(schedule) == timesteps_of(whole)[-len(schedule) :]
    assert sorted(set(schedule.rows.tolist())) == list(range(len(schedule.timesteps)))
    for name in ("initial", "draws_noise", "completes_step"):
        assert getattr(schedule, name).tolist() == getattr(whole, name)[-len(schedule) :].tolist(), name
    written = {0}
    for row in schedule.coefficients:
        matrix, inputs = row[2:11].reshape(3, 3), row[11:14]
        assert {slot for slot in range(3) if matrix[:, slot].any()} <= written
        written |= {slot for slot in range(3) if matrix[slot].any() or inputs[slot]}
    if sampler in ("ddim", "ddpm", "euler-ancestral", "meanflow", *FLOW_SAMPLERS):
        assert np.array_equal(schedule.coefficients, whole.coefficients[-len(schedule) :])


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_too_many_steps_left_out(sampler: str) -> None:
    """Fails if a schedule of no rows is made, or rows are counted from the end."""
    model, spec = kind_of(sampler)
    for skipped in (10, 11, -1):
        with pytest.raises(SamplingError, match=rf"{skipped} of 10 steps skipped: expected 0 to 9"):
            schedule_for(sampler, model, spec, 10, skipped=skipped)


def test_strength_is_counted_as_in_diffusers() -> None:
    """Fails if strength leaves out other steps than ``int(steps · strength)`` keeps, down to float's rounding."""
    cases = [(50, 0.6, 20), (10, 1.0, 0), (10, 0.99, 1), (10, 0.1, 9), (100, 0.29, 72), (1, 1.0, 0), (3, 0.34, 2)]
    assert [count_skipped_steps(steps, strength) for steps, strength, _ in cases] == [skipped for *_, skipped in cases]


@pytest.mark.slow  # a sweep
def test_the_smallest_strength() -> None:
    """Fails if a strength that leaves no step is not refused, or the one that is named instead leaves none either."""
    for steps in range(1, 1001):
        with pytest.raises(SamplingError, match=rf"of {steps} steps leaves none to run; the smallest") as refusal:
            count_skipped_steps(steps, 0.999 / steps)
        smallest = float(str(refusal.value).rsplit(" ", 1)[1])
        assert count_skipped_steps(steps, smallest) == steps - 1
        assert smallest <= 1 / steps + 1e-6


@pytest.mark.parametrize("strength", [0.0, -0.1, 1.01, float("nan"), float("inf")])
def test_a_strength_that_is_none(strength: float) -> None:
    """Fails if a strength outside (0, 1] is taken for one."""
    with pytest.raises(SamplingError, match="expected above 0 to 1"):
        count_skipped_steps(10, strength)
