"""Train the demo model: an evaluator, an ``AutoencoderKL`` and a class-conditional DiT on Fashion-MNIST.

    apt-get install dataset-fashion-mnist        # 60 000 + 10 000 grey 28×28 images, MIT licence, © 2017 Zalando SE
    python benchmarks/fashion_mnist/train.py     # well over an hour on two CPU cores

The stages are the evaluator, the autoencoder and the DiT. A stage is skipped when its result exists in ``--work``. The
evaluator is trained on real images only, and frozen before any image is sampled. The DiT has the official objective:
epsilon MSE plus the variational bound on the learned variance, label dropout 0.1, EMA. Then the script computes the
figures, and writes the files to commit in diffusers' pipeline layout.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from evaluator import (
    CLASS_NAMES,
    REFERENCE,
    WEIGHTS,
    Evaluator,
    frechet_distance,
    judge,
    load_evaluator,
    reference_statistics,
    statistics_of,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

HERE = Path(__file__).parent
CHECKPOINT = HERE / "checkpoint"
NULL_CLASS = len(CLASS_NAMES)
STEPS = 1000  # training timesteps of the diffusion
AUTOENCODER = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "block_out_channels": (32, 64, 96),
    "layers_per_block": 1,
    "latent_channels": 4,
    "sample_size": 32,
}
TRANSFORMER = {
    "num_attention_heads": 5,
    "attention_head_dim": 32,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 6,
    "sample_size": 8,
    "patch_size": 2,
    "num_embeds_ada_norm": NULL_CLASS,
}
SCHEDULER = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02, "clip_sample": False}


def save_weights(model: nn.Module, path: Path) -> None:
    """Write a module's weights to a safetensors file, which stores contiguous tensors only."""
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, path)


def images_from_idx(data: Path, split: str) -> tuple[Tensor, Tensor]:
    """Read the data set's gzipped IDX files: uint8 images ``[N, 1, 32, 32]``, padded with black, and labels."""
    with gzip.open(data / f"{split}-images-idx3-ubyte.gz") as file:
        pixels = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 1, 28, 28)
    with gzip.open(data / f"{split}-labels-idx1-ubyte.gz") as file:
        labels = np.frombuffer(file.read(), np.uint8, offset=8).astype(np.int64)
    return torch.from_numpy(np.pad(pixels, ((0, 0), (0, 0), (2, 2), (2, 2)))), torch.from_numpy(labels)


def scale(images: Tensor) -> Tensor:
    """Scale uint8 images to float32 in [-1, 1]."""
    return images.float() / 127.5 - 1.0


