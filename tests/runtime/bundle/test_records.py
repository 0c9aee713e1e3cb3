"""Golden records that were altered, with matching hashes: one line each, and no memory for what is not there."""

from __future__ import annotations

import io
import random
import re
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.bundles import signed
from support.commands import run_command

from dit_runtime.bundle.reader import Bundle, open_bundle
from dit_runtime.bundle.records import RECORD_BYTES, check_record, specs_of_record
from dit_runtime.core.arrays import arrays_from_npz
from dit_runtime.core.decode import DecodeError
from dit_runtime.core.errors import BundleError

Record = dict[str, Any]


@pytest.fixture(scope="module")
def bundle(bundles: dict[str, Path]) -> Bundle:
    return open_bundle(bundles["fp32"])


@pytest.fixture(scope="module")
def recorded(bundle: Bundle) -> dict[str, Record]:
    names = ("conditioner", "blocks", "forward_1", "forward_2", "ddim", "unguided", "strong", "conditions", "images")
    return {name: bundle.records(name) for name in names}


def read(bundle: Bundle, name: str, content: bytes, limit: int = RECORD_BYTES) -> Record:
    record = arrays_from_npz(io.BytesIO(content), specs_of_record(name, bundle.manifest), limit)
    check_record(name, record, bundle.manifest)
    return record


def npz(record: Record) -> bytes:
    file = io.BytesIO()
    np.savez(file, **record)
    return file.getvalue()


def put(key: str, change: Callable[[np.ndarray], Any]) -> Callable[[Record], Record]:
    """A record with another array in place of one."""
    return lambda record: {**record, key: change(record[key])}


def spoil(value: float) -> Callable[[np.ndarray], np.ndarray]:
    """An array with one other number."""

    def change(array: np.ndarray) -> np.ndarray:
        altered = array.copy()
        altered.flat[-1] = value
        return altered

    return change


