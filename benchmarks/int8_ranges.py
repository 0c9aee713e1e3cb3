"""What choices of an INT8 bundle's scales are worth: images of PyTorch's own INT8 against those of the FP32 model.

    python benchmarks/int8_ranges.py --output benchmarks/int8_ranges.json

On the Fashion-MNIST model, or the checkpoint that is named. Calibration is on one image of each of ten classes, 50
steps of DDIM at guidance 1.5. Two sets of images are judged, of other seeds, the same sampler and scale. Choices are
factors that even channels out in some layers (powers of 2, for some α of SmoothQuant), the end of a layer's range (its
largest |x|, a percentile, the least mean squared error), a range for each group of timesteps, one scale for a whole
weight, and one kind of layer left out. The prediction's error is from the FP32 model's own latents, over all timesteps.
The images' differences are in pairs from the choice that bundles have, with the 95 % interval of their mean.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.utils.torch_utils import randn_tensor
from dit_export.checkpoints.sources import Source, load_checkpoint
from dit_export.reference.calibration import find_factors
from dit_export.reference.emulation import linear_modules
from dit_export.reference.pipeline import Reference
from torch import Tensor, nn

from dit_runtime.bundle.quantization import SMOOTHED
from dit_runtime.core.environment import describe_environment
from dit_runtime.core.replace import replace_file
from dit_runtime.verify.metrics import psnr, relative_l2

DEMO = Path(__file__).parent / "fashion_mnist" / "checkpoint"
STEPS, GUIDANCE, CALIBRATED = 50, 1.5, 10
SETS, JUDGED, TOGETHER = (1000, 2000), 60, 20  # seeds of the first images, images of a set, in one evaluation
LEAST, MOST, OCTAVE = -24, 12, 32  # of log₂|x|, and the bins of an octave
BINS = (MOST - LEAST) * OCTAVE
KINDS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")


@dataclass(frozen=True)
class Choice:
    """How the layers are quantized.

    Attributes:
        factors: the kinds of layers that have factors.
        alpha: the share of a channel's size that its factor takes out of the input.
        end: of a range: ``largest``, ``error`` or a share of the numbers.
        groups: of timesteps, each of which has a range.
        per_row: whether each row of a weight has a scale, or the weight has one.
        kinds: of layers that are quantized.
    """

    factors: tuple[str, ...] = ()
    alpha: float = 0.5
    end: str | float = "largest"
    groups: int = 1
    per_row: bool = True
    kinds: tuple[str, ...] = KINDS


class Inputs:
    """The largest |x| of each channel of each layer's input at each timestep, and how often each |x| is there."""

    def __init__(self) -> None:
        self.largest: dict[str, list[Tensor]] = {}  # by timestep [in]
        self.counts: dict[str, Tensor] = {}  # [in, BINS]

    def see(self, name: str, x: Tensor) -> None:
        x = x.abs().flatten(0, -2)
        self.largest.setdefault(name, []).append(x.amax(dim=0))
        bins = ((x.clamp(min=2.0**LEAST).log2() - LEAST) * OCTAVE).long().clamp(max=BINS - 1)
        places = (bins + torch.arange(x.shape[1]) * BINS).flatten()
        counts = torch.bincount(places, minlength=x.shape[1] * BINS).view(-1, BINS)
        self.counts[name] = self.counts.get(name, torch.zeros_like(counts)) + counts

    def scale(self, name: str, factor: Tensor, end: str | float) -> float:
        """The scale of a layer's input with factors."""
        largest = float((torch.stack(self.largest[name]).amax(dim=0) * factor).max()) / 127
        if end == "largest":
            return largest
        counts, centers = (
            self._count_with_factors(name, factor),
            torch.exp2(LEAST + (torch.arange(BINS) + 0.5) / OCTAVE),
        )
        if isinstance(end, float):
            below = counts.cumsum(0) / counts.sum()
            return min(float(centers[min(int((below < end).sum()), BINS - 1)]) / 127, largest)

        def error(scale: float) -> float:
            rounded = torch.minimum(torch.tensor(scale**2 / 12), centers**2)
            clipped = (centers - 127 * scale) ** 2
            return float((counts * torch.where(centers > 127 * scale, clipped, rounded)).sum())

        return min((share * largest for share in np.linspace(0.2, 1, 81).tolist()), key=error)

    def scales_of_groups(self, name: str, factor: Tensor, groups: int) -> list[float]:
        """The scale at each step, of which each group has the same."""
        found = [float((each * factor).max()) / 127 for each in self.largest[name]]
        return [max(part) for part in np.array_split(found, groups) for _ in part]

    def _count_with_factors(self, name: str, factor: Tensor) -> Tensor:
        """How often each |x · factor| is there ``[BINS]``; a power of 2 moves a channel by whole octaves."""
        moves = (factor.log2() * OCTAVE).long()
        counts = torch.zeros(BINS, dtype=torch.float64)
        for move in moves.unique():
            places = (torch.arange(BINS) + move).clamp(0, BINS - 1)
            counts.index_add_(0, places, self.counts[name][moves == move].sum(dim=0).double())
        return counts


