"""The sampling loop: images in an engine's batch, each at its own row of its own schedule."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from dit_runtime.backends.base import Engine, Loop, RunInputs, StepResult
from dit_runtime.backends.conditioning import Condition, ConditioningTable, TableLimits
from dit_runtime.bundle.manifest import Manifest
from dit_runtime.core.errors import SamplingError
from dit_runtime.samplers.noise import Float32, Noise, draw_normals
from dit_runtime.samplers.schedule import COEFFICIENTS
from dit_runtime.sampling.requests import ImageRequest

LIMITS = TableLimits()  # of every batch


class _Slot:
    """An image in the batch, and how far it is."""

    def __init__(self, key: int, image: ImageRequest, stream: Noise) -> None:
        self.key, self.image, self.stream, self.row = key, image, stream, 0
        schedule = image.schedule
        self.times: list[float] = schedule.timesteps[schedule.rows].tolist()
        self.labels: list[int] = image.branches.labels.tolist()
        self.needed: list[int] = image.branches.needed.tolist()
        self.draws: list[bool] = schedule.draws_noise.tolist()
        self.completes: list[bool] = schedule.completes_step.tolist()

    def __len__(self) -> int:
        return len(self.times)

    def list_conditions(self, ahead: int = 0) -> list[Condition]:
        """What the network is asked about in this row, or one that far ahead, branch by branch."""
        row = self.row + ahead
        time = self.times[row]
        return [(time, label) for label in self.labels[: self.needed[row]]]


def _inputs_for_run(slots: Sequence[_Slot], table: ConditioningTable) -> RunInputs | None:
    """None where the images are not in one row of one schedule, or the table has no room for all they will use."""
    first, count = slots[0], len(slots)
    schedule, steps = first.image.schedule, len(first)
    if any(slot.image.schedule is not schedule or slot.row != first.row for slot in slots):
        return None
    needed = np.max([slot.needed for slot in slots], axis=0)
    branches = int(needed.max())
    weights = np.zeros((steps, branches, count, slots[0].image.branches.weights.shape[2]), np.float32)
    rows = np.zeros((steps, branches, count), np.int32)  # a branch without a weight may read any row
    for index, slot in enumerate(slots):
        own = slot.image.branches.weights
        weights[:, : own.shape[1], index] = own
        for branch, label in enumerate(slot.labels):
            found = [
                table.get((time, label)) if slot.needed[row] > branch else 0
                for row, time in enumerate(slot.times[slot.row :], slot.row)
            ]
            if None in found:
                return None
            rows[slot.row :, branch, index] = np.array(found, np.int32)
    coefficients = np.repeat(schedule.coefficients[:, None], count, axis=1)
    return RunInputs(coefficients, weights, rows, needed.tolist(), first.draws)


class Advance(NamedTuple):
    """What one engine call did to the batch: a list entry or array row per image that was in it.

    The arrays, ``[B, C, H, W]``, belong to the batch and are there until its next call: copy what is to be kept. On a
    device they stay until they are read, and only those that were asked for or finished were checked to be finite.
    """

    keys: list[int]
    completed: list[bool]
    finished: list[bool]
    result: StepResult

    @property
    def latents(self) -> Float32:
        return self.result.state[:, 0]

    @property
    def denoised(self) -> Float32:
        return self.result.denoised


class Batch:
    """Up to as many images as an engine takes, advanced together, added and finished one by one.

    ``failure`` is what the next ``advance`` will raise. Close it at the end: an engine's device memory is lent to it.
    """

    def __init__(self, engine: Engine, manifest: Manifest) -> None:
        self._engine, model = engine, manifest.model
        self._loop: Loop = engine.open_loop(LIMITS)
        self._table = self._loop.table
        self._shape = (model.latent_channels, *model.latent_size)
        self._slots: list[_Slot] = []
        self._inputs: RunInputs | None = None
        self._changed = True  # who is in the batch
        self.failure: SamplingError | None = None

    def __len__(self) -> int:
        return len(self._slots)

    def __enter__(self) -> Batch:
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.close()

    def add(self, images: Sequence[tuple[int, ImageRequest]]) -> None:
        """Let images in, each with a key that its results carry."""
        if not images:
            return
        latents = np.empty((len(images), *self._shape), np.float32)
        for index, (key, image) in enumerate(images):
            latents[index], stream = image.make_initial_latents(self._shape)
            self._slots.append(_Slot(key, image, stream))
        self._loop.add(latents)
        self._changed = True

    def advance(self, read: bool = False) -> Advance:
        """One row of every image, in one engine call. Finished images leave the batch.

        ``read``: the caller will read the arrays, so they must be finite. Arrays that are at hand are always checked.

        Raises:
            SamplingError: latents that are no longer finite; images that finished in the same call come first, and
                the error with the next call.
        """
        if self.failure is not None:
            raise self.failure
        slots = self._slots
        result = self._run_step()
        completed = [slot.completes[slot.row] for slot in slots]
        finished = [slot.row + 1 == len(slot) for slot in slots]
        if (read or result.at_hand or any(finished)) and not np.isfinite(state := result.state).all():
            sound = [bool(np.isfinite(values).all()) for values in state]
            self.failure = self._error_for(slots[sound.index(False)])
            finished = [done and fine for done, fine in zip(finished, sound, strict=True)]
            if not any(finished):
                raise self.failure
        for slot in slots:
            slot.row += 1
        if any(finished):
            kept = [index for index, done in enumerate(finished) if not done]
            self._slots = [slots[index] for index in kept]
            self._loop.keep(kept)
            self._changed = True
        return Advance([slot.key for slot in slots], completed, finished, result)

    def _run_step(self) -> StepResult:
        """The step's call, for each image's own row."""
        slots, inputs = self._slots, None if self._changed else self._inputs
        if inputs is not None:
            row = slots[0].row
            return self._loop.run_row(inputs, row, self._draw(slots) if inputs.draws[row] else None)
        conditions = [slot.list_conditions() for slot in slots]
        needed = [condition for each in conditions for condition in each]
        self._table.prepare(needed, self._iterate_upcoming, self._changed and self._loop.looks_ahead)
        if self._changed:
            self._inputs, self._changed = _inputs_for_run(slots, self._table), False
        branches = max(slot.needed[slot.row] for slot in slots)
        coefficients = np.empty((len(slots), COEFFICIENTS), np.float32)
        weights = np.zeros((branches, len(slots), self._shape[0]), np.float32)
        rows = np.zeros((branches, len(slots)), np.int32)  # a branch without a weight may read any row
        for index, slot in enumerate(slots):
            row, image = slot.row, slot.image
            count = len(conditions[index])
            coefficients[index] = image.schedule.coefficients[row]
            weights[:count, index] = image.branches.weights[row, :count]
            rows[:count, index] = [self._table[condition] for condition in conditions[index]]
        drawing = [index for index, slot in enumerate(slots) if slot.draws[slot.row]]
        noise = self._draw([slots[index] for index in drawing]) if drawing else None
        return self._loop.run_step(coefficients, weights, rows, noise, drawing)

    def _draw(self, slots: Sequence[_Slot]) -> Float32:
        if all(slot.image.noise_dtype == "float32" for slot in slots):
            return draw_normals([slot.stream for slot in slots], self._shape)
        return np.stack([slot.image.draw_noise(slot.stream, self._shape) for slot in slots])

    def _iterate_upcoming(self) -> Iterator[Condition]:
        """The conditions that the images need next, soonest first."""
        for ahead in range(1, max(len(slot) - slot.row for slot in self._slots)):
            for slot in self._slots:
                if slot.row + ahead < len(slot):
                    yield from slot.list_conditions(ahead)

    def _error_for(self, slot: _Slot) -> SamplingError:
        step = sum(slot.completes[: slot.row]) + 1
        return SamplingError(
            f"latents are not finite after step {step} of {slot.image.schedule.steps} on {self._engine.info.name} "
            f"(seed {slot.image.seed}); run dit-verify on this bundle and engine"
        )
