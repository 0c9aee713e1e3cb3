"""Reads a file with the official names: the DiT of facebookresearch/DiT, or the SiT of willisma/SiT."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from diffusers import DDIMScheduler

from dit_export.checkpoints.autoencoders import Autoencoder, autoencoder_for, spec_of_autoencoder
from dit_export.checkpoints.checkpoint import Checkpoint
from dit_export.checkpoints.diffusers_folder.scheduler import LINEAR_BETAS, diffusion_from_config
from dit_export.checkpoints.families import FAMILIES
from dit_export.checkpoints.formats import CheckpointFormat, Location
from dit_export.checkpoints.layouts import Numerics, official_spec
from dit_export.checkpoints.positions import grid_of_table
from dit_export.checkpoints.source import Source, refuse_options
from dit_export.checkpoints.weights import (
    PICKLES,
    SAFE,
    Weights,
    check_sha256,
    read_training_arguments,
    weights_from_file,
)
from dit_runtime.bundle.manifest import PATHS, DiffusionSpec, ModelSpec
from dit_runtime.core.errors import CheckpointError


def _is_weights_file(location: Location) -> bool:
    return location.path is not None and location.path.is_file() and location.path.suffix in (SAFE, *PICKLES)


def _load(source: Source, location: Location) -> Checkpoint:
    file = location.path
    assert file is not None
    family = source.family or "official"
    if family == "diffusers":
        raise CheckpointError(f"{file}: is a file; with --family diffusers expected a DiTPipeline folder")
    if family != "sit":
        refuse_options(source, {"path"})
    sha256 = check_sha256([file], source.sha256)
    weights = Weights(str(file), weights_from_file(file, ema=True))
    _check_training_arguments(source, family, read_training_arguments(file))
    autoencoder = autoencoder_for(source)
    factor = spec_of_autoencoder(autoencoder).factor
    spec, channels = official_spec(
        str(file),
        weights.shapes,
        heads=source.heads,
        learned_variance=family == "official",
        grid=lambda patch: grid_of_table(source, weights, patch, factor),
    )
    return official_checkpoint(source, family, spec, channels, weights, autoencoder, location.name, sha256)


def _check_training_arguments(source: Source, family: str, arguments: dict[str, Any]) -> None:
    """Check that the arguments a training checkpoint stores speak of the model that is exported.

    Raises:
        CheckpointError: they speak of another family, prediction or path.
    """
    model, path = str(arguments.get("model", "")), str(arguments.get("path_type", "")).lower()
    if model.startswith("SiT") and family != "sit":
        raise CheckpointError(f"{source.name}: was trained as {model}; export it with --family sit")
    if family == "sit" and arguments.get("prediction", "velocity") != "velocity":
        raise CheckpointError(
            f"{source.name}: predicts the {arguments['prediction']}; only velocity models are supported"
        )
    if family == "sit" and path in PATHS and path != (source.path or PATHS[0]):
        raise CheckpointError(f"{source.name}: was trained on the {path} path; export it with --path {path}")


def official_checkpoint(
    source: Source,
    family: str,
    spec: ModelSpec,
    channels: int,
    weights: Weights,
    autoencoder: Autoencoder,
    name: str,
    sha256: str | None,
) -> Checkpoint:
    """A checkpoint of the official or the SiT family; ``channels`` are the network's output channels."""
    if family == "official":
        scheduler = DDIMScheduler(**LINEAR_BETAS)
        diffusion = replace(diffusion_from_config(scheduler.config, 3), timestep_spacing="official", steps_offset=0)
    else:
        diffusion = DiffusionSpec((), "velocity", 3, "uniform", 0, True, source.path or PATHS[0])
    diffusion = replace(diffusion, guidance_channels=min(3, spec.latent_channels))
    return Checkpoint(
        name=name,
        revision=None,
        weights_sha256=sha256,
        family=family,
        model=spec,
        trained_size=spec.latent_size,
        sizes=(spec.latent_size,),
        channels=channels,
        numerics=Numerics(),
        diffusion=diffusion,
        defaults=FAMILIES[family].defaults,
        weights=weights,
        autoencoder=autoencoder,
    )


FORMAT = CheckpointFormat(
    options=frozenset({"heads", "path", "sha256", "autoencoder_scaling"}), recognizes=_is_weights_file, load=_load
)
