"""The autoencoder of a checkpoint: diffusers' ``AutoencoderKL`` or ``AutoencoderTiny``."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import nn
from torch.func import functional_call

from dit_export.checkpoints.autoencoder_file import AUTOENCODERS, Autoencoder, autoencoder_from_file, refuse_scaling
from dit_export.checkpoints.diffusers_modules import freeze, load_module, read_json_object
from dit_export.checkpoints.families import FAMILIES
from dit_export.checkpoints.file_kinds import check_links
from dit_export.checkpoints.hub import check_hub_id, download_repository, find_local
from dit_export.checkpoints.random_weights import SkippedInitialization, randomize
from dit_export.checkpoints.source import Source
from dit_export.checkpoints.training_parts import LatentStatistics
from dit_export.checkpoints.weights import PICKLES, SAFE, files_of_module
from dit_runtime.bundle.manifest import AutoencoderSpec
from dit_runtime.core.errors import CheckpointError

__all__ = ["AUTOENCODERS", "Autoencoder", "autoencoder_for", "load_autoencoder", "spec_of_autoencoder"]

SIDE = 256  # pixels of the image that is tried by its shape

HUB_FILES = ("config.json", "diffusion_pytorch_model*", "vae/*")

# The Stable Diffusion VAE, which every published DiT uses.
STABLE_DIFFUSION_VAE: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 256,
    "scaling_factor": 0.18215,
}


# LightningDiT's (hustvl/LightningDiT, vavae/configs/f16d32_vfdinov2.yaml), with statistics that change latents visibly:
# the published ones are in a file of their own.
VA_VAE: dict[str, Any] = {
    **STABLE_DIFFUSION_VAE,
    "down_block_types": (*("DownEncoderBlock2D",) * 4, "AttnDownEncoderBlock2D"),
    "up_block_types": ("AttnUpDecoderBlock2D", *("UpDecoderBlock2D",) * 4),
    "block_out_channels": (128, 128, 256, 256, 512),
    "latent_channels": 32,
    "scaling_factor": 1.0,
    "latents_mean": tuple((index - 15.5) / 16 for index in range(32)),
    "latents_std": tuple(2 + index / 16 for index in range(32)),
}


def autoencoder_for(source: Source, usual: str = FAMILIES["official"].autoencoder) -> Autoencoder:
    """The autoencoder that ``--vae`` names, or else the ``usual`` one, a hub id.

    Raises:
        CheckpointError: it cannot be found or read.
    """
    name = usual if source.autoencoder is None else source.autoencoder
    path = find_local(name)
    if path is not None and path.is_file():
        return checked_autoencoder(path, autoencoder_from_file(path, source.autoencoder_scaling))
    if path is None:
        try:
            check_hub_id(name, "the autoencoder's folder, file or hub id")
            path = download_repository(name, HUB_FILES, lambda found: is_complete_autoencoder(found, source.variant))
        except CheckpointError as error:
            hint = "" if source.autoencoder else "; a file has no autoencoder of its own: name one with --vae"
            raise CheckpointError(f"autoencoder {error}{hint}") from error
    return load_autoencoder(path, source.variant, source.autoencoder_scaling)


def load_autoencoder(folder: Path, variant: str | None, scaling: tuple[float, ...] | None = None) -> Autoencoder:
    """An ``AutoencoderKL`` or ``AutoencoderTiny`` from its own folder, or from a pipeline's folder with a ``vae``.

    Args:
        folder: with a ``config.json`` and weights, or with one weights file alone.
        variant: of the weights files; in a pipeline, the transformer alone may have it.
        scaling: of latents, for a weights file alone; see ``autoencoder_from_file``.

    Raises:
        CheckpointError: another class, images that are not RGB, or a scaling that is not supported.
    """
    folder = _own_folder(folder)
    pipeline = folder.parent if (folder.parent / "model_index.json").is_file() else None
    if pipeline is None:
        check_links(folder, (".",), folder)
    else:
        check_links(pipeline, (folder.name,), pipeline)
    config = folder / "config.json"
    if not config.is_file():
        files = sorted(path for path in folder.glob("*") if path.suffix in (SAFE, *PICKLES) and path.is_file())
        if len(files) == 1:
            return checked_autoencoder(files[0], autoencoder_from_file(files[0], scaling))
        shown = f"; name one of its files: {', '.join(file.name for file in files[:10])}" if files else ""
        raise CheckpointError(f"{config}: missing; expected an autoencoder's folder{shown}")
    kind = read_json_object(config).get("_class_name")
    if kind not in tuple(AUTOENCODERS):  # JSON has values that no dictionary can be asked for
        raise CheckpointError(f"{folder}: is a {kind}; expected an {' or an '.join(AUTOENCODERS)}")
    refuse_scaling(config, scaling)
    autoencoder: Autoencoder = load_module(folder, AUTOENCODERS[kind], _variant_of(folder, variant))
    return checked_autoencoder(folder, autoencoder)


def checked_autoencoder(path: Path, autoencoder: Autoencoder) -> Autoencoder:
    """The same autoencoder, which ``path`` holds.

    Raises:
        CheckpointError: its images are not RGB, or its scaling is not supported.
    """
    config = autoencoder.config
    if (config.in_channels, config.out_channels) != (3, 3):
        raise CheckpointError(f"{path}: {config.in_channels} to {config.out_channels} channels; expected RGB images")
    if not isinstance(config.scaling_factor, int | float) or not 0 < config.scaling_factor < float("inf"):
        raise CheckpointError(f"{path}: scaling_factor is {config.scaling_factor!r}; expected a number above 0")
    _check_statistics(path, config)
    _check_runs(path, autoencoder)
    return autoencoder


def _check_statistics(path: Path, config: Any) -> None:
    """Check the statistics of latents in a configuration, where there are any.

    Raises:
        CheckpointError: one is missing, or they are not a finite number for each channel, or there is a shift too.
    """
    mean, deviation = config.get("latents_mean"), config.get("latents_std")
    if mean is None and deviation is None:
        return
    count = config.latent_channels
    for name, values, least in (("latents_mean", mean, -math.inf), ("latents_std", deviation, 0.0)):
        plain = isinstance(values, list | tuple) and all(type(value) in (int, float) for value in values)
        if not plain or len(values) != count or not all(least < value < math.inf for value in values):
            shown = f"{len(values)} numbers" if plain else repr(values)[:60]
            raise CheckpointError(
                f"{path}: {name} is {shown}; expected {count} finite numbers{' above 0' if least == 0 else ''}, one "
                "for each latent channel"
            )
    if config.shift_factor:
        raise CheckpointError(
            f"{path}: states a shift_factor and latents_mean; expected one of the two; remove the other"
        )


def with_statistics(path: Path, autoencoder: Autoencoder, statistics: LatentStatistics) -> Autoencoder:
    """The same autoencoder for a model whose file has statistics of its latents: they replace its scaling and shift.

    Raises:
        CheckpointError: they are of another number of channels.
    """
    channels = autoencoder.config.latent_channels
    if len(statistics.mean) != channels:
        raise CheckpointError(
            f"{path}: statistics of {len(statistics.mean)} latent channels, the autoencoder has {channels}; name the "
            "one it was trained with (--vae)"
        )
    autoencoder.register_to_config(
        scaling_factor=1.0, shift_factor=None, latents_mean=statistics.mean, latents_std=statistics.deviation
    )
    return autoencoder


def _check_runs(path: Path, autoencoder: Autoencoder) -> None:
    """Check by shapes alone that an image goes through; diffusers builds some modules that cannot run.

    Raises:
        CheckpointError: it does not, as with -32 groups of a normalization.
    """
    tensors = itertools.chain(autoencoder.named_parameters(), autoencoder.named_buffers())
    shapes = {name: tensor.to("meta") for name, tensor in tensors}
    try:
        with torch.no_grad():
            functional_call(autoencoder, shapes, (torch.empty(1, 3, SIDE, SIDE, device="meta"),))
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{path}: an autoencoder that cannot run ({reason}); check its configuration, or download it again"
        ) from error


def _own_folder(folder: Path) -> Path:
    """The autoencoder's folder in a pipeline's folder; any other folder itself."""
    inner = folder / "vae"
    return inner if not (folder / "config.json").is_file() and (inner / "config.json").is_file() else folder


def _variant_of(folder: Path, variant: str | None) -> str | None:
    """The variant, if the folder has weights of it."""
    return variant if variant is not None and list(folder.glob(f"*.{variant}.*")) else None


def is_complete_autoencoder(folder: Path, variant: str | None) -> bool:
    """Whether a folder of the hub cache holds an autoencoder's configuration and all of its weights."""
    own = _own_folder(folder)
    try:
        return (own / "config.json").is_file() and bool(files_of_module(own, _variant_of(own, variant)))
    except CheckpointError:
        return False


