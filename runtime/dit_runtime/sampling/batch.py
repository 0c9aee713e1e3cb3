"""The sampling loop: images in an engine's batch, each at its own row of its own schedule."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from dit_runtime.backends.host_loop import (
    Condition,
    ConditioningTable,
    HostLoop,
    Loop,
    RunInputs,
    StepResult,
)
from dit_runtime.backends.open import Engine
from dit_runtime.bundle.manifest import Manifest
from dit_runtime.core.errors import SamplingError
from dit_runtime.samplers.guidance import Branches, Guidance
from dit_runtime.samplers.noise import (
    CudaNoise,
    Float32,
    Noise,
    TorchNoise,
    draw_normals,
)
from dit_runtime.samplers.schedule import COEFFICIENTS, Schedule
from dit_runtime.sampling.image_to_image import Init

# The conditioning table of DiT-XL/2 takes 783 KB a row: long schedules and large batches compute it in pieces.
TABLE_BYTES = 256 << 20
# Rows that the conditioner computes in one call: its activations are several times its output.
CONDITIONER_BYTES = 32 << 20


@dataclass(frozen=True, eq=False)
class ImageRequest:
    """One image to be made, checked.

    Attributes:
        labels: weight of each class number.
        seed: of its own stream of noise.
        schedule: its sampler; with ``init`` only the steps that run.
        guidance: scale, interval and shape.
        negative_label: class number in place of the null class.
        branches: what labels and guidance come to, row by row.
        noise: float32 ``[C, H, W]`` in place of the stream's first draw.
        noise_device: ``cpu`` or ``cuda``: whose PyTorch generator the seed stands for.
        noise_dtype: ``float32`` or ``float16``: the dtype PyTorch draws in.
        cuda_threads: resident threads of the CUDA device, for draws that depend on it (``CudaNoise``).
        init: what it starts from, in image-to-image.
        strength: the share of the steps that it was asked to run, for the record.
    """

    labels: dict[int, float]
    seed: int
    schedule: Schedule
    guidance: Guidance
    negative_label: int | None
    branches: Branches
    noise: Float32 | None = None
    noise_device: str = "cpu"
    noise_dtype: str = "float32"
    cuda_threads: int | None = None
    init: Init | None = None
    strength: float | None = None

    def stream(self) -> Noise:
        """The image's noise from its beginning."""
        return TorchNoise(self.seed) if self.noise_device == "cpu" else CudaNoise(self.seed, self.cuda_threads)

    def initial_latents(self, shape: tuple[int, ...]) -> tuple[Float32, Noise]:
        """z before the first row ``[C, H, W]``, and the stream for the rows.

        In image-to-image the noise on the image is the stream's first draw, as in diffusers' pipelines once the
        image is encoded.
        """
        stream, (first, *others) = self.stream(), self.schedule.start
        noise = self.draw_noise(stream, shape) if self.noise is None else self.noise
        if self.init is None:
            latents: Float32 = first * noise
        else:
            signal, spread = self.schedule.initial[0]
            latents = signal * self.init.latents + spread * noise
        for scale in others:
            latents = latents + scale * self.draw_noise(stream, shape)
        return latents, stream

    def draw_noise(self, stream: Noise, shape: tuple[int, ...]) -> Float32:
        """The next noise of the image's stream, float32 ``[C, H, W]``."""
        return stream.normal(shape, self.noise_dtype).astype(np.float32)


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

    def conditions(self, ahead: int = 0) -> list[Condition]:
        """What the network is asked about in this row, or one that far ahead, branch by branch."""
        row = self.row + ahead
        time = self.times[row]
        return [(time, label) for label in self.labels[: self.needed[row]]]


def _run_inputs(slots: Sequence[_Slot], table: ConditioningTable) -> RunInputs | None:
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
    outcome: StepResult

    @property
    def latents(self) -> Float32:
        return self.outcome.state[:, 0]

    @property
    def denoised(self) -> Float32:
        return self.outcome.denoised


