"""The step as CUDA graphs: one for each (batch, branches), with an execution context of its own.

A graph holds addresses. Its inputs are copied to them before it is launched, and its last node copies ``next_state``
over ``state``.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dit_runtime.backends.tensorrt import api as tensorrt_api
from dit_runtime.backends.tensorrt.buffers import Layout

if TYPE_CHECKING:
    from dit_runtime.backends.tensorrt.conditioning import DeviceTable
    from dit_runtime.backends.tensorrt.engine import TensorRtEngine
    from dit_runtime.backends.tensorrt.session import Fit

MOST_GRAPHS = 16  # batches of 1 to 8 with and without guidance; each holds a few hundred nodes and a context


@dataclass(frozen=True)
class _Step:
    """The step at one (batch, branches): its context, and its captured graph, None where it is not captured."""

    context: Any
    graph: int | None


class StepGraphs:
    """What launches the step. ``addresses`` are those of its tensors; ``inputs`` is where the small ones lie together.

    The engine's lock is held by whoever calls.
    """

    def __init__(self, engine: TensorRtEngine, table: DeviceTable, addresses: Mapping[str, int]) -> None:
        self._engine, self._table, self._at = engine, table, addresses
        self._steps: OrderedDict[tuple[int, int], _Step] = OrderedDict()
        self._valid_for: tuple[int, int] | None = None

    @property
    def ready(self) -> list[tuple[int, int]]:
        """(batch, branches) of the steps that are ready, the last used last."""
        return list(self._steps)

    def launch(self, fit: Fit, layout: Layout) -> None:
        """Queue the step at these shapes, with its small inputs laid out so; it is made ready where it is not."""
        engine = self._engine
        step = self._step(fit, layout)
        if step.graph is None:
            self._queue(step.context, fit)
        else:
            engine.cuda.launch(step.graph, engine.stream)

    def free(self) -> None:
        """Give graphs and contexts back."""
        for key in self.ready:
            self._forget(key)

    def _queue(self, context: Any, fit: Fit) -> None:
        """The step's work: the network and the sampler, then the new state in the place of the old."""
        engine = self._engine
        engine.start(context)
        size = np.dtype(np.float32).itemsize * math.prod(fit.shapes["state"])
        engine.cuda.copy(self._at["state"], self._at["next_state"], size, engine.stream)

    def _step(self, fit: Fit, layout: Layout) -> _Step:
        engine, cuda, stream = self._engine, self._engine.cuda, self._engine.stream
        branches, batch = fit.shapes["rows"]
        engine.running = "step"
        self._drop_stale()
        if (batch, branches) in self._steps:
            self._steps.move_to_end((batch, branches))
            return self._steps[batch, branches]
        while len(self._steps) >= MOST_GRAPHS:
            self._forget(next(iter(self._steps)))
        loaded = engine.load("step")
        engine.activations.reserve(self._activation_bytes(batch))
        self._drop_stale()
        context = loaded.new_context(fit.profile, cuda, stream)
        engine.give_activations(context, loaded, fit.profile)
        addresses = {
            **self._at,
            **{name: self._at["inputs"] + place.offset for name, place in layout.regions.items()},
            engine.bundle.manifest.table.name: self._table.address,
        }
        for name, tensor in loaded.tensors.items():
            tensorrt_api.bind(context, name, addresses[name], fit.shapes[name] if tensor.is_input else None)
        graph = None
        if engine.captured:
            # What the library does only once, such as loading kernels, must not be captured.
            engine.start(context)
            cuda.synchronize(stream)
            graph = self._captured(context, fit)
        self._steps[batch, branches] = _Step(context, graph)
        return self._steps[batch, branches]

    def _captured(self, context: Any, fit: Fit) -> int:
        engine = self._engine
        engine.cuda.begin_capture(engine.stream)
        try:
            self._queue(context, fit)
            return engine.cuda.end_capture(engine.stream)
        except BaseException:
            engine.cuda.abandon_capture(engine.stream)
            raise

    def _activation_bytes(self, batch: int) -> int:
        """Those of all that this batch will run, so that their memory does not move in between."""
        engine = self._engine
        needs = [1]
        for graph in ("step", "decoder"):
            sizes = engine.stored.graphs[graph].activation_bytes
            needs += [
                size
                for size, (least, _, largest) in zip(sizes, engine.profiles(graph), strict=True)
                if least[0] <= batch <= largest[0]
            ]
        return max(needs)

    def _drop_stale(self) -> None:
        """Forget the steps when memory moved whose address they hold."""
        if (valid := (self._engine.activations.moves, self._table.moves)) != self._valid_for:
            self.free()
            self._valid_for = valid

    def _forget(self, key: tuple[int, int]) -> None:
        step = self._steps.pop(key)
        self._engine.cuda.synchronize(self._engine.stream)  # its last launch
        if step.graph is not None:
            self._engine.cuda.destroy_graph(step.graph)
