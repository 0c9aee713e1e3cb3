"""What OpenVINO's graphs for any batch cost: the time of a step beside graphs that are compiled for each batch.

    python benchmarks/serving/open_batch.py my.bundle

Steps of both engines in turn, with guidance; printed are the lower quartiles, in ms, and the time to compile a step.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np

from dit_runtime import Pipeline
from dit_runtime.sampling.batch import Batch

NAMES = ("openvino", "openvino-any")
STEPS = 12


def time_steps(pipe: Pipeline, size: int) -> tuple[float, list[float]]:
    """Seconds of the first step, in which the graph may be compiled, and of the others."""
    images = pipe.prepare([0] * size, steps=STEPS + 1)
    times = []
    with Batch(pipe.engine, pipe.manifest) as batch:
        batch.add(list(enumerate(images)))
        while len(batch):
            start = time.perf_counter()
            batch.advance()
            times.append(time.perf_counter() - start)
    return times[0], times[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    pipes = {name: Pipeline(args.bundle, name, threads=1) for name in NAMES}
    print("| batch | each batch its own, ms | any batch, ms | ratio | compiled in s, own | any |")
    print("|---|---|---|---|---|---|")
    for size in (1, 2, 4, 8):
        rounds = {name: [time_steps(pipes[name], size)] for name in NAMES}
        for _ in range(args.rounds):
            for name in NAMES:
                rounds[name].append(time_steps(pipes[name], size))
        own, anyone = (
            1e3 * float(np.quantile([each for _, times in rounds[name] for each in times], 0.25)) for name in NAMES
        )
        compiled = " | ".join(f"{rounds[name][0][0]:.2f}" for name in NAMES)
        print(f"| {size} | {own:.2f} | {anyone:.2f} | {anyone / own:.2f} | {compiled} |")


if __name__ == "__main__":
    main()
