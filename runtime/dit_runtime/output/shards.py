"""Images packed into shards: which images a shard has, which shards are left to make, and the making of one.

A folder of shards is its own ledger. ``000042.tar`` exists once it is whole, so a shard that exists is done, whoever is
killed at whatever moment. ``shards.json`` beside it says how all of them are made; who asks for other images there is
refused.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from dit_runtime.bundle.manifest import Manifest
from dit_runtime.bundle.reader import open_bundle
from dit_runtime.core.errors import BundleError, OutputError, SamplingError
from dit_runtime.core.progress import Progress
from dit_runtime.core.reading import kind_of
from dit_runtime.core.replace import check_writable
from dit_runtime.output.inputs import read_input_files
from dit_runtime.output.jobs import Jobs
from dit_runtime.output.provenance import Entry, entry_from_request
from dit_runtime.output.request import LabelledImages, OutputRequest, SampleRequest, ShardSettings
from dit_runtime.output.series import (
    check_settings,
    job_from_series,
    labels_of_images,
    series_from_labels,
)
from dit_runtime.output.shard_files import new_shard
from dit_runtime.output.shard_record import RECORD, claim_folder, compare_records, read_record, record_of
from dit_runtime.output.writer import Written, make_job
from dit_runtime.pipeline import Pipeline
from dit_runtime.sampling.tiles import check_tile

HOPELESS = 3  # shards that failed, and none was made: the others would fail too

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ShardPlan:
    """Which images every shard has. The plan follows from the request alone, so that everybody has the same.

    Attributes:
        path: the folder of the shards.
        images: of all shards together.
        size: images in a shard; the last one may have fewer.
        folders: whether shards are folders; else they are tar files.
        numbers: of the shards that are asked for: all, or a part of them.
    """

    path: Path
    images: int
    size: int
    folders: bool
    numbers: range

    def file_of(self, number: int) -> Path:
        """Where a shard is when it is whole."""
        return self.path / f"{number:06d}{'' if self.folders else '.tar'}"

    def images_of(self, number: int) -> range:
        """The indices of a shard's images."""
        return range(number * self.size, min((number + 1) * self.size, self.images))

    def is_made(self, number: int) -> bool:
        """Whether a shard is there."""
        return kind_of(self.file_of(number)) == ("folder" if self.folders else "file")

    def missing(self) -> list[int]:
        """The shards that are left to make."""
        return [number for number in self.numbers if not self.is_made(number)]


