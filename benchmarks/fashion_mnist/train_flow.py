"""Train a small velocity model on the demo's data: SiT's objective on the linear path, from the demo DiT's weights.

    apt-get install dataset-fashion-mnist
    python benchmarks/fashion_mnist/train_flow.py --output build/flow     # half an hour on two idle CPU cores
    dit-export build/flow/flow.safetensors --family sit --time noise-at-0 --path linear --heads 5 \\
        --vae benchmarks/fashion_mnist/checkpoint/vae -o build/flow/flow.bundle
    python benchmarks/few_steps.py --bundle build/flow/flow.bundle --work build/few_steps_flow --guidance 1.5

The weights stay out of the repository: what is measured with them is a few-step table's distance to its own teacher.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from dit_export.checkpoints.positions import official_table
from dit_export.checkpoints.sources import Source, load_checkpoint
from dit_export.reference.official_model import DiT
from safetensors.torch import save_file
from torch import Tensor
from train import CHECKPOINT, NULL_CLASS, Training, images_from_idx, iterate_batches, latents_of

BATCH = 128


def make_model() -> DiT:
    """The reference's module with the demo's weights; a SiT ends in twice the channels that it uses, as the DiT."""
    checkpoint = load_checkpoint(Source(str(CHECKPOINT)))
    spec = checkpoint.model
    model = DiT(spec)
    model.load_state_dict({**checkpoint.weights, "pos_embed": official_table(spec.width, spec.grid)})
    return model


def velocity_loss(model: DiT, data: Tensor, labels: Tensor) -> Tensor:
    """Mean squared error of v = x − noise at x_t = t·x + (1 − t)·noise, t from 0 to 1 (Ma et al. 2024, linear path)."""
    t, noise = torch.rand(len(data)), torch.randn_like(data)
    share = t.reshape(-1, 1, 1, 1)
    found = model(share * data + (1 - share) * noise, t, labels)[:, : data.shape[1]]
    return F.mse_loss(found, data - noise)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--output", type=Path, default=Path("build/flow"))
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--images", type=int, default=20000, help="the first so many of the training images")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    images, labels = images_from_idx(args.data, "train")
    autoencoder = AutoencoderKL.from_pretrained(CHECKPOINT / "vae", torch_dtype=torch.float32)
    images, labels = images[: args.images], labels[: args.images]
    means, deviations = (each * autoencoder.config.scaling_factor for each in latents_of(autoencoder, images))
    training = Training("flow", make_model(), args.steps, rate=8e-4, ema=0.999, weight_decay=0.0)
    for index in iterate_batches(len(means), BATCH, args.steps, seed=4):
        data = means[index] + deviations[index] * torch.randn_like(means[index])
        dropped = torch.rand(len(index)) < 0.1
        training.step(velocity_loss(training.model, data, torch.where(dropped, NULL_CLASS, labels[index])))
    weights = {name: value.contiguous() for name, value in training.ema.state_dict().items()}
    save_file(weights, args.output / "flow.safetensors")


if __name__ == "__main__":
    main()
