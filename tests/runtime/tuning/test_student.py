"""The fit of a few-step table alone: its rows, its grid and its times, on networks that are written down."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dit_runtime.bundle.manifest import DiffusionSpec
from dit_runtime.core.errors import SamplingError
from dit_runtime.samplers.diffusion import ddim, dpm_solver_pp, unipc
from dit_runtime.samplers.flow import flow_ode, flow_sde
from dit_runtime.samplers.options import settings_for
from dit_runtime.samplers.schedule import A_Z, INPUT, MATRIX, Schedule
from dit_runtime.tuning import refine as refining
from dit_runtime.tuning.grid import Grid, grid_from_schedule
from dit_runtime.tuning.own_path import PathErrors, path_positions
from dit_runtime.tuning.refine import refine_rows
from dit_runtime.tuning.student import (
    Student,
    final_error,
    fit_greedily,
    fit_row,
    schedule_from_student,
    walk_student,
)
from dit_runtime.tuning.times import Fitted, log_ratio_positions, search_positions, uniform_positions

BETAS = tuple(np.linspace(1e-4, 0.02, 1000).tolist())
DIFFUSION = DiffusionSpec(BETAS, "epsilon", 4, "leading", 0, True)
FIELDS = 4  # groups of pixels, each with a network of its own


class LinearNetwork:
    """e = g(t)·z, where the factor g is another one in each quarter of the pixels."""

    def evaluate(self, latents: np.ndarray, times: Sequence[float], indices: Sequence[int]) -> np.ndarray:
        turn = np.array(times)[:, None, None, None] / 1000
        group = np.arange(latents[0].size).reshape(latents.shape[1:]) % FIELDS
        return (latents * (0.2 + 0.15 * group * turn + 0.1 * np.sin(group + 3 * turn))).astype(np.float32)


def run_table(schedule: Schedule, network: Any, start: np.ndarray) -> list[np.ndarray]:
    """The formula of a row, as the documents have it, in float64: the latents before each row and at the end."""
    state = np.zeros((3, *start.shape))
    state[0] = start
    states = [state[0]]
    for row, time in zip(schedule.coefficients.astype(np.float64), schedule.timesteps[schedule.rows], strict=True):
        e = network.evaluate(state[0].astype(np.float32), [float(time)] * len(start), range(len(start)))
        matrix, into = row[MATRIX:INPUT].reshape(3, 3), row[INPUT : INPUT + 3]
        state = np.einsum("ij,j...->i...", matrix, state) + into[:, None, None, None, None] * e
        states.append(state[0])
    return states


@pytest.fixture(scope="module")
def lesson() -> tuple[Grid, np.ndarray]:
    """The grid of 100 DDIM steps, and the teacher's latents of three images of that network."""
    schedule = ddim(DIFFUSION, 100)
    start = np.random.default_rng(0).standard_normal((3, 4, 8, 8)).astype(np.float32)
    return grid_from_schedule(schedule), np.stack(run_table(schedule, LinearNetwork(), start)).astype(np.float32)


def test_a_linear_network_is_fitted_exactly(lesson: tuple[Grid, np.ndarray]) -> None:
    """A row has four numbers, and these networks four factors: from the third row on the student is the teacher."""
    grid, states = lesson
    student, walk = fit_greedily(LinearNetwork(), grid, states, (0, 20, 40, 60, 80), 0.0)  # type: ignore[arg-type]
    wanted = states[[0, 20, 40, 60, 80, 100]]
    errors = [np.abs(found - expected).max() for found, expected in zip(walk.latents, wanted, strict=True)]
    assert max(errors[3:]) < 1e-4  # measured: 7.7e-6; the first two rows have fewer numbers than factors
    assert errors[1] > 1000 * max(errors[3:])
    assert np.abs(student.rows).max() < 100


def test_the_table_does_what_was_fitted(lesson: tuple[Grid, np.ndarray]) -> None:
    """The table's slots hold the past e's: its formula on images that were not fitted is the student's own walk."""
    grid, states = lesson
    network: Any = LinearNetwork()
    student, _ = fit_greedily(network, grid, states, (0, 13, 40, 61, 90), 1e-6)
    schedule = schedule_from_student(student, grid, "few-5", "fitted")
    start = np.random.default_rng(1).standard_normal((2, 4, 8, 8)).astype(np.float32)
    found = run_table(schedule, network, start)
    expected = walk_student(network, grid, student, start)
    for one, other in zip(found, expected.latents, strict=True):
        np.testing.assert_allclose(one, other, atol=5e-5)  # measured: 7.4e-6, the table is float32
    assert schedule.steps == 5
    teacher = grid.schedule
    np.testing.assert_array_equal(schedule.coefficients[:, A_Z], teacher.coefficients[[0, 13, 40, 61, 90], A_Z])
    np.testing.assert_array_equal(schedule.initial, teacher.initial[[0, 13, 40, 61, 90]])


