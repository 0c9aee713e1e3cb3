"""Where the student's steps lie: two usual spacings, and a search from given times over the teacher's grid."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np

from dit_runtime.tuning.grid import Grid
from dit_runtime.tuning.student import Positions, Student, Walk


class Trial(Protocol):
    """Positions that were tried, and what the search makes small."""

    @property
    def positions(self) -> Positions: ...
    @property
    def error(self) -> float: ...


@dataclass(frozen=True)
class Fitted:
    """A student, its walk through the fit images, and its error there."""

    student: Student
    walk: Walk
    error: float

    @property
    def positions(self) -> Positions:
        return self.student.positions


Tried = TypeVar("Tried", bound=Trial)


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


def search_positions(
    fit: Callable[[Positions, Tried], Tried],
    start: Tried,
    points: int,
    tried: Callable[[], None] = lambda: None,
    sweeps: int = 1,
) -> Tried:
    """Coordinate descent: each position in turn goes where the error falls, by strides that halve down to one point.

    Args:
        fit: tries positions; given the best trial so far, since what they share need not be tried again.
        start: where the search begins.
        points: K, of the grid.
        tried: called after each trial.
        sweeps: most sweeps over the positions with each stride.
    """
    best, steps = start, len(start.positions)
    known = {best.positions}
    stride = max(points // (3 * steps), 1)
    while stride:
        for _ in range(sweeps):
            before = best.error
            for index in range(1, steps):
                for direction in (1, -1):
                    while (other := _move(best.positions, index, direction * stride, points)) is not None:
                        if other in known:
                            break
                        known.add(other)
                        found = fit(other, best)
                        tried()
                        if not found.error < best.error:
                            break
                        best = found
            if not best.error < before:
                break
        stride //= 2
    return best


def _move(positions: Positions, index: int, by: int, points: int) -> Positions | None:
    """The positions with one of them moved; None where they would not rise."""
    at = positions[index] + by
    after = positions[index + 1] if index + 1 < len(positions) else points
    if not positions[index - 1] < at < after:
        return None
    return (*positions[:index], at, *positions[index + 1 :])
