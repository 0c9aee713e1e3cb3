"""A tensor of a weights file that is not in memory yet: what the file says about it, and how to read it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that is not in memory yet.

    Attributes:
        shape: its shape; the file holds as many numbers.
        read: reads it.
        place: the storage that holds it, and the first and the end of its numbers there; None if nothing is shared.
        problem: why it is no plain tensor of numbers (``a sparse tensor``); it cannot be read, and its shape means
            nothing.
    """

    shape: tuple[int, ...]
    read: Callable[[], Tensor]
    place: tuple[str, int, int] | None = None
    problem: str | None = None

    @property
    def count(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)


def stored_from_tensor(tensor: Tensor) -> StoredTensor:
    """A tensor that is already in memory, or mapped into it."""
    return StoredTensor(tuple(tensor.shape), lambda: tensor)


def unreadable_tensor(problem: str) -> StoredTensor:
    """A tensor that is no plain one, such as a sparse one."""

    def read() -> Tensor:
        raise ValueError(problem)

    return StoredTensor((), read, problem=problem)
