"""Reads a file with the official names: the DiT of facebookresearch/DiT, or the SiT of willisma/SiT."""

from __future__ import annotations

import logging
from dataclasses import replace

from diffusers import DDIMScheduler

from dit_export.checkpoints.autoencoders import Autoencoder, autoencoder_for, spec_of_autoencoder
from dit_export.checkpoints.checkpoint import Checkpoint
from dit_export.checkpoints.conventions import find_conventions
from dit_export.checkpoints.diffusers_folder.scheduler import LINEAR_BETAS, diffusion_from_config
from dit_export.checkpoints.families import FAMILIES
from dit_export.checkpoints.formats import CheckpointFormat, Location
from dit_export.checkpoints.layouts import Numerics, official_spec
from dit_export.checkpoints.positions import grid_of_table
from dit_export.checkpoints.source import Source, refuse_options
from dit_export.checkpoints.stated_model import check_model, has_null_row, heads_of
from dit_export.checkpoints.statements import Statements
from dit_export.checkpoints.weights import PICKLES, SAFE, Weights, check_sha256, read_weights_file
from dit_runtime.bundle.manifest import PATHS, DiffusionSpec, ModelSpec
from dit_runtime.core.errors import CheckpointError

logger = logging.getLogger("dit_runtime.export")  # a command prints what is logged below dit_runtime


def _is_weights_file(location: Location) -> bool:
    return location.path is not None and location.path.suffix in (SAFE, *PICKLES)


def _load(source: Source, location: Location) -> Checkpoint:
    file = location.path
    assert file is not None
    if source.family == "diffusers":
        raise CheckpointError(f"{file}: is a file; with --family diffusers expected a DiTPipeline folder")
    read = read_weights_file(file, source.weights)
    sha256 = check_sha256([file], source.sha256)
    said = Statements(str(file), read.arguments)
    conventions = find_conventions(source, said, location.name)
    if conventions.family != "sit":
        refuse_options(source, {"path", "time"})
    weights = Weights(str(file), read.tensors)
    autoencoder = autoencoder_for(source)
    factor = spec_of_autoencoder(autoencoder).factor
    spec, channels = official_spec(
        str(file),
        weights.shapes,
        heads=heads_of(source, said),
        learned_variance=conventions.family == "official",
        has_null=lambda rows: has_null_row(source, said, rows),
        grid=lambda patch: grid_of_table(source, weights, patch, factor),
    )
    check_model(source, said, spec, channels, factor)
    name = location.name
    if read.path is not None:
        name = f"{name} (weights {read.path})"
        logger.info("%s: took the weights %s; beside them: %s", file, read.path, ", ".join(read.others) or "none")
    if not spec.has_null:
        logger.info("%s: no row of the label table is the null class: the model is exported without guidance", file)
    return official_checkpoint(
        replace(source, path=conventions.path), conventions.family, spec, channels, weights, autoencoder, name, sha256
    )


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
    defaults = FAMILIES[family].defaults
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
        defaults=defaults if spec.has_null else replace(defaults, guidance=1.0),
        weights=weights,
        autoencoder=autoencoder,
    )


FORMAT = CheckpointFormat(
    options=frozenset({"heads", "path", "time", "weights", "classes", "sha256", "autoencoder_scaling"}),
    recognizes=_is_weights_file,
    load=_load,
)
