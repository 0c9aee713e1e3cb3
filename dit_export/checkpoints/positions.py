"""Positional tables: sines and cosines of each token's row and column, in the conventions of the two references.

Both give the first half of the channels to the column. They differ away from the trained size: diffusers squeezes any
grid into the trained one's range, the official code counts on.
"""

from __future__ import annotations

import numpy as np
import torch
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from torch import Tensor


def diffusers_table(width: int, grid: tuple[int, int], trained: int) -> Tensor:
    """``[1, T, D]`` as diffusers' ``PatchEmbed`` computes it at a grid (rows, columns); ``trained``: its own side."""
    table: Tensor = get_2d_sincos_pos_embed(width, grid, base_size=trained, interpolation_scale=1)
    return table.float()[None]


def official_table(width: int, grid: tuple[int, int]) -> Tensor:
    """``[1, T, D]`` as the official ``get_2d_sincos_pos_embed``, which knows square grids only, goes on to others."""
    rows, columns = np.divmod(np.arange(grid[0] * grid[1], dtype=np.float64), grid[1])
    quarter = width // 4
    frequencies = 10000.0 ** -(np.arange(quarter) / quarter)
    angles = [np.outer(position, frequencies) for position in (columns, rows)]  # each (T, D/4)
    table = np.concatenate([part for angle in angles for part in (np.sin(angle), np.cos(angle))], axis=1)
    return torch.from_numpy(table.astype(np.float32))[None]
