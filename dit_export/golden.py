"""Golden records: what the unpatched PyTorch reference computes, for a bundle to be checked against anywhere.

The reference is diffusers' own transformer, VAE and schedulers in FP32, in ``DiTPipeline``'s loop with null label =
number of classes (``DiTPipeline`` itself hard-codes 1000). This runs as a process of its own, which never imports the
modules and graphs that are exported: an error there cannot reach its own yardstick.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from dit_export.checkpoint import Checkpoint, load_checkpoint
from dit_runtime.command import run
from dit_runtime.errors import CheckpointError, ParityError
from dit_runtime.progress import Progress

REFERENCE = "diffusers DiTTransformer2DModel, AutoencoderKL and scheduler in DiTPipeline's loop, FP32, null = classes"
RECORDS = ("blocks", "forward_1", "forward_2", "ddim", "ddpm", "images")
GUIDANCE = 1.5  # of the trajectories
FORWARD_GUIDANCE = 4.0
LARGE_MODEL = 100_000_000  # parameters; above, records are made smaller
TOKENS_KEPT = 32  # of each block's output, evenly spaced


@dataclass(frozen=True)
class Plan:
    """How much is recorded: pictures and steps of a trajectory, pictures of a forward."""

    pictures: int
    steps: int
    forward_pictures: int

    @staticmethod
    def of(checkpoint: Checkpoint) -> Plan:
        large = sum(p.numel() for p in checkpoint.transformer.parameters()) > LARGE_MODEL
        return Plan(pictures=1, steps=4, forward_pictures=2) if large else Plan(4, 50, 4)

    @property
    def work(self) -> int:
        """Reference evaluations, for the progress bar."""
        return 4 + 2 * self.steps


class Reference:
    """The unpatched modules of a checkpoint."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.transformer = checkpoint.transformer
        self.channels = checkpoint.transformer.config.in_channels
        self.classes = checkpoint.transformer.config.num_embeds_ada_norm

    def predicted(self, z: Tensor, t: Tensor, labels: Tensor, guidance: float) -> tuple[Tensor, Tensor]:
        """Guided ε ``[B, C, H, W]`` and the conditional branch's variance channels, as in ``DiTPipeline``."""
        if guidance == 1:
            output = self.transformer(z, timestep=t, class_labels=labels).sample
            return output[:, : self.channels], output[:, self.channels :]
        classes = torch.cat([labels, torch.full_like(labels, self.classes)])
        output = self.transformer(torch.cat([z, z]), timestep=torch.cat([t, t]), class_labels=classes).sample
        cond, uncond = output[:, : self.channels].chunk(2)
        return uncond + guidance * (cond - uncond), output.chunk(2)[0][:, self.channels :]

    def decoded(self, z: Tensor) -> Tensor:
        """Latents → float pictures ``[B, 3, H, W]``, not clamped."""
        config = self.checkpoint.autoencoder.config
        latents = 1 / config.scaling_factor * z
        if config.shift_factor:
            latents = latents + config.shift_factor
        pictures: Tensor = self.checkpoint.autoencoder.decode(latents).sample
        return pictures

    @staticmethod
    def pictures(decoded: Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """As ``DiTPipeline`` and ``numpy_to_pil`` make them: uint8 ``[B, H, W, 3]``."""
        scaled = (decoded / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).float().numpy()
        pictures: np.ndarray[Any, np.dtype[np.uint8]] = (scaled * 255).round().astype("uint8")
        return pictures


def write_records(checkpoint: Checkpoint, folder: Path, advance: Callable[[], None]) -> None:
    """Write ``NAME.npz`` for each of ``RECORDS`` into ``folder``.

    Raises:
        ParityError: the reference itself is not finite, or its picture is constant: nothing to compare with.
    """
    reference, plan = Reference(checkpoint), Plan.of(checkpoint)
    records: dict[str, dict[str, Any]] = {}
    with torch.inference_mode():
        records["blocks"] = _blocks(reference)
        advance()
        for branches, guidance in ((1, 1.0), (2, FORWARD_GUIDANCE)):
            records[f"forward_{branches}"] = _forward(reference, plan.forward_pictures, guidance)
            advance()
        records["ddim"] = _trajectory(reference, plan, learned=False, advance=advance)
        records["ddpm"] = _trajectory(reference, plan, learned=True, advance=advance)
        latents = torch.from_numpy(records["ddim"]["latents"][-1])
        decoded = reference.decoded(latents)
        pictures = reference.pictures(decoded)
        records["images"] = {"latents": latents.numpy(), "decoded": decoded.numpy(), "images": pictures}
        advance()
    for name, record in records.items():
        for key, value in record.items():
            if not np.isfinite(value).all():
                raise ParityError(
                    f"{checkpoint.name}: the PyTorch reference itself is not finite ({name}, {key}); "
                    "the checkpoint or its scheduler is unusable"
                )
        np.savez(folder / f"{name}.npz", **record)
    if pictures.std() == 0:
        raise ParityError(f"{checkpoint.name}: the PyTorch reference's picture is constant; nothing to compare with")


def _inputs(reference: Reference, count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, spread timesteps and spread labels of ``count`` pictures."""
    size = reference.transformer.config.sample_size
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(count, reference.channels, size, size, generator=generator)
    training = reference.checkpoint.scheduler.config.num_train_timesteps
    timesteps = torch.linspace(training - 1, training // 100, count).long()
    labels = torch.linspace(0, reference.classes - 1, count).long()
    return z, timesteps, labels


def _forward(reference: Reference, count: int, guidance: float) -> dict[str, Any]:
    z, timesteps, labels = _inputs(reference, count, seed=0)
    e, v = reference.predicted(z, timesteps, labels, guidance)
    return {
        "latents": z.numpy(),
        "timesteps": timesteps.numpy(),
        "labels": labels.numpy(),
        "guidance": guidance,
        "e": e.numpy(),
        "v": v.numpy(),
    }


def _blocks(reference: Reference) -> dict[str, Any]:
    """Every block's output on some tokens, at G = 2 in the order [conditional, null]."""
    z, timesteps, labels = _inputs(reference, 2, seed=1)
    z, timesteps, labels = z[:1], timesteps[1:] * 20, labels[1:]
    outputs: list[Tensor] = []
    tokens = (reference.transformer.config.sample_size // reference.transformer.config.patch_size) ** 2
    stride = max(1, tokens // TOKENS_KEPT)

    def keep(_: Any, __: Any, output: Tensor) -> None:
        outputs.append(output[:, ::stride].clone())

    hooks = [block.register_forward_hook(keep) for block in reference.transformer.transformer_blocks]
    try:
        reference.predicted(z, timesteps, labels, GUIDANCE)
    finally:
        for hook in hooks:
            hook.remove()
    return {
        "latents": z.numpy(),
        "timesteps": timesteps.numpy(),
        "labels": labels.numpy(),
        "guidance": GUIDANCE,
        "token_stride": stride,
        "outputs": torch.stack(outputs).numpy(),
    }


def _trajectory(reference: Reference, plan: Plan, learned: bool, advance: Callable[[], None]) -> dict[str, Any]:
    """A free-running trajectory: DDIM by the checkpoint's scheduler, or the official respaced DDPM.

    diffusers' ``DDPMScheduler`` takes the official spacing as custom timesteps and then agrees with the official code.
    """
    config = reference.checkpoint.scheduler.config
    has_variance = reference.checkpoint.model.learned_variance
    if learned:
        variance = "learned_range" if has_variance else "fixed_large"
        scheduler: Any = DDPMScheduler.from_config(config, variance_type=variance, clip_sample=False)
        stride = (config.num_train_timesteps - 1) / (plan.steps - 1)
        scheduler.set_timesteps(timesteps=[round(stride * index) for index in range(plan.steps)][::-1])
    else:
        scheduler = reference.checkpoint.scheduler
        scheduler.set_timesteps(plan.steps)
    seeds = np.arange(plan.pictures)
    generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
    labels = torch.linspace(0, reference.classes - 1, plan.pictures + 1)[1:].long()
    size = reference.transformer.config.sample_size
    z = randn_tensor((plan.pictures, reference.channels, size, size), generator=generators)
    latents, denoised, noises = [z], [], []
    for t in scheduler.timesteps:
        e, v = reference.predicted(z, t.expand(plan.pictures), labels, GUIDANCE)
        drawn = [generator.get_state() for generator in generators]
        output = torch.cat([e, v], dim=1) if learned and has_variance else e
        result = scheduler.step(output, t, z, generator=generators)
        z = result.prev_sample
        latents.append(z)
        denoised.append(result.pred_original_sample)
        noises.append(_noise_since(drawn, generators, z))
        advance()
    return {
        "seeds": seeds,
        "labels": labels.numpy(),
        "guidance": GUIDANCE,
        "steps": plan.steps,
        "latents": torch.stack(latents).numpy(),
        "denoised": torch.stack(denoised).numpy(),
        "noise": torch.stack(noises).numpy(),
    }


def _noise_since(states: list[Tensor], generators: list[torch.Generator], like: Tensor) -> Tensor:
    """The noise that the scheduler drew in its step: the generators are replayed from before it."""
    if all(torch.equal(state, generator.get_state()) for state, generator in zip(states, generators, strict=True)):
        return torch.zeros_like(like)
    return torch.stack([torch.randn(like.shape[1:], generator=torch.Generator().set_state(state)) for state in states])


def records_in_process(source: str, random_seed: int | None, folder: Path) -> None:
    """Make the records in a fresh interpreter; its progress and its errors appear on our stderr.

    Raises:
        SystemExit: the process reported an error, in words of its own.
    """
    command = [sys.executable, "-m", "dit_export.golden", source, os.fspath(folder)]
    if random_seed is not None:
        command.append(str(random_seed))
    finished = subprocess.run(command, check=False)
    if finished.returncode == 1:
        raise SystemExit(1)
    if finished.returncode != 0:
        raise CheckpointError(
            f"{source}: the reference process ended with {finished.returncode}; "
            "most likely it ran out of memory, or was killed"
        )


def _main() -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent answers Ctrl-C, and ends this process
    source, folder, *seed = sys.argv[1:]
    checkpoint = load_checkpoint(source, int(seed[0]) if seed else None)
    with Progress("PyTorch reference", Plan.of(checkpoint).work) as bar:
        write_records(checkpoint, Path(folder), bar.advance)
    return 0


if __name__ == "__main__":
    run("dit-export", _main)
