"""The teacher: a sampler of many steps, run once. Its latents at every point of its grid are kept for further tables.

    STORE/tune/KEY/states.npy    float32 [K + 1, N, C, H, W]: one batch's latents before each step and after the last

KEY is the hash of all that decides these numbers (``backends.prepared``), so a run that was interrupted goes on at its
first missing batch, and a table of another step count costs no teacher. Other batches go, oldest first, where the
folder would take more than ``MOST_KEPT_BYTES``.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from dit_runtime.backends.prepared import Facts, facts_of, find_prepared, prepare_graph
from dit_runtime.core.arrays import ArraySpec, array_from_npy
from dit_runtime.core.decode import DecodeError
from dit_runtime.core.errors import SamplingError
from dit_runtime.core.reading import GIB, MIB
from dit_runtime.pipeline import Pipeline
from dit_runtime.samplers.noise import Float32
from dit_runtime.sampling.requests import ImageRequest

logger = logging.getLogger(__name__)

FOLDER, FILE = "tune", "states.npy"
MOST_STATES_BYTES = GIB  # of one fit, in memory
MOST_KEPT_BYTES = 2 * GIB  # of all fits of a store


def check_states(pipe: Pipeline, points: int, images: int) -> int:
    """The bytes of a teacher's states. Raises SamplingError for more than ``MOST_STATES_BYTES``."""
    total = (points + 1) * images * int(np.prod(pipe.latent_shape)) * 4
    if total > MOST_STATES_BYTES:
        raise SamplingError(
            f"{images} pictures of {points} teacher steps: their latents take {total / MIB:.0f} MiB, expected at most "
            f"{MOST_STATES_BYTES // MIB}; use fewer --pictures or --teacher steps"
        )
    return total


def states_of_teacher(
    pipe: Pipeline,
    images: Sequence[ImageRequest],
    batch_size: int,
    completed: Callable[[int], None] = lambda count: None,
) -> Float32:
    """The latents of the teacher's images at each point of its grid, float32 ``[K + 1, N, C, H, W]``.

    Args:
        pipe: with the bundle and its engine.
        images: of one schedule, the teacher's.
        batch_size: images in one batch.
        completed: called with a number of steps of a batch that are done or kept from before.

    Raises:
        SamplingError: latents are not finite.
    """
    points = images[0].schedule.steps
    states = np.empty((points + 1, len(images), *pipe.latent_shape), np.float32)
    size = pipe.engine.info.batch_of(batch_size)
    for first in range(0, len(images), size):
        batch = images[first : first + size]
        part = states[:, first : first + len(batch)]
        facts = _facts(pipe, batch)
        folder = pipe.bundle.engines / FOLDER
        kept = _read(folder, facts, part.shape)
        if kept is not None:
            part[:] = kept
            completed(points)
            continue
        part[0] = [image.make_initial_latents(pipe.latent_shape)[0] for image in batch]
        for index, latents, _ in pipe.iterate_steps(batch):
            part[index + 1] = latents
            completed(1)
        _keep(folder, facts, part)
    return states


def _facts(pipe: Pipeline, batch: Sequence[ImageRequest]) -> Facts:
    info, schedule, first = pipe.engine.info, batch[0].schedule, batch[0]
    rows = np.concatenate([schedule.timesteps[schedule.rows], schedule.coefficients.ravel(), schedule.start])
    form = {
        "size": repr(pipe.manifest.image_size),
        "rows": hashlib.sha256(rows.astype("<f4").tobytes()).hexdigest(),
        "images": repr([(list(image.labels.items()), image.seed, image.guidance.scale) for image in batch]),
        "guidance": repr((first.guidance.interval, first.guidance.shape, first.negative_label)),
        "threads": repr(info.threads),
    }
    return facts_of(pipe.bundle, "step", info.identity, form)


def _read(folder: Path, facts: Facts, shape: tuple[int, ...]) -> Float32 | None:
    """The kept states of a batch; None where there are none."""
    found = find_prepared(folder, facts)
    if found is None:
        return None
    try:
        states: Float32 = array_from_npy(found.folder / FILE, MOST_STATES_BYTES + MIB, ArraySpec("float32", shape))
    except DecodeError:
        return None
    return states if found.is_unchanged() else None


def _keep(folder: Path, facts: Facts, states: Float32) -> None:
    """Write a batch's states. That they cannot be written is said, and no error: the fit goes on."""
    _make_room(folder, states.nbytes)
    whole = np.ascontiguousarray(states)
    if prepare_graph(folder, facts, lambda target: np.save(target / FILE, whole)) is None:
        logger.info(f"{folder}: the teacher's latents cannot be kept there: another table runs the teacher again")


def _make_room(folder: Path, needed: int) -> None:
    """Remove the oldest batches where all of them would take more than ``MOST_KEPT_BYTES``."""
    with contextlib.suppress(OSError):
        kept = [(file.stat().st_mtime_ns, file.stat().st_size, file.parent) for file in folder.glob(f"*/{FILE}")]
        total = sum(size for _, size, _ in kept)
        for _, size, old in sorted(kept):
            if total + needed <= MOST_KEPT_BYTES:
                return
            shutil.rmtree(old, ignore_errors=True)
            total -= size
