"""Images packed into shards: which images a shard has, which shards are left to make, and the making of one.

A folder of shards is its own ledger. ``000042.tar`` exists once it is whole, so a shard that exists is done, whoever is
killed at whatever moment. ``shards.json`` beside it says how all of them are made; who asks for other images there is
refused.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dit_runtime.bundle.manifest import Manifest
from dit_runtime.bundle.reader import open_bundle
from dit_runtime.core.decode import DecodeError, decode, read_json, show
from dit_runtime.core.errors import BundleError, OutputError, SamplingError
from dit_runtime.core.progress import Progress
from dit_runtime.core.reading import kind_of
from dit_runtime.core.replace import check_writable, clear_litter, scratch_folder
from dit_runtime.output.inputs import read_input_files
from dit_runtime.output.jobs import Jobs
from dit_runtime.output.provenance import Entry, entry_from_request
from dit_runtime.output.request import LabelledImages, OutputRequest, SampleRequest, ShardSettings
from dit_runtime.output.series import (
    Series,
    check_settings,
    job_from_series,
    labels_of_images,
    series_from_labels,
)
from dit_runtime.output.shard_files import new_shard
from dit_runtime.output.writer import Written, make_job
from dit_runtime.pipeline import Pipeline
from dit_runtime.sampling.requests import ImageRequest
from dit_runtime.sampling.tiles import check_tile

RECORD = "shards.json"
RECORD_BYTES = 64 * 1024
SCHEMA = 1
SHOWN = 3  # differences in a message
HOPELESS = 3  # shards that failed, and none was made: the others would fail too
# What all images of a folder of shards have alike, by the keys of their entries.
ALIKE = (
    *("model", "bundle", "precision", "engine", "negative_label", "noise_device", "noise_dtype", "cuda_threads"),
    *("sampler", "spacing", "steps", "eta", "table", "guidance_interval", "guidance_schedule", "strength", "size"),
    "decode_tile",
)

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
        self._record = _record_of(self.plan, self._series, images, self.entry)
        _claim(output.path, self._record)

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
                _compare(path.parent / RECORD, _read_record(path.parent / RECORD), self._record)
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


def _record_of(plan: ShardPlan, series: Series, images: dict[int | str, ImageRequest], entry: Entry) -> dict[str, Any]:
    """How all images of a folder of shards are made. Lists of numbers, which may be long, are there as hashes."""
    weights = {label: {str(key): weight for key, weight in image.labels.items()} for label, image in images.items()}
    seeds = series.seeds
    scales = {entry["guidance"]} if series.guidance is None else set(series.guidance)
    return {
        "schema": SCHEMA,
        "images": plan.images,
        "shard_size": plan.size,
        "kind": "folders" if plan.folders else "tar",
        "labels": _hash([weights[label] for label in series.labels]),
        "seeds": f"{seeds[0]} to {seeds[-1]}" if isinstance(seeds, range) else _hash(list(seeds)),
        "guidance": float(scales.pop()) if len(scales) == 1 else _hash(series.guidance),
        "noise": None if series.noise is None else hashlib.sha256(series.noise.tobytes()).hexdigest()[:16],
        "init": None if series.inits is None else _hash([init.source for init in series.inits]),
        **{key: entry[key] for key in ALIKE},
    }


def _hash(values: Sequence[Any] | None) -> str:
    """16 hexadecimal digits of a list."""
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]


def _claim(folder: Path, record: dict[str, Any]) -> None:
    """Write down how a folder's shards are made, or compare with what is written there.

    Raises:
        OutputError: its shards are made in another way, or nothing says how.
    """
    file = folder / RECORD
    clear_litter(folder)
    found = _read_record(file)
    if found is None:
        _check_empty(folder)
        _write_once(file, json.dumps(record, indent=1, ensure_ascii=False).encode() + b"\n")
        found = _read_record(file)
    _compare(file, found, record)


def _check_empty(folder: Path) -> None:
    """Raises OutputError for a folder that has shards of nobody knows which images."""
    if kind_of(folder) is None:
        return
    for number in range(2):  # a run that was begun has one of them, unless it failed
        for name in (f"{number:06d}.tar", f"{number:06d}"):
            if os.path.lexists(folder / name):
                raise OutputError(
                    f"{folder / name}: is there, and no {RECORD} says how it was made; choose another --output"
                )


def _write_once(file: Path, content: bytes) -> None:
    """Write a file that is not there, whole; a file that another process wrote meanwhile is left.

    Raises:
        OutputError: it cannot be written.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with scratch_folder(file.parent, file.name) as folder:
            temporary = folder / file.name
            with temporary.open("wb") as handle:
                handle.write(content)
                handle.flush()
                os.fsync(handle.fileno())
            try:
                os.link(temporary, file)
            except FileExistsError:
                return
            except OSError:  # a file system without hard links
                temporary.replace(file)
    except OSError as error:
        raise OutputError(f"{file}: cannot be written ({error.strerror or error}); choose another --output") from error


def _read_record(file: Path) -> dict[str, Any] | None:
    """What a folder's record says; None where there is none.

    Raises:
        OutputError: it is damaged.
    """
    if not os.path.lexists(file):
        return None
    try:
        return decode(dict[str, Any], read_json(file, RECORD_BYTES))
    except (DecodeError, OSError) as error:
        raise OutputError(
            f"{file}: cannot be read as the record of shards ({error}); choose another --output"
        ) from error


def _compare(file: Path, found: dict[str, Any] | None, record: dict[str, Any]) -> None:
    """Raises OutputError where the record in a folder is another one, and says how it differs."""
    if found is None:
        raise OutputError(f"{file}: was removed while shards were made; run the command again")
    expected = json.loads(json.dumps(record))
    differing = [key for key in {**expected, **found} if found.get(key) != expected.get(key)]
    if not differing:
        return
    shown = ", ".join(f"{key} {show(found.get(key))}, not {show(expected.get(key))}" for key in differing[:SHOWN])
    more = f", and {len(differing) - SHOWN} more differ" if len(differing) > SHOWN else ""
    raise OutputError(
        f"{file.parent}: its shards have {shown}{more}; ask for the same images, or choose another --output"
    )
