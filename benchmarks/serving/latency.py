"""Latency of requests under load, by three policies: one at a time, batches of requests, and the running batch.

    python benchmarks/serving/latency.py my.bundle                     # the engine as it is
    python benchmarks/serving/latency.py my.bundle --gpu-step 4 0.7    # each step takes 4 + 0.7·G·B ms, as on a GPU

    python benchmarks/serving/latency.py my.bundle --saturation        # as many requests at once as a queue holds
    python benchmarks/serving/latency.py my.bundle --diffusers CHECKPOINT    # and PyTorch behind a plain server

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
from numpy.typing import NDArray

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
DIFFUSERS = "diffusers, one at a time"


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


class Diffusers(RequestBatches):
    """diffusers' own modules in ``DiTPipeline``'s loop, behind a plain server: a request at a time."""

    def __init__(self, pipe: Pipeline, checkpoint: Path) -> None:
        super().__init__(pipe)
        import torch
        from dit_export.checkpoints.sources import Source, load_checkpoint
        from dit_export.reference.pipeline import Reference

        self._torch = torch
        self._reference = Reference(load_checkpoint(Source(str(checkpoint))))
        self._scheduler: Any = self._reference.checkpoint.scheduler

    def _work(self) -> None:
        torch, scheduler = self._torch, self._scheduler
        while (job := self._waiting.get()) is not None:
            request = job.request
            label = torch.tensor(list(request.labels))
            generator = torch.Generator().manual_seed(request.seed)
            scheduler.set_timesteps(request.schedule.steps)
            with torch.inference_mode():
                z = torch.randn(1, *self._pipe.latent_shape, generator=generator)
                for t in scheduler.timesteps:
                    e, _ = self._reference.predict(z, t.expand(1), label, request.guidance.scale)
                    z = scheduler.step(e, t, z).prev_sample
                (image,) = self._reference.images_from_decoded(self._reference.decode(z))
            job.notify(Finished(image, time.monotonic() - job.submitted))


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


def run(pipe: Pipeline, policy: str, arrivals: Sequence[Arrival], checkpoint: Path | None = None) -> Outcome:
    """Let requests arrive, and wait for all of them. ``checkpoint`` is that of diffusers' pipeline."""
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
    elif policy == DIFFUSERS:
        assert checkpoint is not None
        server = Diffusers(pipe, checkpoint)
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


def measure_saturation(pipe: Pipeline, count: int, rounds: int) -> dict[str, Any]:
    """All requests at once: images a second, and CPU seconds of each image, which other work changes less."""
    arrivals = [Arrival(0.0, int(steps), index) for index, steps in enumerate(choose_steps(count))]
    rows, found = [], {policy: list[tuple[float, float]]() for policy in POLICIES}
    for number in range(rounds + 1):
        for policy, each in found.items():
            before = time.process_time()
            rate = run(pipe, policy, arrivals).rate
            if number:  # the first round imports, and fills caches
                each.append((rate, (time.process_time() - before) / count))
    for policy, each in found.items():
        rates, works = zip(*each, strict=True)
        rows.append(
            {"policy": policy, "done_per_s": statistics.median(rates), "cpu_s_per_image": statistics.median(works)}
        )
    return {"engine": pipe.engine.info.name, "requests": count, "rounds": rounds, "rows": rows}


def choose_steps(count: int) -> NDArray[np.int64]:
    """Steps of so many requests."""
    return np.random.default_rng(0).choice(STEPS, count)


def measure(pipe: Pipeline, count: int, rounds: int, checkpoint: Path | None = None) -> dict[str, Any]:
    """All loads and policies."""
    policies = (*POLICIES, DIFFUSERS) if checkpoint else POLICIES
    flood = [Arrival(0.0, int(steps), index) for index, steps in enumerate(choose_steps(4 * BATCH))]
    rate = run(pipe, "running batch", flood).rate
    rows = []
    for load in LOADS:
        outcomes: dict[str, list[Outcome]] = {policy: [] for policy in policies}
        arrivals = arrivals_at(load * rate, count, 1)
        for _ in range(rounds):
            for policy in policies:
                outcomes[policy].append(run(pipe, policy, arrivals, checkpoint))
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
                        for one in (each if policy != DIFFUSERS else [])
                        for mine, image in zip(one.images, alone, strict=True)
                    )
                    if policy != DIFFUSERS
                    else None,
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
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--saturation", action="store_true")
    parser.add_argument("--diffusers", type=Path, metavar="CHECKPOINT")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    pipe = Pipeline(args.bundle, args.engine, args.threads)
    if args.gpu_step:
        pipe.engine = SleepingEngine(open_bundle(args.bundle), threads=1)
        pipe.engine.base, pipe.engine.each = args.gpu_step
    if args.saturation:
        found = measure_saturation(pipe, args.requests, args.rounds)
        print("| policy | done/s | CPU s of an image |\n|---|---|---|")
        for row in found["rows"]:
            print(f"| {row['policy']} | {row['done_per_s']:.2f} | {row['cpu_s_per_image']:.4f} |")
    else:
        found = {**measure(pipe, args.requests, args.rounds, args.diffusers), "gpu_step_ms": args.gpu_step}
        show(found)
    if args.output:
        with replace_file(args.output) as file:
            file.write_text(json.dumps(found, indent=1) + "\n")


def least_p95(base: float, each: float, load: float) -> float:
    """Seconds of a request of the most steps in a batch that never changes and just keeps up with a load.

    Images leave and come at random, so that most steps are in larger batches: no order of requests gives less to all.

    Args:
        base, each: a step takes ``base + each · 2 · B`` ms.
        load: of what full batches do.
    """
    rate = load * BATCH / (base + each * 2 * BATCH)  # steps of images in a ms
    images = rate * base / (1 - 2 * each * rate)
    return max(STEPS) * (base + each * 2 * images) / 1e3


def show(found: dict[str, Any]) -> None:
    if found["gpu_step_ms"]:
        for load in LOADS[:2]:
            least = least_p95(*found["gpu_step_ms"], load)
            print(f"at {load:g}, requests of {max(STEPS)} steps take {least:.2f} s in the smallest batch that keeps up")
    print("| load | policy | done/s | p50 s | p95 s | p50 s of 10 steps | largest difference |")
    print("|---|---|---|---|---|---|---|")
    for row in found["rows"]:
        times = " | ".join(f"{row[name]:.2f}" for name in ("done_per_s", "p50_s", "p95_s", "short_p50_s"))
        print(f"| {row['load']:g} | {row['policy']} | {times} | {row['largest_difference']} |")


if __name__ == "__main__":
    main()
