"""Golden records: what the unpatched PyTorch reference computes, for a bundle to be checked against anywhere.

The reference is the checkpoint's own: diffusers' transformer and schedulers in ``DiTPipeline``'s loop with null label =
number of classes (``DiTPipeline`` itself hard-codes 1000), or the plain DiT and loops of ``reference.py`` and
``reference_loops.py`` for what diffusers has no model for; always in FP32, with diffusers' autoencoder. This runs as a
process of its own, which never imports the modules and graphs that are exported: an error there cannot reach its own
yardstick.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderTiny
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from dit_export.checkpoint import Checkpoint, Source, load_checkpoint
from dit_export.random_weights import SkippedInitialization
from dit_export.reference import DiT
from dit_export.reference_loops import LoopStep, OfficialDiffusion, SiTPath, diffusers_ddim, diffusers_ddpm
from dit_runtime.bundle import GOLDEN, sized
from dit_runtime.command import run
from dit_runtime.errors import CheckpointError, ParityError
from dit_runtime.progress import Progress
from dit_runtime.verify import trajectories_of

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
        elements = sum(int(np.prod(shape)) for shape in checkpoint.weights.shapes.values())
        most = len(checkpoint.diffusion.betas) or 50
        if elements > LARGE_MODEL:
            return Plan(pictures=1, steps=min(4, most), forward_pictures=2)
        # A further size has the weights of the first, and the sampler has no size: fewer pictures and steps will do.
        first = checkpoint.model.latent_size == checkpoint.sizes[0]
        return Plan(4, min(50, most), 4) if first else Plan(2, min(10, most), 2)

    @property
    def work(self) -> int:
        """Reference evaluations, for the progress bar."""
        return 4 + 2 * self.steps


class Reference:
    """A checkpoint's unpatched modules, at the size of its ``model``."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint, self.spec = checkpoint, checkpoint.model
        self.channels, self.classes = self.spec.latent_channels, self.spec.classes
        self.blocks: nn.ModuleList
        if checkpoint.transformer is not None:
            self.transformer: Any = checkpoint.transformer()
            self.blocks = self.transformer.transformer_blocks
            self.evaluate = self._diffusers_square if self.spec.grid[0] == self.spec.grid[1] else self._diffusers_other
        else:
            with SkippedInitialization():
                self.transformer = DiT(self.spec, checkpoint.channels)
            state = (
                dict(checkpoint.weights)
                if self.spec.latent_size == checkpoint.trained_size
                else {
                    **{name: checkpoint.weights[name] for name in checkpoint.weights if name != "pos_embed"},
                    "pos_embed": official_positions(self.spec.width, self.spec.grid),
                }
            )
            self.transformer.load_state_dict(state, assign=True)
            self.transformer.eval().requires_grad_(False)
            self.blocks = self.transformer.blocks
            self.evaluate = self._official

    def _diffusers_square(self, z: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        output: Tensor = self.transformer(z, timestep=t, class_labels=labels).sample
        return output

    def _diffusers_other(self, z: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """diffusers' own modules in its own order; its ``forward`` only reshapes tokens to squares."""
        model = self.transformer
        x = model.pos_embed(z)
        for block in model.transformer_blocks:
            x = block(x, timestep=t, class_labels=labels)
        condition = model.transformer_blocks[0].norm1.emb(t, labels, hidden_dtype=x.dtype)
        shift, scale = model.proj_out_1(nn.functional.silu(condition)).chunk(2, dim=1)
        x = model.proj_out_2(model.norm_out(x) * (1 + scale[:, None]) + shift[:, None])
        (h, w), p = self.spec.grid, self.spec.patch_size
        x = torch.einsum("nhwpqc->nchpwq", x.reshape(-1, h, w, p, p, self.checkpoint.channels))
        return x.reshape(-1, self.checkpoint.channels, h * p, w * p)

    def _official(self, z: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        output: Tensor = self.transformer(z, t, labels)
        return output[:, : self.spec.output_channels]  # SiT drops a second half

    def predicted(self, z: Tensor, t: Tensor, labels: Tensor, guidance: float) -> tuple[Tensor, Tensor]:
        """Guided prediction ``[B, C, H, W]`` and the conditional branch's variance channels.

        Guidance acts on all channels as in ``DiTPipeline``, or on the first three as in the official
        ``forward_with_cfg``: the others are the conditional branch's.
        """
        if guidance == 1:
            output = self.evaluate(z, t, labels)
            return output[:, : self.channels], output[:, self.channels :]
        classes = torch.cat([labels, torch.full_like(labels, self.classes)])
        output, null = self.evaluate(torch.cat([z, z]), torch.cat([t, t]), classes).chunk(2)
        guided = self.checkpoint.diffusion.guidance_channels
        cond, uncond = output[:, :guided], null[:, :guided]
        e = torch.cat([uncond + guidance * (cond - uncond), output[:, guided : self.channels]], dim=1)
        return e, output[:, self.channels :]

    def loop(self, name: str, steps: int, generators: list[torch.Generator]) -> Iterator[LoopStep]:
        """The reference's own sampling loop."""
        diffusion, learned = self.checkpoint.diffusion, self.spec.learned_variance
        if diffusion.path is not None:
            path = SiTPath(diffusion.path)
            return path.ode(steps) if name == "euler" else path.sde(steps, generators)
        if self.checkpoint.scheduler is None:
            official = OfficialDiffusion(diffusion.betas, steps)
            return official.ddim() if name == "ddim" else official.ddpm(learned, generators)
        if name == "ddim":
            return diffusers_ddim(self.checkpoint.scheduler, steps, generators)
        return diffusers_ddpm(self.checkpoint.scheduler.config, steps, learned, generators)

    def decoded(self, z: Tensor) -> Tensor:
        """Latents → float pictures ``[B, 3, H, W]``, not clamped."""
        config = self.checkpoint.autoencoder.config
        latents = 1 / config.scaling_factor * z
        if config.shift_factor:
            latents = latents + config.shift_factor
        pictures: Tensor = self.checkpoint.autoencoder.decode(latents).sample
        return pictures

    def encoded(self, pictures: np.ndarray[Any, np.dtype[np.uint8]]) -> dict[str, Tensor]:
        """uint8 pictures → mean and, of a posterior, standard deviation, as the sampler's latents."""
        autoencoder = self.checkpoint.autoencoder
        scale, shift = autoencoder.config.scaling_factor, autoencoder.config.shift_factor or 0.0
        x = 2 * (torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255) - 1
        if isinstance(autoencoder, AutoencoderTiny):
            return {"mean": (autoencoder.encode(x).latents - shift) * scale}
        posterior = autoencoder.encode(x).latent_dist
        return {"mean": (posterior.mean - shift) * scale, "std": posterior.std * scale}

    @staticmethod
    def pictures(decoded: Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """As ``DiTPipeline`` and ``numpy_to_pil`` make them: uint8 ``[B, H, W, 3]``."""
        scaled = (decoded / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).float().numpy()
        pictures: np.ndarray[Any, np.dtype[np.uint8]] = (scaled * 255).round().astype("uint8")
        return pictures


def official_positions(width: int, grid: tuple[int, int]) -> Tensor:
    """The official ``get_2d_sincos_pos_embed`` ``[1, T, D]``, with a grid that need not be square."""
    columns, rows = np.meshgrid(np.arange(grid[1], dtype=np.float64), np.arange(grid[0], dtype=np.float64))
    omega = 1.0 / 10000 ** (np.arange(width // 4, dtype=np.float64) / (width / 4.0))
    parts = []
    for position in (columns, rows):  # "here w goes first"
        out = np.einsum("m,d->md", position.reshape(-1), omega)
        parts += [np.sin(out), np.cos(out)]
    return torch.from_numpy(np.concatenate(parts, axis=1)).float()[None]


def write_records(checkpoint: Checkpoint, folder: Path, encoder: bool, advance: Callable[[], None]) -> None:
    """Write ``NAME.npz`` for each record into ``folder``, with ``encoder`` that of the encoder too.

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
        first, *_ = names = trajectories_of(checkpoint.diffusion)
        for name in names:
            records[name] = _trajectory(reference, plan, name, advance)
        latents = torch.from_numpy(records[first]["latents"][-1])
        decoded = reference.decoded(latents)
        pictures = reference.pictures(decoded)
        records["images"] = {"latents": latents.numpy(), "decoded": decoded.numpy(), "images": pictures}
        if encoder:
            encoded = reference.encoded(pictures)
            records["encoder"] = {"images": pictures, **{key: value.numpy() for key, value in encoded.items()}}
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
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(count, reference.channels, *reference.spec.latent_size, generator=generator)
    training = len(reference.checkpoint.diffusion.betas)
    # From pure noise nearly to the picture: 999 … 10 of 1000 steps, 0 … 0.99 of a velocity model.
    times = torch.linspace(training - 1, training // 100, count).long() if training else torch.linspace(0, 0.99, count)
    labels = torch.linspace(0, reference.classes - 1, count).long()
    return z, times, labels


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
    z, _, labels = _inputs(reference, 2, seed=1)
    training = len(reference.checkpoint.diffusion.betas)
    timesteps = torch.tensor([training // 100 * 20]) if training else torch.tensor([0.8])
    z, labels = z[:1], labels[1:]
    outputs: list[Tensor] = []
    stride = max(1, reference.spec.tokens // TOKENS_KEPT)

    def keep(_: Any, __: Any, output: Tensor) -> None:
        outputs.append(output[:, ::stride].clone())

    hooks = [block.register_forward_hook(keep) for block in reference.blocks]
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


def _trajectory(reference: Reference, plan: Plan, name: str, advance: Callable[[], None]) -> dict[str, Any]:
    """A free-running trajectory in the reference's own loop."""
    seeds = np.arange(plan.pictures)
    generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
    labels = torch.linspace(0, reference.classes - 1, plan.pictures + 1)[1:].long()
    z = randn_tensor((plan.pictures, reference.channels, *reference.spec.latent_size), generator=generators)
    latents, denoised, noises = [z], [], []
    for step in reference.loop(name, plan.steps, generators):
        e, v = reference.predicted(z, torch.full((plan.pictures,), step.t), labels, GUIDANCE)
        drawn = [generator.get_state() for generator in generators]
        z, clean = step.advance(e, v, z)
        latents.append(z)
        denoised.append(clean)
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


def records_in_process(source: Source, folder: Path, encoder: bool) -> None:
    """Make the records in a fresh interpreter; its progress and its errors appear on our stderr.

    They go into ``golden`` in ``folder``, and into a folder of its own for each size after the first.

    Raises:
        SystemExit: the process reported an error, in words of its own.
    """
    command = [sys.executable, "-m", "dit_export.golden", os.fspath(folder), json.dumps(encoder)]
    finished = subprocess.run(command, input=source.to_json(), text=True, check=False)
    if finished.returncode == 1:
        raise SystemExit(1)
    if finished.returncode != 0:
        raise CheckpointError(
            f"{source.name}: the reference process ended with {finished.returncode}; "
            "most likely it ran out of memory, or was killed"
        )


def _main() -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent answers Ctrl-C, and ends this process
    folder, encoder = sys.argv[1:]
    checkpoint = load_checkpoint(Source.from_json(sys.stdin.read()))
    at_sizes = [replace(checkpoint, model=checkpoint.at(size)) for size in checkpoint.sizes]
    with Progress("PyTorch reference", sum(Plan.of(each).work for each in at_sizes)) as bar:
        for each in at_sizes:
            size = each.model.latent_size
            target = Path(folder) / (GOLDEN if each is at_sizes[0] else sized(GOLDEN, size))
            target.mkdir()
            write_records(each, target, json.loads(encoder), bar.advance)
    return 0


if __name__ == "__main__":
    run("dit-export", _main)
