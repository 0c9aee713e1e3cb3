"""An engine that is wrong where a fault wants it: a wrapper around a sound one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnxruntime
from graph_edits import Graph

from dit_runtime.backends.base import Engine, EngineInfo
from dit_runtime.backends.conditioning import TableLimits
from dit_runtime.backends.host_loop import HostLoop
from dit_runtime.bundle.reader import Bundle

Array = np.ndarray[Any, Any]
Arrays = dict[str, Array]
Edit = Callable[[Graph], None]  # changes a graph in place
Alter = Callable[[Arrays], None]  # changes inputs in place; they are the call's own
Spoil = Callable[[Arrays, Arrays], None]  # given the inputs, changes outputs in place


@dataclass
class FaultyEngine:
    """A sound engine with edits of some graphs, and with changes of some graphs' inputs and outputs."""

    engine: Engine
    bundle: Bundle
    inputs: Mapping[str, Alter] = field(default_factory=dict)
    outputs: Mapping[str, Spoil] = field(default_factory=dict)
    edits: Mapping[str, Edit] = field(default_factory=dict)
    edited: dict[str, Callable[[Arrays, Sequence[str]], Sequence[Any]]] = field(default_factory=dict)

    @property
    def info(self) -> EngineInfo:
        return self.engine.info

    def session(self, graph: str) -> FaultySession:
        return FaultySession(self, graph)

    def evaluate(self, graph: str, inputs: Arrays, outputs: Sequence[str]) -> Sequence[Any]:
        """Run a graph, the edited one where there is an edit."""
        if graph not in self.edits:
            return self.engine.session(graph).run(inputs, outputs)
        if graph not in self.edited:
            changed = Graph(self.bundle, graph)
            self.edits[graph](changed)
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads, options.log_severity_level = 1, 3
            session = onnxruntime.InferenceSession(changed.model.SerializeToString(), options)
            self.edited[graph] = lambda inputs, names: session.run(list(names), inputs)
        return self.edited[graph](inputs, outputs)

    def release(self, graph: str) -> None:
        self.engine.release(graph)

    def open_loop(self, limits: TableLimits) -> HostLoop:
        return HostLoop(self, self.bundle.manifest, limits)

    def close(self) -> None:
        self.engine.close()


@dataclass
class FaultySession:
    owner: FaultyEngine
    graph: str

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> list[Array]:
        owner, given = self.owner, dict(inputs)
        if self.graph in owner.inputs:
            given = {name: value.copy() for name, value in inputs.items()}
            owner.inputs[self.graph](given)
        found = owner.evaluate(self.graph, given, outputs)
        named = {name: np.array(value) for name, value in zip(outputs, found, strict=True)}
        if self.graph in owner.outputs:
            owner.outputs[self.graph](given, named)
        return list(named.values())
