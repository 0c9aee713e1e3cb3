"""Which shapes a built graph takes: its optimization profiles, and the profile for a call."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from dit_runtime.bundle.manifest import TensorSpec

Shape = tuple[int, ...]
Profile = Mapping[str, tuple[Shape, Shape, Shape]]  # of each input, the least, usual and largest shape
BatchShape = tuple[int, int]  # batch (or rows of the conditioning table) and guidance branches

# Axes that may be longer than what is asked for: an image, branch or row of zeros changes no other.
PADDED = ("batch", "branches", "rows")


class Fit(NamedTuple):
    """An optimization profile for a call, and the inputs' shapes in that profile: padded up to the profile's least."""

    profile: int
    shapes: dict[str, Shape]

    @property
    def volume(self) -> int:
        """How many numbers the inputs have in all."""
        return sum(math.prod(shape) for shape in self.shapes.values())


class Range(NamedTuple):
    """The least, usual and largest (batch, branches) of a profile."""

    least: BatchShape
    usual: BatchShape
    largest: BatchShape

    def takes(self, batch: int) -> bool:
        """Whether the batch is within the profile, without padding."""
        return self.least[0] <= batch <= self.largest[0]


@dataclass(frozen=True)
class Profiles:
    """The optimization profiles of one graph.

    Attributes:
        inputs: of the graph, as the manifest names their axes.
        shapes: for each profile the least, usual and largest shape of each input.
    """

    inputs: tuple[TensorSpec, ...]
    shapes: tuple[Profile, ...]

    def ranges(self) -> list[Range]:
        """(batch, branches) of each profile: rows in place of the conditioner's batch, and 1 for no axis."""
        found = []
        for profile in self.shapes:
            points = [
                (self._size(profile, ("batch", "rows"), at), self._size(profile, ("branches",), at)) for at in range(3)
            ]
            found.append(Range(*points))
        return found

    def _size(self, profile: Profile, axes: Iterable[str], point: int) -> int:
        for axis in axes:
            for tensor in self.inputs:
                if axis in tensor.shape:
                    return profile[tensor.name][point][tensor.shape.index(axis)]
        return 1

    @property
    def largest_batch(self) -> int:
        """The most images (or conditioner's rows) that any profile takes at once."""
        return max(each.largest[0] for each in self.ranges())

    def has_branches(self, count: int) -> bool:
        """Whether a profile takes so many guidance branches."""
        return any(each.largest[1] >= count for each in self.ranges())

    def fits(self, shapes: Mapping[str, Shape], padded: Collection[str] = ()) -> list[Fit]:
        """The profiles that take inputs of these shapes, in their order.

        Args:
            shapes: of the inputs that matter; the others are left out of the comparison.
            padded: axes that are padded up to a profile's least, of ``PADDED``.
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

    def fit(self, shapes: Mapping[str, Shape], memory: Sequence[int], padded: Collection[str] = PADDED) -> Fit | None:
        """The profile that takes inputs of these shapes with the least padding, then memory; None where none does.

        ``memory`` is each profile's, in bytes.
        """
        return min(self.fits(shapes, padded), key=lambda fit: (fit.volume, memory[fit.profile]), default=None)

    def describe(self, shapes: Mapping[str, tuple[Shape, Shape]]) -> str:
        """The dynamic axes between a least and a largest shape of each input: ``batch 2 to 4, branches 2``."""
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
    """A shape, its padded axes up to a profile's least; one of another rank as it is."""
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
    """The shapes of tensors whose axes have these sizes; an axis may be a product, such as ``8*height``."""

    def size(axis: int | str) -> int:
        return math.prod(int(part) if part.isdecimal() else sizes[part] for part in str(axis).split("*"))

    return {tensor.name: tuple(map(size, tensor.shape)) for tensor in tensors}
