"""Reads a whole ``DiTPipeline`` folder."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffusers import DDIMScheduler, DiTTransformer2DModel

from dit_export.checkpoints.autoencoders import Autoencoder, autoencoder_for, load_autoencoder
from dit_export.checkpoints.checkpoint import Checkpoint
from dit_export.checkpoints.diffusers_folder.scheduler import (
    class_of_scheduler,
    diffusion_from_config,
    load_scheduler,
)
from dit_export.checkpoints.diffusers_folder.scheduler_options import options_of_config, own_sampler
from dit_export.checkpoints.diffusers_folder.sit import PIPELINE as SIT_PIPELINE
from dit_export.checkpoints.diffusers_folder.sit import load_sit
from dit_export.checkpoints.diffusers_folder.transformer import (
    check_kind,
    check_transformer_weights,
    official_from_diffusers,
    read_transformer_config,
    read_transformer_weights,
    spec_from_config,
)
from dit_export.checkpoints.diffusers_modules import load_module, read_json_object
from dit_export.checkpoints.families import FAMILIES
from dit_export.checkpoints.file_kinds import check_links
from dit_export.checkpoints.formats import CheckpointFormat, Location
from dit_export.checkpoints.key_errors import SUPPORTED
from dit_export.checkpoints.layouts import Numerics
from dit_export.checkpoints.source import Source
from dit_export.checkpoints.weights import Weights, check_sha256, files_of_module
from dit_runtime.core.errors import CheckpointError

logger = logging.getLogger("dit_runtime.export")  # a command prints what is logged below dit_runtime


def _is_folder(location: Location) -> bool:
    return location.path is not None and location.path.is_dir()


def _load(source: Source, location: Location) -> Checkpoint:
    folder = location.path
    assert folder is not None
    check_links(folder, ("model_index.json", "transformer", "scheduler"), folder)
    index = read_json_object(folder / "model_index.json")
    kind = class_of_pipeline(folder, index)
    if kind == SIT_PIPELINE:
        sit = load_sit(source, location)
        return replace(sit, class_names=_class_names(folder, index, sit.model.classes))
    if source.family not in (None, "diffusers"):
        raise CheckpointError(f"{folder}: is a folder, which --family {source.family} does not have; give the file")
    if kind != "DiTPipeline":
        raise CheckpointError(f"{folder}: is a {kind}; {SUPPORTED}")
    check_kind(folder / "transformer")
    tensors = read_transformer_weights(folder / "transformer", source.variant)
    shapes = {name: item.shape for name, item in tensors.items()}
    config = read_transformer_config(folder / "transformer", shapes)
    scheduler_file = folder / "scheduler" / "scheduler_config.json"
    scheduler_class = class_of_scheduler(scheduler_file, index)
    scheduler = load_scheduler(scheduler_file, scheduler_class)
    sha256 = check_sha256(files_of_module(folder / "transformer", source.variant), source.sha256)
    check_transformer_weights(folder / "transformer", config, shapes)
    if source.classes not in (None, config.num_embeds_ada_norm):
        raise CheckpointError(
            f"{folder}: --classes {source.classes}, and num_embeds_ada_norm says {config.num_embeds_ada_norm} classes, "
            "as the label table does; leave --classes out"
        )
    own = None
    if source.autoencoder is None:
        own = load_autoencoder(folder / "vae", source.variant, source.autoencoder_scaling)
    if (null := index.get("null_class_id")) not in (None, config.num_embeds_ada_norm):
        raise CheckpointError(
            f"{folder}/model_index.json: null_class_id is {null!r:.60}, and the label table's last row, which is the "
            f"null class, is {config.num_embeds_ada_norm}; correct it, or remove it"
        )
    return checkpoint_from_parts(
        config,
        official_from_diffusers(str(folder / "transformer"), tensors, config.num_layers),
        own or autoencoder_for(source),
        scheduler,
        functools.partial(load_module, folder / "transformer", DiTTransformer2DModel, source.variant),
        name=location.name,
        revision=location.revision,
        weights_sha256=sha256,
        class_names=_class_names(folder, index, config.num_embeds_ada_norm),
        sampler=own_sampler(scheduler_class, options_of_config(scheduler.config)),
    )


def class_of_pipeline(folder: Path, index: Mapping[str, Any]) -> str:
    """The class that ``model_index.json`` names; of a pair, a file of the folder and its class, the class.

    The folder's own file is not run: the class says which model it is, and the weights are read as that model's.
    """
    kind = index.get("_class_name")
    if isinstance(kind, list) and len(kind) == 2 and all(isinstance(part, str) for part in kind):
        logger.info("%s: its own %s.py is not run; it is read as a %s", folder, kind[0][:60], kind[1][:60])
        return str(kind[1])
    return str(kind)


def _class_names(folder: Path, index: Mapping[str, Any], count: int) -> tuple[str, ...]:
    """One name for each of ``count`` classes, or none where the index names none.

    Raises:
        CheckpointError: it names a class that the model does not have.
    """
    names = index.get("id2label") or {}
    if not isinstance(names, dict):
        raise CheckpointError(f"{folder}/model_index.json: id2label is no object; expected class names by number")
    if strangers := [key for key in names if not (key.isdecimal() and len(key) < 9 and int(key) < count)]:
        raise CheckpointError(
            f"{folder}/model_index.json: id2label names the class {strangers[0][:60]!r}, and the model's {count} "
            f"classes have the numbers from 0 to {count - 1}; correct id2label, or remove it"
        )
    return tuple(str(names.get(str(number), number)) for number in range(count)) if names else ()


def checkpoint_from_parts(
    config: Any,
    weights: Weights,
    autoencoder: Autoencoder,
    scheduler: DDIMScheduler,
    transformer: Callable[[], DiTTransformer2DModel],
    *,
    name: str,
    revision: str | None = None,
    weights_sha256: str | None = None,
    class_names: tuple[str, ...] = (),
    sampler: str = "ddim",
) -> Checkpoint:
    """A checkpoint of the diffusers family; ``config`` is the transformer's, ``transformer`` loads its module.

    ``sampler`` is the default one.
    """
    spec = spec_from_config(config)
    diffusion = diffusion_from_config(scheduler.config, spec.latent_channels)
    if diffusion.options.variance_type == "learned_range" and not spec.learned_variance:
        raise CheckpointError(
            f"{name}: the scheduler's variance_type is 'learned_range', but the transformer predicts no variance: it "
            f"has {spec.output_channels} output channels; set variance_type to fixed_small or fixed_large"
        )
    return Checkpoint(
        name=name,
        revision=revision,
        weights_sha256=weights_sha256,
        family="diffusers",
        model=spec,
        trained_size=spec.latent_size,
        sizes=(spec.latent_size,),
        channels=spec.output_channels,
        numerics=Numerics(frequency_shift=1.0, mlp_eps=config.norm_eps),
        diffusion=diffusion,
        defaults=replace(FAMILIES["diffusers"].defaults, sampler=sampler),
        weights=weights,
        autoencoder=autoencoder,
        class_names=class_names,
        scheduler=scheduler,
        transformer=transformer,
    )


FORMAT = CheckpointFormat(
    options=frozenset({"variant", "sha256", "classes", "autoencoder_scaling"}), recognizes=_is_folder, load=_load
)
