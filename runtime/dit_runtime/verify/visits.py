"""What an engine was asked during a verification: noted where the graphs are called, so that nothing is claimed.

``ObservedEngine`` is the engine that the rungs use. It changes nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from dit_runtime.backends.base import Array, Engine, EngineInfo, Int32, Loop, RunInputs, Session, StepResult
from dit_runtime.backends.conditioning import TableLimits
from dit_runtime.backends.profiles import BatchShape
from dit_runtime.samplers.noise import Float32


@dataclass
class Visits:
    """What was asked so far.

    Attributes:
        calls: of each graph.
        shapes: of each graph, the batches (of the conditioner, rows) and branches that were run.
        rows: rows of the conditioning table that the step read.
        longest: rows of the longest conditioning table that the step was given.
        labels, timesteps: that the conditioner was given.
        slots: of the sampler's state, those that a step was given filled.
    """

    calls: Counter[str] = field(default_factory=Counter)
    shapes: dict[str, set[BatchShape]] = field(default_factory=dict)
    rows: set[int] = field(default_factory=set)
    longest: int = 0
    labels: set[int] = field(default_factory=set)
    timesteps: set[float] = field(default_factory=set)
    slots: set[int] = field(default_factory=set)

    def note(self, graph: str, inputs: Mapping[str, Array]) -> None:
        """Note a call of a graph."""
        first = next(iter(inputs.values()))
        shape = (len(first), 1)
        if "rows" in inputs:
            shape = (inputs["rows"].shape[1], inputs["rows"].shape[0])
        if graph == "step":
            self.rows |= set(np.unique(inputs["rows"]).tolist())
            self.longest = max(self.longest, *(len(value) for name, value in inputs.items() if name not in STEP_INPUTS))
            self.slots |= {slot for slot in range(inputs["state"].shape[1]) if inputs["state"][:, slot].any()}
        if graph == "conditioner":
            if "labels" in inputs:  # a policy gets observations
                self.labels |= set(np.unique(inputs["labels"]).tolist())
            self.timesteps |= set(np.unique(inputs["timesteps"]).tolist())
        self.note_shape(graph, shape)

    def note_shape(self, graph: str, shape: BatchShape) -> None:
        """Note a call of a graph at a shape."""
        self.calls[graph] += 1
        self.shapes.setdefault(graph, set()).add(shape)


STEP_INPUTS = ("state", "noise", "coefficients", "guidance", "rows")  # the others are the conditioning table


class ObservedEngine:
    """An engine whose calls are noted in ``visits``."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.visits = engine, Visits()

    @property
    def info(self) -> EngineInfo:
        """As ``Engine.info``."""
        return self.engine.info

    def session(self, graph: str) -> Session:
        """As ``Engine.session``."""
        return _ObservedSession(self.engine.session(graph), graph, self.visits)

    def release(self, graph: str) -> None:
        """As ``Engine.release``."""
        self.engine.release(graph)

    def open_loop(self, limits: TableLimits) -> Loop:
        """As ``Engine.open_loop``."""
        return _ObservedLoop(self.engine.open_loop(limits), self.visits)

    def close(self) -> None:
        """As ``Engine.close``."""
        self.engine.close()


class _ObservedSession:
    def __init__(self, session: Session, graph: str, visits: Visits) -> None:
        self._session, self._graph, self._visits = session, graph, visits

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> list[Array]:
        found = self._session.run(inputs, outputs)
        self._visits.note(self._graph, inputs)
        return found


class _ObservedLoop:
    def __init__(self, loop: Loop, visits: Visits) -> None:
        self._loop, self._visits = loop, visits
        self.table, self.looks_ahead = loop.table, loop.looks_ahead

    def add(self, latents: Float32) -> None:
        self._loop.add(latents)

    def keep(self, positions: Sequence[int]) -> None:
        self._loop.keep(positions)

    def run_row(self, inputs: RunInputs, row: int, noise: Float32 | None) -> StepResult:
        found = self._loop.run_row(inputs, row, noise)
        self._visits.note_shape("loop", (inputs.rows.shape[2], inputs.needed[row]))
        return found

    def run_step(
        self, coefficients: Float32, guidance: Float32, rows: Int32, noise: Float32 | None, drawing: Sequence[int]
    ) -> StepResult:
        found = self._loop.run_step(coefficients, guidance, rows, noise, drawing)
        self._visits.note_shape("loop", (rows.shape[1], rows.shape[0]))
        return found

    def close(self) -> None:
        self._loop.close()
