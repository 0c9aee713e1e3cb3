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
    Entry,
    batch_around,
    batch_positions,
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
from dit_runtime.pipeline import Pipeline
from dit_runtime.samplers.noise import Float32, check_seed
from dit_runtime.sampling.image_to_image import Init
from dit_runtime.sampling.requests import ImageRequest
from dit_runtime.sampling.settings import Settings
from dit_runtime.sampling.tiles import check_tile

# Endings of images that are not written: a folder of such a name is not what was meant.
OTHER_IMAGES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".jp2", ".jxl", ".webp", ".avif", ".heic", ".heif", ".gif", ".apng"),
    *(".bmp", ".tif", ".tiff", ".tga", ".ppm", ".pnm", ".ico", ".svg", ".pdf", ".npy", ".npz"),
)


@dataclass(frozen=True)
class KeptImage:
    """An image of a batch that goes into a file.

    Attributes:
        index: among all images of the request.
        position: in the batch.
        entry: how it is made, for its file.
    """

    index: int
    position: BatchPosition
    entry: Entry


@dataclass(frozen=True)
class Job:
    """One batch, and its images that are kept; the others only give the batch its recorded shape.

    An empty batch means that the folder has all its images already.
    """

    batch: list[ImageRequest]
    kept: list[KeptImage]


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
    series = _series_from_labels(pipe, asked, inputs)
    steps = _check_settings(pipe, series)
    own = _range_of_shard(len(series.labels), asked.shard, output)
    size = min(asked.batch_size, len(own))
    pipe.check_batch(size)
    parts = [own[start : start + size] for start in range(0, len(own), size)]
    each = (_job_from_labels(pipe, series, slice(part.start, part.stop), asked.decoding, output) for part in parts)
    return Jobs(pipe, each, len(parts), steps, asked.decoding)


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


@dataclass(frozen=True)
class _Series:
    """All images of a request by their index: what each has of its own, and the settings that all share."""

    labels: list[int | str]
    seeds: Sequence[int]
    guidance: list[float] | None
    noise: Float32 | None
    inits: list[Init] | None
    settings: Settings

    def settings_of(self, part: slice) -> Settings:
        """The settings of the images in a part of the series."""
        return {
            **self.settings,
            "guidance": None if self.guidance is None else self.guidance[part],
            "noise": None if self.noise is None else self.noise[part],
            "init": None if self.inits is None else self.inits[part],
        }


def _series_from_labels(pipe: Pipeline, asked: LabelledImages, inputs: InputFiles) -> _Series:
    """Raises SamplingError for seeds, scales, noise or images to start from that are not one per image."""
    given = (asked.labels,) if isinstance(asked.labels, str) else asked.labels
    named: Sequence[int | str] = range(pipe.manifest.model.classes) if given == ("all",) else given
    labels = [label for label in named for _ in range(asked.count)]
    count = len(labels)
    seeds = range(asked.seeds, asked.seeds + count) if isinstance(asked.seeds, int) else asked.seeds
    if len(seeds) != count:
        raise SamplingError(
            f"{len(seeds)} seeds for {count} labels: expected one seed per image, or --seed for the first"
        )
    for seed in seeds if not isinstance(seeds, range) else (seeds[0], seeds[-1]):
        check_seed(seed)
    guidance = None if asked.guidance is None else list(asked.guidance)
    if guidance is not None and len(guidance) not in (1, count):
        raise SamplingError(f"{len(guidance)} guidance scales for {count} images: expected one, or one per image")
    if guidance is not None and len(guidance) == 1:
        guidance *= count
    pipe.check_noise(inputs.noise, count)
    inits = None if inputs.init is None else pipe.inits(inputs.init, count)
    settings = asked.settings if inputs.table is None else {**asked.settings, "sampler": inputs.table}
    return _Series(labels, seeds, guidance, inputs.noise, inits, settings)


def _check_settings(pipe: Pipeline, series: _Series) -> int:
    """Prepare each distinct label with each distinct scale once: wrong settings are said before the first job.

    Returns:
        The steps of an image.
    """
    distinct = list(dict.fromkeys(series.labels))
    init = None if series.inits is None else series.inits[:1]
    steps = 0
    scales: Sequence[float | None] = series.guidance or [None]
    for scale in dict.fromkeys(scales):
        settings: Settings = {**series.settings, "guidance": scale, "init": init}
        steps = pipe.prepare(distinct, 0, **settings)[0].schedule.steps
    return steps


def _job_from_labels(
    pipe: Pipeline, series: _Series, part: slice, decoding: DecodeSettings, output: OutputRequest
) -> Job:
    """The job of a part of the series: one batch of its images that are not made yet."""
    images = pipe.prepare(series.labels[part], series.seeds[part], **series.settings_of(part))
    eta = series.settings.get("eta") or 0.0

    def is_made(index: int, image: ImageRequest) -> bool:
        if output.is_grid or output.overwrite:
            return False
        found = read_entry(output.path / file_name_for(index, image))
        return found is not None and is_same(found, entry_from_request(pipe, image, eta, decoding))

    missing = [(index, image) for index, image in enumerate(images, part.start) if not is_made(index, image)]
    batch = [image for _, image in missing]
    kept = [
        KeptImage(index, position, entry_from_request(pipe, image, eta, decoding, position))
        for (index, image), position in zip(missing, batch_positions(batch), strict=True)
    ]
    return Job(batch, kept)


def file_name_for(index: int, image: ImageRequest) -> str:
    """The name of an image's file in a folder."""
    return f"{index:05d}_class{'+'.join(str(label) for label in image.labels)}_seed{image.seed}.png"


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
