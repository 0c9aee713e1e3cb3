"""Bounds of the work and memory that a graph asks for, by its own weights and the size of an image.

All shapes of a graph follow from those of its inputs (``graph_shapes``). They are found for one image, one branch and
one row of the conditioning table, and again for ``MANY`` of each: what grows faster than the product of two of them
would be found then. With that, a graph computes no more for an image than a model of as many weights can ask for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dit_runtime.bundle.graph_shapes import shapes_of_node
from dit_runtime.bundle.manifest import Manifest, TensorSpec
from dit_runtime.bundle.node_call import Call, MisfitError, Sized
from dit_runtime.bundle.onnx_reader import Reader, Span, Values, first_of
from dit_runtime.core.decode import DecodeError

MANY = 1024
COUNTED = ("batch", "branches", "rows")  # the axes that are no sizes of an image
MOST_CHANNELS = 1024  # of a tensor with an image's height and width: an autoencoder has 256


@dataclass(frozen=True)
class _Bounds:
    """What a graph may ask for, for each image: elements of a tensor, multiply-adds, elements made of constants."""

    elements: int
    macs: int
    fixed: int


def check_size(reader: Reader, graph: Values, inputs: Sequence[TensorSpec], manifest: Manifest) -> None:
    """Check what a graph computes, after its nodes were checked (``graph_nodes``).

    Raises:
        DecodeError: a shape does not follow from the inputs' sizes, or the work or a tensor is beyond the bounds.
    """
    constants = {}
    for span in graph["initializer"]:
        tensor = reader.read_tensor(span)
        constants[tensor.name] = _constant_at(reader, span)
    nodes = [node for span in graph["node"] if (node := _read_node(reader, span, constants)) is not None]
    bounds = _bounds_for(manifest, sum(constant.elements for constant in constants.values()))
    named = {axis for tensor in inputs for axis in tensor.shape if axis in COUNTED}
    for count in (1, MANY):
        sizes = _axes_of(manifest, count)
        given = {
            tensor.name: Sized(tuple(sizes[axis] if isinstance(axis, str) else axis for axis in tensor.shape))
            for tensor in inputs
        }
        _follow(nodes, constants, given, bounds, count ** min(len(named), 2))


def _largest_size(manifest: Manifest) -> tuple[int, int]:
    """Height and width in latent pixels that no size of the bundle exceeds."""
    heights, widths = zip(*manifest.sizes, strict=True)
    return max(heights), max(widths)


def _bounds_for(manifest: Manifest, weights: int) -> _Bounds:
    """The bounds of a graph with so many weights.

    Each weight is used once for each pixel of an image at most, as in an autoencoder's last convolution. Attention
    compares at most each latent pixel with each other one.
    """
    model = manifest.model
    latent_pixels = math.prod(_largest_size(manifest))
    pixels, pairs = latent_pixels * manifest.autoencoder.factor**2, latent_pixels**2
    return _Bounds(
        elements=max(weights, MOST_CHANNELS * pixels, model.heads * pairs),
        macs=2 * weights * pixels + 4 * model.depth * model.width * pairs,
        fixed=4 * weights,
    )


def _axes_of(manifest: Manifest, count: int) -> dict[str, int]:
    """The size of every axis that has a name in the manifest, with ``count`` images, branches and rows."""
    (height, width), factor = _largest_size(manifest), manifest.autoencoder.factor
    image = {"height": height, "width": width, "image_height": height * factor, "image_width": width * factor}
    return {**dict.fromkeys(COUNTED, count), **image}


@dataclass(frozen=True)
class _Node:
    """A node that is no Constant."""

    name: str
    operator: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    numbers: dict[str, int]
    lists: dict[str, tuple[int, ...]]
    texts: dict[str, str]


def _read_node(reader: Reader, span: Span, constants: dict[str, Sized]) -> _Node | None:
    """Read a node; a Constant's tensor is put among the constants."""
    node, attributes = reader.read_node(span)
    if node["op_type"] == ["Constant"]:
        place = next(each["t"][0] for each in attributes if each["t"])
        constants[node["output"][0]] = _constant_at(reader, place)
        return None

    def named(kind: str, value: Callable[[Any], Any]) -> dict[str, Any]:
        return {first_of(each, "name", ""): value(each[kind]) for each in attributes if each[kind]}

    return _Node(
        name=first_of(node, "name", ""),
        operator=node["op_type"][0],
        inputs=tuple(node["input"]),
        outputs=tuple(name for name in node["output"] if name),
        numbers=named("i", lambda found: found[0]),
        lists=named("ints", tuple),
        texts=named("s", lambda found: reader.read_text(found[0])),
    )


def _constant_at(reader: Reader, span: Span) -> Sized:
    """A stored tensor, with its numbers where it is a short list of sizes or scales."""
    tensor = reader.read_tensor(span)
    if len(tensor.shape) > 1 or tensor.dtype not in ("int64", "int32", "float32"):
        return Sized(tensor.shape)
    numbers = reader.read_values(span)
    return Sized(tensor.shape, tuple(numbers) if len(numbers) == math.prod(tensor.shape) else None)


def _follow(
    nodes: Sequence[_Node], constants: Mapping[str, Sized], inputs: Mapping[str, Sized], bounds: _Bounds, images: int
) -> None:
    """Follow the shapes through all nodes; ``images`` is how many times the bounds there are."""
    made, fixed = {**constants, **inputs}, set(constants)
    macs = of_constants = 0
    for node in nodes:
        what = f"node {node.name!r:.60}"
        known = tuple(made[name] if name else None for name in node.inputs)
        try:
            found = shapes_of_node(Call(node.operator, known, len(node.outputs), node.numbers, node.lists, node.texts))
        except MisfitError as error:
            raise DecodeError(f"{what} ({node.operator}) does not fit its inputs: {error}") from error
        if (largest := max(each.elements for each in found.outputs)) > bounds.elements * images:
            raise DecodeError(f"{what} makes {largest} elements, expected at most {bounds.elements * images}")
        if (macs := macs + found.macs) > bounds.macs * images:
            raise DecodeError(f"{macs} multiply-adds up to {what}, expected at most {bounds.macs * images} in all")
        if fixed.issuperset(name for name in node.inputs if name):
            fixed.update(node.outputs)
            of_constants += sum(each.elements for each in found.outputs)
            if found.macs or of_constants > bounds.fixed:
                raise DecodeError(f"{what} computes {of_constants} elements of constants, expected to be stored")
        made.update(zip(node.outputs, found.outputs, strict=True))
