"""Sampler tables for velocity models against SiT's samplers, derived again in float64.

The oracle is written from the formulas of SiT (arXiv 2401.08740): the interpolant x_t = α·x_1 + σ·x_0, x_0 the noise
and x_1 the data; its velocity and score, equation 9; the probability-flow ODE; the SDE with any diffusion
coefficient. It shares nothing with the table: no derivative is written down and no score is turned into coefficients.
Grids, last steps and the order of the draws are those of the reference code (github.com/willisma/SiT, 947f95b). Run
with float64 as PyTorch's default, it gives this oracle's times, network inputs and images to 3e-15, relative to the
largest value, for every setting here; but its "constant" raises unless the norm is a tensor, and its
"increasing-decreasing" is spelled "inccreasing-decreasing".
"""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.grids import grid
from support.optional import torch
from support.schedules import DIFFUSION, FIXED, Float64, assert_close, normal, run_table
from support.sit import (
    FLOW_SAMPLERS,
    FORMS,
    LAST_STEPS,
    PATHS,
    Flow,
    diffusion_coefficient,
    end_of,
    grid_of,
    interpolant,
    network_of_flow,
    noise_of_rows,
    run_flow,
    spec_of,
)

from dit_runtime.core.errors import SamplingError
from dit_runtime.samplers.by_name import SAMPLERS, schedule_for
from dit_runtime.samplers.flow import flow_sde
from dit_runtime.samplers.schedule import Schedule

# Relative to max|reference|.
ROW_LIMIT = 1e-7  # measured: 6.2e-8, the rounding of the table to float32
# On the linear path every row of sde-euler holds the same 1 − dt: its rounding, 1.5e-8 at 250 steps, adds up.
FREE_LIMIT = 4e-6  # measured: 2.9e-6 there, 4.4e-7 elsewhere
# Absolute.
TIMESTEP_LIMIT = 6e-8  # measured: 3.0e-8, a rounding; 5.96e-8, a last place, from SiT's float32 grid
ODE_LIMIT = 0.015  # measured: 1.2e-2 (Euler), 4.3e-4 (Heun)
ORDER_LIMIT = 0.04  # measured: 3.0e-2, relative to a quotient of 2 or 4
SDE_LIMIT = 6e-3  # measured: 5.2e-3
EXTRAPOLATED_LIMIT = 2e-4  # measured: 1.6e-4

DIFFUSION_SAMPLERS = ["ddim", "ddpm", "dpmpp-2m", "dpmpp-2m-sde", "dpmpp-3m", "unipc", "euler-ancestral"]
SHAPE = (2, 4, 3)  # images, channels, pixels
DATA_MEAN, DATA_VARIANCE = 0.7, 0.3  # of the Gaussian data whose velocity is known in closed form


def table_of(flow: Flow) -> Schedule:
    if flow.form is None:
        return schedule_for(flow.method, FIXED, spec_of(flow.path), flow.steps)
    return flow_sde(
        flow.path, flow.steps, flow.method, flow.form, flow.norm, flow.last_step, last_step_size=flow.last_step_size
    )


def finite_in_sit(flow: Flow) -> bool:
    """SBDM divides by α = 0 at the start; Heun without a last step evaluates the score, 1/σ, where σ is 0.

    On the GVP path σ is a rounding error there, and D·score right where D is of σ's order or vanishes faster.
    """
    if flow.form == "SBDM" and flow.path != "vp":
        return False
    if flow.path != "vp" and flow.method == "heun" and flow.last_step == "none":
        vanishes = flow.form in {"sigma", "increasing-decreasing"} or (flow.form == "decreasing" and flow.norm == 1)
        return flow.path == "gvp" and vanishes
    return True


EVERY_SDE = [
    (path, method, last_step, form)
    for path, method, last_step, form in product(PATHS, ["euler", "heun"], LAST_STEPS, FORMS)
    if finite_in_sit(Flow(path, method, 2, form, last_step=last_step))
]


