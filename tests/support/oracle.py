"""Diffusion Transformers and their sampling loops once more: what the package's own are held against.

This is the oracle of the DiT of Peebles & Xie (arXiv 2212.09748, section 3.2) with each of its four conditionings, of
facebookresearch/DiT's ``forward_with_cfg`` and its respaced DDIM and DDPM loops, and of willisma/SiT's velocity,
guidance and Euler loop. It shares nothing with the package, imports only torch and numpy, and is written in elementary
operations (no ``torch.nn``), so that neither a layer nor a layout is taken on trust.

Everything is a function of a ``dict[str, Tensor]`` with the official checkpoints' names; sizes are read off the shapes,
and the arithmetic is in the weights' dtype, or the latents' in the loops. Axes: N images, C latent channels, H × W
latent pixels, patches of p × p, T = (H/p)·(W/p) tokens row by row, width D, A heads, L blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

Weights = dict[str, Tensor]
Predict = Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]

CONDITIONINGS = ("adaln-zero", "adaln", "cross-attention", "in-context")
NORM_EPS = 1e-6
QK_NORM_EPS = 1e-5  # of timm's q_norm and k_norm, nn.LayerNorm's own
FREQUENCIES = 128  # the timestep embedding has as many cosines, then as many sines
MAX_PERIOD = 10000


def _linear(weights: Weights, name: str, x: Tensor) -> Tensor:
    return x @ weights[f"{name}.weight"].mT + weights[f"{name}.bias"]


def _silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def _gelu_tanh(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _normalized(x: Tensor, eps: float = NORM_EPS) -> Tensor:
    """LayerNorm without weights: the biased variance over the last axis."""
    centered = x - x.mean(-1, keepdim=True)
    return centered / torch.sqrt(centered.square().mean(-1, keepdim=True) + eps)


def _rms_norm(weights: Weights, name: str, x: Tensor) -> Tensor:
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + NORM_EPS) * weights[f"{name}.weight"]


def _turned(x: Tensor, rows: int, columns: int) -> Tensor:
    """RoPE of queries or keys [N, T, A, d]: pairs of channels as complex numbers, half by row and half by column."""
    n, tokens, heads, d = x.shape
    omega = 1 / MAX_PERIOD ** (torch.arange(d // 4, dtype=torch.float64) / (d / 4))  # [d/4]
    at = torch.arange(tokens)
    angles = torch.cat([place[:, None].double() * omega for place in (at // columns, at % columns)], dim=1)  # [T, d/2]
    pairs = torch.view_as_complex(x.double().reshape(n, tokens, heads, d // 2, 2).contiguous())
    turned = pairs * torch.polar(torch.ones_like(angles), angles)[None, :, None]
    return torch.view_as_real(turned).flatten(3).to(x.dtype)


def _affine_norm(weights: Weights, name: str, x: Tensor, eps: float = NORM_EPS) -> Tensor:
    return _normalized(x, eps) * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def _modulated_norm(weights: Weights, name: str, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Adaptive LayerNorm, or RMSNorm where it has a weight, of x [N, T, D] by shift and scale [N, D]."""
    normalized = _rms_norm(weights, name, x) if f"{name}.weight" in weights else _normalized(x)
    return normalized * (1 + scale[:, None]) + shift[:, None]


