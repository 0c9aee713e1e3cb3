"""Pictures to files, atomically."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dit_runtime.files import replaced_file

Pictures = NDArray[np.uint8]


def write_png(path: Path, image: Pictures) -> None:
    """Write one picture ``[H, W, 3]``.

    Raises:
        OutputError: the place cannot be written.
    """
    with replaced_file(path) as file:
        Image.fromarray(image).save(file, format="PNG")


def grid(images: Pictures, columns: int | None = None) -> Pictures:
    """Pictures ``[N, H, W, 3]`` side by side, row by row; empty places are black. Near-square without ``columns``."""
    count, height, width, channels = images.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    padded = np.zeros((rows * columns, height, width, channels), np.uint8)
    padded[:count] = images
    tiled = padded.reshape(rows, columns, height, width, channels).swapaxes(1, 2)
    return tiled.reshape(rows * height, columns * width, channels)