def plan_shards(manifest: Manifest, asked: LabelledImages, output: OutputRequest) -> ShardPlan:
    """The plan of a request for shards.

    Raises:
        SamplingError: there are fewer shards than parts, or no such part.
        OutputError: the output is a file, or all shards are to be made again.
    """
    settings, (part, parts) = _settings_of(output), asked.shard
    count = len(labels_of_images(manifest, asked))
    shards = -(-count // settings.size)
    if not 1 <= part <= parts:
        raise SamplingError(f"shard {part}/{parts}: expected a number from 1 to {parts}")
    if parts > shards:
        raise SamplingError(
            f"{parts} parts of {shards} shards of {settings.size} images: expected at most one part for each shard"
        )
    numbers = range(shards * (part - 1) // parts, shards * part // parts)
    return ShardPlan(output.path, count, settings.size, settings.folders, numbers)


def check_shard_output(output: OutputRequest) -> None:
    """Raises OutputError, before the work, for a path that shards cannot be written to."""
    if output.is_grid:
        raise OutputError(f"{output.path}: is the name of one image, and shards need a folder; choose another --output")
    if output.overwrite:
        raise OutputError(f"{output.path}: a shard that is there is done; remove the folder to make all of them again")
    if kind_of(output.path) not in (None, "folder"):
        raise OutputError(f"{output.path}: is a file, and shards need a folder; choose another --output")
    check_writable(output.path / RECORD)


class ShardMaker:
    """Makes shards of one request in this process. The first maker in a folder writes down how its shards are made.

    Attributes:
        plan: which shards there are.
        steps: of an image.
        entry: how the images are made: that of the first one, as far as they are alike.

    Args:
        request: of ``LabelledImages``, with ``OutputRequest.shards``.
        digest: the bundle's, where somebody else has opened it before; None takes whatever bundle is there.

    Raises:
        DiTError: the request does not fit the bundle, a file of it cannot be read or written, the bundle is another
            one, or the folder has shards of other images.
    """

    def __init__(self, request: SampleRequest, digest: str | None = None) -> None:
        assert isinstance(request.images, LabelledImages)
        self._asked, output = request.images, request.output
        check_shard_output(output)
        check_tile(self._asked.decoding.tile)
        inputs, bundle = read_input_files(request.inputs), open_bundle(request.bundle, request.store)
        if digest is not None and bundle.digest != digest:
            raise BundleError(
                f"{request.bundle}: is bundle {bundle.digest[:12]}… here, and {digest[:12]}… where the work was begun; "
                "copy the same bundle to every machine"
            )
        self.plan = plan_shards(bundle.manifest, self._asked, output)
        self._pipe = Pipeline(bundle, request.engine, request.threads, self._asked.size, request.precision)
        self._series = series_from_labels(self._pipe, self._asked, inputs)
        images = check_settings(self._pipe, self._series)
        first = images[self._series.labels[0]]
        self.steps, self._batch = first.schedule.steps, min(self._asked.batch_size, self.plan.size, self.plan.images)
        self._pipe.check_batch(self._batch)
        eta = self._series.settings.get("eta") or 0.0
        self.entry = entry_from_request(self._pipe, first, eta, self._asked.decoding)
        self._record = record_of(self.plan.images, self.plan.size, self.plan.folders, self._series, images, self.entry)
        claim_folder(output.path, self._record)

    def count_work(self, numbers: Iterable[int]) -> int:
        """The pieces of work in shards: each batch has its steps, and decoding."""
        return sum(len(self._batches_of(number)) for number in numbers) * (self.steps + 1)

    def make(self, number: int, completed: Callable[[int], None] = lambda count: None) -> int:
        """Make a shard, unless it is there already.

        Args:
            number: of the shard.
            completed: called with the number of pieces of ``count_work`` that are done.

        Returns:
            The images that were made.

        Raises:
            SamplingError: latents or pixels are not finite. The shard is not written.
            OutputError: the shard cannot be written, or the folder was begun again for other images meanwhile.
        """
        if self.plan.is_made(number):
            return 0
        parts = self._batches_of(number)
        each = (job_from_series(self._pipe, self._series, part, self._asked.decoding) for part in parts)
        jobs = Jobs(self._pipe, each, len(parts), self.steps, self._asked.decoding)
        path = self.plan.file_of(number)
        try:
            with new_shard(path, self.plan.folders) as shard:
                for job in jobs.each:
                    make_job(jobs, job, shard, lambda: completed(1))
                compare_records(path.parent / RECORD, read_record(path.parent / RECORD), self._record)
        except SamplingError as error:
            raise SamplingError(f"shard {path.name}: {error}") from error
        return shard.count

    def _batches_of(self, number: int) -> list[range]:
        images = self.plan.images_of(number)
        return [images[start : start + self._batch] for start in range(0, len(images), self._batch)]


class ShardCount:
    """The shards that a run has made, and those that failed, until it ends.

    Attributes:
        files: of the shards that were made.
        images: in them.
    """

    def __init__(self, plan: ShardPlan) -> None:
        self._plan, self._start = plan, time.monotonic()
        self.files: list[Path] = []
        self.images = 0
        self._failed: list[SamplingError] = []

    def add(self, number: int, images: int) -> None:
        """A shard was made; one of no images was there already."""
        self.images += images
        if images:
            self.files.append(self._plan.file_of(number))

    def fail(self, error: SamplingError) -> None:
        """A shard has an image that is not finite: the others are made all the same, unless all of them are like that.

        Raises:
            SamplingError: no shard could be made.
        """
        self._failed.append(error)
        logger.info("%s", error)
        if not self.files and len(self._failed) >= HOPELESS:
            raise self._failed[0]

    def finish(self, entry: Entry) -> Written:
        """What the run wrote.

        Raises:
            SamplingError: shards failed.
        """
        if self._failed:
            more = f"; {len(self._failed) - 1} more shards failed" if len(self._failed) > 1 else ""
            there = sum(map(self._plan.is_made, self._plan.numbers))
            raise SamplingError(f"{self._failed[0]}{more}; {there} shards are in {self._plan.path}")
        seconds = time.monotonic() - self._start
        return Written(self.images, tuple(sorted(self.files)), (entry,), seconds, None)


def write_shards(maker: ShardMaker, bar: Progress) -> Written:
    """Make all shards of a plan that are missing, one after the other.

    Args:
        maker: of the request.
        bar: of ``maker.count_work(maker.plan.missing())`` pieces.

    Raises:
        SamplingError: shards have images that are not finite; all others are written.
        OutputError: a shard cannot be written; those before it are written.
    """
    count = ShardCount(maker.plan)
    for number in maker.plan.missing():
        try:
            count.add(number, maker.make(number, bar.advance))
        except SamplingError as error:
            count.fail(error)
    return count.finish(maker.entry)


def _settings_of(output: OutputRequest) -> ShardSettings:
    assert output.shards is not None
    return output.shards
