"""The network of lerobot's multi-task DiT policy in plain PyTorch, with its parameter names.

Written after huggingface/lerobot's ``policies/multi_task_dit/modeling_multi_task_dit.py``. It shares no code with the
modules that are exported, and its weights are the file's own, because golden records come from here.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dit_runtime.bundle.manifest import ModelSpec

EPS = 1e-6


def rotate(x: Tensor, base: float) -> Tensor:
    """Queries or keys ``[N, h, T, d]``: channel i of a head is turned with channel i + d/2."""
    half = x.shape[-1] // 2
    inverse = 1.0 / base ** (torch.arange(0, 2 * half, 2, dtype=torch.float32) / (2 * half))
    angles = torch.arange(x.shape[2], dtype=torch.float32)[:, None] * inverse  # (T, d/2)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class Attention(nn.Module):
    """Self-attention of ``heads`` heads; ``base`` is that of rotary positions, None without them."""

    def __init__(self, heads: int, base: float | None) -> None:
        super().__init__()
        self.heads, self.base = heads, base
        self.q_used, self.k_used = nn.Identity(), nn.Identity()  # where queries and keys can be seen as they are used

    def attend(self, qkv: Tensor) -> Tensor:
        """Queries, keys and values ``[N, T, 3·D]`` → ``[N, T, D]``."""
        n, t, d = qkv.shape
        q, k, v = qkv.reshape(n, t, 3, self.heads, d // 3 // self.heads).permute(2, 0, 3, 1, 4)
        if self.base is not None:
            q, k = rotate(q, self.base), rotate(k, self.base)
        mixed = F.scaled_dot_product_attention(self.q_used(q), self.k_used(k), v)
        return mixed.transpose(1, 2).reshape(n, t, d // 3)


class RotaryAttention(Attention):
    """Attention with rotary positions, with lerobot's parameter names."""

    def __init__(self, width: int, heads: int, base: float) -> None:
        super().__init__(heads, base)
        self.qkv_proj = nn.Linear(width, 3 * width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.out_proj(self.attend(self.qkv_proj(x)))
        return result


class PlainAttention(Attention):
    """Attention with the parameter names of ``nn.MultiheadAttention``."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__(heads, None)
        self.in_proj_weight = nn.Parameter(torch.zeros(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.out_proj(self.attend(F.linear(x, self.in_proj_weight, self.in_proj_bias)))
        return result


class Block(nn.Module):
    """A block with adaLN-Zero; ``features`` are the timestep's embedding and the observation ``[N, time + O]``."""

    def __init__(self, spec: ModelSpec, base: float) -> None:
        super().__init__()
        d = spec.width
        if spec.rotary:
            self.attn = RotaryAttention(d, spec.heads, base)
        else:
            self.multihead_attn = PlainAttention(d, spec.heads)
        self.mlp = nn.Sequential(nn.Linear(d, spec.mlp_width), nn.GELU("tanh"), nn.Linear(spec.mlp_width, d))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(spec.time_width + spec.observation, 6 * d))

    @property
    def attention(self) -> Attention:
        found: Attention = self.attn if hasattr(self, "attn") else self.multihead_attn
        return found

    def forward(self, x: Tensor, features: Tensor) -> Tensor:
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self.adaLN_modulation(features)[:, None].chunk(6, dim=2)
        y = F.layer_norm(x, x.shape[-1:], eps=EPS) * (1 + scale_1) + shift_1
        x = x + gate_1 * self.attention(y)
        result: Tensor = x + gate_2 * self.mlp(F.layer_norm(x, x.shape[-1:], eps=EPS) * (1 + scale_2) + shift_2)
        return result


class TimeFeatures(nn.Module):
    """Timesteps ``[N]`` → sines, then cosines ``[N, width]``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, t: Tensor) -> Tensor:
        half = self.width // 2
        frequencies = torch.exp(torch.arange(half, dtype=torch.float32) * -(math.log(10000) / (half - 1)))
        angles = t.float()[:, None] * frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=-1)


class PolicyDiT(nn.Module):
    """The policy's network, of actions ``[N, T, A]``; ``base`` is that of its rotary positions."""

    def __init__(self, spec: ModelSpec, base: float, has_positions: bool) -> None:
        super().__init__()
        time = spec.time_width
        self.time_mlp = nn.Sequential(
            TimeFeatures(time), nn.Linear(time, 2 * time), nn.GELU(), nn.Linear(2 * time, time), nn.GELU()
        )
        self.input_proj = nn.Linear(spec.latent_channels, spec.width)
        self.pos_embedding = nn.Parameter(torch.zeros(1, spec.tokens, spec.width)) if has_positions else None
        self.transformer_blocks = nn.ModuleList(Block(spec, base) for _ in range(spec.depth))
        self.output_proj = nn.Linear(spec.width, spec.latent_channels)

    def features(self, t: Tensor, observations: Tensor) -> Tensor:
        """Timesteps ``[N]`` and observations ``[N, O]`` → what every block gets ``[N, time + O]``."""
        dtype = self.input_proj.weight.dtype
        embedded = self.time_mlp[1:](self.time_mlp[0](t).to(dtype))
        return torch.cat([embedded, observations.to(dtype)], dim=-1)

    def forward(self, x: Tensor, t: Tensor, observations: Tensor) -> Tensor:
        """Noisy actions ``[N, T, A]``, timesteps ``[N]`` and observations ``[N, O]`` → the prediction ``[N, T, A]``."""
        features, x = self.features(t, observations), self.input_proj(x)
        if self.pos_embedding is not None:
            x = x + self.pos_embedding
        for block in self.transformer_blocks:
            x = block(x, features)
        result: Tensor = self.output_proj(x)
        return result