def assert_same_as_reference(flow: Flow, seed: int) -> Schedule:
    """Every row by itself on the reference's latents, then the whole trajectory run freely from the same draws."""
    schedule, draws = table_of(flow), normal(seed, flow.steps + 1, *SHAPE)
    expected = list(run_flow(flow, iter(draws)))
    assert schedule.draws_noise.tolist() == [evaluation.draws for evaluation in expected]
    assert schedule.completes_step.tolist() == [evaluation.completes for evaluation in expected]
    z, noise = noise_of_rows(schedule, draws)
    assert_close(z, expected[0].input, ROW_LIMIT)
    inputs = [evaluation.input for evaluation in expected]
    times = schedule.timesteps[schedule.rows].astype(np.float64)
    for row, (found, wanted) in enumerate(
        zip(run_table(schedule, z, noise, network_of_flow, inputs), expected, strict=True)
    ):
        assert abs(times[row] - wanted.t) <= TIMESTEP_LIMIT, f"row {row}: t is {times[row]}, expected {wanted.t}"
        assert_close(
            schedule.initial[row].astype(np.float64), np.array(interpolant(flow.path, wanted.t)[:2]), ROW_LIMIT
        )
        assert_close(found.denoised, wanted.denoised, ROW_LIMIT)
        assert_close(found.mean, wanted.mean, ROW_LIMIT)
        assert_close(found.scale, np.full(SHAPE, wanted.scale), ROW_LIMIT)
        assert_close(found.sample, wanted.sample, ROW_LIMIT)
    assert_close(run_table(schedule, z, noise, network_of_flow)[-1].sample, expected[-1].sample, FREE_LIMIT)
    return schedule


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("sampler", "steps"),
    grid(
        [(sampler, steps) for sampler in ("euler", "heun") for steps in (1, 2, 10, 15, 50, 250)] + [("euler", 1000)],
        fast=lambda sampler, steps: steps in (1, 2, 15, 50),
    ),
)
def test_ode_samplers_are_sits(path: str, sampler: str, steps: int) -> None:
    """Fails if Euler or Heun leaves SiT's ODE grid, or a row does not do the method's step to the latents."""
    schedule = assert_same_as_reference(Flow(path, sampler, steps), seed=20)
    assert (len(schedule.rows), len(schedule.timesteps)) == {
        "euler": (steps, steps),
        "heun": (2 * steps, steps + 1),
    }[sampler]
    assert schedule.start.tolist() == [1]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("method", ["euler", "heun"])
@pytest.mark.parametrize("steps", grid([2, 10, 15, 50, 250], fast=lambda steps: steps in (2, 15, 50)))
def test_sde_samplers_are_sits(path: str, method: str, steps: int) -> None:
    """Fails if an SDE sampler differs from SiT's with the defaults of its sample.py, in any draw, step or last step."""
    schedule = schedule_for(f"sde-{method}", FIXED, spec_of(path), steps)
    flow = Flow(path, method, steps, form="sigma")
    same = assert_same_as_reference(flow, seed=21)
    for name in ("timesteps", "rows", "coefficients", "initial", "start", "draws_noise", "completes_step"):
        np.testing.assert_array_equal(getattr(schedule, name), getattr(same, name), err_msg=name)
    assert (len(schedule.rows), len(schedule.timesteps)) == (steps if method == "euler" else 2 * steps - 1, steps)
    assert len(schedule.start) + schedule.draws_noise.sum() == steps  # the latents, and one a step


@pytest.mark.parametrize(("path", "method", "last_step", "form"), EVERY_SDE)
def test_every_form_and_last_step_is_sits(path: str, method: str, last_step: str, form: str) -> None:
    """Fails if a form of the diffusion coefficient or of the last step is not SiT's, at any norm or size it takes."""
    for steps, norm, size in [(2, 1.0, 0.04), (25, 1.0, 0.04), (7, 0.5, 0.1), (25, 1.6, 0.02), (7, 1.0, 0.0)]:
        flow = Flow(path, method, steps, form, norm, last_step, size)
        if finite_in_sit(flow) and (size > 0 or path == "vp"):  # with no size the others take it where σ is 0
            assert_same_as_reference(flow, seed=22)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("sampler", FLOW_SAMPLERS)
