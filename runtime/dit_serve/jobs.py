"""A job is one image that somebody waits for; events say how it goes on."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from dit_runtime.core.errors import DiTError, EngineError, SamplingError
from dit_runtime.sampling.requests import ImageRequest


class QueueFullError(DiTError):
    """As many jobs are waiting as may wait; try again later.

    Attributes:
        seconds: until the queue will be about empty.
    """

    def __init__(self, message: str, seconds: float) -> None:
        super().__init__(message)
        self.seconds = seconds


class StoppingError(DiTError):
    """The batcher takes no more jobs: it is being stopped."""


class DeadlineError(DiTError):
    """A job was not finished in its time."""


@dataclass(frozen=True)
class Started:
    """The job joined the batch.

    Attributes:
        waited: seconds since it was submitted.
    """

    waited: float


@dataclass(frozen=True, eq=False)
class Preview:
    """The image as far as the steps have come.

    Attributes:
        step: completed steps.
        steps: of the whole job.
        image: the decoded estimate of the clean latents, uint8 ``[H, W, 3]``.
    """

    step: int
    steps: int
    image: NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class Finished:
    """The image.

    Attributes:
        image: uint8 ``[H, W, 3]``.
        seconds: since the job was submitted.
        batches: the fewest and the most images in the batch while the image was made; None where nobody counted.
    """

    image: NDArray[np.uint8]
    seconds: float
    batches: tuple[int, int] | None = None


@dataclass(frozen=True)
class Failed:
    """The job ended without an image: its latents or pixels are not finite, it is late, or the engine failed."""

    error: DiTError

    @property
    def fault(self) -> DiTError:
        """The error for the caller. A job's settings were checked before it began: it is no fault of the request."""
        return EngineError(str(self.error)) if isinstance(self.error, SamplingError) else self.error


@dataclass(frozen=True)
class Retried:
    """What made the image has died, and another begins it again. The same seed gives the same image.

    Attributes:
        attempt: from 1.
    """

    attempt: int


Event = Started | Preview | Finished | Failed | Retried
Notify = Callable[[Event], None]

_keys = itertools.count()


@dataclass(eq=False)
class Job:
    """One image that somebody waits for.

    Attributes:
        request: from ``Pipeline.prepare``.
        notify: called with each event, in the batcher's thread: it must return at once and raise nothing.
        deadline: of ``time.monotonic``, after which the job fails; None waits for ever.
        preview_steps: a preview after so many completed steps each; 0 gives none.
        key: the job's own number.
        submitted: when the job was made, of ``time.monotonic``.
        completed: steps that are done.
        batches: as in ``Finished``.
        cancelled: whether nobody waits any more.
        on_cancel: called by ``cancel``, for a job that is made elsewhere.
    """

    request: ImageRequest
    notify: Notify
    deadline: float | None = None
    preview_steps: int = 0
    key: int = field(default_factory=lambda: next(_keys))
    submitted: float = field(default_factory=time.monotonic)
    completed: int = 0
    batches: tuple[int, int] | None = None
    cancelled: bool = False
    on_cancel: Callable[[], object] = lambda: None

    def cancel(self) -> None:
        """Let the job leave the queue, or the batch after the step that runs. No event follows that step."""
        self.cancelled = True
        self.on_cancel()

    def note_batch(self, size: int) -> None:
        """Take account of a step in a batch of so many images."""
        least, most = self.batches or (size, size)
        self.batches = min(least, size), max(most, size)

    def wants_preview(self) -> bool:
        """Whether a preview is due after the step that was just completed."""
        steps = self.request.schedule.steps
        return bool(self.preview_steps) and self.completed < steps and self.completed % self.preview_steps == 0
