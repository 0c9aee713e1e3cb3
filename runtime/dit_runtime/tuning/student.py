"""The student: few long steps over the teacher's grid, each a combination of four, and its walk through the network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dit_runtime.core.errors import SamplingError
from dit_runtime.samplers.noise import Float32
from dit_runtime.samplers.schedule import (
    LARGEST,
    NOTHING,
    S0,
    S1,
    S2,
    E,
    Float64,
    Schedule,
    make_row,
    schedule_from_rows,
)
from dit_runtime.tuning.grid import Grid
from dit_runtime.tuning.network import Network

NUMBERS = 4  # of a row: the weights of z, e, e before, e two before
PAST = NUMBERS - 2  # past e's, which the state's slots s₁ and s₂ hold
TINY = 1e-30

Positions = tuple[int, ...]


@dataclass(frozen=True)
class Student:
    """A few-step sampler.

    Attributes:
        positions: the points of the grid where the network is evaluated, rising from 0.
        rows: float64 ``[S, 4]``.
    """

    positions: Positions
    rows: Float64


@dataclass
class Walk:
    """A student's latents and network outputs, for N images.

    Attributes:
        latents: float64 ``[N, C, H, W]`` before each row, and at the end.
        outputs: float64 ``[N, C, H, W]`` of each row.
    """

    latents: list[Float64]
    outputs: list[Float64]

    def cut(self, rows: int) -> Walk:
        """The walk before row ``rows``."""
        return Walk(self.latents[: rows + 1], self.outputs[:rows])


def basis(latents: Float64, outputs: Sequence[Float64]) -> list[Float64]:
    """What a row combines: the latents, and up to three outputs from the newest to the oldest."""
    return [latents, *outputs[::-1][: NUMBERS - 1]]


def combine(row: Float64, parts: Sequence[Float64]) -> Float64:
    """The next latents from a row ``[4]`` and its ``basis``."""
    total: Float64 = row[0] * parts[0]
    for weight, part in zip(row[1:], parts[1:], strict=False):
        total = total + weight * part
    return total


def fit_row(parts: Sequence[Float64], target: Float64, classical: Float64, pull: float) -> Float64:
    """The weights ``[4]`` with the least squared distance from ``target``, pulled to the classical row.

    ``pull`` is the ridge: the squared distance from the classical row, in units of the part's own squared length.
    Parts that are nearly multiples of each other, as e's of neighboring times are, then keep small weights.
    """
    matrix = np.stack([part.ravel() for part in parts], axis=1)
    known = classical[: len(parts)]
    row = np.zeros(NUMBERS)
    row[: len(parts)] = known + solve_ridge(matrix.T @ matrix, matrix.T @ (target.ravel() - matrix @ known), pull)
    return row


def solve_ridge(products: Float64, right: Float64, pull: float) -> Float64:
    """The weights ``[P]`` that make |target − Σ weightᵢ partᵢ|² + pull Σ |weightᵢ partᵢ|² least.

    Args:
        products: inner products of the parts ``[P, P]``.
        right: of the parts with the target ``[P]``.
    """
    lengths = np.sqrt(np.maximum(np.diag(products), TINY))
    scaled: Float64 = np.linalg.solve(
        products / np.outer(lengths, lengths) + pull * np.eye(len(right)), right / lengths
    )
    return scaled / lengths


def fit_greedily(
    network: Network,
    grid: Grid,
    states: Float32,
    positions: Positions,
    pull: float,
    before: tuple[Student, Walk] | None = None,
) -> tuple[Student, Walk]:
    """Fit each row on the student's own latents to the teacher's states, from noise to image.

    Args:
        network: of N images.
        grid: of the teacher.
        states: the teacher's latents of these images at each point, float32 ``[K + 1, N, C, H, W]``.
        positions: of the student.
        pull: of each row to its classical one.
        before: a student and its walk; the rows before the first position that differs are taken from them.
    """
    rows, walk = np.zeros((len(positions), NUMBERS)), Walk([states[0].astype(np.float64)], [])
    if before is not None:
        old = before[0].positions
        same = next((i for i in range(len(old)) if positions[i] != old[i]), len(old))
        kept = max(same - 1, 0)  # the row before a changed position aims elsewhere
        rows[:kept] = before[0].rows[:kept]
        walk = before[1].cut(kept)
        walk.outputs = before[1].outputs[:same]
    everyone = range(states.shape[1])
    for index in range(len(walk.latents) - 1, len(positions)):
        now = positions[index]
        then = positions[index + 1] if index + 1 < len(positions) else len(grid)
        latents = walk.latents[index]
        if len(walk.outputs) == index:
            times = [float(grid.times[now])] * len(everyone)
            walk.outputs.append(network.evaluate(latents.astype(np.float32), times, everyone).astype(np.float64))
        parts = basis(latents, walk.outputs[: index + 1])
        rows[index] = fit_row(parts, states[then].astype(np.float64), grid.classical_row(now, then), pull)
        walk.latents.append(combine(rows[index], parts))
    return Student(positions, rows), walk


def walk_student(network: Network, grid: Grid, student: Student, start: Float32) -> Walk:
    """Run a student from the latents ``start [N, C, H, W]``."""
    walk = Walk([start.astype(np.float64)], [])
    for now, row in zip(student.positions, student.rows, strict=True):
        times = [float(grid.times[now])] * len(start)
        latents = walk.latents[-1].astype(np.float32)
        walk.outputs.append(network.evaluate(latents, times, range(len(start))).astype(np.float64))
        walk.latents.append(combine(row, basis(walk.latents[-1], walk.outputs)))
    return walk


def final_error(walk: Walk, states: Float32) -> float:
    """The squared distance of the walk's last latents from the teacher's, over the squared length of these."""
    wanted = states[-1].astype(np.float64)
    return float(np.sum((walk.latents[-1] - wanted) ** 2) / max(float(np.sum(wanted**2)), TINY))


def schedule_from_student(student: Student, grid: Grid, name: str, spacing: str) -> Schedule:
    """The sampler table of a student: slots s₁ and s₂ hold the past e's.

    Raises:
        SamplingError: a number is not finite or above ``LARGEST``.
    """
    if not (np.abs(student.rows) <= LARGEST).all():
        raise SamplingError(
            f"few-step table of {len(student.rows)} steps: a fitted number is above {LARGEST:.0e}; use more images "
            "(--pictures) or other steps"
        )
    rows = []
    last = len(student.positions) - 1
    for index, (position, (z, now, before, two_before)) in enumerate(zip(student.positions, student.rows, strict=True)):
        clean = grid.denoised[position]
        latents = z * S0 + now * E + before * S1 + two_before * S2
        memory = E if index < last else NOTHING
        memory_2 = S1 if 0 < index < last else NOTHING
        rows.append(make_row(clean[0] * S0 + clean[1] * E, latents, memory, memory_2))
    kept = list(student.positions)
    return schedule_from_rows(
        name, spacing, grid.times[kept], rows, grid.initial[kept], start=grid.schedule.start.tolist()
    )
