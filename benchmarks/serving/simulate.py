"""How many GPUs, servers and bytes a product needs: a simulation of running batches, from measured times.

    python benchmarks/serving/simulate.py --output benchmarks/serving/simulate.json   # 1 M images a day; 1000 a second
    python benchmarks/serving/simulate.py --check my.bundle                           # beside the real batch loop

Requests of one image with 10, 20 or 50 steps arrive at random (Poisson). A front spends CPU time on each and sends it
to the engine with the fewest images. Each engine has a running batch, whose step takes ``base + each · G · B`` ms.
Printed for each rate are the fewest GPUs with which the 95th percentile keeps to ``--target`` times that of an
image alone, how busy they are, and their cost. No price, GPU or network is measured here: give your own.
"""

from __future__ import annotations

import argparse
import heapq
import json
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dit_runtime.core.replace import replace_file

STEPS = (10, 20, 50)
DAY = 86_400.0
SLOWER = 10
RATES = {"1 M a day, even": 1e6 / DAY, "1 M a day, its peak hour 3 times the mean": 3e6 / DAY, "1000 a second": 1000.0}


@dataclass(frozen=True)
class Costs:
    """What things take.

    Attributes:
        base_ms, each_ms: a step takes ``base_ms + each_ms · branches · images``.
        branches: of guidance.
        batch_size: most images in an engine's batch.
        front_ms: CPU time of a front for each request.
        hop_ms: from a front to an engine and back, which occupies neither.
        decode_ms: the decoder for one image, in the engine.
        image_bytes: of a PNG file.
        price: of a GPU for an hour.
    """

    base_ms: float = 4.0
    each_ms: float = 0.7
    branches: int = 2
    batch_size: int = 8
    front_ms: float = 3.0
    hop_ms: float = 25.0
    decode_ms: float = 0.0
    image_bytes: int = 120_000
    price: float = 2.5

    def step_seconds(self, images: int) -> float:
        """A step of so many images."""
        return (self.base_ms + self.each_ms * self.branches * images) / 1e3

    def alone_seconds(self, steps: int) -> float:
        """A request that nobody else disturbs."""
        return steps * self.step_seconds(1) + (self.decode_ms + self.front_ms + self.hop_ms) / 1e3

    def images_per_second(self) -> float:
        """Of one engine whose batch is always full."""
        each = self.step_seconds(self.batch_size) / self.batch_size * float(np.mean(STEPS)) + self.decode_ms / 1e3
        return 1 / each


class Engine:
    """A running batch: images join between two steps."""

    def __init__(self) -> None:
        self.waiting: deque[list[int]] = deque()  # [request, steps that are left]
        self.running: list[list[int]] = []
        self.busy = 0.0

    @property
    def images(self) -> int:
        return len(self.waiting) + len(self.running)


def simulate(costs: Costs, gpus: int, fronts: int, arrivals: Sequence[tuple[float, int]]) -> tuple[np.ndarray, float]:
    """Let requests arrive.

    Args:
        costs: of steps and fronts.
        gpus: engines.
        fronts: that each serve one request at a time.
        arrivals: seconds and steps of each request, in order.

    Returns:
        Seconds of each request, and the share of the time in which the engines are busy.
    """
    engines = [Engine() for _ in range(gpus)]
    free_at = [0.0] * fronts
    hop, front = costs.hop_ms / 1e3, costs.front_ms / 1e3
    done = np.zeros(len(arrivals))
    # (time, order, engine): an engine's step ends; or (time, order, -1 - request): a request reaches the engines.
    events: list[tuple[float, int, int]] = []
    for index, (at, _) in enumerate(arrivals):
        start = max(at, heapq.heappop(free_at))
        heapq.heappush(free_at, start + front)
        events.append((start + front + hop / 2, index, -1 - index))
    heapq.heapify(events)
    order, end = len(arrivals), 0.0

    def begin(number: int, now: float) -> None:
        nonlocal order
        engine = engines[number]
        while engine.waiting and len(engine.running) < costs.batch_size:
            engine.running.append(engine.waiting.popleft())
        if engine.running:
            finishing = sum(job[1] == 1 for job in engine.running)
            seconds = costs.step_seconds(len(engine.running)) + finishing * costs.decode_ms / 1e3
            engine.busy += seconds
            heapq.heappush(events, (now + seconds, order, number))
            order += 1

    while events:
        now, _, what = heapq.heappop(events)
        end = max(end, now)
        if what < 0:
            request = -1 - what
            number = min(range(gpus), key=lambda each: engines[each].images)
            idle = not engines[number].images
            engines[number].waiting.append([request, arrivals[request][1]])
            if idle:
                begin(number, now)
            continue
        for job in engines[what].running:
            job[1] -= 1
            if not job[1]:
                done[job[0]] = now + hop / 2
        engines[what].running = [job for job in engines[what].running if job[1]]
        begin(what, now)
    latencies = done - np.array([at for at, _ in arrivals])
    return latencies, sum(engine.busy for engine in engines) / (gpus * end)


