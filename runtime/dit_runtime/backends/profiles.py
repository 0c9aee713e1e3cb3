"""The optimization profiles of a built graph: the shapes that it takes, and the profile for a call."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from dit_runtime.bundle.manifest import TensorSpec

Shape = tuple[int, ...]
Profile = Mapping[str, tuple[Shape, Shape, Shape]]  # for each input, its least, usual and largest shape
BatchShape = tuple[int, int]  # batch (or rows of the conditioning table) and guidance branches

# Axes that may be padded with zeros: an added image, branch or row changes no other.
PADDED = ("batch", "branches", "rows")


class Fit(NamedTuple):
    """A profile for a call: its index, and the inputs' shapes padded up to the profile's least shapes."""

    profile: int
    shapes: dict[str, Shape]

    @property
    def volume(self) -> int:
        """The number of values in all inputs together."""
        return sum(math.prod(shape) for shape in self.shapes.values())


class Range(NamedTuple):
    """The least, usual and largest (batch, branches) of one profile."""

    least: BatchShape
    usual: BatchShape
    largest: BatchShape

    def takes(self, batch: int) -> bool:
        """Whether the profile takes the batch without padding."""
        return self.least[0] <= batch <= self.largest[0]


@dataclass(frozen=True)
class Profiles:
    """The optimization profiles of one graph.

    Attributes:
        inputs: the graph's inputs, whose axes have the manifest's names.
        shapes: for each profile, the least, usual and largest shape of each input.
    """

    inputs: tuple[TensorSpec, ...]
    shapes: tuple[Profile, ...]

    def ranges(self) -> list[Range]:
        """(batch, branches) of each profile.

        The batch of the conditioner is its number of rows. An axis that the graph does not have counts as 1.
        """
        found = []
        for profile in self.shapes:
            points = [
                (self._size_of(profile, ("batch", "rows"), at), self._size_of(profile, ("branches",), at))
                for at in range(3)
            ]
            found.append(Range(*points))
        return found

    def _size_of(self, profile: Profile, axes: Iterable[str], point: int) -> int:
        for axis in axes:
            for tensor in self.inputs:
                if axis in tensor.shape:
                    return profile[tensor.name][point][tensor.shape.index(axis)]
        return 1

    def largest_sizes(self, axis: str) -> list[int]:
        """The largest size of a named axis in each profile, for an axis that an input has."""
        tensor = next(tensor for tensor in self.inputs if axis in tensor.shape)
        return [profile[tensor.name][2][tensor.shape.index(axis)] for profile in self.shapes]

    def values_at(self, batch: int, values: Sequence[int]) -> list[int]:
        """Of one value for each profile, those of the profiles that take the batch."""
        return [value for value, each in zip(values, self.ranges(), strict=True) if each.takes(batch)]

    @property
    def largest_batch(self) -> int:
        """The most images, or rows of the conditioner, that one call takes in any profile."""
        return max(each.largest[0] for each in self.ranges())

    def has_branches(self, count: int) -> bool:
        """Whether any profile takes ``count`` guidance branches."""
        return any(each.largest[1] >= count for each in self.ranges())

    def find_fits(self, shapes: Mapping[str, Shape], padded: Collection[str] = ()) -> list[Fit]:
        """Find the profiles that take inputs of these shapes, in their order.

        Args:
            shapes: by input; inputs that are not named are not compared.
            padded: the axes of ``PADDED`` that may be padded up to a profile's least shape.
        """
        found = []
        for index, profile in enumerate(self.shapes):
            filled = {
                tensor.name: _pad(shapes[tensor.name], profile[tensor.name][0], tensor, padded)
                for tensor in self.inputs
                if tensor.name in shapes
            }
            if all(_is_within(shape, profile[name]) for name, shape in filled.items()):
                found.append(Fit(index, filled))
        return found

    def find_fit(
        self, shapes: Mapping[str, Shape], memory: Sequence[int], padded: Collection[str] = PADDED
    ) -> Fit | None:
        """Find the profile that takes inputs of these shapes with the least padding, then with the least memory.

        Args:
            shapes: by input; inputs that are not named are not compared.
            memory: bytes of each profile's activations.
            padded: the axes of ``PADDED`` that may be padded up to a profile's least shape.

        Returns:
            None where no profile takes the shapes.
        """
        return min(self.find_fits(shapes, padded), key=lambda fit: (fit.volume, memory[fit.profile]), default=None)

    def describe(self, shapes: Mapping[str, tuple[Shape, Shape]]) -> str:
        """Describe the dynamic axes between a least and a largest shape of each input: ``batch 2 to 4, branches 2``."""
        sizes: dict[str, str] = {}
        for tensor in self.inputs:
            least, largest = shapes[tensor.name]
            if len(least) != len(tensor.shape):
                sizes[tensor.name] = str(list(least))
                continue
            for axis, low, high in zip(tensor.shape, least, largest, strict=True):
                if isinstance(axis, str):
                    sizes[axis] = str(low) if low == high else f"{low} to {high}"
        return ", ".join(f"{axis} {size}" for axis, size in sizes.items())


def _pad(shape: Shape, least: Shape, tensor: TensorSpec, padded: Collection[str]) -> Shape:
    """The shape with its padded axes at least as long as in ``least``. A shape of another rank is left as it is."""
    if len(shape) != len(tensor.shape):
        return shape
    return tuple(
        max(size, low) if axis in padded else size for size, low, axis in zip(shape, least, tensor.shape, strict=True)
    )


def _is_within(shape: Shape, points: tuple[Shape, Shape, Shape]) -> bool:
    least, _, largest = points
    return len(shape) == len(least) and all(
        low <= size <= high for low, size, high in zip(least, shape, largest, strict=True)
    )


def shapes_of_tensors(tensors: Iterable[TensorSpec], sizes: Mapping[str, int]) -> dict[str, Shape]:
    """The shapes of tensors by name, for these sizes of the axes. An axis may be a product, such as ``8*height``."""

    def size(axis: int | str) -> int:
        return math.prod(int(part) if part.isdecimal() else sizes[part] for part in str(axis).split("*"))

    return {tensor.name: tuple(map(size, tensor.shape)) for tensor in tensors}
