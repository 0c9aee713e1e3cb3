"""Small checkpoints; none is trained, all parts of each act."""

from __future__ import annotations

import json
from pathlib import Path

SCHEDULER = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02, "clip_sample": False}


def make_checkpoint(folder: Path, *, seed: int = 0, learned_variance: bool = True) -> Path:
    """A DiTPipeline folder with a tiny random model: 2 blocks, width 64, 10 classes, 8×8 latents, 32×32 images."""
    from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
    from dit_export.checkpoints.random_weights import randomize

    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=32,
        in_channels=4,
        out_channels=8 if learned_variance else 4,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=10,
    )
    autoencoder = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 32, 32),
        latent_channels=4,
        sample_size=32,
        scaling_factor=0.5,
    )
    randomize(transformer, seed)
    randomize(autoencoder, seed + 1)
    DiTPipeline(transformer, autoencoder, DDIMScheduler(**SCHEDULER)).save_pretrained(folder)
    index = folder / "model_index.json"
    names = {str(number): f"class {number}, kind {number}" for number in range(10)}
    index.write_text(json.dumps({**json.loads(index.read_text()), "id2label": names}))
    return folder
