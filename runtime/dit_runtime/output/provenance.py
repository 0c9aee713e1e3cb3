"""How an image was made: a record in its file, with which it can be made again, bit for bit.

An *entry* is a dictionary of everything that one image was made with. The record of a file is its images' entries as
PNG text chunks: for each key of ``KEYS`` a chunk ``dit.KEY`` with a JSON value. In a file of several images, a grid,
the values of ``PER_IMAGE`` are lists with a value for each image, row by row; the others are alike for all images. The
chunk ``dit.pixels`` is the hash of the file's pixels; files of older versions have none.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray

from dit_runtime.bundle.reader import Bundle
from dit_runtime.core.decode import DecodeError, Range, decode, json_from_bytes
from dit_runtime.core.errors import SamplingError
from dit_runtime.core.machine import count_cpus
from dit_runtime.core.version import __version__
from dit_runtime.output.request import DecodeSettings
from dit_runtime.pipeline import Pipeline
from dit_runtime.samplers.by_name import SAMPLERS
from dit_runtime.samplers.flow import UNIFORM
from dit_runtime.samplers.noise import LEAST_SEED, MOST_SEED, Float32, noise_hash
from dit_runtime.samplers.schedule import Schedule
from dit_runtime.sampling.image_to_image import Init
from dit_runtime.sampling.requests import ImageRequest

PREFIX = "dit."
KEYS = (
    *("version", "model", "bundle", "precision", "engine", "threads", "cpus"),
    *("label", "negative_label", "seed", "noise_device", "noise_dtype", "cuda_threads", "noise", "noise_given"),
    *("sampler", "spacing", "steps", "eta", "table", "guidance", "guidance_interval", "guidance_schedule"),
    *("init", "strength", "size", "decode_tile", "decode_batch", "batch"),
)
PIXELS = "pixels"
# A record with larger numbers is damaged: it would cost memory before anything else is found wrong with it.
MOST_THREADS = 1024
MOST = 100_000  # images, pixels, branches, rows
MOST_ROWS = 10_000_000  # of all images of a file together
Limited = Annotated[int, Range(1, MOST)]
PER_IMAGE = ("label", "seed", "noise", "guidance", "init", "batch")
# These say where an image was made and not what is in it: for them alone no image is made again.
CIRCUMSTANCES = ("batch", "decode_batch", "threads", "cpus", "version")

Entry = dict[str, Any]


@dataclass(frozen=True)
class BatchPosition:
    """An image's position in the batch that it was sampled in: with it, the engine can be called again as it was.

    Attributes:
        size: images in the batch.
        index: of the image among them, from 0.
        branches: how many guidance branches G the engine ran in each row of the schedule.
    """

    size: int
    index: int
    branches: tuple[int, ...]

    def as_json(self) -> list[Any]:
        """``[size, index, [[G, rows], …]]``, where ``rows`` counts consecutive rows with the same G."""
        return [self.size, self.index, [[value, len(list(run))] for value, run in groupby(self.branches)]]

    @staticmethod
    def from_json(value: Any) -> BatchPosition:
        """The position in an entry that ``entries_from_text`` gave."""
        size, index, runs = value
        return BatchPosition(size, index, tuple(g for g, rows in runs for _ in range(rows)))


def batch_positions(batch: Sequence[ImageRequest]) -> list[BatchPosition]:
    """The position of each image of a batch, whose images share one schedule."""
    if not batch:
        return []
    needed = np.max([image.branches.needed for image in batch], axis=0).tolist()
    return [BatchPosition(len(batch), index, tuple(needed)) for index in range(len(batch))]


def entry_from_request(
    pipe: Pipeline,
    image: ImageRequest,
    eta: float,
    decoding: DecodeSettings,
    position: BatchPosition | None = None,
) -> Entry:
    """The entry of an image that ``pipe`` makes.

    ``eta`` is DDIM's, which the image's schedule has in its numbers only. ``position`` is None for an image that is
    not made yet; ``is_same`` does not ask for it.
    """
    manifest, schedule, guidance = pipe.manifest, image.schedule, image.guidance
    first = image.draw_noise(image.make_stream(), pipe.latent_shape) if image.noise is None else image.noise
    return {
        "version": __version__,
        "model": manifest.source.name,
        "bundle": pipe.bundle.digest,
        "precision": manifest.precision.name,
        "engine": pipe.engine.info.name,
        "threads": pipe.engine.info.threads,
        "cpus": count_cpus(),
        "label": {str(label): weight for label, weight in image.labels.items()},
        "negative_label": image.negative_label,
        "seed": image.seed,
        "noise_device": image.noise_device,
        "noise_dtype": image.noise_dtype,
        "cuda_threads": image.cuda_threads,
        "noise": noise_hash(first),
        "noise_given": image.noise is not None,
        "sampler": schedule.sampler,
        "spacing": schedule.spacing,
        "steps": schedule.skipped + schedule.steps,
        "eta": eta,
        "table": schedule_hash(schedule),
        "guidance": guidance.scale,
        "guidance_interval": list(guidance.interval),
        "guidance_schedule": guidance.shape,
        "init": image.init.source if image.init else None,
        "strength": image.strength,
        "size": list(manifest.image_size),
        "decode_tile": decoding.tile,
        "decode_batch": decoding.batch,
        "batch": position.as_json() if position else None,
    }


def schedule_hash(schedule: Schedule) -> str:
    """The identity of a schedule's numbers: 16 hexadecimal digits of SHA-256."""
    scales = (schedule.initial, schedule.start)
    arrays = (schedule.timesteps, schedule.rows, schedule.coefficients, *scales, schedule.draws_noise)
    return hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()[:16]


