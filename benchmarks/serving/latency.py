"""Latency of requests under load, by three policies: one at a time, batches of requests, and the running batch.

    python benchmarks/serving/latency.py my.bundle                     # the engine as it is
    python benchmarks/serving/latency.py my.bundle --gpu-step 4 0.7    # each step takes 4 + 0.7·G·B ms, as on a GPU

Requests of one image with 10, 20 or 50 steps arrive at random (Poisson), at a share of the rate that the running batch
can do, which is measured first. All policies get the same arrivals, interleaved in rounds. Printed are the medians of
the rounds: images a second, and seconds from arrival to image. Images are compared with those made alone.
"""

from __future__ import annotations

import argparse
import json
import queue
import statistics
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dit_runtime import Pipeline
from dit_runtime.backends.base import Array
from dit_runtime.backends.onnxruntime.engine import OnnxRuntimeEngine
from dit_runtime.bundle.reader import open_bundle
from dit_runtime.core.replace import replace_file
from dit_runtime.sampling.batch import Batch
from dit_serve.batcher import Batcher
from dit_serve.jobs import Failed, Finished, Job, Started

STEPS = (10, 20, 50)
BATCH = 8
LOADS = (0.5, 0.8, 1.2)  # of the running batch's rate
POLICIES = ("one at a time", "request batches", "running batch")


class SleepingEngine(OnnxRuntimeEngine):
    """Computes, and lets each step take as long as a GPU's would: ``base + each · G · B`` ms."""

    base = each = 0.0

    def session(self, graph: str) -> Any:
        session, engine = super().session(graph), self
        if graph != "step":
            return session

        class Sleeping:
            def run(self, inputs: dict[str, Array], outputs: Sequence[str]) -> list[Array]:
                end = time.perf_counter() + (engine.base + engine.each * inputs["rows"].size) / 1e3
                results: list[Array] = session.run(inputs, outputs)
                time.sleep(max(0.0, end - time.perf_counter()))
                return results

        return Sleeping()