# name → the record, how its arrays are altered, and what the line says
ALTERED: dict[str, tuple[str, Callable[[Record], Record], str]] = {
    "an array less": ("ddim", lambda r: {key: r[key] for key in r if key != "seeds"}, "holds .*, expected seeds"),
    "an array more": ("ddim", lambda r: {**r, "more": np.zeros(1)}, "holds .*'more.npy'"),
    "no arrays": ("ddim", lambda r: {}, "holds nothing"),
    "arrays without names": ("ddim", lambda r: {f"arr_{i}": r[key] for i, key in enumerate(r)}, "'arr_0.npy'"),
    "a name that leads outside": ("ddim", lambda r: {**r, "../seeds": r["seeds"]}, r"'\.\./seeds.npy'"),
    "arrays of another record": ("ddim", lambda r: {"latents": r["latents"][0]}, "expected seeds, labels"),
    "seeds of text": ("ddim", put("seeds", lambda a: a.astype(str)), "seeds: numbers of"),
    "seeds of objects": ("ddim", put("seeds", lambda a: np.array([{}] * len(a), object)), "numbers of .*O"),
    "seeds of floats": ("ddim", put("seeds", np.float64), r"float64 \[4\], expected int64 \[N\]"),
    "seeds of one axis more": ("ddim", put("seeds", lambda a: a[None]), r"int64 \[1, 4\], expected int64 \[N\]"),
    "fewer seeds": ("ddim", put("seeds", lambda a: a[:2]), r"labels: int64 \[4\], expected int64 \[N\]"),
    "no seeds": ("ddim", put("seeds", lambda a: a[:0]), r"int64 \[0\], expected int64 \[N\]"),
    "fewer labels": ("ddim", put("labels", lambda a: a[:-1]), r"labels: int64 \[3\]"),
    "a label too high": ("ddim", put("labels", spoil(11)), "labels: numbers from 2 to 11, expected 0 to 10"),
    "a label below zero": ("ddim", put("labels", spoil(-1)), "labels: numbers from -1"),
    "labels of another order": ("ddim", put("labels", lambda a: a.astype(">i8")), "numbers of \"'>i8'\""),
    "guidance of several": (
        "ddim",
        put("guidance", lambda a: np.array([1.5, 2])),
        r"float64 \[2\], expected float64 \[\]",
    ),
    "guidance NaN": ("ddim", put("guidance", lambda a: np.float64("nan")), "guidance: numbers that are not finite"),
    "guidance inf": ("ddim", put("guidance", lambda a: np.float64("inf")), "not finite"),
    "guidance below zero": ("ddim", put("guidance", lambda a: np.float64(-1)), "guidance: numbers from -1"),
    "guidance of 1e300": ("ddim", put("guidance", lambda a: np.float64(1e300)), "expected 0 to 1e"),
    "guidance true": ("ddim", put("guidance", lambda a: np.bool_(True)), "numbers of"),
    "no steps": ("ddim", put("steps", lambda a: np.int64(0)), "steps: numbers from 0"),
    "steps below zero": ("ddim", put("steps", lambda a: np.int64(-5)), "steps: numbers from -5"),
    "10^18 steps": ("ddim", put("steps", lambda a: np.int64(10**18)), "steps: numbers from 1e.18"),
    "steps of a fraction": ("ddim", put("steps", np.float64), "steps: float64"),
    "latents NaN": ("ddim", put("latents", spoil(np.nan)), "latents: numbers that are not finite"),
    "latents inf": ("ddim", put("latents", spoil(np.inf)), "latents: numbers that are not finite"),
    "latents of float64": ("ddim", put("latents", np.float64), r"float64 \[51, 4, 4, 8, 8\], expected float32 \[S . 1"),
    "latents of float16": ("ddim", put("latents", np.float16), "float16"),
    "latents of fewer images": ("ddim", put("latents", lambda a: a[:, :2]), "latents: float32"),
    "latents of fewer channels": ("ddim", put("latents", lambda a: a[:, :, :3]), "latents: float32"),
    "latents of another size": ("ddim", put("latents", lambda a: a[..., :4]), "latents: float32"),
    "latents of fewer steps": ("ddim", put("latents", lambda a: a[:-1]), "latents of 50 steps, expected one more"),
    "latents flat": ("ddim", put("latents", np.ravel), "latents: float32"),
    "latents of no step": ("ddim", put("latents", lambda a: a[:0]), "latents: float32"),
    "fewer denoised": ("ddim", put("denoised", lambda a: a[:-1]), "noise: float32"),
    "noise that is one number": ("ddim", put("noise", lambda a: np.float32(0)), r"noise: float32 \[\]"),
    "noise of five images": ("ddim", put("noise", lambda a: np.repeat(a, 2, 1)), "noise: float32"),
    "unguided with guidance": ("unguided", put("guidance", lambda a: np.float64(2)), "expected 1 to 1"),
    "unguided of more seeds": ("unguided", lambda r: {**r, "seeds": np.arange(3)}, "int64"),
    "strong without images": ("strong", lambda r: {key: r[key] for key in r if key != "images"}, "images"),
    "fewer projections": ("conditions", put("projections", lambda a: a[:, :4]), "projections: float32"),
    "a class beyond the null": ("conditions", put("labels", lambda a: a + 1), "labels: numbers from 1 to"),
    "timesteps too late": ("forward_1", put("timesteps", spoil(1000)), "timesteps: numbers from .* expected 0 to 999"),
    "timesteps below zero": ("forward_1", put("timesteps", spoil(-1)), "timesteps: numbers from -1"),
    "timesteps of floats": ("forward_1", put("timesteps", np.float32), "timesteps: float32"),
    "one branch with guidance": ("forward_1", put("guidance", lambda a: np.float64(4)), "expected 1 to 1"),
    "two branches without": ("forward_2", put("guidance", lambda a: np.float64(1)), "expected two branches"),
    "no variance": ("forward_1", put("v", lambda a: a[:, :0]), r"v: float32 \[4, 0, 8, 8\]"),
    "variance inf": ("forward_1", put("v", spoil(-np.inf)), "v: numbers that are not finite"),
    "a table of fewer rows": ("conditioner", put("table", lambda a: a[:-1]), "table: float32"),
    "a table of fewer vectors": ("conditioner", put("table", lambda a: a[:, 1:]), "table: float32"),
    "an odd number of pairs": (
        "conditioner",
        lambda r: {key: a[1:] for key, a in r.items()},
        "expected an even number",
    ),
    "a stride of zero": ("blocks", put("token_stride", lambda a: np.int64(0)), "token_stride: numbers from 0"),
    "a stride that wraps": ("blocks", put("token_stride", lambda a: np.int64(-1)), "token_stride: numbers from -1"),
    "another stride": ("blocks", put("token_stride", lambda a: np.int64(2)), "tokens: 16 tokens, expected 8 of 16"),
    "fewer tokens": ("blocks", put("tokens", lambda a: a[:, 1:]), "tokens: 15 tokens"),
    "fewer blocks": ("blocks", put("outputs", lambda a: a[:1]), r"outputs: float32 \[1, 2"),
    "fewer tokens of outputs": ("blocks", put("outputs", lambda a: a[:, :, 1:]), "outputs: 15 tokens"),
    "images of floats": ("images", put("images", np.float32), "images: float32"),
    "images of one channel": ("images", put("images", lambda a: a[..., :1]), "images: uint8"),
    "images of int64": ("images", put("images", np.int64), "images: int64"),
    "decoded of another size": ("images", put("decoded", lambda a: a[..., ::2]), "decoded: float32"),
    "decoded of fewer images": ("images", put("decoded", lambda a: a[1:]), "decoded: float32"),
}


