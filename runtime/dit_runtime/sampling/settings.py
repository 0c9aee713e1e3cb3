"""The sampling settings: the keyword arguments of ``Pipeline``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

import numpy as np

from dit_runtime.core.errors import SamplingError
from dit_runtime.samplers.noise import Float32
from dit_runtime.samplers.schedule import Schedule
from dit_runtime.sampling.image_to_image import Start


class Settings(TypedDict, total=False):
    """How to sample images. A key that is absent or None has its default: the bundle's for the first three keys.

    Keys:
        steps: number of sampling steps.
        sampler: a name of ``dit_runtime.SAMPLERS``, or a ``Schedule`` of your own (``read_table``, ``flow.flow_sde``).
        guidance: scale s of classifier-free guidance, one for all images or one for each; see ``Guidance``.
        spacing: how the sampler chooses its timesteps; see ``schedule_for``.
        eta: DDIM's stochasticity, 0 to 1.
        guidance_interval: noise times (LO, HI). Steps outside it are not guided, at half the cost.
        guidance_schedule: ``constant``, ``linear`` or ``cosine``.
        negative_label: a class to guide away from, in place of the null class.
        noise: float32 ``[N, C, H, W]``, used in place of the seeds' first draw. The seeds' first draw is then the noise
            of the first row that draws, as in diffusers when latents are given.
        noise_device: ``cpu`` or ``cuda``: the device whose PyTorch generator the seeds stand for.
        noise_dtype: ``float32`` or ``float16``: the dtype in which PyTorch draws.
        cuda_threads: resident threads of the CUDA device, for latents of more than 4096 values; see ``CudaNoise``.
        init: the start of image-to-image, one for all images or one for each: uint8 images ``[H, W, 3]`` or
            ``[N, H, W, 3]``, float32 latents ``[C, h, w]`` or ``[N, C, h, w]``, or a list from ``Pipeline.inits``.
        strength: the share of the steps to run on ``init``, above 0 to 1, 0.6 by default. The first steps are skipped,
            and ``init`` gets the noise that latents have after them. Counted as in diffusers; see
            ``count_skipped_steps``.
    """

    steps: int | None
    sampler: str | Schedule | None
    spacing: str | None
    eta: float
    guidance: float | Sequence[float] | None
    guidance_interval: tuple[float, float]
    guidance_schedule: str
    negative_label: int | str | None
    noise: Float32 | None
    noise_device: str
    noise_dtype: str
    cuda_threads: int | None
    init: Start | None
    strength: float | None


def check_whole(value: object, what: str) -> int:
    """A whole number of Python or numpy. Raises SamplingError for anything else, such as 2.0, "2" or True."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise SamplingError(f"{what} {value!r:.80}: expected a whole number")
    return int(value)


def scales_from_setting(guidance: object, count: int) -> list[float]:
    """The guidance scale of each of ``count`` images.

    Raises:
        SamplingError: ``guidance`` holds no numbers, or another number of them than one or ``count``.
    """
    try:
        given = np.asarray(guidance, np.float64)
    except (TypeError, ValueError) as error:
        raise SamplingError(f"guidance {guidance!r:.80}: expected one number, or one for each label") from error
    if given.shape not in ((), (count,)):
        raise SamplingError(f"{given.size} guidance scales for {count} labels: expected one per label, or one")
    scales: list[float] = np.broadcast_to(given, count).tolist()
    return scales
