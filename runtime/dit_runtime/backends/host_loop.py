"""What a batch keeps from one call of the step to the next: latents, noise and the conditioning table.

``Loop`` is the interface. ``HostLoop`` hands numpy arrays to an engine's session; an engine that keeps all of it on
its device has a method ``steps(table_bytes, conditioner_bytes)`` of its own (``dit_runtime.backends.tensorrt.loop``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from dit_runtime.backends.open import Array, Engine
from dit_runtime.bundle.manifest import Manifest, TensorSpec
from dit_runtime.core.errors import SamplingError
from dit_runtime.samplers.noise import Float32

Int32 = NDArray[np.int32]
Condition = tuple[float, int]  # timestep and label


class RunInputs(NamedTuple):
    """What the step graph reads of images side by side in one schedule, for all its rows: made once, hardly any work
    is left between the engine's calls, where the caches are cold.

    ``coefficients [T, B, 17]``, ``weights [T, G, B, C]``, ``rows [T, G, B]``; how many branches each row needs, and
    whether it draws.
    """

    coefficients: Float32
    weights: Float32
    rows: Int32
    needed: list[int]
    draws: list[bool]


class StepResult(Protocol):
    """What a call of the step gave: ``state [B, 3, C, H, W]``, ``denoised [B, C, H, W]``, valid until the next call.

    ``at_hand`` is False where reading them waits for a device.
    """

    @property
    def at_hand(self) -> bool: ...
    @property
    def state(self) -> Float32: ...
    @property
    def denoised(self) -> Float32: ...


class TableMemory(Protocol):
    """Where the rows of a conditioning table lie.

    ``capacity`` is how many there may be; ``granule``: a call of ``fill`` starts at a multiple of it.
    """

    capacity: int
    granule: int

    def fill(self, conditions: Sequence[Condition], first: int) -> None:
        """Compute rows into their places, from ``first``."""
        ...


class Loop(Protocol):
    """A batch's latents, noise and conditioning table, and what advances them.

    ``looks_ahead``: whether the table is to have the rows of a whole run before it begins.
    """

    table: ConditioningTable
    looks_ahead: bool

    def join(self, latents: Float32) -> None:
        """Images ``[N, C, H, W]`` take the next places; the sampler's memory and all noise are zero."""
        ...

    def leave(self, kept: Sequence[int]) -> None:
        """The places of ``kept``, rising, remain and close up."""
        ...

    def run_planned(self, plan: RunInputs, row: int, noise: Float32 | None) -> StepResult:
        """One row of a plan. ``noise [B, C, H, W]``; None is what it was before."""
        ...

    def once(
        self, coefficients: Float32, weights: Float32, rows: Int32, noise: Float32 | None, drawing: Sequence[int]
    ) -> StepResult:
        """One call: ``coefficients [B, 17]``, ``weights [G, B, C]``, ``rows [G, B]``; noise of the places drawing."""
        ...

    def close(self) -> None:
        """The batch is over."""
        ...


