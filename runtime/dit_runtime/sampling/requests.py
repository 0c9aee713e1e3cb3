"""One image to be made: its labels, its schedule and guidance, and the noise that it starts from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dit_runtime.backends.conditioning import Observation
from dit_runtime.samplers.guidance import Branches, Guidance
from dit_runtime.samplers.noise import CudaNoise, Float32, Noise, TorchNoise
from dit_runtime.samplers.schedule import Schedule
from dit_runtime.sampling.image_to_image import Init


@dataclass(frozen=True, eq=False)
class ImageRequest:
    """One image to be made. ``Pipeline.prepare`` makes it and checks all its values.

    Attributes:
        labels: the weight of each class number.
        seed: of the image's own noise.
        schedule: the rows to run; with ``init`` only those that its strength leaves.
        guidance: scale, interval and shape.
        negative_label: number of the class to guide away from; None is the null class.
        branches: labels and weights of the guidance branches, for each row.
        noise: float32 ``[C, H, W]``, used in place of the first draw; None draws it.
        noise_device: ``cpu`` or ``cuda``: the device whose PyTorch generator the seed stands for.
        noise_dtype: ``float32`` or ``float16``: the dtype in which PyTorch draws.
        cuda_threads: resident threads of the CUDA device, for draws that depend on them (``CudaNoise``).
        init: the image or latents to start from; None starts from noise.
        strength: the strength that was asked for, for the record.
        observations: of a policy, what its labels number; None of a model of classes.
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
    observations: Sequence[Observation] | None = None

    def make_stream(self) -> Noise:
        """Make the image's noise generator, at its beginning."""
        return TorchNoise(self.seed) if self.noise_device == "cpu" else CudaNoise(self.seed, self.cuda_threads)

    def make_initial_latents(self, shape: tuple[int, ...]) -> tuple[Float32, Noise]:
        """Make the latents before the first row, and the generator for the noise of the rows.

        In image-to-image the first draw is the noise that is added to the image, as in diffusers' pipelines.

        Args:
            shape: ``(C, H, W)``.

        Returns:
            Latents float32 ``[C, H, W]``, and the noise generator after its first draws.
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
        """Draw the next noise of the image's generator, float32 ``[C, H, W]``."""
        return stream.normal(shape, self.noise_dtype).astype(np.float32)