def iterate_batches(count: int, size: int, steps: int, seed: int) -> Iterator[Tensor]:
    """Yield ``steps`` batches of indices, over as many shuffled epochs as they need."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        if len(order) < size:
            order = torch.cat([order, torch.randperm(count, generator=generator)])
        yield order[:size]
        order = order[size:]


class Training:
    """A training run: AdamW, warm-up and cosine decay, gradient clipping, averaged weights, and a progress line."""

    def __init__(self, name: str, model: nn.Module, steps: int, rate: float, ema: float, weight_decay: float) -> None:
        self.name, self.model, self.steps, self.ema_decay = name, model, steps, ema
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=weight_decay, betas=(0.9, 0.99))
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer,
            lambda step: min(1.0, (step + 1) / 200) * (0.5 + 0.5 * math.cos(math.pi * step / steps)) + 1e-3,
        )
        self.ema = copy.deepcopy(model).requires_grad_(False)
        self.count, self.start, self.mean = 0, time.monotonic(), 0.0

    def step(self, loss: Tensor) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.count += 1
        decay = min(self.ema_decay, (1 + self.count) / (10 + self.count))
        with torch.no_grad():
            for average, value in zip(self.ema.state_dict().values(), self.model.state_dict().values(), strict=True):
                if average.dtype.is_floating_point:
                    average.lerp_(value, 1 - decay)
                else:
                    average.copy_(value)
        self.mean = loss.item() if self.count == 1 else 0.98 * self.mean + 0.02 * loss.item()
        if self.count % 100 == 0 or self.count == self.steps:
            spent = time.monotonic() - self.start
            left = spent / self.count * (self.steps - self.count)
            print(
                f"{self.name} {self.count}/{self.steps}  loss {self.mean:.5f}  {spent:.0f} s, {left:.0f} s left",
                flush=True,
            )


def train_evaluator(images: Tensor, labels: Tensor, steps: int) -> Evaluator:
    torch.manual_seed(0)
    model = Evaluator()
    training = Training("evaluator", model, steps, rate=2e-3, ema=0.995, weight_decay=0.02)
    for index in iterate_batches(len(images), 128, steps, seed=1):
        image = scale(images[index])
        dy, dx = (int(v) for v in torch.randint(-2, 3, (2,)))
        image = torch.roll(image, (dy, dx), dims=(2, 3))  # the border is black: a roll is a shift
        logits, _ = model(image)
        training.step(F.cross_entropy(logits, labels[index], label_smoothing=0.05))
    return training.ema.eval()


def train_autoencoder(images: Tensor, steps: int) -> AutoencoderKL:
    torch.manual_seed(1)
    model = AutoencoderKL(**AUTOENCODER).to(memory_format=torch.channels_last)
    training = Training("autoencoder", model, steps, rate=1.5e-3, ema=0.998, weight_decay=1e-4)
    for index in iterate_batches(len(images), 64, steps, seed=2):
        image = scale(images[index]).expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)
        posterior = model.encode(image).latent_dist
        reconstruction = model.decode(posterior.sample()).sample
        divergence = posterior.kl().mean() / posterior.mean[0].numel()
        training.step(F.mse_loss(reconstruction, image) + 3e-5 * divergence)
    return training.ema.eval()


def latents_of(autoencoder: AutoencoderKL, images: Tensor) -> tuple[Tensor, Tensor]:
    """Posterior mean and standard deviation ``[N, 4, 8, 8]``, unscaled."""
    means, deviations = [], []
    with torch.inference_mode():
        for chunk in images.split(500):
            posterior = autoencoder.encode(scale(chunk).expand(-1, 3, -1, -1)).latent_dist
            means.append(posterior.mean)
            deviations.append(posterior.std)
    return torch.cat(means).clone(), torch.cat(deviations).clone()


def images_of(autoencoder: AutoencoderKL, latents: Tensor) -> np.ndarray:
    """Unscaled latents → uint8 ``[N, 32, 32, 3]``, as ``DiTPipeline`` rounds."""
    with torch.inference_mode():
        decoded = torch.cat([autoencoder.decode(chunk).sample for chunk in latents.split(250)])
    return ((decoded / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1) * 255).round().to(torch.uint8).numpy()


class Diffusion:
    """The terms of the official training loss (``gaussian_diffusion.py``: ``training_losses``, ``_vb_terms_bpd``)."""

    def __init__(self) -> None:
        betas = torch.linspace(1e-4, 0.02, STEPS, dtype=torch.float64)
        alpha_bar = (1 - betas).cumprod(0)
        previous = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
        variance = betas * (1 - previous) / (1 - alpha_bar)
        self.signal, self.noise = alpha_bar.sqrt().float(), (1 - alpha_bar).sqrt().float()
        self.log_beta = betas.log().float()
        self.log_variance = torch.cat([variance[1:2], variance[1:]]).log().float()  # clipped at t = 0, as the original
        self.mean_x0 = (betas * previous.sqrt() / (1 - alpha_bar)).float()
        self.mean_xt = ((1 - previous) * (1 - betas).sqrt() / (1 - alpha_bar)).float()

    def loss(self, model: Callable[..., Any], x_0: Tensor, labels: Tensor) -> Tensor:
        t = torch.randint(0, STEPS, (len(x_0),))
        noise = torch.randn_like(x_0)

        def at(values: Tensor) -> Tensor:
            return values[t].reshape(-1, 1, 1, 1)

        x_t = at(self.signal) * x_0 + at(self.noise) * noise
        output = model(x_t, timestep=t, class_labels=labels).sample  # (N, 8, 8, 8)
        eps, v = output.chunk(2, dim=1)
        fraction = (v + 1) / 2
        log_variance = fraction * at(self.log_beta) + (1 - fraction) * at(self.log_variance)
        # The bound trains the variance only: the mean enters detached (Nichol & Dhariwal 2021, section 3.1).
        x_0_hat = (x_t - at(self.noise) * eps.detach()) / at(self.signal)
        mean = at(self.mean_x0) * x_0_hat + at(self.mean_xt) * x_t
        true_mean = at(self.mean_x0) * x_0 + at(self.mean_xt) * x_t
        true_log_variance = at(self.log_variance)
        divergence = 0.5 * (
            log_variance
            - true_log_variance
            - 1
            + (true_log_variance - log_variance).exp()
            + (true_mean - mean) ** 2 * (-log_variance).exp()
        )
        bound = torch.where(t == 0, discretized_nll(x_0, mean, 0.5 * log_variance), divergence.flatten(1).mean(1))
        return F.mse_loss(eps, noise) + bound.mean() / math.log(2.0)


def discretized_nll(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """−log of a Gaussian's mass in a bin of 2/255 around x, per image: the decoder term at t = 0."""
    inverse = (-log_scale).exp()
    upper = 0.5 * (1 + torch.erf((x - mean + 1 / 255) * inverse / math.sqrt(2)))
    lower = 0.5 * (1 + torch.erf((x - mean - 1 / 255) * inverse / math.sqrt(2)))
    return -(upper - lower).clamp(min=1e-12).log().flatten(1).mean(1)


