"""The batch loop of a server: many callers, one batch, and whatever befalls one of them."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.waiting import SECONDS, await_true

from dit_runtime import Pipeline
from dit_runtime.backends.base import Array
from dit_runtime.backends.onnxruntime.engine import OnnxRuntimeEngine
from dit_runtime.core.errors import EngineError, SamplingError
from dit_serve.batcher import Batcher
from dit_serve.jobs import (
    DeadlineError,
    Event,
    Failed,
    Finished,
    Job,
    Preview,
    QueueFullError,
    Started,
    StoppingError,
)


class HeldEngine(OnnxRuntimeEngine):
    """Waits before each call of the step until a test lets it go on; may spoil results, or fail."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.allowed = threading.Semaphore(0)
        self.batches: list[int] = []
        self.before: Callable[[int], None] = lambda call: None
        self.spoil: Callable[[str, list[Array]], None] = lambda graph, results: None

    def session(self, graph: str) -> Any:
        session, outer = super().session(graph), self

        class Held:
            def run(self, inputs: dict[str, Array], outputs: Sequence[str]) -> list[Array]:
                if graph == "step":
                    assert outer.allowed.acquire(timeout=SECONDS)
                    outer.batches.append(len(inputs["state"]))
                    outer.before(len(outer.batches))
                results = [result.copy() for result in session.run(inputs, outputs)]
                outer.spoil(graph, results)
                return results

        return Held()

    def allow(self, steps: int) -> None:
        for _ in range(steps):
            self.allowed.release()


@pytest.fixture
def held(bundles: dict[str, Path]) -> Pipeline:
    pipe = Pipeline(bundles["fp32"], "onnxruntime", threads=1)
    pipe.engine = HeldEngine(pipe.bundle, threads=1)
    return pipe


@pytest.fixture
def batcher(held: Pipeline) -> Iterator[Batcher]:
    with Batcher(held, batch_size=3, most_waiting=4) as running:
        yield running
        held.engine.allow(1000)


class Owner:
    """Somebody who waits for one image."""

    def __init__(self, pipe: Pipeline, seed: int, deadline: float | None = None, previews: int = 0, **settings: Any):
        self.events: queue.Queue[Event] = queue.Queue()
        (self.request,) = pipe.prepare([seed % 10], seed, **{"steps": 3, "sampler": "ddim", **settings})
        self.job = Job(self.request, self.events.put, deadline, previews)

    def next(self) -> Event:
        return self.events.get(timeout=SECONDS)

    def last(self) -> Event:
        while not isinstance(event := self.next(), Finished | Failed):
            pass
        return event


def alone(bundles: dict[str, Path], owner: Owner) -> Array:
    pipe = Pipeline(bundles["fp32"], "onnxruntime", threads=1)
    return pipe.decode(pipe.sample_latents([owner.request]))[0]


def assert_image(event: Event, bundles: dict[str, Path], owner: Owner) -> None:
    assert isinstance(event, Finished)
    assert np.array_equal(event.image, alone(bundles, owner))


def test_jobs_join_between_steps_and_get_their_own_image(
    held: Pipeline, batcher: Batcher, bundles: dict[str, Path]
) -> None:
    """Fails if a job waits for the batch to end, or its image is not the one that it gets alone."""
    first, second = Owner(held, 1, steps=4), Owner(held, 2, steps=2, sampler="dpmpp-2m", guidance=3.0)
    batcher.submit([first.job])
    assert isinstance(first.next(), Started)
    held.engine.allow(1)
    await_true(lambda: first.job.completed == 1)
    batcher.submit([second.job])
    held.engine.allow(4)
    for owner in (first, second):
        event = owner.last()
        assert_image(event, bundles, owner)
        assert event.seconds > 0
    # The call that waited when the second came has the first alone.
    assert held.engine.batches in ([1, 2, 2, 1], [1, 1, 2, 2])
    assert first.job.batches == (1, 2)
    assert second.job.batches[1] == 2
    load = batcher.load()
    assert (load.waiting, load.running, load.images, load.failures, load.steps) == (0, 0, 2, 0, 4)
    assert load.step_seconds > 0


