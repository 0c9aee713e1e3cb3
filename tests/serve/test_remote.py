"""Jobs that engines elsewhere run, without a cluster: engines that die, are slow, are stopped or are never reached."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.waiting import SECONDS

from dit_runtime import Pipeline
from dit_runtime.core.errors import BundleError, DiTError, EngineError, SamplingError
from dit_runtime.sampling.requests import ImageRequest
from dit_serve import remote
from dit_serve.batcher import Batcher, Load
from dit_serve.images import RequestedImages
from dit_serve.jobs import (
    DeadlineError,
    Event,
    Failed,
    Finished,
    Preview,
    QueueFullError,
    Retried,
    Started,
    StoppingError,
)
from dit_serve.ray_arguments import RayArguments, read_arguments
from dit_serve.remote import Engines, RemoteBatcher, RemoteEngine, RemoteModel, Told

LOAD = Load(0, 1, 2, 5, 1, 0, 0.25)


class DiedError(Exception):
    pass


class FakeCall:
    """The events of one image, from a list of events, errors and seconds to wait."""

    def __init__(self, parts: list[Any]) -> None:
        self.parts, self.cancelled = iter(parts), False

    def __aiter__(self) -> AsyncIterator[Told]:
        return self

    async def __anext__(self) -> Told:
        for part in self.parts:
            if isinstance(part, float):
                await asyncio.sleep(part)
            elif isinstance(part, Exception):
                raise part
            else:
                return Told(part, {"engine": "far away"}, "e", LOAD)
        raise StopAsyncIteration

    def cancel(self) -> None:
        self.cancelled = True


class Fake:
    """Engines whose answers are given: one list for each call, the last one for all further ones."""

    def __init__(self, *answers: list[Any], most_waiting: int = 2, sent: int = 2) -> None:
        self.answers, self.calls, self.asked = list(answers), list[FakeCall](), list[tuple[Any, ...]]()
        self.batcher = RemoteBatcher(Engines(self.call, (DiedError,), 1, 2, sent), most_waiting)

    def call(self, request: ImageRequest, seconds: float | None, previews: int) -> FakeCall:
        self.asked.append((request, seconds, previews))
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        self.calls.append(FakeCall(answer))
        return self.calls[-1]


@pytest.fixture(scope="module")
def requests(pipe: Pipeline) -> list[ImageRequest]:
    return pipe.prepare([1, 2, 3, 4, 5], 0, steps=4)


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "GRACE_SECONDS", 0.0)


def run(work: Callable[[], Any]) -> Any:
    return asyncio.run(asyncio.wait_for(work(), SECONDS))


def events_of(fake: Fake, requests: list[ImageRequest], timeout: float | None = None) -> list[tuple[int, Event]]:
    async def collect() -> list[tuple[int, Event]]:
        async with RequestedImages(fake.batcher, requests, timeout, 3) as made:
            return [each async for each in made.iterate_events()]

    return run(collect)


def image(value: int) -> Any:
    return np.full((2, 2, 3), value, np.uint8)


def test_an_engine_that_dies_costs_a_retry(requests: list[ImageRequest]) -> None:
    """The caller sees how it goes on, and the same request is sent again: the same seed is the same image."""
    preview = Preview(1, 4, image(1))
    fake = Fake([Started(0.0), preview, DiedError()], [], [Started(0.0), Finished(image(7), 9.0)])
    found = [event for _, event in events_of(fake, requests[:1])]
    assert [type(event) for event in found] == [Started, Preview, Retried, Retried, Started, Finished]
    assert [event.attempt for event in found if isinstance(event, Retried)] == [1, 2]
    assert isinstance(found[-1], Finished)
    assert (found[-1].image[0, 0, 0], found[-1].seconds < 9) == (7, True)
    assert [request for request, _, _ in fake.asked] == [requests[0]] * 3
    assert [call.cancelled for call in fake.calls] == [True, True, False]
    load = fake.batcher.load()
    assert (load.images, load.failures, load.running, load.steps, load.batch_size) == (1, 0, 0, 5, 2)


def test_engines_that_die_all_the_time(requests: list[ImageRequest]) -> None:
    """Three retries, then one clear error, which is no fault of the request."""
    fake = Fake([DiedError()])
    *retries, last = [event for _, event in events_of(fake, requests[:1])]
    assert retries == [Retried(1), Retried(2), Retried(3)]
    assert isinstance(last, Failed)
    assert (type(last.error), "4 engines died while they made this image" in str(last.error)) == (EngineError, True)


@pytest.mark.parametrize(
    ("answer", "kind", "words"),
    [
        ([Failed(SamplingError("latents are not finite"))], SamplingError, "not finite"),
        ([Failed(DeadlineError("late"))], DeadlineError, "late"),
        ([ZeroDivisionError("oh")], EngineError, "fault of ours"),
        ([BundleError("altered")], BundleError, "altered"),
    ],
)
def test_what_fails_is_not_tried_again(
    answer: list[Any], kind: type[DiTError], words: str, requests: list[ImageRequest]
) -> None:
    """Only a death is: what an engine says itself, another would say too."""
    fake = Fake(answer)
    ((_, event),) = events_of(fake, requests[:1])
    assert isinstance(event, Failed)
    assert (type(event.error), words in str(event.error), len(fake.calls)) == (kind, True, 1)
    assert fake.batcher.load().failures == 1


def test_an_engine_that_is_being_stopped_is_left(requests: list[ImageRequest]) -> None:
    fake = Fake([Failed(StoppingError("stopping"))], [Finished(image(1), 0.0)])
    assert [type(event) for _, event in events_of(fake, requests[:1])] == [Retried, Finished]


def test_an_engine_that_says_nothing_is_late(requests: list[ImageRequest]) -> None:
    """The ingress itself keeps the time: a process that hangs says nothing. So do those that wait for a place."""
    fake = Fake([Started(0.0), 60.0], sent=1)
    found = events_of(fake, requests[:2], timeout=0.05)
    late = [event for _, event in found if isinstance(event, Failed)]
    assert [type(event.error) for event in late] == [DeadlineError, DeadlineError]
    assert len(fake.calls) == 1
    assert fake.calls[0].cancelled
    assert 0 < fake.asked[0][1] <= 0.05


def test_who_leaves_cancels_what_runs_and_what_waits(requests: list[ImageRequest]) -> None:
    fake = Fake([Started(0.0), 60.0])

    async def leave() -> None:
        async with RequestedImages(fake.batcher, requests[:4], None, 0) as made:
            started = [await anext(made.iterate_events()) for _ in range(2)]
            assert [type(event) for _, event in started] == [Started, Started]
            assert (fake.batcher.load().running, fake.batcher.load().waiting) == (2, 2)
        await asyncio.sleep(0.01)
        load = fake.batcher.load()
        assert (load.running, load.waiting, load.failures, len(fake.calls)) == (0, 0, 0, 2)
        assert all(call.cancelled for call in fake.calls)

    run(leave)


def test_a_full_queue(requests: list[ImageRequest]) -> None:
    """All images of a request are taken or none, with an estimate from the latest images."""
    fake = Fake([0.05, Finished(image(0), 0.0)])

    async def fill() -> None:
        async with RequestedImages(fake.batcher, requests[:4], None, 0) as made:
            with pytest.raises(QueueFullError, match="4 images are being made or waiting, and 1 more would exceed 4"):
                RequestedImages(fake.batcher, requests[4:], None, 0)
            assert len([event async for _, event in made.iterate_events()]) == 4
        await asyncio.sleep(0.01)
        with pytest.raises(QueueFullError) as caught:
            RequestedImages(fake.batcher, requests, None, 0)
        assert (fake.batcher.load().images, caught.value.seconds) == (4, 0)

    run(fill)


@contextlib.contextmanager
def running(pipe: Pipeline) -> Iterator[Batcher]:
    with Batcher(pipe, batch_size=2) as batcher:
        yield batcher


def test_an_image_is_the_pipelines(pipe: Pipeline, tmp_path: Path) -> None:
    """Through a batcher; its record names the engine that made it and not the ingress, which has none."""
    from dit_runtime.output.images import read_png
    from dit_runtime.output.provenance import entries_from_text

    ingress = Pipeline(pipe.bundle, RemoteEngine(pipe.engine.info))
    (request,) = ingress.prepare([3], [11], steps=4)
    with running(pipe) as batcher:

        async def make() -> bytes:
            def call(request: ImageRequest, seconds: float | None, previews: int) -> Any:
                async def events() -> AsyncIterator[Told]:
                    async with RequestedImages(batcher, [request], seconds, previews) as made:
                        async for _, event in made.iterate_events():
                            yield Told(event, {"engine": "far away", "threads": 3, "cpus": 5}, "e", batcher.load())

                return events()

            here = RemoteBatcher(Engines(call, (), 2, 1, 2), 8)
            model = RemoteModel("tiny", ingress, here)
            async with RequestedImages(here, [request], None, 0) as made:
                *_, (_, last) = [each async for each in made.iterate_events()]
            assert isinstance(last, Finished)
            assert np.array_equal(last.image, pipe([3], [11], steps=4)[0])
            return model.png(last.image, request)

        (tmp_path / "image.png").write_bytes(run(make))
    (entry,) = entries_from_text(tmp_path / "image.png", read_png(tmp_path / "image.png")[1])
    assert (entry["engine"], entry["threads"], entry["cpus"], entry["seed"]) == ("far away", 3, 5, 11)
    for use in (lambda: ingress.engine.session("step"), lambda: ingress.engine.open_loop(None)):  # type: ignore[arg-type]
        with pytest.raises(EngineError, match="elsewhere"):
            use()


def test_arguments() -> None:
    """Text, as on a command line, or values, as in a file of Serve's."""
    found = read_arguments(
        {
            "bundle": "b",
            "replicas": "2",
            "max_replicas": 4,
            "gpus": "1",
            "size": "256x384",
            "hosts": "a,b",
            "timeout": 9,
        }
    )
    assert (found.bundle, found.size, found.hosts) == (Path.cwd() / "b", (256, 384), ("a", "b"))
    assert (found.replicas, found.max_replicas, found.gpus, found.timeout) == (2, 4, 1, 9.0)
    assert read_arguments({"bundle": "/b", "token": None}) == RayArguments(Path("/b"))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "expected bundle=FOLDER"),
        ({"bundle": "b", "replica": 1}, "'replica': unknown; expected bundle, replicas"),
        ({"bundle": "b", "replicas": "many"}, "replicas='many': expected a whole number from 1"),
        ({"bundle": "b", "gpus": "-1"}, "gpus='-1': expected a whole number from 0"),
        ({"bundle": "b", "timeout": "0"}, "timeout='0': expected seconds above 0"),
        ({"bundle": "b", "size": "256"}, "size='256': expected HEIGHTxWIDTH"),
        ({"bundle": "b", "replicas": 3, "max_replicas": 2}, "max_replicas=2: expected at least replicas=3"),
        ({"bundle": 3}, "bundle=3: expected a path"),
    ],
)
def test_arguments_that_are_wrong(given: dict[str, Any], words: str) -> None:
    with pytest.raises(SamplingError) as caught:
        read_arguments(given)
    assert words in str(caught.value)
