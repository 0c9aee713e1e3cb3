"""What choices of an INT8 bundle's scales are worth: images of PyTorch's own INT8 against those of the FP32 model.

    python benchmarks/int8_ranges.py --output benchmarks/int8_ranges.json

On the Fashion-MNIST model, or the checkpoint that is named. Calibration is on one image of each of ten classes, 50
steps of DDIM at guidance 1.5; the judged images have other seeds, the same sampler and scale. Choices: the end of a
layer's range (its largest |x|, a percentile, the least mean squared error), one scale for a whole weight, factors that
even channels out in some layers (rounded to powers of 2), and one kind of layer left out.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.utils.torch_utils import randn_tensor
from dit_export.checkpoints.sources import Source, load_checkpoint
from dit_export.reference.calibration import find_factors
from dit_export.reference.emulation import linear_modules
from dit_export.reference.pipeline import Reference
from torch import Tensor, nn

from dit_runtime.core.environment import describe_environment
from dit_runtime.core.replace import replace_file
from dit_runtime.verify.metrics import psnr, relative_l2

DEMO = Path(__file__).parent / "fashion_mnist" / "checkpoint"
STEPS, GUIDANCE, CALIBRATED, JUDGED = 50, 1.5, 10, 20
LEAST, MOST, BINS = -24.0, 12.0, 2304  # of log₂|x|, and the number of bins between

Scale = Callable[[str], float]


class Inputs:
    """The largest |x| of each channel of each layer's input, and how often each |x| is there."""

    def __init__(self) -> None:
        self.largest: dict[str, Tensor] = {}
        self.counts: dict[str, Tensor] = {}
        self.centers = torch.exp2(LEAST + (torch.arange(BINS) + 0.5) * (MOST - LEAST) / BINS)

    def see(self, name: str, x: Tensor) -> None:
        x = x.abs()
        found, counts = x.flatten(0, -2).amax(dim=0), torch.histc(x.clamp(min=2**LEAST).log2(), BINS, LEAST, MOST)
        self.largest[name] = torch.maximum(self.largest.get(name, found), found)
        self.counts[name] = self.counts.get(name, torch.zeros(BINS)) + counts

    def from_largest(self, name: str) -> float:
        return float(self.largest[name].max()) / 127

    def from_percentile(self, share: float, name: str) -> float:
        below = self.counts[name].cumsum(0) / self.counts[name].sum()
        return float(self.centers[min(int((below < share).sum()), BINS - 1)]) / 127

    def from_error(self, name: str) -> float:
        """The scale with the least mean squared error of rounding and clipping."""
        counts, x = self.counts[name].double(), self.centers
        scales = [share * self.from_largest(name) for share in np.linspace(0.2, 1, 81)]

        def error(scale: float) -> float:
            rounded = torch.minimum(torch.tensor(scale**2 / 12), x**2)
            return float((counts * torch.where(x > 127 * scale, (x - 127 * scale) ** 2, rounded)).sum())

        return min(scales, key=error)


def sample(reference: Reference, seed: int, count: int) -> Tensor:
    """The last latents of ``count`` images."""
    generators = [torch.Generator().manual_seed(seed + index) for index in range(count)]
    z = randn_tensor((count, reference.channels, *reference.spec.latent_size), generator=generators)
    labels = torch.arange(count) % reference.classes
    for step in reference.loop("ddim", STEPS, generators):
        z, _ = step.advance(*reference.predict(z, torch.full((count,), step.t), labels, GUIDANCE), z)
    return z


def compute(module: nn.Linear, integers: Tensor, by_row: Tensor, scale: float, factor: Tensor, x: Tensor) -> Tensor:
    rounded = torch.round(x * factor / scale).clamp(-128, 127)
    return F.linear(rounded, integers) * (by_row * scale) + module.bias


def quantize(
    modules: Mapping[str, list[nn.Linear]], inputs: Inputs, scale: Scale, even: tuple[str, ...], per_row: bool
) -> None:
    """Make the layers compute in INT8; ``even`` are the kinds of layers that have factors."""
    for name, own in modules.items():
        factor = torch.ones(own[0].in_features)
        at = scale(name)
        if name.endswith(even):
            factor = find_factors(inputs.largest[name], torch.stack([m.weight.abs().amax(dim=0) for m in own]).amax(0))
            at = float((inputs.largest[name] * factor).max()) / 127
        for module in own:
            weight = module.weight / factor
            by_row = (weight.abs().amax(dim=1) if per_row else weight.abs().max().expand(len(weight))) / 127
            integers = torch.round(weight / by_row[:, None]).clamp(-127, 127)
            module.forward = partial(compute, module, integers, by_row, at, factor)  # type: ignore[method-assign]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", default=str(DEMO))
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "int8_ranges.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    reference = Reference(load_checkpoint(Source(args.checkpoint)))
    modules, inputs = linear_modules(reference), Inputs()
    originals = {module: module.forward for own in modules.values() for module in own}
    kinds = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    largest = inputs.from_largest
    choices: dict[str, tuple[Scale, tuple[str, ...], bool, tuple[str, ...]]] = {
        "largest |x|": (largest, ("-",), True, kinds),
        **{
            f"percentile {100 * p:g}": (partial(inputs.from_percentile, p), ("-",), True, kinds)
            for p in (0.9999, 0.99999)
        },
        "least squared error": (inputs.from_error, ("-",), True, kinds),
        "one scale for a weight": (largest, ("-",), False, kinds),
        **{f"factors in {kind}": (largest, (kind,), True, kinds) for kind in kinds},
        "factors in attn.qkv, mlp.fc1": (largest, ("attn.qkv", "mlp.fc1"), True, kinds),
        "factors in all": (largest, kinds, True, kinds),
        **{f"FP32 in {kind}": (largest, ("-",), True, tuple(k for k in kinds if k != kind)) for kind in kinds},
    }
    found = {}
    with torch.inference_mode():
        hooks = [
            own[0].register_forward_pre_hook(lambda _, x, name=name: inputs.see(name, x[0]))
            for name, own in modules.items()
        ]
        sample(reference, 0, CALIBRATED)
        for hook in hooks:
            hook.remove()
        wanted = sample(reference, 1000, JUDGED)
        images = reference.images_from_decoded(reference.decode(wanted))
        for choice, (scale, even, per_row, quantized) in choices.items():
            for module, original in originals.items():
                module.forward = original
            chosen = {name: own for name, own in modules.items() if name.endswith(quantized)}
            quantize(chosen, inputs, scale, even, per_row)
            latents = sample(reference, 1000, JUDGED)
            made = reference.images_from_decoded(reference.decode(latents))
            levels = [psnr(one, other) for one, other in zip(made, images, strict=True)]
            error = relative_l2(latents.numpy(), wanted.numpy())
            found[choice] = {
                "latents": round(error, 4),
                "psnr_mean": round(float(np.mean(levels)), 2),
                "psnr_least": round(min(levels), 2),
            }
            print(
                f"{choice:<32} latents {error:.4f}  PSNR {np.mean(levels):.2f} dB, least {min(levels):.2f}", flush=True
            )
    with replace_file(args.output) as file:
        content = {"images": JUDGED, "environment": describe_environment(), "choices": found}
        file.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
