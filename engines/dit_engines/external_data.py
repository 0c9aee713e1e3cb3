"""A check of an ONNX file's external data, before any library follows the paths in it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from dit_runtime.core.errors import BundleError

if TYPE_CHECKING:
    import onnx


def check_external_data(onnx_path: Path) -> None:
    """Check that every weight of the graph lies in a plain file beside the ONNX file, within the file's length.

    Raises:
        BundleError: a weight's location is absolute, leads to another folder or is a link, or its range ends past the
            end of the file.
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
            sizes[location] = _size_of_weights(onnx_path, folder, location)
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


def _size_of_weights(onnx_path: Path, folder: Path, location: str) -> int:
    parts = PurePosixPath(location).parts
    path = folder / location
    if len(parts) != 1 or location in ("", ".", "..") or "\\" in location:
        raise BundleError(f"{onnx_path}: weights at {location!r}, expected a file beside it; export the bundle again")
    if path.is_symlink() or not path.is_file():
        raise BundleError(f"{path}: not a plain file; copy or export the bundle again")
    return path.stat().st_size
