"""Small files with the official names."""

from __future__ import annotations

from pathlib import Path

import torch
from dit_export.checkpoints.sources import Checkpoint, Source, load_checkpoint

from support.oracle import random_weights

Weights = dict[str, torch.Tensor]
HEADS = 2


def weights_of(conditioning: str = "adaln-zero", out_channels: int = 8, **changes: object) -> Weights:
    """Of 2 blocks of width 32, with patches of 2, a grid of 4×4 and 10 classes and one for null."""
    shape: dict[str, object] = {"width": 32, "depth": 2, "patch": 2, "channels": 4, "grid": (4, 4), "classes": 10}
    return random_weights(5, out_channels=out_channels, conditioning=conditioning, **{**shape, **changes})  # type: ignore[arg-type]


def loaded(file: Path, vae: str, **options: object) -> Checkpoint:
    return load_checkpoint(Source(**{"name": str(file), "heads": HEADS, "autoencoder": vae, **options}))  # type: ignore[arg-type]


def same(checkpoint: Checkpoint, expected: Weights) -> bool:
    weights = checkpoint.weights
    return set(weights) == set(expected) and all(torch.equal(weights[key], value) for key, value in expected.items())
