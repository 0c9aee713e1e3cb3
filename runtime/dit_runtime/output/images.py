"""Image files: PNG written whole or not at all, and images of a few formats read within bounds."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from dit_runtime.core.errors import OutputError, SamplingError
from dit_runtime.core.images import image_from_bytes
from dit_runtime.core.reading import IMAGE_BYTES, read_file
from dit_runtime.core.replace import replace_file

Images = NDArray[np.uint8]
FORMATS = ("PNG", "JPEG", "WEBP", "BMP")  # of an image to start from, as Pillow names them
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA")  # Pillow's names of pixels of at most 8 bits that RGB can hold
GREY_16 = ("I;16", "I;16B", "I;16L", "I")  # of 16 bits; ``I`` is how older versions read a PNG of that kind
TRANSPARENT = "it has transparent pixels; put it on a background and save it without transparency"
RUNS = 3  # zlib's Z_RLE
INIT_PIXELS = 89_000_000  # of an image to start from: about 0.3 GB as RGB
PNG_PIXELS = 178_000_000  # of an image of dit-sample, which may be a grid of many


def png_from_image(image: Images, text: Mapping[str, str] | None = None) -> bytes:
    """One image ``[H, W, 3]`` as the bytes of a PNG file, with text chunks by their keys."""
    chunks, file = PngInfo(), io.BytesIO()
    for key, value in (text or {}).items():
        chunks.add_text(key, value)
    # zlib's search for repeated texts takes half of the time and finds little in an image: with runs alone, one of
    # 256x256 takes 4.4 ms and not 9.3, and the demo's images become 3 % larger.
    Image.fromarray(image).save(file, format="PNG", pnginfo=chunks, compress_type=RUNS)
    return file.getvalue()


def write_png(path: Path, image: Images, text: Mapping[str, str] | None = None) -> None:
    """Write one image ``[H, W, 3]`` as PNG, with text chunks by their keys.

    Raises:
        OutputError: the file cannot be written.
    """
    content = png_from_image(image, text)
    with replace_file(path) as file:
        file.write_bytes(content)


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

    Grey becomes RGB, and 16 bits become the nearest of 8 bits where Pillow gives all 16: in grey images. Pixels are
    taken as sRGB: color profiles and gamma are not applied, as diffusers does not.

    Raises:
        SamplingError: missing, not such an image, larger than ``INIT_PIXELS``, or an image whose RGB pixels are not
            determined: with transparent pixels, CMYK, or of several frames.
    """
    try:
        with image_from_bytes(read_file(path, IMAGE_BYTES), FORMATS, INIT_PIXELS) as image:
            return _pixels_of(image)
    except Exception as error:  # Pillow raises errors of any kind for damaged files
        raise SamplingError(
            f"{path}: cannot be read as an image ({error}); name a PNG, JPEG, WebP or BMP file of at most "
            f"{INIT_PIXELS // 10**6} megapixels, or float32 latents in a .npy file"
        ) from error


def _pixels_of(image: Image.Image) -> Images:
    """An opened image as ``[H, W, 3]``. Raises ValueError as ``read_image`` says."""
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format in ("PNG", "WEBP"):  # the further images of a phone's JPEG are previews
        raise ValueError(f"it has {frames} frames; save the one that you mean")
    transparent = image.info.get("transparency")
    turned = ImageOps.exif_transpose(image)
    if turned.mode in GREY_16:
        grey = np.asarray(turned).astype(np.int64)
        if isinstance(transparent, int) and (grey == transparent).any():
            raise ValueError(TRANSPARENT)
        eight: Images = ((grey * 255 + 32767) // 65535).clip(0, 255).astype(np.uint8)
        return np.repeat(eight[..., None], 3, axis=2)
    if turned.mode not in MODES:
        raise ValueError(f"its pixels are {turned.mode}; convert it to RGB")
    if "A" in turned.getbands() or transparent is not None:
        *_, alpha = turned.convert("RGBA").split()
        if alpha.getextrema() != (255, 255):
            raise ValueError(TRANSPARENT)
    return np.asarray(turned.convert("RGB"))


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
