"""Golden records: what the unpatched PyTorch reference computes, for a bundle to be checked against anywhere.

With them come PyTorch's own errors in each precision and the size of its numbers. All of it is made in FP32 from fixed
seeds, by code that never imports the modules and graphs that are exported: an error there cannot reach its yardstick.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from dit_export.checkpoints.checkpoint import Checkpoint
from dit_export.reference.emulation import emulate
from dit_export.reference.floors import floors_of, project_conditions
from dit_export.reference.magnitudes import magnitudes_of
from dit_export.reference.pipeline import Reference
from dit_export.reference.record_settings import (
    TILES_KEPT,
    TOKENS_KEPT,
    UNGUIDED_IMAGES,
    Measurements,
    RecordSettings,
)
from dit_runtime.bundle.manifest import INTERVAL, NOISE_AT_1
from dit_runtime.bundle.reader import CONDITIONS, OBSERVATIONS, STRONG, TILE, UNGUIDED, UNQUANTIZED
from dit_runtime.core.errors import ParityError
from dit_runtime.verify.conditions import choose_conditions
from dit_runtime.verify.verification import trajectories_of

PARTS = 4  # trajectories of a size


def write_records(
    checkpoint: Checkpoint,
    settings: RecordSettings,
    folder: Path,
    encoder: bool,
    advance: Callable[[], None],
    tiles: Sequence[int] = (),
    scales: Mapping[str, float] | None = None,
    factors: Mapping[str, Tensor] | None = None,
    precision: str = "int8",
) -> Measurements:
    """Write ``NAME.npz`` for each record into ``folder``.

    Args:
        checkpoint: the model at one size.
        settings: how much is recorded.
        folder: an empty folder.
        encoder: whether the encoder is recorded too.
        advance: called after each piece of work, ``settings.work`` times.
        tiles: sides in latent pixels of tiles to record; a tile must be smaller than the image.
        scales, factors: of the inputs of linear layers, which the reference then computes in
            ``precision`` (``emulation``);
            what it computes without is recorded too.

    Raises:
        ParityError: the reference itself is not finite, or its image is constant: there is nothing to compare with.
    """
    reference = Reference(checkpoint)
    records: dict[str, dict[str, Any]] = {}
    names = trajectories_of(checkpoint.diffusion)
    if scales is not None:
        with torch.inference_mode():
            records[UNQUANTIZED] = _record_unquantized(reference, settings, names[0])
        emulate(reference, precision, scales, factors or {})
    with torch.inference_mode():
        records["blocks"] = _record_blocks(reference, settings)
        advance()
        for branches, guidance in ((1, 1.0), (2, settings.forward_guidance)):
            with reference.observe() as seen:
                records[f"forward_{branches}"] = record = _record_forward(reference, settings, guidance)
            advance()
        records["conditioner"] = {
            "timesteps": np.concatenate([record["timesteps"]] * 2),
            "labels": np.concatenate([record["labels"], np.full_like(record["labels"], reference.spec.null_class)]),
            "table": reference.table_from_observation(seen).numpy(),
        }
        records[CONDITIONS] = _record_conditions(reference)
        with magnitudes_of(reference, encoder) as magnitudes:
            for part, name in enumerate(names):
                records[name] = _record_trajectory(reference, settings, name, advance, part)
            unguided = replace(settings, images=min(settings.images, UNGUIDED_IMAGES), guidance=1.0)
            records[UNGUIDED] = _record_trajectory(reference, unguided, names[-1], advance, 2)
            if reference.observations is not None:
                records[OBSERVATIONS] = {"observations": reference.observations.numpy()}
            else:
                strong = _record_trajectory(reference, settings.strong, names[0], advance, 3)
                records |= _record_images(reference, strong, records[names[0]]["latents"][-1], encoder, tiles)
        advance()
        check_records(checkpoint.name, records)
        floors = floors_of(
            reference,
            records,
            names,
            settings.measured,
            settings.measured_steps,
            settings.precisions,
            advance,
            settings.fp16_autoencoder,
        )
    for name, record in records.items():
        np.savez(folder / f"{name}.npz", **record)
    return Measurements(floors, {unit: float(f"{value:.4g}") for unit, value in magnitudes.items()})


def check_records(name: str, records: dict[str, dict[str, Any]]) -> None:
    """Check the reference's own results by the gates that engines must pass.

    Raises:
        ParityError: a number is not finite, or an image is constant: there is nothing to compare with.
    """
    for record, arrays in records.items():
        for key, value in arrays.items():
            if not np.isfinite(value).all():
                raise ParityError(
                    f"{name}: the PyTorch reference itself is not finite ({record}, {key}); "
                    "the checkpoint or its scheduler is unusable"
                )
    for index, image in enumerate(records.get("images", {}).get("images", ())):
        if image.std() == 0:
            raise ParityError(f"{name}: the PyTorch reference's image {index + 1} is constant; nothing to compare with")


def _make_inputs(
    reference: Reference, settings: RecordSettings, count: int, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, timesteps and labels of ``count`` images."""
    generator = torch.Generator().manual_seed(settings.seed * 10 + seed)
    z = torch.randn(count, reference.channels, *reference.spec.latent_size, generator=generator)
    training = len(reference.checkpoint.diffusion.betas)
    if settings.seed == 0:
        # From pure noise nearly to the image: 999 … 10 of 1000 steps, 0 … 0.99 of a SiT, 1 … 0.01 of a model of REPA.
        times, labels = torch.linspace(1, 0.01, count), torch.linspace(0, reference.classes - 1, count).long()
        shares = torch.linspace(1, 0, count)
    else:
        times = torch.rand(count, generator=generator)
        labels = torch.randint(reference.classes, (count,), generator=generator)
        shares = times.flip(0)
    if not training:
        return z, _model_time(reference, times, shares), labels
    return z, (times * training).long().clamp(max=training - 1), labels


