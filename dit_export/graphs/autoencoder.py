"""An autoencoder as it is exported: a decoder from latents to finished images, and an encoder back."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from torch import Tensor, nn

from dit_export.checkpoints.autoencoders import Autoencoder, spec_of_autoencoder
from dit_export.graphs.precision import dtype_of
from dit_runtime.bundle.manifest import ENCODER, PrecisionSpec


class Decoder(nn.Module):
    """``latents [B, C, h, w]`` f32 → ``images [B, H, W, 3]`` uint8 and ``decoded [B, 3, H, W]`` f32 in [-1, 1].

    It un-scales, decodes, clamps and rounds as ``DiTPipeline`` and ``numpy_to_pil`` do. ``decoded`` is not clamped: it
    serves comparisons with the reference, and images that are put together from tiles. h and w may be any size.
    """

    scale: float | Tensor
    shift: float | Tensor

    def __init__(self, autoencoder: Autoencoder, precision: PrecisionSpec) -> None:
        super().__init__()
        spec = spec_of_autoencoder(autoencoder)
        self.channels, self.factor = autoencoder.config.latent_channels, spec.factor
        if spec.latents_std:
            self.scale = nn.Buffer(_per_channel(spec.latents_std) / spec.scaling_factor, persistent=False)
            self.shift = nn.Buffer(_per_channel(spec.latents_mean), persistent=False)
        else:
            self.scale, self.shift = 1 / spec.scaling_factor, spec.shift_factor
        self.shifts = bool(spec.latents_std) or spec.shift_factor != 0
        self.dtype = dtype_of(precision, "decoder")
        tiny = isinstance(autoencoder, AutoencoderTiny)
        self.post_quant = _copy_in_dtype(None if tiny else autoencoder.post_quant_conv, self.dtype)
        self.decoder = _copy_in_dtype(autoencoder.decoder, self.dtype)

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        z = (self.scale * latents + self.shift if self.shifts else self.scale * latents).to(self.dtype)
        if self.post_quant is not None:
            z = self.post_quant(z)
        decoded = self.decoder(z).float()  # (B, 3, H, W)
        images = torch.round((decoded / 2 + 0.5).clamp(0, 1) * 255).permute(0, 2, 3, 1)
        return images.to(
            torch.uint8
        ), decoded  # the cast comes last: TensorRT takes uint8 only as a graph's input or output


class Encoder(nn.Module):
    """``images [B, H, W, 3]`` uint8 → ``mean [B, C, h, w]`` f32 and, with an ``AutoencoderKL``, ``std`` likewise.

    Mean and standard deviation are the posterior's, shifted and scaled to the sampler's latents. An ``AutoencoderTiny``
    has no posterior; its latents are the mean.
    """

    scale: float | Tensor
    shift: float | Tensor

    def __init__(self, autoencoder: Autoencoder, precision: PrecisionSpec) -> None:
        super().__init__()
        spec = spec_of_autoencoder(autoencoder)
        self.channels, self.factor = autoencoder.config.latent_channels, spec.factor
        if spec.latents_std:
            self.scale = nn.Buffer(spec.scaling_factor / _per_channel(spec.latents_std), persistent=False)
            self.shift = nn.Buffer(_per_channel(spec.latents_mean), persistent=False)
        else:
            self.scale, self.shift = spec.scaling_factor, spec.shift_factor
        self.dtype = dtype_of(precision, ENCODER)
        self.has_deviation = not isinstance(autoencoder, AutoencoderTiny)
        self.quant = _copy_in_dtype(autoencoder.quant_conv if self.has_deviation else None, self.dtype)
        self.encoder = _copy_in_dtype(autoencoder.encoder, self.dtype)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        x = (
            images.float().permute(0, 3, 1, 2) / 127.5 - 1
        )  # (B, 3, H, W) in [-1, 1]; the cast comes first, for TensorRT
        h = self.encoder(x.to(self.dtype))
        if self.quant is not None:
            h = self.quant(h)
        if not self.has_deviation:
            return ((h.float() - self.shift) * self.scale,)
        mean, log_variance = h.float().chunk(2, dim=1)
        # DiagonalGaussianDistribution clamps so.
        return (mean - self.shift) * self.scale, torch.exp(0.5 * log_variance.clamp(-30, 20)) * self.scale


def _per_channel(values: tuple[float, ...]) -> Tensor:
    """Numbers of each channel ``[1, C, 1, 1]``; on the CPU even under a meta device."""
    return torch.tensor(values, dtype=torch.float32, device="cpu").view(1, -1, 1, 1)


def _copy_in_dtype(module: nn.Module | None, dtype: torch.dtype) -> Any:
    """A copy of a module in a dtype, whose normalizations compute their statistics in FP32; None stays None."""
    if module is None:
        return None
    copied = copy.deepcopy(module).to(dtype)
    if dtype != torch.float32:
        _keep_statistics_fp32(copied)
    return copied


class _GroupNorm(nn.Module):
    """Group normalization and the activation after it, in FP32, inside an FP16 network.

    The activation belongs in here: with a cast between the two, TensorRT-RTX writes the whole normalized tensor in FP32
    and reads it again, which is 67 MB at 256×256 in Stable Diffusion's decoder.
    """

    def __init__(self, original: nn.GroupNorm, activation: nn.Module) -> None:
        super().__init__()
        self.groups, self.eps = original.num_groups, original.eps
        self.weight = nn.Parameter(original.weight.detach().float(), requires_grad=False)
        self.bias = nn.Parameter(original.bias.detach().float(), requires_grad=False)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        normalized = F.group_norm(x.float(), self.groups, self.weight, self.bias, self.eps)
        result: Tensor = self.activation(normalized).to(x.dtype)
        return result


# diffusers' names for the activation after a module's normalizations: in a residual block, and after the last one.
_ACTIVATIONS = ("nonlinearity", "conv_act")


def _keep_statistics_fp32(module: nn.Module) -> None:
    children = dict(module.named_children())
    norms = {name: child for name, child in children.items() if isinstance(child, nn.GroupNorm)}
    following = next((name for name in _ACTIVATIONS if norms and name in children), None)
    activation = nn.Identity() if following is None else children[following]
    for name, norm in norms.items():
        module.register_module(name, _GroupNorm(norm, activation))
    if following is not None:
        module.register_module(following, nn.Identity())
    for name, child in module.named_children():
        if name not in norms:
            _keep_statistics_fp32(child)
