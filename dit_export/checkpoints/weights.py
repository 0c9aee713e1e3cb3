"""Reads weights files tensor by tensor: a tensor is in memory only while it is used, and no code in a file is run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dit_export.checkpoints.file_kinds import (
    PICKLES,
    SAFE,
    SAFETENSORS,
    check_name,
    check_regular,
    error_for_os,
    kind_of_file,
)
from dit_export.checkpoints.key_errors import short_name
from dit_export.checkpoints.stored import StoredTensor, stored_from_tensor
from dit_export.checkpoints.torch_files import read_torch_file
from dit_export.checkpoints.training_arguments import arguments_from_content
from dit_export.checkpoints.weight_sets import WHOLE, choose_weights, strip_wrappers
from dit_runtime.core.decode import DecodeError, json_from_bytes, read_json
from dit_runtime.core.errors import CheckpointError
from dit_runtime.core.files import sha256_of

__all__ = ["PICKLES", "SAFE", "StoredTensor", "Weights", "stored_from_tensor"]

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
AUTOENCODER = "vae"  # where REPA-E's training checkpoints hold theirs
LARGEST_HEADER = 1 << 24  # bytes, of a safetensors file; DiT-XL/2 has about 3e4
LARGEST_INDEX = 1 << 24  # bytes, of an index of shards


class Weights(Mapping[str, Tensor]):
    """Tensors by name, each read from its file whenever it is looked up: float32 and finite.

    Raises:
        CheckpointError: on a look-up, if the tensor holds NaN or infinity, or the file ends early.
    """

    def __init__(self, source: str, stored: Mapping[str, StoredTensor]) -> None:
        self.source = source
        self.stored = stored

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: item.shape for name, item in self.stored.items()}

    def __getitem__(self, name: str) -> Tensor:
        item = self.stored[name]
        check_plain(self.source, {name: item})
        try:
            tensor = item.read()
        except (OSError, RuntimeError, ValueError, SafetensorError) as error:
            raise _error_for_unreadable(self.source, error) from error
        if tensor.dtype not in DTYPES:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise CheckpointError(
                f"{self.source}: {name} is {kind}; expected floating-point weights, not quantized ones"
            )
        tensor = tensor.float()  # float32 as stored is not copied: pages of the file are used as they are
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"{self.source}: {name} holds NaN or infinity; this checkpoint is damaged")
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)


@dataclass(frozen=True)
class WeightsFile:
    """The weights of a file, and what it says about itself.

    Attributes:
        tensors: by name, without what wrappers put before and into the names.
        path: which set of weights they are, if the file holds several; else None.
        others: the paths of the other sets.
        arguments: the arguments of the training run, or the metadata of a safetensors file; may be empty.
        has_autoencoder: whether the file holds an autoencoder too, under ``AUTOENCODER``.
    """

    tensors: Mapping[str, StoredTensor]
    path: str | None
    others: tuple[str, ...] = ()
    arguments: dict[str, Any] = field(default_factory=dict)
    has_autoencoder: bool = False


def read_weights_file(file: Path, wanted: str | None = None) -> WeightsFile:
    """The weights in a file, described and not yet read.

    Args:
        file: a ``.safetensors`` file, or one that ``torch.save`` wrote.
        wanted: the path of the set of weights to take; None takes the averaged one, or the only one.

    Raises:
        CheckpointError: the file is unreadable or something else, holds no such weights, or would need code to be read.
    """
    content, metadata = _read(file)
    chosen, others = choose_weights(str(file), content, wanted)
    check_plain(str(file), chosen.tensors)
    check_distinct(str(file), chosen.tensors)
    path = chosen.path if others or (wanted is not None and wanted != WHOLE) else None
    has_autoencoder = isinstance(content, dict) and isinstance(content.get(AUTOENCODER), dict)
    return WeightsFile(chosen.tensors, path, others, arguments_from_content(metadata or content), has_autoencoder)


def weights_from_file(file: Path, part: str | None = None) -> dict[str, StoredTensor]:
    """The tensors of a ``.safetensors`` file or of a pickled state dict, by name, without what wrappers put in.

    The dict may be inside another, under ``model`` or ``state_dict``, or under the key ``part``.

    Raises:
        CheckpointError: the file is unreadable or something else, or holds more than tensors by name.
    """
    content, _ = _read(file)
    for key in ("model", "state_dict") if part is None else (part,):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    if not isinstance(content, dict) or not all(isinstance(item, StoredTensor) for item in content.values()):
        names = sorted(map(str, content))[:10] if isinstance(content, dict) else [type(content).__name__]
        keys = ", ".join(map(short_name, names))
        raise CheckpointError(f"{file}: holds no state dict ({keys}); expected parameters by name and nothing else")
    check_plain(str(file), content)
    return strip_wrappers(str(file), {str(name): item for name, item in content.items()})


def check_plain(source: str, tensors: Mapping[str, StoredTensor]) -> None:
    """Check that each tensor is a plain one, whose shape says what the file holds.

    Raises:
        CheckpointError: one is not.
    """
    for name, item in tensors.items():
        if item.problem is not None:
            raise CheckpointError(
                f"{source}: {short_name(name)} is {item.problem}; expected plain floating-point weights"
            )


def check_distinct(source: str, tensors: Mapping[str, StoredTensor]) -> None:
    """Check that no number of the file is part of two tensors: a small file would become a huge model.

    Raises:
        CheckpointError: two tensors share numbers.
    """
    places = sorted((item.place, name) for name, item in tensors.items() if item.place is not None and item.count)
    for ((storage, _, end), name), ((other, first, _), second) in pairwise(places):
        if storage == other and first < end:
            raise CheckpointError(
                f"{source}: {short_name(name)} and {short_name(second)} are the same numbers of the file; save each "
                "tensor with numbers of its own (clone it)"
            )


def _read(file: Path) -> tuple[Any, dict[str, Any]]:
    """What a file holds, and its metadata."""
    kind = kind_of_file(file)
    check_name(file, kind)
    if kind == SAFETENSORS:
        return _read_safetensors(file)
    if file.suffix == SAFE:
        raise CheckpointError(f"{file}: cannot be read (no safetensors header); download or copy it again")
    return read_torch_file(file, kind), {}


def _read_safetensors(file: Path) -> tuple[dict[str, StoredTensor], dict[str, Any]]:
    try:
        with file.open("rb") as raw:
            length = int.from_bytes(raw.read(8), "little")
            if length > LARGEST_HEADER:
                raise ValueError(f"a header of {length} bytes, expected at most {LARGEST_HEADER}")
            header = json_from_bytes(raw.read(length))  # refuses a name that is there twice, which the library does not
        with safe_open(file, framework="pt") as opened:
            shapes = {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    except OSError as error:
        raise error_for_os(file, error) from error
    except Exception as error:
        raise _error_for_unreadable(str(file), error) from error
    return {name: StoredTensor(shape, _make_reader(file, name)) for name, shape in shapes.items()}, dict(
        header.get("__metadata__") or {}
    )


def _make_reader(file: Path, name: str) -> Callable[[], Tensor]:
    def read() -> Tensor:
        # Opened anew for each tensor: its pages leave memory with it.
        with safe_open(file, framework="pt") as opened:
            tensor: Tensor = opened.get_tensor(name)
        return tensor

    return read


def files_of_module(folder: Path, variant: str | None) -> list[Path]:
    """The weights files of a diffusers module's folder: one file, or the shards that an index names.

    Safetensors files come before ``.bin`` files.

    Raises:
        CheckpointError: there are no weights, none of that variant, or a shard is missing.
    """
    stem, infix = "diffusion_pytorch_model", f".{variant}" if variant else ""
    for suffix in (SAFE, ".bin"):
        single = folder / f"{stem}{infix}{suffix}"
        index = folder / f"{stem}{suffix}.index{infix}.json"
        for file in (single, index):
            if file.exists() and not file.is_file():
                raise CheckpointError(f"{file}: is no regular file; expected weights")
        if single.is_file() and index.is_file():
            raise CheckpointError(
                f"{folder}: holds both {single.name} and {index.name}; remove the one that you do not mean"
            )
        if single.is_file():
            return [single]
        if index.is_file():
            return _files_of_shards(index)
    present = sorted(path.name for path in folder.glob(f"{stem}*") if path.is_file())
    if present:
        wanted = f"of variant {variant!r}" if variant else "without a variant"
        raise CheckpointError(
            f"{folder}: no weights {wanted}; there is {', '.join(present[:10])}; name the variant with --variant"
        )
    raise CheckpointError(f"{folder}: no weights (*.safetensors or *.bin); expected {stem}.safetensors")


def _files_of_shards(index: Path) -> list[Path]:
    try:
        names = sorted({str(name) for name in read_json(index, LARGEST_INDEX)["weight_map"].values()})
    except (DecodeError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index}: not an index of shards ({error}); download or copy it again") from error
    if not names:
        raise CheckpointError(f"{index}: names no shards; download or copy it again")
    files = [index.parent / name for name in names]
    for file, name in zip(files, names, strict=True):
        if Path(name).name != name or not file.is_file():
            raise CheckpointError(f"{index}: names the shard {name!r}, which is not beside it; download it again")
    return files


def check_sha256(files: list[Path], expected: str | None) -> str:
    """The files' SHA-256, joined by ``+``, after a comparison with the pinned one (``--sha256``), if there is one.

    Raises:
        CheckpointError: the hash is another than ``expected``.
    """
    for file in files:
        check_regular(file)
    found = "+".join(sha256_of(file) for file in files)
    if expected is not None and found != expected.lower():
        raise CheckpointError(
            f"{files[0]}: SHA-256 {found}, expected {expected.lower()} (--sha256); it is not the file that was pinned"
        )
    return found


def _error_for_unreadable(source: str, error: Exception) -> CheckpointError:
    reason = " ".join(str(error).split())[:300]
    return CheckpointError(f"{source}: cannot be read ({reason}); download or copy it again")
