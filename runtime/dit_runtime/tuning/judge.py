"""A table beside every named sampler of as many evaluations: on held-out images, against the teacher's images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from dit_runtime.core.errors import SamplingError
from dit_runtime.pipeline import Pipeline
from dit_runtime.samplers.by_name import DIFFUSION, FLOW, schedule_for
from dit_runtime.samplers.guidance import branches_from_labels
from dit_runtime.samplers.noise import Float32
from dit_runtime.samplers.options import LEVELS as LEVEL_SPACINGS
from dit_runtime.samplers.schedule import Float64, Schedule
from dit_runtime.samplers.spacing import DIFFUSERS, OFFICIAL
from dit_runtime.sampling.requests import ImageRequest
from dit_runtime.verify.metrics import LEVELS

RESAMPLES = 2000
BEST_DB = 100.0  # of images that are the same
SPACINGS = (*DIFFUSERS, *OFFICIAL, *LEVEL_SPACINGS.values())

Images = NDArray[np.uint8]


@dataclass(frozen=True)
class Judged:
    """One sampler's figures on the held-out images.

    Attributes:
        name: of the sampler, with its spacing.
        errors: mean squared error of each image's levels, float64 ``[N]``.
        latent_error: relative L2 of the last latents.
        psnr_db, low_db, high_db: of all images together, and its 95 % interval over images.
        behind_db, behind_low_db, behind_high_db: how far it is behind the table, with the same images resampled for
            both; 0 for the table itself.
    """

    name: str
    errors: Float64
    latent_error: float
    psnr_db: float = 0.0
    low_db: float = 0.0
    high_db: float = 0.0
    behind_db: float = 0.0
    behind_low_db: float = 0.0
    behind_high_db: float = 0.0


@dataclass(frozen=True)
class Judgement:
    """The table's figures, and those of the named samplers, the best first."""

    table: Judged
    named: tuple[Judged, ...]

    @property
    def best(self) -> Judged | None:
        """The best named sampler; None where none takes that many evaluations."""
        return self.named[0] if self.named else None


def named_schedules(pipe: Pipeline, evaluations: int) -> Iterator[tuple[str, Schedule]]:
    """Every deterministic schedule of ``evaluations`` rows that a name and a spacing give, each once."""
    model, diffusion = pipe.manifest.model, pipe.manifest.diffusion
    flow = diffusion.path is not None
    seen = set[bytes]()
    for name in FLOW if flow else DIFFUSION:
        for spacing in (None,) if flow else SPACINGS:
            for steps in {evaluations, evaluations // 2} - {0}:
                try:
                    schedule = schedule_for(name, model, diffusion, steps, spacing=spacing)
                except SamplingError:  # a spacing that the sampler does not have
                    continue
                if len(schedule) != evaluations or schedule.draws_noise.any():
                    continue
                key = schedule.timesteps[schedule.rows].tobytes() + schedule.coefficients.tobytes()
                if key not in seen:
                    seen.add(key)
                    yield (name if flow else f"{name} {schedule.spacing}"), schedule


def judge(
    pipe: Pipeline,
    images: Sequence[ImageRequest],
    expected: Float32,
    schedules: Sequence[tuple[str, Schedule]],
    size: int,
    judged_one: Callable[[], None] = lambda: None,
) -> Judgement:
    """Sample held-out images with the table, which is the first schedule, and with the named ones.

    Args:
        pipe: with the bundle and its engine.
        images: the held-out ones.
        expected: the teacher's last latents of them, float32 ``[N, C, H, W]``.
        schedules: a name and a schedule each.
        size: images in one batch.
        judged_one: called after each schedule.
    """
    wanted = decode_all(pipe, expected, size)
    judged = []
    for name, schedule in schedules:
        try:
            judged.append(_judge_one(pipe, images, expected, wanted, name, schedule, size))
        except SamplingError:
            if not judged:
                raise
            # A named sampler whose latents are not finite with so few steps is no rival.
        judged_one()
    chosen = np.random.default_rng(0).integers(0, len(images), (RESAMPLES, len(images)))
    table = _with_interval(judged[0], judged[0], chosen)
    named = [_with_interval(each, judged[0], chosen) for each in judged[1:]]
    return Judgement(table, tuple(sorted(named, key=lambda each: -each.psnr_db)))


def decode_all(pipe: Pipeline, latents: Float32, size: int) -> Images:
    """Decode latents ``[N, C, h, w]``, ``size`` images at a time."""
    return np.concatenate([pipe.decode(latents[at : at + size]) for at in range(0, len(latents), size)])


def mean_squares(found: Images, expected: Images) -> Float64:
    """Mean squared error of each image ``[N]`` in levels²."""
    difference = found.astype(np.float64) - expected.astype(np.float64)
    return np.asarray(np.mean(difference**2, axis=(1, 2, 3)), np.float64)


def psnr_of(mean_square: Float64 | float) -> Float64:
    """dB from mean squared errors; at most ``BEST_DB``."""
    least = LEVELS**2 / 10 ** (BEST_DB / 10)
    return np.asarray(10 * np.log10(LEVELS**2 / np.maximum(mean_square, least)), np.float64)


def _judge_one(
    pipe: Pipeline,
    images: Sequence[ImageRequest],
    expected: Float32,
    wanted: Images,
    name: str,
    schedule: Schedule,
    size: int,
) -> Judged:
    latents = sample_with(pipe, images, schedule, size)
    distance = np.linalg.norm(latents.astype(np.float64) - expected) / max(float(np.linalg.norm(expected)), 1e-30)
    return Judged(name, mean_squares(decode_all(pipe, latents, size), wanted), float(distance))


def sample_with(pipe: Pipeline, images: Sequence[ImageRequest], schedule: Schedule, size: int) -> Float32:
    """The last latents ``[N, C, H, W]`` of the images with another schedule.

    Raises:
        SamplingError: latents are not finite.
    """
    model, diffusion = pipe.manifest.model, pipe.manifest.diffusion
    changed = [
        replace(
            image,
            schedule=schedule,
            branches=branches_from_labels(
                image.labels, image.guidance, schedule, model, diffusion, image.negative_label
            ),
        )
        for image in images
    ]
    return np.concatenate([pipe.sample_latents(changed[at : at + size]) for at in range(0, len(changed), size)])


def _with_interval(judged: Judged, table: Judged, chosen: NDArray[np.int64]) -> Judged:
    resampled = psnr_of(judged.errors[chosen].mean(axis=1))
    ahead = psnr_of(table.errors[chosen].mean(axis=1)) - resampled
    low, high = np.percentile(resampled, [2.5, 97.5])
    behind_low, behind_high = np.percentile(ahead, [2.5, 97.5])
    level = float(psnr_of(float(judged.errors.mean())))
    behind = float(psnr_of(float(table.errors.mean()))) - level
    return replace(
        judged,
        psnr_db=level,
        low_db=float(low),
        high_db=float(high),
        behind_db=behind,
        behind_low_db=float(behind_low),
        behind_high_db=float(behind_high),
    )
