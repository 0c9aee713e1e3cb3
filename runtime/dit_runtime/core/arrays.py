"""Reads NumPy's array files strictly: ``.npy``, and ``.npz``, which is a ZIP archive of them.

A file may come from elsewhere or be damaged. No Python object is made from it: the header is read with a pattern and
not evaluated. An array is made only when its dtype and shape are those that are expected, and the file has its bytes.
"""

from __future__ import annotations

import io
import math
import re
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from dit_runtime.core.decode import DecodeError
from dit_runtime.core.reading import FileError, open_file

Array = NDArray[Any]

HEADER_BYTES = 4096  # NumPy's own have 128
DIRECTORY_BYTES = 1 << 16  # of an archive's list of members
LONGEST_AXIS = 1 << 48
_ORDER = "<" if sys.byteorder == "little" else ">"
DTYPES = {  # what the header calls each, and its name
    **{f"{_ORDER}{kind}": name for kind, name in (("f2", "float16"), ("f4", "float32"), ("f8", "float64"))},
    **{f"{_ORDER}{kind}": name for kind, name in (("i4", "int32"), ("i8", "int64"))},
    "|u1": "uint8",
}
# numpy.lib.format: the keys in this order, as NumPy and the writers of other languages have them.
_HEADER = re.compile(
    r"\s*\{\s*'descr'\s*:\s*('[^']{1,20}'|.{1,200}?)\s*,\s*'fortran_order'\s*:\s*(True|False)\s*,"
    r"\s*'shape'\s*:\s*\(\s*((?:[0-9]{1,15}\s*,\s*)*(?:[0-9]{1,15})?)\s*\)\s*,?\s*\}\s*",
    re.ASCII | re.DOTALL,
)


@dataclass(frozen=True)
class ArraySpec:
    """What an array must be.

    Attributes:
        dtype: numpy's name of it.
        shape: each axis is a size, or the name of an axis of any size from 1 that is alike in all arrays of a file.
    """

    dtype: str
    shape: tuple[int | str, ...]

    def __str__(self) -> str:
        return f"{self.dtype} [{', '.join(map(str, self.shape))}]"


def array_from_npy(path: Path, limit_bytes: int, *accepted: ArraySpec) -> Array:
    """The array of a ``.npy`` file that a user named.

    Args:
        path: of the file.
        limit_bytes: the most bytes that the file may have.
        accepted: what the array may be; its numbers must be finite.

    Raises:
        DecodeError: the file cannot be read, or holds no such array or anything beside it.
    """
    try:
        with open_file(path, limit_bytes) as file:
            size = file.seek(0, io.SEEK_END)
            file.seek(0)
            return _read_array(file, size, accepted, {})
    except DecodeError:
        raise
    except FileError as error:
        raise DecodeError(str(error)) from error
    except (OSError, MemoryError) as error:
        raise DecodeError(f"cannot be read ({error or type(error).__name__})") from error


def arrays_from_npz(file: BinaryIO, specs: Mapping[str, ArraySpec], limit_bytes: int) -> dict[str, Array]:
    """The arrays of a ``.npz`` file by name.

    Args:
        file: open at its start.
        specs: of every array that the file must have; their numbers must be finite.
        limit_bytes: the most bytes that all arrays together may have.

    Raises:
        DecodeError: the file is damaged, or does not hold these arrays and nothing else.
    """
    try:
        _check_directory(file)
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            if sorted(member.filename for member in members) != sorted(f"{name}.npy" for name in specs):
                shown = ", ".join(f"{member.filename!r:.40}" for member in members[:12]) or "nothing"
                raise DecodeError(f"holds {shown}, expected {', '.join(specs)}")
            if (total := sum(member.file_size for member in members)) > limit_bytes:
                raise DecodeError(f"holds {total} bytes, expected at most {limit_bytes}")
            sizes: dict[str, int] = {}
            return {name: _read_member(archive, name, spec, sizes) for name, spec in specs.items()}
    except DecodeError:
        raise
    except Exception as error:  # zipfile raises a dozen kinds, zlib's and struct's among them
        raise DecodeError(f"damaged ({error or type(error).__name__})") from error