def test_timesteps_are_those_of_sits_float32_grid(path: str, sampler: str) -> None:
    """Fails if the network is asked at a time more than a last place from SiT's own grid, a float32 ``linspace``."""
    for steps in (2, 10, 50, 250):
        flow = Flow(path, sampler.removeprefix("sde-"), steps, "sigma" if sampler.startswith("sde-") else None)
        found = np.sort(schedule_for(sampler, FIXED, spec_of(path), steps).timesteps)
        expected = torch.linspace(0, end_of(flow), len(grid_of(flow))).numpy()[: len(found)]
        assert np.abs(found - expected).max() <= TIMESTEP_LIMIT


@given(sampler=st.sampled_from(FLOW_SAMPLERS), path=st.sampled_from(PATHS), steps=st.integers(2, 1000))
@settings(max_examples=60, deadline=None)
def test_every_flow_table_is_sound(sampler: str, path: str, steps: int) -> None:
    """Fails if a count gives a table that the engine cannot run."""
    schedule = schedule_for(sampler, FIXED, spec_of(path), steps)
    rows = {"euler": steps, "heun": 2 * steps, "sde-euler": steps, "sde-heun": 2 * steps - 1}[sampler]
    distinct = steps + 1 if sampler == "heun" else steps
    expected = {
        "timesteps": (np.float32, (distinct,)),
        "rows": (np.int32, (rows,)),
        "coefficients": (np.float32, (rows, 17)),
        "initial": (np.float32, (rows, 2)),
        "start": (np.float32, (2 if sampler == "sde-heun" else 1,)),
        "draws_noise": (np.bool_, (rows,)),
        "completes_step": (np.bool_, (rows,)),
    }
    assert (schedule.sampler, len(schedule)) == (sampler, rows)
    for name, (kind, shape) in expected.items():
        array = getattr(schedule, name)
        assert (array.dtype, array.shape) == (kind, shape), name
        assert np.isfinite(array).all(), name
    assert len(set(schedule.timesteps.tolist())) == distinct
    assert set(schedule.rows.tolist()) == set(range(distinct))
    assert not schedule.coefficients[~schedule.draws_noise, 16].any()
    assert not schedule.coefficients[:, 15].any()  # no path reads a learned variance
    inner = ~schedule.completes_step
    assert inner.sum() == {"euler": 0, "heun": steps, "sde-euler": 0, "sde-heun": steps - 1}[sampler]
    assert not (inner & schedule.draws_noise).any()


def gaussian_velocity(path: str, t: float) -> tuple[float, float, float]:
    """Slope and offset of the velocity in x, and the variance of x_t, for data N(DATA_MEAN, DATA_VARIANCE).

    v = α'·E[x_1 | x] + σ'·E[x_0 | x], both of them the regressions of jointly Gaussian variables.
    """
    alpha, sigma, d_alpha, d_sigma = interpolant(path, t)
    variance = alpha**2 * DATA_VARIANCE + sigma**2
    slope = (d_alpha * alpha * DATA_VARIANCE + d_sigma * sigma) / variance
    return slope, d_alpha * DATA_MEAN - slope * alpha * DATA_MEAN, variance


