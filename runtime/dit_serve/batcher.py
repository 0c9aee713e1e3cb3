"""The batch loop that all fronts share: one thread that owns an engine's batch, with jobs that join between steps."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from dit_runtime.core.errors import BundleError, DiTError, EngineError, SamplingError, explain
from dit_runtime.pipeline import Pipeline
from dit_runtime.samplers.noise import Float32
from dit_runtime.sampling.batch import Advance, Batch
from dit_serve.bundle_files import BundleFiles
from dit_serve.jobs import DeadlineError, Event, Failed, Finished, Job, Preview, QueueFullError, Started, StoppingError

logger = logging.getLogger(__name__)

LATEST = 100  # steps whose times are kept for ``Load.step_seconds``


@dataclass(frozen=True)
class Load:
    """What a batcher is doing, at one moment.

    Attributes:
        waiting: jobs in the queue.
        running: jobs in the batch.
        batch_size: most jobs in the batch.
        steps: calls of the engine's step so far.
        images: finished jobs so far.
        failures: failed jobs so far, without cancelled ones.
        step_seconds: median of the latest calls of the step; 0 before the first.
    """

    waiting: int
    running: int
    batch_size: int
    steps: int
    images: int
    failures: int
    step_seconds: float


class JobQueue(Protocol):
    """What takes jobs: a batcher, or what sends them to batchers elsewhere."""

    def submit(self, jobs: Sequence[Job]) -> None:
        """As ``Batcher.submit``."""

    def load(self) -> Load:
        """As ``Batcher.load``."""


class Batcher:
    """Runs jobs on a pipeline's engine in one batch. A context manager: it starts its thread, and stops it.

    A job joins the running batch between two steps, whatever its steps, sampler and guidance, and leaves it when it is
    finished, cancelled or late. Its latents are those of the same image made alone. A job fails alone where its latents
    or pixels are not finite. If the engine itself fails, all jobs in the batch fail, and the next ones get a new batch.

    Args:
        pipeline: used by the batcher's thread alone, but for ``prepare``.
        batch_size: most jobs in the batch.
        most_waiting: most jobs in the queue.

    Raises:
        SamplingError: the engine does not take batches of that size.
    """

    def __init__(self, pipeline: Pipeline, batch_size: int = 8, most_waiting: int = 64) -> None:
        pipeline.check_batch(batch_size)
        if most_waiting < 1:
            raise SamplingError(f"a queue of {most_waiting} jobs: expected at least 1")
        self._pipeline, self._batch_size, self._most_waiting = pipeline, batch_size, most_waiting
        self._files = BundleFiles(pipeline.bundle)
        self._waiting: deque[Job] = deque()
        self._running: dict[int, Job] = {}
        self._changed = threading.Condition()
        self._stopping = self._dropping = False
        self._steps = self._images = self._failures = 0
        self._times: deque[float] = deque(maxlen=LATEST)
        self._thread = threading.Thread(target=self._work, name="dit-batcher", daemon=True)

    def __enter__(self) -> Batcher:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop(finish=False)

    def submit(self, jobs: Sequence[Job]) -> None:
        """Put jobs into the queue, all or none.

        Raises:
            QueueFullError: the queue has no room for all of them.
            StoppingError: ``stop`` was called.
            BundleError: the bundle was altered since the batcher was made.
        """
        self._files.check()
        with self._changed:
            if self._stopping:
                raise StoppingError("no more images are made here: this server is being stopped; ask another one")
            if len(self._waiting) + len(jobs) > self._most_waiting:
                steps = sum(job.request.schedule.steps for job in self._waiting)
                raise QueueFullError(
                    f"{len(self._waiting)} images are waiting, and {len(jobs)} more would exceed "
                    f"{self._most_waiting}; try again later, or ask for fewer at once",
                    steps / self._batch_size * self._step_seconds(),
                )
            self._waiting.extend(jobs)
            self._changed.notify()

    def stop(self, finish: bool, timeout: float | None = None) -> bool:
        """Take no more jobs, and end the thread.

        Args:
            finish: whether the jobs that are waiting and running are finished; else they fail.
            timeout: seconds to wait for the end; None waits for ever.

        Returns:
            Whether the thread has ended.
        """
        with self._changed:
            self._stopping = True
            self._dropping |= not finish
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join(timeout)
        return not self._thread.is_alive()

    def load(self) -> Load:
        """What the batcher is doing."""
        with self._changed:
            return Load(
                waiting=len(self._waiting),
                running=len(self._running),
                batch_size=self._batch_size,
                steps=self._steps,
                images=self._images,
                failures=self._failures,
                step_seconds=self._step_seconds(),
            )

    def _step_seconds(self) -> float:
        return float(np.median(self._times)) if self._times else 0.0

    def _work(self) -> None:
        """The thread: a batch after the other, a new one only where the engine failed."""
        while self._wait_for_work():
            try:
                with Batch(self._pipeline.engine, self._pipeline.manifest, goes_on=True) as batch:
                    while self._wait_for_work():
                        self._run_step(batch)
            except Exception as error:  # noqa: BLE001  # whatever it is, somebody waits for an answer
                self._fail_all(error if isinstance(error, DiTError) else EngineError(explain(error)))

    def _wait_for_work(self) -> bool:
        """Whether there is a job to run; waits for one, and returns False when the batcher is to end."""
        with self._changed:
            while not (self._waiting or self._running or self._stopping):
                self._changed.wait()
            dropping, left = self._dropping, bool(self._waiting or self._running)
        if dropping and left:
            self._fail_all(StoppingError("this server is being stopped; ask for the image again"))
            return False
        return left

    def _run_step(self, batch: Batch) -> None:
        """Let jobs leave and join, run one step, and tell what came of it."""
        self._let_leave(batch)
        joining = self._take_joining()
        batch.add([(job.key, job.request) for job in joining])
        for job in joining:
            _tell(job, Started(time.monotonic() - job.submitted))
        if not len(batch):
            return
        self._pipeline.trust(batch.next_shape)
        start = time.perf_counter()
        step = batch.advance(read=any(job.preview_steps for job in self._running.values()))
        with self._changed:
            self._times.append(time.perf_counter() - start)
            self._steps += 1
        for key, completed in zip(step.keys, step.completed, strict=True):
            self._running[key].completed += completed
            self._running[key].note_batch(len(step.keys))
        for key, error in step.failed.items():
            self._end(key, Failed(error))
        self._show_previews(step)
        self._finish(step)

    def _let_leave(self, batch: Batch) -> None:
        """Remove cancelled and late jobs from the queue and from the batch."""
        now = time.monotonic()
        with self._changed:
            jobs = [*self._running.values(), *self._waiting]
        gone = [job for job in jobs if job.cancelled or (job.deadline is not None and job.deadline <= now)]
        if not gone:
            return
        keys = {job.key for job in gone}
        batch.remove(keys)
        with self._changed:
            self._waiting = deque(job for job in self._waiting if job.key not in keys)
            for key in keys:
                self._running.pop(key, None)
            late = [job for job in gone if not job.cancelled]
            self._failures += len(late)
        for job in late:
            steps, seconds = job.request.schedule.steps, now - job.submitted
            error = DeadlineError(
                f"not finished after {seconds:.3g} s, at {job.completed} of {steps} steps; ask for fewer steps, or "
                "allow more time"
            )
            _tell(job, Failed(error))

    def _take_joining(self) -> list[Job]:
        """Move jobs from the queue to the running ones while the batch has room."""
        with self._changed:
            room = self._batch_size - len(self._running)
            joining = [self._waiting.popleft() for _ in range(min(room, len(self._waiting)))]
            self._running |= {job.key: job for job in joining}
        return joining

    def _show_previews(self, step: Advance) -> None:
        due = [
            index
            for index, key in enumerate(step.keys)
            if step.completed[index] and key in self._running and self._running[key].wants_preview()
        ]
        if not due:
            return
        for index, image in zip(due, self._decode(step.denoised[due]), strict=True):
            job = self._running[step.keys[index]]
            if not isinstance(image, SamplingError):
                _tell(job, Preview(job.completed, job.request.schedule.steps, image))

    def _finish(self, step: Advance) -> None:
        done = [index for index, finished in enumerate(step.finished) if finished]
        if not done:
            return
        images: list[NDArray[np.uint8] | DiTError] = [*self._decode(step.latents[done])]
        try:
            self._files.check()
        except BundleError as error:
            images = [error] * len(done)
        now = time.monotonic()
        for index, image in zip(done, images, strict=True):
            job = self._running[step.keys[index]]
            ended = Failed(image) if isinstance(image, DiTError) else Finished(image, now - job.submitted, job.batches)
            self._end(job.key, ended)

    def _decode(self, latents: Float32) -> list[NDArray[np.uint8] | SamplingError]:
        """Decode latents ``[N, C, h, w]`` together, or where that fails, each alone: an image or an error of each."""
        try:
            return list(self._pipeline.decode(latents))
        except SamplingError as error:
            if len(latents) == 1:
                return [error]
        return [self._decode(part[None])[0] for part in latents]

    def _end(self, key: int, event: Event) -> None:
        """Tell a running job how it ended."""
        with self._changed:
            job = self._running.pop(key)
            if isinstance(event, Failed):
                self._failures += 1
            else:
                self._images += 1
        _tell(job, event)

    def _fail_all(self, error: DiTError) -> None:
        """Let all running jobs fail; when the batcher is stopped without finishing, the waiting ones too."""
        with self._changed:
            ended = list(self._running.values())
            self._running.clear()
            if self._dropping:
                ended += self._waiting
                self._waiting.clear()
            self._failures += len(ended)
        for job in ended:
            _tell(job, Failed(error))


def _tell(job: Job, event: Event) -> None:
    """Tell a job's owner, unless nobody waits; an owner that fails loses its own job alone."""
    if job.cancelled:
        return
    try:
        job.notify(event)
    except Exception:
        logger.exception("a job's owner failed at %s", type(event).__name__)
        job.cancel()
