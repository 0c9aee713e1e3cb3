"""Weights files read tensor by tensor: nothing is in memory before it is asked for, and no code in a file is run."""

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
# What wrappers put before every name.
PREFIXES = ("module.", "_orig_mod.")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Stored:
    """A tensor that can be read: its shape, and how."""

    shape: tuple[int, ...]
    read: Callable[[], Tensor]


def stored(tensor: Tensor) -> Stored:
    """A tensor that is in memory, or mapped into it, already."""
    return Stored(tuple(tensor.shape), lambda: tensor)


class Weights(Mapping[str, Tensor]):
    """Tensors by name, read each time they are asked for: float32 and finite.

    Raises:
        CheckpointError: on reading, NaN or infinity, or a file that ends early.
    """

    def __init__(self, source: str, stored: Mapping[str, Stored]) -> None:
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
            raise _unreadable(self.source, error) from error
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


def weights_from_file(file: Path, *, ema: bool = False) -> dict[str, Stored]:
    """The tensors of a ``.safetensors`` file or a pickle, by name.

    ``ema`` takes the ``ema`` dict of a training checkpoint that has one, as the official ``find_model`` does.

    Raises:
        CheckpointError: unreadable, truncated, or a pickle that needs more than tensors.
    """
    found = _safetensors(file) if file.suffix == SAFE else _pickle(file, ema)
    while prefix := next((one for one in PREFIXES if found and all(name.startswith(one) for name in found)), None):
        found = {name.removeprefix(prefix): item for name, item in found.items()}
    return found


def training_arguments(file: Path) -> dict[str, Any]:
    """What a training checkpoint says of its own run (``args``), as far as it does."""
    loaded: Any = loaded_pickle(file) if file.suffix != SAFE else None
    arguments = loaded.get("args") if isinstance(loaded, dict) else None
    return vars(arguments) if isinstance(arguments, argparse.Namespace) else {}


def _safetensors(file: Path) -> dict[str, Stored]:
    try:
        with safe_open(file, framework="pt") as opened:
            shapes = {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    except Exception as error:
        raise _unreadable(str(file), error) from error
    return {name: Stored(shape, _reader(file, name)) for name, shape in shapes.items()}


def _reader(file: Path, name: str) -> Callable[[], Tensor]:
    def read() -> Tensor:
        # Opened anew for each tensor: its pages leave memory with it.
        with safe_open(file, framework="pt") as opened:
            tensor: Tensor = opened.get_tensor(name)
        return tensor

    return read


def _pickle(file: Path, ema: bool) -> dict[str, Stored]:
    loaded: Any = loaded_pickle(file)
    if ema and isinstance(loaded, dict) and isinstance(loaded.get("ema"), dict):
        loaded = loaded["ema"]
    elif isinstance(loaded, dict):
        for key in ("model", "state_dict"):
            if isinstance(loaded.get(key), dict):
                loaded = loaded[key]
                break
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        keys = ", ".join(sorted(map(str, loaded))[:10]) if isinstance(loaded, dict) else type(loaded).__name__
        raise CheckpointError(f"{file}: holds no state dict ({keys}); expected parameters by name, or them as 'ema'")
    return {str(name): stored(tensor) for name, tensor in loaded.items()}


def loaded_pickle(file: Path) -> Any:
    """What a ``torch.save`` file holds, mapped into memory; of code only an argparse Namespace's fields, as data.

    Raises:
        CheckpointError: it needs more, or is damaged.
    """
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")  # of old pickle protocols
            return torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:
        # torch's own message advises to switch the protection off.
        raise CheckpointError(
            f"{file}: not a plain weights file: reading it could execute code, or it is damaged; "
            "convert it to safetensors where you trust it"
        ) from error


def files_of_module(folder: Path, variant: str | None) -> list[Path]:
    """The weights files of a diffusers module's folder: one, or the shards of its index; safetensors before ``.bin``.

    Raises:
        CheckpointError: none, none of that variant, or a shard that is missing.
    """
    stem, infix = "diffusion_pytorch_model", f".{variant}" if variant else ""
    for suffix in (SAFE, ".bin"):
        single = folder / f"{stem}{infix}{suffix}"
        index = folder / f"{stem}{suffix}.index{infix}.json"
        if single.is_file() and index.is_file():
            raise CheckpointError(
                f"{folder}: holds both {single.name} and {index.name}; remove the one that is not meant"
            )
        if single.is_file():
            return [single]
        if index.is_file():
            return _shards(index)
    present = sorted(path.name for path in folder.glob(f"{stem}*") if path.is_file())
    if present:
        wanted = f"of variant {variant!r}" if variant else "without a variant"
        raise CheckpointError(
            f"{folder}: no weights {wanted}; there is {', '.join(present[:10])}; name the variant with --variant"
        )
    raise CheckpointError(f"{folder}: no weights (*.safetensors or *.bin); expected {stem}.safetensors")


def _shards(index: Path) -> list[Path]:
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


def checked_hash(files: list[Path], expected: str | None) -> str:
    """The files' SHA-256, joined by ``+``.

    Raises:
        CheckpointError: it is not the pinned one.
    """
    found = "+".join(sha256_of(file) for file in files)
    if expected is not None and found != expected.lower():
        raise CheckpointError(
            f"{files[0]}: SHA-256 {found}, expected {expected.lower()} (--sha256); it is not the file that was pinned"
        )
    return found


def _unreadable(source: str, error: Exception) -> CheckpointError:
    reason = " ".join(str(error).split())[:300]
    return CheckpointError(f"{source}: cannot be read ({reason}); download or copy it again")
