"""The precision policy as data: which named unit of the network computes in which dtype.

TensorRT 11 has no FP16 switch, so precision is written into the graph (strongly typed). Units are named as the graph's
nodes are: ``conditioner``, ``patch_embed``, ``blocks.17.attn``, ``blocks.17.mlp``, ``final``, ``decoder``,
``encoder``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

# First and last layer are 0.4 % of the demo's step weights, less in larger models, and see the latents themselves.
FP16_KEEPS_FP32 = ("patch_embed", "final")


@dataclass(frozen=True)
class Precision:
    """``fp32`` or ``fp16`` with the units (name prefixes at dots) that stay FP32.

    Whatever the policy: residual stream, adaLN arithmetic, normalization statistics, timestep features, softmax and the
    sampler are FP32.
    """

    name: str
    keep_fp32: tuple[str, ...] = ()

    def dtype(self, unit: str) -> torch.dtype:
        kept = any(unit == prefix or unit.startswith(prefix + ".") for prefix in self.keep_fp32)
        return torch.float32 if self.name == "fp32" or kept else torch.float16


FP32 = Precision("fp32")
FP16 = Precision("fp16", FP16_KEEPS_FP32)
