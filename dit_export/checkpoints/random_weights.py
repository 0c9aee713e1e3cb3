"""Seeded random weights under which every part of a model acts: gates and modulations are not zero."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dit_export.checkpoints.weights import Stored


def randomize(module: nn.Module, seed: int) -> None:
    """Weights scaled by fan-in. diffusers' copies of the embedders get the same ones, as converted checkpoints have."""
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


def random_tensors(shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, Stored]:
    """Tensors of these shapes, each made when it is read, from the seed and its own name."""

    def stored(name: str, shape: tuple[int, ...]) -> Stored:
        def read() -> Tensor:
            digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
            tensor = torch.empty(shape)
            _fill(name, tensor, generator)
            return tensor

        return Stored(shape, read)

    return {name: stored(name, shape) for name, shape in shapes.items()}


def _fill(name: str, tensor: Tensor, generator: torch.Generator) -> None:
    if tensor.ndim > 1:
        tensor.normal_(0, 1 / math.sqrt(tensor[0].numel()), generator=generator)
    elif "norm" in name and name.endswith("weight"):
        tensor.fill_(1).add_(torch.randn(tensor.shape, generator=generator), alpha=0.1)
    else:
        tensor.normal_(0, 0.02, generator=generator)


class SkippedInitialization:
    """Leave torch's own weight initialization out: the weights are overwritten at once."""

    def __enter__(self) -> None:
        self._saved = {kind: kind.reset_parameters for kind in (nn.Linear, nn.Conv2d, nn.Embedding)}
        for kind in self._saved:
            kind.reset_parameters = lambda self: None  # type: ignore[method-assign]

    def __exit__(self, *_: object) -> None:
        for kind, original in self._saved.items():
            kind.reset_parameters = original  # type: ignore[method-assign]
