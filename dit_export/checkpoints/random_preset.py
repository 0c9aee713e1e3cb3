"""Makes a published model with random weights, for measurements that need no trained weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from diffusers import DDIMScheduler, DiTTransformer2DModel
from torch import Tensor, device

from dit_export.checkpoints.autoencoders import (
    STABLE_DIFFUSION_VAE,
    VA_VAE,
    Autoencoder,
    autoencoder_for,
    random_autoencoder,
    spec_of_autoencoder,
)
from dit_export.checkpoints.checkpoint import Checkpoint
from dit_export.checkpoints.conventions import check_path
from dit_export.checkpoints.diffusers_folder.load import checkpoint_from_parts
from dit_export.checkpoints.diffusers_folder.scheduler import LINEAR_BETAS
from dit_export.checkpoints.diffusers_folder.transformer import diffusers_from_official
from dit_export.checkpoints.diffusers_modules import freeze
from dit_export.checkpoints.families import FAMILIES
from dit_export.checkpoints.formats import CheckpointFormat, Location
from dit_export.checkpoints.layouts import official_shapes
from dit_export.checkpoints.official_file import official_checkpoint
from dit_export.checkpoints.positions import ROTARY, official_table, rotary_table
from dit_export.checkpoints.presets import PRESET_NAMES, Preset, preset_from_name
from dit_export.checkpoints.random_weights import SkippedInitialization, random_tensors
from dit_export.checkpoints.source import Source, refuse_options
from dit_export.checkpoints.weights import StoredTensor, Weights
from dit_runtime.bundle.macs import MODULATIONS
from dit_runtime.bundle.manifest import PATHS, ModelSpec
from dit_runtime.core.errors import CheckpointError
from dit_runtime.samplers.noise import check_seed


def _has_no_path(location: Location) -> bool:
    return location.path is None


def _load(source: Source, location: Location) -> Checkpoint:
    preset = preset_from_name(source.name)
    if preset is None:
        raise CheckpointError(f"{source.name}: not a preset; with --random-weights expected {PRESET_NAMES}")
    assert source.random_seed is not None
    check_seed(source.random_seed)
    if source.autoencoder is None:
        refuse_options(source, {"autoencoder_scaling"})
    conditioning = source.conditioning or "adaln-zero"
    family = _family_of(source, preset, conditioning)
    architecture = VA_VAE if family == "lightningdit" else STABLE_DIFFUSION_VAE
    autoencoder: Autoencoder = (
        random_autoencoder((source.random_seed + 1) % 2**64, architecture)
        if source.autoencoder is None
        else autoencoder_for(source)
    )
    learned = source.learned_variance is not False
    latent = preset.image_side // spec_of_autoencoder(autoencoder).factor
    spec = ModelSpec(
        conditioning=conditioning,
        latent_channels=architecture["latent_channels"],
        latent_size=(latent, latent),
        patch_size=preset.patch_size,
        width=preset.width,
        depth=preset.depth,
        heads=preset.heads,
        mlp_width=4 * preset.width,
        classes=source.classes or 1000,
        learned_variance=learned and preset.kind == "DiT",
        times=1 if FAMILIES[family].second_time is None else 2,
    )
    if family == "lightningdit":  # the published configuration: configs/lightningdit_xl_vavae_f16d32.yaml
        spec = replace(spec, mlp_width=int(2 / 3 * spec.mlp_width), norm="rms", mlp="swiglu", rotary=True)
    channels = 2 * spec.latent_channels if family == "sit" and learned else spec.output_channels
    weights = Weights(source.name, _random_weights(spec, channels, source.random_seed))
    name = f"{source.name} ({conditioning}, random weights, seed {source.random_seed})"
    if family == "diffusers":
        return _diffusers_checkpoint(spec, weights, autoencoder, name)
    return official_checkpoint(source, family, spec, channels, weights, autoencoder, name, None)


def _random_weights(spec: ModelSpec, channels: int, seed: int) -> dict[str, StoredTensor]:
    """Random tensors by official name, and the positional tables that the published code computes."""
    tensors = random_tensors(official_shapes(spec, channels), seed)

    def computed(name: str, read: Callable[[], Tensor]) -> None:
        tensors[name] = StoredTensor(tensors[name].shape, read)

    computed("pos_embed", lambda: official_table(spec.width, spec.grid))
    if spec.rotary:
        cosines, sines = ROTARY
        computed(cosines, lambda: rotary_table(spec.width // spec.heads, spec.grid)[0])
        computed(sines, lambda: rotary_table(spec.width // spec.heads, spec.grid)[1])
    return tensors


def _family_of(source: Source, preset: Preset, conditioning: str) -> str:
    """The family that is asked for, or that the preset's name and conditioning say.

    Raises:
        CheckpointError: the family does not have this preset or conditioning.
    """
    usual = preset.families[0]
    family = source.family or ("official" if usual == "diffusers" and conditioning != "adaln-zero" else usual)
    if family == "diffusers" and conditioning != "adaln-zero":
        raise CheckpointError(f"conditioning {conditioning}: diffusers has none such; use --family official")
    if family not in preset.families:
        raise CheckpointError(
            f"{source.name} with --family {family}: expected a preset of that family, or --family "
            f"{' or '.join(preset.families)}"
        )
    if family == "lightningdit" and conditioning != "adaln-zero":
        raise CheckpointError(f"conditioning {conditioning}: LightningDiT has none such; leave --conditioning out")
    if FAMILIES[family].time is not None:
        check_path(source.name, family, source.path or PATHS[0])
    else:
        refuse_options(source, {"path"})
    if FAMILIES[family].second_time is None:
        refuse_options(source, {"second_time"})
    elif conditioning not in MODULATIONS:
        raise CheckpointError(f"conditioning {conditioning} with --family {family}; expected adaln-zero or adaln")
    return family


def _diffusers_checkpoint(spec: ModelSpec, weights: Weights, autoencoder: Autoencoder, name: str) -> Checkpoint:
    config = {
        "num_attention_heads": spec.heads,
        "attention_head_dim": spec.width // spec.heads,
        "in_channels": spec.latent_channels,
        "out_channels": spec.output_channels,
        "num_layers": spec.depth,
        "sample_size": spec.latent_size[0],
        "patch_size": spec.patch_size,
        "num_embeds_ada_norm": spec.classes,
    }

    def load_transformer() -> DiTTransformer2DModel:
        with SkippedInitialization():
            module = DiTTransformer2DModel(**config)
        module.load_state_dict(diffusers_from_official(weights, spec.depth), assign=True)  # no second copy in memory
        loaded: DiTTransformer2DModel = freeze(module)
        return loaded

    with device("meta"):
        with_defaults = DiTTransformer2DModel(**config).config
    # Stated, as in every folder that diffusers saves.
    scheduler = DDIMScheduler(**LINEAR_BETAS, timestep_spacing="leading")
    return checkpoint_from_parts(with_defaults, weights, autoencoder, scheduler, load_transformer, name=name)


FORMAT = CheckpointFormat(
    options=frozenset({"path", "second_time", "conditioning", "classes", "learned_variance", "autoencoder_scaling"}),
    recognizes=_has_no_path,
    load=_load,
)
