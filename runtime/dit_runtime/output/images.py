"""Image files: PNG written whole or not at all, and images of a few formats read within bounds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from dit_runtime.core.errors import OutputError, SamplingError
from dit_runtime.core.files import replace_file
from dit_runtime.core.images import image_from_bytes
from dit_runtime.core.reading import IMAGE_BYTES, read_file

Images = NDArray[np.uint8]
FORMATS = ("PNG", "JPEG", "WEBP", "BMP")  # of an image to start from, as Pillow names them
INIT_PIXELS = 89_000_000  # of an image to start from: about 0.3 GB as RGB
PNG_PIXELS = 178_000_000  # of an image of dit-sample, which may be a grid of many


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
        OutputError: missing, not a PNG file, or larger than ``PNG_PIXELS``.
    """
    try:
        with image_from_bytes(read_file(path, IMAGE_BYTES), ("PNG",), PNG_PIXELS) as image:
            pixels = np.asarray(image.convert("RGB"))
            text = {key: str(value) for key, value in image.text.items()}  # type: ignore[attr-defined]  # PngImageFile
    except Exception as error:  # Pillow raises errors of any kind for damaged files
        raise OutputError(f"{path}: cannot be read as a PNG image ({error}); name an image of dit-sample") from error
    return pixels, text


def read_image(path: Path) -> Images:
    """The image ``[H, W, 3]`` of a file to start from, in one of ``FORMATS``, turned as its EXIF record says.

    Raises:
        SamplingError: missing, not such an image, or larger than ``INIT_PIXELS``.
    """
    try:
        with image_from_bytes(read_file(path, IMAGE_BYTES), FORMATS, INIT_PIXELS) as image:
            return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except Exception as error:  # Pillow raises errors of any kind for damaged files
        raise SamplingError(
            f"{path}: cannot be read as an image ({error}); name a PNG, JPEG, WebP or BMP file of at most "
            f"{INIT_PIXELS // 10**6} megapixels, or float32 latents in a .npy file"
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
