"""The files that images are made from: noise, a sampler table, what to start from, and images with their record."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dit_runtime.core.arrays import ArraySpec, array_from_npy
from dit_runtime.core.decode import DecodeError
from dit_runtime.core.errors import DiTError, SamplingError
from dit_runtime.core.reading import NOISE_BYTES
from dit_runtime.output.images import Images, read_image, read_png
from dit_runtime.output.provenance import PIXELS, Entry, entries_from_text, hash_of_pixels
from dit_runtime.output.request import InputPaths
from dit_runtime.samplers.noise import Float32
from dit_runtime.samplers.schedule import Schedule, read_table

ARRAYS = (ArraySpec("float32", ("N", "C", "H", "W")), ArraySpec("float32", ("C", "H", "W")))  # of several or one image


@dataclass(frozen=True)
class InputFiles:
    """The contents of the files in ``InputPaths``."""

    noise: Float32 | None
    table: Schedule | None
    init: Images | Float32 | None


@dataclass(frozen=True)
class RecordedFile:
    """A PNG file that ``dit-sample`` wrote: its pixels, and one entry for each of its images."""

    path: Path
    pixels: Images
    entries: list[Entry]

    @property
    def is_intact(self) -> bool | None:
        """Whether the pixels are those that were written; None where the record does not say, by an older version."""
        recorded = self.entries[0].get(PIXELS)
        return None if recorded is None else recorded == hash_of_pixels(self.pixels)


def read_input_files(paths: InputPaths) -> InputFiles:
    """Read the files that images are made from.

    Raises:
        SamplingError: a file is missing, or does not hold what it should.
    """
    table = None if paths.table is None else read_table(paths.table)
    noise = None if paths.noise is None else read_array(paths.noise, "noise")
    if paths.init is None:
        return InputFiles(noise, table, None)
    is_array = paths.init.suffix.lower() == ".npy"
    return InputFiles(noise, table, read_array(paths.init, "latents") if is_array else read_image(paths.init))


def read_array(path: Path, content: str) -> Float32:
    """The array ``[N, C, h, w]`` of a ``.npy`` file that holds one image ``[C, h, w]`` or several.

    The pipeline checks its shape. ``content`` is what it holds, for the message.

    Raises:
        SamplingError: missing, not such a file, or not finite float32 of 3 or 4 axes.
    """
    try:
        values: Float32 = array_from_npy(path, NOISE_BYTES, *ARRAYS)
    except DecodeError as error:
        raise SamplingError(
            f"{path}: cannot be read as {content} ({error}); expected finite float32 [N, C, H, W] of numpy.save"
        ) from error
    return values[None] if values.ndim == 3 else values


def read_recorded_file(path: Path) -> RecordedFile:
    """A file that ``dit-sample`` wrote, with its record.

    Raises:
        OutputError: missing, or not a PNG file.
        SamplingError: its record is missing or damaged.
    """
    pixels, text = read_png(path)
    return RecordedFile(path, pixels, entries_from_text(path, text))


def read_entry(file: Path) -> Entry | None:
    """The entry of an image's file.

    None where there is no such file, no record, more than one image, or pixels that the record does not vouch for.
    """
    if not file.exists():
        return None
    try:
        recorded = read_recorded_file(file)
        (entry,) = recorded.entries
    except (DiTError, ValueError):
        return None
    return entry if recorded.is_intact else None
