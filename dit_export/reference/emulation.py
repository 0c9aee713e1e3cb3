"""The reference's own INT8 and FP8: its linear layers with rounded weights and inputs, written from the mathematics.

    y = s_x · s_w · (round(x · f / s_x) · round(w / f / s_w)) + b

Neither has a counterpart in PyTorch's modules, so this is what an INT8 or FP8 engine is compared with: the unpatched
model, but for the linear layers of its blocks. The integers are held as floating-point numbers, which are exact for
them. ``s_x`` is the calibrated scale of the layer's input, ``s_w`` the scale of each row of the weight, its largest
|w / f| by 127. Both are numbers of FP16, as the graphs store them. ``f`` are powers of 2 for the input's channels, or
1. In FP8 PyTorch's cast to E4M3 is in place of the rounding, and 448 in place of 127. Nothing is shared with the code
that writes those graphs.

In the graphs the factors are in what makes a layer's input. So the shifts and scales of an engine's conditioning table
are the model's own times the factors, and the reference's table has them too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dit_export.reference.pipeline import Reference

FP8_MAX, FP8_STEP = 448.0, 2.0**-9  # E4M3FN's largest and least numbers
LEAST_SCALE = 2.0**-24  # FP16's least number above 0


def linear_modules(reference: Reference) -> dict[str, list[nn.Linear]]:
    """The modules of each linear layer of the blocks, by the layer's name in the graphs, in the network's order.

    diffusers has three modules for ``attn.qkv``, which read the same input.
    """
    found: dict[str, list[nn.Linear]] = {}
    for index, block in enumerate(reference.blocks):
        if reference.checkpoint.transformer is not None:
            attention, first, second = block.attn1, block.ff.net[0].proj, block.ff.net[2]
            own = {"attn.qkv": [attention.to_q, attention.to_k, attention.to_v], "attn.proj": [attention.to_out[0]]}
        else:
            swiglu = reference.spec.mlp == "swiglu"
            first, second = (block.mlp.w12, block.mlp.w3) if swiglu else (block.mlp.fc1, block.mlp.fc2)
            own = {"attn.qkv": [block.attn.qkv], "attn.proj": [block.attn.proj]}
            if reference.spec.conditioning == "cross-attention":
                own |= {"cross_attn.q": [block.cross_attn.q], "cross_attn.proj": [block.cross_attn.proj]}
        own |= {"mlp.fc1": [first], "mlp.fc2": [second]}
        found |= {f"blocks.{index}.{name}": modules for name, modules in own.items()}
    return found


@dataclass(frozen=True)
class IntegerWeight:
    """What tells a layer's numbers: the scale of each output channel, and the sum of its numbers, by their step."""

    scales: Tensor
    sums: Tensor


def emulate_int8(
    reference: Reference, scales: Mapping[str, float], factors: Mapping[str, Tensor]
) -> dict[str, IntegerWeight]:
    """``emulate`` in INT8."""
    return emulate(reference, "int8", scales, factors)


def emulate(
    reference: Reference, precision: str, scales: Mapping[str, float], factors: Mapping[str, Tensor]
) -> dict[str, IntegerWeight]:
    """Make the reference compute these linear layers in INT8 or FP8, for good.

    Args:
        reference: the modules in FP32.
        precision: ``int8`` or ``fp8``.
        scales: of the input of each layer, by the layer's name in the graphs.
        factors: of the channels of a layer's input ``[in]``, for the layers that have some.
    """
    modules, found, end = linear_modules(reference), {}, 127 if precision == "int8" else FP8_MAX
    step = 1 if precision == "int8" else FP8_STEP
    factors = {name: factor for name, factor in factors.items() if name in scales}
    reference.table_factors = _factors_of_table(reference, factors)
    for name, scale in scales.items():
        parts = []
        factor = factors.get(name, torch.ones(()))
        for module in modules[name]:
            rows = module.weight.detach().float() / factor
            by_row = (rows.abs().amax(dim=1) / end).half().float().clamp(min=LEAST_SCALE)  # (out,)
            integers = _round(rows / by_row[:, None], precision).clamp(-end, end)
            parts.append((by_row, (integers.double() / step).sum(dim=1)))  # whole numbers: added without rounding
            module.weight = nn.Parameter(integers, requires_grad=False)
            module.forward = partial(_compute, module, precision, scale, by_row, factor)  # type: ignore[method-assign]
        found[name] = IntegerWeight(*(torch.cat(part) for part in zip(*parts, strict=True)))
    return found


def norms_with_factors(reference: Reference, factors: Mapping[str, Tensor]) -> Tensor:
    """Weight and bias of the LayerNorms by the factors of what reads them ``[depth, K, 2, D]``; K is 0 with adaLN."""
    spec = reference.spec
    readers = {"in-context": ["attn.qkv", "mlp.fc1"], "cross-attention": ["attn.qkv", "cross_attn.q", "mlp.fc1"]}
    found = []
    for index, block in enumerate(reference.blocks):
        for place, reader in enumerate(readers.get(spec.conditioning, []), 1):
            norm = getattr(block, f"norm{place}")
            both = torch.stack([norm.weight.detach().float(), norm.bias.detach().float()])  # (2, D)
            found.append(both * factors[f"blocks.{index}.{reader}"])
    return torch.stack(found).unflatten(0, (spec.depth, -1)) if found else torch.zeros(spec.depth, 0, 2, spec.width)


def _factors_of_table(reference: Reference, factors: Mapping[str, Tensor]) -> Tensor:
    """The factors of a row of the conditioning table."""
    spec = reference.spec
    ones = torch.ones(spec.width)

    def of(name: str) -> list[Tensor]:
        return [factors.get(f"blocks.{index}.{name}", ones) for index in range(spec.depth)]

    if spec.conditioning in ("in-context", "cross-attention"):
        return torch.ones(())
    vectors = []
    for attention, mlp in zip(of("attn.qkv"), of("mlp.fc1"), strict=True):
        gate = [ones] if spec.conditioning == "adaln-zero" else []
        vectors += [attention, attention, *gate, mlp, mlp, *gate]
    return torch.stack([*vectors, ones, ones])


def _round(x: Tensor, precision: str) -> Tensor:
    """The nearest numbers of the format in the dtype of ``x``; what is beyond FP8's is its largest."""
    if precision == "int8":
        return torch.round(x)
    return x.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).to(x.dtype)


def _compute(module: nn.Linear, precision: str, scale: float, by_row: Tensor, factor: Tensor, x: Tensor) -> Tensor:
    """The layer's output in the dtype of ``x``; the product is that of a GPU, whose sums are wider than FP16."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    integers = _round(x.to(wide) * factor.to(wide) / scale, precision)
    integers = integers.clamp(-128, 127) if precision == "int8" else integers
    product = F.linear(integers, module.weight.to(wide)) * (by_row.to(wide) * scale)
    return product.to(x.dtype) + module.bias
