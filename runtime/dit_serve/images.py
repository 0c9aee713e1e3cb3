"""The images of one request: jobs that are submitted together, and their events in the order in which they come."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from collections.abc import AsyncIterator, Sequence

from dit_runtime.sampling.requests import ImageRequest
from dit_serve.batcher import JobQueue
from dit_serve.jobs import Event, Failed, Finished, Job


class RequestedImages:
    """The images of one request, while they are made. An async context manager: who leaves it cancels them.

    Args:
        batcher: which makes them.
        requests: of the images.
        timeout: seconds until all of them must be finished; None waits for ever.
        preview_steps: a preview of each image after so many steps each; 0 gives none.

    Raises:
        QueueFullError, StoppingError: as ``Batcher.submit``, which the constructor calls.
    """

    def __init__(
        self, batcher: JobQueue, requests: Sequence[ImageRequest], timeout: float | None, preview_steps: int
    ) -> None:
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        deadline = None if timeout is None else time.monotonic() + timeout
        self._jobs = [
            Job(request, functools.partial(self._notify, index), deadline, preview_steps)
            for index, request in enumerate(requests)
        ]
        batcher.submit(self._jobs)

    async def __aenter__(self) -> RequestedImages:
        return self

    async def __aexit__(self, *_: object) -> None:
        for job in self._jobs:
            job.cancel()

    async def iterate_events(self) -> AsyncIterator[tuple[int, Event]]:
        """Yield each event with its image's index, until every image is finished or has failed."""
        left = len(self._jobs)
        while left:
            index, event = await self._events.get()
            left -= isinstance(event, Finished | Failed)
            yield index, event

    def _notify(self, index: int, event: Event) -> None:
        """Take an event from the batcher's thread; when the server's loop has ended, nobody waits for it."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._events.put_nowait, (index, event))
