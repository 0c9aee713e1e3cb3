"""What made an image: written into its file, and enough to make it again, bit for bit.

Each entry is a PNG text chunk ``dit.KEY`` with a JSON value. In a file with one image they are its own; in a grid the
entries of ``PER_IMAGE`` are lists, in the order of its places.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from dit_runtime.bundle.reader import Bundle
from dit_runtime.core.errors import SamplingError
from dit_runtime.core.version import __version__
from dit_runtime.pipeline import Pipeline
from dit_runtime.samplers.by_name import SAMPLERS
from dit_runtime.samplers.flow import UNIFORM
from dit_runtime.samplers.noise import Float32, noise_hash
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
MOST_THREADS = 1024
MOST = 100_000  # images, branches or rows that a record is believed
PER_IMAGE = ("label", "seed", "noise", "guidance", "init", "batch")
# Where and with what it ran, not what it is: an image that exists already is not made again for these.
CIRCUMSTANCES = ("batch", "decode_batch", "threads", "cpus", "version")


@dataclass(frozen=True)
class BatchPosition:
    """The engine calls an image was in: batch size, its place there, and how many branches G each row ran with."""

    size: int
    position: int
    branches: tuple[int, ...]

    def as_json(self) -> list[Any]:
        """``[size, position, [[G, rows], …]]``, rows counted while G stays."""
        return [self.size, self.position, [[value, len(list(run))] for value, run in groupby(self.branches)]]

    @staticmethod
    def from_json(value: Any, most: int) -> BatchPosition:
        """Raises ValueError or TypeError for anything else, or more than ``most`` images or branches."""
        size, position, runs = value
        if not all(type(number) is int for number in (size, position, *(number for run in runs for number in run))):
            raise TypeError(f"batch {value}")
        if not 0 <= position < size <= most or not all(0 < g <= most and 0 < rows <= most for g, rows in runs):
            raise ValueError(f"batch {value}")
        return BatchPosition(size, position, tuple(g for g, rows in runs for _ in range(rows)))


def batch_positions(batch: Sequence[ImageRequest]) -> list[BatchPosition]:
    """The place of each image of a batch whose schedules are one."""
    needed = np.max([image.branches.needed for image in batch], axis=0).tolist()
    return [BatchPosition(len(batch), position, tuple(needed)) for position in range(len(batch))]


@dataclass(frozen=True)
class DecodeSettings:
    """What an image was asked for with, beyond what is in it: DDIM's eta, and how its latents are decoded."""

    eta: float = 0.0
    decode_tile: int | None = None
    decode_batch: int | None = None


def describe(pipe: Pipeline, image: ImageRequest, place: BatchPosition | None, asked: DecodeSettings) -> dict[str, Any]:
    """An image's entries; ``place`` is None if it is not made yet."""
    manifest, schedule, guidance = pipe.manifest, image.schedule, image.guidance
    first = image.draw_noise(image.stream(), pipe.latent_shape) if image.noise is None else image.noise
    return {
        "version": __version__,
        "model": manifest.source.name,
        "bundle": pipe.bundle.digest,
        "precision": manifest.precision.name,
        "engine": pipe.engine.info.name,
        "threads": pipe.engine.info.threads,
        "cpus": cpus(),
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
        "eta": asked.eta,
        "table": table_hash(schedule),
        "guidance": guidance.scale,
        "guidance_interval": list(guidance.interval),
        "guidance_schedule": guidance.shape,
        "init": image.init.source if image.init else None,
        "strength": image.strength,
        "size": list(manifest.image_size),
        "decode_tile": asked.decode_tile,
        "decode_batch": asked.decode_batch,
        "batch": place.as_json() if place else None,
    }


def cpus() -> int:
    """CPUs that this process may use: what an engine that chooses its own threads chooses from."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def table_hash(schedule: Schedule) -> str:
    """What identifies a schedule's numbers: 16 hexadecimal digits of SHA-256."""
    scales = (schedule.initial, schedule.start)
    arrays = (schedule.timesteps, schedule.rows, schedule.coefficients, *scales, schedule.draws_noise)
    return hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()[:16]


