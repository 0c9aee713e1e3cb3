"""The step as CUDA graphs: one for each (batch, branches), each with its own execution context.

A CUDA graph holds addresses. The loop copies the step's inputs to these addresses before it launches the graph. The
graph's last node copies ``next_state`` over ``state``.
"""

from __future__ import annotations

import contextlib
import gc
import math
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from dit_runtime.backends.profiles import BatchShape, Fit
from dit_runtime.backends.tensorrt import api as tensorrt_api
from dit_runtime.backends.tensorrt.buffers import Layout
from dit_runtime.backends.tensorrt.conditioning import DeviceTable
from dit_runtime.backends.tensorrt.device import Device

MOST_GRAPHS = 16  # enough for batches of 1 to 8 with and without guidance; each holds some hundred nodes and a context


@dataclass(frozen=True)
class _Step:
    """The step at one (batch, branches): its context, and its CUDA graph; None where the step is not captured."""

    context: Any
    graph: int | None


class StepGraphs:
    """Prepare the step for each (batch, branches), and launch it. A caller of any method holds the device's lock.

    Args:
        device: that runs the step.
        table: the conditioning table on the device.
        addresses: of the step's tensors by name; ``inputs`` is the address of all small inputs together.
        captured: whether the steps are captured as CUDA graphs.
    """

    def __init__(self, device: Device, table: DeviceTable, addresses: Mapping[str, int], captured: bool) -> None:
        self._device, self._table, self._at, self._captures = device, table, addresses, captured
        self._steps: OrderedDict[BatchShape, _Step] = OrderedDict()
        self._valid_for: tuple[int, int] | None = None  # how often activations and table had moved

    @property
    def ready(self) -> list[BatchShape]:
        """(batch, branches) of the steps that are prepared; the one used last is the last."""
        return list(self._steps)

    def launch(self, fit: Fit, layout: Layout) -> None:
        """Queue the step; prepare it first where it is not prepared for these shapes.

        Args:
            fit: the profile and the shapes of the step's inputs.
            layout: of the step's small inputs.
        """
        device = self._device
        step = self._prepare_step(fit, layout)
        if step.graph is None:
            self._queue(step.context, fit)
        else:
            device.cuda.launch(step.graph, device.stream)

    def free(self) -> None:
        """Free the CUDA graphs and contexts."""
        for key in self.ready:
            self._forget(key)

    def _queue(self, context: Any, fit: Fit) -> None:
        """Queue the step's work: the network and the sampler, then a copy of the new state over the old."""
        device = self._device
        device.start(context)
        size = np.dtype(np.float32).itemsize * math.prod(fit.shapes["state"])
        device.cuda.copy(self._at["state"], self._at["next_state"], size, device.stream)

    def _prepare_step(self, fit: Fit, layout: Layout) -> _Step:
        device, cuda, stream = self._device, self._device.cuda, self._device.stream
        branches, batch = fit.shapes["rows"]
        device.running = "step"
        self._drop_stale()
        if (batch, branches) in self._steps:
            self._steps.move_to_end((batch, branches))
            return self._steps[batch, branches]
        while len(self._steps) >= MOST_GRAPHS:
            self._forget(next(iter(self._steps)))
        loaded = device.load("step")
        device.activations.reserve(self._activation_bytes(batch))
        self._drop_stale()
        context = device.make_context(loaded, fit.profile)
        device.give_activations(context, loaded, fit.profile)
        addresses = {
            **self._at,
            **{name: self._at["inputs"] + region.offset for name, region in layout.regions.items()},
            device.manifest.table.name: self._table.address,
        }
        for name, tensor in loaded.tensors.items():
            tensorrt_api.bind(context, name, addresses[name], fit.shapes[name] if tensor.is_input else None)
        graph = None
        if self._captures:
            # Run once before the capture: the library's first run also loads kernels, which must not be captured.
            device.start(context)
            cuda.synchronize(stream)
            if tensorrt_api.is_capturable(device.library, context, stream):
                graph = self._capture(context, fit)
        self._steps[batch, branches] = _Step(context, graph)
        return self._steps[batch, branches]

    def _capture(self, context: Any, fit: Fit) -> int:
        device = self._device
        with _no_collection():
            device.cuda.begin_capture(device.stream)
            try:
                self._queue(context, fit)
                return device.cuda.end_capture(device.stream)
            except BaseException:
                device.cuda.abandon_capture(device.stream)
                raise

    def _activation_bytes(self, batch: int) -> int:
        """Bytes for the activations of the step and of the decoder at this batch.

        The block is made large enough for both, so that it does not move between them.
        """
        device = self._device
        needs = [1]
        for graph in ("step", "decoder"):
            needs += device.profiles_of(graph).values_at(batch, device.stored.graphs[graph].activation_bytes)
        return max(needs)

    def _drop_stale(self) -> None:
        """Free the prepared steps if memory whose address they hold has moved."""
        if (valid := (self._device.activations.moves, self._table.moves)) != self._valid_for:
            self.free()
            self._valid_for = valid

    def _forget(self, key: BatchShape) -> None:
        step = self._steps.pop(key)
        self._device.cuda.synchronize(self._device.stream)  # until its last launch is done
        if step.graph is not None:
            self._device.cuda.destroy_graph(step.graph)


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
