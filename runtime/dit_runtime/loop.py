"""The sampling loop: pictures in an engine's batch, each at its own row of its own schedule."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dit_runtime.bundle import Manifest, TensorSpec
from dit_runtime.engines import Array, Engine
from dit_runtime.errors import SamplingError
from dit_runtime.guidance import Branches, Guidance
from dit_runtime.image_to_image import Init
from dit_runtime.noise import CudaNoise, Float32, Noise, TorchNoise, normals
from dit_runtime.table import COEFFICIENTS, Schedule

# The conditioning table of DiT-XL/2 takes 783 KB a row: long schedules and large batches compute it in pieces.
TABLE_BYTES = 256 << 20
# Rows that the conditioner computes in one call: its activations are several times its output.
CONDITIONER_BYTES = 32 << 20

Condition = tuple[float, int]  # timestep and label


@dataclass(frozen=True, eq=False)
class Picture:
    """One picture to be made, checked.

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
        """The picture's noise from its beginning."""
        return TorchNoise(self.seed) if self.noise_device == "cpu" else CudaNoise(self.seed, self.cuda_threads)

    def started(self, shape: tuple[int, ...]) -> tuple[Float32, Noise]:
        """z before the first row ``[C, H, W]``, and the stream for the rows.

        In image-to-image the noise on the picture is the stream's first draw, as in diffusers' pipelines once the
        picture is encoded.
        """
        stream, (first, *others) = self.stream(), self.schedule.start
        noise = self.drawn(stream, shape) if self.noise is None else self.noise
        if self.init is None:
            latents: Float32 = first * noise
        else:
            signal, spread = self.schedule.initial[0]
            latents = signal * self.init.latents + spread * noise
        for scale in others:
            latents = latents + scale * self.drawn(stream, shape)
        return latents, stream

    def drawn(self, stream: Noise, shape: tuple[int, ...]) -> Float32:
        """The next noise of the picture's stream, float32 ``[C, H, W]``."""
        return stream.normal(shape, self.noise_dtype).astype(np.float32)


