"""Golden records: what the unpatched PyTorch reference computes, for a bundle to be checked against anywhere.

With them come PyTorch's own errors in each precision and the size of its numbers. All of it is made in FP32 and from
fixed seeds, in a process of its own that never imports the modules and graphs that are exported: an error there cannot
reach its own yardstick.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from dit_export.checkpoints.sources import Checkpoint, Source, load_checkpoint
from dit_export.reference.floors import (
    PRECISIONS,
    floors_of,
    magnitudes_of,
    measurements,
)
from dit_export.reference.pipeline import Reference
from dit_runtime.bundle.macs import step_gmac
from dit_runtime.bundle.manifest import sized
from dit_runtime.bundle.reader import GOLDEN, TILE, UNGUIDED
from dit_runtime.commands.common import run
from dit_runtime.core.errors import CheckpointError, ParityError
from dit_runtime.core.progress import Progress
from dit_runtime.verify.verification import trajectories_of

GUIDANCE = 1.5  # of the trajectories
FORWARD_GUIDANCE = 4.0
LARGE_MODEL = 100_000_000  # parameters; above, records are made smaller
CHEAP_GMAC = 1.0  # of an evaluation of one image; above, trajectories are shorter
TOKENS_KEPT = 32  # of each block's output, evenly spaced
TILES_KEPT = 2  # images of which a tile is decoded


@dataclass(frozen=True)
class RecordPlan:
    """What is recorded.

    Attributes:
        images, steps: of a trajectory; of one without guidance it is one image.
        forward_images: of a forward.
        measured: of how many trajectories PyTorch's own errors are measured step by step; on its own way, of all.
        measured_steps: over how many steps, but for the first trajectory's own way, which is measured to its image.
        precisions: in which PyTorch's own errors are measured.
        seed: of all noise; with 0 timesteps and labels are spread evenly, with others they are drawn too.
        guidance, forward_guidance: of trajectories, and of the guided forward.
    """

    images: int
    steps: int
    forward_images: int
    measured: int
    measured_steps: int
    precisions: tuple[str, ...] = tuple(PRECISIONS)
    seed: int = 0
    guidance: float = GUIDANCE
    forward_guidance: float = FORWARD_GUIDANCE

    @staticmethod
    def of(checkpoint: Checkpoint, precision: str) -> RecordPlan:
        """The plan for an export in that precision.

        Of a large model only the errors that its engines are held against: FP64 takes twice the model's memory.
        """
        elements = sum(int(np.prod(shape)) for shape in checkpoint.weights.shapes.values())
        most = len(checkpoint.diffusion.betas) or 50
        # A further size has the weights of the first, and the sampler has no size: less will do.
        first = checkpoint.model.latent_size == checkpoint.sizes[0]
        cheap = step_gmac(checkpoint.model) <= CHEAP_GMAC
        if elements > LARGE_MODEL:
            precisions = tuple(dict.fromkeys((precision, "bf16")))
            return RecordPlan(1, min(4, most), 2, measured=1, measured_steps=min(2, most), precisions=precisions)
        images, steps = ((4, min(50, most)) if cheap else (2, min(20, most))) if first else (2, min(10, most))
        forwards = max(images, 4) if first else images
        return RecordPlan(images, steps, forwards, measured=1 + (first or cheap), measured_steps=steps)

    @property
    def work(self) -> int:
        """Pieces of work, for the progress bar."""
        return 4 + 3 * self.steps + measurements(self.steps, self.measured_steps, self.measured, self.precisions)


@dataclass(frozen=True)
class Measured:
    """What the reference process reports beside the records: see ``Manifest.floors`` and ``Manifest.magnitudes``."""

    floors: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    magnitudes: dict[str, float] = field(default_factory=dict)

    def joined(self, other: Measured, size: tuple[int, int]) -> Measured:
        """With what was measured at a further size."""
        floors = {
            name: {**series, **{sized(key, size): values for key, values in other.floors[name].items()}}
            for name, series in self.floors.items()
        }
        units = self.magnitudes | other.magnitudes
        largest = {unit: max(self.magnitudes.get(unit, 0), other.magnitudes.get(unit, 0)) for unit in units}
        return Measured(floors, largest)


def write_records(
    checkpoint: Checkpoint,
    plan: RecordPlan,
    folder: Path,
    encoder: bool,
    advance: Callable[[], None],
    tiles: Sequence[int] = (),
) -> Measured:
    """Write ``NAME.npz`` for each record into ``folder``, with ``encoder`` that of the encoder too.

    ``tiles``: sides in latent pixels of tiles that are decoded by themselves; those as large as the image are none.

    Raises:
        ParityError: the reference itself is not finite, or its image is constant: nothing to compare with.
    """
    reference = Reference(checkpoint)
    records: dict[str, dict[str, Any]] = {}
    names = trajectories_of(checkpoint.diffusion)
    with torch.inference_mode():
        records["blocks"] = _blocks(reference, plan)
        advance()
        for branches, guidance in ((1, 1.0), (2, plan.forward_guidance)):
            with reference.observe() as seen:
                records[f"forward_{branches}"] = record = _forward(reference, plan, guidance)
            advance()
        records["conditioner"] = {
            "timesteps": np.tile(record["timesteps"], 2),
            "labels": np.concatenate([record["labels"], np.full_like(record["labels"], reference.classes)]),
            "table": reference.conditioning_table(seen).numpy(),
        }
        with magnitudes_of(reference, encoder) as magnitudes:
            for name in names:
                records[name] = _trajectory(reference, plan, name, advance)
            unguided = replace(plan, images=1, guidance=1.0)
            records[UNGUIDED] = _trajectory(reference, unguided, names[1], advance)
            latents = torch.from_numpy(records[names[0]]["latents"][-1])
            decoded = reference.decoded(latents)
            images = reference.images(decoded)
            records["images"] = {"latents": latents.numpy(), "decoded": decoded.numpy(), "images": images}
            for tile in tiles:
                if tile < max(reference.spec.latent_size):
                    records[f"{TILE}{tile}"] = _tile(reference, latents, tile)
            if encoder:
                encoded = reference.encoded(images)
                records["encoder"] = {"images": images, **{key: value.numpy() for key, value in encoded.items()}}
        advance()
        check_records(checkpoint.name, records)
        floors = floors_of(reference, records, names, plan.measured, plan.measured_steps, plan.precisions, advance)
    for name, record in records.items():
        np.savez(folder / f"{name}.npz", **record)
    return Measured(floors, {unit: float(f"{value:.4g}") for unit, value in magnitudes.items()})


def check_records(name: str, records: dict[str, dict[str, Any]]) -> None:
    """The gates that engines pass, for the reference itself.

    Raises:
        ParityError: something is not finite, or an image is constant: nothing to compare with.
    """
    for record, arrays in records.items():
        for key, value in arrays.items():
            if not np.isfinite(value).all():
                raise ParityError(
                    f"{name}: the PyTorch reference itself is not finite ({record}, {key}); "
                    "the checkpoint or its scheduler is unusable"
                )
    for index, image in enumerate(records["images"]["images"]):
        if image.std() == 0:
            raise ParityError(f"{name}: the PyTorch reference's image {index + 1} is constant; nothing to compare with")


def _inputs(reference: Reference, plan: RecordPlan, count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, timesteps and labels of ``count`` images."""
    generator = torch.Generator().manual_seed(plan.seed * 10 + seed)
    z = torch.randn(count, reference.channels, *reference.spec.latent_size, generator=generator)
    training = len(reference.checkpoint.diffusion.betas)
    if plan.seed == 0:
        # From pure noise nearly to the image: 999 … 10 of 1000 steps, 0 … 0.99 of a velocity model.
        times, labels = torch.linspace(1, 0.01, count), torch.linspace(0, reference.classes - 1, count).long()
    else:
        times = torch.rand(count, generator=generator)
        labels = torch.randint(reference.classes, (count,), generator=generator)
    if not training:
        return z, 1 - times, labels
    return z, (times * training).long().clamp(max=training - 1), labels


