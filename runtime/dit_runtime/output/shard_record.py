"""The record of a folder of shards: how all its images are made, and the refusal of others."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dit_runtime.core.decode import DecodeError, decode, read_json, show
from dit_runtime.core.errors import OutputError
from dit_runtime.core.reading import kind_of
from dit_runtime.core.replace import clear_litter, scratch_folder
from dit_runtime.output.provenance import Entry
from dit_runtime.output.series import Series
from dit_runtime.sampling.requests import ImageRequest

RECORD = "shards.json"
RECORD_BYTES = 64 * 1024
SCHEMA = 1
SHOWN = 3  # differences in a message
# What all images of a folder of shards have alike, by the keys of their entries.
ALIKE = (
    *("model", "bundle", "precision", "engine", "negative_label", "noise_device", "noise_dtype", "cuda_threads"),
    *("sampler", "spacing", "steps", "eta", "table", "guidance_interval", "guidance_schedule", "strength", "size"),
    "decode_tile",
)


def record_of(
    images_in_all: int, size: int, folders: bool, series: Series, images: dict[int | str, ImageRequest], entry: Entry
) -> dict[str, Any]:
    """How all images of a folder of shards are made. Lists of numbers, which may be long, are there as hashes."""
    weights = {label: {str(key): weight for key, weight in image.labels.items()} for label, image in images.items()}
    seeds = series.seeds
    scales = {entry["guidance"]} if series.guidance is None else set(series.guidance)
    return {
        "schema": SCHEMA,
        "images": images_in_all,
        "shard_size": size,
        "kind": "folders" if folders else "tar",
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


def claim_folder(folder: Path, record: dict[str, Any]) -> None:
    """Write down how a folder's shards are made, or compare with what is written there.

    Raises:
        OutputError: its shards are made in another way, or nothing says how.
    """
    file = folder / RECORD
    clear_litter(folder)
    found = read_record(file)
    if found is None:
        _check_empty(folder)
        _write_once(file, json.dumps(record, indent=1, ensure_ascii=False).encode() + b"\n")
        found = read_record(file)
    compare_records(file, found, record)


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


def read_record(file: Path) -> dict[str, Any] | None:
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


def compare_records(file: Path, found: dict[str, Any] | None, record: dict[str, Any]) -> None:
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
