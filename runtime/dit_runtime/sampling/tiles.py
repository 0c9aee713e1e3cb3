"""Decode a large image tile by tile, with the memory for one tile.

All tiles have the same shape. They overlap, and are blended with weights that fall linearly towards a tile's edges. The
decoder's group normalization and attention see one tile at a time, so the image differs slightly from the same image
decoded whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from dit_runtime.core.errors import SamplingError
from dit_runtime.samplers.noise import Float32

SMALLEST_TILE = 4  # latent pixels: in a smaller tile every pixel is near an edge
OVERLAP = 4  # neighbouring tiles share at least a quarter of their length

Decode = Callable[[Float32], Float32]


def check_tile(tile: int | None) -> None:
    """Raises SamplingError for a tile smaller than ``SMALLEST_TILE`` latent pixels; None, for no tiles, passes."""
    if tile is not None and tile < SMALLEST_TILE:
        raise SamplingError(f"decode tile {tile}: expected at least {SMALLEST_TILE} latent pixels; 64 is a good size")


def starts_of_tiles(size: int, tile: int) -> list[int]:
    """The first pixel of each tile along a side.

    The tiles are evenly spaced, the last one ends at the side's end, and neighbours share a quarter of their length or
    more.
    """
    if tile >= size:
        return [0]
    gaps = math.ceil((size - tile) / (tile - math.ceil(tile / OVERLAP)))
    return [(size - tile) * index // gaps for index in range(gaps + 1)]


def weights_of_tiles(size: int, tile: int, factor: int) -> Float32:
    """The weight of each tile at each image pixel along a side, float32 ``[tiles, size·factor]``.

    A weight falls linearly from the tile's middle to its edges, so that neighbours fade into each other over the whole
    overlap. The weights at each pixel are then divided by their sum.

    Args:
        size: length of the side in latent pixels.
        tile: length of a tile in latent pixels.
        factor: image pixels per latent pixel.
    """
    starts, length = starts_of_tiles(size, tile), min(tile, size) * factor
    weights = np.zeros((len(starts), size * factor))
    distance = np.arange(length) + 0.5
    for index, start in enumerate(starts):
        weights[index, start * factor : start * factor + length] = np.minimum(distance, length - distance)
    summed: NDArray[np.float64] = weights.sum(axis=0)
    return (weights / summed).astype(np.float32)


def decode_in_tiles(decode: Decode, latents: Float32, tile: int, factor: int) -> Float32:
    """Decode latents tile by tile, and blend the tiles.

    Args:
        decode: latents ``[N, C, h, w]`` → images ``[N, 3, h·factor, w·factor]``, float32. It is called with one shape.
        latents: ``[N, C, H, W]``.
        tile: side of a tile in latent pixels. Along a side of the image that is shorter, a tile is as long as the side.
        factor: image pixels per latent pixel.

    Returns:
        float32 ``[N, 3, H·factor, W·factor]``, not clamped.
    """
    count, _, height, width = latents.shape
    tall, wide = min(tile, height), min(tile, width)
    down, across = weights_of_tiles(height, tall, factor), weights_of_tiles(width, wide, factor)
    images: Float32 = np.zeros((count, 3, height * factor, width * factor), np.float32)
    for top, rows in zip(starts_of_tiles(height, tall), down, strict=True):
        for left, columns in zip(starts_of_tiles(width, wide), across, strict=True):
            part = decode(latents[:, :, top : top + tall, left : left + wide])
            y = slice(top * factor, (top + tall) * factor)
            x = slice(left * factor, (left + wide) * factor)
            images[:, :, y, x] += (rows[y, None] * columns[x]) * part
    return images


def images_from_decoded(decoded: Float32) -> NDArray[np.uint8]:
    """Images ``[N, 3, H, W]`` of about -1 to 1 → uint8 ``[N, H, W, 3]``, clamped and rounded as in the decoder."""
    scaled = decoded / 2
    scaled += np.float32(0.5)
    np.clip(scaled, 0, 1, out=scaled)
    scaled *= np.float32(255)
    np.rint(scaled, out=scaled)  # halves to even, as ONNX's Round
    return scaled.transpose(0, 2, 3, 1).astype(np.uint8)
