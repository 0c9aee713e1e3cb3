"""Our own check of an ONNX file's external data, before any library follows its paths."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from dit_runtime.core.errors import BundleError

if TYPE_CHECKING:
    import onnx


def check_external_data(onnx_path: Path) -> None:
    """Every weight of the graph lies inside its folder, in a regular file, within that file's length.

    Raises:
        BundleError: a location that is absolute, climbs out, is a link or has other names, or a range past the end.
    """
    import onnx

    folder = onnx_path.parent
    model = onnx.load(onnx_path, load_external_data=False)
    sizes: dict[str, int] = {}
    for tensor in _tensors(model.graph):
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        entries = {entry.key: entry.value for entry in tensor.external_data}
        location = entries.get("location", "")
        if location not in sizes:
            sizes[location] = _checked_size(onnx_path, folder, location)
        offset, length = int(entries.get("offset", 0)), int(entries.get("length", 0))
        if offset < 0 or length < 0 or offset + length > sizes[location]:
            raise BundleError(
                f"{onnx_path}: weight {tensor.name!r} ends at byte {offset + length} of {location}, which has "
                f"{sizes[location]}; copy or export the bundle again"
            )


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """Every tensor that a graph holds: initializers, and those in its nodes' attributes and subgraphs."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)
            for inner in (attribute.g, *attribute.graphs):
                yield from _tensors(inner)


def _checked_size(onnx_path: Path, folder: Path, location: str) -> int:
    parts = PurePosixPath(location).parts
    path = folder / location
    if len(parts) != 1 or location in ("", ".", "..") or "\\" in location:
        raise BundleError(f"{onnx_path}: weights at {location!r}, expected a file beside it; this bundle is not ours")
    if path.is_symlink() or not path.is_file() or path.stat().st_nlink != 1:
        raise BundleError(f"{path}: not a plain file of its own; copy or export the bundle again")
    return path.stat().st_size