class Run:
    """The model, and the step that its layers are at."""

    def __init__(self, reference: Reference) -> None:
        self.reference, self.step = reference, 0

    def sample(self, seed: int, count: int) -> list[tuple[Tensor, float, Tensor, Tensor]]:
        """Latents, timestep, labels and guided prediction of each step of ``count`` images, and their last latents."""
        generators = [torch.Generator().manual_seed(seed + index) for index in range(count)]
        z = randn_tensor((count, self.reference.channels, *self.reference.spec.latent_size), generator=generators)
        labels, seen = torch.arange(count) % self.reference.classes, []
        loop = self.reference.loop("ddim", STEPS, generators)
        for self.step, step in enumerate(loop):
            e, v = self.reference.predict(z, torch.full((count,), step.t), labels, GUIDANCE)
            seen.append((z, float(step.t), labels, e))
            z, _ = step.advance(e, v, z)
        return [*seen, (z, 0.0, labels, z)]

    def sample_set(self, seed: int) -> Tensor:
        """The last latents of a judged set."""
        return torch.cat([self.sample(first, TOGETHER)[-1][0] for first in range(seed, seed + JUDGED, TOGETHER)])

    def measure_prediction(self, recorded: list[tuple[Tensor, float, Tensor, Tensor]]) -> float:
        """The relative error of the guided prediction from recorded latents: the root of its mean square."""
        errors = []
        for self.step, (z, t, labels, wanted) in enumerate(recorded[:-1]):
            e, _ = self.reference.predict(z, torch.full((len(z),), t), labels, GUIDANCE)
            errors.append(relative_l2(e.numpy(), wanted.numpy()))
        return float(np.sqrt(np.mean(np.square(errors))))

    def compute(
        self, module: nn.Linear, integers: Tensor, by_row: Tensor, scales: list[float], factor: Tensor, x: Tensor
    ) -> Tensor:
        scale = scales[self.step]
        return F.linear(torch.round(x * factor / scale).clamp(-128, 127), integers) * (by_row * scale) + module.bias

    def quantize(self, modules: Mapping[str, list[nn.Linear]], inputs: Inputs, choice: Choice) -> None:
        for name, own in modules.items():
            if not name.endswith(choice.kinds):
                continue
            factor = torch.ones(own[0].in_features)
            if choice.factors and name.endswith(choice.factors):
                weights = torch.stack([module.weight.abs().amax(dim=0) for module in own]).amax(dim=0)
                factor = find_factors(torch.stack(inputs.largest[name]).amax(dim=0), weights, choice.alpha)
            scales = [inputs.scale(name, factor, choice.end)] * STEPS
            if choice.groups > 1:
                scales = inputs.scales_of_groups(name, factor, choice.groups)
            for module in own:
                weight = module.weight / factor
                largest = weight.abs().amax(dim=1) if choice.per_row else weight.abs().max().expand(len(weight))
                by_row = largest / 127
                integers = torch.round(weight / by_row[:, None]).clamp(-127, 127)
                module.forward = partial(self.compute, module, integers, by_row, scales, factor)  # type: ignore[method-assign]


def list_choices() -> dict[str, Choice]:
    """The choices by name; the first is that of bundles."""
    built = Choice(tuple(kind for kind in KINDS if kind in SMOOTHED))
    others = {kind: tuple(each for each in KINDS if each != kind) for kind in KINDS}
    return {
        "as built": built,
        "no factors": Choice(),
        "factors in mlp.fc2": Choice(("mlp.fc2",)),
        **{f"factors in {kind}, mlp.fc2": Choice((kind, "mlp.fc2")) for kind in KINDS[:3]},
        "factors in all": Choice(KINDS),
        **{f"as built, α {alpha}": replace(built, alpha=alpha) for alpha in (0.35, 0.65)},
        **{f"as built, percentile {100 * share:g}": replace(built, end=share) for share in (0.99999, 0.999999)},
        "as built, least squared error": replace(built, end="error"),
        "no factors, percentile 99.999": Choice(end=0.99999),
        "no factors, least squared error": Choice(end="error"),
        **{f"as built, {groups} groups of timesteps": replace(built, groups=groups) for groups in (2, 4)},
        "as built, one scale for a weight": replace(built, per_row=False),
        **{f"as built, FP32 in {kind}": replace(built, kinds=kept) for kind, kept in others.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", default=str(DEMO))
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "int8_ranges.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    reference = Reference(load_checkpoint(Source(args.checkpoint)))
    modules, inputs, run = linear_modules(reference), Inputs(), Run(reference)
    originals = {module: module.forward for own in modules.values() for module in own}
    found: dict[str, Any] = {}
    with torch.inference_mode():
        hooks = [
            own[0].register_forward_pre_hook(lambda _, x, name=name: inputs.see(name, x[0]))
            for name, own in modules.items()
        ]
        run.sample(0, CALIBRATED)
        for hook in hooks:
            hook.remove()
        wanted = {seed: run.sample_set(seed) for seed in SETS}
        recorded = {seed: run.sample(seed, TOGETHER) for seed in SETS}
        images = {seed: reference.images_from_decoded(reference.decode(each)) for seed, each in wanted.items()}
        levels: dict[int, list[float]] = {}
        for name, choice in list_choices().items():
            for module, original in originals.items():
                module.forward = original
            run.quantize(modules, inputs, choice)
            found[name] = []
            for seed in SETS:
                latents = run.sample_set(seed)
                made = reference.images_from_decoded(reference.decode(latents))
                own = [psnr(one, other) for one, other in zip(made, images[seed], strict=True)]
                more = np.subtract(own, levels.setdefault(seed, own))
                found[name].append(
                    {
                        "prediction": round(run.measure_prediction(recorded[seed]), 4),
                        "latents": round(relative_l2(latents.numpy(), wanted[seed].numpy()), 4),
                        "psnr_mean": round(float(np.mean(own)), 2),
                        "psnr_least": round(min(own), 2),
                        "psnr_more": round(float(more.mean()), 2),
                        "psnr_more_interval": round(1.96 * float(more.std(ddof=1)) / len(more) ** 0.5, 2),
                    }
                )
                print(f"{name:<34}", *(f"{key} {value:g}" for key, value in found[name][-1].items()), flush=True)
    with replace_file(args.output) as file:
        content = {"sets": len(SETS), "images": JUDGED, "environment": describe_environment(), "choices": found}
        file.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