def hash_of_pixels(image: NDArray[np.uint8]) -> str:
    """The SHA-256 of an image's shape and pixels ``[H, W, 3]``, in hexadecimal."""
    return hashlib.sha256(repr(image.shape).encode() + np.ascontiguousarray(image).tobytes()).hexdigest()


def text_from_entries(entries: Sequence[Mapping[str, Any]], image: NDArray[np.uint8]) -> dict[str, str]:
    """The text chunks of a file with these images: its record. ``image`` is the file's, ``[H, W, 3]``."""
    first, several = entries[0], len(entries) > 1
    values = {key: [entry[key] for entry in entries] if several and key in PER_IMAGE else first[key] for key in first}
    values[PIXELS] = hash_of_pixels(image)
    return {PREFIX + key: json.dumps(value, ensure_ascii=False) for key, value in values.items()}


def entries_from_text(path: Path, text: Mapping[str, str]) -> list[Entry]:
    """The entries of a file's images, from its text chunks.

    Raises:
        SamplingError: the file has no record, or one that this version does not write.
    """
    try:
        values = {key.removeprefix(PREFIX): _value_from_text(key, text[key]) for key in text if key.startswith(PREFIX)}
        if not values:
            raise SamplingError(f"{path}: has no record of how it was made; expected an image that dit-sample wrote")
        return _entries_from_values(values)
    except DecodeError as error:
        raise SamplingError(
            f"{path}: its record is damaged ({error}); expected an image that dit-sample wrote"
        ) from error


def _value_from_text(key: str, text: str) -> Any:
    try:
        return json_from_bytes(text.encode(errors="surrogatepass"))
    except DecodeError as error:
        raise DecodeError(f"{key}: {error}") from error


def _entries_from_values(values: Entry) -> list[Entry]:
    """Raises DecodeError for values that ``text_from_entries`` does not give."""
    if missing := [key for key in KEYS if key not in values]:
        raise DecodeError(f"{missing[0]}: missing")
    if type(values["seed"]) is not list:
        values = {**values, **{key: [values[key]] for key in PER_IMAGE}}
    lists = {key: decode(list[Any], values[key], key) for key in PER_IMAGE}
    count = len(lists["seed"])
    if not 0 < count <= MOST or any(len(items) != count for items in lists.values()):
        raise DecodeError(f"{', '.join(PER_IMAGE)}: got {sorted({*map(len, lists.values())})} values, expected as many")
    entries = [{**values, **{key: items[index] for key, items in lists.items()}} for index in range(count)]
    rows = 0
    for entry in entries:
        record = decode(_EntryRecord, {key: entry[key] for key in KEYS})
        rows += _check_batch(*record.batch)
    if rows > MOST_ROWS:
        raise DecodeError(f"batch: got {rows} rows in all images, expected {MOST_ROWS} at most")
    return entries


def _check_batch(size: int, index: int, runs: Sequence[tuple[int, int]]) -> int:
    """The number of rows of a position in a batch. Raises DecodeError for an image that is not in its batch."""
    if index >= size:
        raise DecodeError(f"batch: got image {index} of {size}, expected a smaller number than {size}")
    return sum(rows for _, rows in runs)


@dataclass(frozen=True)
class _EntryRecord:
    """The types of an entry's values."""

    version: str
    model: str
    bundle: str
    precision: str
    engine: str
    threads: Annotated[int, Range(0, MOST_THREADS)]
    cpus: Annotated[int, Range(0, MOST)]
    label: dict[str, float]
    negative_label: int | None
    seed: Annotated[int, Range(LEAST_SEED, MOST_SEED)]
    noise_device: Literal["cpu", "cuda"]
    noise_dtype: Literal["float32", "float16"]
    cuda_threads: int | None
    noise: str
    noise_given: bool
    sampler: str
    spacing: str
    steps: Limited
    eta: float
    table: str
    guidance: float
    guidance_interval: tuple[float, float]
    guidance_schedule: str
    init: str | None
    strength: float | None
    size: tuple[Limited, Limited]
    decode_tile: Limited | None
    decode_batch: Limited | None
    batch: tuple[Limited, Annotated[int, Range(0, MOST)], tuple[tuple[Limited, Limited], ...]]


