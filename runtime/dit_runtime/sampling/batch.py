"""The sampling loop: the images of a batch advance together, each at its own row of its own schedule."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from dit_runtime.backends.base import Engine, Loop, RunInputs, StepResult
from dit_runtime.backends.conditioning import Condition, ConditioningTable, Observation, TableLimits, Time
from dit_runtime.backends.profiles import BatchShape
from dit_runtime.bundle.manifest import Manifest
from dit_runtime.core.errors import SamplingError
from dit_runtime.samplers.noise import Float32, Noise, draw_normals
from dit_runtime.samplers.schedule import widen_rows
from dit_runtime.sampling.requests import ImageRequest

LIMITS = TableLimits()  # the memory for the conditioning table of any batch


class _Slot:
    """An image in the batch, and the row of its schedule that comes next."""

    def __init__(self, key: int, image: ImageRequest, stream: Noise) -> None:
        self.key, self.image, self.stream, self.row = key, image, stream, 0
        schedule = image.schedule
        times: list[list[float]] = schedule.times.tolist()
        self.times: list[Time] = [each[0] if len(each) == 1 else tuple(each) for each in times]
        labels: list[int] = image.branches.labels.tolist()
        self.labels: Sequence[int | Observation] = labels
        if image.observations is not None:
            self.labels = [image.observations[label] for label in labels]
        self.needed: list[int] = image.branches.needed.tolist()
        self.draws: list[bool] = schedule.draws_noise.tolist()
        self.completes: list[bool] = schedule.completes_step.tolist()

    def __len__(self) -> int:
        return len(self.times)

    def list_conditions(self, ahead: int = 0) -> list[Condition]:
        """The (timestep, label) of each branch in the next row, or ``ahead`` rows after it."""
        row = self.row + ahead
        time = self.times[row]
        return [(time, label) for label in self.labels[: self.needed[row]]]


def _inputs_for_run(slots: Sequence[_Slot], table: ConditioningTable, clips: bool) -> RunInputs | None:
    """The step's inputs for the rest of a run.

    None where the images are not at the same row of the same schedule, or where rows of the conditioning table that
    they need later are not computed.
    """
    first, count = slots[0], len(slots)
    schedule, steps = first.image.schedule, len(first)
    if any(slot.image.schedule is not schedule or slot.row != first.row for slot in slots):
        return None
    needed = np.max([slot.needed for slot in slots], axis=0)
    branches = int(needed.max())
    weights = np.zeros((steps, branches, count, slots[0].image.branches.weights.shape[2]), np.float32)
    rows = np.zeros((steps, branches, count), np.int32)  # a branch of weight 0 may read any row
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
    coefficients = np.repeat(widen_rows(schedule.coefficients, clips)[:, None], count, axis=1)
    return RunInputs(coefficients, weights, rows, needed.tolist(), first.draws)


class Advance(NamedTuple):
    """The result of one step of a batch.

    Lists and arrays have an entry for each image that was in the batch, in the batch's order. The arrays belong to the
    batch and are valid until its next step: copy what you keep. On a device the arrays stay there until they are read.
    They are checked to be finite only where ``read`` asked for it or an image finished.

    Attributes:
        keys: each image's key, as it was added.
        completed: whether the row completed a step of the image's sampler.
        finished: whether the row was the image's last; finished images have left the batch.
        result: the arrays.
        failed: the error of each image that is not finite and has left the batch, by its key; only where the batch goes
            on without such images.
        latents: float32 ``[B, C, H, W]``.
        denoised: the estimate of the clean latents, float32 ``[B, C, H, W]``.
    """

    keys: list[int]
    completed: list[bool]
    finished: list[bool]
    result: StepResult
    failed: Mapping[int, SamplingError]

    @property
    def latents(self) -> Float32:
        return self.result.state[:, 0]

    @property
    def denoised(self) -> Float32:
        return self.result.denoised


class Batch:
    """Images that advance together. Images may be added between two steps, and leave when they are finished.

    A batch is a context manager: it holds the engine's loop, and with it device memory, until it is closed.

    Args:
        engine: the engine that runs the step.
        manifest: of the engine's bundle.
        goes_on: whether images that are not finite leave the batch alone, and the others go on; else ``advance``
            raises an error.

    Attributes:
        failure: the error that the next ``advance`` raises; None where there is none.
    """

    def __init__(self, engine: Engine, manifest: Manifest, goes_on: bool = False) -> None:
        self._engine, self._goes_on, model = engine, goes_on, manifest.model
        self._loop: Loop = engine.open_loop(LIMITS)
        self._table = self._loop.table
        self._shape, self._clips = (model.latent_channels, *model.latent_size), model.clips
        self._slots: list[_Slot] = []
        self._inputs: RunInputs | None = None
        self._changed = True  # whether images were added or removed since the last step
        self.failure: SamplingError | None = None

    def __len__(self) -> int:
        return len(self._slots)

    def __enter__(self) -> Batch:
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.close()

    @property
    def next_shape(self) -> BatchShape:
        """Images and guidance branches of the next step, unless it raises ``failure``."""
        return len(self._slots), max((slot.needed[slot.row] for slot in self._slots), default=1)

    def add(self, images: Sequence[tuple[int, ImageRequest]]) -> None:
        """Add images, each with a key that names it in the results."""
        if not images:
            return
        latents = np.empty((len(images), *self._shape), np.float32)
        for index, (key, image) in enumerate(images):
            latents[index], stream = image.make_initial_latents(self._shape)
            self._slots.append(_Slot(key, image, stream))
        self._loop.add(latents)
        self._changed = True

    def remove(self, keys: Container[int]) -> None:
        """Let the images of these keys leave before they are finished; a key that is not in the batch has left already.

        The other images go on as if these had never been there.
        """
        self._keep([index for index, slot in enumerate(self._slots) if slot.key not in keys])

    def advance(self, read: bool = False) -> Advance:
        """Do one row of every image in one call of the engine. Finished images leave the batch.

        Args:
            read: whether the caller reads the arrays, so that they are checked to be finite. Arrays on the host are
                always checked.

        Raises:
            SamplingError: the latents of an image are not finite, and the batch does not go on without it. If other
                images finished in the same call, this call returns them, and the next call raises the error.
        """
        if self.failure is not None:
            raise self.failure
        slots = self._slots
        result = self._run_step()
        completed = [slot.completes[slot.row] for slot in slots]
        finished = [slot.row + 1 == len(slot) for slot in slots]
        failed: dict[int, SamplingError] = {}
        if (read or result.at_hand or any(finished)) and not np.isfinite(state := result.state).all():
            sound = [bool(np.isfinite(values).all()) for values in state]
            finished = [done and fine for done, fine in zip(finished, sound, strict=True)]
            if self._goes_on:
                failed = {slot.key: self._error_for(slot) for slot, fine in zip(slots, sound, strict=True) if not fine}
            else:
                self.failure = self._error_for(slots[sound.index(False)])
                if not any(finished):
                    raise self.failure
        for slot in slots:
            slot.row += 1
        self._keep([index for index, slot in enumerate(slots) if not finished[index] and slot.key not in failed])
        return Advance([slot.key for slot in slots], completed, finished, result, failed)

    def _keep(self, kept: list[int]) -> None:
        """Let all images leave but those at these places."""
        if len(kept) < len(self._slots):
            self._slots = [self._slots[index] for index in kept]
            self._loop.keep(kept)
            self._changed = True

    def _run_step(self) -> StepResult:
        """Run the step, each image at its own row."""
        slots, inputs = self._slots, None if self._changed else self._inputs
        if inputs is not None:
            row = slots[0].row
            return self._loop.run_row(inputs, row, self._draw(slots) if inputs.draws[row] else None)
        conditions = [slot.list_conditions() for slot in slots]
        needed = [condition for each in conditions for condition in each]
        self._table.prepare(needed, self._iterate_upcoming, self._changed and self._loop.looks_ahead)
        if self._changed:
            self._inputs, self._changed = _inputs_for_run(slots, self._table, self._clips), False
        _, branches = self.next_shape
        weights = np.zeros((branches, len(slots), self._shape[0]), np.float32)
        rows = np.zeros((branches, len(slots)), np.int32)  # a branch of weight 0 may read any row
        for index, slot in enumerate(slots):
            row, image = slot.row, slot.image
            count = len(conditions[index])
            weights[:count, index] = image.branches.weights[row, :count]
            rows[:count, index] = [self._table[condition] for condition in conditions[index]]
        own = [widen_rows(slot.image.schedule.coefficients[slot.row], self._clips) for slot in slots]
        coefficients = np.stack(own)
        drawing = [index for index, slot in enumerate(slots) if slot.draws[slot.row]]
        noise = self._draw([slots[index] for index in drawing]) if drawing else None
        return self._loop.run_step(coefficients, weights, rows, noise, drawing)

    def _draw(self, slots: Sequence[_Slot]) -> Float32:
        if all(slot.image.noise_dtype == "float32" for slot in slots):
            return draw_normals([slot.stream for slot in slots], self._shape)
        return np.stack([slot.image.draw_noise(slot.stream, self._shape) for slot in slots])

    def _iterate_upcoming(self) -> Iterator[Condition]:
        """Yield the conditions that the images need after the next row, soonest first."""
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