def make_tied_transformer() -> DiTTransformer2DModel:
    """diffusers' module with one timestep and label embedder, as the paper has it, and adaLN-Zero initialization."""
    torch.manual_seed(2)
    model = DiTTransformer2DModel(**TRANSFORMER)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
        elif ".attn1." in name or ".ff." in name or "pos_embed.proj" in name:
            nn.init.xavier_uniform_(parameter.flatten(1))
    shared = model.transformer_blocks[0].norm1.emb
    nn.init.normal_(shared.class_embedder.embedding_table.weight, std=0.02)
    nn.init.normal_(shared.timestep_embedder.linear_1.weight, std=0.02)
    nn.init.normal_(shared.timestep_embedder.linear_2.weight, std=0.02)
    for block in model.transformer_blocks:
        block.norm1.emb = shared
        nn.init.zeros_(block.norm1.linear.weight)
    nn.init.zeros_(model.proj_out_1.weight)
    nn.init.zeros_(model.proj_out_2.weight)
    # In train mode diffusers drops labels in each block separately. In evaluation mode train_denoiser drops them.
    return model.eval()


def train_transformer(means: Tensor, deviations: Tensor, labels: Tensor, steps: int) -> DiTTransformer2DModel:
    """Train the DiT on scaled latents: means and deviations ``[N, 4, 8, 8]``."""
    model = make_tied_transformer()
    forward = torch.compile(model, dynamic=False)  # the model is so small that most of an eager step is overhead
    training = Training("transformer", model, steps, rate=1.2e-3, ema=0.9995, weight_decay=0.0)
    return train_denoiser(training, forward, means, deviations, labels)


def train_denoiser(
    training: Training, forward: Callable[..., Any], means: Tensor, deviations: Tensor, labels: Tensor
) -> Any:
    """Do all steps of ``training`` on scaled latents ``[N, 4, 8, 8]``, and return the averaged model."""
    diffusion = Diffusion()
    for index in iterate_batches(len(means), 128, training.steps, seed=3):
        x_0 = means[index] + deviations[index] * torch.randn_like(means[index])
        dropped = torch.rand(len(index)) < 0.1
        training.step(diffusion.loss(forward, x_0, torch.where(dropped, NULL_CLASS, labels[index])))
    return training.ema


def untie(model: DiTTransformer2DModel) -> DiTTransformer2DModel:
    """Copy the weights to diffusers' own layout, which has a copy of the embedders in each block."""
    plain = DiTTransformer2DModel(**TRANSFORMER)
    plain.load_state_dict(model.state_dict())
    return plain.eval()


def sample(pipeline: DiTPipeline, count: int, guidance: float, steps: int = 50) -> tuple[np.ndarray, np.ndarray]:
    """Sample ``count`` images with the unpatched modules, in ``DiTPipeline``'s loop with our null class.

    Returns:
        The images and their labels.
    """
    transformer, autoencoder, scheduler = pipeline.transformer, pipeline.vae, pipeline.scheduler
    labels = torch.arange(count) % NULL_CLASS
    noise = torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    scheduler.set_timesteps(steps)
    finished = []
    for z, wanted in zip(noise.split(250), labels.split(250), strict=True):
        classes = torch.cat([wanted, torch.full_like(wanted, NULL_CLASS)])
        with torch.inference_mode():
            for t in scheduler.timesteps:
                output = transformer(torch.cat([z, z]), timestep=t.expand(len(classes)), class_labels=classes).sample
                cond, uncond = output[:, :4].chunk(2)
                z = scheduler.step(uncond + guidance * (cond - uncond), t, z).prev_sample
        finished.append(z)
    return images_of(autoencoder, torch.cat(finished) / autoencoder.config.scaling_factor), labels.numpy()


