"""An engine that is wrong at inputs of a test's choice: a wrapper around a sound one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dit_runtime.backends.base import Engine, EngineInfo
from dit_runtime.backends.conditioning import TableLimits
from dit_runtime.backends.host_loop import HostLoop
from dit_runtime.bundle.manifest import Manifest

Array = np.ndarray[Any, Any]
Arrays = dict[str, Array]
Alter = Callable[[Arrays], None]  # changes inputs in place; they are the call's own
Spoil = Callable[[Arrays, Arrays], None]  # given the inputs, changes outputs in place


@dataclass
class FaultyEngine:
    """A sound engine with changes of some graphs' inputs and outputs."""

    engine: Engine
    manifest: Manifest
    inputs: Mapping[str, Alter] = field(default_factory=dict)
    outputs: Mapping[str, Spoil] = field(default_factory=dict)

    @property
    def info(self) -> EngineInfo:
        return self.engine.info

    def session(self, graph: str) -> FaultySession:
        return FaultySession(self, graph)

    def release(self, graph: str) -> None:
        self.engine.release(graph)

    def open_loop(self, limits: TableLimits) -> HostLoop:
        return HostLoop(self, self.manifest, limits)

    def close(self) -> None:
        self.engine.close()


@dataclass
class FaultySession:
    owner: FaultyEngine
    graph: str

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> list[Array]:
        given = (
            {name: value.copy() for name, value in inputs.items()} if self.graph in self.owner.inputs else dict(inputs)
        )
        self.owner.inputs.get(self.graph, lambda same: None)(given)
        found = self.owner.engine.session(self.graph).run(given, outputs)
        named = {name: np.array(value) for name, value in zip(outputs, found, strict=True)}
        self.owner.outputs.get(self.graph, lambda *same: None)(given, named)
        return list(named.values())