def random_autoencoder(seed: int, architecture: dict[str, Any]) -> AutoencoderKL:
    """An autoencoder of this configuration with random weights."""
    with SkippedInitialization():
        autoencoder = AutoencoderKL(**architecture)
    randomize(autoencoder, seed)
    loaded: AutoencoderKL = freeze(autoencoder)
    return loaded


def spec_of_autoencoder(autoencoder: Autoencoder) -> AutoencoderSpec:
    """What a bundle's manifest says about an autoencoder."""
    config = autoencoder.config
    if isinstance(autoencoder, AutoencoderTiny):
        factor = config.upsampling_scaling_factor ** (len(config.num_decoder_blocks) - 1)
    else:
        factor = 2 ** (len(config.block_out_channels) - 1)
    return AutoencoderSpec(
        name=type(autoencoder).__name__,
        scaling_factor=config.scaling_factor,
        shift_factor=config.shift_factor or 0.0,
        factor=factor,
        latents_mean=tuple(map(float, config.get("latents_mean") or ())),
        latents_std=tuple(map(float, config.get("latents_std") or ())),
    )


def parts_of_decoder(autoencoder: Autoencoder) -> list[nn.Module]:
    """The modules from latents to images, in the order they act; ``AutoencoderTiny`` has no convolution before them."""
    quantization = None if isinstance(autoencoder, AutoencoderTiny) else autoencoder.post_quant_conv
    return [autoencoder.decoder] if quantization is None else [quantization, autoencoder.decoder]


def parts_of_encoder(autoencoder: Autoencoder) -> list[nn.Module]:
    """The modules from images to latents, in the order they act; ``AutoencoderTiny`` has no convolution after them."""
    quantization = None if isinstance(autoencoder, AutoencoderTiny) else autoencoder.quant_conv
    return [autoencoder.encoder] if quantization is None else [autoencoder.encoder, quantization]
