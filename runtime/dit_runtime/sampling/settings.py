"""The words of sampling: the keyword arguments of ``Pipeline``, and the keys that its callers pass on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

from dit_runtime.samplers.noise import Float32
from dit_runtime.samplers.schedule import Schedule
from dit_runtime.sampling.image_to_image import Start


class Settings(TypedDict, total=False):
    """How images are sampled. What is left out, or None, has its default: the bundle's for the first three.

    Keys:
        steps: sampling steps.
        sampler: a name of ``dit_runtime.SAMPLERS``, or a ``Schedule`` of your own (``read_table``, ``flow.flow_sde``).
        guidance: classifier-free guidance scale s, one for all images or one each; see ``Guidance``.
        spacing: which timesteps are visited; see ``schedule_for``.
        eta: DDIM's stochasticity, 0 to 1.
        guidance_interval: noise times (LO, HI) outside which nothing is guided, at half the cost.
        guidance_schedule: ``constant``, ``linear`` or ``cosine``.
        negative_label: a class to guide away from, in place of the null class.
        noise: float32 ``[N, C, H, W]`` in place of the seeds' first draw; later draws are then the seeds' from their
            first, as when diffusers is given latents.
        noise_device: ``cpu`` or ``cuda``: whose PyTorch generator the seeds stand for.
        noise_dtype: ``float32`` or ``float16``: the dtype PyTorch draws in.
        cuda_threads: resident threads of the CUDA device, for latents of more than 4096 values; see ``CudaNoise``.
        init: images to start from, one for all or one each: uint8 ``[H, W, 3]`` or ``[N, H, W, 3]`` (``encode``),
            float32 latents ``[C, h, w]`` or ``[N, C, h, w]``, or what ``Pipeline.inits`` made of either.
        strength: the share of the steps that run on ``init``, above 0 to 1, 0.6 by default: the rest are left out, and
            as much noise is added as they would have left. Counted as in diffusers, see ``count_skipped_steps``.
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
