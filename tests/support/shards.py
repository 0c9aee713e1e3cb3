"""What is in a folder of shards."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dit_runtime.output.shard_record import RECORD
from support.sample_command import pixels


def members(shard: Path) -> dict[str, bytes]:
    """What is in a shard, in its order."""
    if shard.is_dir():
        return {path.name: path.read_bytes() for path in sorted(shard.iterdir())}
    with tarfile.open(shard) as file:
        return {each.name: (file.extractfile(each) or io.BytesIO()).read() for each in file.getmembers()}


def images_in(folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    """The images of all shards by their names; a name that comes twice fails."""
    found: dict[str, np.ndarray[Any, Any]] = {}
    for shard in sorted(folder.glob("[!.]*")):
        if shard.name != RECORD:
            new = {name: png for name, png in members(shard).items() if name.endswith(".png")}
            assert not found.keys() & new.keys()
            found |= {name: np.asarray(Image.open(io.BytesIO(png))) for name, png in new.items()}
    return found


def check_equal_to_plain(folder: Path, plain: Path) -> None:
    """Every image of a plain folder is in the shards once, and no other, with no difference."""
    found = images_in(folder)
    assert sorted(found) == sorted(path.name for path in plain.iterdir())
    assert all(np.array_equal(image, pixels(plain / name)) for name, image in found.items())


def times(folder: Path) -> dict[str, int]:
    """When each file of a folder was changed."""
    return {path.name: path.stat().st_mtime_ns for path in sorted(folder.iterdir())}
