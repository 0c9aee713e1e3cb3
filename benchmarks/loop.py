"""Measure the cost of sampling outside the engine's calls, on a bundle, and the saving of a guidance interval.

    python benchmarks/loop.py BUNDLE [--json]

Everything runs in one thread. The CPU time of the engine's calls is taken from the thread's CPU time; the rest is the
cost outside. Other work on the machine does not count. The figures are medians over interleaved runs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dit_runtime import Pipeline
from dit_runtime.backends.base import Array, Session
from dit_runtime.backends.onnxruntime.engine import OnnxRuntimeEngine

BATCH, STEPS, REPEAT = 8, 50, 7


class Timed:
    """A session that adds up the CPU time of its calls, in seconds."""

    def __init__(self, session: Session) -> None:
        self.session, self.seconds = session, 0.0

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> list[Array]:
        start = time.thread_time()
        try:
            return self.session.run(inputs, outputs)
        finally:
            self.seconds += time.thread_time() - start


class TimedEngine(OnnxRuntimeEngine):
    """An engine with one thread, so that the thread's CPU time is all the work, and with timed sessions."""

    def __init__(self, bundle: Any) -> None:
        super().__init__(bundle, threads=1)
        self.timed: dict[str, Timed] = {}

    def session(self, graph: str) -> Session:
        if graph not in self.timed:
            self.timed[graph] = Timed(super().session(graph))
        return self.timed[graph]


def run(pipe: Pipeline, engine: TimedEngine, **settings: Any) -> tuple[float, float]:
    """CPU seconds of one run of BATCH images: of the whole run, and of the engine's calls in it."""
    for session in engine.timed.values():
        session.seconds = 0.0
    start = time.thread_time()
    pipe([index % pipe.manifest.model.classes for index in range(BATCH)], 0, steps=STEPS, **settings)
    return time.thread_time() - start, sum(session.seconds for session in engine.timed.values())


def time_import() -> float:
    """CPU seconds of ``import dit_runtime`` in a fresh interpreter, the median of REPEAT runs."""
    code = "import sys; sys.path[:] = filter(None, sys.path)\n"  # '' would be the current folder
    code += "import time; s = time.process_time(); import dit_runtime; print(time.process_time() - s)"
    runs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(REPEAT)
    ]
    return statistics.median(float(done.stdout) for done in runs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    pipe = Pipeline(args.bundle, "onnxruntime")
    engine = TimedEngine(pipe.bundle)
    pipe.engine = engine
    cases: dict[str, dict[str, Any]] = {
        "ddim, guidance 1.5": {"sampler": "ddim", "guidance": 1.5},
        "ddpm, guidance 1.5": {"sampler": "ddpm", "guidance": 1.5},
        "ddim, guided in 0.2 to 0.7": {"sampler": "ddim", "guidance": 1.5, "guidance_interval": (0.2, 0.7)},
        "ddim, not guided": {"sampler": "ddim", "guidance": 1.0},
    }
    for settings in cases.values():
        run(pipe, engine, **settings)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in cases}
    for _ in range(REPEAT):
        for name, settings in cases.items():
            times[name].append(run(pipe, engine, **settings))
    guided = statistics.median(total for total, _ in times["ddim, guidance 1.5"])
    figures = {}
    for name, values in times.items():
        outside = statistics.median(total - inside for total, inside in values)
        total = statistics.median(total for total, _ in values)
        figures[name] = {
            "seconds": round(total, 4),
            "outside_the_engine_ms_per_step": round(outside / STEPS * 1e3, 4),
            "outside_the_engine_share": round(outside / total, 4),
            "cost_against_guided": round(total / guided, 3),
        }
    loaded = time_import()
    if args.json:
        print(json.dumps({"batch": BATCH, "steps": STEPS, "import_seconds": loaded, "figures": figures}, indent=1))
        return
    print(f"batch {BATCH}, {STEPS} steps, one thread of {engine.info.name}, CPU time, medians of {REPEAT}")
    print(f"{'':<28} {'s':>8} {'outside, ms/step':>18} {'share':>8} {'cost':>6}")
    for name, values in figures.items():
        print(
            f"{name:<28} {values['seconds']:>8.3f} {values['outside_the_engine_ms_per_step']:>18.3f} "
            f"{values['outside_the_engine_share']:>8.1%} {values['cost_against_guided']:>6.2f}"
        )
    print(f"import dit_runtime: {loaded:.3f} s")


if __name__ == "__main__":
    main()
