"""Times for a few-step table from the teacher's own trajectory, without the network.

Along the trajectory the teacher's latents and network outputs are known at every point of the grid, and so is how far a
long step from one point would end from another: the residual of the least-squares problem that ``student.fit_row``
solves. A residual follows from inner products of what is known, so all choices of times are compared in well under a
second, where the student's own walk asks the network at each step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dit_runtime.samplers.noise import Float32
from dit_runtime.samplers.schedule import Float64
from dit_runtime.tuning.grid import Grid
from dit_runtime.tuning.student import PAST, Positions, solve_ridge
from dit_runtime.tuning.times import search_positions

SWEEPS = 100  # of the search with each stride: as many as gain something


@dataclass(frozen=True)
class PathTrial:
    """Positions, and the squared distances of their steps on the teacher's trajectory."""

    positions: Positions
    error: float


class PathErrors:
    """The squared distances of long steps from the teacher's latents, on the teacher's own trajectory.

    Args:
        grid: of the teacher.
        states: the teacher's latents at each point, float32 ``[K + 1, N, C, H, W]``.
        pull: of each row to its classical one.
    """

    def __init__(self, grid: Grid, states: Float32, pull: float) -> None:
        self._grid, self._pull = grid, pull
        self._known: dict[tuple[int, ...], float] = {}
        points = len(grid)
        self._products: Float64 = np.zeros((2 * points + 1, 2 * points + 1))
        rows = np.stack([grid.classical_row(now, now + 1)[:2] for now in range(points)])
        for image in range(states.shape[1]):  # one at a time, for the memory
            latents = states[:, image].reshape(points + 1, -1).astype(np.float64)
            # The mean e of a step; of a DDIM teacher the e that it had.
            outputs = (latents[1:] - rows[:, :1] * latents[:-1]) / rows[:, 1:]
            everything = np.concatenate([latents, outputs])
            self._products += everything @ everything.T

    def of(self, positions: Sequence[int]) -> float:
        """The sum over the steps of a student at these positions."""
        ends = [*positions[1:], len(self._grid)]
        steps = range(len(positions))
        return sum(self._of_step(tuple(positions[max(at - PAST, 0) : at + 1]), ends[at]) for at in steps)

    def _of_step(self, evaluated: tuple[int, ...], then: int) -> float:
        """Of one step to ``then``; ``evaluated`` are the points whose outputs it knows, the newest last."""
        key = (*evaluated, then)
        if key not in self._known:
            now, first = evaluated[-1], len(self._grid) + 1
            parts = [now, *(first + point for point in reversed(evaluated))]
            gram, products = self._products[np.ix_(parts, parts)], self._products[parts, then]
            row = self._grid.classical_row(now, then)[: len(parts)]
            row = row + solve_ridge(gram, products - gram @ row, self._pull)
            distance = self._products[then, then] - 2 * row @ products + row @ gram @ row
            self._known[key] = max(float(distance), 0.0)
        return self._known[key]


def path_positions(grid: Grid, states: Float32, starts: Sequence[Positions], pull: float) -> Positions:
    """The positions whose steps end nearest to the teacher's latents on its own trajectory, by search."""
    errors = PathErrors(grid, states, pull)

    def fit(positions: Positions, best: PathTrial | None = None) -> PathTrial:
        return PathTrial(positions, errors.of(positions))

    found = [search_positions(fit, fit(start), len(grid), sweeps=SWEEPS) for start in starts]
    return min(found, key=lambda each: each.error).positions