@pytest.mark.parametrize(
    "schedule",
    [
        ddim(DIFFUSION, 50),
        dpm_solver_pp(DIFFUSION, 20, settings_for("dpmpp-2m", 2, DIFFUSION), False),
        unipc(DIFFUSION, 20, settings_for("unipc", 2, DIFFUSION)),
        flow_ode("linear", 20, "heun"),
        flow_ode("gvp", 20, "euler"),
    ],
    ids=lambda schedule: schedule.sampler,
)
def test_the_classical_row_is_exact_for_a_constant_output(schedule: Schedule) -> None:
    """What a row is pulled to: with one e for all times, long steps end where the teacher's own steps end."""
    grid = grid_from_schedule(schedule)
    z, e = np.random.default_rng(2).standard_normal((2, 1, 4, 8, 8))
    constant = SimpleNamespace(evaluate=lambda latents, times, indices: e.astype(np.float32))
    states = run_table(schedule, constant, z.astype(np.float32))
    kept = [states[index] for index in np.append(0, np.flatnonzero(schedule.completes_step) + 1)]
    for now, then in ((0, 1), (0, 7), (5, 12), (12, 20), (0, 20)):
        row = grid.classical_row(now, then)
        np.testing.assert_allclose(row[0] * kept[now] + row[1] * e, kept[then], rtol=1e-4, atol=1e-5)


def test_ddims_classical_row_is_ddims_formula() -> None:
    """Song et al. 2020, equation 12, between two timesteps of the grid."""
    grid = grid_from_schedule(ddim(DIFFUSION, 100))
    alpha_bar = np.cumprod(1 - np.array(BETAS))
    now, then = alpha_bar[int(grid.times[10])], alpha_bar[int(grid.times[40])]
    ratio = np.sqrt(then / now)
    expected = [ratio, np.sqrt(1 - then) - ratio * np.sqrt(1 - now), 0, 0]
    np.testing.assert_allclose(grid.classical_row(10, 40), expected, rtol=1e-5, atol=1e-6)


def test_the_pull_keeps_what_the_images_do_not_tell() -> None:
    """Two e's that are the same: without a pull any sum of weights fits; with one, the classical row is kept."""
    z, e = np.random.default_rng(3).standard_normal((2, 1, 4, 8, 8))
    classical = np.array([1.1, -0.3, 0.0, 0.0])
    row = fit_row([z, e, e * (1 + 1e-12)], 1.1 * z - 0.3 * e, classical, 1e-6)
    np.testing.assert_allclose(row, classical, atol=1e-9)
    strong = fit_row([z, e], 2 * z + e, classical, 1e12)
    np.testing.assert_allclose(strong, classical, atol=1e-9)


@pytest.mark.parametrize(
    ("schedule", "word"),
    [(ddim(DIFFUSION, 20, eta=0.5), "draws noise"), (flow_sde("linear", 20, "euler"), "draws noise")],
    ids=["ddim with eta", "sde-euler"],
)
def test_a_stochastic_teacher_is_refused(schedule: Schedule, word: str) -> None:
    with pytest.raises(SamplingError, match=word):
        grid_from_schedule(schedule)


def test_the_starts_rise_and_fit_the_grid() -> None:
    """Both spacings give as many different points as there are steps, from the first point of the grid."""
    for schedule in (ddim(DIFFUSION, 50), flow_ode("linear", 50, "heun")):
        grid = grid_from_schedule(schedule)
        for steps in (1, 2, 7, 30, 49):
            for spacing in (uniform_positions, log_ratio_positions):
                positions = spacing(grid, steps)
                assert len(positions) == steps
                assert positions[0] == 0
                assert max(positions) < len(grid)
                assert list(positions) == sorted(set(positions))


def test_the_search_finds_the_best_times() -> None:
    """An error with one lowest point, far from the start: every position gets there."""
    best = (0, 31, 44, 90)

    def fit(positions: tuple[int, ...], before: Fitted | None = None) -> Fitted:
        error = float(np.abs(np.subtract(positions, best)).sum())
        return Fitted(Student(positions, np.zeros((4, 4))), None, error)  # type: ignore[arg-type]

    assert search_positions(fit, fit((0, 25, 50, 75)), 100).positions == best


