"""What ``dit-sample`` is asked to make: its images batch by batch, each with the record of how it is made."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from dit_runtime.core.errors import DiTError, SamplingError
from dit_runtime.output.images import Images, read_image, read_png
from dit_runtime.output.provenance import (
    BatchPosition,
    DecodeSettings,
    batch_around,
    batch_positions,
    describe,
    entries_from_text,
    is_same,
    request_from_entry,
)
from dit_runtime.pipeline import Pipeline
from dit_runtime.samplers.noise import Float32
from dit_runtime.samplers.schedule import Schedule, read_table
from dit_runtime.sampling.requests import ImageRequest
from dit_runtime.sampling.settings import Settings
from dit_runtime.sampling.tiles import check_tile


@dataclass(frozen=True)
class InputFiles:
    """What is in the files that the user named."""

    noise: Float32 | None
    table: Schedule | None
    init: Images | Float32 | None


@dataclass(frozen=True)
class Job:
    """One batch: its images, and those to keep, as index among all, place in the batch and record."""

    batch: list[ImageRequest]
    keep: list[tuple[int, BatchPosition, dict[str, Any]]]


@dataclass(frozen=True)
class Jobs:
    """Groups, each made when its turn comes; how many there are, how many steps each takes, how all are decoded."""

    groups: Iterable[Job]
    count: int
    steps: int
    asked: DecodeSettings


def read_input_files(args: argparse.Namespace) -> InputFiles:
    """Read the files of ``--noise``, ``--sampler`` and ``--init``."""
    table = read_table(Path(args.sampler)) if (args.sampler or "").endswith(".json") else None
    noise = None if args.noise is None else _array(args.noise, "noise")
    if args.init is None or args.init.suffix.lower() != ".npy":
        return InputFiles(noise, table, None if args.init is None else read_image(args.init))
    return InputFiles(noise, table, _array(args.init, "latents"))


def _with(settings: Settings, **changes: Any) -> Settings:
    changed = settings.copy()
    changed.update(changes)  # type: ignore[typeddict-item]  # keys of Settings
    return changed


def _settings(args: argparse.Namespace, table: Schedule | None) -> Settings:
    scales = args.guidance
    return {
        "steps": args.steps,
        "sampler": table or args.sampler,
        "spacing": args.spacing,
        "eta": args.eta,
        "guidance": scales[0] if scales and len(scales) == 1 else scales,
        "guidance_interval": tuple(args.guidance_interval),
        "guidance_schedule": args.guidance_schedule,
        "negative_label": args.negative_label,
        "noise_device": args.noise_device,
        "noise_dtype": args.noise_dtype,
        "cuda_threads": args.cuda_threads,
        "strength": args.strength,
    }


def jobs_from_arguments(pipe: Pipeline, args: argparse.Namespace, given: InputFiles, folder: Path | None) -> Jobs:
    """The images of the arguments, batch by batch, without those that the folder has already.

    Everything is checked before the first group is given.
    """
    settings, asked = _settings(args, given.table), DecodeSettings(args.eta, args.decode_tile, args.decode_batch)
    check_tile(asked.decode_tile)
    named = list(range(pipe.manifest.model.classes)) if args.labels == ["all"] else args.labels
    labels = [label for label in named for _ in range(args.count)]
    count = len(labels)
    seeds = args.seeds or range(args.seed, args.seed + count)
    if len(seeds) != count:
        raise SamplingError(
            f"{len(seeds)} seeds for {count} labels: expected one seed per image, or --seed for the first"
        )
    if args.guidance and len(args.guidance) not in (1, count):
        raise SamplingError(f"{len(args.guidance)} guidance scales for {count} images: expected one, or one per image")
    pipe.check_noise(given.noise, count)
    inits = None if given.init is None else pipe.inits(given.init, count)
    settings["init"] = inits and inits[:1]
    distinct = list(dict.fromkeys(labels))
    for scale in dict.fromkeys(args.guidance or [None]):
        schedule = pipe.prepare(distinct, 0, **_with(settings, guidance=scale))[0].schedule
    size = min(args.batch_size, count)
    pipe.check_batch(size)

    def grouped(first: int) -> Job:
        chunk = slice(first, first + size)
        scales = args.guidance[chunk] if args.guidance and len(args.guidance) > 1 else settings["guidance"]
        noise, init = given.noise if given.noise is None else given.noise[chunk], inits and inits[chunk]
        own = _with(settings, guidance=scales, noise=noise, init=init)
        images = pipe.prepare(labels[chunk], seeds[chunk], **own)
        made = [
            folder is not None
            and (file := folder / file_name(first + offset, image)).exists()
            and not args.overwrite
            and (found := _recorded_entry(file)) is not None
            and is_same(found, describe(pipe, image, None, asked))
            for offset, image in enumerate(images)
        ]
        batch = [image for image, done in zip(images, made, strict=True) if not done]
        missing = [first + offset for offset, done in enumerate(made) if not done]
        kept = zip(missing, batch, batch_positions(batch), strict=True) if batch else ()
        return Job(batch, [(index, place, describe(pipe, image, place, asked)) for index, image, place in kept])

    starts = range(0, count, size)
    return Jobs(map(grouped, starts), len(starts), schedule.steps, asked)


def jobs_from_record(pipe: Pipeline, path: Path, entries: Sequence[Mapping[str, Any]], given: InputFiles) -> Jobs:
    """The images of a file's entries, in batches of the shape they were made in."""
    noise, init = given.noise, given.init
    if noise is not None and len(noise) != len(entries):
        raise SamplingError(f"noise of {len(noise)} images, expected {len(entries)}, as in {path}")
    inits = [] if init is None else pipe.inits(init, len(init) if init.ndim == 4 else 1)
    then = entries[0]
    asked = DecodeSettings(then["eta"], then["decode_tile"], then["decode_batch"])
    check_tile(asked.decode_tile)
    groups: list[Job] = []
    for index, entry in enumerate(entries):
        place = entry["place"]
        image = request_from_entry(pipe, entry, None if noise is None else noise[index], given.table, inits)
        pipe.check_batch(place.size)
        around = batch_around(image, place)
        if not groups or place.position <= groups[-1].keep[-1][1].position:
            groups.append(Job(around, []))
        if len(around) != len(groups[-1].batch):
            raise SamplingError(f"{path}: its record is damaged: images of one batch disagree about its size")
        groups[-1].batch[place.position] = around[place.position]
        groups[-1].keep.append((index, place, describe(pipe, image, place, asked)))
    now = groups[0].keep[0][2]
    for what in ("engine", "threads", "cpus"):
        if then[what] != now[what]:
            print(
                f"dit-sample: {path} was made with {what} {then[what]}, this is {now[what]}: the last bits may differ",
                file=sys.stderr,
            )
    return Jobs(groups, len(groups), groups[0].batch[0].schedule.steps, asked)


def file_name(index: int, image: ImageRequest) -> str:
    """The name of an image's file in a folder."""
    return f"{index:05d}_class{'+'.join(str(label) for label in image.labels)}_seed{image.seed}.png"


def _recorded_entry(file: Path) -> dict[str, Any] | None:
    """The record of an image that exists; None where it has none, or is not readable."""
    try:
        (entry,) = entries_from_text(file, read_png(file)[1])
    except (DiTError, ValueError):
        return None
    return entry


def _array(path: Path, what: str) -> Float32:
    """An array of one image or several from a file, ``[N, C, h, w]``; what it holds is for the pipeline to check."""
    try:
        values: Float32 = np.load(path, allow_pickle=False)
        if values.ndim not in (3, 4):
            raise ValueError(f"it has {values.ndim} axes")
        return values[None] if values.ndim == 3 else values
    except (OSError, ValueError, AttributeError, EOFError, BadZipFile) as error:
        raise SamplingError(
            f"{path}: cannot be read as {what} ({error}); expected float32 [N,C,H,W] of numpy.save"
        ) from error