class ConditioningTable:
    """Rows of the conditioning table by (timestep, label), within ``TABLE_BYTES``.

    Rows are computed ahead of their use, ``CONDITIONER_BYTES`` of them at a time. When there is no room for a row that
    is needed, all are dropped and the table fills up again with what the pictures will use next.
    """

    def __init__(self, engine: Engine, spec: TensorSpec) -> None:
        self._conditioner, self._name = engine.session("conditioner"), spec.name
        shape, dtype = tuple(int(axis) for axis in spec.shape[1:]), np.dtype(spec.dtype)
        row_bytes = dtype.itemsize * math.prod(shape)
        self._capacity = max(1, TABLE_BYTES // row_bytes)
        self._chunk = max(1, CONDITIONER_BYTES // row_bytes)
        self._rows: dict[Condition, int] = {}
        self._memory: Array = np.empty((0, *shape), dtype)

    @property
    def array(self) -> Array:
        """The rows that are in use, ``[R, …]``."""
        return self._memory[: len(self._rows)]

    def __getitem__(self, condition: Condition) -> int:
        """Where a prepared row is."""
        return self._rows[condition]

    def get(self, condition: Condition) -> int | None:
        """Where a row is, if it is there."""
        return self._rows.get(condition)

    def prepare(self, needed: Sequence[Condition], upcoming: Iterator[Condition]) -> None:
        """Have the rows of ``needed``, and if any is missing as many of ``upcoming`` as fit.

        Raises:
            SamplingError: one batch needs more rows than the bound of memory allows.
        """
        missing = [condition for condition in needed if condition not in self._rows]
        if not missing:
            return
        wanted, room = dict.fromkeys(missing), self._capacity - len(self._rows)
        if len(wanted) > room:
            wanted, room = dict.fromkeys(needed), self._capacity
            if len(wanted) > room:
                raise SamplingError(
                    f"this batch needs {len(wanted)} rows of the conditioning table at once, and {room} fit in "
                    f"{TABLE_BYTES >> 20} MiB; use a smaller batch"
                )
            self._rows.clear()
        for condition in upcoming:
            if len(wanted) == room:
                break
            if condition not in self._rows:
                wanted[condition] = None
        conditions, first = list(wanted), len(self._rows)
        if not first and len(conditions) <= self._chunk:
            self._memory = self._computed(conditions)  # all at once, as for most runs: nothing to copy
        else:
            self._fill(conditions, first)
        self._rows.update({condition: first + index for index, condition in enumerate(conditions)})

    def _fill(self, conditions: list[Condition], first: int) -> None:
        """Compute rows into their places, from ``first``."""
        if len(self._memory) < self._capacity:
            # Pages that are never written cost nothing.
            memory = np.empty((self._capacity, *self._memory.shape[1:]), self._memory.dtype)
            memory[:first] = self._memory[:first]
            self._memory = memory
        for start in range(0, len(conditions), self._chunk):
            chunk = conditions[start : start + self._chunk]
            self._memory[first + start : first + start + len(chunk)] = self._computed(chunk)

    def _computed(self, conditions: Sequence[Condition]) -> Array:
        (rows,) = self._conditioner.run(
            {
                "timesteps": np.array([time for time, _ in conditions], np.float32),
                "labels": np.array([label for _, label in conditions], np.int32),
            },
            [self._name],
        )
        return rows


class _Slot:
    """A picture in the batch, and how far it is."""

    def __init__(self, key: int, picture: Picture, stream: Noise) -> None:
        self.key, self.picture, self.stream, self.row = key, picture, stream, 0
        schedule = picture.schedule
        self.times: list[float] = schedule.timesteps[schedule.rows].tolist()
        self.labels: list[int] = picture.branches.labels.tolist()
        self.needed: list[int] = picture.branches.needed.tolist()
        self.draws: list[bool] = schedule.draws_noise.tolist()
        self.completes: list[bool] = schedule.completes_step.tolist()

    def __len__(self) -> int:
        return len(self.times)

    def conditions(self, ahead: int = 0) -> list[Condition]:
        """What the network is asked about in this row, or one that far ahead, branch by branch."""
        row = self.row + ahead
        time = self.times[row]
        return [(time, label) for label in self.labels[: self.needed[row]]]


class _Together(NamedTuple):
    """What the step graph reads of pictures side by side in one schedule, for all its rows: made once, hardly any work
    is left between the engine's calls, where the caches are cold.

    ``coefficients [T, B, 17]``, ``weights [T, G, B, C]``, ``rows [T, G, B]``; how many branches each row needs, and
    whether it draws.
    """

    coefficients: Float32
    weights: Float32
    rows: NDArray[np.int32]
    needed: list[int]
    draws: list[bool]


def _together(slots: Sequence[_Slot], table: ConditioningTable) -> _Together | None:
    """None where the pictures are not in one row of one schedule, or the table has no room for all they will use."""
    first, count = slots[0], len(slots)
    schedule, steps = first.picture.schedule, len(first)
    if any(slot.picture.schedule is not schedule or slot.row != first.row for slot in slots):
        return None
    needed = np.max([slot.needed for slot in slots], axis=0)
    branches = int(needed.max())
    weights = np.zeros((steps, branches, count, slots[0].picture.branches.weights.shape[2]), np.float32)
    rows = np.zeros((steps, branches, count), np.int32)  # a branch without a weight may read any row
    for index, slot in enumerate(slots):
        own = slot.picture.branches.weights
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
    return _Together(coefficients, weights, rows, needed.tolist(), first.draws)


class Advance(NamedTuple):
    """What one engine call did to the batch: a list entry or array row per picture that was in it.

    The arrays, ``[B, C, H, W]``, belong to the batch: copy what is to be kept.
    """

    keys: list[int]
    completed: list[bool]
    finished: list[bool]
    latents: Float32
    denoised: Float32


class Batch:
    """Up to as many pictures as an engine takes, advanced together, added and finished one by one.

    ``failure`` is what the next ``advance`` will raise.
    """

    def __init__(self, engine: Engine, manifest: Manifest) -> None:
        self._engine, model = engine, manifest.model
        self._step = engine.session("step")
        self._table_name = manifest.table.name
        self._table = ConditioningTable(engine, manifest.table)
        self._shape = (model.latent_channels, *model.latent_size)
        self._slots: list[_Slot] = []
        self._state = np.zeros((0, 3, *self._shape), np.float32)
        self._noise = np.zeros((0, *self._shape), np.float32)
        self._together: _Together | None = None
        self._changed = True  # who is in the batch
        self.failure: SamplingError | None = None

    def __len__(self) -> int:
        return len(self._slots)

    def add(self, pictures: Sequence[tuple[int, Picture]]) -> None:
        """Let pictures in, each with a key that its results carry."""
        if not pictures:
            return
        state = np.zeros((len(pictures), 3, *self._shape), np.float32)
        for index, (key, picture) in enumerate(pictures):
            state[index, 0], stream = picture.started(self._shape)
            self._slots.append(_Slot(key, picture, stream))
        self._state = np.concatenate([self._state, state])
        self._noise = np.zeros_like(self._state[:, 0])
        self._changed = True

    def advance(self) -> Advance:
        """One row of every picture, in one engine call. Finished pictures leave the batch.

        Raises:
            SamplingError: latents that are no longer finite; pictures that finished in the same call come first, and
                the error with the next call.
        """
        if self.failure is not None:
            raise self.failure
        slots = self._slots
        state, denoised = self._step.run(self._inputs(), ["next_state", "denoised"])
        completed = [slot.completes[slot.row] for slot in slots]
        finished = [slot.row + 1 == len(slot) for slot in slots]
        if not np.isfinite(state).all():
            sound = [bool(np.isfinite(values).all()) for values in state]
            self.failure = self._not_finite(slots[sound.index(False)])
            finished = [done and fine for done, fine in zip(finished, sound, strict=True)]
            if not any(finished):
                raise self.failure
        for slot in slots:
            slot.row += 1
        self._state = state
        if any(finished):
            kept = [index for index, done in enumerate(finished) if not done]
            self._slots = [slots[index] for index in kept]
            self._state, self._noise = state[kept], self._noise[kept]
            self._changed = True
        return Advance([slot.key for slot in slots], completed, finished, state[:, 0], denoised)

    def _inputs(self) -> dict[str, Array]:
        """What the step graph reads, for each picture's own row."""
        slots, together = self._slots, None if self._changed else self._together
        if together is not None:
            row = slots[0].row
            if together.draws[row]:
                self._noise[:] = self._drawn(slots)
            branches = together.needed[row]
            return {
                "state": self._state,
                "noise": self._noise,
                "coefficients": together.coefficients[row],
                "guidance": together.weights[row, :branches],
                "rows": together.rows[row, :branches],
                self._table_name: self._table.array,
            }
        conditions = [slot.conditions() for slot in slots]
        self._table.prepare([condition for each in conditions for condition in each], self._upcoming())
        if self._changed:
            self._together, self._changed = _together(slots, self._table), False
        branches = max(slot.needed[slot.row] for slot in slots)
        coefficients = np.empty((len(slots), COEFFICIENTS), np.float32)
        weights = np.zeros((branches, len(slots), self._shape[0]), np.float32)
        rows = np.zeros((branches, len(slots)), np.int32)  # a branch without a weight may read any row
        for index, slot in enumerate(slots):
            row, picture = slot.row, slot.picture
            count = len(conditions[index])
            coefficients[index] = picture.schedule.coefficients[row]
            weights[:count, index] = picture.branches.weights[row, :count]
            rows[:count, index] = [self._table[condition] for condition in conditions[index]]
        drawing = [index for index, slot in enumerate(slots) if slot.draws[slot.row]]
        # Where k is 0, what is left of the noise of the step before does nothing.
        if drawing:
            self._noise[drawing] = self._drawn([slots[index] for index in drawing])
        return {
            "state": self._state,
            "noise": self._noise,
            "coefficients": coefficients,
            "guidance": weights,
            "rows": rows,
            self._table_name: self._table.array,
        }

    def _drawn(self, slots: Sequence[_Slot]) -> Float32:
        if all(slot.picture.noise_dtype == "float32" for slot in slots):
            return normals([slot.stream for slot in slots], self._shape)
        return np.stack([slot.picture.drawn(slot.stream, self._shape) for slot in slots])

    def _upcoming(self) -> Iterator[Condition]:
        """The conditions that the pictures need next, soonest first."""
        for ahead in range(1, max(len(slot) - slot.row for slot in self._slots)):
            for slot in self._slots:
                if slot.row + ahead < len(slot):
                    yield from slot.conditions(ahead)

    def _not_finite(self, slot: _Slot) -> SamplingError:
        step = sum(slot.completes[: slot.row]) + 1
        return SamplingError(
            f"latents are not finite after step {step} of {slot.picture.schedule.steps} on {self._engine.name} (seed "
            f"{slot.picture.seed}); run dit-verify on this bundle and engine"
        )
