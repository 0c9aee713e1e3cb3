"""From a request to jobs: batches of images to make, and for each image the entry that says how it was made."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dit_runtime.bundle.reader import open_bundle
from dit_runtime.core.errors import OutputError, SamplingError
from dit_runtime.core.replace import check_writable, clear_litter
from dit_runtime.output.inputs import (
    InputFiles,
    RecordedFile,
    read_entry,
    read_input_files,
    read_recorded_file,
)
from dit_runtime.output.provenance import (
    BatchPosition,
    batch_around,
    check_bundle,
    entry_from_request,
    is_same,
    request_from_entry,
)
from dit_runtime.output.request import (
    DecodeSettings,
    LabelledImages,
    OutputRequest,
    RecordedImages,
    SampleRequest,
)
from dit_runtime.output.series import (
    Job,
    KeptImage,
    check_settings,
    file_name_for,
    job_from_series,
    series_from_labels,
)
from dit_runtime.pipeline import Pipeline
from dit_runtime.sampling.requests import ImageRequest
from dit_runtime.sampling.tiles import check_tile

# Endings of images that are not written: a folder of such a name is not what was meant.
OTHER_IMAGES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".jp2", ".jxl", ".webp", ".avif", ".heic", ".heif", ".gif", ".apng"),
    *(".bmp", ".tif", ".tiff", ".tga", ".ppm", ".pnm", ".ico", ".svg", ".pdf", ".npy", ".npz"),
)


@dataclass(frozen=True)
class Jobs:
    """The work of one request.

    Attributes:
        pipe: what makes the images.
        each: the jobs, each prepared when its turn comes.
        count: how many jobs there are.
        steps: sampling steps of each job.
        decoding: how the latents of every job are decoded.
        original: the file whose images are made again, to compare with.
        warnings: what the user should know before the work begins, a line each.
    """

    pipe: Pipeline
    each: Iterable[Job]
    count: int
    steps: int
    decoding: DecodeSettings
    original: RecordedFile | None = None
    warnings: tuple[str, ...] = ()


def jobs_from_request(request: SampleRequest) -> Jobs:
    """Check the request, read its files, open its bundle with an engine, and prepare its jobs.

    Raises:
        DiTError: the request does not fit the bundle, or a file of it cannot be read or written.
    """
    _check_output(request)
    inputs, bundle = read_input_files(request.inputs), open_bundle(request.bundle, request.store)
    images = request.images
    if isinstance(images, LabelledImages):
        pipe = Pipeline(bundle, request.engine, request.threads, images.size, request.precision)
        return jobs_from_labels(pipe, images, inputs, request.output)
    recorded = read_recorded_file(images.path)
    first = recorded.entries[0]
    check_bundle(bundle, first)
    size = (first["size"][0], first["size"][1])
    pipe = Pipeline(bundle, request.engine, request.threads or first["threads"], size, request.precision)
    return jobs_from_record(pipe, recorded, inputs)


def _check_output(request: SampleRequest) -> None:
    """Raises OutputError, before the work, for a path that cannot be written to, or must not be."""
    path, images = request.output.path, request.images
    if request.output.is_grid and path.is_dir():
        raise OutputError(f"{path}: is a folder, expected a file; choose another --output")
    if path.suffix.lower() in OTHER_IMAGES and not path.is_dir():
        raise OutputError(
            f"{path}: a grid is written as PNG, which keeps every bit and the record of how it was made; choose "
            f"--output {path.with_suffix('.png').name}, or a folder's name"
        )
    if isinstance(images, RecordedImages) and path.resolve() == images.path.resolve():
        raise OutputError(f"{path}: is the image to be made again; choose another --output")
    check_writable(path if request.output.is_grid else path / "image.png")
    clear_litter(path.parent if request.output.is_grid else path)  # also where every image is there already


def jobs_from_labels(pipe: Pipeline, asked: LabelledImages, inputs: InputFiles, output: OutputRequest) -> Jobs:
    """The jobs of images of labels, without the images that the output folder has already.

    Everything is checked before the first job is prepared.

    Raises:
        SamplingError: the request does not fit the bundle.
    """
    check_tile(asked.decoding.tile)
    series = series_from_labels(pipe, asked, inputs)
    first, *_ = check_settings(pipe, series).values()
    own = _range_of_shard(len(series.labels), asked.shard, output)
    size = min(asked.batch_size, len(own))
    pipe.check_batch(size)
    parts = [own[start : start + size] for start in range(0, len(own), size)]
    eta = series.settings.get("eta") or 0.0

    def is_made(index: int, image: ImageRequest) -> bool:
        if output.is_grid or output.overwrite:
            return False
        found = read_entry(output.path / file_name_for(index, image))
        return found is not None and is_same(found, entry_from_request(pipe, image, eta, asked.decoding))

    each = (job_from_series(pipe, series, part, asked.decoding, is_made) for part in parts)
    return Jobs(pipe, each, len(parts), first.schedule.steps, asked.decoding)


def _range_of_shard(count: int, shard: tuple[int, int], output: OutputRequest) -> range:
    """The indices of a shard's images among ``count``; the shards' sizes differ by at most one.

    Raises:
        SamplingError: there is no such shard, it has no image, or its images would be a grid of their own.
    """
    number, shards = shard
    if not 1 <= number <= shards:
        raise SamplingError(f"shard {number}/{shards}: expected a number from 1 to {shards}")
    if shards > count:
        raise SamplingError(f"{shards} shards of {count} images: expected at most one for each image")
    if shards > 1 and output.is_grid:
        raise SamplingError(f"shard {number}/{shards} of a grid: expected a folder as --output, which shards can share")
    return range(count * (number - 1) // shards, count * number // shards)


def jobs_from_record(pipe: Pipeline, recorded: RecordedFile, inputs: InputFiles) -> Jobs:
    """The jobs that make a file's images again, in batches of the shape that they were made in.

    Raises:
        SamplingError: the record does not fit the bundle, or a file that the images were made from is missing.
    """
    entries, noise, init = recorded.entries, inputs.noise, inputs.init
    if noise is not None and len(noise) != len(entries):
        raise SamplingError(f"noise of {len(noise)} images, expected {len(entries)}, as in {recorded.path}")
    inits = [] if init is None else pipe.inits(init, len(init) if init.ndim == 4 else 1)
    decoding = DecodeSettings(entries[0]["decode_tile"], entries[0]["decode_batch"])
    eta = entries[0]["eta"]
    check_tile(decoding.tile)
    positions = [BatchPosition.from_json(entry["batch"]) for entry in entries]

    def job_of(indices: Sequence[int]) -> Job:
        batch: list[ImageRequest] = []
        kept = []
        for index in indices:
            position = positions[index]
            image = request_from_entry(
                pipe, entries[index], None if noise is None else noise[index], inputs.table, inits
            )
            pipe.check_batch(position.size)
            filled = batch_around(image, position)
            batch = batch or filled
            if len(batch) != len(filled):
                raise SamplingError(
                    f"{recorded.path}: its record is damaged: images of one batch disagree about its size"
                )
            batch[position.index] = filled[position.index]
            kept.append(KeptImage(index, position, entry_from_request(pipe, image, eta, decoding, position)))
        return Job(batch, kept)

    jobs = [job_of(indices) for indices in _split_into_batches(positions)]
    warnings = _differences(recorded, jobs[0].kept[0].entry)
    return Jobs(pipe, jobs, len(jobs), jobs[0].batch[0].schedule.steps, decoding, recorded, warnings)


def _split_into_batches(positions: Sequence[BatchPosition]) -> Iterator[list[int]]:
    """The indices of images, batch by batch: positions rise in a batch, and begin again with the next batch."""
    batch: list[int] = []
    for index, position in enumerate(positions):
        if batch and position.index <= positions[batch[-1]].index:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _differences(recorded: RecordedFile, now: Mapping[str, Any]) -> tuple[str, ...]:
    """A warning for altered pixels, and for each circumstance, other than then, that changes the last bits."""
    then = recorded.entries[0]
    altered = f"{recorded.path} has other pixels than it was written with: the comparison is with the altered ones"
    return (altered,) * (recorded.is_intact is False) + tuple(
        f"{recorded.path} was made with {name} {then[name]}, this is {now[name]}: the last bits may differ"
        for name in ("engine", "threads", "cpus")
        if then[name] != now[name]
    )