def arrivals_at(rate: float, count: int, seed: int = 0) -> list[tuple[float, int]]:
    """Arrivals of a Poisson process."""
    random = np.random.default_rng(seed)
    times = np.cumsum(random.exponential(1 / rate, count))
    return [(float(at), int(steps)) for at, steps in zip(times, random.choice(STEPS, count), strict=True)]


def find_gpus(costs: Costs, rate: float, target: float, seconds: float) -> dict[str, Any]:
    """The fewest GPUs with which the 95th percentile keeps to the target, and what they do."""
    arrivals = arrivals_at(rate, max(400, int(rate * seconds)))
    fronts = max(1, math.ceil(rate * costs.front_ms / 1e3 / 0.6))  # busy for at most 60 % of the time
    alone = float(np.quantile([costs.alone_seconds(steps) for _, steps in arrivals], 0.95))
    gpus = max(1, math.ceil(rate / costs.images_per_second()))
    while True:
        latencies, busy = simulate(costs, gpus, fronts, arrivals)
        if (p95 := float(np.quantile(latencies, 0.95))) <= target * alone:
            break
        gpus += max(1, gpus // 50)
    return {
        "per_s": rate,
        "gpus": gpus,
        "fronts": fronts,
        "p50_s": float(np.median(latencies)),
        "p95_s": p95,
        "p95_alone_s": alone,
        "busy": busy,
        "MB_per_s": rate * costs.image_bytes / 1e6,
        "cost_a_day": gpus * 24 * costs.price,
        "cost_of_1000_images": gpus * costs.price / 3600 / rate * 1000,
    }


def check(bundle: Path, costs: Costs, count: int) -> list[dict[str, Any]]:
    """The same arrivals in the simulation and in the real batch loop, whose engine sleeps as long as a step takes.

    All is ``SLOWER`` times as slow, so that other work on the machine counts less.
    """
    from latency import Arrival, SleepingEngine, run

    from dit_runtime import Pipeline
    from dit_runtime.bundle.reader import open_bundle

    slow = {"base_ms": SLOWER * costs.base_ms, "each_ms": SLOWER * costs.each_ms}
    costs = replace(costs, front_ms=0.0, hop_ms=0.0, **slow)
    pipe = Pipeline(bundle, "onnxruntime", threads=1)
    pipe.engine = SleepingEngine(open_bundle(bundle), threads=1)
    pipe.engine.base, pipe.engine.each = costs.base_ms, costs.each_ms
    rows = []
    for load in (0.5, 0.8):
        arrivals = arrivals_at(load * costs.images_per_second(), count)
        real = run(pipe, "running batch", [Arrival(at, steps, index) for index, (at, steps) in enumerate(arrivals)])
        latencies, _ = simulate(costs, 1, 1, arrivals)
        for name, share in (("p50_s", 0.5), ("p95_s", 0.95)):
            measured, found = float(np.quantile(real.latencies, share)), float(np.quantile(latencies, share))
            rows.append({"load": load, "figure": name, "real": measured, "simulated": found, "ratio": measured / found})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", type=Path, metavar="BUNDLE")
    parser.add_argument("--requests", type=int, default=60, help="of --check")
    parser.add_argument("--seconds", type=float, default=20.0, help="that are simulated")
    parser.add_argument("--target", type=float, default=2.0, help="95th percentile, in times of that without others")
    for name, value in asdict(Costs()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    costs = Costs(**{name: getattr(args, name) for name in asdict(Costs())})
    if args.check:
        rows = check(args.check, costs, args.requests)
    else:
        rows = [{"rate": name, **find_gpus(costs, rate, args.target, args.seconds)} for name, rate in RATES.items()]
    print("| " + " | ".join(rows[0]) + " |")
    print("|" + "---|" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(value if isinstance(value, str) else f"{value:.3g}" for value in row.values()) + " |")
    if args.output:
        with replace_file(args.output) as file:
            file.write_text(json.dumps({"costs": asdict(costs), "target": args.target, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
