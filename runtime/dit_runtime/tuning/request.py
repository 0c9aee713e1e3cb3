"""What ``tune`` is asked for, checked."""

from __future__ import annotations

from dataclasses import dataclass

from dit_runtime.core.errors import SamplingError
from dit_runtime.sampling.labels import Label

PICTURES, BATCH_SIZE = 32, 16
LEAST_PICTURES = 4  # two to fit and two to hold out, so that there is an interval
MOST_PICTURES = 4096
MOST_STEPS = 100  # of a table: with more, named samplers are as near

Teacher = tuple[str, int] | tuple[str, int, str]  # a sampler's name, its steps and the spacing of its timesteps


@dataclass(frozen=True)
class TuneRequest:
    """How to fit a table.

    Attributes:
        steps: network evaluations of the table.
        teacher: name and steps of the sampler to come near to, and its spacing unless that is the model's; None is DDIM
            of 200 steps, or of a velocity model Heun of 100.
        pictures: images to make with the teacher. Half of them are fitted, the others are held out to judge the table.
        labels: of the images, in turn; None spreads them over all classes.
        guidance: scales, of the images in turn; None is the bundle's default.
        guidance_interval: noise times with guidance.
        seed: of the first image.
        batch_size: images in one call of the engine.

    Raises:
        SamplingError: a number is out of range.
    """

    steps: int
    teacher: Teacher | None = None
    pictures: int = PICTURES
    labels: tuple[Label, ...] | None = None
    guidance: tuple[float, ...] | None = None
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    seed: int = 0
    batch_size: int = BATCH_SIZE

    def __post_init__(self) -> None:
        if not 1 <= self.steps <= MOST_STEPS:
            raise SamplingError(f"{self.steps} steps of a few-step table: expected 1 to {MOST_STEPS}")
        if not LEAST_PICTURES <= self.pictures <= MOST_PICTURES:
            raise SamplingError(
                f"{self.pictures} pictures to fit a table: expected {LEAST_PICTURES} to {MOST_PICTURES}; half of them "
                "are held out to judge it"
            )
        if self.batch_size < 1:
            raise SamplingError(f"a batch of {self.batch_size}: expected at least 1 image")
        if self.labels is not None and not self.labels:
            raise SamplingError("no labels: expected at least one, or none at all for all classes")
        if self.guidance is not None and not self.guidance:
            raise SamplingError("no guidance scale: expected at least one, or none at all for the bundle's")
