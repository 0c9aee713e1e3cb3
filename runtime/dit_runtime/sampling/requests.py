"""One image to be made, checked: what it shows, how it is sampled, and the noise it begins with."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dit_runtime.samplers.guidance import Branches, Guidance
from dit_runtime.samplers.noise import CudaNoise, Float32, Noise, TorchNoise
from dit_runtime.samplers.schedule import Schedule
from dit_runtime.sampling.image_to_image import Init


@dataclass(frozen=True, eq=False)
class ImageRequest:
    """One image to be made, checked.

    Attributes:
        labels: weight of each class number.
        seed: of its own stream of noise.
        schedule: its sampler; with ``init`` only the steps that run.
        guidance: scale, interval and shape.
        negative_label: class number in place of the null class.
        branches: what labels and guidance come to, row by row.
        noise: float32 ``[C, H, W]`` in place of the stream's first draw.
        noise_device: ``cpu`` or ``cuda``: whose PyTorch generator the seed stands for.
        noise_dtype: ``float32`` or ``float16``: the dtype PyTorch draws in.
        cuda_threads: resident threads of the CUDA device, for draws that depend on it (``CudaNoise``).
        init: what it starts from, in image-to-image.
        strength: the share of the steps that it was asked to run, for the record.
    """

    labels: dict[int, float]
    seed: int
    schedule: Schedule
    guidance: Guidance
    negative_label: int | None
    branches: Branches
    noise: Float32 | None = None
    noise_device: str = "cpu"
    noise_dtype: str = "float32"
    cuda_threads: int | None = None
    init: Init | None = None
    strength: float | None = None

    def make_stream(self) -> Noise:
        """The image's noise from its beginning."""
        return TorchNoise(self.seed) if self.noise_device == "cpu" else CudaNoise(self.seed, self.cuda_threads)

    def make_initial_latents(self, shape: tuple[int, ...]) -> tuple[Float32, Noise]:
        """z before the first row ``[C, H, W]``, and the stream for the rows.

        In image-to-image the noise on the image is the stream's first draw, as in diffusers' pipelines once the
        image is encoded.
        """
        stream, (first, *others) = self.make_stream(), self.schedule.start
        noise = self.draw_noise(stream, shape) if self.noise is None else self.noise
        if self.init is None:
            latents: Float32 = first * noise
        else:
            signal, spread = self.schedule.initial[0]
            latents = signal * self.init.latents + spread * noise
        for scale in others:
            latents = latents + scale * self.draw_noise(stream, shape)
        return latents, stream

    def draw_noise(self, stream: Noise, shape: tuple[int, ...]) -> Float32:
        """The next noise of the image's stream, float32 ``[C, H, W]``."""
        return stream.normal(shape, self.noise_dtype).astype(np.float32)
