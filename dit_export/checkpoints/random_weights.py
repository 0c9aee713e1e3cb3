"""Random weights from a seed. No part of the model is idle under them: gates and modulations are not zero."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dit_export.checkpoints.weights import StoredTensor


def randomize(module: nn.Module, seed: int) -> None:
    """Fill a module with random weights that are scaled by fan-in.

    diffusers' copies of the embedders get equal weights, as they have in converted checkpoints.
    """
    generator = torch.Generator().manual_seed(seed)
    copied: dict[str, Tensor] = {}
    for name, parameter in module.named_parameters():
        key = re.sub(r"transformer_blocks\.\d+\.norm1\.emb\.", "emb.", name)
        if key != name and key in copied:
            parameter.data.copy_(copied[key])
            continue
        with torch.no_grad():
            _fill(name, parameter, generator)
        if key != name:
            copied[key] = parameter.data


def random_tensors(shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, StoredTensor]:
    """Random tensors of these shapes; each is made when it is read, from the seed and its own name."""

    def tensor_from_name(name: str, shape: tuple[int, ...]) -> StoredTensor:
        def read() -> Tensor:
            digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
            tensor = torch.empty(shape)
            _fill(name, tensor, generator)
            return tensor

        return StoredTensor(shape, read)

    return {name: tensor_from_name(name, shape) for name, shape in shapes.items()}


def _fill(name: str, tensor: Tensor, generator: torch.Generator) -> None:
    if tensor.ndim > 1:
        tensor.normal_(0, 1 / math.sqrt(tensor[0].numel()), generator=generator)
    elif "norm" in name and name.endswith("weight"):
        tensor.fill_(1).add_(torch.randn(tensor.shape, generator=generator), alpha=0.1)
    else:
        tensor.normal_(0, 0.02, generator=generator)


class SkippedInitialization:
    """Skip torch's own weight initialization inside this block, where weights are overwritten at once."""

    def __enter__(self) -> None:
        self._saved = {kind: kind.reset_parameters for kind in (nn.Linear, nn.Conv2d, nn.Embedding)}
        for kind in self._saved:
            kind.reset_parameters = lambda self: None  # type: ignore[method-assign]

    def __exit__(self, *_: object) -> None:
        for kind, original in self._saved.items():
            kind.reset_parameters = original  # type: ignore[method-assign]
