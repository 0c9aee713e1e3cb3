"""Reads what ``torch.save`` wrote without torch's own loader: tensors stay in the file until they are used.

A tensor is described by a storage, its first number, shape and strides. All of these are what a file says, so they are
held against what the file holds before anything is computed from them. Formats: torch's ``serialization.py``.
"""

from __future__ import annotations

import io
import math
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from dit_export.checkpoints.allowlist_unpickler import (
    DTYPES,
    AllowlistUnpickler,
    CodeError,
    PickleError,
    Storage,
    StorageType,
)
from dit_export.checkpoints.file_kinds import ZIP, error_for_os
from dit_export.checkpoints.stored import StoredTensor, unreadable_tensor
from dit_runtime.core.errors import CheckpointError

# The dtype of the elements of each class of storage.
STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "UntypedStorage": None,
}
MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # of the format before zip archives
CURE = "download or copy it again"


def read_torch_file(file: Path, kind: str) -> Any:
    """What a file of kind ``ZIP`` or ``LEGACY`` holds: plain values, ``StoredTensor`` and ``Record``.

    Raises:
        CheckpointError: it is damaged, says more than it holds, or would need code to be read.
    """
    try:
        return _read_zip(file) if kind == ZIP else _read_legacy(file)
    except CodeError as error:
        raise CheckpointError(
            f"{file}: not a plain weights file: {error}; save its tensors by name (model.state_dict()) on a machine "
            "where you trust it"
        ) from error
    except PickleError as error:
        raise CheckpointError(f"{file}: not a plain weights file: {error}; {CURE}") from error
    except OSError as error:
        raise error_for_os(file, error) from error
    except (zipfile.BadZipFile, ValueError, KeyError, struct.error, EOFError, NotImplementedError) as error:
        raise CheckpointError(f"{file}: {kind} that is damaged or was cut off; {CURE}") from error


def _read_zip(file: Path) -> Any:
    with zipfile.ZipFile(file) as opened, file.open("rb") as raw:
        members = {item.filename: item for item in opened.infolist()}
        if len(members) != len(opened.infolist()):
            raise PickleError("it is damaged (a member of its archive is there twice)")
        (name,) = [name for name in members if name == "data.pkl" or name.endswith("/data.pkl")]
        root = name.removesuffix("data.pkl")
        order = members.get(f"{root}byteorder")
        if order is not None and _content(raw, order) != b"little":
            raise PickleError("it is damaged (its numbers are not little-endian)")
        places: dict[str, tuple[int, int]] = {}

        def place_of(key: str) -> tuple[int, int]:
            if key not in places:
                places[key] = _place_of_member(raw, members[f"{root}data/{key}"])
            return places[key]

        content = io.BytesIO(_content(raw, members[name]))
        return AllowlistUnpickler(content, _storage_from_id, _tensor_maker(file, place_of)).read()


def _place_of_member(raw: BinaryIO, item: zipfile.ZipInfo) -> tuple[int, int]:
    """First byte and number of bytes of a member that is stored as it is, which torch's always are."""
    if item.compress_type != zipfile.ZIP_STORED or item.flag_bits & 1:
        raise PickleError("it is damaged (its archive is compressed, which torch.save does not do)")
    raw.seek(item.header_offset)
    header = raw.read(30)
    name, extra = struct.unpack("<HH", header[26:30])
    first = item.header_offset + 30 + name + extra
    if header[:4] != b"PK\x03\x04" or first + item.file_size > raw.seek(0, io.SEEK_END):
        raise PickleError("it is damaged (a member of its archive ends outside the file)")
    return first, item.file_size


def _content(raw: BinaryIO, item: zipfile.ZipInfo) -> bytes:
    first, count = _place_of_member(raw, item)
    raw.seek(first)
    return raw.read(min(count, (1 << 24) + 1))


