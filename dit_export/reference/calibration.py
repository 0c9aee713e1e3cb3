"""Calibration: how large the inputs of the linear layers become on the checkpoint's own sampling trajectories.

The FP32 reference runs guided trajectories of its own sampler, for images of all classes or of some spread over them,
from fixed seeds, at each size that is exported. The largest |x| of each channel of a layer's input is kept for each
timestep; nothing else is held. A scale maps the largest of all sizes and timesteps to 127.

Some channels are far larger than others. Factors even them out, half in the input and half in the weight (SmoothQuant,
Xiao et al. 2022, arXiv 2211.10438, with α 0.5), each rounded to a power of 2. ``benchmarks/int8_ranges.py`` says what
this and other choices are worth.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from dit_export.checkpoints.checkpoint import Checkpoint
from dit_export.reference.emulation import LEAST_SCALE, IntegerWeight, linear_modules
from dit_export.reference.pipeline import Reference
from dit_export.reference.record_settings import CHEAP_GMAC, GUIDANCE, CalibrationRequest
from dit_runtime.bundle.macs import count_step_gmac
from dit_runtime.bundle.quantization import FACTORS, LARGEST, SMOOTHED, CalibrationSpec
from dit_runtime.core.errors import CheckpointError, ParityError
from dit_runtime.samplers.guidance import is_guidable
from dit_runtime.verify.budget import FP16_MAX
from dit_runtime.verify.verification import trajectories_of

IMAGES = 32  # at most, of a model whose evaluations are cheap
FEW_IMAGES = 4  # of any other
STEPS, FEW_STEPS = 50, 20
WHOLE_STEPS = (1, 2, 4)  # of the trajectories of a model that predicts a whole step
TOGETHER = 8  # images in one evaluation


@dataclass(frozen=True)
class Calibration:
    """The ranges that were found.

    Attributes:
        spec: how they were found.
        timesteps: of the trajectories ``[S]``; the first of two times.
        ranges: of each size, the largest |x| of each layer's input, times its factors, at each timestep ``[L, S]``.
        scales: of each layer's input, by name; numbers that FP16 holds.
        factors: of the input's channels ``[in]``, of the layers that have some, by name; 1 of a layer that is not
            quantized.
    """

    spec: CalibrationSpec
    timesteps: np.ndarray[Any, np.dtype[np.float32]]
    ranges: tuple[np.ndarray[Any, np.dtype[np.float32]], ...]
    scales: dict[str, float]
    factors: dict[str, Tensor]

    def write(self, path: Path, size: int, weights: Mapping[str, IntegerWeight], norms: Tensor) -> None:
        """Write the record of the ranges, and of what tells the quantized layers' integers, in the layers' order.

        ``size``: whose ranges they are, by its place; the record has the largest of all sizes too. ``norms``: of
        ``norms_with_factors``.
        """
        scales = np.array(list(self.scales.values()), np.float32)
        blocks = len({name.split(".")[1] for name in self.factors})
        np.savez(
            path,
            timesteps=self.timesteps,
            ranges=self.ranges[size],
            largest=np.max([each.max(axis=1) for each in self.ranges], axis=0),
            scales=scales,
            factors=torch.cat(list(self.factors.values())).reshape(blocks, -1).numpy(),
            norms=norms.numpy(),
            weight_scales=torch.cat([each.scales for each in weights.values()]).numpy(),
            weight_sums=torch.cat([each.sums for each in weights.values()]).numpy().astype(np.int64),
        )


def spec_for_checkpoint(checkpoint: Checkpoint, request: CalibrationRequest) -> CalibrationSpec:
    """How a checkpoint is calibrated.

    Raises:
        CheckpointError: fewer than two of several classes would be calibrated.
    """
    model, most = checkpoint.model, len(checkpoint.diffusion.betas) or STEPS
    cheap = count_step_gmac(model) <= CHEAP_GMAC
    count = request.images or min(max(model.classes, 2), IMAGES if cheap else FEW_IMAGES)
    labels = torch.linspace(0, max(model.classes - 1, 0), count).long().tolist()
    if len(set(labels)) < 2 <= model.classes:
        raise CheckpointError(
            f"calibration on {count} image, which is one of {model.classes} classes: expected images of 2 classes at "
            "least; leave --calibration-images out for the usual number"
        )
    guidance = checkpoint.defaults.guidance if checkpoint.defaults.guidance > 1 else GUIDANCE
    average = model.times > 1
    return CalibrationSpec(
        seed=request.seed,
        labels=tuple(labels),
        sampler=trajectories_of(checkpoint.diffusion)[0],
        steps=sum(WHOLE_STEPS) if average else min(STEPS if cheap else FEW_STEPS, most),
        guidance=guidance if is_guidable(model, checkpoint.diffusion) else 1.0,
    )


def calibrate(
    references: Iterable[Reference],
    spec: CalibrationSpec,
    quantizes: Callable[[str], bool],
    advance: Callable[[], None],
    end: float = LARGEST,
) -> Calibration:
    """Run the trajectories, and find the range and the scale of each layer's input.

    Args:
        references: the modules in FP32, at each size; they are needed one at a time.
        spec: the trajectories.
        quantizes: whether a layer is quantized, so that it needs a range.
        advance: called after each step of each part of the images, ``count_calibration`` times for each size.
        end: the number that the largest |x| becomes.

    Raises:
        ParityError: a number is not finite.
        CheckpointError: the input of a layer is always 0.
    """
    sizes: list[dict[str, Tensor]] = []
    for reference in references:
        timesteps, found = _measure_inputs(reference, spec, advance)
        sizes.append(found)
        modules, checkpoint = linear_modules(reference), reference.checkpoint.name
    factors, ranges, scales = {}, [], {}
    for name, own in modules.items():
        inputs = [each[name] for each in sizes]
        if quantizes(name) and not any(each.any() for each in inputs):
            raise CheckpointError(
                f"{checkpoint}: the input of {name} is 0 at every timestep of calibration, so it has no scale; keep it "
                f"in FP16 with --keep-fp16 {name}"
            )
        if name.endswith(SMOOTHED):
            weights = torch.stack([module.weight.abs().amax(dim=0) for module in own]).amax(dim=0)
            largest = torch.cat(inputs).amax(dim=0)
            factors[name] = find_factors(largest, weights) if quantizes(name) else torch.ones_like(weights)
            inputs = [each * factors[name] for each in inputs]
        ranges.append(torch.stack([each.amax(dim=1) for each in inputs]))
        scales[name] = _scale_of(float(ranges[-1].max()), end)
    by_size = torch.stack(ranges, dim=1).numpy()  # (sizes, L, S)
    return Calibration(spec, np.array(timesteps, np.float32), tuple(by_size), scales, factors)


def _measure_inputs(
    reference: Reference, spec: CalibrationSpec, advance: Callable[[], None]
) -> tuple[list[float], dict[str, Tensor]]:
    """The timesteps, and the largest |x| of each channel of each layer's input there ``[S, in]``."""
    modules = linear_modules(reference)
    timesteps: list[float] = []
    largest: list[list[Tensor]] = []  # by timestep and layer: [in]
    for first in range(0, len(spec.labels), TOGETHER):
        part = replace(spec, seed=spec.seed + first, labels=spec.labels[first : first + TOGETHER])
        timesteps = []
        for index, (timestep, found) in enumerate(_run_trajectory(reference, part)):
            lost = [name for name, value in zip(modules, found, strict=True) if not value.isfinite().all()]
            if lost:
                raise ParityError(
                    f"{reference.checkpoint.name}: calibration found a number that is not finite at timestep "
                    f"{timestep:g}, first in the input of {lost[0]}; the checkpoint is unusable"
                )
            timesteps.append(timestep)
            if index == len(largest):
                largest.append(found)
            largest[index] = [torch.maximum(*pair) for pair in zip(largest[index], found, strict=True)]
            advance()
    return timesteps, {name: torch.stack(each) for name, each in zip(modules, zip(*largest, strict=True), strict=True)}


