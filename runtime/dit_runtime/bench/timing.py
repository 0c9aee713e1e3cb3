"""Timing calls against each other: interleaved, warmed up until stable, the first call apart."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dit_runtime.backends.base import Array, Engine, Session
from dit_runtime.backends.conditioning import TableLimits
from dit_runtime.backends.host_loop import HostLoop
from dit_runtime.bundle.manifest import Manifest
from dit_runtime.core.progress import Progress

STABLE = 0.1  # warm when a call took within this share of the one before
MOST_WARMUPS = 8


@dataclass(frozen=True)
class Timing:
    """Milliseconds of calls. ``first_ms`` is the very first, ``warmup`` how many more came before the timed ones."""

    first_ms: float
    warmup: int
    calls: int
    p50_ms: float
    p95_ms: float
    p99_ms: float
    worst_ms: float

    def of_each(self, count: int) -> Timing:
        """Of calls that did the same thing ``count`` times: once."""
        own = (self.first_ms, self.p50_ms, self.p95_ms, self.p99_ms, self.worst_ms)
        shares = [round(value / count, 4) for value in own]
        return Timing(shares[0], self.warmup, self.calls, *shares[1:])


def timing_of(milliseconds: Sequence[float], first_ms: float, warmup: int = 0) -> Timing:
    """Percentiles of timed calls (linear interpolation between them)."""
    found = (float(value) for value in np.percentile(milliseconds, [50, 95, 99, 100]))
    return Timing(round(first_ms, 3), warmup, len(milliseconds), *(round(value, 3) for value in found))


def time_calls(work: Mapping[str, Callable[[], Any]], repeat: int, label: str = "timing") -> dict[str, Timing]:
    """Time each piece of work ``repeat`` times, in turn, so that a machine whose speed drifts treats all alike."""
    first = {name: _milliseconds(call) for name, call in work.items()}
    last, warmups = dict(first), 0
    with Progress(label, (MOST_WARMUPS + repeat) * len(work)) as bar:
        for _ in range(MOST_WARMUPS):
            warmups += 1
            found = {}
            for name, call in work.items():
                found[name] = _milliseconds(call)
                bar.advance()
            stable = all(abs(found[name] - last[name]) <= STABLE * last[name] for name in work)
            last = found
            if stable:
                break
        bar.skip((MOST_WARMUPS - warmups) * len(work))
        times: dict[str, list[float]] = {name: [] for name in work}
        for _ in range(repeat):
            for name, call in work.items():
                times[name].append(_milliseconds(call))
                bar.advance()
    return {name: timing_of(times[name], first[name], warmups) for name in work}


def _milliseconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


class _Clocked:
    """A session that notes how long each call took."""

    def __init__(self, session: Session, milliseconds: list[float]) -> None:
        self._session, self._milliseconds = session, milliseconds

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> list[Array]:
        start = time.perf_counter()
        try:
            return self._session.run(inputs, outputs)
        finally:
            self._milliseconds.append((time.perf_counter() - start) * 1e3)


class ClockedEngine:
    """An engine that notes, by graph, how long each call of its sessions took. ``milliseconds`` may be cleared.

    Its loop is the host's, which calls the sessions.
    """

    def __init__(self, engine: Engine, manifest: Manifest) -> None:
        self._engine, self._manifest = engine, manifest
        self.info = replace(engine.info, loop_on_device=False)
        self.milliseconds: dict[str, list[float]] = {}

    def session(self, graph: str) -> Session:
        """The engine's own session, clocked."""
        return _Clocked(self._engine.session(graph), self.milliseconds.setdefault(graph, []))

    def release(self, graph: str) -> None:
        """As ``Engine.release``."""
        self._engine.release(graph)

    def open_loop(self, limits: TableLimits) -> HostLoop:
        """As ``Engine.open_loop``."""
        return HostLoop(self, self._manifest, limits)

    def close(self) -> None:
        """As ``Engine.close``."""
        self._engine.close()
