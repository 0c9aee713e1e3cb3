"""Classifier-free guidance as numbers: the weight of each branch in each row of a schedule.

With the null prediction ε_∅ and the conditional predictions ε_i of weight w_i, guidance of scale s is

    e = ε_∅ + s·Σᵢ wᵢ·(ε_i − ε_∅)

(Ho & Salimans 2022, arXiv 2207.12598, for one label; Liu et al. 2022, arXiv 2206.01714, equation 11, for several
labels). The step graph sums the branches with these weights. Branch 0 is the first label's; the variance and the
channels that are not guided come from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dit_runtime.bundle.manifest import NOISE_AT_1, DiffusionSpec, ModelSpec
from dit_runtime.core.errors import SamplingError
from dit_runtime.samplers.noise import Float32
from dit_runtime.samplers.schedule import LARGEST, Float64, Schedule

Int32 = NDArray[np.int32]

SHAPES = ("constant", "linear", "cosine")
DECIMALS = 6  # of a velocity model's noise time: a time of 0.7 is a little less in float32, and belongs to 0.7 to 1


@dataclass(frozen=True)
class Guidance:
    """How strongly an image is guided, at which noise times, and how the scale changes over them.

    The noise time τ is 1 at pure noise and 0 at the image: t/(T−1) with T training timesteps; in a flow model 1 − t, or
    t where its time is ``noise-at-1``.

    Attributes:
        scale: s. With 1 there is no guidance, at half the cost. A scale below 1 follows the formula too, and a constant
            0 is unconditional.
        interval: noise times [LO, HI] with guidance; elsewhere s is 1 (Kynkäänniemi et al. 2024, arXiv 2404.07724).
        shape: s over τ is ``constant``, or 1 + (s−1)·2(1−τ) (``linear``), or 1 + (s−1)·(1+cos πτ) (``cosine``). The
            last two rise towards the image and have the same average (Wang et al. 2024, arXiv 2404.13040).
    """

    scale: float = 1.0
    interval: tuple[float, float] = (0.0, 1.0)
    shape: str = "constant"

    def __post_init__(self) -> None:
        if not 0 <= self.scale <= LARGEST:
            raise SamplingError(f"guidance {self.scale}: expected a number from 0 to {LARGEST:.0e}; 1 is no guidance")
        low, high = self.interval
        if not 0 <= low <= high <= 1:
            raise SamplingError(
                f"guidance interval {low:g} to {high:g}: expected 0 ≤ LO ≤ HI ≤ 1; 1 is pure noise, 0 the image"
            )
        if self.shape not in SHAPES:
            raise SamplingError(f"guidance schedule {self.shape!r} is unknown; choose one of {', '.join(SHAPES)}")

    def scales(self, noise_times: Float64) -> Float64:
        """s at noise times ``[T]``."""
        evenness = {
            "constant": np.ones_like(noise_times),
            "linear": 2 * (1 - noise_times),
            "cosine": 1 + np.cos(np.pi * noise_times),
        }
        scales = 1 + (self.scale - 1) * evenness[self.shape]
        low, high = self.interval
        return np.where((low <= noise_times) & (noise_times <= high), scales, 1.0)


@dataclass(frozen=True)
class Branches:
    """An image's guidance, row by row.

    Attributes:
        labels: int32 ``[G]``, the condition of each branch.
        weights: float32 ``[T, G, C]``.
        needed: int ``[T]``, how many branches, counted from the first, have a weight in the row; the engine need not
            run the others.
    """

    labels: Int32
    weights: Float32
    needed: NDArray[np.int64]

    def pad_to(self, needed: NDArray[np.int64]) -> Branches:
        """The same branches, with others of no weight so that the engine runs ``needed [T]``, at least as many."""
        more = int(needed.max()) - len(self.labels)
        return Branches(
            np.pad(self.labels, (0, more), mode="edge"), np.pad(self.weights, ((0, 0), (0, more), (0, 0))), needed
        )


def noise_times_of(schedule: Schedule, diffusion: DiffusionSpec) -> Float64:
    """The noise time of each row ``[T]``, for guidance: 1 at pure noise, 0 at the image.

    With the time ``noise-at-1`` an inner evaluation has the noise time at which its step starts, since REPA decides
    once a step whether it is guided.
    """
    times = schedule.times[:, 0].astype(np.float64)
    if diffusion.path is None:
        return times / max(len(diffusion.betas) - 1, 1)
    times = np.round(times, DECIMALS)
    if diffusion.time == NOISE_AT_1:
        starts = np.append(True, schedule.completes_step[:-1])
        return np.asarray(times[np.maximum.accumulate(np.where(starts, np.arange(len(times)), 0))])
    return np.asarray(np.round(1 - times, DECIMALS))


def is_guidable(model: ModelSpec, diffusion: DiffusionSpec) -> bool:
    """Whether images may be guided away from the null class."""
    return model.has_null and not diffusion.guidance_inside


def check_guidance(guidance: Guidance, labels: Mapping[int, float], diffusion: DiffusionSpec) -> None:
    """Check that a model without a choice of guidance is not guided.

    Raises:
        SamplingError: guidance is inside the model's weights, and a scale or weights of labels would add to it.
    """
    if diffusion.guidance_inside and (guidance.scale != 1 or abs(sum(labels.values()) - 1) > 1e-9):
        raise SamplingError(
            f"{_describe_guidance(guidance, labels)}: guidance was trained into this model's weights, where no scale "
            "can change it; use guidance 1 and label weights that sum to 1"
        )


def branches_from_labels(
    labels: Mapping[int, float],
    guidance: Guidance,
    schedule: Schedule,
    model: ModelSpec,
    diffusion: DiffusionSpec,
    negative: int | None = None,
) -> Branches:
    """The branches of one image.

    Args:
        labels: weight of each class number; the variance and the channels without guidance are the first class's.
        guidance: scale, interval and shape.
        schedule: of the image's sampler.
        model: its null class and latent channels are used.
        diffusion: says which channels are guided.
        negative: a class to guide away from, in place of the null class.

    Raises:
        SamplingError: scale 0, where the sampler needs the variance, or not all channels are guided; or the null class
            is needed, and the model has none.
    """
    null = model.null_class if negative is None else negative
    guided = diffusion.guidance_channels
    scales = guidance.scales(noise_times_of(schedule, diffusion))
    count, channels = len(labels), model.latent_channels
    if guidance.scale == 0:
        if schedule.uses_variance or guided < channels:
            raise SamplingError(
                f"guidance 0 with sampler {schedule.sampler}: the variance and the channels that are not guided come "
                "from the conditional branch, which guidance 0 leaves out; use a small guidance, or sampler ddim"
            )
        if not (scales != 0).any() and (model.has_null or negative is not None):
            alone = np.ones((len(scales), 1, channels), np.float32)
            return Branches(np.array([null], np.int32), alone, np.ones(len(scales), np.int64))
    weights = np.zeros((len(scales), count + 1, channels))
    weights[:, 0, guided:] = 1
    for index, weight in enumerate(labels.values()):
        weights[:, index, :guided] = (scales * weight)[:, None]
    weights[:, count, :guided] = (1 - scales * sum(labels.values()))[:, None]
    # Weights such as 0.7 + 0.3 sum to 1 up to rounding, which must not cost a branch.
    weights[np.abs(weights) < 1e-12] = 0
    used = (weights != 0).any(axis=2)
    if used[:, count].any() and negative is None and not model.has_null:
        raise SamplingError(_no_null(guidance, labels))
    needed = np.where(used[:, count], count + 1, count)
    most = int(needed.max())
    return Branches(np.array([*labels, null][:most], np.int32), weights[:, :most].astype(np.float32), needed)


def _no_null(guidance: Guidance, labels: Mapping[int, float]) -> str:
    return (
        f"{_describe_guidance(guidance, labels)}: this model has no null class to guide away from; use guidance 1 and "
        "label weights that sum to 1, or name a class to guide away from (--negative-label)"
    )


def _describe_guidance(guidance: Guidance, labels: Mapping[int, float]) -> str:
    if guidance.scale != 1:
        return f"guidance {guidance.scale:g}"
    return f"label weights that sum to {sum(labels.values()):g}"


def guidance_weights(scale: float, batch: int, channels: int, guided_channels: int) -> Float32:
    """Weights ``[G, B, C]`` of a batch with one scale, and one label per image: branch 0 conditional, branch 1 null."""
    if scale == 1:
        return np.ones((1, batch, channels), np.float32)
    weights = np.zeros((2, batch, channels), np.float32)
    weights[0] = 1
    weights[0, :, :guided_channels] = scale
    weights[1, :, :guided_channels] = 1 - scale
    return weights


def branch_rows(labels: Int32, null_class: int, branches: int) -> tuple[Int32, Int32]:
    """The distinct conditions ``[K]`` of labels ``[B]``, and the index in them for each branch and image ``[G, B]``."""
    wanted = labels[None] if branches == 1 else np.stack([labels, np.full_like(labels, null_class)])
    conditions, rows = np.unique(wanted, return_inverse=True)
    return conditions.astype(np.int32), rows.reshape(wanted.shape).astype(np.int32)