def test_steps_on_the_trajectory_are_judged_without_the_network(lesson: tuple[Grid, np.ndarray]) -> None:
    """The distances are those of plain least squares on the latents and the network's own outputs there."""
    grid, states = lesson
    network: Any = LinearNetwork()
    positions, errors = (0, 17, 45, 80), PathErrors(grid, states, 1e-9)
    outputs = [
        network.evaluate(states[at], [float(grid.times[at])] * states.shape[1], range(states.shape[1])).ravel()
        for at in positions
    ]
    total = 0.0
    for index, (now, then) in enumerate(zip(positions, (*positions[1:], len(grid)), strict=True)):
        parts = np.stack([states[now].ravel(), *outputs[max(index - 2, 0) : index + 1]], axis=1).astype(np.float64)
        residual = np.linalg.lstsq(parts, states[then].ravel().astype(np.float64), rcond=None)[1]
        total += float(residual[0])
    assert errors.of(positions) == pytest.approx(total, rel=1e-3)  # measured 9e-6: the teacher's latents are float32
    uniform = uniform_positions(grid, 5)
    found = path_positions(grid, states, [uniform], 1e-6)
    assert errors.of(found) < 0.1 * errors.of(uniform)  # measured 0.024


def test_a_fit_that_goes_on_is_a_fit_from_the_start(lesson: tuple[Grid, np.ndarray]) -> None:
    """The search reuses the rows before the position that it moved: the result is that of a whole fit."""
    grid, states = lesson
    network: Any = LinearNetwork()
    first = fit_greedily(network, grid, states, (0, 20, 40, 60, 80), 1e-6)
    for positions in ((0, 20, 40, 60, 90), (0, 20, 30, 60, 80), (0, 10, 40, 60, 80)):
        whole, walk = fit_greedily(network, grid, states, positions, 1e-6)
        further, again = fit_greedily(network, grid, states, positions, 1e-6, first)
        np.testing.assert_array_equal(further.rows, whole.rows)
        assert final_error(again, states) == final_error(walk, states)


def test_refined_rows_end_nearer(lesson: tuple[Grid, np.ndarray]) -> None:
    """Steps that need not end on the teacher's way: all rows together come nearer to its end than one by one."""
    grid, few = lesson
    network: Any = LinearNetwork()
    states = np.tile(few, (1, refining.SECOND_FROM // few.shape[1] + 1, 1, 1, 1))
    student, walk = fit_greedily(network, grid, states, (0, 40, 80), 1e-6)
    refined, further = refine_rows(network, grid, states, student, walk)
    assert final_error(further, states) < 0.01 * final_error(walk, states)  # measured: 4.3e-4
    steps: list[None] = []
    refine_rows(network, grid, few, *fit_greedily(network, grid, few, (0, 40, 80), 1e-6), lambda: steps.append(None))
    assert len(steps) == 1  # of few images
    again = walk_student(network, grid, refined, states[0])
    assert final_error(again, states) == final_error(further, states)


def test_derivatives_are_those_of_whole_walks(lesson: tuple[Grid, np.ndarray]) -> None:
    """Each weight changed alone, and the student run from the start."""
    grid, states = lesson
    network: Any = LinearNetwork()
    student, walk = fit_greedily(network, grid, states, (0, 30, 60, 80), 1e-6)
    found = refining._derivatives(network, grid, student, walk, 1)
    weights = refining._weights(4)
    assert len(weights) == 2 + 3 + 4 + 4
    for derivative, (row, number) in zip(found, weights, strict=True):
        rows = student.rows.copy()
        rows[row, number] += refining.DIFFERENCE
        moved = walk_student(network, grid, Student(student.positions, rows), states[0]).latents[-1][1]
        expected = (moved - walk.latents[-1][1]) / refining.DIFFERENCE
        np.testing.assert_allclose(derivative, expected.ravel(), atol=1e-8)  # measured: 5.6e-12


def test_a_table_of_huge_numbers_is_refused(lesson: tuple[Grid, np.ndarray]) -> None:
    student = Student((0, 50), np.full((2, 4), 2e6))
    with pytest.raises(SamplingError, match="above 1e\\+06"):
        schedule_from_student(student, lesson[0], "few-2", "fitted")
