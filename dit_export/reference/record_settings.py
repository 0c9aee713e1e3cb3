"""How much is recorded of a model, and the measurements that go beside the records."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from dit_export.checkpoints.checkpoint import Checkpoint
from dit_export.reference.floors import count_measurements
from dit_runtime.bundle.macs import count_step_gmac
from dit_runtime.bundle.manifest import name_for_size
from dit_runtime.verify.verification import trajectories_of

GUIDANCE = 1.5  # the trajectories'
FORWARD_GUIDANCE = 4.0
STRONG_GUIDANCE = 8.0  # of one more trajectory: errors grow with guidance
STRONG_IMAGES = 2
UNGUIDED_IMAGES = 2
LARGE_MODEL = 100_000_000  # parameters; the records of larger models are smaller
CHEAP_GMAC = 1.0  # of one image's evaluation; models that need more have shorter trajectories
TOKENS_KEPT = 32  # tokens recorded of each block's output, evenly spaced
TILES_KEPT = 2  # images of which a tile is recorded


@dataclass(frozen=True)
class RecordSettings:
    """How much is recorded.

    Attributes:
        images, steps: images and steps of a trajectory; those without guidance and at a strong scale have two images at
            most, and the latter no more steps than are measured.
        forward_images: images of a forward.
        measured: the number of trajectories of which PyTorch's own error is measured for each single step. PyTorch's
            own error along a free-running trajectory is measured for all of them.
        measured_steps: the number of steps that are measured. The first free-running trajectory is measured in whole.
        precisions: the precisions in which PyTorch's own errors are measured.
        fp16_autoencoder: whether the autoencoder is FP16 where the network is BF16, as in a BF16 bundle.
        seed: the seed of all noise. With 0, timesteps and labels are spread evenly; otherwise they are drawn as well.
        guidance: the guidance scale of trajectories.
        forward_guidance: the guidance scale of the guided forward.
        samplers: the number of samplers whose trajectories are recorded.
        has_images: whether latents become images; a policy's do not.
    """

    images: int
    steps: int
    forward_images: int
    measured: int
    measured_steps: int
    precisions: tuple[str, ...] = ("fp32", "fp16", "bf16")
    seed: int = 0
    guidance: float = GUIDANCE
    forward_guidance: float = FORWARD_GUIDANCE
    samplers: int = 2
    has_images: bool = True
    fp16_autoencoder: bool = False

    @staticmethod
    def for_checkpoint(checkpoint: Checkpoint, precision: str) -> RecordSettings:
        """The settings for an export in this precision.

        Of a large model only those errors are measured that its engines are compared with: FP64 would take twice the
        model's memory.
        """
        elements = sum(int(np.prod(shape)) for shape in checkpoint.weights.shapes.values())
        most = len(checkpoint.diffusion.betas) or 50
        # A further size has the weights of the first, and the sampler does not depend on the size: smaller records do.
        first = checkpoint.model.latent_size == checkpoint.sizes[0]
        cheap = count_step_gmac(checkpoint.model) <= CHEAP_GMAC
        precisions = tuple(dict.fromkeys((precision, "bf16")))
        samplers = len(trajectories_of(checkpoint.diffusion))
        if elements > LARGE_MODEL:
            few = RecordSettings(
                1, min(4, most), 2, measured=1, measured_steps=min(2, most), precisions=precisions, samplers=samplers
            )
            return replace(few, has_images=checkpoint.autoencoder is not None, fp16_autoencoder=precision == "bf16")
        images, steps = ((4, min(50, most)) if cheap else (2, min(20, most))) if first else (2, min(10, most))
        forwards = max(images, 4) if first else images
        if precision in ("fp32", "fp16"):  # the engines of others are compared in no further precision
            precisions = ("fp32", "fp16", "bf16")
        return RecordSettings(
            images,
            steps,
            forwards,
            measured=min(1 + (first or cheap), samplers),
            measured_steps=steps,
            precisions=precisions,
            samplers=samplers,
            has_images=checkpoint.autoencoder is not None,
            fp16_autoencoder=precision == "bf16",
        )

    @property
    def work(self) -> int:
        """How many times ``write_records`` advances, for the progress bar."""
        measured = count_measurements(self.steps, self.measured_steps, self.measured, self.precisions, self.samplers)
        strong = self.strong.steps if self.has_images else 0
        return 4 + (1 + self.samplers) * self.steps + strong + measured + strong * len(self.precisions)

    @property
    def strong(self) -> RecordSettings:
        """The settings of the trajectory at a strong guidance scale."""
        steps = min(self.steps, self.measured_steps)
        return replace(self, images=min(self.images, STRONG_IMAGES), steps=steps, guidance=STRONG_GUIDANCE)


@dataclass(frozen=True)
class CalibrationRequest:
    """How an INT8 or FP8 export is to be calibrated.

    Attributes:
        seed: of the images' noise.
        images: whose trajectories are run; None leaves the number to the exporter.
        keep_fp16: the units that stay FP16.
    """

    seed: int = 0
    images: int | None = None
    keep_fp16: tuple[str, ...] = ()


@dataclass(frozen=True)
class Measurements:
    """What is measured on the reference beside the records: see ``Manifest.floors`` and ``Manifest.magnitudes``.

    ``calibration`` has the values of ``Manifest.calibration``, of an INT8 or FP8 export.
    """

    floors: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    magnitudes: dict[str, float] = field(default_factory=dict)
    calibration: dict[str, Any] | None = None

    def add_size(self, other: Measurements, size: tuple[int, int]) -> Measurements:
        """These measurements and the other ones, which were made at a further size."""
        floors = {
            name: {**series, **{name_for_size(key, size): values for key, values in other.floors[name].items()}}
            for name, series in self.floors.items()
        }
        units = self.magnitudes | other.magnitudes
        largest = {unit: max(self.magnitudes.get(unit, 0), other.magnitudes.get(unit, 0)) for unit in units}
        return Measurements(floors, largest, self.calibration)
