"""The DiT as it is exported: the network is split into a part that depends on the latents and a part that does not.

``Conditioner`` holds everything that depends on timestep and label alone. ``Step`` is one sampling step: it gathers the
conditions, runs the network for each guidance branch, and updates the sampler's state. Both follow Peebles & Xie 2022
(arXiv 2212.09748) in its four conditionings. Where implementations disagree, the numbers come from the checkpoint's own
reference (``Numerics``).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dit_export.checkpoints.layouts import Numerics
from dit_export.checkpoints.positions import Positions
from dit_export.graphs.precision import dtype_of
from dit_runtime.bundle.macs import FREQUENCIES, MODULATIONS
from dit_runtime.bundle.manifest import ModelSpec, PrecisionSpec
from dit_runtime.samplers.schedule import A_Z, B_E, BOUND, CLEAN, CLIPPED, INPUT, LOG_SIGMA, LOG_SIGMA_V, MATRIX, NOISE

# The conditioning table by its name, and what one of its rows holds:
#   modulation    6 (adaLN-Zero) or 4 (adaLN) vectors per block, and the final layer's shift and scale, if it has them
#   keys_values   cross-attention's keys and values of the two conditioning tokens, in each block
#   tokens        the two conditioning tokens of in-context conditioning


Rotary = tuple[Tensor, Tensor]  # cosines and sines [T, head]


def table_axes(spec: ModelSpec) -> tuple[str, tuple[int, ...]]:
    """The name of the conditioning table and the shape of one of its rows."""
    if spec.conditioning == "cross-attention":
        return "keys_values", (spec.depth, 2, 2, spec.width)  # block, key or value, token
    if spec.conditioning == "in-context":
        return "tokens", (2, spec.width)
    ends = 0 if spec.observation else 2
    return "modulation", (MODULATIONS[spec.conditioning] * spec.depth + ends, spec.width)


def table_dtype(spec: ModelSpec, dtype: torch.dtype) -> torch.dtype:
    """The dtype of the conditioning table of a conditioner that computes in ``dtype``.

    It is FP32, except that cross-attention's keys and values have the dtype of their products. numpy has no BF16, so
    BF16 is FP32 there too.
    """
    return dtype if spec.conditioning == "cross-attention" and dtype != torch.bfloat16 else torch.float32


class Embedder(nn.Module):
    """Timestep MLP and label table → two embeddings ``[R, D]``; a second time has an MLP of its own, which is added."""

    def __init__(self, width: int, rows: int, times: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(FREQUENCIES, width)
        self.fc2 = nn.Linear(width, width)
        if times == 2:
            self.second_fc1, self.second_fc2 = nn.Linear(FREQUENCIES, width), nn.Linear(width, width)
        self.labels = nn.Embedding(rows, width)

    def forward(self, features: Sequence[Tensor], labels: Tensor) -> tuple[Tensor, Tensor]:
        time = self.fc2(F.silu(self.fc1(features[0])))
        for second in features[1:]:
            time = time + self.second_fc2(F.silu(self.second_fc1(second)))
        return time, self.labels(labels)


class Conditioner(nn.Module):
    """``timesteps [R]`` f32, of a model of two times ``[R, 2]``, ``labels [R]`` i32 → the conditioning table ``[R, …]``
    (``table_axes``).

    With adaLN, a row of the conditioning table holds each block's vectors in the order shift, scale (and gate) for
    attention, then the same for the MLP; its last two vectors are the final layer's shift and scale. ``table_dtype``
    says what the table's dtype is.
    """

    def __init__(self, spec: ModelSpec, numerics: Numerics, precision: PrecisionSpec, embedders: int) -> None:
        super().__init__()
        self.spec = spec
        self.dtype = dtype_of(precision, "conditioner")
        self.embedders = nn.ModuleList(Embedder(spec.width, spec.label_rows, spec.times) for _ in range(embedders))
        if spec.conditioning in MODULATIONS:
            rows = MODULATIONS[spec.conditioning] * spec.width
            self.blocks = nn.ModuleList(nn.Linear(spec.width, rows) for _ in range(spec.depth))
            self.final = nn.Linear(spec.width, 2 * spec.width)
        elif spec.conditioning == "cross-attention":
            self.blocks = nn.ModuleList(nn.Linear(spec.width, 2 * spec.width) for _ in range(spec.depth))
        self.table_dtype = table_dtype(spec, self.dtype)
        self.frequencies = nn.Buffer(make_frequencies(FREQUENCIES // 2, numerics), persistent=False)

    def forward(self, timesteps: Tensor, labels: Tensor) -> Tensor:
        times = (timesteps,) if self.spec.times == 1 else timesteps.unbind(1)
        features = [make_time_features(each, self.frequencies).to(self.dtype) for each in times]  # each (R, 256)
        embeddings = [embedder(features, labels) for embedder in self.embedders]
        if self.spec.conditioning in MODULATIONS:
            conditions = [F.silu(time + label) for time, label in embeddings]  # one for all blocks, or one per block
            vectors = [block(conditions[index % len(conditions)]) for index, block in enumerate(self.blocks)]
            table = torch.cat([*vectors, self.final(conditions[0])], dim=1).float()
            return table.reshape(-1, *table_axes(self.spec)[1])  # (R, 6·depth + 2, D)
        tokens = torch.stack(embeddings[0], dim=1)  # (R, 2, D)
        if self.spec.conditioning == "in-context":
            return tokens.float()
        pairs = [block(tokens).unflatten(2, (2, -1)).transpose(1, 2) for block in self.blocks]  # (R, 2, 2, D) each
        table = torch.stack(pairs, dim=1)
        return table if table.dtype == self.table_dtype else table.to(self.table_dtype)


class PolicyConditioner(nn.Module):
    """``timesteps [R]`` f32, ``observations [R, O]`` f32 → the conditioning table ``[R, 6·depth, D]`` FP32.

    The timestep's embedding and the observation, side by side, go through SiLU to each block's vectors.
    """

    def __init__(self, spec: ModelSpec, numerics: Numerics, precision: PrecisionSpec) -> None:
        super().__init__()
        self.spec, self.table_dtype = spec, torch.float32
        self.dtype = dtype_of(precision, "conditioner")
        self.fc1 = nn.Linear(spec.time_width, 2 * spec.time_width)
        self.fc2 = nn.Linear(2 * spec.time_width, spec.time_width)
        width = spec.time_width + spec.observation
        self.blocks = nn.ModuleList(nn.Linear(width, 6 * spec.width) for _ in range(spec.depth))
        self.frequencies = nn.Buffer(make_frequencies(spec.time_width // 2, numerics), persistent=False)

    def forward(self, timesteps: Tensor, observations: Tensor) -> Tensor:
        features = make_time_features(timesteps, self.frequencies).to(self.dtype)
        time = F.gelu(self.fc2(F.gelu(self.fc1(features))))
        condition = F.silu(torch.cat([time, observations.to(self.dtype)], dim=1))  # (R, time_width + O)
        table = torch.cat([block(condition) for block in self.blocks], dim=1).float()
        return table.reshape(-1, *table_axes(self.spec)[1])  # (R, 6·depth, D)


def make_frequencies(half: int, numerics: Numerics) -> Tensor:
    """``[half]``, as diffusers' get_timestep_embedding computes it, in float32; on the CPU even under a meta device."""
    exponent = -math.log(10000) * torch.arange(half, dtype=torch.float32, device="cpu")
    return torch.exp(exponent / (half - numerics.frequency_shift))


