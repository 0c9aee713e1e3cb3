"""Image files of others: a few formats only, whatever the name says, within bounds, and one line for all else."""

from __future__ import annotations

import contextlib
import io
import os
import struct
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import BmpImagePlugin, EpsImagePlugin, Image, ImageFile, PngImagePlugin

from dit_runtime.core.errors import DiTError, OutputError, SamplingError
from dit_runtime.output import images
from dit_runtime.output.images import FORMATS, INIT_PIXELS, PNG_PIXELS, read_image, read_png

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n%%EndComments\n0 0 32 32 rectfill\nshowpage\n%%EOF\n"
PHOTO = np.linspace(0, 255, 32 * 48 * 3).reshape(32, 48, 3).astype(np.uint8)
STARTS = ("subprocess.Popen", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "os.system")


def encoded(kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(PHOTO).save(buffer, format=kind, **options)
    return buffer.getvalue()


def png_of_size(width: int, height: int) -> bytes:
    """A PNG file whose header promises pixels that its data does not have."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = b"IDAT" + zlib.compress(bytes(1000))
    content = b"\x89PNG\r\n\x1a\n"
    for chunk in (header, data):
        content += struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return content


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The programs that this process starts while the test runs."""
    events: list[str] = []
    active = True

    def hear(event: str, arguments: tuple[Any, ...]) -> None:
        if active and event in STARTS:
            events.append(f"{event} {arguments}")

    sys.addaudithook(hear)  # which nothing removes
    yield events
    active = False


def refuse_both(path: Path, *words: str) -> None:
    """Both readers refuse a file in one line that names it."""
    for read, kind in ((read_image, SamplingError), (read_png, OutputError)):
        with pytest.raises(kind) as caught:
            read(path)
        message = str(caught.value)
        assert message.startswith(f"{path}: cannot be read as "), message
        assert len(message.splitlines()) == 1, message
        assert len(message) < 500
        assert not words or any(word in message for word in words), message


@pytest.mark.parametrize("kind", FORMATS)
def test_formats(kind: str, tmp_path: Path) -> None:
    """The content counts, not the name."""
    path = tmp_path / "photo.eps"
    path.write_bytes(encoded(kind, **({"lossless": True} if kind == "WEBP" else {})))
    found = read_image(path)
    assert found.shape == PHOTO.shape
    assert kind == "JPEG" or np.array_equal(found, PHOTO)


@pytest.mark.parametrize("name", ["photo.png", "photo.eps", "photo"])
def test_an_eps_starts_no_program(
    name: str, started: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pillow starts ``gs`` of PATH for EPS: here one that would write a file."""
    script, marker, path = tmp_path / "bin" / "gs", tmp_path / "ran", tmp_path / name
    script.parent.mkdir()
    script.write_text(f"#!/bin/sh\ntouch {marker}\n")
    script.chmod(0o755)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # what Pillow found of it before
    monkeypatch.setenv("PATH", f"{script.parent}{os.pathsep}{os.environ['PATH']}")
    for content in (EPS, b"\xc5\xd0\xd3\xc6" + struct.pack("<6I", 30, len(EPS), 0, 0, 0, 0) + b"\xff\xff" + EPS):
        path.write_bytes(content)
        refuse_both(path, "not PNG")
    assert started == []
    assert not marker.exists()
    path.write_bytes(EPS)
    with pytest.raises(OSError), Image.open(path) as image:  # noqa: PT011  # the test would see it: without our list it starts
        image.load()
    assert started
    assert marker.exists()


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "PPM", "ICO", "PCX", "TGA", "PDF", "JPEG2000"])
def test_other_formats_are_refused(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "photo.png"
    path.write_bytes(encoded(kind))
    refuse_both(path, "not PNG")


def test_what_is_no_regular_file(tmp_path: Path) -> None:
    """Fails by waiting for ever for the FIFO's other end, or by reading a device to its end."""
    fifo, link = tmp_path / "fifo.png", tmp_path / "link.png"
    os.mkfifo(fifo)
    link.symlink_to("/dev/zero")
    for path in (fifo, link, tmp_path):
        refuse_both(path, "not a regular file")
    refuse_both(tmp_path / "missing.png", "No such file")


def test_more_pixels_than_the_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A header is refused before a pixel is decoded, whatever bound the program around us gave to Pillow."""

    def load(self: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", load)
    monkeypatch.setattr(BmpImagePlugin.BmpImageFile, "load", load)
    path = tmp_path / "bomb.png"
    bitmap = bytearray(encoded("BMP"))
    bitmap[18:26] = struct.pack("<ii", 100_000, 100_000)
    for bound in (Image.MAX_IMAGE_PIXELS, None):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", bound)
        for size in ((100_000, 100_000), (2**31 - 1, 2**31 - 1), (1, PNG_PIXELS + 1)):
            path.write_bytes(png_of_size(*size))
            refuse_both(path, "pixels")
        path.write_bytes(bytes(bitmap))
        with pytest.raises(SamplingError, match="pixels"):
            read_image(path)
        path.write_bytes(png_of_size(1, INIT_PIXELS + 1))
        with pytest.raises(SamplingError, match=f"pixels are more than {INIT_PIXELS}"):
            read_image(path)


def test_a_file_larger_than_the_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "large.png"
    path.write_bytes(encoded("PNG"))
    monkeypatch.setattr(images, "IMAGE_BYTES", path.stat().st_size)
    assert np.array_equal(read_image(path), PHOTO)
    monkeypatch.setattr(images, "IMAGE_BYTES", path.stat().st_size - 1)
    refuse_both(path, "larger than")


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.filterwarnings("error")
def test_damaged_files(kind: str, tmp_path: Path) -> None:
    """Cut anywhere, or with a byte changed anywhere, a file is an image or one of our errors, with no warning."""
    content = encoded(kind, exif=Image.Exif()) if kind != "BMP" else encoded(kind)
    path = tmp_path / "damaged.png"
    random = np.random.default_rng(0)
    places = [*range(0, 200, 3), *random.integers(0, len(content), 60).tolist()]
    for index, place in enumerate(min(place, len(content) - 1) for place in places):
        changed = bytearray(content)
        if index % 2:
            changed[place] ^= int(random.integers(1, 256))
        else:
            del changed[place:]
        path.write_bytes(changed)
        for read in (read_image, read_png):
            with contextlib.suppress(DiTError):
                read(path)


def png_of(rows: np.ndarray, color: int, *chunks: bytes) -> bytes:
    """A PNG file written by hand: uint8 or uint16 rows ``[H, W]`` or ``[H, W, C]`` of a color type."""
    depth = 8 * rows.dtype.itemsize
    header = struct.pack(">IIBBBBB", rows.shape[1], rows.shape[0], depth, color, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows.astype(rows.dtype.newbyteorder(">"))))
    content = b"\x89PNG\r\n\x1a\n"
    for chunk in (b"IHDR" + header, *chunks, b"IDAT" + data, b"IEND"):
        content += struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return content


def grey_ramp(kind: str) -> np.ndarray:
    return np.linspace(0, np.iinfo(kind).max, 32 * 48).reshape(32, 48).astype(kind)


def stacked(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey[..., None], 3, axis=2)


def test_pixels_of_every_kind(tmp_path: Path) -> None:
    """Each kind of pixels gives the values that its format defines: written by hand, computed without Pillow."""
    deep, color = grey_ramp("u2"), PHOTO.astype(">u2") * 257
    opaque = np.full_like(PHOTO[..., :1], 255)
    levels = np.array([round(value / 65535 * 255) for value in deep.ravel().tolist()]).reshape(deep.shape)
    palette = np.arange(48, dtype=np.uint8).reshape(16, 3) * 5
    index = np.arange(32 * 48, dtype=np.uint8).reshape(32, 48) % 16
    for name, content, expected in (
        ("16-bit grey", png_of(deep, 0), stacked(levels)),
        (
            "16-bit grey with another transparent value",
            png_of(deep | 1, 0, b"tRNS\0\0"),
            stacked(levels),
        ),
        ("16-bit RGB", png_of(color, 2), PHOTO),
        ("16-bit grey, opaque", png_of(np.stack([deep, np.full_like(deep, 65535)], 2), 4), stacked(deep >> 8)),
        ("8-bit grey", png_of(grey_ramp("u1"), 0), stacked(grey_ramp("u1"))),
        ("opaque", png_of(np.concatenate([PHOTO, opaque], 2), 6), PHOTO),
        ("grey, opaque", png_of(np.concatenate([PHOTO[..., :1], opaque], 2), 4), stacked(PHOTO[..., 0])),
        ("palette", png_of(index, 3, b"PLTE" + palette.tobytes()), palette[index]),
        ("opaque palette", png_of(index, 3, b"PLTE" + palette.tobytes(), b"tRNS\xff\xff"), palette[index]),
        ("gamma", png_of(PHOTO, 2, b"gAMA" + struct.pack(">I", 100000)), PHOTO),
    ):
        (tmp_path / "start.png").write_bytes(content)
        found = read_image(tmp_path / "start.png")
        assert (found.dtype, found.shape) == (np.uint8, PHOTO.shape), name
        assert np.abs(found.astype(int) - expected).max() <= ("another" in name), name  # that one's values are odd


@pytest.mark.parametrize(("kind", "deep"), [("PNG", False), ("PNG", True), ("JPEG", False), ("WEBP", False)])
def test_the_exif_record_turns_an_image(kind: str, deep: bool, tmp_path: Path) -> None:
    """Each of the eight orientations, as the EXIF standard defines them, for 8 bits and for 16-bit grey."""
    stored = grey_ramp("u2") if deep else PHOTO
    options: dict[str, Any] = {"lossless": True} if kind == "WEBP" else {"quality": 100} if kind == "JPEG" else {}
    turns = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.swapaxes(0, 1),
        6: lambda a: a[::-1].swapaxes(0, 1),
        7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
        8: lambda a: a.swapaxes(0, 1)[::-1],
    }
    for orientation, turn in turns.items():
        record = Image.Exif()
        record[0x0112] = orientation
        Image.fromarray(stored).save(tmp_path / "start", format=kind, exif=record, **options)
        expected = turn(stacked(np.rint(stored / 257)) if deep else PHOTO)
        found = read_image(tmp_path / "start")
        assert found.shape == expected.shape
        assert np.abs(found.astype(float) - expected).max() <= (2 if kind == "JPEG" else 0)  # measured: 1 and 0


def test_pixels_that_are_not_determined(tmp_path: Path) -> None:
    """Transparency in each of its forms, CMYK, frames: refused, and what to do is said."""
    deep, half = grey_ramp("u2"), np.full_like(PHOTO[..., :1], 254)
    palette, index = b"PLTE" + bytes(range(48)), np.arange(32 * 48, dtype=np.uint8).reshape(32, 48) % 16
    photo = Image.fromarray(PHOTO)
    animated = {"save_all": True, "append_images": [Image.fromarray(255 - PHOTO)]}
    for message, content in (
        ("it has transparent pixels", png_of(np.concatenate([PHOTO, half], 2), 6)),
        ("it has transparent pixels", png_of(np.concatenate([PHOTO[..., :1], half], 2), 4)),
        ("it has transparent pixels", png_of(np.stack([deep, deep], 2), 4)),
        ("it has transparent pixels", png_of(deep, 0, b"tRNS" + struct.pack(">H", deep[3, 3]))),
        ("it has transparent pixels", png_of(grey_ramp("u1"), 0, b"tRNS\0\x05")),
        ("it has transparent pixels", png_of(PHOTO, 2, b"tRNS" + PHOTO[3, 3].astype(">u2").tobytes())),
        ("it has transparent pixels", png_of(index, 3, palette, b"tRNS\xff\x80")),
        ("it has transparent pixels", written(Image.fromarray(np.concatenate([PHOTO, half], 2)), "WEBP")),
        ("its pixels are CMYK; convert it to RGB", written(photo.convert("CMYK"), "JPEG")),
        ("it has 2 frames", written(photo, "WEBP", **animated)),
        ("it has 2 frames", written(photo, "PNG", **animated)),
    ):
        (tmp_path / "start.png").write_bytes(content)
        with pytest.raises(SamplingError, match=message) as caught:
            read_image(tmp_path / "start.png")
        assert "\n" not in str(caught.value)


def written(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()
