"""The decoder of an ``AutoencoderKL`` as it is exported: latents in, finished pictures out."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn

from dit_export.precision import Precision


class Decoder(nn.Module):
    """``latents [B, C, h, w]`` f32 → ``images [B, H, W, 3]`` uint8 and ``decoded [B, 3, H, W]`` f32 in [-1, 1].

    Un-scaling, VAE decoder, clamp and rounding as ``DiTPipeline`` and ``numpy_to_pil`` do them. ``decoded`` is not
    clamped: it is for parity.
    """

    def __init__(self, autoencoder: AutoencoderKL, precision: Precision) -> None:
        super().__init__()
        self.scale = 1 / autoencoder.config.scaling_factor
        self.shift = autoencoder.config.shift_factor or 0.0
        self.dtype = precision.dtype("decoder")
        self.post_quant = copy.deepcopy(autoencoder.post_quant_conv)
        self.decoder = copy.deepcopy(autoencoder.decoder).to(self.dtype)
        if self.post_quant is not None:
            self.post_quant.to(self.dtype)
        if self.dtype != torch.float32:
            _keep_statistics_fp32(self.decoder)

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        z = (self.scale * latents + self.shift).to(self.dtype) if self.shift else (self.scale * latents).to(self.dtype)
        if self.post_quant is not None:
            z = self.post_quant(z)
        decoded = self.decoder(z).float()  # (B, 3, H, W)
        images = torch.round((decoded / 2 + 0.5).clamp(0, 1) * 255).permute(0, 2, 3, 1)
        return images.to(torch.uint8), decoded  # the cast comes last: TensorRT has uint8 at the border only


class _GroupNorm(nn.Module):
    """Group normalization with FP32 statistics inside an FP16 network."""

    def __init__(self, original: nn.GroupNorm) -> None:
        super().__init__()
        self.groups, self.eps = original.num_groups, original.eps
        self.weight = nn.Parameter(original.weight.detach().float(), requires_grad=False)
        self.bias = nn.Parameter(original.bias.detach().float(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.group_norm(x.float(), self.groups, self.weight, self.bias, self.eps).to(x.dtype)


def _keep_statistics_fp32(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.GroupNorm):
            setattr(module, name, _GroupNorm(child))
        else:
            _keep_statistics_fp32(child)