def _forward(reference: Reference, plan: RecordPlan, guidance: float) -> dict[str, Any]:
    z, timesteps, labels = _inputs(reference, plan, plan.forward_images, seed=0)
    e, v = reference.predicted(z, timesteps, labels, guidance)
    return {
        "latents": z.numpy(),
        "timesteps": timesteps.numpy(),
        "labels": labels.numpy(),
        "guidance": guidance,
        "e": e.numpy(),
        "v": v.numpy(),
    }


def _blocks(reference: Reference, plan: RecordPlan) -> dict[str, Any]:
    """Blocks at G = 2 in the order [conditional, null]: what conditions them, what enters the first, and each output.

    Of tokens some are kept.
    """
    z, timesteps, labels = (of_both[1:] for of_both in _inputs(reference, plan, 2, seed=1))
    if plan.seed == 0:
        training = len(reference.checkpoint.diffusion.betas)
        timesteps = torch.tensor([training // 100 * 20]) if training else torch.tensor([0.8])
    stride = max(1, reference.spec.tokens // TOKENS_KEPT)
    with reference.observe() as seen:
        reference.predicted(z, timesteps, labels, plan.guidance)
    return {
        "latents": z.numpy(),
        "timesteps": timesteps.numpy(),
        "labels": labels.numpy(),
        "guidance": plan.guidance,
        "token_stride": stride,
        "table": reference.conditioning_table(seen).numpy(),
        "tokens": seen.tokens[0][:1, : reference.spec.tokens : stride].numpy(),
        "outputs": torch.stack([output[:, ::stride] for output in seen.blocks]).numpy(),
    }


def _trajectory(reference: Reference, plan: RecordPlan, name: str, advance: Callable[[], None]) -> dict[str, Any]:
    """A free-running trajectory in the reference's own loop."""
    seeds = plan.seed * 100 + np.arange(plan.images)
    generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
    labels = torch.linspace(0, reference.classes - 1, plan.images + 1)[1:].long()
    z = randn_tensor((plan.images, reference.channels, *reference.spec.latent_size), generator=generators)
    latents, denoised, noises = [z], [], []
    for step in reference.loop(name, plan.steps, generators):
        e, v = reference.predicted(z, torch.full((plan.images,), step.t), labels, plan.guidance)
        drawn = [generator.get_state() for generator in generators]
        z, clean = step.advance(e, v, z)
        latents.append(z)
        denoised.append(clean)
        noises.append(_noise_since(drawn, generators, z))
        advance()
    return {
        "seeds": seeds,
        "labels": labels.numpy(),
        "guidance": plan.guidance,
        "steps": plan.steps,
        "latents": torch.stack(latents).numpy(),
        "denoised": torch.stack(denoised).numpy(),
        "noise": torch.stack(noises).numpy(),
    }


def _tile(reference: Reference, latents: Tensor, tile: int) -> dict[str, Any]:
    """The first tile of images, decoded without the rest of them."""
    part = latents[:TILES_KEPT, :, :tile, :tile].contiguous()
    decoded = reference.decoded(part)
    return {"latents": part.numpy(), "decoded": decoded.numpy(), "images": reference.images(decoded)}


def _noise_since(states: list[Tensor], generators: list[torch.Generator], like: Tensor) -> Tensor:
    """The noise that the scheduler drew in its step: the generators are replayed from before it."""
    if all(torch.equal(state, generator.get_state()) for state, generator in zip(states, generators, strict=True)):
        return torch.zeros_like(like)
    return torch.stack([torch.randn(like.shape[1:], generator=torch.Generator().set_state(state)) for state in states])


def records_in_process(source: Source, folder: Path, encoder: bool, precision: str) -> Measured:
    """Make the records in a fresh interpreter; its progress and its errors appear on our stderr.

    They go into ``golden`` in ``folder``, and into a folder of its own for each size after the first. ``precision`` is
    the export's.

    Raises:
        SystemExit: the process reported an error, in words of its own.
    """
    command = [sys.executable, "-m", "dit_export.reference.golden", os.fspath(folder), json.dumps(encoder), precision]
    finished = subprocess.run(command, input=source.to_json(), stdout=subprocess.PIPE, text=True, check=False)
    if finished.returncode == 1:
        raise SystemExit(1)
    if finished.returncode != 0:
        raise CheckpointError(
            f"{source.name}: the reference process ended with {finished.returncode}; "
            "most likely it ran out of memory, or was killed"
        )
    return Measured(**json.loads(finished.stdout.splitlines()[-1]))  # libraries may print, too


def _main() -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent answers Ctrl-C, and ends this process
    folder, encoder, precision = sys.argv[1:]
    source = Source.from_json(sys.stdin.read())
    checkpoint = load_checkpoint(source)
    if step_gmac(checkpoint.model) <= CHEAP_GMAC:
        torch.set_num_threads(1)  # so small a model waits for its threads more than it computes
    first, *further = (replace(checkpoint, model=checkpoint.at(size)) for size in checkpoint.sizes)
    with Progress("PyTorch reference", sum(RecordPlan.of(each, precision).work for each in (first, *further))) as bar:
        target = Path(folder) / GOLDEN
        target.mkdir()
        rest = json.loads(encoder), bar.advance, source.tiles
        measured = write_records(first, RecordPlan.of(first, precision), target, *rest)
        for each in further:
            size = each.model.latent_size
            target = Path(folder) / sized(GOLDEN, size)
            target.mkdir()
            further_records = write_records(each, RecordPlan.of(each, precision), target, *rest)
            measured = measured.joined(further_records, size)
    print(json.dumps(asdict(measured)))
    return 0


if __name__ == "__main__":
    run("dit-export", _main)
