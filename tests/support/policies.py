"""Small policies in lerobot's files, with random weights and open gates; and their network in NumPy, in float64."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

Array = np.ndarray[Any, Any]

ACTIONS, HORIZON, WIDTH, DEPTH, HEADS, TIME, OBSERVATION, BASE = 3, 8, 64, 2, 4, 16, 11, 100.0
DIFFUSION = {
    "objective": "diffusion",
    "noise_scheduler_type": "DDIM",
    "num_train_timesteps": 100,
    "beta_schedule": "squaredcos_cap_v2",
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "prediction_type": "epsilon",
    "clip_sample": True,
    "clip_sample_range": 1.0,
    "num_inference_steps": 10,
}
FLOW = {"objective": "flow_matching", "sigma_min": 0.0, "num_integration_steps": 10, "integration_method": "euler"}


def policy_config(rotary: bool = True, positions: bool = False, **changes: Any) -> dict[str, Any]:
    """``config.json`` as lerobot writes it, without what has to do with cameras and training."""
    config = {
        "type": "multi_task_dit",
        "n_obs_steps": 2,
        "horizon": HORIZON,
        "n_action_steps": 6,
        "hidden_dim": WIDTH,
        "num_layers": DEPTH,
        "num_heads": HEADS,
        "timestep_embed_dim": TIME,
        "use_rope": rotary,
        "rope_base": BASE,
        "use_positional_encoding": positions,
        "output_features": {"action": {"type": "ACTION", "shape": [ACTIONS]}},
    }
    return {**config, **DIFFUSION, **changes}


def policy_weights(rotary: bool = True, positions: bool = False, seed: int = 0) -> dict[str, torch.Tensor]:
    """The network's tensors by lerobot's names, in ``noise_predictor.``, with some of an observation encoder's."""
    d, inputs = WIDTH, TIME + OBSERVATION
    linears = {"input_proj": (d, ACTIONS), "output_proj": (ACTIONS, d)}
    linears |= {"time_mlp.1": (2 * TIME, TIME), "time_mlp.3": (TIME, 2 * TIME)}
    shapes: dict[str, tuple[int, ...]] = {"pos_embedding": (1, HORIZON, d)} if positions else {}
    for index in range(DEPTH):
        block = f"transformer_blocks.{index}"
        if rotary:
            linears |= {f"{block}.attn.qkv_proj": (3 * d, d), f"{block}.attn.out_proj": (d, d)}
        else:
            linears[f"{block}.multihead_attn.out_proj"] = (d, d)
            shapes[f"{block}.multihead_attn.in_proj_weight"] = (3 * d, d)
            shapes[f"{block}.multihead_attn.in_proj_bias"] = (3 * d,)
        linears |= {f"{block}.mlp.0": (4 * d, d), f"{block}.mlp.2": (d, 4 * d)}
        linears[f"{block}.adaLN_modulation.1"] = (6 * d, inputs)
    for name, (outputs, ins) in linears.items():
        shapes |= {f"{name}.weight": (outputs, ins), f"{name}.bias": (outputs,)}
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in shapes.items():
        scale = 1.0 if name == "pos_embedding" else 1 / math.sqrt(shape[-1]) if len(shape) > 1 else 0.3
        weights[f"noise_predictor.{name}"] = scale * torch.randn(shape, generator=generator)
    weights["observation_encoder.text_encoder.projection.weight"] = torch.ones(4, 4)
    return weights


def save_policy(folder: Path, weights: dict[str, torch.Tensor], config: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def predict(weights: dict[str, torch.Tensor], x: Array, t: Array, observations: Array, rotary: bool = True) -> Array:
    """The network of actions ``[N, T, A]``, timesteps ``[N]`` and observations ``[N, O]``, in float64.

    Rotary positions are complex numbers here: channel i is the real part, channel i + d/2 the imaginary one.
    """
    own = {name.removeprefix("noise_predictor."): tensor.double().numpy() for name, tensor in weights.items()}

    def linear(name: str, value: Array) -> Array:
        return np.asarray(value @ own[f"{name}.weight"].T + own[f"{name}.bias"])

    def erf_gelu(value: Array) -> Array:
        return np.asarray(value * 0.5 * (1 + np.vectorize(math.erf)(value / math.sqrt(2))))

    def tanh_gelu(value: Array) -> Array:
        return np.asarray(0.5 * value * (1 + np.tanh(math.sqrt(2 / math.pi) * (value + 0.044715 * value**3))))

    def norm(value: Array) -> Array:
        centered = value - value.mean(-1, keepdims=True)
        return np.asarray(centered / np.sqrt((centered**2).mean(-1, keepdims=True) + 1e-6))

    half = TIME // 2
    angles = t.astype(np.float64)[:, None] * np.exp(-np.arange(half) * math.log(10000) / (half - 1))
    time = erf_gelu(linear("time_mlp.1", np.concatenate([np.sin(angles), np.cos(angles)], axis=1)))
    features = np.concatenate([erf_gelu(linear("time_mlp.3", time)), observations.astype(np.float64)], axis=1)
    features = features / (1 + np.exp(-features))
    x = linear("input_proj", x.astype(np.float64)) + own.get("pos_embedding", 0)
    (count, length, width), head = x.shape, WIDTH // HEADS
    turns = np.exp(1j * np.arange(length)[:, None] * BASE ** (-np.arange(0, head, 2) / head))
    for index in range(DEPTH):
        block = f"transformer_blocks.{index}"
        vectors = linear(f"{block}.adaLN_modulation.1", features).reshape(count, 6, 1, width)
        y = norm(x) * (1 + vectors[:, 1]) + vectors[:, 0]
        if rotary:
            qkv = linear(f"{block}.attn.qkv_proj", y)
        else:
            qkv = y @ own[f"{block}.multihead_attn.in_proj_weight"].T + own[f"{block}.multihead_attn.in_proj_bias"]
        q, k, v = np.moveaxis(qkv.reshape(count, length, 3, HEADS, head), (2, 3), (0, 2))
        if rotary:
            q, k = ((each[..., : head // 2] + 1j * each[..., head // 2 :]) * turns for each in (q, k))
        scores = (q @ np.conj(np.swapaxes(k, 2, 3))).real / math.sqrt(head)
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = np.moveaxis(shares / shares.sum(-1, keepdims=True) @ v, 1, 2).reshape(count, length, width)
        x = x + vectors[:, 2] * linear(f"{block}.{'attn' if rotary else 'multihead_attn'}.out_proj", mixed)
        y = norm(x) * (1 + vectors[:, 4]) + vectors[:, 3]
        x = x + vectors[:, 5] * linear(f"{block}.mlp.2", tanh_gelu(linear(f"{block}.mlp.0", y)))
    return linear("output_proj", x)
