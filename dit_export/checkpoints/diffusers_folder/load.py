"""Reads a whole ``DiTPipeline`` folder."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
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


def _is_folder(location: Location) -> bool:
    return location.path is not None and location.path.is_dir()


def _load(source: Source, location: Location) -> Checkpoint:
    folder = location.path
    assert folder is not None
    if source.family not in (None, "diffusers"):
        raise CheckpointError(f"{folder}: is a folder, which --family {source.family} does not have; give the file")
    check_links(folder, ("model_index.json", "transformer", "scheduler"), folder)
    index = read_json_object(folder / "model_index.json")
    if (kind := index.get("_class_name")) != "DiTPipeline":
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
    names = index.get("id2label") or {}
    if not isinstance(names, dict):
        raise CheckpointError(f"{folder}/model_index.json: id2label is no object; expected class names by number")
    count = config.num_embeds_ada_norm
    if strangers := [key for key in names if not (key.isdecimal() and len(key) < 9 and int(key) < count)]:
        raise CheckpointError(
            f"{folder}/model_index.json: id2label names the class {strangers[0][:60]!r}, and the model's {count} "
            f"classes have the numbers from 0 to {count - 1}; correct id2label, or remove it"
        )
    classes = tuple(str(names.get(str(number), number)) for number in range(count))
    return checkpoint_from_parts(
        config,
        official_from_diffusers(str(folder / "transformer"), tensors, config.num_layers),
        own or autoencoder_for(source),
        scheduler,
        functools.partial(load_module, folder / "transformer", DiTTransformer2DModel, source.variant),
        name=location.name,
        revision=location.revision,
        weights_sha256=sha256,
        class_names=classes if names else (),
        sampler=own_sampler(scheduler_class, options_of_config(scheduler.config)),
    )


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