def make_time_features(timesteps: Tensor, frequencies: Tensor) -> Tensor:
    """Cosines and sines ``[R, 2·half]`` of timesteps ``[R]``, in float32: FP16 would be off by up to half a radian."""
    angles = timesteps[:, None] * frequencies
    return torch.cat([torch.cos(angles), torch.sin(angles)], dim=1)


class Attention(nn.Module):
    """Multi-head self-attention; products in the weights' dtype, softmax and the norm of queries and keys in FP32."""

    def __init__(self, spec: ModelSpec, numerics: Numerics) -> None:
        super().__init__()
        self.heads = spec.heads
        self.qkv = nn.Linear(spec.width, 3 * spec.width)
        self.proj = nn.Linear(spec.width, spec.width)
        self.normalizes = spec.qk_norm != "none"
        if self.normalizes:
            self.q_norm, self.k_norm = make_qk_norm(spec, numerics), make_qk_norm(spec, numerics)

    def forward(self, x: Tensor, rotary: Rotary | None = None) -> Tensor:
        # The images stay outermost. If q, k and v were outermost, TensorRT-RTX would copy each of them in a kernel of
        # its own, on streams that wait for each other, instead of all three in one (benchmarks/kernels.py).
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(0, 2, 3, 1, 4).unbind(1)  # (N, h, T, d)
        if self.normalizes:
            q, k = self.q_norm(q.float()).to(v.dtype), self.k_norm(k.float()).to(v.dtype)
        if rotary is not None:
            q, k = turn(q.float(), rotary).to(v.dtype), turn(k.float(), rotary).to(v.dtype)
        result: Tensor = self.proj(attend(q, k, v))
        return result


