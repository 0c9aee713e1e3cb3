"""Images of a few formats from bytes that others wrote, within a bound of pixels."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator

from PIL import Image, UnidentifiedImageError


@contextlib.contextmanager
def image_from_bytes(content: bytes, formats: tuple[str, ...], pixels: int) -> Iterator[Image.Image]:
    """A file's image, not yet decoded, of at most ``pixels`` pixels; Pillow's warnings are not shown.

    Only ``formats``, by Pillow's names, are tried, whatever the file's name says: Pillow starts Ghostscript for EPS,
    and more readers than are needed would see what others wrote.

    Raises:
        ValueError: not such an image, or one of more pixels. Pillow raises errors of any kind for damaged files, in the
            block too.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            opened = Image.open(io.BytesIO(content), formats=formats)
        except UnidentifiedImageError as error:  # its text names the buffer
            raise ValueError(f"not {', '.join(formats)}, or damaged") from error
        with opened as image:
            if image.width * image.height > pixels:
                raise ValueError(f"{image.width} x {image.height} pixels are more than {pixels}")
            yield image