def _model_time(reference: Reference, noise_times: Tensor, shares: Tensor) -> Tensor:
    """The time ``[N]`` of a velocity model at noise times ``[N]``, 1 at pure noise; of a model of two times ``[N, 2]``.

    ``shares [N]``: of the way to the image, for which the latter predicts the average velocity.
    """
    diffusion = reference.checkpoint.diffusion
    times = noise_times if diffusion.time == NOISE_AT_1 else 1 - noise_times
    if diffusion.second_time is None:
        return times
    return torch.stack([times, times * (shares if diffusion.second_time == INTERVAL else 1 - shares)], dim=1)


def _record_forward(reference: Reference, settings: RecordSettings, guidance: float) -> dict[str, Any]:
    z, timesteps, labels = _make_inputs(reference, settings, settings.forward_images, seed=0)
    e, v = reference.predict(z, timesteps, labels, guidance)
    return {
        "latents": z.numpy(),
        "timesteps": timesteps.numpy(),
        "labels": labels.numpy(),
        "guidance": guidance,
        "e": e.numpy(),
        "v": v.numpy(),
    }


def _record_blocks(reference: Reference, settings: RecordSettings) -> dict[str, Any]:
    """The conditioning table, the first block's input and each block's output, of one image with guidance.

    The two branches are in the order [conditional, null]. Only some of the tokens are recorded.
    """
    z, timesteps, labels = (of_two[1:] for of_two in _make_inputs(reference, settings, 2, seed=1))
    if settings.seed == 0:
        training = len(reference.checkpoint.diffusion.betas)
        timesteps = (
            torch.tensor([training // 100 * 20])
            if training
            else _model_time(reference, torch.tensor([0.2]), torch.tensor([0.5])).float()
        )
    stride = max(1, reference.spec.tokens // TOKENS_KEPT)
    with reference.observe() as seen:
        reference.predict(z, timesteps, labels, settings.guidance)
    return {
        "latents": z.numpy(),
        "timesteps": timesteps.numpy(),
        "labels": labels.numpy(),
        "guidance": settings.guidance,
        "token_stride": stride,
        "table": reference.table_from_observation(seen).numpy(),
        "tokens": seen.tokens[0][:1, : reference.spec.tokens : stride].numpy(),
        "outputs": torch.stack([output[:, ::stride] for output in seen.blocks]).numpy(),
    }


def _record_conditions(reference: Reference) -> dict[str, Any]:
    """Random projections of every class's and every timestep's row of the conditioning table."""
    timesteps, labels = choose_conditions(
        len(reference.checkpoint.diffusion.betas), reference.spec.label_rows, reference.spec.times
    )
    projections, norms = project_conditions(reference, timesteps, labels)
    numbers = {"projections": projections.astype(np.float32), "norms": norms.astype(np.float32)}
    return {"timesteps": timesteps, "labels": labels, **numbers}


def _record_trajectory(
    reference: Reference, settings: RecordSettings, name: str, advance: Callable[[], None], part: int
) -> dict[str, Any]:
    """A free-running trajectory of the reference's own loop.

    Trajectories of one image have labels that ``part`` of ``PARTS`` spreads over the classes.
    """
    seeds = settings.seed * 100 + np.arange(settings.images)
    generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
    labels = torch.linspace(0, reference.classes - 1, settings.images + 1)[1:].long()
    if settings.images == 1:
        labels = (labels + part * reference.classes // PARTS) % reference.classes
    z = randn_tensor((settings.images, reference.channels, *reference.spec.latent_size), generator=generators)
    latents, denoised, noises = [z], [], []
    for step in reference.loop(name, settings.steps, generators):
        e, v = reference.predict(z, step.times_of(settings.images), labels, settings.guidance)
        before = [generator.get_state() for generator in generators]
        z, clean = step.advance(e, v, z)
        latents.append(z)
        denoised.append(clean)
        noises.append(_replay_noise(before, generators, z))
        advance()
    return {
        "seeds": seeds,
        "labels": labels.numpy(),
        "guidance": settings.guidance,
        "steps": settings.steps,
        "latents": torch.stack(latents).numpy(),
        "denoised": torch.stack(denoised).numpy(),
        "noise": torch.stack(noises).numpy(),
    }


def _record_images(
    reference: Reference, strong: dict[str, Any], final: Any, encoder: bool, tiles: Sequence[int]
) -> dict[str, dict[str, Any]]:
    """The records of images, by name: of the trajectory ``strong`` and of the latents ``final`` of the first one."""
    strong["decoded"] = reference.decode(torch.from_numpy(strong["latents"][-1])).numpy()
    records = {STRONG: {**strong, "images": reference.images_from_decoded(torch.from_numpy(strong["decoded"]))}}
    latents = torch.from_numpy(final)
    decoded = reference.decode(latents)
    images = reference.images_from_decoded(decoded)
    records["images"] = {"latents": latents.numpy(), "decoded": decoded.numpy(), "images": images}
    for tile in tiles:
        if tile < max(reference.spec.latent_size):
            records[f"{TILE}{tile}"] = _record_tile(reference, latents, tile)
    if encoder:
        encoded = reference.encode(images)
        records["encoder"] = {"images": images, **{key: value.numpy() for key, value in encoded.items()}}
    return records


def _record_unquantized(reference: Reference, settings: RecordSettings, name: str) -> dict[str, Any]:
    """What the FP32 model computes of the guided forward's and the first trajectory's inputs."""
    latents = torch.from_numpy(_record_trajectory(reference, settings, name, lambda: None, 0)["latents"][-1])
    decoded = reference.decode(latents)
    return {
        "latents": latents.numpy(),
        "decoded": decoded.numpy(),
        "images": reference.images_from_decoded(decoded),
        "e": _record_forward(reference, settings, settings.forward_guidance)["e"],
    }


def _record_tile(reference: Reference, latents: Tensor, tile: int) -> dict[str, Any]:
    """The first tile of some images, decoded by itself."""
    part = latents[:TILES_KEPT, :, :tile, :tile].contiguous()
    decoded = reference.decode(part)
    return {"latents": part.numpy(), "decoded": decoded.numpy(), "images": reference.images_from_decoded(decoded)}


def _replay_noise(states: list[Tensor], generators: list[torch.Generator], like: Tensor) -> Tensor:
    """The noise that the scheduler drew in its step, drawn again from the generators' ``states`` before the step."""
    if all(torch.equal(state, generator.get_state()) for state, generator in zip(states, generators, strict=True)):
        return torch.zeros_like(like)
    return torch.stack([torch.randn(like.shape[1:], generator=torch.Generator().set_state(state)) for state in states])