def _split_heads(x: Tensor, heads: int) -> Tensor:
    n, tokens, width = x.shape
    return x.reshape(n, tokens, heads, width // heads).transpose(1, 2)  # [N, A, T, D/A]


def _attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """softmax(q kᵀ / √(D/A)) v for each head, the heads side by side again."""
    q, k, v = (_split_heads(part, heads) for part in (q, k, v))
    scores = q @ k.mT / math.sqrt(q.shape[-1])  # [N, A, T, S]
    scores = torch.exp(scores - scores.amax(-1, keepdim=True))
    out = scores / scores.sum(-1, keepdim=True) @ v  # [N, A, T, D/A]
    return out.transpose(1, 2).flatten(2)  # [N, T, D]


def _self_attention(weights: Weights, name: str, x: Tensor, heads: int) -> Tensor:
    q, k, v = _linear(weights, f"{name}.qkv", x).chunk(3, dim=-1)
    q, k = (part.unflatten(2, (heads, -1)) for part in (q, k))  # [N, T, A, D/A]
    if f"{name}.q_norm.bias" in weights:  # over the channels of each head
        q, k = (_affine_norm(weights, f"{name}.{p}_norm", y, QK_NORM_EPS) for p, y in zip("qk", (q, k), strict=True))
    elif f"{name}.q_norm.weight" in weights:
        q, k = (_rms_norm(weights, f"{name}.{p}_norm", y) for p, y in zip("qk", (q, k), strict=True))
    if "feat_rope.freqs_cos" in weights:
        rows, columns = map(int, weights["grid"])
        q, k = _turned(q, rows, columns), _turned(k, rows, columns)
    q, k = q.flatten(2), k.flatten(2)
    return _linear(weights, f"{name}.proj", _attention(q, k, v, heads))


def _cross_attention(weights: Weights, name: str, x: Tensor, memory: Tensor, heads: int) -> Tensor:
    q = _linear(weights, f"{name}.q", x)  # [N, T, D]
    k, v = _linear(weights, f"{name}.kv", memory).chunk(2, dim=-1)  # [N, S, D] each
    return _linear(weights, f"{name}.proj", _attention(q, k, v, heads))


def _mlp(weights: Weights, name: str, x: Tensor) -> Tensor:
    if f"{name}.w12.weight" in weights:
        gate, value = _linear(weights, f"{name}.w12", x).chunk(2, dim=-1)
        return _linear(weights, f"{name}.w3", _silu(gate) * value)
    return _linear(weights, f"{name}.fc2", _gelu_tanh(_linear(weights, f"{name}.fc1", x)))


def _modulation(weights: Weights, name: str, c: Tensor, parts: int) -> tuple[Tensor, ...]:
    return _linear(weights, f"{name}.adaLN_modulation.1", _silu(c)).chunk(parts, dim=-1)  # [N, D] each


def sinusoids(t: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """cos(t ω), then sin(t ω), with ω_i = 10000^(−i/128), all computed in ``dtype``: [N] → [N, 256].

    The official code computes them in float32 whatever the model's dtype, with the exponent rounded in this order.
    """
    omega = torch.exp(-math.log(MAX_PERIOD) * torch.arange(FREQUENCIES, dtype=dtype) / FREQUENCIES)  # [128]
    angles = t[:, None].to(dtype) * omega  # [N, 128]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def sincos_positions(rows: int, columns: int, width: int) -> Tensor:
    """The official position table [1, T, D], float32 of float64: D/2 channels of the column, then D/2 of the row."""
    omega = 1 / MAX_PERIOD ** (np.arange(width // 4) / (width / 4))  # [D/4]
    row, column = np.divmod(np.arange(rows * columns), columns)  # [T] each
    angles = [np.outer(position, omega) for position in (column, row)]  # [T, D/4] each
    table = np.concatenate([f(angle) for angle in angles for f in (np.sin, np.cos)], axis=1)  # [T, D]
    return torch.from_numpy(table).to(torch.float32)[None]


def _patches(weights: Weights, x: Tensor) -> Tensor:
    """Each p × p patch of x [N, C, H, W] as one token: the strided convolution as a matrix product."""
    kernel = weights["x_embedder.proj.weight"]  # [D, C, p, p]
    p = kernel.shape[-1]
    n, channels, height, width = x.shape
    cut = x.reshape(n, channels, height // p, p, width // p, p).permute(0, 2, 4, 1, 3, 5)  # [N, H/p, W/p, C, p, p]
    return cut.flatten(3).flatten(1, 2) @ kernel.flatten(1).mT + weights["x_embedder.proj.bias"]  # [N, T, D]


def _timestep_embedding(
    weights: Weights, t: Tensor, sinusoid_dtype: torch.dtype, embedder: str = "t_embedder"
) -> Tensor:
    features = sinusoids(t, sinusoid_dtype).to(weights[f"{embedder}.mlp.0.weight"].dtype)  # [N, 256]
    return _linear(weights, f"{embedder}.mlp.2", _silu(_linear(weights, f"{embedder}.mlp.0", features)))  # [N, D]


def _adaln_zero_block(weights: Weights, name: str, x: Tensor, c: Tensor, heads: int) -> Tensor:
    shift1, scale1, gate1, shift2, scale2, gate2 = _modulation(weights, name, c, 6)
    x = x + gate1[:, None] * _self_attention(
        weights, f"{name}.attn", _modulated_norm(weights, f"{name}.norm1", x, shift1, scale1), heads
    )
    return x + gate2[:, None] * _mlp(
        weights, f"{name}.mlp", _modulated_norm(weights, f"{name}.norm2", x, shift2, scale2)
    )


def _adaln_block(weights: Weights, name: str, x: Tensor, c: Tensor, heads: int) -> Tensor:
    shift1, scale1, shift2, scale2 = _modulation(weights, name, c, 4)
    x = x + _self_attention(
        weights, f"{name}.attn", _modulated_norm(weights, f"{name}.norm1", x, shift1, scale1), heads
    )
    return x + _mlp(weights, f"{name}.mlp", _modulated_norm(weights, f"{name}.norm2", x, shift2, scale2))


def _cross_attention_block(weights: Weights, name: str, x: Tensor, memory: Tensor, heads: int) -> Tensor:
    x = x + _self_attention(weights, f"{name}.attn", _affine_norm(weights, f"{name}.norm1", x), heads)
    x = x + _cross_attention(weights, f"{name}.cross_attn", _affine_norm(weights, f"{name}.norm2", x), memory, heads)
    return x + _mlp(weights, f"{name}.mlp", _affine_norm(weights, f"{name}.norm3", x))


def _plain_block(weights: Weights, name: str, x: Tensor, heads: int) -> Tensor:
    x = x + _self_attention(weights, f"{name}.attn", _affine_norm(weights, f"{name}.norm1", x), heads)
    return x + _mlp(weights, f"{name}.mlp", _affine_norm(weights, f"{name}.norm2", x))


def dit(
    weights: Weights,
    x: Tensor,
    t: Tensor,
    y: Tensor,
    *,
    heads: int,
    conditioning: str,
    sinusoid_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """What the network predicts for x [N, C, H, W], t [N] (of a MeanFlow [N, 2]) and labels y [N]: [N, out, H, W].

    The two embeddings, of t and of y, enter by ``conditioning``. ``adaln-zero`` and ``adaln``: their sum gives every
    LayerNorm its shift and scale, and with Zero every branch its gate. ``cross-attention``: they are the memory, a
    sequence of two, of an attention between the self-attention and the MLP. ``in-context``: they are two more tokens
    after the image's, without a position, dropped after the last block.
    """
    depth = len({key.split(".")[1] for key in weights if key.startswith("blocks.")})
    blocks = [f"blocks.{i}" for i in range(depth)]
    p = weights["x_embedder.proj.weight"].shape[-1]
    weights = {**weights, "grid": torch.tensor(x.shape[2:]) // p}
    tokens = _patches(weights, x) + weights["pos_embed"]  # [N, T, D]
    t, *second = t.unbind(1) if t.ndim == 2 else (t,)
    t_embedding = _timestep_embedding(weights, t, sinusoid_dtype)  # [N, D]
    for other in second:  # MeanFlow's
        t_embedding = t_embedding + _timestep_embedding(weights, other, sinusoid_dtype, "r_embedder")
    y_embedding = weights["y_embedder.embedding_table.weight"][y]  # [N, D]

    if conditioning in ("adaln-zero", "adaln"):
        block = {"adaln-zero": _adaln_zero_block, "adaln": _adaln_block}[conditioning]
        c = t_embedding + y_embedding
        for name in blocks:
            tokens = block(weights, name, tokens, c, heads)
        shift, scale = _modulation(weights, "final_layer", c, 2)
        tokens = _modulated_norm(weights, "final_layer.norm_final", tokens, shift, scale)
    elif conditioning in ("cross-attention", "in-context"):
        pair = torch.stack([t_embedding, y_embedding], dim=1)  # [N, 2, D]
        if conditioning == "cross-attention":
            for name in blocks:
                tokens = _cross_attention_block(weights, name, tokens, pair, heads)
        else:
            tokens = torch.cat([tokens, pair], dim=1)  # [N, T + 2, D]
            for name in blocks:
                tokens = _plain_block(weights, name, tokens, heads)
            tokens = tokens[:, :-2]  # [N, T, D]
        tokens = _affine_norm(weights, "final_layer.norm_final", tokens)
    else:
        raise ValueError(f"conditioning is {conditioning!r}, expected one of {', '.join(CONDITIONINGS)}")

    pixels = _linear(weights, "final_layer.linear", tokens)  # [N, T, p·p·out]
    n, _, height, width = x.shape
    pixels = pixels.reshape(n, height // p, width // p, p, p, -1)  # [N, H/p, W/p, p, p, out]
    return pixels.permute(0, 5, 1, 3, 2, 4).reshape(n, -1, height, width)  # [N, out, H, W]


def random_weights(
    seed: int,
    *,
    width: int,
    depth: int,
    patch: int,
    channels: int,
    grid: tuple[int, int],
    classes: int,
    out_channels: int,
    conditioning: str,
    mlp_width: int | None = None,
    qk_heads: int = 0,
    lightning: bool = False,
    second_time: bool = False,
) -> Weights:
    """Seeded float32 weights of which every one acts: fan-in scaled, no zero gate, no unit norm; positions as official.

    ``second_time`` is MeanFlow's second timestep embedder.
    ``lightning`` is LightningDiT's RMSNorm, SwiGLU and rotary tables, of as many heads as have norms. With ``qk_heads``
    each of so many heads has norms of queries and keys. ``grid`` is rows, columns of patches;
    ``mlp_width`` is 4·width unless told. The table of labels has a last row for the null class.
    """
    generator = torch.Generator().manual_seed(seed)
    weights: Weights = {}

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def linear(name: str, inputs: int, outputs: int) -> None:
        weights[f"{name}.weight"] = normal(outputs, inputs) / math.sqrt(inputs)
        weights[f"{name}.bias"] = 0.3 * normal(outputs)

    def norm(name: str, width: int = width) -> None:
        weights[f"{name}.weight"] = 1 + 0.3 * normal(width)
        weights[f"{name}.bias"] = 0.3 * normal(width)

    hidden = 4 * width if mlp_width is None else mlp_width
    parts = {"adaln-zero": 6, "adaln": 4, "cross-attention": 0, "in-context": 0}[conditioning]
    norms = {"adaln-zero": 0, "adaln": 0, "cross-attention": 3, "in-context": 2}[conditioning]

    weights["pos_embed"] = sincos_positions(*grid, width)  # [1, T, D]
    linear("x_embedder.proj", channels * patch**2, width)
    weights["x_embedder.proj.weight"] = weights["x_embedder.proj.weight"].reshape(width, channels, patch, patch)
    linear("t_embedder.mlp.0", 2 * FREQUENCIES, width)
    linear("t_embedder.mlp.2", width, width)
    weights["y_embedder.embedding_table.weight"] = normal(classes + 1, width)
    for i in range(depth):
        name = f"blocks.{i}"
        for number in range(1, norms + 1):
            norm(f"{name}.norm{number}")
        linear(f"{name}.attn.qkv", width, 3 * width)
        linear(f"{name}.attn.proj", width, width)
        for part in ("q_norm", "k_norm") if qk_heads else ():
            norm(f"{name}.attn.{part}", width // qk_heads)
        for part in ("attn.q_norm", "attn.k_norm", "norm1", "norm2") if lightning else ():
            weights.pop(f"{name}.{part}.bias", None)
            if part.startswith("norm"):
                weights[f"{name}.{part}.weight"] = 1 + 0.3 * normal(width)
        if conditioning == "cross-attention":
            linear(f"{name}.cross_attn.q", width, width)
            linear(f"{name}.cross_attn.kv", width, 2 * width)
            linear(f"{name}.cross_attn.proj", width, width)
        linear(f"{name}.mlp.w12" if lightning else f"{name}.mlp.fc1", width, 2 * hidden if lightning else hidden)
        linear(f"{name}.mlp.w3" if lightning else f"{name}.mlp.fc2", hidden, width)
        if parts:
            linear(f"{name}.adaLN_modulation.1", width, parts * width)
    if parts:
        linear("final_layer.adaLN_modulation.1", width, 2 * width)
    else:
        norm("final_layer.norm_final")
    if lightning:
        weights["final_layer.norm_final.weight"] = 1 + 0.3 * normal(width)
        quarter = width // qk_heads // 4
        omega = 1 / MAX_PERIOD ** (np.arange(quarter) / quarter)
        places = np.divmod(np.arange(grid[0] * grid[1]), grid[1])
        angles = np.concatenate([np.outer(place, omega) for place in places], axis=1).repeat(2, axis=1)
        for name, table in (("cos", np.cos(angles)), ("sin", np.sin(angles))):
            weights[f"feat_rope.freqs_{name}"] = torch.from_numpy(table).float()
    linear("final_layer.linear", width, patch**2 * out_channels)
    if second_time:
        linear("r_embedder.mlp.0", 2 * FREQUENCIES, width)
        linear("r_embedder.mlp.2", width, width)
    return weights


def _doubled(z: Tensor, t: Tensor, y: Tensor, null: int) -> tuple[Tensor, Tensor, Tensor]:
    """The conditional branch's N rows, then the unconditional one's."""
    return torch.cat([z, z]), torch.cat([t, t]), torch.cat([y, torch.full_like(y, null)])


def _guide(out: Tensor, scale: float, guided_channels: int) -> Tensor:
    """The conditional rows of ``out`` [2N, K, H, W] with their first channels guided: [N, K, H, W]."""
    conditional, unconditional = out.chunk(2)
    first, rest = conditional[:, :guided_channels], conditional[:, guided_channels:]
    base = unconditional[:, :guided_channels]
    return torch.cat([base + scale * (first - base), rest], dim=1)


def guided(
    weights: Weights,
    z: Tensor,
    t: Tensor,
    y: Tensor,
    scale: float,
    *,
    heads: int,
    conditioning: str,
    null: int,
    guided_channels: int = 3,
    sinusoid_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor | None]:
    """The conditional half of DiT's ``forward_with_cfg``: the guided e and the variance's v, each [N, C, H, W].

    Only the first ``guided_channels`` are guided; the others, and v, are the conditional branch's. v is None for a
    network without a learned variance.
    """
    channels = z.shape[1]
    assert guided_channels <= channels, "the original's 3 would reach into the variance"
    out = dit(weights, *_doubled(z, t, y, null), heads=heads, conditioning=conditioning, sinusoid_dtype=sinusoid_dtype)
    out = _guide(out, scale, guided_channels)
    return out[:, :channels], out[:, channels:] if out.shape[1] > channels else None


def sit_velocity(
    weights: Weights,
    x: Tensor,
    t: Tensor,
    y: Tensor,
    *,
    heads: int,
    conditioning: str = "adaln-zero",
    sinusoid_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """SiT's velocity [N, C, H, W] at t [N] in [0, 1], not scaled; t = 0 is noise, t = 1 an image.

    Of a network with 2C output channels, the second half is dropped.
    """
    out = dit(weights, x, t, y, heads=heads, conditioning=conditioning, sinusoid_dtype=sinusoid_dtype)
    return out[:, : x.shape[1]]


def sit_guided(
    weights: Weights,
    z: Tensor,
    t: Tensor,
    y: Tensor,
    scale: float,
    *,
    heads: int,
    null: int,
    conditioning: str = "adaln-zero",
    guided_channels: int = 3,
    sinusoid_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The conditional half of SiT's ``forward_with_cfg``: the velocity [N, C, H, W], first channels guided."""
    doubled = _doubled(z, t, y, null)
    out = sit_velocity(weights, *doubled, heads=heads, conditioning=conditioning, sinusoid_dtype=sinusoid_dtype)
    return _guide(out, scale, guided_channels)


def official_timesteps(training_steps: int, steps: int) -> list[int]:
    """``space_timesteps(training_steps, str(steps))``, ascending; its stride is summed, not multiplied."""
    if not 1 <= steps <= training_steps:
        raise ValueError(f"steps is {steps}, expected 1 to {training_steps}")
    stride = (training_steps - 1) / (steps - 1) if steps > 1 else 1.0
    position, timesteps = 0.0, set()
    for _ in range(steps):
        timesteps.add(round(position))
        position += stride
    return sorted(timesteps)


def _respaced(betas: Sequence[float] | np.ndarray, steps: int) -> tuple[list[int], np.ndarray]:
    """The timesteps kept and the betas between them, float64 [steps]: ᾱ is the original's at each of them."""
    alpha_bar = np.cumprod(1 - np.asarray(betas, dtype=np.float64))
    timesteps = official_timesteps(len(alpha_bar), steps)
    kept = alpha_bar[timesteps]
    return timesteps, 1 - kept / np.append(1.0, kept[:-1])


def _predicted_start(z: Tensor, e: Tensor, alpha_bar: float) -> Tensor:
    """x_0 of the noise prediction, not clipped: the coefficients are float64 rounded to z's dtype."""
    return z.new_tensor(np.sqrt(1 / alpha_bar)) * z - z.new_tensor(np.sqrt(1 / alpha_bar - 1)) * e


def official_ddim(predict: Predict, z: Tensor, betas: Sequence[float] | np.ndarray, steps: int) -> list[Tensor]:
    """``ddim_sample_loop`` with eta 0 and ``clip_denoised=False``: z and the latents after each step, steps + 1 in all.

    ``predict(z, t)`` gets z [N, C, H, W] and t [N], int64 training timesteps, and returns (e, v); v is not used.
    """
    timesteps, betas = _respaced(betas, steps)
    alpha_bars = np.cumprod(1 - betas)
    before = np.append(1.0, alpha_bars[:-1])
    latents = [z]
    for i in reversed(range(steps)):
        e, _ = predict(z, torch.full((len(z),), timesteps[i]))
        x_0 = _predicted_start(z, e, alpha_bars[i])
        ratio = z.new_tensor(np.sqrt(1 / alpha_bars[i])), z.new_tensor(np.sqrt(1 / alpha_bars[i] - 1))
        e = (ratio[0] * z - x_0) / ratio[1]  # the original derives it again from x_0
        alpha_bar = z.new_tensor(before[i])
        z = torch.sqrt(alpha_bar) * x_0 + torch.sqrt(1 - alpha_bar) * e
        latents.append(z)
    return latents


def official_ddpm(
    predict: Predict,
    z: Tensor,
    betas: Sequence[float] | np.ndarray,
    steps: int,
    noises: Sequence[Tensor] | Tensor,
    learned: bool,
) -> list[Tensor]:
    """``p_sample_loop`` with ``clip_denoised=False``: z and the latents after each step, steps + 1 in all.

    ``noises``: the standard normal noise of each step in the order of sampling, z's shape; the last step's has no
    effect and may be absent. ``learned``: the log variance lies between the posterior's and log β by v in [−1, 1]
    (learned range); else it is the fixed large one. One step raises IndexError as the original does: its first
    variance is the second's.
    """
    timesteps, betas = _respaced(betas, steps)
    alphas = 1 - betas
    alpha_bars = np.cumprod(alphas)
    before = np.append(1.0, alpha_bars[:-1])
    posterior = betas * (1 - before) / (1 - alpha_bars)
    smallest = np.log(np.append(posterior[1], posterior[1:]))
    largest = np.log(betas)
    fixed_large = np.log(np.append(posterior[1], betas[1:]))
    of_start = betas * np.sqrt(before) / (1 - alpha_bars)
    of_latents = (1 - before) * np.sqrt(alphas) / (1 - alpha_bars)
    latents = [z]
    for step, i in enumerate(reversed(range(steps))):
        e, v = predict(z, torch.full((len(z),), timesteps[i]))
        x_0 = _predicted_start(z, e, alpha_bars[i])
        mean = z.new_tensor(of_start[i]) * x_0 + z.new_tensor(of_latents[i]) * z
        if learned:
            assert v is not None, "a learned variance needs the network's v"
            share = (v + 1) / 2
            log_variance = share * z.new_tensor(largest[i]) + (1 - share) * z.new_tensor(smallest[i])
        else:
            log_variance = z.new_tensor(fixed_large[i])
        z = mean if i == 0 else mean + torch.exp(0.5 * log_variance) * noises[step]
        latents.append(z)
    return latents


def sit_euler(predict: Callable[[Tensor, Tensor], Tensor], z: Tensor, steps: int) -> list[Tensor]:
    """SiT's ODE by Euler from noise at t = 0 to an image at t = 1: z and the latents after each of ``steps`` steps.

    ``predict(z, t)`` gets t [N] in z's dtype and returns the velocity. The original's ``num_steps`` is ``steps`` + 1:
    it counts the points of the grid.
    """
    times = torch.linspace(0, 1, steps + 1, dtype=z.dtype)
    latents = [z]
    for start, end in pairwise(times):
        z = z + (end - start) * predict(z, start.expand(len(z)))
        latents.append(z)
    return latents