def gaussian_network(path: str) -> Any:
    def velocity(x: Float64, t: float) -> tuple[Float64, Float64]:
        slope, offset, _ = gaussian_velocity(path, t)
        return slope * x + offset, x

    return velocity


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("sampler", "order", "few"), [("euler", 1, 100), ("heun", 2, 50)])
def test_ode_samplers_converge_to_the_exact_flow(path: str, sampler: str, order: int, few: int) -> None:
    """Fails if halving the step does not divide Euler's error by 2 and Heun's by 4, where the flow is known."""
    x, errors = np.linspace(-3, 3, 7), []
    for steps in (few, 2 * few):
        flow = Flow(path, sampler, steps)
        (before, _, _, _), (after, _, _, _) = interpolant(path, 0.0), interpolant(path, end_of(flow))
        narrowing = math.sqrt(gaussian_velocity(path, end_of(flow))[2] / gaussian_velocity(path, 0.0)[2])
        exact = after * DATA_MEAN + narrowing * (x - before * DATA_MEAN)
        noise = np.zeros((len(table_of(flow).rows), *x.shape))
        found = run_table(table_of(flow), x, noise, gaussian_network(path))[-1].sample
        errors.append(np.abs(found - exact).max())
    assert errors[1] <= ODE_LIMIT
    assert abs(errors[0] / errors[1] / 2**order - 1) <= ORDER_LIMIT


def moments(flow: Flow) -> Float64:
    """Mean and variance of a table's images over all draws: for a linear velocity they are a sum over the draws.

    One column has every draw 0 and ends at the mean; one per draw has that draw 1 and the others 0. The latents have
    the law of x_0, which on the VP path is not quite the noise's.
    """
    schedule, draws = table_of(flow), np.concatenate([np.zeros((flow.steps, 1)), np.eye(flow.steps)], axis=1)
    draws[0] *= math.sqrt(gaussian_velocity(flow.path, 0.0)[2])
    z, noise = noise_of_rows(schedule, draws)
    z += interpolant(flow.path, 0.0)[0] * DATA_MEAN
    ends = run_table(schedule, z, noise, gaussian_network(flow.path))[-1].sample
    return np.array([ends[0], ((ends[1:] - ends[0]) ** 2).sum()])


def exact_moments(flow: Flow) -> Float64:
    """Mean and variance after the last step, where the steps before it leave exactly the law of x_t."""
    t = end_of(flow)
    (alpha, _, _, _), (slope, _, variance) = interpolant(flow.path, t), gaussian_velocity(flow.path, t)
    ends = []
    for x in (alpha * DATA_MEAN, alpha * DATA_MEAN + math.sqrt(variance)):
        v = slope * x + gaussian_velocity(flow.path, t)[1]
        score = -(x - alpha * DATA_MEAN) / variance
        ends.append(
            {
                "none": x,
                "mean": x + flow.last_step_size * (v + diffusion_coefficient(flow, t) * score),
                "euler": x + flow.last_step_size * v,
                "tweedie": DATA_MEAN + alpha * DATA_VARIANCE / variance * (x - alpha * DATA_MEAN),
            }[flow.last_step]
        )
    return np.array([ends[0], (ends[1] - ends[0]) ** 2])


@pytest.mark.parametrize(
    ("path", "method", "last_step", "form"),
    grid(EVERY_SDE, fast=lambda path, method, last_step, form: (last_step, form) == ("mean", "sigma")),
)
def test_sde_samplers_converge_to_the_law_of_the_data(path: str, method: str, last_step: str, form: str) -> None:
    """Fails if mean and variance over all draws miss the Gaussian's by more than an error that halves with the step.

    Any diffusion coefficient leaves the same laws, so drift, score and noise are checked against one another.
    """
    few = Flow(path, method, 100, form, last_step=last_step)
    many = few._replace(steps=199)  # 198 intervals for 99
    coarse, fine, exact = moments(few), moments(many), exact_moments(few)
    assert np.abs(fine - exact).max() <= SDE_LIMIT
    assert np.abs(2 * fine - coarse - exact).max() <= EXTRAPOLATED_LIMIT


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("sampler", FLOW_SAMPLERS)
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"steps": 0}, ["0 steps"]),
        ({"steps": -1}, ["-1 steps"]),
        ({"eta": 0.5}, ["eta", "0.5"]),
        ({"eta": -0.1}, ["eta"]),
        ({"eta": math.nan}, ["eta"]),
        ({"spacing": "leading"}, ["spacing"]),
        ({"spacing": "trailing"}, ["spacing"]),
        ({"spacing": "linspace"}, ["spacing"]),
        ({"spacing": "karras"}, ["spacing"]),
    ],
)
def test_flow_samplers_refuse(path: str, sampler: str, changes: dict[str, Any], words: list[str]) -> None:
    """Fails if settings that SiT's samplers have no use for are accepted, or refused without saying which."""
    assert_refused(words, sampler=sampler, diffusion=spec_of(path), **{"steps": 10, **changes})