@pytest.mark.parametrize("case", ALTERED)
def test_arrays_that_are_not_the_record(bundle: Bundle, recorded: dict[str, Record], case: str) -> None:
    """Other arrays, dtypes, shapes and numbers than the manifest says are refused, and named."""
    name, change, message = ALTERED[case]
    read(bundle, name, npz(recorded[name]))
    with pytest.raises(DecodeError, match=message) as raised:
        read(bundle, name, npz(change(recorded[name])))
    assert str(raised.value).isprintable()
    assert len(str(raised.value)) < 500


def zipped(record: Record, change: Callable[[str, bytes], bytes] = lambda name, data: data, **options: Any) -> bytes:
    """The archive of a record, with each member's bytes changed."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", **options) as archive:
        for name, array in record.items():
            member = io.BytesIO()
            np.save(member, array, allow_pickle=True)
            archive.writestr(f"{name}.npy", change(name, member.getvalue()))
    return file.getvalue()


def replace_bytes(old: bytes, new: bytes) -> Callable[[bytes], bytes]:
    return lambda content: content.replace(old, new)


def in_directory(offset: int, value: bytes) -> Callable[[bytes], bytes]:
    """Changes the first entry of the archive's directory."""

    def change(content: bytes) -> bytes:
        place = content.index(b"PK\1\2") + offset
        return content[:place] + value + content[place + len(value) :]

    return change


def bomb(name: str, data: bytes) -> bytes:
    """Latents of 4 TB, by their header."""
    return data.replace(b"(51, 4, 4, 8, 8)", b"(9999999999, 4, 4, 8, 8)") if name == "latents" else data


