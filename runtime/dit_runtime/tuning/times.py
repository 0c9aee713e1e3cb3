"""Where the student's steps lie: two usual spacings, and a search from the better one over the teacher's grid."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from dit_runtime.tuning.grid import Grid
from dit_runtime.tuning.student import Positions, Student, Walk

# Fits a student at some positions; given a student and its walk, only what differs from it. The error is what the
# search makes small.
Fit = Callable[[Positions, "Fitted | None"], "Fitted"]


@dataclass(frozen=True)
class Fitted:
    """A student, its walk through the fit images, and its error there."""

    student: Student
    walk: Walk
    error: float


def uniform_positions(grid: Grid, steps: int) -> Positions:
    """Every K/S-th point: uniform in the teacher's steps."""
    return tuple(index * len(grid) // steps for index in range(steps))


def log_ratio_positions(grid: Grid, steps: int) -> Positions:
    """Uniform in log(signal / noise), from the first point to the last, without repeated points."""
    ratio = grid.log_ratio()
    wanted = np.linspace(ratio[0], ratio[-1], steps + 1)[:-1]
    found = [int(np.abs(ratio - value).argmin()) for value in wanted]
    for index in range(1, steps):  # early points of most models lie too near to each other
        found[index] = max(found[index], found[index - 1] + 1)
    for index in reversed(range(steps)):
        found[index] = min(found[index], len(grid) - steps + index)
    found[0] = 0
    return tuple(found)


def search_positions(fit: Fit, start: Fitted, points: int, tried: Callable[[], None] = lambda: None) -> Fitted:
    """Coordinate descent: each position in turn goes where the error falls, by strides that halve down to one point.

    Args:
        fit: fits and judges a student at some positions.
        start: where the search begins.
        points: K, of the grid.
        tried: called after each fit.
    """
    best, steps = start, len(start.student.positions)
    known = {best.student.positions}
    stride = max(points // (3 * steps), 1)
    while stride:
        moved = False
        for index in range(1, steps):
            for direction in (1, -1):
                while (other := _move(best.student.positions, index, direction * stride, points)) is not None:
                    if other in known:
                        break
                    known.add(other)
                    found = fit(other, best)
                    tried()
                    if not found.error < best.error:
                        break
                    best, moved = found, True
        if not moved or stride == 1:
            stride //= 2
    return best


def _move(positions: Positions, index: int, by: int, points: int) -> Positions | None:
    """The positions with one of them moved; None where they would not rise."""
    at = positions[index] + by
    after = positions[index + 1] if index + 1 < len(positions) else points
    if not positions[index - 1] < at < after:
        return None
    return (*positions[:index], at, *positions[index + 1 :])
