"""Image-to-image: the latents to start from, and the row of the schedule at which a strength starts."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dit_runtime.bundle.manifest import Manifest
from dit_runtime.core.errors import SamplingError
from dit_runtime.samplers.by_name import count_skipped_steps
from dit_runtime.samplers.noise import Float32, noise_hash
from dit_runtime.samplers.schedule import Schedule, skip_steps

Images = NDArray[np.uint8]

STRENGTH = 0.6  # the default


@dataclass(frozen=True, eq=False)
class Init:
    """The start of one image in image-to-image.

    Attributes:
        latents: float32 ``[C, h, w]``, of the image without noise.
        source: the first 16 hexadecimal digits of the SHA-256 of the given pixels or latents, for the record.
    """

    latents: Float32
    source: str


Start = Images | Float32 | Sequence[Init]


def encode_inits(start: Start, count: int, manifest: Manifest, encode: Callable[[Images], Float32]) -> list[Init]:
    """Check and encode the starts of ``count`` images.

    Args:
        start: uint8 images ``[H, W, 3]`` or ``[N, H, W, 3]``, float32 latents ``[C, h, w]`` or ``[N, C, h, w]``, or the
            list that an earlier call returned. One start serves all images; else there is one for each.
        count: the number of images.
        manifest: of the bundle; it has the sizes.
        encode: images ``[N, H, W, 3]`` → latents ``[N, C, h, w]``.

    Returns:
        A start for each image.

    Raises:
        SamplingError: ``start`` has another size, shape, dtype or number, or is not finite.
    """
    if isinstance(start, Sequence):
        made = list(start)
        if len(made) not in (1, count) or not all(isinstance(one, Init) for one in made):
            raise SamplingError(
                f"{len(made)} inits for {count} images: expected one array, or a list from Pipeline.inits with one "
                "init for all images or one for each"
            )
        return made * count if len(made) == 1 else made
    given = np.asarray(start)
    given = given[None] if given.ndim == 3 else given
    height, width = manifest.image_size
    image, latent = (height, width, 3), (manifest.model.latent_channels, *manifest.model.latent_size)
    of_pixels = given.dtype == np.uint8
    if of_pixels and given.ndim == 4 and given.shape[1:] != image and given.shape[3] == 3:
        raise SamplingError(
            f"init: an image of {given.shape[1]}x{given.shape[2]} pixels, expected {height}x{width}; resize the image, "
            "or choose another --size of the bundle"
        )
    shape = image if of_pixels else latent
    if given.dtype not in (np.uint8, np.float32) or given.shape not in ((1, *shape), (count, *shape)):
        raise SamplingError(
            f"init: {given.dtype} {list(given.shape)}; expected images, uint8 {[count, *image]}, or latents, "
            f"float32 {[count, *latent]}, or one of either for all"
        )
    if not np.isfinite(given).all():
        raise SamplingError("init: the latents are not finite; expected finite float32")
    if of_pixels:
        images = np.asarray(given, np.uint8)
        latents, sources = encode(images), [hashlib.sha256(one.tobytes()).hexdigest()[:16] for one in images]
    else:
        latents = np.asarray(given, np.float32)
        sources = [noise_hash(one) for one in latents]
    made = [Init(one, source) for one, source in zip(latents, sources, strict=True)]
    return made * count if len(made) == 1 else made


def schedule_from_start(table: Schedule, from_image: bool, strength: float | None) -> tuple[Schedule, float | None]:
    """The part of a user's schedule that runs, and the strength that was used.

    Args:
        table: a schedule from a sampler table, or one that the user made.
        from_image: whether sampling starts from an image.
        strength: the share of the steps to run, above 0 to 1; None is ``STRENGTH``.

    Returns:
        The schedule from the row at which the strength starts, and the strength; None for a schedule that runs whole,
        or that itself starts after some steps.

    Raises:
        SamplingError: the sampler table cannot start from an image, or only from one.
    """
    if not from_image:
        if table.skipped:
            raise SamplingError(
                f"sampler table {table.sampler}: it starts after step {table.skipped}, from an image; give the image "
                "(--init)"
            )
        return table, None
    if (table.initial == [0, 1]).all():
        raise SamplingError(
            f"sampler table {table.sampler}: its initial is [0, 1] in every row, which is pure noise; to start from an "
            "image, initial must have the scales of signal and noise before each row"
        )
    if not table.skipped:
        strength = STRENGTH if strength is None else strength
        return skip_steps(table, count_skipped_steps(table.steps, strength)), strength
    if strength is not None:
        raise SamplingError(
            f"sampler table {table.sampler}: it starts after step {table.skipped} already, and strength {strength:g} "
            "is for sampler tables of all steps; leave --strength out"
        )
    return table, None
