"""The DiT of the paper in plain PyTorch: the reference of every checkpoint that diffusers has no model for.

It is written after the official code (facebookresearch/DiT and willisma/SiT, ``models.py``) with its module names. The
three conditionings that were never published follow section 3.2 of the paper (Peebles & Xie 2022, arXiv 2212.09748). It
shares no code with the modules that are exported, because golden records come from here.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dit_runtime.bundle.manifest import ModelSpec

EPS = 1e-6  # every LayerNorm's


class TimestepEmbedder(nn.Module):
    """Timesteps ``[N]`` → ``[N, D]``, through sinusoids that are float32 whatever the weights are."""

    def __init__(self, width: int, frequencies: int = 256) -> None:
        super().__init__()
        self.frequencies = frequencies
        self.mlp = nn.Sequential(nn.Linear(frequencies, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        half = self.frequencies // 2
        frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32) / half)
        angles = t[:, None].float() * frequencies
        features = torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)
        embedding: Tensor = self.mlp(features.to(next(self.mlp.parameters()).dtype))
        return embedding


def embed_times(model: nn.Module, t: Tensor) -> Tensor:
    """The embedding ``[N, D]`` of timesteps ``[N]``, or of both times ``[N, 2]`` of a MeanFlow.

    The latter are embedded as zhuyu-cs/MeanFlow's ``sit.py`` does: the sum of two embedders' outputs.
    """
    embed, embed_second = model.get_submodule("t_embedder"), getattr(model, "r_embedder", None)
    embedding: Tensor = embed(t) if embed_second is None else embed(t[:, 0]) + embed_second(t[:, 1])
    return embedding


class LabelEmbedder(nn.Module):
    """Labels ``[N]`` → ``[N, D]``; the last row is the null class, if there is one."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(rows, width)

    def forward(self, labels: Tensor) -> Tensor:
        embedding: Tensor = self.embedding_table(labels)
        return embedding


