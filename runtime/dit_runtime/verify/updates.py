"""The sampler's update of one image: rows of coefficients to try, and what the step must make of each."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import numpy as np

from dit_runtime.backends.base import Array
from dit_runtime.bundle.manifest import Manifest
from dit_runtime.core.errors import SamplingError
from dit_runtime.samplers.by_name import samplers_for, schedule_for
from dit_runtime.samplers.schedule import (
    A_Z,
    B_E,
    BOUND,
    CLEAN,
    CLIPPED,
    COEFFICIENTS,
    INPUT,
    LOG_SIGMA,
    LOG_SIGMA_V,
    MATRIX,
    NOISE,
    Schedule,
)
from dit_runtime.verify.made_images import Expected, expected_from_terms
from dit_runtime.verify.relation import Relation

STEPS = 4  # of the samplers whose rows are run: enough for a first, a last and a third-order row
PARTS = ("slot 0", "slot 1", "slot 2", "denoised")  # of what the step gives an image

SampledRow = tuple[str, Array]  # a sampler's name, and a row [17 or 19] of its schedule


def draw_rows(batch: int, v: Array, silent: int, clips: bool = False) -> Array:
    """Coefficients float32 ``[B, 17]`` of no sampler, different in each image; ``[B, 19]`` where the model ``clips``.

    Args:
        batch: B.
        v: the variance channels, which the noise's scale must not overflow with.
        silent: 0 or 1, the first image without noise; every second one after it has none.
    """
    largest = max(float(np.abs(v).max(initial=0)), 1e-3)
    random = np.random.default_rng([batch, silent])
    rows = random.uniform(0.5, 1.5, (batch, COEFFICIENTS)) * random.choice([-1, 1], (batch, COEFFICIENTS))
    rows[:, LOG_SIGMA_V] *= 0.5 / largest if np.isfinite(largest) else 0
    rows[silent::2, LOG_SIGMA:] = 0
    if clips:  # bounds that some values are beyond
        rows = np.concatenate([rows, random.uniform(0.3, 1.5, (batch, 2))], axis=1)
        rows[silent::2, CLEAN] *= -1
    return np.asarray(rows, np.float32)


def list_schedules(manifest: Manifest, steps: int) -> list[Schedule]:
    """A schedule of every sampler that the model can use."""
    schedules = []
    for name in samplers_for(manifest.diffusion):
        with contextlib.suppress(SamplingError):  # a noise schedule that this sampler has no formula for
            schedules.append(schedule_for(name, manifest.model, manifest.diffusion, steps))
    return schedules


def list_sampler_rows(manifest: Manifest) -> list[SampledRow]:
    """A first, a last and an inner row of every sampler that the model can use."""
    schedules = list_schedules(manifest, STEPS)
    return [(each.sampler, each.coefficients[row]) for row in (-1, -2, 0) for each in schedules]


def expect_update(state: Array, e: Array, v: Array, row: Array, noise: Array) -> list[Expected]:
    """The three slots of the next state and ``denoised``, in float64 by the formula of ``samplers/schedule.py``.

    Args:
        state: ``[3, C, H, W]``.
        e, v: ``[C, H, W]``, the network's output.
        row: ``[17]``, or ``[19]`` with a clip.
        noise: ``[C, H, W]``.
    """
    s, exact, e = state.astype(np.float64), row.astype(np.float64), e.astype(np.float64)
    matrix, inputs = exact[MATRIX:INPUT].reshape(3, 3), exact[INPUT:LOG_SIGMA]
    terms = [[*(matrix[slot, other] * s[other] for other in range(3)), inputs[slot] * e] for slot in range(3)]
    if exact[NOISE]:
        depends = exact[LOG_SIGMA_V] * v.astype(np.float64) if exact[LOG_SIGMA_V] else 0
        terms[0].append(np.exp(exact[LOG_SIGMA] + depends) * exact[NOISE] * noise)
    clean = [exact[A_Z] * s[0], exact[B_E] * e]
    if len(exact) == CLIPPED:
        # As exact as its terms are: what is near the bound may be within it or not.
        unclipped = clean[0] + clean[1]
        clipped = np.clip(unclipped, -exact[BOUND], exact[BOUND])
        clean = [np.where(clipped == unclipped, clean[0], clipped), np.where(clipped == unclipped, clean[1], 0)]
        terms[0] += [exact[CLEAN] * part for part in clean]
    terms.append(clean)
    return [expected_from_terms(each) for each in terms]


def add_update(
    relation: Relation,
    found: Sequence[Array],
    state: Array,
    e: Expected,
    v: Array,
    row: Array,
    noise: Array,
    where: str,
) -> None:
    """Compare an image's three slots and ``denoised`` with what follows from its own results.

    Args:
        relation: that gets the comparisons.
        found: the slots and ``denoised``, ``[C, H, W]`` each.
        state: ``[3, C, H, W]``, before the step.
        e, v: of the image alone.
        row: ``[17]``, or ``[19]`` with a clip.
        noise: ``[C, H, W]``.
        where: what was compared, for messages; the part is put before it.
    """
    expected = expect_update(state, e.value, v, row, noise)
    # What e and v are apart, the sampler multiplies.
    spread = np.exp(row[LOG_SIGMA] + row[LOG_SIGMA_V] * v) * row[NOISE] * noise
    spread = np.abs(spread * row[LOG_SIGMA_V] * v)
    factors = np.abs([*row[INPUT:LOG_SIGMA], row[B_E]])
    factors[0] += abs(row[CLEAN] * row[B_E]) if len(row) == CLIPPED else 0
    for name, one, wanted, times in zip(PARTS, found, expected, factors.tolist(), strict=True):
        scale, norm = wanted.scale + times * e.scale, wanted.norm + times * e.norm
        if name == PARTS[0]:
            scale, norm = scale + float(spread.max()), norm + float(np.linalg.norm(spread))
        relation.add("forward", "forward_1", one, wanted.value, f"{name} {where}", scale, norm)
