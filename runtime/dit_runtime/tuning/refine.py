"""All rows of a student together: Gauss-Newton steps on the last latents, from the greedy fit.

The greedy fit makes each step end near the teacher's latents there. Only the last ones count: a step may end elsewhere
if the steps after it gain by that. The derivatives are differences of walks, so they need nothing but the network.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from dit_runtime.samplers.noise import Float32
from dit_runtime.samplers.schedule import LARGEST, Float64
from dit_runtime.tuning.grid import Grid
from dit_runtime.tuning.network import Network
from dit_runtime.tuning.student import NUMBERS, Student, Walk, basis, combine, final_error, walk_student

ITERATIONS = 2  # the first gains most; on fewer images a second one fits what only they have
SECOND_FROM = 8  # images
DIFFERENCE = 1e-2  # of a weight: far above FP16's rounding of e, and small beside what the weights are
DAMPING, LESS, MORE = 1e-3, 0.2, 10.0  # Levenberg-Marquardt: at first, after a step that helps, after one that does not
TRIES = 3  # of more damping, before the rows stay as they are


def refine_rows(
    network: Network,
    grid: Grid,
    states: Float32,
    student: Student,
    walk: Walk,
    tried: Callable[[], None] = lambda: None,
) -> tuple[Student, Walk]:
    """Change all rows so that the last latents come nearer to the teacher's; never further.

    Args:
        network: of N images.
        grid: of the teacher.
        states: the teacher's latents, float32 ``[K + 1, N, C, H, W]``.
        student, walk: from ``fit_greedily``, of the same images.
        tried: called after each iteration.
    """
    damping = DAMPING
    for _ in range(ITERATIONS if states.shape[1] >= SECOND_FROM else 1):
        left, right = _normal_equations(network, grid, states, student, walk)
        for _ in range(TRIES):
            damped = left + np.diag(damping * np.diag(left) + np.finfo(np.float64).tiny)
            rows = student.rows.copy()
            changes = np.linalg.lstsq(damped, right, rcond=None)[0]
            for change, (row, number) in zip(changes, _weights(len(rows)), strict=True):
                rows[row, number] += change
            if not (np.abs(rows) <= LARGEST).all():  # latents that are not finite would end the fit
                damping *= MORE
                continue
            changed = Student(student.positions, rows)
            found = walk_student(network, grid, changed, states[0])
            if final_error(found, states) < final_error(walk, states):
                student, walk, damping = changed, found, damping * LESS
                break
            damping *= MORE
        else:
            return student, walk
        tried()
    return student, walk


def _weights(steps: int) -> list[tuple[int, int]]:
    """The weights that a table has, as row and number; the first rows have fewer past e's."""
    return [(row, number) for row in range(steps) for number in range(min(row + 2, NUMBERS))]


def _normal_equations(
    network: Network, grid: Grid, states: Float32, student: Student, walk: Walk
) -> tuple[Float64, Float64]:
    """JᵀJ and −Jᵀr of the residual r, the last latents' distance from the teacher's; image by image, for the memory."""
    count = len(_weights(len(student.rows)))
    left, right = np.zeros((count, count)), np.zeros(count)
    for image in range(states.shape[1]):
        derivatives = _derivatives(network, grid, student, walk, image)
        residual = states[-1, image].astype(np.float64) - walk.latents[-1][image]
        left += derivatives @ derivatives.T
        right += derivatives @ residual.ravel()
    return left, right


def _derivatives(network: Network, grid: Grid, student: Student, walk: Walk, image: int) -> Float64:
    """How one image's last latents change with each weight, float64 ``[P, C·H·W]``.

    A weight changes nothing before its own row, so at each row the network is asked about the earlier weights only.
    """
    weights = _weights(len(student.rows))
    shape = walk.latents[0][image].shape
    latents = np.zeros((len(weights), *shape))  # differences from the walk, one for each weight
    outputs: list[Float64] = []
    for index, (position, row) in enumerate(zip(student.positions, student.rows, strict=True)):
        before = [at for at, (other, _) in enumerate(weights) if other < index]
        output = np.zeros_like(latents)
        if before:
            moved = (walk.latents[index][image] + latents[before]).astype(np.float32)
            found = network.evaluate(moved, [float(grid.times[position])] * len(before), [image] * len(before))
            output[before] = found - walk.outputs[index][image]
        outputs.append(output)
        following = combine(row, basis(latents, outputs))
        parts = basis(walk.latents[index][image], [each[image] for each in walk.outputs[: index + 1]])
        for at, (own, number) in enumerate(weights):
            if own == index:
                following[at] += DIFFERENCE * parts[number]
        latents = following
    return np.asarray(latents.reshape(len(weights), -1) / DIFFERENCE)