class Batch:
    """Up to as many images as an engine takes, advanced together, added and finished one by one.

    ``failure`` is what the next ``advance`` will raise. Close it at the end: an engine's device memory is lent to it.
    """

    def __init__(self, engine: Engine, manifest: Manifest) -> None:
        self._engine, model = engine, manifest.model
        resident = getattr(engine, "steps", None)
        self._steps: Loop = (
            HostLoop(engine, manifest, TABLE_BYTES, CONDITIONER_BYTES)
            if resident is None
            else resident(TABLE_BYTES, CONDITIONER_BYTES)
        )
        self._table = self._steps.table
        self._shape = (model.latent_channels, *model.latent_size)
        self._slots: list[_Slot] = []
        self._plan: RunInputs | None = None
        self._changed = True  # who is in the batch
        self.failure: SamplingError | None = None

    def __len__(self) -> int:
        return len(self._slots)

    def __enter__(self) -> Batch:
        return self

    def __exit__(self, *_: object) -> None:
        self._steps.close()

    def add(self, images: Sequence[tuple[int, ImageRequest]]) -> None:
        """Let images in, each with a key that its results carry."""
        if not images:
            return
        latents = np.empty((len(images), *self._shape), np.float32)
        for index, (key, image) in enumerate(images):
            latents[index], stream = image.initial_latents(self._shape)
            self._slots.append(_Slot(key, image, stream))
        self._steps.join(latents)
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
        outcome = self._advanced()
        completed = [slot.completes[slot.row] for slot in slots]
        finished = [slot.row + 1 == len(slot) for slot in slots]
        if (read or outcome.at_hand or any(finished)) and not np.isfinite(state := outcome.state).all():
            sound = [bool(np.isfinite(values).all()) for values in state]
            self.failure = self._not_finite(slots[sound.index(False)])
            finished = [done and fine for done, fine in zip(finished, sound, strict=True)]
            if not any(finished):
                raise self.failure
        for slot in slots:
            slot.row += 1
        if any(finished):
            kept = [index for index, done in enumerate(finished) if not done]
            self._slots = [slots[index] for index in kept]
            self._steps.leave(kept)
            self._changed = True
        return Advance([slot.key for slot in slots], completed, finished, outcome)

    def _advanced(self) -> StepResult:
        """The step's call, for each image's own row."""
        slots, plan = self._slots, None if self._changed else self._plan
        if plan is not None:
            row = slots[0].row
            return self._steps.run_planned(plan, row, self._drawn(slots) if plan.draws[row] else None)
        conditions = [slot.conditions() for slot in slots]
        needed = [condition for each in conditions for condition in each]
        self._table.prepare(needed, self._upcoming, self._changed and self._steps.looks_ahead)
        if self._changed:
            self._plan, self._changed = _run_inputs(slots, self._table), False
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
        noise = self._drawn([slots[index] for index in drawing]) if drawing else None
        return self._steps.once(coefficients, weights, rows, noise, drawing)

    def _drawn(self, slots: Sequence[_Slot]) -> Float32:
        if all(slot.image.noise_dtype == "float32" for slot in slots):
            return draw_normals([slot.stream for slot in slots], self._shape)
        return np.stack([slot.image.draw_noise(slot.stream, self._shape) for slot in slots])

    def _upcoming(self) -> Iterator[Condition]:
        """The conditions that the images need next, soonest first."""
        for ahead in range(1, max(len(slot) - slot.row for slot in self._slots)):
            for slot in self._slots:
                if slot.row + ahead < len(slot):
                    yield from slot.conditions(ahead)

    def _not_finite(self, slot: _Slot) -> SamplingError:
        step = sum(slot.completes[: slot.row]) + 1
        return SamplingError(
            f"latents are not finite after step {step} of {slot.image.schedule.steps} on {self._engine.name} (seed "
            f"{slot.image.seed}); run dit-verify on this bundle and engine"
        )