class PatchEmbed(nn.Module):
    """Latents ``[N, C, H, W]`` → tokens ``[N, T, D]``."""

    def __init__(self, channels: int, width: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, kernel_size=patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        tokens: Tensor = self.proj(x).flatten(2).transpose(1, 2)
        return tokens


class Attention(nn.Module):
    """Multi-head self-attention with one product for queries, keys and values.

    With ``qk_norm`` queries and keys go through LayerNorms over each head, as in timm's ``Attention``.
    """

    def __init__(self, width: int, heads: int, qk_norm: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.q_norm: nn.Module = nn.LayerNorm(width // heads) if qk_norm else nn.Identity()
        self.k_norm: nn.Module = nn.LayerNorm(width // heads) if qk_norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)
        result: Tensor = self.proj(mixed.transpose(1, 2).reshape(n, t, d))
        return result


class CrossAttention(nn.Module):
    """Multi-head attention of image tokens ``[N, T, D]`` to the two conditioning tokens ``[N, 2, D]``."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        n, t, d = x.shape
        q = self.q(x).reshape(n, t, self.heads, d // self.heads).transpose(1, 2)
        k, v = self.kv(memory).reshape(n, memory.shape[1], 2, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v)
        result: Tensor = self.proj(mixed.transpose(1, 2).reshape(n, t, d))
        return result


class Mlp(nn.Module):
    """Pointwise MLP with tanh-approximated GELU."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.act = nn.GELU(approximate="tanh")
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.fc2(self.act(self.fc1(x)))
        return result


class Block(nn.Module):
    """A DiT block of any of the four conditionings.

    ``condition`` is the sum of the two embeddings ``[N, D]`` with adaLN and adaLN-Zero, and both embeddings as tokens
    ``[N, 2, D]`` with cross-attention. In-context blocks do not use it.
    """

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        width, self.conditioning = spec.width, spec.conditioning
        adaptive = self.conditioning in ("adaln", "adaln-zero")
        self.norm1 = nn.LayerNorm(width, EPS, elementwise_affine=not adaptive)
        self.attn = Attention(width, spec.heads, spec.qk_norm == "layer")
        self.norm2 = nn.LayerNorm(width, EPS, elementwise_affine=not adaptive)
        if self.conditioning == "cross-attention":
            self.cross_attn = CrossAttention(width, spec.heads)
            self.norm3 = nn.LayerNorm(width, EPS)
        self.mlp = Mlp(width, spec.mlp_width)
        if adaptive:
            vectors = 6 if self.conditioning == "adaln-zero" else 4
            self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, vectors * width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        if self.conditioning == "adaln-zero":
            shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self.adaLN_modulation(condition).chunk(6, dim=1)
            x = x + gate_1[:, None] * self.attn(modulate(self.norm1(x), shift_1, scale_1))
            x = x + gate_2[:, None] * self.mlp(modulate(self.norm2(x), shift_2, scale_2))
        elif self.conditioning == "adaln":
            shift_1, scale_1, shift_2, scale_2 = self.adaLN_modulation(condition).chunk(4, dim=1)
            x = x + self.attn(modulate(self.norm1(x), shift_1, scale_1))
            x = x + self.mlp(modulate(self.norm2(x), shift_2, scale_2))
        elif self.conditioning == "cross-attention":
            x = x + self.attn(self.norm1(x))
            x = x + self.cross_attn(self.norm2(x), condition)
            x = x + self.mlp(self.norm3(x))
        else:
            x = x + self.attn(self.norm1(x))
            x = x + self.mlp(self.norm2(x))
        return x


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Scale and shift of every token alike."""
    return x * (1 + scale[:, None]) + shift[:, None]


class FinalLayer(nn.Module):
    """The last LayerNorm, which is adaptive with adaLN, and the projection of each token to its patch."""

    def __init__(self, spec: ModelSpec, channels: int) -> None:
        super().__init__()
        self.adaptive = spec.conditioning in ("adaln", "adaln-zero")
        self.norm_final = nn.LayerNorm(spec.width, EPS, elementwise_affine=not self.adaptive)
        self.linear = nn.Linear(spec.width, spec.patch_size**2 * channels)
        if self.adaptive:
            self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(spec.width, 2 * spec.width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        x = self.norm_final(x)
        if self.adaptive:
            x = modulate(x, *self.adaLN_modulation(condition).chunk(2, dim=1))
        result: Tensor = self.linear(x)
        return result


class DiT(nn.Module):
    """A DiT in the official code's arrangement and with its parameter names.

    Args:
        spec: shape and conditioning.
        channels: output channels of the network; None takes those of ``spec``. SiT's ``learn_sigma`` models have twice
            as many as they use.

    ``pos_embed`` is a parameter, as in the official code: the table comes from the checkpoint.
    """

    def __init__(self, spec: ModelSpec, channels: int | None = None) -> None:
        super().__init__()
        self.spec = spec
        self.channels = spec.output_channels if channels is None else channels
        self.x_embedder = PatchEmbed(spec.latent_channels, spec.width, spec.patch_size)
        self.t_embedder = TimestepEmbedder(spec.width)
        self.r_embedder = TimestepEmbedder(spec.width) if spec.times == 2 else None
        self.y_embedder = LabelEmbedder(spec.label_rows, spec.width)
        self.pos_embed = nn.Parameter(torch.zeros(1, spec.tokens, spec.width), requires_grad=False)
        self.blocks = nn.ModuleList(Block(spec) for _ in range(spec.depth))
        self.final_layer = FinalLayer(spec, self.channels)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Latents ``[N, C, H, W]``, timesteps ``[N]`` or ``[N, 2]`` and labels ``[N]`` → ``[N, C or 2C, H, W]``."""
        x = self.x_embedder(x) + self.pos_embed  # (N, T, D)
        t_embedding, y_embedding = embed_times(self, t), self.y_embedder(y)  # (N, D) each
        condition = t_embedding + y_embedding
        if self.spec.conditioning in ("in-context", "cross-attention"):
            condition = torch.stack([t_embedding, y_embedding], dim=1)  # (N, 2, D)
        if self.spec.conditioning == "in-context":
            x = torch.cat([x, condition], dim=1)  # (N, T + 2, D)
        for block in self.blocks:
            x = block(x, condition)
        if self.spec.conditioning == "in-context":
            x = x[:, : self.spec.tokens]  # the conditioning tokens make no part of the image
        return self.unpatchify(self.final_layer(x, condition))

    def unpatchify(self, x: Tensor) -> Tensor:
        """Tokens ``[N, T, p·p·C]`` → ``[N, C, H, W]``."""
        (h, w), p = self.spec.grid, self.spec.patch_size
        x = torch.einsum("nhwpqc->nchpwq", x.reshape(-1, h, w, p, p, self.channels))
        return x.reshape(-1, self.channels, h * p, w * p)