def _check_directory(file: BinaryIO) -> None:
    """Raises DecodeError where the archive's end is not that of a small archive: zipfile would read any directory."""
    file.seek(max(0, file.seek(0, io.SEEK_END) - 42))
    tail = file.read()
    before, end = tail[:-22], tail[-22:]
    is_end = end.startswith(b"PK\5\6") and end.endswith(b"\0\0")  # without a comment after it
    if not is_end or before.startswith(b"PK\6\7") or int.from_bytes(end[12:16], "little") > DIRECTORY_BYTES:
        raise DecodeError("not an archive of arrays, cut short, or with more in it than arrays")
    file.seek(0)


def _read_member(archive: zipfile.ZipFile, name: str, spec: ArraySpec, sizes: dict[str, int]) -> Array:
    member = archive.getinfo(f"{name}.npy")
    if member.flag_bits & 1 or member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise DecodeError(f"{name}: encrypted, or compressed in another way than deflate")
    try:
        with archive.open(member) as stream:
            return _read_array(stream, member.file_size, (spec,), sizes)
    except DecodeError as error:
        raise DecodeError(f"{name}: {error}") from error.__cause__


def _read_array(stream: IO[bytes], size: int, accepted: tuple[ArraySpec, ...], sizes: dict[str, int]) -> Array:
    """The array of a stream of ``size`` bytes. Axes with names get their sizes in ``sizes``.

    Raises:
        DecodeError: the stream holds something else.
    """
    dtype, is_fortran, shape, start = _read_header(stream)
    expected = " or ".join(map(str, accepted))
    if not any(spec.dtype == dtype and _fits(shape, spec.shape, sizes) for spec in accepted):
        raise DecodeError(f"{dtype} {list(shape[:8])}, expected {expected}")
    needed = math.prod(shape) * np.dtype(dtype).itemsize
    if needed != size - start:
        raise DecodeError(f"{size - start} bytes for {dtype} {list(shape)}, expected {needed}")
    array: Array = np.empty(shape[::-1] if is_fortran else shape, dtype)
    left = array.reshape(-1).view(np.uint8).data
    while len(left):
        count = stream.readinto(left)  # type: ignore[attr-defined]  # every stream of bytes has it
        if not count:
            raise DecodeError(f"cut short: {len(left)} of {needed} bytes are missing")
        left = left[count:]
    if stream.read(1):  # reading on to the end checks a member's sum
        raise DecodeError("longer than its size says")
    if dtype.startswith("float") and not np.isfinite(array).all():
        raise DecodeError(f"numbers that are not finite, expected {expected} of finite numbers")
    return array.transpose() if is_fortran else array


def _read_header(stream: IO[bytes]) -> tuple[str, bool, tuple[int, ...], int]:
    """dtype, whether the first axis varies fastest, shape, and where the numbers begin."""
    start = stream.read(8)
    if start[:6] != b"\x93NUMPY" or len(start) < 8 or start[6] not in (1, 2, 3) or start[7]:
        raise DecodeError("not an array of numpy.save")
    field = stream.read(2 if start[6] == 1 else 4)
    length = int.from_bytes(field, "little")
    if length > HEADER_BYTES:
        raise DecodeError(f"a header of {length} bytes, expected at most {HEADER_BYTES}")
    header = stream.read(length)
    found = _HEADER.fullmatch(header.decode("ascii", "replace")) if len(header) == length else None
    if found is None:
        raise DecodeError("a damaged header: no dtype and shape in it")
    described, order, axes = found.groups()
    if (dtype := DTYPES.get(described.strip("'"))) is None:
        raise DecodeError(f"numbers of {described!r:.60}, expected one of {', '.join(DTYPES.values())}")
    shape = tuple(int(axis) for axis in axes.split(",") if axis.strip())
    if len(shape) > 8 or math.prod(shape) > LONGEST_AXIS:
        raise DecodeError(f"shape {list(shape[:8])}, which no array here has")
    return dtype, order == "True", shape, 8 + len(field) + length


def _fits(shape: tuple[int, ...], expected: tuple[int | str, ...], sizes: dict[str, int]) -> bool:
    """Whether a shape is the expected one; if so, its named axes are in ``sizes``."""
    if len(shape) != len(expected):
        return False
    named = dict(sizes)
    for size, axis in zip(shape, expected, strict=True):
        if isinstance(axis, str) and (size < 1 or named.setdefault(axis, size) != size):
            return False
        if isinstance(axis, int) and size != axis:
            return False
    sizes.update(named)
    return True
