"""How much of a device's memory sampling needs, by arithmetic, asked before anything is built or loaded.

The conditioner runs before the loop and is freed; step and decoder stay, and share one buffer for their activations. So
the need is the larger of conditioner and loop; the conditioning table and the tensors between the graphs are in both.
That is what a build asks for. An engine that is there runs with less, where weights take turns on the device, and is
refused only where that does not fit either.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from dit_runtime.backends.profiles import Shape, shapes_of_tensors
from dit_runtime.backends.tensorrt.cuda import DeviceFacts
from dit_runtime.backends.tensorrt.store import StoredEngine, StoredGraph
from dit_runtime.bundle.manifest import GraphSpec, Manifest
from dit_runtime.core.errors import EngineError

# What is left to others, in bytes: on a Jetson the system, its desktop and the CUDA context live in the same memory; on
# a card it is the context and the library alone. Assumed, not measured: a free figure of the driver's is better.
SYSTEM_BYTES = 2_000_000_000
CONTEXT_BYTES = 500_000_000


@dataclass(frozen=True)
class Need:
    """Bytes of device memory: ``estimated`` where no builder has given its figures yet."""

    weights: int
    activations: int
    table: int
    buffers: int
    estimated: bool = False

    @property
    def total(self) -> int:
        return self.weights + self.activations + self.table + self.buffers

    def describe(self) -> str:
        """``1.12 GB (weights 993 MB, activations 92 MB, conditioning table 39 MB, tensors 1 MB)``."""
        parts = {
            "weights": self.weights,
            "activations": self.activations,
            "conditioning table": self.table,
            "tensors": self.buffers,
        }
        text = ", ".join(f"{name} {describe_bytes(size)}" for name, size in parts.items())
        return (
            f"{describe_bytes(self.total)} ({text}{'; an estimate before the first build' if self.estimated else ''})"
        )


def need_of(
    manifest: Manifest,
    graphs: Mapping[str, StoredGraph],
    batch: int,
    branches: int,
    rows: int,
    *,
    estimated: bool = False,
    in_turns: bool = False,
) -> Need:
    """What sampling needs with these plans.

    Args:
        manifest: the bundle's, at the size in use.
        graphs: plans by graph: conditioner, step and decoder.
        batch: images in a call.
        branches: guidance branches.
        rows: of the conditioning table.
        estimated: whether the plans' figures are.
        in_turns: with no more than one graph's weights on the device at once, as where memory is short.

    Raises:
        EngineError: the step has no optimization profile for the batch and branches.
    """
    sizes = {"batch": batch, "branches": branches, "rows": rows}
    step = manifest.graphs["step"]
    shapes = _shapes_of(step, sizes, manifest)
    del shapes[manifest.table.name]
    memory = graphs["step"].activation_bytes
    fits = graphs["step"].profiles_of(step).find_fits(shapes)
    if not fits:
        raise EngineError(f"no optimization profile of the step takes batch {batch} with {branches} branches")
    decoder = max(_activations_at(graphs["decoder"], batch, manifest))
    table = _count_bytes(manifest.graphs["conditioner"], sizes, manifest, manifest.table.name)
    weights = [graphs["step"].weights_bytes, graphs["decoder"].weights_bytes]
    loop = Need(
        weights=max(weights) if in_turns else sum(weights),
        activations=max(min(memory[fit.profile] for fit in fits), decoder),
        table=table,
        buffers=_count_bytes(step, sizes, manifest) - table + _count_bytes(manifest.graphs["decoder"], sizes, manifest),
        estimated=estimated,
    )
    before = Need(
        weights=graphs["conditioner"].weights_bytes,
        activations=max(graphs["conditioner"].activation_bytes),
        table=table,
        buffers=_count_bytes(manifest.graphs["conditioner"], sizes, manifest) - table,
        estimated=estimated,
    )
    return max(loop, before, key=lambda need: need.total)


def _activations_at(decoder: StoredGraph, batch: int, manifest: Manifest) -> list[int]:
    """Activations of the decoder's profiles that take the batch; those of all of them where it is decoded in parts."""
    ranges = decoder.profiles_of(manifest.graphs["decoder"]).ranges()
    taken = [size for each, size in zip(ranges, decoder.activation_bytes, strict=True) if each.takes(batch)]
    return taken or list(decoder.activation_bytes)


