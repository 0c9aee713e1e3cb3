"""Graphs of a bundle as CUDA graphs: one for each key, such as a step's (batch, branches), with a context of its own.

A CUDA graph holds addresses. Before it is launched, its inputs are copied to these addresses. The last node of a step's
CUDA graph copies ``next_state`` over ``state``.
"""

from __future__ import annotations

import contextlib
import gc
import math
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

from dit_runtime.backends.profiles import BatchShape, Fit
from dit_runtime.backends.tensorrt import api as tensorrt_api
from dit_runtime.backends.tensorrt.buffers import Layout
from dit_runtime.backends.tensorrt.conditioning import DeviceTable
from dit_runtime.backends.tensorrt.context import Context
from dit_runtime.backends.tensorrt.device import Device

MOST_GRAPHS = 16  # of a plan for small batches; each holds some hundred nodes and a context
OF_A_BATCH = 2  # graphs of each batch: with guidance and without

Key = TypeVar("Key", bound=Hashable)
Addresses = Mapping[str, int]


@dataclass(frozen=True)
class _Prepared:
    """A graph of the bundle at one key: its context, and its CUDA graph; None where it is not captured."""

    context: Context
    graph: int | None


class Graphs(Generic[Key]):
    """Prepare a graph of the bundle for each key, and launch it. A caller of any method holds the device's lock.

    Args:
        device: that runs it.
        name: of the graph in the manifest.
        moves: how often each memory had moved whose address a CUDA graph holds.
        captured: whether CUDA graphs are captured.

    ``OF_A_BATCH`` for each batch that the profiles take stay prepared, and at least ``MOST_GRAPHS``.
    """

    def __init__(self, device: Device, name: str, moves: Callable[[], tuple[int, ...]], captured: bool = True) -> None:
        self._device, self._name, self._moves, self._captures = device, name, moves, captured
        self._prepared: OrderedDict[Key, _Prepared] = OrderedDict()
        self._valid_for: tuple[int, ...] | None = None

    @property
    def ready(self) -> list[Key]:
        """The keys that are prepared; the one used last is the last."""
        return list(self._prepared)

    def launch(self, key: Key, fit: Fit, addresses: Callable[[], Addresses], room: Callable[[], int]) -> None:
        """Queue the graph's work; prepare it first where it is not prepared for this key.

        Args:
            key: decides the shapes.
            fit: the profile and the shapes of the inputs.
            addresses: of all tensors by name.
            room: bytes that the activations' memory is to have.
        """
        device = self._device
        prepared = self._prepare(key, fit, addresses, room)
        if prepared.graph is None:
            self._queue(prepared.context, fit)
        else:
            device.cuda.launch(prepared.graph, device.stream)

    def free(self) -> None:
        """Free the CUDA graphs and contexts."""
        for key in self.ready:
            self._forget(key)

    def _queue(self, context: Context, fit: Fit) -> None:
        """Queue the work."""
        self._device.start(context)

    def _prepare(self, key: Key, fit: Fit, addresses: Callable[[], Addresses], room: Callable[[], int]) -> _Prepared:
        device, cuda, stream = self._device, self._device.cuda, self._device.stream
        device.running = self._name
        self._drop_stale()
        if key in self._prepared:
            self._prepared.move_to_end(key)
            return self._prepared[key]
        most = max(MOST_GRAPHS, OF_A_BATCH * device.profiles_of(self._name).largest_batch)
        while len(self._prepared) >= most:
            self._forget(next(iter(self._prepared)))
        loaded = device.load(self._name)
        device.activations.reserve(room())
        self._drop_stale()
        context = device.make_context(loaded, fit.profile)
        device.give_activations(context, loaded, fit.profile)
        at = addresses()
        for name, tensor in loaded.tensors.items():
            context.bind(name, at[name], fit.shapes[name] if tensor.is_input else None)
        graph = None
        if self._captures:
            # Run once before the capture: the library's first run also loads kernels, which must not be captured.
            device.start(context)
            cuda.synchronize(stream)
            if tensorrt_api.is_capturable(device.library, context.raw, stream):
                graph = self._capture(context, fit)
        self._prepared[key] = _Prepared(context, graph)
        return self._prepared[key]

    def _capture(self, context: Context, fit: Fit) -> int:
        device = self._device
        with _no_collection():
            device.cuda.begin_capture(device.stream)
            try:
                self._queue(context, fit)
                return device.cuda.end_capture(device.stream)
            except BaseException:
                device.cuda.abandon_capture(device.stream)
                raise

    def _drop_stale(self) -> None:
        """Free what is prepared if memory whose address it holds has moved."""
        if (valid := self._moves()) != self._valid_for:
            self.free()
            self._valid_for = valid

    def _forget(self, key: Key) -> None:
        prepared = self._prepared.pop(key)
        self._device.cuda.synchronize(self._device.stream)  # until its last launch is done
        if prepared.graph is not None:
            self._device.cuda.destroy_graph(prepared.graph)


class StepGraphs(Graphs[BatchShape]):
    """The step for each (batch, branches).

    Args:
        device: that runs the step.
        table: the conditioning table on the device.
        addresses: of the step's tensors by name; ``inputs`` is the address of all small inputs together.
        captured: whether the steps are captured as CUDA graphs.
    """

    def __init__(self, device: Device, table: DeviceTable, addresses: Addresses, captured: bool) -> None:
        super().__init__(device, "step", self._count_moves, captured)
        self._table, self._at = table, addresses

    def launch_step(self, fit: Fit, layout: Layout) -> None:
        """Queue the step.

        Args:
            fit: the profile and the shapes of the step's inputs.
            layout: of the step's small inputs.
        """
        branches, batch = fit.shapes["rows"]

        def addresses() -> Addresses:
            return {
                **self._at,
                **{name: self._at["inputs"] + region.offset for name, region in layout.regions.items()},
                self._device.manifest.table.name: self._table.address,
            }

        self.launch((batch, branches), fit, addresses, lambda: self._activation_bytes(batch))

    def _count_moves(self) -> tuple[int, int]:
        return self._device.activations.moves, self._table.moves

    def _queue(self, context: Context, fit: Fit) -> None:
        """Queue the step's work: the network and the sampler, then a copy of the new state over the old."""
        device = self._device
        device.start(context)
        size = np.dtype(np.float32).itemsize * math.prod(fit.shapes["state"])
        device.cuda.copy(self._at["state"], self._at["next_state"], size, device.stream)

    def _activation_bytes(self, batch: int) -> int:
        """Bytes for the activations of the step and of the decoder at this batch.

        The block is made large enough for both, so that it does not move between them.
        """
        device = self._device
        needs = [1]
        for graph in ("step", "decoder") if device.manifest.has_decoder else ("step",):
            needs += device.profiles_of(graph).values_at(batch, device.stored.graphs[graph].activation_bytes)
        return max(needs)


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Collect no garbage within a capture: another engine that is collected frees memory, which ends the capture."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
