"""Jobs that engines elsewhere run: sent there one by one, and begun again where an engine's process dies.

Nothing here knows how an engine is reached: a call gives the events of one image.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol, TypeVar
from weakref import WeakKeyDictionary

import numpy as np

from dit_runtime.backends.base import EngineInfo, Session
from dit_runtime.backends.conditioning import TableLimits
from dit_runtime.backends.host_loop import HostLoop
from dit_runtime.core.errors import DiTError, EngineError, explain
from dit_runtime.pipeline import Pipeline
from dit_runtime.samplers.schedule import Schedule
from dit_runtime.sampling.requests import ImageRequest
from dit_serve.batcher import Load
from dit_serve.jobs import (
    DeadlineError,
    Failed,
    Finished,
    Job,
    Preview,
    QueueFullError,
    Retried,
    Started,
    StoppingError,
)
from dit_serve.model import ServedModel

RETRIES = 3  # of an image whose engine's process died
GRACE_SECONDS = 2.0  # beyond a deadline, in which an engine says itself that an image is late
LATEST = 100  # finished images whose times are kept

T = TypeVar("T")


class Told(NamedTuple):
    """What an engine tells of a job.

    Attributes:
        event: how the job goes on.
        maker: the keys of an image's record that name its maker.
        engine: the engine's own number.
        load: what its batcher is doing.
    """

    event: Any
    maker: Mapping[str, Any]
    engine: str
    load: Load


class Call(Protocol):
    """The events of one image, as an engine tells them."""

    def __aiter__(self) -> AsyncIterator[Told]:
        """Itself."""

    async def __anext__(self) -> Told:
        """The next event."""

    def cancel(self) -> object:
        """Nobody waits any more."""


@dataclass(frozen=True)
class Engines:
    """How engines are reached.

    Attributes:
        call: sends an image, seconds that it may take and the steps between previews; returns its events.
        lost: errors that mean that an engine's process died, or never was reached.
        batch_size: most images in one engine's batch.
        count: of engines.
        sent: most images that are sent and not finished; the others wait here, in their order.
    """

    call: Callable[[ImageRequest, float | None, int], Call]
    lost: tuple[type[Exception], ...]
    batch_size: int
    count: int
    sent: int


class RemoteBatcher:
    """Sends jobs to engines, in place of a batcher. Used in the event loop of a server alone.

    Args:
        engines: which make the images.
        most_waiting: most jobs beside those for which the engines have room.
    """

    def __init__(self, engines: Engines, most_waiting: int) -> None:
        self._engines, self._most_waiting = engines, most_waiting
        self._tasks: dict[asyncio.Task[None], Job] = {}
        self._places = asyncio.Semaphore(engines.sent)
        self._running = set[int]()
        self._images = self._failures = 0
        self._ended: deque[float] = deque(maxlen=LATEST)
        self._loads: dict[str, Load] = {}
        self.makers: WeakKeyDictionary[ImageRequest, Mapping[str, Any]] = WeakKeyDictionary()

    def submit(self, jobs: Sequence[Job]) -> None:
        """As ``Batcher.submit``."""
        room = self._engines.batch_size * self._engines.count + self._most_waiting
        if len(self._tasks) + len(jobs) > room:
            raise QueueFullError(
                f"{len(self._tasks)} images are being made or waiting, and {len(jobs)} more would exceed {room}; try "
                "again later, or ask for fewer at once",
                self._seconds_left(),
            )
        for job in jobs:
            task = asyncio.get_running_loop().create_task(self._run(job))
            self._tasks[task] = job
            task.add_done_callback(self._tasks.pop)
            job.on_cancel = task.cancel

    def load(self) -> Load:
        """As ``Batcher.load``: of all engines together, as far as they have told."""
        loads = self._loads.values()
        return Load(
            waiting=len(self._tasks) - len(self._running),
            running=len(self._running),
            batch_size=self._engines.batch_size * self._engines.count,
            steps=sum(load.steps for load in loads),
            images=self._images,
            failures=self._failures,
            step_seconds=float(np.median([load.step_seconds for load in loads])) if loads else 0.0,
        )

    def _seconds_left(self) -> float:
        """About how long the images that were asked for take, at the rate of the latest ones."""
        if len(self._ended) < 2:
            return 1.0
        return len(self._tasks) * (self._ended[-1] - self._ended[0]) / (len(self._ended) - 1)

    async def _run(self, job: Job) -> None:
        """A job until it ends, with each engine that it is sent to."""
        try:
            for attempt in range(RETRIES + 1):
                if attempt:
                    job.notify(Retried(attempt))
                    await asyncio.sleep(0.1 * attempt)
                await self._within(job, self._places.acquire())
                try:
                    if await self._call(job):
                        return
                except self._engines.lost:
                    pass  # the next engine begins the image again
                finally:
                    self._places.release()
                    self._running.discard(job.key)
            self._fail(job, EngineError(f"{RETRIES + 1} engines died while they made this image; ask for it again"))
        except Exception as error:  # noqa: BLE001  # whatever it is, somebody waits for an answer
            self._fail(job, error if isinstance(error, DiTError) else EngineError(explain(error)))

    async def _call(self, job: Job) -> bool:
        """Whether an engine ended the job; it did not where it is being stopped, or says nothing more."""
        left = None if job.deadline is None else job.deadline - time.monotonic()
        call, ended = self._engines.call(job.request, left, job.preview_steps), False
        try:
            while True:
                told = await self._next(call, job)
                if told is None:
                    return False
                event = told.event
                self._loads[told.engine] = told.load
                if isinstance(event, Failed) and isinstance(event.error, StoppingError):
                    return False
                if isinstance(event, Preview):
                    job.completed = event.step
                if isinstance(event, Started):
                    self._running.add(job.key)
                    event = Started(time.monotonic() - job.submitted)
                if isinstance(event, Finished):
                    self.makers[job.request] = told.maker
                    self._images += 1
                    self._ended.append(time.monotonic())
                    event = replace(event, seconds=time.monotonic() - job.submitted)
                if isinstance(event, Failed):
                    self._failures += 1
                ended = isinstance(event, Finished | Failed)
                job.notify(event)
                if ended:
                    return True
        finally:
            if not ended:
                call.cancel()

    async def _next(self, call: Call, job: Job) -> Told | None:
        """The next event; None where none follows."""
        try:
            return await self._within(job, call.__anext__())
        except StopAsyncIteration:
            return None

    async def _within(self, job: Job, work: Awaitable[T]) -> T:
        """Wait for work, but no longer than for the job. Raises DeadlineError."""
        left = None if job.deadline is None else job.deadline + GRACE_SECONDS - time.monotonic()
        try:
            return await asyncio.wait_for(work, left)
        except (asyncio.TimeoutError, TimeoutError) as error:  # one class from Python 3.11 on
            seconds = time.monotonic() - job.submitted
            raise DeadlineError(
                f"not finished after {seconds:.3g} s, at {job.completed} of {job.request.schedule.steps} steps; ask "
                "for fewer steps, or allow more time"
            ) from error

    def _fail(self, job: Job, error: DiTError) -> None:
        self._failures += 1
        job.notify(Failed(error))


class RemoteEngine:
    """The facts of an engine elsewhere, for a pipeline that prepares requests and makes no image."""

    def __init__(self, info: EngineInfo) -> None:
        self.info = info

    def session(self, graph: str) -> Session:
        """Raises EngineError: its graphs are elsewhere."""
        raise EngineError(f"{self.info.name}: its graphs run elsewhere")

    def release(self, graph: str) -> None:
        """There is nothing here to release."""

    def open_loop(self, limits: TableLimits) -> HostLoop:
        """As ``session``."""
        raise EngineError(f"{self.info.name}: its loop runs elsewhere")

    def close(self) -> None:
        """There is nothing here to close."""


class RemoteModel(ServedModel):
    """A bundle whose images engines elsewhere make."""

    def __init__(
        self, name: str, pipe: Pipeline, batcher: RemoteBatcher, tables: Mapping[str, Schedule] | None = None
    ) -> None:
        super().__init__(name, pipe, batcher, tables)
        self._makers = batcher.makers

    def maker_of(self, request: ImageRequest) -> Mapping[str, Any]:
        """As ``ServedModel.maker_of``."""
        return self._makers.get(request, {})
