"""The sampling settings: the keyword arguments of ``Pipeline``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

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