def is_same(found: Mapping[str, Any], expected: Mapping[str, Any]) -> bool:
    """Whether an image that was found is the one expected, by their entries without ``CIRCUMSTANCES``."""
    return all(found.get(key) == value for key, value in expected.items() if key not in CIRCUMSTANCES)


def request_from_entry(
    pipe: Pipeline,
    entry: Mapping[str, Any],
    noise: Float32 | None,
    table: Schedule | None,
    inits: Sequence[Init] = (),
) -> ImageRequest:
    """The image of an entry, to be made again with ``pipe``.

    Args:
        pipe: with the bundle that made the image.
        entry: from ``entries_from_text``.
        noise: float32 ``[C, H, W]``, for an image of noise from a file.
        table: for an image of a sampler table from a file.
        inits: images to start from; the entry's own is taken from among them.

    Raises:
        SamplingError: the bundle, the noise, the sampler table or the image to start from is missing, or is not the
            recorded one.
    """
    check_bundle(pipe.bundle, entry)
    if table is None and entry["sampler"] not in SAMPLERS:
        raise SamplingError(
            f"the image was made with the sampler table {entry['sampler']!r}; name its file with --sampler"
        )
    if entry["noise_given"] and noise is None:
        raise SamplingError("the image was made from noise in a file; name it with --noise")
    image = _prepare_entry(pipe, entry, noise, table, _init_of(entry, inits))
    if (found := schedule_hash(image.schedule)) != entry["table"]:
        raise SamplingError(
            f"the image's sampler table was {entry['table']}, this one is {found}: the image was made by version "
            f"{entry['version']} or with another sampler table; use that version or table"
        )
    first = image.draw_noise(image.make_stream(), pipe.latent_shape) if noise is None else noise
    if (drawn := noise_hash(first)) != entry["noise"]:
        raise SamplingError(f"the image's noise was {entry['noise']}, this is {drawn}; name its file with --noise")
    return image


def _init_of(entry: Mapping[str, Any], inits: Sequence[Init]) -> Init | None:
    """The image that an entry's image started from, among ``inits``; None if it started from noise alone."""
    if entry["init"] is None:
        if inits:
            raise SamplingError("the image was made from noise alone, not from an image: leave --init out")
        return None
    for init in inits:
        if init.source == entry["init"]:
            return init
    given = f"this is {inits[0].source}" if inits else "and none is named"
    raise SamplingError(f"the image was made from init {entry['init']}, {given}; name its file with --init")


def _prepare_entry(
    pipe: Pipeline, entry: Mapping[str, Any], noise: Float32 | None, table: Schedule | None, init: Init | None
) -> ImageRequest:
    """Raises SamplingError for values that no image is made with."""
    try:
        spacing = None if entry["spacing"] == UNIFORM else str(entry["spacing"])
        (image,) = pipe.prepare(
            [{int(label): float(weight) for label, weight in entry["label"].items()}],
            [entry["seed"]],
            sampler=table or str(entry["sampler"]),
            steps=None if table else int(entry["steps"]),
            eta=0.0 if table else float(entry["eta"]),
            spacing=None if table else spacing,
            guidance=float(entry["guidance"]),
            guidance_interval=(float(entry["guidance_interval"][0]), float(entry["guidance_interval"][1])),
            guidance_schedule=entry["guidance_schedule"],
            negative_label=entry["negative_label"],
            noise=noise,
            noise_device=entry["noise_device"],
            noise_dtype=entry["noise_dtype"],
            cuda_threads=entry["cuda_threads"],
            init=None if init is None else [init],
            strength=entry["strength"],
        )
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError) as error:
        raise SamplingError(f"the image's record is damaged ({type(error).__name__}: {error})") from error
    return image


def check_bundle(bundle: Bundle, entry: Mapping[str, Any]) -> None:
    """Raises SamplingError if another bundle made the image."""
    if entry["bundle"] != bundle.digest:
        raise SamplingError(
            f"the image was made with bundle {str(entry['bundle'])[:12]}… ({entry['model']}), this one is "
            f"{bundle.digest[:12]}…; name the bundle that made it"
        )


def batch_around(image: ImageRequest, position: BatchPosition) -> list[ImageRequest]:
    """A batch of copies of an image, of the size and with the branches that its batch had.

    The engine's calls then have the shapes that they had, and so the image gets the same bits; the copies beside it
    are not kept.

    Raises:
        SamplingError: the position does not fit the image's sampler and guidance.
    """
    needed = np.array(position.branches)
    if needed.shape != image.branches.needed.shape or (needed < image.branches.needed).any():
        raise SamplingError("the image's record is damaged: its batch does not fit its sampler and guidance")
    return [replace(image, branches=image.branches.pad_to(needed))] * position.size
