"""Starting from an image: its latents, and where in a sampler's schedule its strength says to start."""

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

STRENGTH = 0.6  # where a caller does not say


@dataclass(frozen=True, eq=False)
class Init:
    """What image-to-image starts from.

    Attributes:
        latents: float32 ``[C, h, w]``, of the image without noise.
        source: what identifies the pixels or latents that were given: 16 hexadecimal digits of SHA-256.
    """

    latents: Float32
    source: str


Start = Images | Float32 | Sequence[Init]


def encode_inits(start: Start, count: int, manifest: Manifest, encode: Callable[[Images], Float32]) -> list[Init]:
    """What ``count`` images start from, one for all or one each.

    Args:
        start: uint8 images ``[H, W, 3]`` or ``[N, H, W, 3]``, float32 latents ``[C, h, w]`` or ``[N, C, h, w]``, or
            what this gave before.
        count: how many are needed.
        manifest: for the sizes.
        encode: images ``[N, H, W, 3]`` → latents ``[N, C, h, w]``.

    Raises:
        SamplingError: another size, shape, dtype or number, or not finite.
    """
    if isinstance(start, Sequence):
        made = list(start)
        if len(made) not in (1, count) or not all(isinstance(one, Init) for one in made):
            raise SamplingError(
                f"{len(made)} inits for {count} images: expected one array, or what Pipeline.inits gave, one for all "
                "or one each"
            )
        return made * count if len(made) == 1 else made
    given = np.asarray(start)
    given = given[None] if given.ndim == 3 else given
    height, width = manifest.image_size
    image, latent = (height, width, 3), (manifest.model.latent_channels, *manifest.model.latent_size)
    of_pixels = given.dtype == np.uint8
    if of_pixels and given.ndim == 4 and given.shape[1:] != image and given.shape[3] == 3:
        raise SamplingError(
            f"init: an image of {given.shape[1]}x{given.shape[2]} pixels, expected {height}x{width}: resize it first, "
            "or choose another --size of the bundle"
        )
    shape = image if of_pixels else latent
    if given.dtype not in (np.uint8, np.float32) or given.shape not in ((1, *shape), (count, *shape)):
        raise SamplingError(
            f"init: {given.dtype} {list(given.shape)}; expected images, uint8 {[count, *image]}, or latents, "
            f"float32 {[count, *latent]}, or one for all"
        )
    if not np.isfinite(given).all():
        raise SamplingError("init: latents that are not finite; expected finite float32")
    if of_pixels:
        images = np.asarray(given, np.uint8)
        latents, sources = encode(images), [hashlib.sha256(one.tobytes()).hexdigest()[:16] for one in images]
    else:
        latents = np.asarray(given, np.float32)
        sources = [noise_hash(one) for one in latents]
    made = [Init(one, source) for one, source in zip(latents, sources, strict=True)]
    return made * count if len(made) == 1 else made


def schedule_from_start(table: Schedule, from_image: bool, strength: float | None) -> tuple[Schedule, float | None]:
    """A table of the user's own from where it is to start, and the strength that was used.

    Raises:
        SamplingError: a table that cannot start there, or only from an image.
    """
    if not from_image:
        if table.skipped:
            raise SamplingError(
                f"table {table.sampler}: it starts after step {table.skipped}, with an image: name one (--init)"
            )
        return table, None
    if (table.initial == [0, 1]).all():
        raise SamplingError(
            f"table {table.sampler}: its initial is [0, 1] in every row, all noise; expected the scales of signal and "
            "noise before each row, to start from an image there"
        )
    if not table.skipped:
        strength = STRENGTH if strength is None else strength
        return skip_steps(table, count_skipped_steps(table.steps, strength)), strength
    if strength is not None:
        raise SamplingError(
            f"table {table.sampler}: it starts after step {table.skipped}, and strength {strength:g} is for whole "
            "tables; leave it out"
        )
    return table, None