def find_factors(inputs: Tensor, weights: Tensor, alpha: float = 0.5) -> Tensor:
    """Powers of 2 that even channels out, from the largest |x| of each channel and of its weights ``[in]``.

    ``alpha``: the share of a channel's size that its factor takes out of the input, as in SmoothQuant.

    A channel that is always 0, or has no weights, has the factor 1 and no part in the others'.
    """
    alive = (inputs > 0) & (weights > 0)
    wanted = (1 - alpha) * weights[alive].log2() - alpha * inputs[alive].log2()  # the factors' logarithms
    factors = torch.ones_like(inputs)
    factors[alive] = torch.exp2(torch.round(wanted - wanted.mean()).clamp(*map(math.log2, FACTORS)))
    return factors


def count_calibration(spec: CalibrationSpec) -> int:
    """How many times ``calibrate`` advances for a size, for the progress bar."""
    return spec.steps * math.ceil(len(spec.labels) / TOGETHER)


def _scale_of(largest: float, end: float) -> float:
    """The scale that maps the largest |x| to ``end``, rounded to FP16."""
    return max(float(np.float16(min(largest / end, FP16_MAX))), LEAST_SCALE)


def _run_trajectory(reference: Reference, spec: CalibrationSpec) -> Iterator[tuple[float, list[Tensor]]]:
    """Each timestep of a trajectory, and the largest |x| of each layer's input there (``_largest_inputs``).

    Of a model of two times there are trajectories of a few steps: what it gets depends on the length of a step.
    """
    generators = [torch.Generator().manual_seed(spec.seed + index) for index in range(len(spec.labels))]
    z = randn_tensor((len(generators), reference.channels, *reference.spec.latent_size), generator=generators)
    labels = torch.tensor(spec.labels)
    for steps in WHOLE_STEPS if reference.spec.times > 1 else (spec.steps,):
        x = z
        for step in reference.loop(spec.sampler, steps, generators):
            with _largest_inputs(reference) as largest:
                e, v = reference.predict(x, step.times_of(len(x)), labels, spec.guidance)
            x, _ = step.advance(e, v, x)
            yield step.time, list(largest.values())


@contextlib.contextmanager
def _largest_inputs(reference: Reference) -> Iterator[dict[str, Tensor]]:
    """Collect the largest |x| of each channel ``[in]`` of each layer's input inside this block; NaN where NaN is."""
    modules = linear_modules(reference)
    largest: dict[str, Tensor] = {}

    def see(name: str, inputs: Any) -> None:
        largest[name] = inputs[0].abs().flatten(0, -2).amax(dim=0)

    hooks = [
        own[0].register_forward_pre_hook(lambda _, inputs, name=name: see(name, inputs))
        for name, own in modules.items()
    ]
    try:
        yield largest
    finally:
        for hook in hooks:
            hook.remove()
