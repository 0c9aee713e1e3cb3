"""What a fitted sampler table was fitted for: the part ``fitted`` of its file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from dit_runtime.core.decode import Amount, Natural, Positive, Range

Scale = Annotated[float, Range(0, 1e6)]


@dataclass(frozen=True)
class HeldOut:
    """Figures on images that were not fitted, against the teacher's images.

    Attributes:
        pictures: how many images.
        psnr_db, psnr_low_db, psnr_high_db: of all images together, and its 95 % interval over images.
        latent_error: relative L2 of the last latents.
        named: the named sampler with the best PSNR at as many network evaluations.
        named_psnr_db: its PSNR.
    """

    pictures: Positive
    psnr_db: float
    psnr_low_db: float
    psnr_high_db: float
    latent_error: Amount
    named: str
    named_psnr_db: float


@dataclass(frozen=True)
class FittedFor:
    """What a table was fitted for, and how.

    Attributes:
        bundle: its digest. The table is refused with another bundle.
        model: the model's name, for the message.
        size: height and width of the images in pixels.
        teacher: the sampler whose last latents the table aims at, as ``ddim:200``.
        teacher_spacing: the spacing of the teacher's timesteps.
        guidance: the scales that the fitted images had.
        guidance_interval: the noise times with guidance.
        labels: the fitted images' class numbers.
        seed: of the first fitted image; the others count up from it, and the held-out ones after them.
        engine: that ran the network.
        version: of this distribution.
        held_out: the figures.
    """

    bundle: str
    model: str
    size: tuple[Positive, Positive]
    teacher: str
    teacher_spacing: str
    guidance: tuple[Scale, ...]
    guidance_interval: tuple[Scale, Scale]
    labels: tuple[Natural, ...]
    seed: int
    engine: str
    version: str
    held_out: HeldOut