def save_pipeline(transformer: DiTTransformer2DModel, autoencoder: AutoencoderKL) -> None:
    pipeline = DiTPipeline(untie(transformer), autoencoder, DDIMScheduler(**SCHEDULER))
    pipeline.to(torch.float16).save_pretrained(CHECKPOINT)
    index = CHECKPOINT / "model_index.json"
    # Published DiT checkpoints carry the class names here; DiTPipeline reads them but does not save them.
    labels = {str(number): name for number, name in enumerate(CLASS_NAMES)}
    index.write_text(json.dumps({**json.loads(index.read_text()), "id2label": labels}, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--work", type=Path, default=Path("build/fashion_mnist"), help="intermediate weights")
    parser.add_argument("--evaluator-steps", type=int, default=2500)
    parser.add_argument("--autoencoder-steps", type=int, default=2300)
    parser.add_argument("--transformer-steps", type=int, default=20000)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    images, labels = images_from_idx(args.data, "train")
    test_images, test_labels = images_from_idx(args.data, "t10k")
    test_rgb = test_images.permute(0, 2, 3, 1).expand(-1, -1, -1, 3).numpy()

    if not WEIGHTS.exists():
        state = train_evaluator(images, labels, args.evaluator_steps).state_dict()
        half = {name: value.half() if value.is_floating_point() else value for name, value in state.items()}
        save_file({name: value.contiguous() for name, value in half.items()}, WEIGHTS)
    evaluator = load_evaluator()
    classes, test_features = judge(evaluator, test_rgb)
    real_accuracy = float((classes == test_labels.numpy()).mean())
    print(f"evaluator: accuracy {real_accuracy:.4f} on the 10 000 real test images", flush=True)

    stored = args.work / "autoencoder.safetensors"
    if not stored.exists():
        save_weights(train_autoencoder(images, args.autoencoder_steps), stored)
    autoencoder = AutoencoderKL(**AUTOENCODER)
    autoencoder.load_state_dict({name: value.half().float() for name, value in load_file(stored).items()})
    autoencoder.eval().requires_grad_(False)
    test_means, _ = latents_of(autoencoder, test_images)
    reconstructions = images_of(autoencoder, test_means)
    error = (reconstructions.astype(np.float64) - test_rgb) ** 2
    psnr = float(10 * np.log10(255**2 / error.mean()))  # of the mean error: the lower of the two usual averages
    print(f"autoencoder: PSNR {psnr:.2f} dB on the 10 000 test images", flush=True)
    means, deviations = latents_of(autoencoder, images)
    factor = round(float(1 / (means.var() + (deviations**2).mean()).sqrt()), 5)
    autoencoder.register_to_config(scaling_factor=factor)
    print(f"latents: scaling factor {factor}, mean posterior deviation {deviations.mean() * factor:.4f}", flush=True)

    real = statistics_of(judge(evaluator, images.permute(0, 2, 3, 1).expand(-1, -1, -1, 3).numpy())[1])
    reconstructed_classes, reconstructed_features = judge(evaluator, reconstructions)
    figures = {
        "real_accuracy": real_accuracy,
        "test_distance": frechet_distance(statistics_of(test_features), real),
        "reconstruction_distance": frechet_distance(statistics_of(reconstructed_features), real),
        "reconstruction_accuracy": float((reconstructed_classes == test_labels.numpy()).mean()),
        "reconstruction_psnr": psnr,
    }
    np.savez(REFERENCE, mean=real[0], covariance=real[1], **figures)
    print(json.dumps(figures), flush=True)

    stored = args.work / "transformer.safetensors"
    if not stored.exists():
        model = train_transformer(means * factor, deviations * factor, labels, args.transformer_steps)
        save_weights(untie(model), stored)
    transformer = DiTTransformer2DModel(**TRANSFORMER)
    transformer.load_state_dict(load_file(stored))
    save_pipeline(transformer, autoencoder)

    pipeline = DiTPipeline.from_pretrained(CHECKPOINT, dtype=torch.float32)
    reference = reference_statistics()
    # A Fréchet distance falls with the number of images: it is compared with reconstructions over as many.
    for guidance, count in ((1.0, 1000), (1.5, 1000), (2.5, 1000), (4.0, 1000), (1.5, 5000)):
        generated, asked = sample(pipeline, count, guidance)
        seen, features = judge(evaluator, generated)
        distance = frechet_distance(statistics_of(features), (reference["mean"], reference["covariance"]))
        chunks = [statistics_of(chunk) for chunk in np.split(reconstructed_features, 10_000 // count)]
        same = np.mean([frechet_distance(chunk, (reference["mean"], reference["covariance"])) for chunk in chunks])
        print(
            f"guidance {guidance}, {count} images: class accuracy {(seen == asked).mean():.3f}, "
            f"distance {distance:.3f}; of as many reconstructions {same:.3f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
