"""Checks a bundle's ONNX file before any library reads the file or follows the paths in it.

A file is refused when it holds anything that ``dit-export`` does not write. So no loop in it can run for ever, and no
weight can lie anywhere else than in the bytes whose hash the manifest has.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePosixPath

from dit_runtime.bundle.graph_nodes import read_checked_tensors
from dit_runtime.bundle.graph_size import check_size
from dit_runtime.bundle.manifest import GraphSpec, Manifest, TensorSpec
from dit_runtime.bundle.onnx_reader import Reader, StoredTensor
from dit_runtime.bundle.tensor_places import check_tensor
from dit_runtime.core.decode import DecodeError


def check_graph(content: bytes, spec: GraphSpec, weights_bytes: int, manifest: Manifest) -> None:
    """Check an ONNX file's content before a library reads it.

    Args:
        content: of the file.
        spec: what the manifest says about the graph.
        weights_bytes: size of the file ``spec.weights``.
        manifest: of the bundle; its sizes bound what the graph may compute (``graph_size``).

    Raises:
        DecodeError: the content is damaged, its inputs and outputs are not the manifest's, or a tensor does not lie
            wholly in this file or in ``spec.weights`` beside it, or the graph asks for too much work or memory.
    """
    reader = Reader(content)
    graph = reader.read_graph()
    for kind, tensors in (("input", spec.inputs), ("output", spec.outputs)):
        found = [reader.read_value(span) for span in graph[kind]]
        if expected := _find_other(found, tensors):
            raise DecodeError(f"{kind}s: got {_show(found)}, expected {expected}")
    beside = PurePosixPath(spec.weights)
    location = beside.name if beside.parent == PurePosixPath(spec.file).parent else None
    left = weights_bytes
    for tensor in read_checked_tensors(reader, graph):
        check_tensor(tensor, location, weights_bytes)
        left -= tensor.size_bytes if tensor.external else 0
    if left < 0:
        raise DecodeError(f"its tensors take {-left} bytes more than the {weights_bytes} of {location!r:.80}")
    check_size(reader, graph, spec.inputs, manifest)


def read_tensors(content: bytes) -> Iterator[StoredTensor]:
    """Every tensor of an ONNX file: initializers, then those in its nodes' attributes. Raises DecodeError."""
    reader = Reader(content)
    yield from read_checked_tensors(reader, reader.read_graph())


def _find_other(found: list[tuple[str, str]], expected: tuple[TensorSpec, ...]) -> str:
    """What was expected, where the found names and dtypes are others."""
    wanted = [(tensor.name, tensor.dtype) for tensor in expected]
    return "" if sorted(found) == sorted(wanted) else _show(wanted)


def _show(tensors: list[tuple[str, str]]) -> str:
    return ", ".join(f"{name!r:.40} {dtype:.20}" for name, dtype in tensors[:12]) or "none"
