"""Reads diffusers' modules and their JSON files, with one clear line for whatever is wrong with them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging
from torch import nn

from dit_export.checkpoints.file_kinds import error_for_os, kind_of_file
from dit_export.checkpoints.key_errors import SUPPORTED
from dit_export.checkpoints.weights import SAFE, files_of_module, weights_from_file
from dit_runtime.core.decode import DecodeError, read_json
from dit_runtime.core.errors import CheckpointError
from dit_runtime.core.reading import CONFIG_BYTES


def read_json_object(path: Path, constants: bool = False) -> dict[str, Any]:
    """The object in a JSON file; ``constants`` lets NaN and the infinities be.

    Raises:
        CheckpointError: the file is missing, is not JSON, or holds no object.
    """
    try:
        if not path.exists():
            raise CheckpointError(f"{path}: missing; {SUPPORTED}")
        value = read_json(path, CONFIG_BYTES, constants=constants)
    except OSError as error:
        raise error_for_os(path, error) from error
    except DecodeError as error:
        raise CheckpointError(f"{path}: {error}; download or copy it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: not a JSON object; download or copy it again")
    return value


@contextlib.contextmanager
def explain_config_errors(path: Path) -> Iterator[None]:
    """Turn any exception of a diffusers constructor inside this block into a CheckpointError about ``path``.

    A wrong setting can make diffusers' constructors raise an exception of any type.
    """
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{path}: not a configuration that diffusers can build ({reason}); download it again"
        ) from error


def load_module(folder: Path, kind: type[Any], variant: str | None = None) -> Any:
    """A diffusers module from its folder, unpatched, FP32 and in evaluation mode.

    Raises:
        CheckpointError: weights are missing, damaged, left over or not finite.
    """
    files = files_of_module(folder, variant)
    for file in files:
        kind_of_file(file)  # refuses what is no file of weights, or would be waited for
        if file.suffix != SAFE:
            weights_from_file(file)  # refuses a pickle that holds more than tensors, before diffusers reads it
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # what diffusers would warn about is an error below
    try:
        module, report = kind.from_pretrained(
            folder,
            dtype=torch.float32,
            use_safetensors=files[0].suffix == SAFE,
            variant=variant,
            local_files_only=True,
            output_loading_info=True,
        )
    except Exception as error:  # safetensors, torch and diffusers each raise their own
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{folder}: cannot be read ({reason}); download or copy it again") from error
    finally:
        logging.set_verbosity(verbosity)
    for problem in ("missing_keys", "unexpected_keys"):
        if keys := sorted(report[problem]):
            shown = ", ".join(keys[:10]) + (" …" if len(keys) > 10 else "")
            raise CheckpointError(
                f"{folder}: {len(keys)} {problem.replace('_', ' ')} ({shown}); expected a {kind.__name__}"
            )
    for name, parameter in module.named_parameters():
        if not torch.isfinite(parameter).all():
            raise CheckpointError(f"{folder}: {name} holds NaN or infinity; this checkpoint is damaged")
    return freeze(module)


def freeze(module: nn.Module) -> Any:
    """The same module in evaluation mode and without gradients."""
    return module.eval().requires_grad_(False)