class CrossAttention(nn.Module):
    """Multi-head attention to the two conditioning tokens; its input has their keys and values ``[N, 2, 2, D]``."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, keys_values: Tensor) -> Tensor:
        q = self.q(x).unflatten(2, (self.heads, -1)).transpose(1, 2)  # (N, h, T, d)
        k, v = keys_values.to(q.dtype).unflatten(3, (self.heads, -1)).transpose(2, 3).unbind(1)  # (N, h, 2, d)
        result: Tensor = self.proj(attend(q, k, v))
        return result


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scaled dot-product attention ``[N, h, T, d]`` → ``[N, T, D]``."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(2, 3)  # (N, h, T, keys)
    mixed = torch.softmax(scores.float(), dim=-1).to(v.dtype) @ v
    return mixed.transpose(1, 2).flatten(2)


def turn(x: Tensor, rotary: Rotary) -> Tensor:
    """Queries or keys ``[N, h, T, d]`` with each pair of neighboring channels turned.

    ``rotary``: cosines and sines ``[T, d]``.

    As in Su et al. 2021 (arXiv 2104.09864); the angles come from the token's row and column.
    """
    even, odd = x.unflatten(3, (-1, 2)).unbind(4)  # (N, h, T, d/2)
    return x * rotary[0] + torch.stack([-odd, even], dim=4).flatten(3) * rotary[1]


class SwiGlu(nn.Module):
    """Pointwise MLP with SwiGLU: the first half of the first product, through SiLU, times the second."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 2 * hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.fc1(x).chunk(2, dim=-1)
        result: Tensor = self.fc2(F.silu(gate) * value)
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
    """A DiT block. Its condition comes from the conditioning table: vectors, keys and values, or nothing.

    The residual stream, the normalization and the adaLN arithmetic are FP32.
    """

    def __init__(self, spec: ModelSpec, numerics: Numerics) -> None:
        super().__init__()
        self.conditioning = spec.conditioning
        self.norm1 = make_norm(spec, numerics.attention_eps)
        self.attn = Attention(spec, numerics)
        self.norm2 = make_norm(spec, numerics.mlp_eps)
        if spec.conditioning == "cross-attention":
            self.cross_attn = CrossAttention(spec.width, spec.heads)
            self.norm3 = nn.LayerNorm(spec.width, numerics.mlp_eps)
        self.mlp = (SwiGlu if spec.mlp == "swiglu" else Mlp)(spec.width, spec.mlp_width)

    def forward(self, x: Tensor, condition: Tensor, rotary: Rotary | None = None) -> Tensor:
        attention, mlp = self.attn.qkv.weight.dtype, self.mlp.fc1.weight.dtype
        if self.conditioning == "adaln-zero":
            shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = condition.unsqueeze(2).unbind(1)  # each (N, 1, D)
            x = x + gate_1 * self.attn(modulate(self.norm1(x), shift_1, scale_1).to(attention), rotary).float()
            x = x + gate_2 * self.mlp(modulate(self.norm2(x), shift_2, scale_2).to(mlp)).float()
        elif self.conditioning == "adaln":
            shift_1, scale_1, shift_2, scale_2 = condition.unsqueeze(2).unbind(1)  # each (N, 1, D)
            x = x + self.attn(modulate(self.norm1(x), shift_1, scale_1).to(attention)).float()
            x = x + self.mlp(modulate(self.norm2(x), shift_2, scale_2).to(mlp)).float()
        elif self.conditioning == "cross-attention":
            x = x + self.attn(self.norm1(x).to(attention)).float()
            x = x + self.cross_attn(self.norm2(x).to(self.cross_attn.q.weight.dtype), condition).float()
            x = x + self.mlp(self.norm3(x).to(mlp)).float()
        else:
            x = x + self.attn(self.norm1(x).to(attention)).float()
            x = x + self.mlp(self.norm2(x).to(mlp)).float()
        return x