DAMAGED: dict[str, Callable[[bytes], bytes]] = {
    "nothing": lambda c: b"",
    "text": lambda c: b"golden",
    "an array alone": lambda c: c[c.index(b"\x93NUMPY") :][:500],
    "cut in half": lambda c: c[: len(c) // 2],
    "the last byte lost": lambda c: c[:-1],
    "the first bytes lost": lambda c: c[50:],
    "a comment after it": lambda c: c[:-2] + b"\x05\x00hello",
    "bytes after it": lambda c: c + b"more",
    "a directory of 4 GB": lambda c: c[:-10] + b"\xff\xff\xff\xff" + c[-6:],
    "zip64 that lies": lambda c: c[:-22] + b"PK\6\7" + b"\xff" * 16 + c[-22:],
    "a flipped bit of the numbers": lambda c: c[:3000] + bytes([c[3000] ^ 1]) + c[3001:],
    "encrypted": in_directory(8, b"\1\0"),
    "compressed by bzip2": in_directory(10, b"\x0c\0"),
    "compressed in no known way": in_directory(10, b"\x63\0"),
    "another sum": in_directory(16, b"abcd"),
    "a member of 4 GB": in_directory(24, b"\xff\xff\xff\xff"),
    "a member of no bytes": in_directory(24, b"\0\0\0\0"),
    "a member elsewhere": in_directory(42, struct.pack("<I", 4_000_000_000)),
    "a name twice": replace_bytes(b"labels.npy", b"seeds.npy\0"),
    "another name in the directory": lambda c: c[:100] + c[100:].replace(b"seeds.npy", b"other.npy"),
    "a name of no text": replace_bytes(b"seeds.npy", b"\xff\xfe\x00\x01ds.npy"),
    "pickles inside": replace_bytes(b"\x93NUMPY", b"\x80\x04c\nos\n"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_archives(bundle: Bundle, recorded: dict[str, Record], case: str) -> None:
    """Archives that are cut, patched and lie about themselves are refused in one line."""
    with pytest.raises(DecodeError) as raised:
        read(bundle, "ddim", DAMAGED[case](npz(recorded["ddim"])))
    assert str(raised.value).isprintable()
    assert len(str(raised.value)) < 500


def test_archives_that_are_too_large(bundle: Bundle, recorded: dict[str, Record]) -> None:
    """4 TB by a header, and a small file that grows, are refused before memory is asked for; deflate itself is read."""
    record = recorded["ddim"]
    packed = zipped(record, compression=zipfile.ZIP_DEFLATED)
    assert all(np.array_equal(array, record[key]) for key, array in read(bundle, "ddim", packed).items())
    with pytest.raises(DecodeError, match="bytes for float32"):
        read(bundle, "ddim", zipped(record, bomb))
    with pytest.raises(DecodeError, match=r"holds \d+ bytes, expected at most 100000"):
        read(bundle, "ddim", packed, limit=100_000)
    for method in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        with pytest.raises(DecodeError, match="compressed in another way"):
            read(bundle, "ddim", zipped(record, compression=method))


def test_random_damage(bundle: Bundle, recorded: dict[str, Record]) -> None:
    """Flipped and lost bytes of a record, compressed or not, end in a DecodeError or in a whole record."""
    chance, record = random.Random(0), recorded["forward_1"]
    for content in (npz(record), zipped(record, compression=zipfile.ZIP_DEFLATED)):
        for _ in range(120):
            altered = bytearray(content)
            for _ in range(chance.choice((1, 1, 3))):
                start = chance.choice((0, max(0, len(altered) - 700)))
                altered[chance.randrange(start, len(altered))] = chance.randrange(256)
            try:
                read(bundle, "forward_1", bytes(altered[: chance.choice((None, None, chance.randrange(len(altered))))]))
            except DecodeError:
                continue


@pytest.mark.parametrize("name", ["", "tile_", "tile_0", "tile_x", "tile_9999999", "ddim/../ddim", "encoder", "euler2"])
def test_no_such_record(bundle: Bundle, name: str) -> None:
    """Only the records of the specification are read, whatever the manifest names."""
    with pytest.raises(DecodeError, match="no golden record has this name"):
        specs_of_record(name, bundle.manifest)


def test_the_commands_say_it(bundles: dict[str, Path], tmp_path: Path) -> None:
    """Fails if an altered record with matching hashes, or steps of no trajectory, is more or less than one line."""
    path = Path(shutil.copytree(bundles["fp32"], tmp_path / "b", ignore=shutil.ignore_patterns("engines")))
    file = path / "golden" / "ddim.npz"
    record = open_bundle(path).records("ddim")
    for altered, message in (
        ({**record, "latents": np.float32(1)}, r"ddim.npz: not a golden record \(latents: float32 \[\], expected"),
        ({**record, "steps": np.int64(7)}, "the golden record ddim has 50 evaluations of 7 steps, expected 7;"),
    ):
        file.write_bytes(npz(altered))
        signed(path)
        done = run_command("dit-verify", path, "--engine", "onnxruntime", "--quick")
        assert (done.returncode, done.stdout) == (1, "")
        assert re.fullmatch(rf"dit-verify: .*{message}.*\n", done.stderr), done.stderr
    file.write_bytes(b"")
    emptied = signed(path)
    with pytest.raises(BundleError, match="not a golden record"):
        emptied.records("ddim")