def _read_legacy(file: Path) -> Any:
    """The format before torch 1.6: pickles one after another, then each storage after its number of elements."""
    storages: dict[str, Storage] = {}
    places: dict[str, tuple[int, int]] = {}

    def storage_from_id(pid: Any) -> Any:
        storage = _storage_from_id(pid)
        storages[storage[0]] = storage
        return storage

    found: list[StoredTensor] = []
    with file.open("rb") as raw:

        def read(make: Any = _no_tensor) -> Any:
            return AllowlistUnpickler(raw, storage_from_id, make).read()

        if read() != MAGIC:
            raise PickleError("it is damaged (a pickle that torch.save did not write)")
        if read() != PROTOCOL or not isinstance(system := read(), dict) or system.get("little_endian") is not True:
            raise PickleError("it is damaged (an unknown version, or numbers that are not little-endian)")
        # Where a storage lies is known only behind the pickle, so tensors are checked once more when it is.
        value = read(_tensor_maker(file, lambda key: places[key], found))
        keys = read()
        if not isinstance(keys, list):
            raise PickleError("it is damaged (no list of storages)")
        end = file.stat().st_size
        for key in keys:
            storage = storages.get(str(key))
            if storage is None:
                raise PickleError("it is damaged (a storage without a tensor)")
            (count,) = struct.unpack("<q", raw.read(8))
            size = count * (1 if storage[1] is None else storage[1].itemsize)
            places[storage[0]] = raw.tell(), size
            if count < 0 or raw.tell() + size > end:
                raise PickleError("it is damaged (a storage ends outside the file)")
            raw.seek(size, io.SEEK_CUR)
    for tensor in found:
        if tensor.place is None or tensor.place[0] not in places:
            raise PickleError("it is damaged (a tensor without a storage)")
        _check_inside(tensor.place[2], places[tensor.place[0]][1])
    return value


def _no_tensor(*_: Any) -> StoredTensor:
    raise PickleError("it is damaged (a tensor where none can be)")


def _storage_from_id(pid: Any) -> Storage:
    """The storage that a persistent id names: ``("storage", class, key, device, elements)``."""
    if not isinstance(pid, tuple) or len(pid) not in (5, 6) or pid[0] != "storage":
        raise PickleError("it is damaged (an object that is no storage)")
    _, kind, key, _, count = pid[:5]
    if not isinstance(kind, StorageType) or kind not in STORAGES:
        raise PickleError(f"it holds a {str(kind)[:60]}, and expected are floating-point weights, not quantized ones")
    if type(count) is not int or not isinstance(key, str) or (len(pid) == 6 and pid[5] is not None):
        raise PickleError("it is damaged (a storage without a size)")
    return key, STORAGES[kind], count


def _tensor_maker(
    file: Path, place_of: Callable[[str], tuple[int, int]], later: list[StoredTensor] | None = None
) -> Callable[..., StoredTensor]:
    """A function that describes a tensor of ``file``; with ``later``, what it made, whose places are checked later."""

    def make(storage: Storage, offset: int, size: tuple[int, ...], stride: tuple[int, ...], kind: Any) -> StoredTensor:
        key, dtype, count = storage
        dtype = kind if isinstance(kind, torch.dtype) else dtype
        if dtype not in DTYPES.values():
            raise PickleError("it is damaged (a tensor of no dtype)")
        numbers, width = math.prod(size), dtype.itemsize
        elements = count // width if storage[1] is None else count
        if min((offset, *size, *stride)) < 0:
            raise PickleError("it is damaged (a negative shape, stride or offset)")
        end = (
            offset + sum((axis - 1) * step for axis, step in zip(size, stride, strict=True)) + 1 if numbers else offset
        )
        if numbers > elements or end > elements:
            return unreadable_tensor(f"{list(size)} numbers, of which the file holds {elements}")

        def read() -> Tensor:
            first, _ = place_of(key)
            return _read_numbers(file, first + offset * width, end - offset, dtype).as_strided(size, stride)

        tensor = StoredTensor(size, read, (key, offset * width, end * width))
        if later is None:
            _check_inside(end * width, place_of(key)[1])
        else:
            later.append(tensor)
        return tensor

    return make


def _check_inside(end: int, size: int) -> None:
    if end > size:
        raise PickleError("it is damaged (a tensor ends outside its storage)")


def _read_numbers(file: Path, first: int, count: int, dtype: torch.dtype) -> Tensor:
    """``count`` numbers of a file from byte ``first``, mapped into memory where they are aligned."""
    size = count * dtype.itemsize
    if not size:
        return torch.empty(0, dtype=dtype)
    # Private pages: whoever writes to the tensor does not write to the file.
    array = np.memmap(file, np.uint8, "c", offset=first, shape=(size,))
    flat = torch.from_numpy(array)
    return (flat if first % dtype.itemsize == 0 else flat.clone()).view(dtype)