def estimate_available_bytes(memory_bytes: int, shared: bool, free_bytes: int | None = None) -> int:
    """What sampling may take of a device.

    Args:
        memory_bytes: all of the device's.
        shared: with the system, as on a Jetson.
        free_bytes: the driver's figure, with the CUDA context in being; None where it was not asked.
    """
    if free_bytes is not None:
        return free_bytes
    return max(memory_bytes - (SYSTEM_BYTES if shared else CONTEXT_BYTES), 0)


def check_fits(need_at: Callable[[int], Need], batch: int, available: int) -> Need:
    """The need at a batch, when it fits.

    Args:
        need_at: the need at a batch; not falling with it.
        batch: asked for.
        available: bytes of the device's memory.

    Raises:
        EngineError: it does not fit: both figures, and the largest batch that would.
    """
    need = need_at(batch)
    if need.total <= available:
        return need

    def fits(size: int) -> bool:
        try:
            return need_at(size).total <= available
        except EngineError:  # no profile takes so few
            return False

    smaller = next((size for size in range(batch - 1, 0, -1) if fits(size)), None)
    if smaller is None:
        advice = "not even batch 1 would; decode in tiles (--decode-tile), or make smaller images"
    else:
        advice = f"batch {smaller} would ({describe_bytes(need_at(smaller).total)})"
    raise EngineError(
        f"batch {batch} needs {need.describe()} of the GPU's memory, {describe_bytes(available)} can be had: it does not "
        f"fit, {advice}"
    )


def available_bytes_of(facts: DeviceFacts) -> int:
    """What sampling may take of a GPU that is here, by the driver's own figure."""
    return estimate_available_bytes(facts.memory_bytes, facts.integrated, facts.free_bytes)


def check_engine(manifest: Manifest, stored: StoredEngine, available: int, batch: int | None = None) -> None:
    """Say before an engine is loaded that a batch does not fit the device.

    Args:
        manifest: the bundle's, at the size in use.
        stored: the engine.
        available: bytes of the device's memory.
        batch: images in a call, with a table for one step at least; None is as few as the profiles take, with the
            bundle's usual steps.

    Raises:
        EngineError: the need by the builder's own figures, and what the device has.
    """
    if not {"conditioner", "step", "decoder"} <= stored.graphs.keys():
        return  # a missing plan is told where it is asked for
    ranges = stored.graphs["step"].profiles_of(manifest.graphs["step"]).ranges()
    taking = [
        (max(batch or 1, each.least[0]), each.least[1])  # filled up to the profile's least
        for each in ranges
        if (batch or 1) <= each.largest[0]
    ]
    if not taking:
        return  # so is a batch that no profile takes
    size, branches = min(taking)
    most = min(profile[manifest.table.name][2][0] for profile in stored.graphs["step"].profiles)
    steps = manifest.defaults.steps if batch is None else 1

    def need_at(size: int) -> Need:
        rows = min(most, (size + branches - 1) * steps)
        return need_of(manifest, stored.graphs, size, branches, rows, in_turns=True)

    try:
        check_fits(need_at, size, available)
    except EngineError as error:
        raise EngineError(f"{stored.folder}: {error}") from error


def describe_bytes(size: int) -> str:
    """Bytes as ``92 MB`` or ``1.12 GB``, of 10⁶ and 10⁹."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def _count_bytes(graph: GraphSpec, sizes: Mapping[str, int], manifest: Manifest, only: str | None = None) -> int:
    """Bytes of a graph's inputs and outputs, or of the one named."""
    shapes = _shapes_of(graph, sizes, manifest)
    tensors = [tensor for tensor in (*graph.inputs, *graph.outputs) if only in (None, tensor.name)]
    return sum(math.prod(shapes[tensor.name]) * np.dtype(tensor.dtype).itemsize for tensor in tensors)


def _shapes_of(graph: GraphSpec, sizes: Mapping[str, int], manifest: Manifest) -> dict[str, Shape]:
    height, width = manifest.model.latent_size
    image_height, image_width = manifest.image_size
    axes = {"height": height, "width": width, "image_height": image_height, "image_width": image_width}
    return shapes_of_tensors((*graph.inputs, *graph.outputs), {**sizes, **axes})
