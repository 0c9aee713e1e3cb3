"""Guided sampling with diffusers' transformer and scheduler, each image alone: what the pipeline is compared with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dit_runtime import Pipeline
from support.optional import diffusers, torch
from support.schedules import SCHEDULER, official_timesteps

NULL = 10  # the tiny model's number of classes
Scale = Callable[[float], float]


@dataclass(frozen=True)
class Wanted:
    """An image: its labels' weights, s as a function of the noise time τ, the class guided away from, given noise."""

    labels: Mapping[int, float]
    seed: int
    scale: Scale = field(default=lambda _: 1.0)
    against: int = NULL
    noise: torch.Tensor | None = None


def constant(s: float) -> Scale:
    return lambda _: s


def within(low: float, high: float, scale: Scale) -> Scale:
    return lambda tau: scale(tau) if low <= tau <= high else 1.0


def reference_latents(
    transformer: Any, wanted: Sequence[Wanted], steps: int, sampler: str = "ddim", eta: float = 0.0, guided: int = 4
) -> np.ndarray:
    """The last latents of diffusers' modules, ``guided`` channels guided; the rest and v are the first label's."""
    finished = []
    for image in wanted:
        if sampler == "ddim":
            scheduler, options = diffusers.DDIMScheduler(**SCHEDULER), {"eta": eta}
            scheduler.set_timesteps(steps)
        else:
            scheduler, options = diffusers.DDPMScheduler(**SCHEDULER, variance_type="learned_range"), {}
            scheduler.set_timesteps(timesteps=official_timesteps(steps)[::-1])
        generator = torch.Generator().manual_seed(image.seed)
        z = torch.randn(1, 4, 8, 8, generator=generator) if image.noise is None else image.noise
        for t in scheduler.timesteps:
            with torch.inference_mode():
                null, *predictions = (
                    transformer(z, timestep=t[None], class_labels=torch.tensor([label])).sample
                    for label in (image.against, *image.labels)
                )
            difference = sum(
                weight * (found - null) for weight, found in zip(image.labels.values(), predictions, strict=True)
            )
            e = (null + image.scale(t.item() / 999) * difference)[:, :guided]
            e = torch.cat([e, predictions[0][:, guided:4]], dim=1)
            output = e if sampler == "ddim" else torch.cat([e, predictions[0][:, 4:]], dim=1)
            z = scheduler.step(output, t, z, generator=generator, **options).prev_sample
        finished.append(z.numpy()[0])
    return np.stack(finished)


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    assert found.shape == expected.shape
    assert np.isfinite(found).all()
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@contextmanager
def recorded(pipe: Pipeline) -> Iterator[list[tuple[int, int]]]:
    """(branches, images) of each call of the step while the block runs."""
    step, calls = pipe.engine.session("step"), []
    original = step.run
    step.run = lambda inputs, outputs: calls.append(inputs["rows"].shape) or original(inputs, outputs)
    try:
        yield calls
    finally:
        del step.run
