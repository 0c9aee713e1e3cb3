"""Folds factors of an INT8 step's channels into weights, so that they cost nothing where something can hold them.

A linear layer whose input has the factors f reads f · x and has the weight W / f. What makes x has them:

    modulated tokens      norm(x) · (f + f·scale) + f·shift    rows of adaLN's layer, and f in place of the step's 1
    normalized tokens     norm(x) · (f·w) + f·b                the LayerNorm's weight and bias
    an MLP's hidden       f · GELU(…)                          nothing can: a Mul before QuantizeLinear

Factors are powers of 2, so nothing is rounded. ``quantize`` writes the f in place of 1, and the Mul. With the step's 1
as it is, the conditioner's scale would have to be f·(1 + scale) − 1, and FP16 rounds that by up to 1.6 % of a channel
whose factor is 1/64.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from dit_export.graphs.from_weights import official_linear
from dit_runtime.bundle.macs import MODULATIONS
from dit_runtime.bundle.manifest import ModelSpec


class SmoothedWeights(Mapping[str, Tensor]):
    """A checkpoint's weights by official name, with factors folded in; made when they are read.

    Args:
        spec: the model.
        weights: the checkpoint's.
        factors: of the channels of each layer's input ``[in]``, by the layer's name in the graphs.
    """

    def __init__(self, spec: ModelSpec, weights: Mapping[str, Tensor], factors: Mapping[str, Tensor]) -> None:
        self.weights = weights
        self.rows = dict(_rows_of(spec, factors))
        self.columns = {f"{official_linear(spec, name)}.weight": factor for name, factor in factors.items()}

    def __getitem__(self, name: str) -> Tensor:
        tensor = self.weights[name]
        if name in self.columns:
            tensor = tensor / self.columns[name]
        if (rows := self.rows.get(name.rpartition(".")[0])) is not None:
            tensor = tensor * (rows[:, None] if tensor.ndim == 2 else rows)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)


def _rows_of(spec: ModelSpec, factors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """What the output channels of a module, or the channels of a norm, are multiplied by, and the module's name."""
    ones = torch.ones(spec.width)
    for index in range(spec.depth):
        block = f"blocks.{index}"
        attention, cross, mlp = (
            factors.get(f"{block}.{name}", ones) for name in ("attn.qkv", "cross_attn.q", "mlp.fc1")
        )
        if spec.conditioning in MODULATIONS:
            gate = [ones] * (spec.conditioning == "adaln-zero")
            yield f"{block}.adaLN_modulation.1", torch.cat([attention, attention, *gate, mlp, mlp, *gate])
        else:
            norms = (attention, cross, mlp) if spec.conditioning == "cross-attention" else (attention, mlp)
            yield from ((f"{block}.norm{number}", each) for number, each in enumerate(norms, 1))
