"""The largest numbers inside the PyTorch reference, by unit: an FP16 graph must be able to hold them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from torch import Tensor, nn

from dit_export.checkpoints.autoencoders import parts_of_decoder, parts_of_encoder
from dit_export.reference.pipeline import Reference
from dit_runtime.bundle.macs import MODULATIONS
from dit_runtime.bundle.manifest import ENCODER


@contextlib.contextmanager
def magnitudes_of(reference: Reference, encoder: bool) -> Iterator[dict[str, float]]:
    """Collect the largest |x| of each unit of the precision policy inside this block.

    It counts attention scores, and the inputs and outputs of matrix products, convolutions and the autoencoder's group
    norms, whose inputs are its residual sums. ``blocks.N`` is the residual stream after a block, which graphs keep in
    FP32.
    """
    largest: dict[str, float] = {}

    def count(unit: str, *tensors: Tensor) -> None:
        for tensor in tensors:
            largest[unit] = max(largest.get(unit, 0.0), float(tensor.abs().max()))

    hooks = []
    for unit, module in _modules_by_unit(reference, encoder):
        for part in module.modules():
            if isinstance(part, nn.Linear | nn.Conv2d | nn.GroupNorm):
                hooks.append(
                    part.register_forward_hook(lambda _, inputs, output, unit=unit: count(unit, inputs[0], output))
                )
    for index, block in enumerate(reference.blocks):
        hooks += _hook_scores(reference, block, partial(count, f"blocks.{index}.attn"))
        hooks.append(block.register_forward_hook(lambda _, __, output, unit=f"blocks.{index}": count(unit, output)))
    try:
        yield largest
    finally:
        for hook in hooks:
            hook.remove()


def _hook_scores(reference: Reference, block: Any, count: Callable[[Tensor], None]) -> list[Any]:
    """Hooks that count the scores of a block's self-attention, scaled as the graphs scale them."""
    heads = reference.spec.heads
    queries: list[Tensor] = []

    def scores(q: Tensor, k: Tensor) -> Tensor:
        found: Tensor = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # of (N, h, T, d)
        return found

    def count_scores(q: Tensor, k: Tensor) -> None:
        q, k = (x.unflatten(-1, (heads, -1)).transpose(-3, -2) for x in (q, k))  # (N, h, T, d)
        count(scores(q, k))

    if reference.checkpoint.transformer is not None:
        return [
            block.attn1.to_q.register_forward_hook(lambda _, __, output: queries.append(output)),
            block.attn1.to_k.register_forward_hook(lambda _, __, output: count_scores(queries.pop(), output)),
        ]
    attention = block.attention if reference.spec.observation else block.attn
    if hasattr(attention, "q_used"):
        return [
            attention.q_used.register_forward_hook(lambda _, __, output: queries.append(output)),
            attention.k_used.register_forward_hook(lambda _, __, output: count(scores(queries.pop(), output))),
        ]
    if reference.spec.qk_norm != "none":
        return [
            block.attn.q_norm.register_forward_hook(lambda _, __, output: queries.append(output)),
            block.attn.k_norm.register_forward_hook(lambda _, __, output: count(scores(queries.pop(), output))),
        ]
    return [block.attn.qkv.register_forward_hook(lambda _, __, output: count_scores(*output.chunk(3, dim=-1)[:2]))]


def _modules_by_unit(reference: Reference, encoder: bool) -> Iterator[tuple[str, nn.Module]]:
    """The reference's modules, each with the name of its unit in the precision policy and the graphs."""
    model, autoencoder = reference.transformer, reference.checkpoint.autoencoder
    if autoencoder is None:
        yield from _modules_of_policy(model)
        return
    diffusers = reference.checkpoint.transformer is not None
    yield "patch_embed", model.pos_embed if diffusers else model.x_embedder
    for index, block in enumerate(reference.blocks):
        yield f"blocks.{index}.attn", block.attn1 if diffusers else block.attn
        yield f"blocks.{index}.mlp", block.ff if diffusers else block.mlp
        if diffusers:
            yield "conditioner", block.norm1
        elif reference.spec.conditioning == "cross-attention":
            yield f"blocks.{index}.cross_attn", block.cross_attn
        elif reference.spec.conditioning != "in-context":
            yield "conditioner", block.adaLN_modulation
    if diffusers:
        yield "conditioner", model.proj_out_1
        yield "final", model.proj_out_2
    else:
        yield "conditioner", model.t_embedder
        if reference.spec.times == 2:
            yield "conditioner", model.r_embedder
        yield "final", model.final_layer.linear
        if reference.spec.conditioning in MODULATIONS:
            yield "conditioner", model.final_layer.adaLN_modulation
    for part in parts_of_decoder(autoencoder):
        yield "decoder", part
    for part in parts_of_encoder(autoencoder) if encoder else ():
        yield ENCODER, part


def _modules_of_policy(model: Any) -> Iterator[tuple[str, nn.Module]]:
    yield "patch_embed", model.input_proj
    for index, block in enumerate(model.transformer_blocks):
        yield f"blocks.{index}.attn", block.attention
        yield f"blocks.{index}.mlp", block.mlp
        yield "conditioner", block.adaLN_modulation
    yield "conditioner", model.time_mlp
    yield "final", model.output_proj
