"""The DiT as it is exported: one function split along what depends on the latents and what does not.

``Conditioner`` holds everything that depends on (timestep, label) alone; ``Step`` is one sampling step: gather,
guidance branches, network and sampler update. Both follow Peebles & Xie 2022 (arXiv 2212.09748) with adaLN-Zero blocks;
where implementations disagree the numbers come from the checkpoint's own reference (``Numerics``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dit_export.precision import Precision
from dit_runtime.bundle import ModelSpec

FREQUENCIES = 256  # size of the sinusoidal timestep features, in the paper and in every implementation
MODULATIONS = 6  # vectors per block: shift, scale and gate before attention and before the MLP


@dataclass(frozen=True)
class Numerics:
    """Where DiT implementations differ. The defaults are diffusers' (``DiTTransformer2DModel`` 0.42)."""

    frequency_shift: float = 1.0  # exponent i/(128 − shift): 1 in diffusers, 0 in the official code
    attention_eps: float = 1e-6  # LayerNorm before attention
    mlp_eps: float = 1e-5  # LayerNorm before the MLP
    final_eps: float = 1e-6  # LayerNorm before the output projection


class Embedder(nn.Module):
    """Timestep MLP and label table → conditioning vectors ``[R, D]``."""

    def __init__(self, width: int, rows: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(FREQUENCIES, width)
        self.fc2 = nn.Linear(width, width)
        self.labels = nn.Embedding(rows, width)

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        embedding: Tensor = self.fc2(F.silu(self.fc1(features))) + self.labels(labels)
        return embedding


class Conditioner(nn.Module):
    """``timesteps [R]`` f32, ``labels [R]`` i32 → ``modulation [R, 6·depth + 2, D]`` f32.

    Rows 6i … 6i+5 are block i's shift, scale and gate before attention and the same before the MLP; the last two are
    the final layer's shift and scale.
    """

    def __init__(self, spec: ModelSpec, numerics: Numerics, precision: Precision, embedders: int) -> None:
        super().__init__()
        self.dtype = precision.dtype("conditioner")
        self.embedders = nn.ModuleList(Embedder(spec.width, spec.classes + 1) for _ in range(embedders))
        self.blocks = nn.ModuleList(nn.Linear(spec.width, MODULATIONS * spec.width) for _ in range(spec.depth))
        self.final = nn.Linear(spec.width, 2 * spec.width)
        half = FREQUENCIES // 2
        # As diffusers' get_timestep_embedding computes it, in float32; on the CPU even under a meta device.
        exponent = -math.log(10000) * torch.arange(half, dtype=torch.float32, device="cpu")
        self.frequencies = nn.Buffer(torch.exp(exponent / (half - numerics.frequency_shift)), persistent=False)

    def forward(self, timesteps: Tensor, labels: Tensor) -> Tensor:
        angles = timesteps[:, None] * self.frequencies  # FP16 here would be off by up to half a radian
        features = torch.cat([torch.cos(angles), torch.sin(angles)], dim=1).to(self.dtype)  # (R, 256)
        conditions = [F.silu(embedder(features, labels)) for embedder in self.embedders]
        vectors = [block(conditions[index if len(conditions) > 1 else 0]) for index, block in enumerate(self.blocks)]
        table = torch.cat([*vectors, self.final(conditions[0])], dim=1).float()  # (R, (6·depth + 2)·D)
        return table.reshape(-1, MODULATIONS * len(self.blocks) + 2, self.final.in_features)


class Attention(nn.Module):
    """Multi-head self-attention; products in the weights' dtype, softmax in FP32."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        _, tokens, width = x.shape
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)  # (N, h, T, d)
        scores = (q * (width // self.heads) ** -0.5) @ k.transpose(2, 3)  # (N, h, T, T)
        mixed = torch.softmax(scores.float(), dim=-1).to(v.dtype) @ v
        result: Tensor = self.proj(mixed.transpose(1, 2).reshape(-1, tokens, width))
        return result


class Mlp(nn.Module):
    """Pointwise MLP with tanh-approximated GELU."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.fc2(F.gelu(self.fc1(x), approximate="tanh"))
        return result


class Block(nn.Module):
    """An adaLN-Zero block with its modulation given. The residual stream and the adaLN arithmetic are FP32."""

    def __init__(self, spec: ModelSpec, numerics: Numerics) -> None:
        super().__init__()
        self.numerics = numerics
        self.attn = Attention(spec.width, spec.heads)
        self.mlp = Mlp(spec.width, spec.mlp_width)

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = modulation.unsqueeze(2).unbind(1)  # each (N, 1, D)
        h = modulated(x, shift_1, scale_1, self.numerics.attention_eps)
        x = x + gate_1 * self.attn(h.to(self.attn.qkv.weight.dtype)).float()
        h = modulated(x, shift_2, scale_2, self.numerics.mlp_eps)
        result: Tensor = x + gate_2 * self.mlp(h.to(self.mlp.fc1.weight.dtype)).float()
        return result


def modulated(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """LayerNorm without parameters, then the conditioning's scale and shift (adaLN)."""
    return F.layer_norm(x, (x.shape[-1],), eps=eps) * (1 + scale) + shift


class Step(nn.Module):
    """One sampling step for B pictures and G guidance branches (shapes as in the bundle format).

    ``state [B, 3, C, H, W]``, ``noise [B, C, H, W]``, ``coefficients [B, 17]``, ``guidance [G, B, C]``,
    ``rows [G, B]`` i32, ``modulation [R, 6·depth + 2, D]`` → ``next_state``, ``denoised [B, C, H, W]`` and, for the
    probe, each block's output ``[G·B, T, D]``. All FP32 at the border.
    """

    def __init__(self, spec: ModelSpec, numerics: Numerics) -> None:
        super().__init__()
        self.spec = spec
        patch = spec.patch_size
        self.final_eps = numerics.final_eps
        self.patch_embed = nn.Conv2d(spec.latent_channels, spec.width, kernel_size=patch, stride=patch)
        self.position = nn.Parameter(torch.empty(1, spec.tokens, spec.width))
        self.blocks = nn.ModuleList(Block(spec, numerics) for _ in range(spec.depth))
        self.final = nn.Linear(spec.width, patch * patch * spec.output_channels)

    def forward(
        self, state: Tensor, noise: Tensor, coefficients: Tensor, guidance: Tensor, rows: Tensor, modulation: Tensor
    ) -> tuple[Tensor, ...]:
        spec = self.spec
        z = state[:, 0]
        weight = self.patch_embed.weight.dtype
        x = self.patch_embed(z.to(weight)).float().flatten(2).transpose(1, 2) + self.position  # (B, T, D)
        # The branches see the same latents: embed once, repeat for each branch.
        x = x.expand(rows.shape[0], -1, -1, -1).flatten(0, 1)  # (G·B, T, D)
        table = modulation.index_select(0, rows.flatten())  # (G·B, 6·depth + 2, D)
        outputs = []
        for index, block in enumerate(self.blocks):
            x = block(x, table[:, MODULATIONS * index : MODULATIONS * (index + 1)])
            outputs.append(x)
        shift, scale = table[:, -2, None], table[:, -1, None]
        x = self.final(modulated(x, shift, scale, self.final_eps).to(self.final.weight.dtype)).float()
        x = unpatchified(x, spec).unflatten(0, (rows.shape[0], -1))  # (G, B, C or 2C, H, W)
        e = (guidance[..., None, None] * x[:, :, : spec.latent_channels]).sum(0)  # (B, C, H, W)
        v = x[0, :, spec.latent_channels :] if spec.learned_variance else None  # the conditional branch's
        next_state, denoised = sampler_update(state, noise, coefficients, e, v)
        return next_state, denoised, *outputs


def unpatchified(x: Tensor, spec: ModelSpec) -> Tensor:
    """Tokens ``[N, T, p·p·C]`` → ``[N, C, H, W]``."""
    patch, (height, width) = spec.patch_size, spec.grid
    x = x.unflatten(2, (patch, patch, spec.output_channels)).unflatten(1, (height, width))  # (N, h, w, p, q, C)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(-1, spec.output_channels, height * patch, width * patch)


def sampler_update(
    state: Tensor, noise: Tensor, coefficients: Tensor, e: Tensor, v: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One row of the sampler table per picture, as multiply-adds: a matrix product could run in TF32.

    denoised = a·s₀ + b·e;  s'ᵢ = Σⱼ Aᵢⱼ·sⱼ + Bᵢ·e;  s'₀ += exp(g + h·v)·k·noise.
    """
    c = coefficients[:, :, None, None, None]  # (B, 17, 1, 1, 1)
    denoised = c[:, 0] * state[:, 0] + c[:, 1] * e
    mixed = (c[:, 2:11].unflatten(1, (3, 3)) * state[:, None]).sum(2)  # (B, 3, C, H, W)
    following = mixed + c[:, 11:14] * e[:, None]
    g, h, k = c[:, 14], c[:, 15], c[:, 16]
    exponent = g if v is None else g + h * v
    kicked = following[:, :1] + (torch.exp(exponent) * k * noise)[:, None]
    return torch.cat([kicked, following[:, 1:]], dim=1), denoised


def conditioner_from_diffusers(
    spec: ModelSpec, numerics: Numerics, precision: Precision, state: Mapping[str, Tensor]
) -> Conditioner:
    """The conditioner with a ``DiTTransformer2DModel``'s weights (shared storage where the dtype allows it)."""
    names = ("emb.timestep_embedder.linear_1", "emb.timestep_embedder.linear_2")
    prefixes = [f"transformer_blocks.{index}.norm1." for index in range(spec.depth)]
    keys = [f"{name}.{kind}" for name in names for kind in ("weight", "bias")]
    keys.append("emb.class_embedder.embedding_table.weight")
    same = all(torch.equal(state[prefix + key], state[prefixes[0] + key]) for prefix in prefixes for key in keys)
    with torch.device("meta"):
        module = Conditioner(spec, numerics, precision, embedders=1 if same else spec.depth)
    weights = {}
    targets = ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias", "labels.weight")
    for index in range(len(module.embedders)):
        for target, key in zip(targets, keys, strict=True):
            weights[f"embedders.{index}.{target}"] = state[prefixes[index] + key]
    for kind in ("weight", "bias"):
        for index, prefix in enumerate(prefixes):
            weights[f"blocks.{index}.{kind}"] = state[f"{prefix}linear.{kind}"]
        weights[f"final.{kind}"] = state[f"proj_out_1.{kind}"]
    dtype = precision.dtype("conditioner")
    module.load_state_dict({name: tensor.to(dtype) for name, tensor in weights.items()}, assign=True)
    return module.eval().requires_grad_(False)


def step_from_diffusers(spec: ModelSpec, numerics: Numerics, precision: Precision, state: Mapping[str, Tensor]) -> Step:
    """The step network with a ``DiTTransformer2DModel``'s weights, each unit in the dtype its policy gives it."""
    with torch.device("meta"):
        module = Step(spec, numerics)
    weights = {"position": state["pos_embed.pos_embed"].float()}
    for kind in ("weight", "bias"):
        weights[f"patch_embed.{kind}"] = state[f"pos_embed.proj.{kind}"].to(precision.dtype("patch_embed"))
        weights[f"final.{kind}"] = state[f"proj_out_2.{kind}"].to(precision.dtype("final"))
        for index in range(spec.depth):
            source, target = f"transformer_blocks.{index}", f"blocks.{index}"
            attention, mlp = precision.dtype(f"{target}.attn"), precision.dtype(f"{target}.mlp")
            qkv = [state[f"{source}.attn1.to_{name}.{kind}"].to(attention) for name in "qkv"]
            weights[f"{target}.attn.qkv.{kind}"] = torch.cat(qkv)
            weights[f"{target}.attn.proj.{kind}"] = state[f"{source}.attn1.to_out.0.{kind}"].to(attention)
            weights[f"{target}.mlp.fc1.{kind}"] = state[f"{source}.ff.net.0.proj.{kind}"].to(mlp)
            weights[f"{target}.mlp.fc2.{kind}"] = state[f"{source}.ff.net.2.{kind}"].to(mlp)
    module.load_state_dict(weights, assign=True)
    return module.eval().requires_grad_(False)
