"""How much device memory sampling needs. It is computed before anything is built or loaded.

The conditioner runs before the loop and is then freed. Step and decoder stay on the device, and share one memory block
for their activations. So the need is the larger of two sums: the conditioner's, and the loop's. The conditioning table
and the tensors between the graphs are part of both. ``dit-build`` asks for this need. A built engine can run with less
memory, with one graph's weights on the device at a time; it is refused only where even that does not fit.
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
from dit_runtime.samplers.by_name import count_default_steps

# Memory that sampling must leave to others, in bytes. On a Jetson the system, its desktop and the CUDA context use the
# same memory; on a card only the context and the library do. Assumed, not measured: the driver's figure of free memory
# is better, where there is a driver.
SYSTEM_BYTES = 2_000_000_000
CONTEXT_BYTES = 500_000_000
MOST_TRIED = 4096  # the largest batch that is offered in place of one that does not fit


@dataclass(frozen=True)
class Need:
    """The device memory that sampling needs, in bytes.

    Attributes:
        weights, activations: of the graphs that are on the device at the same time.
        table: the conditioning table.
        buffers: the other tensors between the graphs.
        estimated: whether the figures are estimates from before the first build, not the builder's own.
    """

    weights: int
    activations: int
    table: int
    buffers: int
    estimated: bool = False

    @property
    def total(self) -> int:
        return self.weights + self.activations + self.table + self.buffers

    def describe(self) -> str:
        """Describe as ``1.12 GB (weights 993 MB, activations 92 MB, conditioning table 39 MB, tensors 1 MB)``."""
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
    """The memory that sampling needs with these plans.

    Args:
        manifest: of the bundle at the size in use.
        graphs: the plans of conditioner, step and, but for a policy, decoder.
        batch: images in one call.
        branches: guidance branches.
        rows: rows of the conditioning table.
        estimated: whether the plans' figures are estimates.
        in_turns: whether only one graph's weights are on the device at a time, as where memory is short.

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
    decoder, decoder_weights, decoded = 0, 0, 0
    if manifest.has_decoder:
        decoder = max(_activations_at(graphs["decoder"], batch, manifest))
        decoder_weights = graphs["decoder"].weights_bytes
        decoded = _count_bytes(manifest.graphs["decoder"], sizes, manifest)
    table = _count_bytes(manifest.graphs["conditioner"], sizes, manifest, manifest.table.name)
    weights = [graphs["step"].weights_bytes, decoder_weights]
    loop = Need(
        weights=max(weights) if in_turns else sum(weights),
        activations=max(min(memory[fit.profile] for fit in fits), decoder),
        table=table,
        buffers=_count_bytes(step, sizes, manifest) - table + decoded,
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
    """Bytes of activations of each decoder profile that takes the batch; of all profiles where none takes it.

    In the second case the batch is decoded in parts.
    """
    profiles = decoder.profiles_of(manifest.graphs["decoder"])
    return profiles.values_at(batch, decoder.activation_bytes) or list(decoder.activation_bytes)


def estimate_available_bytes(memory_bytes: int, shared: bool, free_bytes: int | None = None) -> int:
    """The memory of a device that sampling may take, in bytes.

    Args:
        memory_bytes: all memory of the device.
        shared: whether the device shares the system's memory, as on a Jetson.
        free_bytes: the driver's figure of free memory, with a CUDA context open; None where there is no driver.
    """
    if free_bytes is not None:
        return free_bytes
    return max(memory_bytes - (SYSTEM_BYTES if shared else CONTEXT_BYTES), 0)


def check_fits(need_at: Callable[[int], Need], batch: int, available: int) -> Need:
    """Check that the need of a batch fits in the available memory, and return the need.

    Args:
        need_at: the need of a batch; a larger batch does not need less.
        batch: the batch to check.
        available: bytes that sampling may take.

    Raises:
        EngineError: the batch does not fit. The message has both figures, and the largest batch that fits.
    """
    need = need_at(batch)
    if need.total <= available:
        return need

    def fits(size: int) -> bool:
        try:
            return need_at(size).total <= available
        except EngineError:  # no profile takes so small a batch
            return False

    smaller = next((size for size in range(min(batch - 1, MOST_TRIED), 0, -1) if fits(size)), None)
    if smaller is None:
        advice = "not even batch 1 fits; decode in tiles (--decode-tile), or make smaller images"
    else:
        advice = f"batch {smaller} fits ({describe_bytes(need_at(smaller).total)})"
    raise EngineError(
        f"batch {batch} needs {need.describe()} of the GPU's memory, and {describe_bytes(available)} are available; "
        f"{advice}"
    )


def available_bytes_of(facts: DeviceFacts) -> int:
    """The memory of a GPU of this machine that sampling may take, in bytes, by the driver's figure."""
    return estimate_available_bytes(facts.memory_bytes, facts.integrated, facts.free_bytes)


def check_engine(manifest: Manifest, stored: StoredEngine, available: int, batch: int | None = None) -> None:
    """Check before an engine is loaded that the device has memory for a batch.

    Args:
        manifest: of the bundle at the size in use.
        stored: the engine.
        available: bytes that sampling may take of the device.
        batch: images in one call, with a conditioning table for one step; None is the smallest batch of the profiles,
            with a conditioning table for the bundle's default steps.

    Raises:
        EngineError: the batch does not fit. The message has the need by the builder's figures, and the device's memory.
    """
    if not {"conditioner", "step", *(["decoder"] if manifest.has_decoder else [])} <= stored.graphs.keys():
        return  # the call that needs the missing plan raises the error
    ranges = stored.graphs["step"].profiles_of(manifest.graphs["step"]).ranges()
    taking = [
        (max(batch or 1, each.least[0]), each.least[1])  # padded up to the profile's least batch
        for each in ranges
        if (batch or 1) <= each.largest[0]
    ]
    if not taking:
        return  # the call with a batch that no profile takes raises the error
    size, branches = min(taking)
    most = min(stored.graphs["step"].profiles_of(manifest.graphs["step"]).largest_sizes("rows"))
    defaults, steps = manifest.defaults, 1
    if batch is None:
        steps = count_default_steps(defaults.sampler, manifest.model, manifest.diffusion, defaults.steps)

    def need_at(size: int) -> Need:
        rows = min(most, (size + branches - 1) * steps)
        return need_of(manifest, stored.graphs, size, branches, rows, in_turns=True)

    try:
        check_fits(need_at, size, available)
    except EngineError as error:
        raise EngineError(f"{stored.folder}: {error}") from error


def describe_bytes(size: int) -> str:
    """Describe bytes as ``92 MB`` or ``1.12 GB``: 10⁶ and 10⁹ bytes."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def _count_bytes(graph: GraphSpec, sizes: Mapping[str, int], manifest: Manifest, only: str | None = None) -> int:
    """Bytes of all inputs and outputs of a graph, or of the one named ``only``."""
    shapes = _shapes_of(graph, sizes, manifest)
    tensors = [tensor for tensor in (*graph.inputs, *graph.outputs) if only in (None, tensor.name)]
    return sum(math.prod(shapes[tensor.name]) * np.dtype(tensor.dtype).itemsize for tensor in tensors)


def _shapes_of(graph: GraphSpec, sizes: Mapping[str, int], manifest: Manifest) -> dict[str, Shape]:
    height, width = manifest.model.latent_size
    image_height, image_width = manifest.image_size
    axes = {"height": height, "width": width, "image_height": image_height, "image_width": image_width}
    return shapes_of_tensors((*graph.inputs, *graph.outputs), {**sizes, **axes})
