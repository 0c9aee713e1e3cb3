"""Reads a file with the official names: facebookresearch/DiT's, or that of a velocity model with its parameters."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import cast

from diffusers import DDIMScheduler

from dit_export.checkpoints.autoencoder_file import autoencoder_from_file
from dit_export.checkpoints.autoencoders import (
    STABLE_DIFFUSION_VAE,
    Autoencoder,
    autoencoder_for,
    checked_autoencoder,
    spec_of_autoencoder,
    with_statistics,
)
from dit_export.checkpoints.checkpoint import Checkpoint
from dit_export.checkpoints.conventions import find_conventions
from dit_export.checkpoints.descendants import refuse_descendants
from dit_export.checkpoints.diffusers_folder.scheduler import LINEAR_BETAS, diffusion_from_config
from dit_export.checkpoints.families import FAMILIES
from dit_export.checkpoints.formats import CheckpointFormat, Location
from dit_export.checkpoints.layouts import Numerics, official_spec
from dit_export.checkpoints.policy_folder import FAMILY as POLICY
from dit_export.checkpoints.policy_folder import NETWORK, error_without_config
from dit_export.checkpoints.positions import grid_of_table
from dit_export.checkpoints.source import Source, refuse_options
from dit_export.checkpoints.stated_model import check_model, check_parts, has_null_row, heads_of
from dit_export.checkpoints.statements import Statements
from dit_export.checkpoints.training_parts import LatentStatistics, ModelPart, statistics_from_file, take_model
from dit_export.checkpoints.weights import (
    AUTOENCODER,
    PICKLES,
    SAFE,
    StoredTensor,
    Weights,
    check_sha256,
    read_weights_file,
)
from dit_runtime.bundle.manifest import PATHS, DiffusionSpec, ModelSpec, SecondTime, Time
from dit_runtime.core.errors import CheckpointError

logger = logging.getLogger("dit_runtime.export")  # a command prints what is logged below dit_runtime


def _is_weights_file(location: Location) -> bool:
    return location.path is not None and location.path.suffix in (SAFE, *PICKLES)


def _load(source: Source, location: Location) -> Checkpoint:
    file = location.path
    assert file is not None
    if source.family == POLICY:
        raise error_without_config(file)
    if source.family == "diffusers":
        raise CheckpointError(f"{file}: is a file; with --family diffusers expected a DiTPipeline folder")
    read = read_weights_file(file, source.weights)
    if any(name.startswith(NETWORK) for name in read.tensors):
        raise error_without_config(file)
    sha256 = check_sha256([file], source.sha256)
    said = Statements(str(file), read.arguments)
    refuse_descendants(str(file), read.tensors)
    part = take_model(said, read.tensors)
    conventions = find_conventions(source, said, location.name, part, _learns_variance(part.tensors))
    if FAMILIES[conventions.family].time is None:
        refuse_options(source, {"path", "time"})
    if conventions.second_time is None:
        refuse_options(source, {"second_time"})
    weights = Weights(str(file), part.tensors)
    statistics = _statistics_of(source, file, part, read.has_autoencoder)
    autoencoder = _autoencoder_of(source, file, read.has_autoencoder, conventions.family, statistics)
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
    check_parts(str(file), conventions.family, spec)
    if not spec.has_null:
        logger.info("%s: no row of the label table is the null class: the model is exported without guidance", file)
    source = replace(source, path=conventions.path, second_time=conventions.second_time)
    found = official_checkpoint(source, conventions.family, spec, channels, weights, autoencoder, name, sha256)
    return replace(found, diffusion=replace(found.diffusion, guidance_inside=conventions.guidance_inside))


def _learns_variance(tensors: Mapping[str, StoredTensor]) -> bool:
    """Whether the network's output has more channels than its input; True for shapes that are no DiT's."""
    output, patches = (tensors.get(name) for name in ("final_layer.linear.weight", "x_embedder.proj.weight"))
    if output is None or patches is None or len(patches.shape) != 4 or not output.shape:
        return True
    return output.shape[0] > math.prod(patches.shape[1:])


def _statistics_of(source: Source, file: Path, part: ModelPart, has_autoencoder: bool) -> LatentStatistics | None:
    """The statistics of a model's latents: of ``--latent-stats``, else its file's own, else none.

    REPA-E trains a model with its autoencoder, which the file then holds, or on latents of a finished one, whose
    statistics lie in a file of their own.

    Raises:
        CheckpointError: both are there for one autoencoder, or neither is where there must be one.
    """
    if source.latent_stats is not None:
        if part.statistics is not None and has_autoencoder:
            raise CheckpointError(
                f"{file}: holds statistics of the latents of the autoencoder in it; leave --latent-stats out"
            )
        return statistics_from_file(Path(source.latent_stats))
    if part.lacks_statistics:
        raise CheckpointError(
            f"{file}: its statistics of latents (bn.running_mean, bn.running_var) are 0 and 1, which no training made; "
            "name the file that has those of its autoencoder (--latent-stats)"
        )
    return part.statistics


def _autoencoder_of(
    source: Source, file: Path, is_inside: bool, family: str, statistics: LatentStatistics | None
) -> Autoencoder:
    """The autoencoder of a file: the one that ``--vae`` names, the file's own, or the family's usual one.

    Where there are statistics of the latents, they say how latents are scaled.
    """
    if statistics is not None:
        refuse_options(source, {"autoencoder_scaling"})
        source = replace(source, autoencoder_scaling=())
    if source.autoencoder is None and is_inside:
        logger.info("%s: took the autoencoder that is in the file (%s)", file, AUTOENCODER)
        autoencoder = checked_autoencoder(file, autoencoder_from_file(file, source.autoencoder_scaling, AUTOENCODER))
    else:
        autoencoder = autoencoder_for(source, FAMILIES[family].autoencoder)
    if statistics is None:
        return _scale_latents(source, file, autoencoder, family)
    logger.info("%s: statistics of %d latent channels scale the latents", file, len(statistics.mean))
    return with_statistics(file, autoencoder, statistics)


def _scale_latents(source: Source, file: Path, autoencoder: Autoencoder, family: str) -> Autoencoder:
    """The same autoencoder with the family's own scaling of Stable Diffusion's latents, where it has one."""
    scale, own = FAMILIES[family].latent_scale, autoencoder.config.scaling_factor
    if scale is not None and source.autoencoder_scaling is None and own == STABLE_DIFFUSION_VAE["scaling_factor"]:
        logger.info(
            "%s: %s's code scales latents by %g; the autoencoder's own %g is not used", file, family, scale, own
        )
        autoencoder.register_to_config(scaling_factor=scale)
    return autoencoder


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
    """A checkpoint whose reference is not diffusers' own; ``channels`` are the network's output channels."""
    guided = min(FAMILIES[family].guidance_channels or spec.latent_channels, spec.latent_channels)
    if (time := FAMILIES[family].time) is None:
        scheduler = DDIMScheduler(**LINEAR_BETAS)
        diffusion = diffusion_from_config(scheduler.config, guided)
        diffusion = replace(diffusion, timestep_spacing="official", steps_offset=0)
    else:
        path = source.path or PATHS[0]
        diffusion = DiffusionSpec((), "velocity", guided, "uniform", 0, True, path, time=cast(Time, time))
        diffusion = replace(diffusion, time_shift=FAMILIES[family].time_shift)
    if FAMILIES[family].second_time is not None:
        second = cast(SecondTime, source.second_time or FAMILIES[family].second_time)
        diffusion = replace(diffusion, second_time=second, guidance_inside=True)
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
    options=frozenset(
        {
            *("heads", "path", "time", "second_time", "weights", "classes", "sha256"),
            *("autoencoder_scaling", "latent_stats"),
        }
    ),
    recognizes=_is_weights_file,
    load=_load,
)
