"""Array files that were not written as they should be end in one line, and cost no memory."""

from __future__ import annotations

import io
import os
import random
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from dit_runtime.core.arrays import ArraySpec, array_from_npy, arrays_from_npz
from dit_runtime.core.decode import DecodeError
from dit_runtime.output.inputs import ARRAYS

VALUES = np.arange(2 * 4 * 3 * 3, dtype=np.float32).reshape(2, 4, 3, 3)
LIMIT = 1 << 20


def npy(values: np.ndarray, **options: bool) -> bytes:
    file = io.BytesIO()
    np.save(file, values, **options)
    return file.getvalue()


def with_header(header: str, data: bytes = VALUES.tobytes(), version: int = 1) -> bytes:
    """An array file with a header of one's own."""
    text = header.encode()
    return b"\x93NUMPY" + bytes((version, 0)) + struct.pack("<H" if version == 1 else "<I", len(text)) + text + data


def header(descr: str = "'<f4'", order: str = "False", shape: str = "(2, 4, 3, 3)") -> str:
    return f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}"


GOOD = npy(VALUES)
REFUSED = {
    "nothing": b"",
    "text": b"noise",
    "a zip": b"PK\x03\x04 cut short",
    "a pickle": b"\x80\x04\x95\x0f\x00\x00\x00\x00\x00\x00\x00\x8c\x02os\x94\x8c\x04exit\x94\x93\x94.",
    "magic alone": b"\x93NUMPY",
    "no length": b"\x93NUMPY\x01\x00",
    "half a length": b"\x93NUMPY\x01\x00\x76",
    "version 0": b"\x93NUMPY\x00\x00" + GOOD[8:],
    "version 9": b"\x93NUMPY\x09\x00" + GOOD[8:],
    "version 1.7": b"\x93NUMPY\x01\x07" + GOOD[8:],
    "a header of 4 GB": b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + GOOD[10:],
    "a header of 64 KB": with_header(header() + " " * 60_000),
    "a header cut short": GOOD[:60],
    "a header of nothing": with_header(""),
    "a header nested deeply": with_header("(" * 2000 + ")" * 2000),
    "a header that computes": with_header(header(shape="(2**40,)")),
    "a header that calls": with_header(header(shape="(__import__('os').getpid(),)")),
    "a header in UTF-8": with_header(header("'<ƒ4'"), version=3),
    "a header of bytes": b"\x93NUMPY\x01\x00\x10\x00" + b"\xff" * 16,
    "one key twice": with_header(header() + header()),
    "a key more": with_header(header()[:-1] + "'more': 1}"),
    "a key less": with_header("{'descr': '<f4', 'shape': (2, 4, 3, 3), }"),
    "order of no kind": with_header(header(order="1")),
    "shape of text": with_header(header(shape="('2',)")),
    "shape below zero": with_header(header(shape="(-2, -4, 3, 3)")),
    "4 TB": with_header(header(shape="(1099511627776, 4, 3, 3)")),
    "a shape that overflows": with_header(header(shape="(4294967296, 4294967296, 4294967296, 4294967296)")),
    "a number of 100 digits": with_header(header(shape=f"({'9' * 100}, 4, 3, 3)")),
    "many axes": with_header(header(shape=f"({'1, ' * 100})")),
    "objects": npy(np.array([[[{}]]], dtype=object), allow_pickle=True),
    "fields": npy(np.zeros((2, 4, 3, 3), [("a", "<f4")])),
    "words": npy(np.array([[["a", "b"]]])),
    "dates": npy(np.zeros((2, 4, 3, 3), "M8[s]")),
    "void": npy(np.zeros((2, 4, 3, 3), "V4")),
    "big-endian": npy(VALUES.astype(">f4")),
    "float64": npy(VALUES.astype(np.float64)),
    "float16": npy(VALUES.astype(np.float16)),
    "complex": npy(VALUES.astype(np.complex64)),
    "whole numbers": npy(VALUES.astype(np.int32)),
    "one number": npy(np.float32(1)),
    "two axes": npy(VALUES[0, 0]),
    "five axes": npy(VALUES[None]),
    "no images": npy(VALUES[:0]),
    "no width": npy(VALUES[..., :0]),
    "NaN": npy(np.where(VALUES == 5, np.float32("nan"), VALUES)),
    "infinity": npy(np.where(VALUES == 5, np.float32("-inf"), VALUES)),
    "cut short": GOOD[:-1],
    "longer": GOOD + b"\0",
    "two arrays": GOOD + GOOD,
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_is_no_noise(tmp_path: Path, name: str) -> None:
    """Damaged and hostile files, and arrays of other kinds, are refused in one short line."""
    path = tmp_path / "noise.npy"
    path.write_bytes(REFUSED[name])
    with pytest.raises(DecodeError) as raised:
        array_from_npy(path, LIMIT, *ARRAYS)
    assert str(raised.value).isprintable()
    assert len(str(raised.value)) < 400
    if name in ("4 TB", "cut short", "longer", "two arrays"):  # by the header alone, before memory is asked for
        assert "bytes for float32" in str(raised.value)


def test_what_is_no_file(tmp_path: Path) -> None:
    """A pipe is not waited for, a device is not read, and a file of 20 GB is not either."""
    os.mkfifo(tmp_path / "pipe")
    with (tmp_path / "giant").open("wb") as file:
        file.write(with_header(header(shape="(100000000, 4, 5, 3)"), b""))
        file.truncate(20 << 30)
    for path in (tmp_path / "pipe", tmp_path / "giant", tmp_path, tmp_path / "none", Path("/dev/zero")):
        with pytest.raises(DecodeError):
            array_from_npy(path, LIMIT, *ARRAYS)


@given(
    arrays(
        st.sampled_from(["float32", "float64", "float16", "int32", "int64", "uint8"]),
        array_shapes(min_dims=0, max_dims=5, min_side=0, max_side=4),
        elements=st.integers(0, 9),
    ),
    st.sampled_from("CF"),
)
@settings(max_examples=60, deadline=None)
def test_what_numpy_wrote_is_read(values: np.ndarray, order: str) -> None:
    """Every array of a known dtype comes back as NumPy reads it, whatever its order in memory."""
    values = np.asarray(values, order=order)
    file = io.BytesIO()
    np.savez(file, values=values)
    file.seek(0)
    read = arrays_from_npz(file, {"values": ArraySpec(str(values.dtype), values.shape)}, LIMIT)["values"]
    assert (read.dtype, read.shape) == (values.dtype, values.shape)
    assert np.array_equal(read, values)


@pytest.mark.parametrize("version", [1, 2, 3])
def test_versions_of_the_format(tmp_path: Path, version: int) -> None:
    """All versions that NumPy writes are read, and headers without its padding, as other programs write them."""
    path = tmp_path / "a.npy"
    with path.open("wb") as file:
        np.lib.format.write_array(file, VALUES, (version, 0))
    assert np.array_equal(array_from_npy(path, LIMIT, *ARRAYS), VALUES)
    path.write_bytes(with_header("{'descr':'<f4','fortran_order':False,'shape':(2,4,3,3)}", version=version))
    assert np.array_equal(array_from_npy(path, LIMIT, *ARRAYS), VALUES)


def test_random_damage(tmp_path: Path) -> None:
    """Flipped and lost bytes are refused, or are other finite numbers: nothing else ends the reading."""
    chance, path = random.Random(0), tmp_path / "a.npy"
    for _ in range(150):
        altered = bytearray(GOOD)
        for _ in range(chance.choice((1, 2, 5))):
            altered[chance.randrange(len(altered) if chance.random() < 0.3 else 90)] = chance.randrange(256)
        path.write_bytes(altered[: chance.choice((None, chance.randrange(len(altered))))])
        try:
            values = array_from_npy(path, LIMIT, *ARRAYS)
        except DecodeError:
            continue
        assert np.isfinite(values).all()