@pytest.mark.parametrize("sampler", ["sde-euler", "sde-heun"])
def test_a_single_step_of_an_sde_is_refused(sampler: str) -> None:
    """Fails if the one point that SiT's grid then has, which leaves no step, gives a table."""
    assert_refused(["1 step", "2"], sampler=sampler, diffusion=spec_of("linear"), steps=1)


@pytest.mark.parametrize("sampler", FLOW_SAMPLERS)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_flow_samplers_refuse_a_diffusion_model(sampler: str, prediction: str) -> None:
    """Fails if ε would be integrated as if it were a velocity; the message names samplers that fit."""
    spec = replace(DIFFUSION, prediction_type=prediction, path=None)
    assert_refused([sampler, "ddim"], sampler=sampler, diffusion=spec, steps=10)


@pytest.mark.parametrize("sampler", DIFFUSION_SAMPLERS)
def test_diffusion_samplers_refuse_a_velocity_model(sampler: str) -> None:
    """Fails if a velocity would be read as ε; the message names every sampler that fits."""
    assert_refused([sampler, *FLOW_SAMPLERS], sampler=sampler, diffusion=spec_of("linear"), steps=10)


@pytest.mark.parametrize("sampler", ["dopri5", "dopri8", "bosh3", "adaptive_heun"])
def test_adaptive_solvers_are_refused(sampler: str) -> None:
    """Fails if torchdiffeq's solvers, SiT's default among them, are refused as if they were misspelled."""
    assert_refused([sampler, "adaptive", "euler", "heun"], sampler=sampler, diffusion=spec_of("linear"), steps=10)


def assert_refused(words: list[str], **arguments: Any) -> None:
    """In one line that has each of the words."""
    with pytest.raises(SamplingError) as refusal:
        schedule_for(model=FIXED, **arguments)
    message = str(refusal.value)
    assert "\n" not in message
    for word in words:
        assert word in message, f"{word!r} is not in {message!r}"


@pytest.mark.parametrize(
    "changes",
    [
        {"path": "cosine"},
        {"method": "midpoint"},
        {"form": "square"},
        {"last_step": "twice"},
        {"steps": 1},
        {"last_step_size": 1.0},  # SiT asserts that the grid goes forward
        {"last_step_size": -0.1},
        {"last_step_size": math.nan},
        {"norm": -1.0},
        {"norm": math.nan},
        {"norm": math.inf},
        {"form": "SBDM"},  # infinite at t = 0
        {"form": "SBDM", "path": "gvp"},
        {"form": "constant", "method": "heun", "last_step": "none"},  # infinite at t = 1
        {"form": "constant", "method": "heun", "last_step": "none", "path": "gvp"},
    ],
    ids=str,
)
def test_an_sde_that_cannot_be_run_is_refused(changes: dict[str, Any]) -> None:
    """Fails if unknown words, a grid that does not go forward or infinite coefficients give a table."""
    with pytest.raises(SamplingError):
        flow_sde(**{"path": "linear", "steps": 10, "method": "euler", **changes})


def test_flow_samplers_are_listed() -> None:
    """Fails if the command line would not offer a sampler, or offers one that no model can run."""
    assert {*FLOW_SAMPLERS, *DIFFUSION_SAMPLERS, "meanflow"} == set(SAMPLERS)
