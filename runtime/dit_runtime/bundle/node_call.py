"""A node of a graph whose shapes are asked for, and what it makes."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from dit_runtime.core.decode import DecodeError

Shape = tuple[int, ...]
Numbers = tuple[float, ...]


class MisfitError(DecodeError):
    """Inputs do not fit a node. The message does not name the node."""


@dataclass(frozen=True)
class Sized:
    """A tensor's shape, and its numbers where they are constants or sizes; None where they are not known."""

    shape: Shape
    numbers: Numbers | None = None

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Call:
    """A node whose shapes are asked for.

    Attributes:
        operator: its kind.
        inputs: by place; None is an input that is left out.
        outputs: how many it has.
        numbers: its attributes that are a whole number.
        lists: those that are a list of whole numbers.
        texts: those that are text.
    """

    operator: str
    inputs: tuple[Sized | None, ...]
    outputs: int = 1
    numbers: dict[str, int] = field(default_factory=dict)
    lists: dict[str, tuple[int, ...]] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)

    def shape(self, place: int) -> Shape:
        """The shape of an input."""
        return self._sized(place).shape

    def known(self, place: int) -> Numbers | None:
        """The numbers of an input; None where it is left out. Raises MisfitError where they are not known."""
        if place >= len(self.inputs) or self.inputs[place] is None:
            return None
        numbers = self._sized(place).numbers
        if numbers is None:
            raise MisfitError(f"its input {place} is not put together from constants and sizes")
        return numbers

    def sizes(self, place: int) -> tuple[int, ...]:
        """The whole numbers of an input that must be there."""
        found = self.known(place)
        if found is None or not all(math.isfinite(number) for number in found):
            raise MisfitError(f"its input {place} is missing or not finite")
        return tuple(int(number) for number in found)

    def axis(self, place: int, default: int) -> int:
        """The axis that the attribute names, of an input."""
        return checked_axis(self.numbers.get("axis", default), len(self.shape(place)))

    def _sized(self, place: int) -> Sized:
        found = self.inputs[place] if place < len(self.inputs) else None
        if found is None:
            raise MisfitError(f"its input {place} is missing")
        return found


@dataclass(frozen=True)
class Made:
    """What a node makes: its outputs, and the multiply-adds that it takes."""

    outputs: tuple[Sized, ...]
    macs: int = 0


def checked_axis(axis: int, rank: int) -> int:
    """An axis counted from the first. Raises MisfitError where there is none."""
    if not -rank <= axis < rank:
        raise MisfitError(f"axis {axis} of {rank}")
    return axis % rank
