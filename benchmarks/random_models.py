"""Small checkpoints with random weights: every family, conditioning and path.

The limits were measured on trained weights and on one random model; these are models that nobody chose.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from dit_export.checkpoints.layouts import official_shapes
from dit_export.checkpoints.positions import official_table
from dit_export.checkpoints.random_weights import random_tensors, randomize
from dit_export.checkpoints.source import Source
from safetensors.torch import save_file

from dit_runtime.bundle.manifest import ModelSpec

CHANNELS = 4  # of the latents
ROUGH = 15.0  # times the biases of other random models


@dataclass(frozen=True)
class Kind:
    """A kind of model: the conditioning, and the path of a SiT; a DiT has none."""

    name: str
    conditioning: str = "adaln-zero"
    path: str | None = None

    @property
    def options(self) -> dict[str, str]:
        """What a file of such a model does not tell about itself."""
        return {"family": "official"} if self.path is None else {**SIT, "path": self.path}


SIT = {"family": "sit", "time": "noise-at-0"}
KINDS = (
    Kind("DiT"),
    Kind("DiT adaLN", "adaln"),
    Kind("DiT cross-attention", "cross-attention"),
    Kind("DiT in-context", "in-context"),
    Kind("SiT linear", path="linear"),
    Kind("SiT GVP", path="gvp"),
    Kind("SiT VP", path="vp"),
)


def make_random_autoencoder(folder: Path) -> Path:
    """Make an autoencoder with seeded random weights, which halves the sides."""
    from diffusers import AutoencoderKL

    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    autoencoder = AutoencoderKL(**blocks, block_out_channels=(32, 64), latent_channels=CHANNELS, scaling_factor=0.5)
    randomize(autoencoder, 1)
    autoencoder.save_pretrained(folder)
    return folder


def make_random_source(
    kind: Kind, seed: int, folder: Path, depths: Sequence[int] = (2, 4, 6), rough: bool = False
) -> Source:
    """Write a model's weights and an autoencoder into ``folder``; the seed draws the shape and the weights.

    Biases and label embeddings of a rough model are as large as its activations. Its trajectories multiply errors.
    """
    random = np.random.default_rng(seed)
    heads, head, depth, side = (int(random.choice(each)) for each in ((2, 3, 4), (16, 32), depths, (8, 12)))
    spec = ModelSpec(
        conditioning=kind.conditioning,
        latent_channels=CHANNELS,
        latent_size=(side, side),
        patch_size=2,
        width=heads * head,
        depth=depth,
        heads=heads,
        mlp_width=4 * heads * head,
        classes=10,
        learned_variance=kind.path is None,
    )
    weights = {name: each.read() for name, each in random_tensors(official_shapes(spec, 2 * CHANNELS), seed).items()}
    if rough:
        weights = {name: each * (ROUGH if name.endswith("bias") else 1) for name, each in weights.items()}
        weights["y_embedder.embedding_table.weight"] *= spec.width**0.5
    weights["pos_embed"] = official_table(spec.width, spec.grid)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{kind.name} {seed}.safetensors"
    save_file(weights, file)
    autoencoder = make_random_autoencoder(folder / "autoencoder")
    return Source(str(file), heads=heads, autoencoder=str(autoencoder), **kind.options)  # type: ignore[arg-type]
