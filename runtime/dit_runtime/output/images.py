"""Image files: PNG written whole or not at all, and images of any format read."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from dit_runtime.core.errors import OutputError, SamplingError
from dit_runtime.core.files import replace_file

Images = NDArray[np.uint8]


def write_png(path: Path, image: Images, text: Mapping[str, str] | None = None) -> None:
    """Write one image ``[H, W, 3]`` as PNG, with text chunks by their keys.

    Raises:
        OutputError: the file cannot be written.
    """
    chunks = PngInfo()
    for key, value in (text or {}).items():
        chunks.add_text(key, value)
    with replace_file(path) as file:
        Image.fromarray(image).save(file, format="PNG", pnginfo=chunks)


def read_png(path: Path) -> tuple[Images, dict[str, str]]:
    """A PNG file's image ``[H, W, 3]`` and its text chunks.

    Raises:
        OutputError: missing, or not a PNG file.
    """
    try:
        with Image.open(path, formats=["PNG"]) as image:
            pixels = np.asarray(image.convert("RGB"))
            text = {key: str(value) for key, value in image.text.items()}  # type: ignore[attr-defined]  # PngImageFile
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise OutputError(f"{path}: cannot be read as a PNG image ({error}); name an image of dit-sample") from error
    return pixels, text


def read_image(path: Path) -> Images:
    """The image ``[H, W, 3]`` of a file to start from, in any format that Pillow reads, turned as its EXIF record says.

    Raises:
        SamplingError: missing, or not an image.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise SamplingError(
            f"{path}: cannot be read as an image ({error}); name a PNG or JPEG file, or float32 latents in a .npy file"
        ) from error


def grid_from_images(images: Images, columns: int | None = None) -> Images:
    """One image of images ``[N, H, W, 3]`` side by side, row by row.

    ``columns`` None makes it nearly square. Cells without an image are black.
    """
    count, height, width, channels = images.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    padded = np.zeros((rows * columns, height, width, channels), np.uint8)
    padded[:count] = images
    tiled = padded.reshape(rows, columns, height, width, channels).swapaxes(1, 2)
    return tiled.reshape(rows * height, columns * width, channels)
