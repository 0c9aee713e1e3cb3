"""What a request's body may say: known keys of their types, and nothing else. No path is ever taken from it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from dit_runtime.core.decode import Range, decode, json_from_bytes, optional
from dit_runtime.core.errors import SamplingError
from dit_runtime.core.reading import FileError
from dit_runtime.pipeline import Pipeline
from dit_runtime.samplers.schedule import Schedule
from dit_runtime.sampling.labels import Label
from dit_runtime.sampling.requests import ImageRequest
from dit_runtime.sampling.settings import Settings

BODY_BYTES = 64 * 1024
MOST_IMAGES = 64  # of one request
MOST_SECONDS = 3600.0

T = TypeVar("T")

Steps = Annotated[int, Range(1, 10_000)]
Images = Annotated[int, Range(1, MOST_IMAGES)]
Seconds = Annotated[float, Range(0.001, MOST_SECONDS)]
Often = Annotated[int, Range(0, 10_000)]


@dataclass(frozen=True)
class GenerateBody:
    """``POST /generate``.

    Attributes:
        labels: one class number, name or mixture of each image, or a single one.
        seeds: one of each image, or the first image's, from which the next count up.
        steps, guidance, sampler, spacing, eta, guidance_interval, guidance_schedule, negative_label: as ``Settings``;
            ``sampler`` is a sampler's name, or that of a table of the server.
        model: the bundle's name, where the server has several.
        size: ``HEIGHTxWIDTH``, where the server has several; None is the model's own.
        stream: whether events are sent while the images are made.
        previews: with ``stream``, a preview after so many steps each; 0 sends none.
        timeout: seconds until the images must be finished.
    """

    labels: int | str | list[int | str]
    seeds: int | list[int] = optional(0)
    steps: Steps | None = optional(None)
    guidance: float | None = optional(None)
    sampler: str | None = optional(None)
    spacing: str | None = optional(None)
    eta: float = optional(0.0)
    guidance_interval: tuple[float, float] | None = optional(None)
    guidance_schedule: str | None = optional(None)
    negative_label: int | str | None = optional(None)
    model: str | None = optional(None)
    stream: bool = optional(False)
    previews: Often = optional(0)
    timeout: Seconds | None = optional(None)
    size: str | None = optional(None)

    @property
    def image_size(self) -> tuple[int, int] | None:
        """Height and width; None where the request names none. Raises SamplingError for a text that is no size."""
        return None if self.size is None else _numbers_of(self.size, "HEIGHTxWIDTH, such as 256x384")

    def prepare(self, pipe: Pipeline, tables: Mapping[str, Schedule]) -> list[ImageRequest]:
        """The requests of its images.

        Args:
            pipe: of the model.
            tables: sampler tables that the server has, by their names.

        Raises:
            SamplingError: the requests do not fit the model.
        """
        labels: Sequence[Label] = self.labels if isinstance(self.labels, list) else [self.labels]
        if not 1 <= len(labels) <= MOST_IMAGES:
            raise SamplingError(f"{len(labels)} labels: expected 1 to {MOST_IMAGES} in one request")
        settings: dict[str, Any] = {
            "steps": self.steps,
            "guidance": self.guidance,
            "sampler": tables.get(self.sampler or "", self.sampler),
            "spacing": self.spacing,
            "eta": self.eta,
            "guidance_interval": self.guidance_interval,
            "guidance_schedule": self.guidance_schedule,
            "negative_label": self.negative_label,
        }
        given: Settings = {key: value for key, value in settings.items() if value is not None}  # type: ignore[assignment]
        return pipe.prepare(labels, self.seeds, **given)


@dataclass(frozen=True)
class ImagesBody:
    """``POST /v1/images/generations``, as OpenAI's clients send it, with five keys of ``GenerateBody``.

    Attributes:
        prompt: a class name, number or mixture.
        n: images.
        size: ``WIDTHxHEIGHT`` of the model's images, or ``auto``.
        model: the bundle's name; None where the server has one.
        response_format: images come in the answer.
        output_format: of the images.
        stream, partial_images: whether events are sent, and how many of them before the image.
        user: not used.
        seed, steps, guidance, sampler, timeout: as ``GenerateBody``.
    """

    prompt: str
    n: Images | None = optional(1)
    size: str | None = optional(None)
    model: str | None = optional(None)
    response_format: Literal["b64_json"] | None = optional(None)
    output_format: Literal["png"] | None = optional(None)
    stream: bool | None = optional(False)
    partial_images: Annotated[int, Range(0, 3)] | None = optional(0)
    user: str | None = optional(None)
    seed: int = optional(0)
    steps: Steps | None = optional(None)
    guidance: float | None = optional(None)
    sampler: str | None = optional(None)
    timeout: Seconds | None = optional(None)

    @property
    def image_size(self) -> tuple[int, int] | None:
        """Height and width; None where the request names none. Raises SamplingError for a text that is no size."""
        if self.size in (None, "auto"):
            return None
        width, height = _numbers_of(self.size or "", "WIDTHxHEIGHT, such as 384x256, or auto")
        return height, width

    def as_generate(self, pipe: Pipeline) -> GenerateBody:
        """The same as ``POST /generate``'s body, for a model of that size."""
        steps = self.steps or pipe.manifest.defaults.steps
        parts = self.partial_images or 0
        return GenerateBody(
            labels=[self.prompt] * (self.n or 1),
            seeds=self.seed,
            steps=self.steps,
            guidance=self.guidance,
            sampler=self.sampler,
            stream=bool(self.stream),
            previews=max(1, steps // (parts + 1)) if parts else 0,
            timeout=self.timeout,
        )


def _numbers_of(size: str, expected: str) -> tuple[int, int]:
    found = re.fullmatch(r"([1-9][0-9]{0,5})x([1-9][0-9]{0,5})", size)
    if found is None:
        raise SamplingError(f"size {size!r:.40}: expected {expected}")
    return int(found[1]), int(found[2])


def read_body(kind: type[T], content: bytes) -> T:
    """A body of a kind. Raises SamplingError for text that is no such body."""
    try:
        return decode(kind, json_from_bytes(content))
    except FileError as error:
        raise SamplingError(f"the request's body: {error}") from error
