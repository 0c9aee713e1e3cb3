"""All images of a request by their index, and the batches that are made of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dit_runtime.bundle.manifest import Manifest
from dit_runtime.core.errors import SamplingError
from dit_runtime.output.inputs import InputFiles
from dit_runtime.output.provenance import BatchPosition, Entry, batch_positions, entry_from_request
from dit_runtime.output.request import DecodeSettings, LabelledImages
from dit_runtime.pipeline import Pipeline
from dit_runtime.samplers.noise import Float32, check_seed
from dit_runtime.sampling.image_to_image import Init
from dit_runtime.sampling.requests import ImageRequest
from dit_runtime.sampling.settings import Settings


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
class Series:
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


def labels_of_images(manifest: Manifest, asked: LabelledImages) -> list[int | str]:
    """The label of each image, as it was given; ``all`` is every class of the model."""
    given = (asked.labels,) if isinstance(asked.labels, str) else asked.labels
    named: Sequence[int | str] = range(manifest.model.classes) if given == ("all",) else given
    return [label for label in named for _ in range(asked.count)]


def series_from_labels(pipe: Pipeline, asked: LabelledImages, inputs: InputFiles) -> Series:
    """All images that are asked for.

    Raises:
        SamplingError: seeds, scales, noise or images to start from are not one per image.
    """
    labels = labels_of_images(pipe.manifest, asked)
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
    return Series(labels, seeds, guidance, inputs.noise, inits, settings)


def check_settings(pipe: Pipeline, series: Series) -> dict[int | str, ImageRequest]:
    """Prepare each distinct label with each distinct scale once: wrong settings are said before the first job.

    Returns:
        An image of each distinct label, all with the same scale.
    """
    distinct = list(dict.fromkeys(series.labels))
    init = None if series.inits is None else series.inits[:1]
    images: list[ImageRequest] = []
    scales: Sequence[float | None] = series.guidance or [None]
    for scale in dict.fromkeys(scales):
        settings: Settings = {**series.settings, "guidance": scale, "init": init}
        images = pipe.prepare(distinct, 0, **settings)
    return dict(zip(distinct, images, strict=True))


def job_from_series(
    pipe: Pipeline,
    series: Series,
    part: range,
    decoding: DecodeSettings,
    is_made: Callable[[int, ImageRequest], bool] = lambda index, image: False,
) -> Job:
    """The job of a part of the series: one batch of its images that are not made yet."""
    indices = slice(part.start, part.stop)
    images = pipe.prepare(series.labels[indices], series.seeds[indices], **series.settings_of(indices))
    eta = series.settings.get("eta") or 0.0
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