class ConditioningTable:
    """Which rows of the conditioning table are there, by (timestep, label).

    Rows are computed ahead of their use. When there is no room for a row that is needed, all are dropped and the table
    fills up again with what the images will use next.
    """

    def __init__(self, memory: TableMemory, table_bytes: int) -> None:
        self._memory, self._bytes = memory, table_bytes
        self._rows: dict[Condition, int] = {}
        self._end = 0

    def __len__(self) -> int:
        """Rows up to the last that is in use."""
        return self._end

    def __getitem__(self, condition: Condition) -> int:
        """Where a prepared row is."""
        return self._rows[condition]

    def get(self, condition: Condition) -> int | None:
        """Where a row is, if it is there."""
        return self._rows.get(condition)

    def prepare(
        self, needed: Sequence[Condition], upcoming: Callable[[], Iterator[Condition]], ahead: bool = False
    ) -> None:
        """Have the rows of ``needed``, and if any is missing as many of ``upcoming`` as fit.

        ``ahead``: have all of ``upcoming`` too, where they fit.

        Raises:
            SamplingError: one batch needs more rows than the bound of memory allows.
        """
        capacity, granule = self._memory.capacity, self._memory.granule
        if ahead and len(every := dict.fromkeys(chain(needed, upcoming()))) <= capacity:
            needed = list(every)
        missing = [condition for condition in needed if condition not in self._rows]
        if not missing:
            return
        first = -(-self._end // granule) * granule
        wanted, room = dict.fromkeys(missing), capacity - first
        if len(wanted) > room:
            wanted, first, room = dict.fromkeys(needed), 0, capacity
            if len(wanted) > room:
                raise SamplingError(
                    f"this batch needs {len(wanted)} rows of the conditioning table at once, and {room} fit in "
                    f"{self._bytes >> 20} MiB; use a smaller batch"
                )
            self._rows.clear()
            self._end = 0
        for condition in upcoming():
            if len(wanted) == room:
                break
            if condition not in self._rows:
                wanted[condition] = None
        self._memory.fill(list(wanted), first)
        self._rows.update({condition: first + index for index, condition in enumerate(wanted)})
        self._end = first + len(wanted)


def row_bytes(spec: TensorSpec) -> int:
    """Bytes of a row of the conditioning table."""
    return np.dtype(spec.dtype).itemsize * math.prod(int(axis) for axis in spec.shape[1:])


def conditioner_inputs(conditions: Sequence[Condition]) -> dict[str, Array]:
    """Timesteps ``[R]`` and labels ``[R]``."""
    return {
        "timesteps": np.array([time for time, _ in conditions], np.float32),
        "labels": np.array([label for _, label in conditions], np.int32),
    }


class HostTable:
    """Rows of the conditioning table in an array, ``chunk`` of them computed at a time."""

    granule = 1

    def __init__(self, engine: Engine, spec: TensorSpec, table_bytes: int, conditioner_bytes: int) -> None:
        self._conditioner, self._name = engine.session("conditioner"), spec.name
        self.capacity = max(1, table_bytes // row_bytes(spec))
        self._chunk = max(1, conditioner_bytes // row_bytes(spec))
        self.array: Array = np.empty((0, *(int(axis) for axis in spec.shape[1:])), np.dtype(spec.dtype))

    def fill(self, conditions: Sequence[Condition], first: int) -> None:
        """As ``TableMemory.fill``."""
        if not first and len(conditions) <= self._chunk:
            self.array = self._computed(conditions)  # all at once, as for most runs: nothing to copy
            return
        if len(self.array) < self.capacity:
            # Pages that are never written cost nothing.
            memory = np.empty((self.capacity, *self.array.shape[1:]), self.array.dtype)
            memory[:first] = self.array[:first]
            self.array = memory
        for start in range(0, len(conditions), self._chunk):
            chunk = conditions[start : start + self._chunk]
            self.array[first + start : first + start + len(chunk)] = self._computed(chunk)

    def _computed(self, conditions: Sequence[Condition]) -> Array:
        (rows,) = self._conditioner.run(conditioner_inputs(conditions), [self._name])
        return rows


class HostStepResult(NamedTuple):
    """What a session gave."""

    state: Float32
    denoised: Float32

    @property
    def at_hand(self) -> bool:
        return True


class HostLoop:
    """Arrays in, arrays out: for engines that have only sessions."""

    looks_ahead = False

    def __init__(self, engine: Engine, manifest: Manifest, table_bytes: int, conditioner_bytes: int) -> None:
        model = manifest.model
        self._session, self._table_name = engine.session("step"), manifest.table.name
        self._memory = HostTable(engine, manifest.table, table_bytes, conditioner_bytes)
        self.table = ConditioningTable(self._memory, table_bytes)
        shape = (model.latent_channels, *model.latent_size)
        self._state: Float32 = np.zeros((0, 3, *shape), np.float32)
        self._noise: Float32 = np.zeros((0, *shape), np.float32)

    def join(self, latents: Float32) -> None:
        """As ``Steps.join``."""
        state = np.zeros((len(latents), *self._state.shape[1:]), np.float32)
        state[:, 0] = latents
        self._state = np.concatenate([self._state, state])
        self._noise = np.zeros_like(self._state[:, 0])

    def leave(self, kept: Sequence[int]) -> None:
        """As ``Steps.leave``."""
        places = list(kept)
        self._state, self._noise = self._state[places], self._noise[places]

    def run_planned(self, plan: RunInputs, row: int, noise: Float32 | None) -> HostStepResult:
        """As ``Steps.planned``."""
        if noise is not None:
            self._noise[:] = noise
        branches = plan.needed[row]
        return self._run(plan.coefficients[row], plan.weights[row, :branches], plan.rows[row, :branches])

    def once(
        self, coefficients: Float32, weights: Float32, rows: Int32, noise: Float32 | None, drawing: Sequence[int]
    ) -> HostStepResult:
        """As ``Steps.once``."""
        # Where k is 0, what is left of the noise of the step before does nothing.
        if noise is not None:
            self._noise[list(drawing)] = noise
        return self._run(coefficients, weights, rows)

    def _run(self, coefficients: Float32, weights: Float32, rows: Int32) -> HostStepResult:
        state, denoised = self._session.run(
            {
                "state": self._state,
                "noise": self._noise,
                "coefficients": coefficients,
                "guidance": weights,
                "rows": rows,
                self._table_name: self._memory.array[: len(self.table)],
            },
            ["next_state", "denoised"],
        )
        self._state = state
        return HostStepResult(state, denoised)

    def close(self) -> None:
        """As ``Steps.close``: nothing is held."""