def test_previews_come_as_asked_for(held: Pipeline, batcher: Batcher) -> None:
    """Fails if one comes at another step, for another job, or after the last step, whose image is the result."""
    watched, other = Owner(held, 1, previews=2, steps=4), Owner(held, 2, steps=4)
    batcher.submit([watched.job, other.job])
    held.engine.allow(10)
    events = [watched.next() for _ in range(3)]
    assert [type(event) for event in events] == [Started, Preview, Finished]
    assert [(event.step, event.steps) for event in events if isinstance(event, Preview)] == [(2, 4)]
    assert {event.image.shape for event in events[1:]} == {(32, 32, 3)}
    assert [type(other.next()) for _ in range(2)] == [Started, Finished]


def test_pixels_that_are_not_finite_fail_alone(held: Pipeline, batcher: Batcher, bundles: dict[str, Path]) -> None:
    """Images that are decoded together are decoded each alone where one of them fails."""

    def spoil(graph: str, results: list[Array]) -> None:
        if graph == "decoder" and (len(results[1]) > 1 or len(held.engine.batches) > 3):
            results[1][-1] = np.nan

    held.engine.spoil = spoil
    owners = [Owner(held, seed) for seed in (1, 2, 3)]
    batcher.submit([owner.job for owner in owners])
    held.engine.allow(10)
    for owner in owners:
        assert_image(owner.last(), bundles, owner)
    owner = Owner(held, 4)
    batcher.submit([owner.job])
    assert isinstance(failed := owner.last(), Failed)
    assert "decoded pixels are not finite" in str(failed.error)


def test_latents_that_are_not_finite_fail_alone(held: Pipeline, batcher: Batcher, bundles: dict[str, Path]) -> None:
    def spoil(graph: str, results: list[Array]) -> None:
        if graph == "step" and len(held.engine.batches) == 2:
            results[0][1] = np.inf

    held.engine.spoil = spoil
    owners = [Owner(held, seed, steps=4) for seed in (1, 2, 3)]
    batcher.submit([owner.job for owner in owners])
    held.engine.allow(10)
    assert isinstance(failed := owners[1].last(), Failed)
    assert "latents are not finite after step 2 of 4" in str(failed.error)
    for owner in (owners[0], owners[2]):
        assert_image(owner.last(), bundles, owner)
    assert held.engine.batches == [3, 3, 2, 2]
    assert (batcher.load().images, batcher.load().failures) == (2, 1)


