"""Reads weights files tensor by tensor: a tensor is in memory only while it is used, and no code in a file is run."""

from __future__ import annotations

import argparse
import json
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dit_runtime.core.errors import CheckpointError
from dit_runtime.core.files import sha256_of

SAFE, PICKLES = ".safetensors", (".pt", ".pth", ".ckpt", ".bin")
# Prefixes that torch's wrappers put before every name.
PREFIXES = ("module.", "_orig_mod.")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that is not in memory yet: its shape, and a function that reads it."""

    shape: tuple[int, ...]
    read: Callable[[], Tensor]


def stored_from_tensor(tensor: Tensor) -> StoredTensor:
    """A tensor that is already in memory, or mapped into it."""
    return StoredTensor(tuple(tensor.shape), lambda: tensor)


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


def weights_from_file(file: Path, *, ema: bool = False) -> dict[str, StoredTensor]:
    """The tensors of a ``.safetensors`` file or a pickle, by name.

    ``ema`` takes the ``ema`` dict of a training checkpoint that has one, as the official ``find_model`` does.

    Raises:
        CheckpointError: the file is unreadable or truncated, or is a pickle that holds more than tensors.
    """
    found = _tensors_from_safetensors(file) if file.suffix == SAFE else _tensors_from_pickle(file, ema)
    while prefix := next((one for one in PREFIXES if found and all(name.startswith(one) for name in found)), None):
        found = {name.removeprefix(prefix): item for name, item in found.items()}
    return found


def read_training_arguments(file: Path) -> dict[str, Any]:
    """The arguments of the training run (``args``) that a training checkpoint stores; empty if it stores none."""
    loaded: Any = read_pickle(file) if file.suffix != SAFE else None
    arguments = loaded.get("args") if isinstance(loaded, dict) else None
    return vars(arguments) if isinstance(arguments, argparse.Namespace) else {}


def _tensors_from_safetensors(file: Path) -> dict[str, StoredTensor]:
    try:
        with safe_open(file, framework="pt") as opened:
            shapes = {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    except Exception as error:
        raise _error_for_unreadable(str(file), error) from error
    return {name: StoredTensor(shape, _make_reader(file, name)) for name, shape in shapes.items()}


def _make_reader(file: Path, name: str) -> Callable[[], Tensor]:
    def read() -> Tensor:
        # Opened anew for each tensor: its pages leave memory with it.
        with safe_open(file, framework="pt") as opened:
            tensor: Tensor = opened.get_tensor(name)
        return tensor

    return read


def _tensors_from_pickle(file: Path, ema: bool) -> dict[str, StoredTensor]:
    loaded: Any = read_pickle(file)
    if ema and isinstance(loaded, dict) and isinstance(loaded.get("ema"), dict):
        loaded = loaded["ema"]
    elif isinstance(loaded, dict):
        for key in ("model", "state_dict"):
            if isinstance(loaded.get(key), dict):
                loaded = loaded[key]
                break
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        keys = ", ".join(sorted(map(str, loaded))[:10]) if isinstance(loaded, dict) else type(loaded).__name__
        raise CheckpointError(
            f"{file}: holds no state dict ({keys}); expected parameters by name, or a dict of them under 'ema'"
        )
    return {str(name): stored_from_tensor(tensor) for name, tensor in loaded.items()}


def read_pickle(file: Path) -> Any:
    """The content of a ``torch.save`` file, mapped into memory.

    Tensors, plain containers and the fields of an argparse Namespace are read; code is never run.

    Raises:
        CheckpointError: the file needs code to be read, or is damaged.
    """
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")  # about old pickle protocols
            return torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:
        # torch's own message advises the user to switch the protection off.
        raise CheckpointError(
            f"{file}: not a plain weights file: reading it could execute code, or it is damaged; "
            "convert it to safetensors on a machine where you trust it"
        ) from error


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
        names = sorted({str(name) for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
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
    found = "+".join(sha256_of(file) for file in files)
    if expected is not None and found != expected.lower():
        raise CheckpointError(
            f"{files[0]}: SHA-256 {found}, expected {expected.lower()} (--sha256); it is not the file that was pinned"
        )
    return found


def _error_for_unreadable(source: str, error: Exception) -> CheckpointError:
    reason = " ".join(str(error).split())[:300]
    return CheckpointError(f"{source}: cannot be read ({reason}); download or copy it again")
