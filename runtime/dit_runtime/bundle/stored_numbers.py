"""Reads the numbers that a bundle's graph stores, without ONNX's library."""

from __future__ import annotations

import numpy as np

from dit_runtime.bundle.onnx_reader import BITS, Reader
from dit_runtime.bundle.reader import Bundle
from dit_runtime.core.arrays import Array
from dit_runtime.core.errors import BundleError
from dit_runtime.core.reading import GRAPH_BYTES, FileError, open_file, read_file


def numbers_of_graph(bundle: Bundle, name: str) -> dict[str, Array]:
    """The initializers of a graph by name, FP8 as its bits; those of its weights file are mapped, and read when used.

    Raises:
        BundleError: a file of the graph is missing, altered or damaged.
    """
    spec = bundle.manifest.graphs[name]
    weights, path = bundle.file(spec.weights), bundle.structure(name)
    try:
        content = read_file(path, GRAPH_BYTES, within=bundle.path)
        with open_file(weights, None, within=bundle.path) as file:
            mapped = np.memmap(file, np.uint8, "r")
    except (FileError, OSError, ValueError) as error:
        raise BundleError(f"{path}: cannot be read ({error}); copy or export the bundle again") from error
    found: dict[str, Array] = {}
    reader = Reader(content)
    for span in reader.read_graph()["initializer"]:
        tensor = reader.read_tensor(span)
        if tensor.dtype == "bfloat16":
            continue
        if tensor.external:
            places = dict(tensor.external)
            start = int(places["offset"])
            flat = mapped[start : start + tensor.size_bytes]
        else:
            flat = np.frombuffer(reader.read_bytes(span), np.uint8)
        found[tensor.name] = flat.view(BITS.get(tensor.dtype, tensor.dtype)).reshape(tensor.shape)
    return found