def make_qk_norm(spec: ModelSpec, numerics: Numerics) -> nn.Module:
    """A normalization of queries or keys over a head, with weights."""
    head = spec.width // spec.heads
    return nn.RMSNorm(head, numerics.qk_rms_eps) if spec.qk_norm == "rms" else nn.LayerNorm(head, numerics.qk_eps)


def make_norm(spec: ModelSpec, eps: float) -> nn.Module:
    """A normalization of tokens; a LayerNorm has weights where nothing modulates it, an RMSNorm always."""
    if spec.norm == "rms":
        return nn.RMSNorm(spec.width, eps)
    return nn.LayerNorm(spec.width, eps, elementwise_affine=spec.conditioning not in MODULATIONS)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """The conditioning's scale and shift after a LayerNorm (adaLN)."""
    return x * (1 + scale) + shift


class Step(nn.Module):
    """One sampling step for B images and G guidance branches (shapes as in the bundle format).

    ``state [B, 3, C, H, W]``, ``noise [B, C, H, W]``, ``coefficients [B, 17]`` (``[B, 19]`` with a clip),
    ``guidance [G, B, C]``, ``rows [G, B]`` i32, the conditioning table ``[R, …]`` → ``next_state``,
    ``denoised [B, C, H, W]`` and, for the probe, each block's output ``[G·B, T, D]``. All inputs and outputs are FP32,
    except a conditioning table of keys and values.
    """

    def __init__(self, spec: ModelSpec, numerics: Numerics) -> None:
        super().__init__()
        self.spec = spec
        patch = spec.patch_size
        self.patch_embed = nn.Conv2d(spec.latent_channels, spec.width, kernel_size=patch, stride=patch)
        self.position = nn.Parameter(torch.empty(1, spec.tokens, spec.width))
        self.blocks = nn.ModuleList(Block(spec, numerics) for _ in range(spec.depth))
        self.rotary = nn.Buffer(torch.empty(2, spec.tokens, spec.width // spec.heads)) if spec.rotary else None
        self.final_norm = nn.Identity() if spec.observation else make_norm(spec, numerics.final_eps)
        self.final = nn.Linear(spec.width, patch * patch * spec.output_channels)

    def at(self, spec: ModelSpec, positions: Positions) -> Step:
        """The same network with the same weights at another size, with the positional tables there."""
        step = copy.copy(self)
        step._parameters = {"position": nn.Parameter(positions.table, requires_grad=False)}
        step._buffers = {"rotary": positions.rotary}
        step.spec = spec
        return step

    def forward(
        self, state: Tensor, noise: Tensor, coefficients: Tensor, guidance: Tensor, rows: Tensor, table: Tensor
    ) -> tuple[Tensor, ...]:
        spec = self.spec
        z = state[:, 0]
        weight = self.patch_embed.weight.dtype
        x = self.patch_embed(z.to(weight)).float().flatten(2).transpose(1, 2) + self.position  # (B, T, D)
        # The branches see the same latents: embed once, repeat for each branch.
        x = x.expand(rows.shape[0], -1, -1, -1).flatten(0, 1)  # (G·B, T, D)
        condition = table.index_select(0, rows.flatten())  # (G·B, …)
        if spec.conditioning == "in-context":
            x = torch.cat([x, condition], dim=1)  # (G·B, T + 2, D)
        # Taken apart once: the exporter would store a copy of both for each block.
        rotary = None if self.rotary is None else (self.rotary[0], self.rotary[1])
        outputs = []
        for index, block in enumerate(self.blocks):
            x = block(x, self.condition_for_block(condition, index), rotary)
            outputs.append(x)
        x = self.final_norm(x[:, : spec.tokens])
        if spec.conditioning in MODULATIONS and not spec.observation:
            x = modulate(x, condition[:, -2, None], condition[:, -1, None])
        x = self.final(x.to(self.final.weight.dtype)).float()
        x = unpatchify(x, spec).unflatten(0, (rows.shape[0], -1))  # (G, B, C or 2C, H, W)
        e = guide(x[:, :, : spec.latent_channels], guidance)  # (B, C, H, W)
        v = x[0, :, spec.latent_channels :] if spec.learned_variance else None  # the conditional branch's
        next_state, denoised = sampler_update(state, noise, coefficients, e, v)
        return next_state, denoised, *outputs

    def condition_for_block(self, condition: Tensor, index: int) -> Tensor:
        """The part of the images' rows of the conditioning table that a block uses."""
        if self.spec.conditioning in MODULATIONS:
            count = MODULATIONS[self.spec.conditioning]
            return condition[:, count * index : count * (index + 1)]  # (N, 6 or 4, D)
        return condition[:, index] if self.spec.conditioning == "cross-attention" else condition


def guide(x: Tensor, guidance: Tensor) -> Tensor:
    """The sum ``[B, C, H, W]`` of the branches' outputs ``[G, B, C, H, W]`` times their weights ``[G, B, C]``."""
    weighted = guidance[..., None, None] * x
    # A zero comes first because TensorRT-RTX runs the sum of a single branch in a kernel of its own.
    return torch.cat([torch.zeros_like(weighted[:1]), weighted]).sum(0)


def unpatchify(x: Tensor, spec: ModelSpec) -> Tensor:
    """Tokens ``[N, T, p·p·C]`` → ``[N, C, H, W]``."""
    patch, (height, width) = spec.patch_size, spec.grid
    x = x.unflatten(2, (patch, patch, spec.output_channels)).unflatten(1, (height, width))  # (N, h, w, p, q, C)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(-1, spec.output_channels, height * patch, width * patch)


def sampler_update(
    state: Tensor, noise: Tensor, coefficients: Tensor, e: Tensor, v: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Next state and denoised latents, from one row of numbers per image (``dit_runtime.samplers.schedule``).

    A row has 17 numbers, or 19 with a clip.

    The update is written as multiply-adds because a matrix product could run in TF32.

    denoised = a·s₀ + b·e;  s'ᵢ = Σⱼ Aᵢⱼ·sⱼ + Bᵢ·e;  s'₀ += exp(g + h·v)·k·noise. With two numbers more, denoised is
    clipped to ±r, and s'₀ += w·denoised.
    """
    c = coefficients[:, :, None, None, None]  # (B, 17 or 19, 1, 1, 1)
    denoised = c[:, A_Z] * state[:, 0] + c[:, B_E] * e
    slots = (c[:, MATRIX:INPUT].unflatten(1, (3, 3)) * state[:, None]).sum(2)  # (B, 3, C, H, W)
    slots = slots + c[:, INPUT:LOG_SIGMA] * e[:, None]
    g, h, k = c[:, LOG_SIGMA], c[:, LOG_SIGMA_V], c[:, NOISE]
    exponent = g if v is None else g + h * v
    z = slots[:, :1] + (torch.exp(exponent) * k * noise)[:, None]
    if coefficients.shape[1] == CLIPPED:
        denoised = torch.minimum(torch.maximum(denoised, -c[:, BOUND]), c[:, BOUND])
        z = z + (c[:, CLEAN] * denoised)[:, None]
    return torch.cat([z, slots[:, 1:]], dim=1), denoised
