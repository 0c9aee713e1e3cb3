"""Positional tables: sines and cosines of each token's row and column, in the conventions of the references.

Of a table that is added to tokens, the first half of the channels is for the column. The references differ at other
sizes than the trained one: diffusers scales the positions of any grid into the trained grid's range, the official code
keeps their spacing. A rotary table, which turns queries and keys, has the row in the first half of a head's channels,
and keeps the spacing (hustvl/LightningDiT, ``models/pos_embed.py``).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from torch import Tensor

from dit_export.checkpoints.source import Source
from dit_export.checkpoints.weights import Weights
from dit_runtime.core.errors import CheckpointError

SAMPLED = 64  # tokens
ROTARY = ("feat_rope.freqs_cos", "feat_rope.freqs_sin")  # tables [T, head]
TABLE_LIMIT = 1e-4  # max |Δ| between a stored table and the formula's, below which the formula serves for other sizes


class Positions(NamedTuple):
    """What a model knows of its tokens' places at one size.

    Attributes:
        table: added to the tokens ``[1, T, D]``.
        rotary: cosines and sines ``[2, T, head]`` that turn queries and keys; None of a model without.
    """

    table: Tensor
    rotary: Tensor | None = None


def diffusers_table(width: int, grid: tuple[int, int], trained: int) -> Tensor:
    """The table ``[1, T, D]`` as diffusers' ``PatchEmbed`` computes it.

    ``grid``: rows and columns of tokens. ``trained``: the side of the trained grid, in tokens.
    """
    table: Tensor = get_2d_sincos_pos_embed(width, grid, base_size=trained, interpolation_scale=1)
    return table.float()[None]


def official_table(
    width: int, grid: tuple[int, int], tokens: np.ndarray[Any, np.dtype[np.int64]] | None = None
) -> Tensor:
    """The table ``[1, T, D]`` of the official ``get_2d_sincos_pos_embed``, extended to grids that are not square.

    With ``tokens``, only the rows of these tokens.
    """
    chosen = np.arange(grid[0] * grid[1]) if tokens is None else tokens
    rows, columns = np.divmod(chosen.astype(np.float64), grid[1])
    quarter = width // 4
    frequencies = 10000.0 ** -(np.arange(quarter) / quarter)
    angles = [np.outer(position, frequencies) for position in (columns, rows)]  # each (T, D/4)
    table = np.concatenate([part for angle in angles for part in (np.sin(angle), np.cos(angle))], axis=1)
    return torch.from_numpy(table.astype(np.float32))[None]


def is_official_table(weights: Weights, grid: tuple[int, int]) -> bool:
    """Whether the stored positional table is the official formula's at a grid, in the precision it is stored in."""
    table, dtype = weights["pos_embed"], weights.stored["pos_embed"].read().dtype
    _, tokens, width = table.shape
    if width % 4 or grid[0] * grid[1] != tokens:
        return False
    # A few rows tell most wrong grids; the formula's whole table is as large as the stored one.
    some = np.unique(np.linspace(0, tokens - 1, min(tokens, SAMPLED)).astype(np.int64))
    return all(
        bool((table[:, rows] - official_table(width, grid, rows).to(dtype).float()).abs().max() <= TABLE_LIMIT)
        for rows in (some, np.arange(tokens))
    )


def rotary_table(head: int, grid: tuple[int, int]) -> Tensor:
    """The cosines and sines ``[2, T, head]`` of LightningDiT's rotary positions, extended to grids that are no squares.

    Neighboring channels are a pair, which turns by the row in the first half of a head and by the column in the second.
    """
    places = np.divmod(np.arange(grid[0] * grid[1]).astype(np.float64), grid[1])
    frequencies = 10000.0 ** -(np.arange(head // 4) / (head / 4))
    angles = np.concatenate([np.outer(place, frequencies) for place in places], axis=1).repeat(2, axis=1)  # (T, head)
    return torch.from_numpy(np.stack([np.cos(angles), np.sin(angles)]).astype(np.float32))


def is_rotary_table(weights: Weights, grid: tuple[int, int]) -> bool:
    """Whether the stored rotary tables are LightningDiT's at a grid, in the precision they are stored in."""
    stored = torch.stack([weights[name] for name in ROTARY])
    _, tokens, head = stored.shape
    if head % 4 or grid[0] * grid[1] != tokens:
        return False
    # The code rounds its own float32 tables: next to a boundary it takes the other neighbor, half a step away.
    half_step = torch.finfo(weights.stored[ROTARY[0]].read().dtype).eps / 4
    return bool((stored - rotary_table(head, grid)).abs().max() <= TABLE_LIMIT + half_step)


def grid_of_table(source: Source, weights: Weights, patch: int, factor: int) -> tuple[int, int]:
    """Rows and columns of an official positional table.

    Of all grids with the table's number of tokens, the one whose formula gives the table's values. A learned table's
    values tell nothing: it is taken to be square, or of the one requested size that has its number of tokens.

    Args:
        source: gives the requested image sizes.
        weights: hold the table.
        patch: the side of a patch in latent pixels.
        factor: image pixels per latent pixel.

    Raises:
        CheckpointError: the table is learned, is not square, and no requested size fits it.
    """
    tokens = weights.shapes["pos_embed"][1]
    requested = [(height // factor // patch, width // factor // patch) for height, width in source.image_sizes]
    divisors = [rows for rows in range(1, math.isqrt(tokens) + 1) if tokens % rows == 0]
    possible = [grid for rows in divisors for grid in {(rows, tokens // rows), (tokens // rows, rows)}]
    possible.sort(key=lambda grid: (grid[0] != grid[1], grid not in requested))
    for grid in possible:
        if is_official_table(weights, grid):
            return grid
    fitting = {grid for grid in requested if grid[0] * grid[1] == tokens}
    if possible[0][0] == possible[0][1]:
        return possible[0]
    if len(fitting) != 1:
        raise CheckpointError(
            f"{source.name}: a positional table of {tokens} tokens is not square; say what it was trained at with "
            "--size HEIGHTxWIDTH"
        )
    return fitting.pop()
