"""The conditioning table: which of its rows are there, and how they come to be.

What depends on timestep and label alone is computed once, ahead of the loop, a row for each pair.
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

Condition = tuple[float, int]  # timestep and label


@dataclass(frozen=True)
class TableLimits:
    """Bounds of memory: of the whole conditioning table, and of what the conditioner computes in one call.

    A row of DiT-XL/2 takes 783 KB: long schedules and large batches compute the table in pieces. The conditioner's
    activations are several times its output.
    """

    table_bytes: int = 256 << 20
    conditioner_bytes: int = 32 << 20


class TableMemory(Protocol):
    """Where the rows of a conditioning table lie.

    ``capacity`` is how many there may be; ``granule``: a call of ``fill`` starts at a multiple of it.
    """

    capacity: int
    granule: int

    def fill(self, conditions: Sequence[Condition], first: int) -> None:
        """Compute rows into their places, from ``first``."""
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


def bytes_of_row(spec: TensorSpec) -> int:
    """Bytes of a row of the conditioning table."""
    return np.dtype(spec.dtype).itemsize * math.prod(int(axis) for axis in spec.shape[1:])


def inputs_from_conditions(conditions: Sequence[Condition]) -> dict[str, NDArray[Any]]:
    """Timesteps ``[R]`` and labels ``[R]``."""
    return {
        "timesteps": np.array([time for time, _ in conditions], np.float32),
        "labels": np.array([label for _, label in conditions], np.int32),
    }