class RequestBatches:
    """Takes what waits, up to a batch, and answers when all of it is finished: what servers of whole requests do."""

    def __init__(self, pipe: Pipeline) -> None:
        self._pipe, self._waiting, self._stop = pipe, queue.Queue[Job | None](), False
        self._thread = threading.Thread(target=self._work)

    def __enter__(self) -> RequestBatches:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._waiting.put(None)
        self._thread.join()

    def submit(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            self._waiting.put(job)

    def _work(self) -> None:
        while (job := self._waiting.get()) is not None:
            jobs = [job]
            while len(jobs) < BATCH and not self._waiting.empty():
                if (job := self._waiting.get()) is None:
                    self._waiting.put(None)
                    break
                jobs.append(job)
            latents: dict[int, Array] = {}
            with Batch(self._pipe.engine, self._pipe.manifest) as batch:
                batch.add([(index, job.request) for index, job in enumerate(jobs)])
                while len(batch):
                    step = batch.advance()
                    latents |= {step.keys[at]: step.latents[at].copy() for at in np.flatnonzero(step.finished)}
            images = self._pipe.decode(np.stack([latents[index] for index in range(len(jobs))]))
            for each, image in zip(jobs, images, strict=True):
                each.notify(Finished(image, time.monotonic() - each.submitted))


class Arrival(NamedTuple):
    """A request: seconds after the beginning, steps, and seed."""

    at: float
    steps: int
    seed: int


class Outcome(NamedTuple):
    """What came of a run: images a second, seconds of each request in the order of arrivals, and the images."""

    rate: float
    latencies: list[float]
    images: list[Array]


def arrivals_at(rate: float, count: int, seed: int) -> list[Arrival]:
    """Arrivals of a Poisson process."""
    random = np.random.default_rng(seed)
    times = np.cumsum(random.exponential(1 / rate, count))
    return [Arrival(float(at), int(random.choice(STEPS)), index) for index, at in enumerate(times)]


def run(pipe: Pipeline, policy: str, arrivals: Sequence[Arrival]) -> Outcome:
    """Let requests arrive, and wait for all of them."""
    found: dict[int, Finished] = {}
    done = threading.Event()

    def notify(index: int, event: Any) -> None:
        if isinstance(event, Failed):
            raise event.error
        if not isinstance(event, Started):
            found[index] = event
            if len(found) == len(arrivals):
                done.set()

    if policy == "request batches":
        server: Any = RequestBatches(pipe)
    else:
        server = Batcher(pipe, 1 if policy == "one at a time" else BATCH, most_waiting=len(arrivals))
    with server:
        start = time.monotonic()
        for index, arrival in enumerate(arrivals):
            time.sleep(max(0.0, start + arrival.at - time.monotonic()))
            (request,) = pipe.prepare([arrival.seed % 10], arrival.seed, steps=arrival.steps, sampler="ddim")
            server.submit([Job(request, lambda event, index=index: notify(index, event))])
        done.wait()
        seconds = time.monotonic() - start
    ordered = [found[index] for index in range(len(arrivals))]
    return Outcome(len(arrivals) / seconds, [each.seconds for each in ordered], [each.image for each in ordered])


def measure(pipe: Pipeline, count: int, rounds: int) -> dict[str, Any]:
    """All loads and policies."""
    flood = [
        Arrival(0.0, steps, index) for index, steps in enumerate(np.random.default_rng(0).choice(STEPS, 4 * BATCH))
    ]
    rate = run(pipe, "running batch", [each._replace(steps=int(each.steps)) for each in flood]).rate
    rows = []
    for load in LOADS:
        outcomes: dict[str, list[Outcome]] = {policy: [] for policy in POLICIES}
        arrivals = arrivals_at(load * rate, count, 1)
        for _ in range(rounds):
            for policy in POLICIES:
                outcomes[policy].append(run(pipe, policy, arrivals))
        alone = outcomes["one at a time"][0].images
        for policy, each in outcomes.items():
            short = [index for index, arrival in enumerate(arrivals) if arrival.steps == min(STEPS)]
            rows.append(
                {
                    "load": load,
                    "offered_per_s": load * rate,
                    "policy": policy,
                    "done_per_s": statistics.median(one.rate for one in each),
                    "p50_s": statistics.median(float(np.median(one.latencies)) for one in each),
                    "p95_s": statistics.median(float(np.quantile(one.latencies, 0.95)) for one in each),
                    "short_p50_s": statistics.median(
                        float(np.median([one.latencies[index] for index in short])) for one in each
                    ),
                    "largest_difference": max(
                        int(np.abs(mine.astype(int) - image).max())
                        for one in each
                        for mine, image in zip(one.images, alone, strict=True)
                    ),
                }
            )
    return {"engine": pipe.engine.info.name, "rate_per_s": rate, "requests": count, "rounds": rounds, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--engine", default="onnxruntime")
    parser.add_argument(
        "--gpu-step", type=float, nargs=2, metavar=("BASE", "EACH"), help="ms of a step: BASE + EACH·G·B"
    )
    parser.add_argument("--requests", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    pipe = Pipeline(args.bundle, args.engine)
    if args.gpu_step:
        pipe.engine = SleepingEngine(open_bundle(args.bundle), threads=1)
        pipe.engine.base, pipe.engine.each = args.gpu_step
    found = {**measure(pipe, args.requests, args.rounds), "gpu_step_ms": args.gpu_step}
    print("| load | policy | done/s | p50 s | p95 s | p50 s of 10 steps | largest difference |")
    print("|---|---|---|---|---|---|---|")
    for row in found["rows"]:
        times = " | ".join(f"{row[name]:.2f}" for name in ("done_per_s", "p50_s", "p95_s", "short_p50_s"))
        print(f"| {row['load']:g} | {row['policy']} | {times} | {row['largest_difference']} |")
    if args.output:
        with replace_file(args.output) as file:
            file.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
