"""The conditioning table: which rows are computed, and when.

The conditioner computes everything that depends on timestep and label alone: a row for each pair, ahead of the loop.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from dit_runtime.bundle.manifest import TensorSpec
from dit_runtime.core.errors import SamplingError


class Observation:
    """An observation float32 ``[O]``, of a policy, in place of a label: equal where every bit is."""

    def __init__(self, values: NDArray[np.float32]) -> None:
        self.values = values
        self._bytes = values.tobytes()
        self._hash = hash(self._bytes)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Observation) and self._bytes == other._bytes


Time = float | tuple[float, ...]  # a timestep; of a model of two times, both
Condition = tuple[Time, int | Observation]  # timestep, and label or observation


@dataclass(frozen=True)
class TableLimits:
    """Limits of memory, in bytes.

    Attributes:
        table_bytes: the most that the conditioning table may take. A row of DiT-XL/2 takes 783 KB, so the table of a
            long schedule or a large batch is computed in pieces.
        conditioner_bytes: the most output of one call of the conditioner, whose activations take several times that.
    """

    table_bytes: int = 256 << 20
    conditioner_bytes: int = 32 << 20


class TableMemory(Protocol):
    """The memory that holds the rows of a conditioning table.

    Attributes:
        capacity: the most rows.
        granule: ``fill`` starts at a row whose index is a multiple of this number.
    """

    capacity: int
    granule: int

    def fill(self, conditions: Sequence[Condition], first: int) -> None:
        """Compute a row for each condition, and store the rows from index ``first`` on."""
        ...


class ConditioningTable:
    """The index of each computed row of the conditioning table, by (timestep, label).

    Rows are computed before they are used. When a needed row does not fit, the whole table is dropped and filled again
    with the rows that the images use next.
    """

    def __init__(self, memory: TableMemory, table_bytes: int) -> None:
        self._memory, self._bytes = memory, table_bytes
        self._rows: dict[Condition, int] = {}
        self._end = 0

    def __len__(self) -> int:
        """The number of rows up to the last computed one."""
        return self._end

    def __getitem__(self, condition: Condition) -> int:
        """The index of a row that is computed."""
        return self._rows[condition]

    def get(self, condition: Condition) -> int | None:
        """The index of a row; None where the row is not computed."""
        return self._rows.get(condition)

    def prepare(
        self, needed: Sequence[Condition], upcoming: Callable[[], Iterator[Condition]], ahead: bool = False
    ) -> None:
        """Compute the rows of ``needed`` that are missing, and with them as many upcoming rows as fit.

        Args:
            needed: conditions that the next step reads.
            upcoming: gives the conditions of the steps after it, soonest first.
            ahead: whether to compute all upcoming rows now, where they fit, even if no needed row is missing.

        Raises:
            SamplingError: the rows of one step do not fit in the table's limit of memory.
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


def bytes_of_row(spec: TensorSpec) -> int:
    """Bytes of one row of the conditioning table, from its tensor in the manifest."""
    return np.dtype(spec.dtype).itemsize * math.prod(int(axis) for axis in spec.shape[1:])


def inputs_from_conditions(conditions: Sequence[Condition]) -> dict[str, NDArray[Any]]:
    """The conditioner's inputs: ``timesteps`` float32 ``[R]``, or ``[R, 2]`` of two times, and ``labels [R]`` int32.

    Of a policy they are ``timesteps`` and ``observations`` float32 ``[R, O]``.
    """
    timesteps = np.array([time for time, _ in conditions], np.float32)
    observations = [given.values for _, given in conditions if isinstance(given, Observation)]
    if observations:
        return {"timesteps": timesteps, "observations": np.stack(observations)}
    return {"timesteps": timesteps, "labels": np.array([label for _, label in conditions], np.int32)}