def text_from_entries(entries: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Text chunks for a file with these images."""
    first, several = entries[0], len(entries) > 1
    values = {key: [entry[key] for entry in entries] if several and key in PER_IMAGE else first[key] for key in first}
    return {PREFIX + key: json.dumps(value, ensure_ascii=False) for key, value in values.items()}


def entries_from_text(path: Path, text: Mapping[str, str]) -> list[dict[str, Any]]:
    """The images' entries of a file.

    Raises:
        SamplingError: none there, or not such as this version writes.
    """
    try:
        values = {key.removeprefix(PREFIX): json.loads(text[key]) for key in text if key.startswith(PREFIX)}
        if not values:
            raise SamplingError(f"{path}: has no record of how it was made; expected an image that dit-sample wrote")
        if not isinstance(values["seed"], list):
            values.update({key: [values[key]] for key in PER_IMAGE})
        count = len(values["seed"])
        if not count:
            raise ValueError("no images")
        entries = [{**values, **{key: values[key][index] for key in PER_IMAGE}} for index in range(count)]
        for entry in entries:
            if missing := [key for key in KEYS if key not in entry]:
                raise KeyError(missing[0])
            if type(entry["threads"]) is not int or not 0 <= entry["threads"] <= MOST_THREADS:
                raise ValueError(f"threads {entry['threads']!r}")
            height, width = entry["size"]
            for number in (height, width, entry["decode_tile"] or 1, entry["decode_batch"] or 1):
                if type(number) is not int or not 0 < number <= MOST:
                    raise ValueError(f"size or decoding {number!r}")
            entry["place"] = BatchPosition.from_json(entry["batch"], MOST)
    except (ValueError, KeyError, TypeError, IndexError, OverflowError, RecursionError) as error:
        raise SamplingError(
            f"{path}: its record is damaged ({type(error).__name__}: {error}); expected an image that dit-sample wrote"
        ) from error
    return entries


def is_same(found: Mapping[str, Any], expected: Mapping[str, Any]) -> bool:
    """Whether two images' entries say the same, circumstances apart."""
    return all(found.get(key) == value for key, value in expected.items() if key not in CIRCUMSTANCES)


def request_from_entry(
    pipe: Pipeline,
    entry: Mapping[str, Any],
    noise: Float32 | None,
    table: Schedule | None,
    inits: Sequence[Init] = (),
) -> ImageRequest:
    """The image that an entry describes, to be made again with ``pipe``; ``inits`` are what it may have started from.

    Raises:
        SamplingError: another bundle, or noise, a table or an image to start from that is not the recorded one or is
            missing.
    """
    check_bundle(pipe.bundle, entry)
    if table is None and entry["sampler"] not in SAMPLERS:
        raise SamplingError(f"the image was made with the table {entry['sampler']!r}; name its file with --sampler")
    if entry["noise_given"] and noise is None:
        raise SamplingError("the image was made from noise in a file; name it with --noise")
    started = [init for init in inits if init.source == entry["init"]]
    if entry["init"] is None and inits:
        raise SamplingError("the image was made from noise alone, not from an image: leave --init out")
    if entry["init"] is not None and not started:
        given = f"this is {inits[0].source}" if inits else "and none is named"
        raise SamplingError(f"the image was made from init {entry['init']}, {given}; name its file with --init")
    try:
        spacing = None if entry["spacing"] == UNIFORM else str(entry["spacing"])
        (image,) = pipe.prepare(
            [{int(label): float(weight) for label, weight in entry["label"].items()}],
            [int(entry["seed"])],
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
            init=started[:1] or None,
            strength=entry["strength"],
        )
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError) as error:
        raise SamplingError(f"the image's record is damaged ({type(error).__name__}: {error})") from error
    if (found := table_hash(image.schedule)) != entry["table"]:
        raise SamplingError(
            f"the image's sampler table was {entry['table']}, this one is {found}: it was made by version "
            f"{entry['version']} or from another table; use that"
        )
    first = image.draw_noise(image.stream(), pipe.latent_shape) if noise is None else noise
    if (drawn := noise_hash(first)) != entry["noise"]:
        raise SamplingError(f"the image's noise was {entry['noise']}, this is {drawn}; name its file with --noise")
    return image


def check_bundle(bundle: Bundle, entry: Mapping[str, Any]) -> None:
    """Raises SamplingError for an entry of another bundle's image."""
    if entry["bundle"] != bundle.digest:
        raise SamplingError(
            f"the image was made with bundle {str(entry['bundle'])[:12]}… ({entry['model']}), this one is "
            f"{bundle.digest[:12]}…; name the bundle that made it"
        )


def batch_around(image: ImageRequest, place: BatchPosition) -> list[ImageRequest]:
    """A batch with the image in its place, and copies around it, whose step calls have the shapes they had.

    Raises:
        SamplingError: a record that does not fit its image.
    """
    needed = np.array(place.branches)
    if needed.shape != image.branches.needed.shape or (needed < image.branches.needed).any():
        raise SamplingError("the image's record is damaged: its batch does not fit its sampler and guidance")
    return [replace(image, branches=image.branches.among(needed))] * place.size