def test_a_full_queue_takes_all_or_none(held: Pipeline, batcher: Batcher) -> None:
    """Three run, four wait; callers at once never get more places than there are."""
    running = [Owner(held, seed) for seed in range(3)]
    batcher.submit([owner.job for owner in running])
    assert all(isinstance(owner.next(), Started) for owner in running)
    batcher.submit([Owner(held, 5).job for _ in range(3)])
    with pytest.raises(QueueFullError, match="3 images are waiting, and 2 more would exceed 4"):
        batcher.submit([Owner(held, 6).job for _ in range(2)])
    assert batcher.load().waiting == 3
    accepted: list[bool] = []

    def ask(job: Job) -> None:
        try:
            batcher.submit([job])
            accepted.append(True)
        except QueueFullError:
            accepted.append(False)

    threads = [threading.Thread(target=ask, args=(Owner(held, 7).job,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(accepted) == [False] * 7 + [True]


def test_cancelled_jobs_leave_the_batch_and_the_queue(
    held: Pipeline, batcher: Batcher, bundles: dict[str, Path]
) -> None:
    """Fails if later steps carry them, they change who stays, or they hear of it."""
    stays, leaves = Owner(held, 1, steps=5), Owner(held, 2, steps=5)
    batcher.submit([stays.job, leaves.job])
    held.engine.allow(2)
    await_true(lambda: leaves.job.completed == 2)
    leaves.job.cancel()
    queued = Owner(held, 3)
    queued.job.cancel()
    batcher.submit([queued.job])
    held.engine.allow(3)
    assert_image(stays.last(), bundles, stays)
    assert held.engine.batches in ([2, 2, 1, 1, 1], [2, 2, 2, 1, 1])
    assert [type(leaves.events.get_nowait()), leaves.events.empty(), queued.events.empty()] == [Started, True, True]
    assert batcher.load().failures == 0


def test_a_late_job_fails_and_says_how_far_it_came(held: Pipeline, batcher: Batcher) -> None:
    """In the batch as in the queue."""
    late = Owner(held, 1, deadline=time.monotonic() + 0.2, steps=5)
    batcher.submit([late.job])
    held.engine.allow(1)
    await_true(lambda: late.job.completed == 1)
    time.sleep(0.3)
    held.engine.allow(1)
    assert isinstance(event := late.last(), Failed)
    assert isinstance(event.error, DeadlineError)
    assert "at 2 of 5 steps; ask for fewer" in str(event.error)
    waited = Owner(held, 2, deadline=time.monotonic() - 1)
    batcher.submit([waited.job])
    assert isinstance(event := waited.last(), Failed)
    assert "at 0 of 3 steps" in str(event.error)
    assert (batcher.load().failures, batcher.load().running, held.engine.batches) == (2, 0, [1, 1])


@pytest.mark.parametrize("error", [EngineError("out of memory"), MemoryError(), ZeroDivisionError("a fault")])
def test_an_engine_that_fails_takes_its_batch_alone(held: Pipeline, batcher: Batcher, error: Exception) -> None:
    """Whatever it raises: those in the batch are told, those that wait are made, and the thread lives."""

    def fail(call: int) -> None:
        if call == 1:
            raise error

    held.engine.before = fail
    owners = [Owner(held, seed) for seed in range(4)]
    batcher.submit([owner.job for owner in owners])
    held.engine.allow(10)
    for owner in owners[:3]:
        assert isinstance(event := owner.last(), Failed)
        assert isinstance(event.error, EngineError)
        assert str(event.error)
    assert isinstance(owners[3].last(), Finished)


def test_an_owner_that_fails_loses_its_own_job_alone(
    held: Pipeline, batcher: Batcher, caplog: pytest.LogCaptureFixture
) -> None:
    other, bad = Owner(held, 1), Owner(held, 2)

    def fail(event: Event) -> None:
        raise RuntimeError("gone")

    bad.job.notify = fail
    batcher.submit([bad.job, other.job])
    held.engine.allow(10)
    assert isinstance(other.last(), Finished)
    assert "a job's owner failed at Started" in caplog.text


def test_stopping_finishes_what_was_taken(held: Pipeline) -> None:
    """Nothing more is taken."""
    held.engine.allow(100)
    with Batcher(held, 2, 8) as batcher:
        owners = [Owner(held, seed) for seed in range(5)]
        batcher.submit([owner.job for owner in owners])
        assert batcher.stop(finish=True, timeout=SECONDS)
        assert all(isinstance(owner.last(), Finished) for owner in owners)
        with pytest.raises(StoppingError, match="being stopped"):
            batcher.submit([owners[0].job])


def test_stopping_at_once_tells_everybody(held: Pipeline) -> None:
    """Those in the batch and those that wait."""
    with Batcher(held, 2, 8) as batcher:
        owners = [Owner(held, seed) for seed in range(5)]
        batcher.submit([owner.job for owner in owners])
        assert isinstance(owners[0].next(), Started)
        threading.Timer(0.1, held.engine.allow, [50]).start()
        assert batcher.stop(finish=False, timeout=SECONDS)
    for owner in owners:
        assert isinstance(event := owner.last(), Failed)
        assert isinstance(event.error, StoppingError)


def test_sizes_are_checked(held: Pipeline) -> None:
    for sizes in ((0, 4), (2, 0)):
        with pytest.raises(SamplingError, match="expected at least 1"):
            Batcher(held, *sizes)
