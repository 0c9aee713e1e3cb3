"""Checks what a library returned: a graph may declare one shape and compute another."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from dit_runtime.backends.base import Array
from dit_runtime.bundle.manifest import GraphSpec
from dit_runtime.core.errors import EngineError

_QUOTIENT = re.compile(r"(\w+)//([1-9][0-9]{0,5})", re.ASCII)  # image_height//8


def check_outputs(
    what: str, spec: GraphSpec, inputs: Mapping[str, Array], names: Sequence[str], results: Sequence[Array]
) -> None:
    """Check the shapes of a call's outputs against the manifest.

    Args:
        what: engine and graph, for the message.
        spec: of the graph.
        inputs: what the graph was called with.
        names: the outputs that were asked for.
        results: one array for each name.

    Raises:
        EngineError: an output has another number of axes, or an axis of another size.
    """
    sizes: dict[str, int] = {}
    for tensor in spec.inputs:
        if tensor.name in inputs:
            pairs = zip(tensor.shape, inputs[tensor.name].shape, strict=False)
            sizes.update((axis, size) for axis, size in pairs if isinstance(axis, str))
    shapes = {tensor.name: tensor.shape for tensor in spec.outputs}
    for name, result in zip(names, results, strict=True):
        expected = [_size_of(axis, sizes) for axis in shapes[name]]
        if len(expected) != result.ndim or any(
            wanted is not None and wanted != size for wanted, size in zip(expected, result.shape, strict=True)
        ):
            wanted = ", ".join(map(str, shapes[name]))
            raise EngineError(
                f"{what}: output {name} is {list(result.shape)}, expected [{wanted}]; copy or export the bundle again"
            )


def _size_of(axis: int | str, sizes: Mapping[str, int]) -> int | None:
    """The size of an axis of the manifest, such as ``8*height`` or ``image_height//8``; None where it is not known."""
    if isinstance(axis, int):
        return axis
    if (quotient := _QUOTIENT.fullmatch(axis)) is not None:
        return sizes[quotient[1]] // int(quotient[2]) if quotient[1] in sizes else None
    size = 1
    for part in axis.split("*"):
        if part not in sizes and not (part.isascii() and part.isdecimal() and len(part) < 7):
            return None
        size *= sizes[part] if part in sizes else int(part)
    return size
