"""LightningDiT in plain PyTorch, written after hustvl/LightningDiT's ``models/`` with its module names.

A DiT with any of RMSNorm, SwiGLU, rotary positions and norms of queries and keys. It shares no code with the modules
that are exported, because golden records come from here.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dit_export.reference.official_model import EPS, LabelEmbedder, Mlp, PatchEmbed, TimestepEmbedder, modulate
from dit_runtime.bundle.manifest import ModelSpec


class RMSNorm(nn.Module):
    """x over the root of its mean square, in float32 or wider, times a weight."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        normalized = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
        return normalized.type_as(x) * self.weight


class Rotary(nn.Module):
    """Turns neighboring channels of ``[N, h, T, d]`` by its tables of cosines and sines ``[T, d]``."""

    freqs_cos: Tensor
    freqs_sin: Tensor

    def __init__(self, tokens: int, head: int) -> None:
        super().__init__()
        self.register_buffer("freqs_cos", torch.zeros(tokens, head))
        self.register_buffer("freqs_sin", torch.zeros(tokens, head))

    def forward(self, x: Tensor) -> Tensor:
        turned = torch.empty_like(x)
        turned[..., 0::2], turned[..., 1::2] = -x[..., 1::2], x[..., 0::2]
        return x * self.freqs_cos + turned * self.freqs_sin


class Attention(nn.Module):
    """Multi-head self-attention; queries and keys are normalized, then turned, where the model does so."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.heads = spec.heads
        self.qkv = nn.Linear(spec.width, 3 * spec.width)
        self.q_norm, self.k_norm = _norm_of_head(spec), _norm_of_head(spec)
        self.q_used, self.k_used = nn.Identity(), nn.Identity()  # where queries and keys can be seen as they are used
        self.proj = nn.Linear(spec.width, spec.width)

    def forward(self, x: Tensor, rotary: Rotary | None) -> Tensor:
        n, t, d = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q), self.k_norm(k)
        if rotary is not None:
            q, k = rotary(q), rotary(k)
        mixed = F.scaled_dot_product_attention(self.q_used(q), self.k_used(k), v)
        result: Tensor = self.proj(mixed.transpose(1, 2).reshape(n, t, d))
        return result


class SwiGLU(nn.Module):
    """SiLU of the first half of ``w12``'s output, times the second half, through ``w3``."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w12 = nn.Linear(width, 2 * hidden)
        self.w3 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.w12(x).chunk(2, dim=-1)
        result: Tensor = self.w3(F.silu(first) * second)
        return result


def _norm_of_head(spec: ModelSpec) -> nn.Module:
    head = spec.width // spec.heads
    if spec.qk_norm == "none":
        return nn.Identity()
    return RMSNorm(head) if spec.qk_norm == "rms" else nn.LayerNorm(head)


def _norm(spec: ModelSpec) -> nn.Module:
    return RMSNorm(spec.width) if spec.norm == "rms" else nn.LayerNorm(spec.width, EPS, elementwise_affine=False)


class Block(nn.Module):
    """A block with adaLN-Zero; ``condition`` is the sum of the two embeddings ``[N, D]``."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.norm1, self.norm2 = _norm(spec), _norm(spec)
        self.attn = Attention(spec)
        self.mlp = SwiGLU(spec.width, spec.mlp_width) if spec.mlp == "swiglu" else Mlp(spec.width, spec.mlp_width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(spec.width, 6 * spec.width))

    def forward(self, x: Tensor, condition: Tensor, rotary: Rotary | None) -> Tensor:
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self.adaLN_modulation(condition).chunk(6, dim=1)
        x = x + gate_1[:, None] * self.attn(modulate(self.norm1(x), shift_1, scale_1), rotary)
        result: Tensor = x + gate_2[:, None] * self.mlp(modulate(self.norm2(x), shift_2, scale_2))
        return result


class FinalLayer(nn.Module):
    """The last normalization and the projection of each token to its patch."""

    def __init__(self, spec: ModelSpec, channels: int) -> None:
        super().__init__()
        self.norm_final = _norm(spec)
        self.linear = nn.Linear(spec.width, spec.patch_size**2 * channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(spec.width, 2 * spec.width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        result: Tensor = self.linear(modulate(self.norm_final(x), *self.adaLN_modulation(condition).chunk(2, dim=1)))
        return result


def rotary_positions(spec: ModelSpec) -> dict[str, Tensor]:
    """The buffers of ``Rotary`` that LightningDiT computes for a grid, by name; the grid need not be square."""
    (h, w), half = spec.grid, spec.width // spec.heads // 2
    frequencies = 1.0 / 10000 ** (torch.arange(0, half, 2, dtype=torch.float64) / half)
    rows, columns = ((torch.arange(side)[:, None] * frequencies).repeat_interleave(2, dim=1) for side in (h, w))
    angles = torch.cat([rows[:, None].expand(h, w, half), columns[None].expand(h, w, half)], dim=2).flatten(0, 1)
    return {"feat_rope.freqs_cos": angles.cos().float(), "feat_rope.freqs_sin": angles.sin().float()}


class LightningDiT(nn.Module):
    """LightningDiT with its parameter names; ``channels`` are the network's output channels."""

    def __init__(self, spec: ModelSpec, channels: int) -> None:
        super().__init__()
        self.spec, self.channels = spec, channels
        self.x_embedder = PatchEmbed(spec.latent_channels, spec.width, spec.patch_size)
        self.t_embedder = TimestepEmbedder(spec.width)
        self.y_embedder = LabelEmbedder(spec.label_rows, spec.width)
        self.pos_embed = nn.Parameter(torch.zeros(1, spec.tokens, spec.width), requires_grad=False)
        self.feat_rope = Rotary(spec.tokens, spec.width // spec.heads) if spec.rotary else None
        self.blocks = nn.ModuleList(Block(spec) for _ in range(spec.depth))
        self.final_layer = FinalLayer(spec, channels)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Latents ``[N, C, H, W]``, times ``[N]`` and labels ``[N]`` → ``[N, C or 2C, H, W]``."""
        x = self.x_embedder(x) + self.pos_embed  # (N, T, D)
        condition = self.t_embedder(t) + self.y_embedder(y)  # (N, D)
        for block in self.blocks:
            x = block(x, condition, self.feat_rope)
        (h, w), p = self.spec.grid, self.spec.patch_size
        x = self.final_layer(x, condition).reshape(-1, h, w, p, p, self.channels)
        image: Tensor = x.permute(0, 5, 1, 3, 2, 4).reshape(-1, self.channels, h * p, w * p)
        return image
