"""The autoencoder of a checkpoint: diffusers' ``AutoencoderKL`` or ``AutoencoderTiny``."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeAlias

from diffusers import AutoencoderKL, AutoencoderTiny
from torch import nn

from dit_export.checkpoints.diffusers_modules import freeze, load_module, read_json_object
from dit_export.checkpoints.hub import download_snapshot
from dit_export.checkpoints.random_weights import SkippedInitialization, randomize
from dit_export.checkpoints.source import Source
from dit_runtime.bundle.manifest import AutoencoderSpec
from dit_runtime.core.errors import CheckpointError

Autoencoder: TypeAlias = AutoencoderKL | AutoencoderTiny
AUTOENCODERS = {"AutoencoderKL": AutoencoderKL, "AutoencoderTiny": AutoencoderTiny}
OFFICIAL_VAE = "stabilityai/sd-vae-ft-mse"  # the official sample.py's

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


def autoencoder_for(source: Source) -> Autoencoder:
    """The autoencoder that ``--vae`` names, or the official default.

    Raises:
        CheckpointError: it cannot be found or read.
    """
    name = source.autoencoder or OFFICIAL_VAE
    folder = Path(name)
    if not folder.is_dir():
        try:
            patterns = ("config.json", "diffusion_pytorch_model*", "vae/*")
            folder = download_snapshot(name, patterns, required=("config.json",))
        except CheckpointError as error:
            raise CheckpointError(
                f"autoencoder {error}; a file has no autoencoder of its own: name a folder with --vae"
            ) from error
    return load_autoencoder(folder, source.variant)


def load_autoencoder(folder: Path, variant: str | None) -> Autoencoder:
    """An ``AutoencoderKL`` or ``AutoencoderTiny`` from its own folder, or from a pipeline's folder with a ``vae``.

    Raises:
        CheckpointError: another class, images that are not RGB, or a scaling that is not supported.
    """
    if not (folder / "config.json").is_file() and (folder / "vae" / "config.json").is_file():
        folder = folder / "vae"
    kind = read_json_object(folder / "config.json").get("_class_name")
    if kind not in AUTOENCODERS:
        raise CheckpointError(f"{folder}: is a {kind}; expected an {' or an '.join(AUTOENCODERS)}")
    if variant is not None and not list(folder.glob(f"*.{variant}.*")):
        variant = None  # in a pipeline, the transformer alone may have this variant
    autoencoder: Autoencoder = load_module(folder, AUTOENCODERS[kind], variant)
    config = autoencoder.config
    if (config.in_channels, config.out_channels) != (3, 3):
        raise CheckpointError(f"{folder}: {config.in_channels} to {config.out_channels} channels; expected RGB images")
    if not isinstance(config.scaling_factor, int | float) or not 0 < config.scaling_factor < float("inf"):
        raise CheckpointError(f"{folder}: scaling_factor is {config.scaling_factor!r}; expected a number above 0")
    if config.get("latents_mean") is not None or config.get("latents_std") is not None:
        raise CheckpointError(
            f"{folder}: latents_mean and latents_std are not supported; expected a scaling_factor and a shift_factor"
        )
    return autoencoder


def random_autoencoder(seed: int) -> AutoencoderKL:
    """Stable Diffusion's autoencoder with random weights."""
    with SkippedInitialization():
        autoencoder = AutoencoderKL(**STABLE_DIFFUSION_VAE)
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
    )


def parts_of_decoder(autoencoder: Autoencoder) -> list[nn.Module]:
    """The modules from latents to images, in the order they act; ``AutoencoderTiny`` has no convolution before them."""
    quantization = None if isinstance(autoencoder, AutoencoderTiny) else autoencoder.post_quant_conv
    return [autoencoder.decoder] if quantization is None else [quantization, autoencoder.decoder]


def parts_of_encoder(autoencoder: Autoencoder) -> list[nn.Module]:
    """The modules from images to latents, in the order they act; ``AutoencoderTiny`` has no convolution after them."""
    quantization = None if isinstance(autoencoder, AutoencoderTiny) else autoencoder.quant_conv
    return [autoencoder.encoder] if quantization is None else [autoencoder.encoder, quantization]
