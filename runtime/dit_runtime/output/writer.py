"""From jobs to files: each batch is sampled and decoded, and its images are written as soon as they are there."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from dit_runtime.core.errors import SamplingError
from dit_runtime.core.progress import Progress
from dit_runtime.output.images import Images, grid_from_images, read_png, write_png
from dit_runtime.output.inputs import RecordedFile
from dit_runtime.output.jobs import Jobs
from dit_runtime.output.provenance import Entry, text_from_entries
from dit_runtime.output.request import OutputRequest
from dit_runtime.output.series import Job, KeptImage, file_name_for


@dataclass(frozen=True)
class Written:
    """What one request wrote.

    Attributes:
        count: images.
        files: paths of the files; of a folder only with ``OutputRequest.list_all``.
        entries: how the images were made; of a folder without ``list_all`` only the first.
        seconds: from the first batch to the last file.
        difference: from the image that was made again, in levels of 255; None where none was compared.
    """

    count: int
    files: tuple[Path, ...]
    entries: tuple[Entry, ...]
    seconds: float
    difference: int | None


def write_images(jobs: Jobs, output: OutputRequest, bar: Progress) -> Written:
    """Make the images of all jobs, and write them.

    Args:
        jobs: from ``jobs_from_request``.
        output: the same request's.
        bar: of ``count_work(jobs)`` pieces.

    Raises:
        SamplingError: latents or pixels that are not finite; what was made before is written.
        OutputError: a file cannot be written.
    """
    start = time.monotonic()
    jobs.pipe.once = jobs.count == 1
    writer = _GridWriter(output, jobs.original) if output.is_grid else _FolderWriter(output)
    try:
        for job in jobs.each:
            if job.batch:
                make_job(jobs, job, writer, bar.advance)
            else:
                bar.skip(jobs.steps + 1)
    except SamplingError as error:
        writer.finish()
        finished = f"; {writer.count} finished images are in {output.path}" if writer.count else ""
        raise SamplingError(f"{error}{finished}") from error
    writer.finish()
    seconds = time.monotonic() - start
    difference = None
    if jobs.original is not None:
        difference = largest_difference(read_png(writer.last_file)[0], jobs.original.pixels)
    return Written(writer.count, tuple(writer.files), tuple(writer.entries), seconds, difference)


def count_work(jobs: Jobs) -> int:
    """The pieces of work in jobs: each has its steps, and decoding."""
    return jobs.count * (jobs.steps + 1)


def largest_difference(first: Images, second: Images) -> int | None:
    """The largest difference of two images in levels; None where their shapes differ."""
    return int(np.abs(first.astype(int) - second).max()) if first.shape == second.shape else None


class Writer(Protocol):
    """What takes finished images."""

    def add(self, kept: KeptImage, name: str, image: Images) -> None:
        """Take an image ``[H, W, 3]`` and the name of its file."""


def make_job(jobs: Jobs, job: Job, writer: Writer, completed: Callable[[], None]) -> None:
    """Make the images of a job that has some, and give them to a writer.

    Args:
        jobs: which the job is one of.
        job: of one batch.
        writer: takes the images.
        completed: called after each step, and after the last image.

    Raises:
        SamplingError: latents or pixels are not finite.
    """
    latents = jobs.pipe.sample_latents(job.batch, completed)
    images = jobs.pipe.decode(latents, jobs.decoding.tile, jobs.decoding.batch)
    for kept in job.kept:
        name = file_name_for(kept.index, job.batch[kept.position.index])
        writer.add(kept, name, images[kept.position.index])
    completed()


class _FolderWriter:
    """A file for each image, written at once."""

    def __init__(self, output: OutputRequest) -> None:
        self._output = output
        self.count = 0
        self.last_file = output.path
        self.files: list[Path] = []
        self.entries: list[Entry] = []

    def add(self, kept: KeptImage, name: str, image: Images) -> None:
        self.count += 1
        self.last_file = self._output.path / name
        write_png(self.last_file, image, text_from_entries([kept.entry], image))
        if self._output.list_all:
            self.files.append(self.last_file)
        if self._output.list_all or not self.entries:
            self.entries.append(kept.entry)

    def finish(self) -> None:
        """Every file is written already."""


class _GridWriter:
    """One file of all images, written when the last image is there, or none follows."""

    def __init__(self, output: OutputRequest, original: RecordedFile | None) -> None:
        self._output, self._original = output, original
        self._images: list[Images] = []
        self.last_file = output.path
        self.files: list[Path] = []
        self.entries: list[Entry] = []

    @property
    def count(self) -> int:
        return len(self._images)

    def add(self, kept: KeptImage, name: str, image: Images) -> None:
        """Its name is the grid's, not its own."""
        self._images.append(image)
        self.entries.append(kept.entry)

    def finish(self) -> None:
        if not self._images:
            return
        columns = self._output.columns
        if columns is None and self._original is not None:
            columns = self._original.pixels.shape[1] // self._images[0].shape[1]
        grid = grid_from_images(np.stack(self._images), columns)
        write_png(self._output.path, grid, text_from_entries(self.entries, grid))
        self.files.append(self._output.path)
