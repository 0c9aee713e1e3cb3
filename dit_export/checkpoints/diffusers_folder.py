"""A diffusers ``DiTPipeline`` folder: transformer weights, autoencoder, and the scheduler as a forward process."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DDIMScheduler, DiTTransformer2DModel
from diffusers.utils import logging
from torch import Tensor, nn

from dit_export.checkpoints.layouts import (
    SUPPORTED,
    check_shapes,
    diffusers_names,
    embedder_names,
)
from dit_export.checkpoints.weights import (
    Stored,
    Weights,
    files_of_module,
    loaded_pickle,
    weights_from_file,
)
from dit_runtime.bundle.manifest import AutoencoderSpec, DiffusionSpec, ModelSpec
from dit_runtime.core.errors import CheckpointError

Autoencoder: TypeAlias = AutoencoderKL | AutoencoderTiny
AUTOENCODERS = {"AutoencoderKL": AutoencoderKL, "AutoencoderTiny": AutoencoderTiny}


def transformer_config(folder: Path) -> Any:
    """The checked configuration of a ``DiTTransformer2DModel``, with diffusers' defaults filled in.

    Raises:
        CheckpointError: another architecture, or settings that are not supported.
    """
    path = folder / "config.json"
    _check_transformer(path)
    known = {key: value for key, value in json_object(path).items() if not key.startswith("_")}
    with _reported(path), torch.device("meta"):
        config = DiTTransformer2DModel.from_config(known).config
    numbers = ("num_attention_heads", "attention_head_dim", "in_channels", "num_layers", "sample_size", "patch_size")
    for key in (*numbers, "num_embeds_ada_norm"):
        if type(config[key]) is not int or config[key] < 1:
            raise CheckpointError(f"{path}: {key} is {config[key]!r}; expected a whole number from 1")
    if config.sample_size % config.patch_size:
        raise CheckpointError(
            f"{path}: sample_size {config.sample_size} is no multiple of patches of {config.patch_size}"
        )
    if not isinstance(config.norm_eps, float) or not 0 < config.norm_eps < 1:
        raise CheckpointError(f"{path}: norm_eps is {config.norm_eps!r}; expected a small number above 0")
    return config


@contextlib.contextmanager
def _reported(path: Path) -> Iterator[None]:
    """diffusers' constructors raise whatever a setting leads to: one line for it."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{path}: not a configuration that diffusers can build ({reason}); download it again"
        ) from error


def model_spec(config: Any) -> ModelSpec:
    """The shape of a ``DiTTransformer2DModel``."""
    width = config.num_attention_heads * config.attention_head_dim
    return ModelSpec(
        conditioning="adaln-zero",
        latent_channels=config.in_channels,
        latent_size=(config.sample_size, config.sample_size),
        patch_size=config.patch_size,
        width=width,
        depth=config.num_layers,
        heads=config.num_attention_heads,
        mlp_width=4 * width,
        classes=config.num_embeds_ada_norm,
        learned_variance=(config.out_channels or config.in_channels) == 2 * config.in_channels,
    )


def transformer_weights(folder: Path, config: Any, variant: str | None) -> dict[str, Stored]:
    """The weights of a ``DiTTransformer2DModel`` folder with diffusers' names, all there and of the right shapes."""
    stored: dict[str, Stored] = {}
    for file in files_of_module(folder, variant):
        found = weights_from_file(file)
        if twice := sorted(stored.keys() & found):
            raise CheckpointError(f"{file}: {twice[0]} is in another shard too; download the folder again")
        stored |= found
    with torch.device("meta"):
        expected = DiTTransformer2DModel.from_config(config).state_dict()
    shapes = {name: item.shape for name, item in stored.items()}
    check_shapes(str(folder), shapes, {name: tuple(tensor.shape) for name, tensor in expected.items()})
    return stored


def official_from_diffusers(source: str, stored: Mapping[str, Stored], depth: int) -> Weights:
    """The same weights with the official names.

    Each block's copy of the embedders is looked at: when all are the same, as converted checkpoints have them, there is
    one under the official name; else block N's own are ``blocks.N.t_embedder…`` and ``blocks.N.y_embedder…``.
    """

    def joined(names: tuple[str, ...]) -> Stored:
        if len(names) == 1:
            return stored[names[0]]
        rows = sum(stored[name].shape[0] for name in names)
        return Stored((rows, *stored[names[0]].shape[1:]), lambda: torch.cat([stored[name].read() for name in names]))

    translated = {official: joined(names) for official, names in diffusers_names(depth).items()}
    copies = [embedder_names(block) for block in range(depth)]
    if not all(_same(stored, [copy[name] for copy in copies]) for name in copies[0]):
        translated |= {
            f"blocks.{block}.{name}": stored[own] for block, copy in enumerate(copies) for name, own in copy.items()
        }
    return Weights(source, translated)


def diffusers_from_official(weights: Weights, depth: int) -> dict[str, Tensor]:
    """The way back: a ``DiTTransformer2DModel``'s weights, with the same embedders in each block."""
    names = diffusers_names(depth)
    for block in range(1, depth):
        names |= {f"{block} {name}": (own,) for name, own in embedder_names(block).items()}
    return {
        name: part
        for official, theirs in names.items()
        for name, part in zip(theirs, weights[official.split()[-1]].chunk(len(theirs)), strict=True)
    }


def _same(stored: Mapping[str, Stored], copies: list[str]) -> bool:
    first = stored[copies[0]].read()
    return all(torch.equal(stored[other].read(), first) for other in copies[1:])


def load_module(folder: Path, kind: type[Any], variant: str | None = None) -> Any:
    """A diffusers module from its folder, unpatched, FP32 and in evaluation mode.

    Raises:
        CheckpointError: weights missing, damaged, left over or not finite.
    """
    files = files_of_module(folder, variant)
    for file in files:
        if file.suffix != ".safetensors":
            loaded_pickle(file)  # refuses what is more than tensors, before diffusers reads it
    safe = files[0].suffix == ".safetensors"
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # what it would warn of is an error here
    try:
        module, report = kind.from_pretrained(
            folder,
            dtype=torch.float32,
            use_safetensors=safe,
            variant=variant,
            local_files_only=True,
            output_loading_info=True,
        )
    except Exception as error:  # safetensors, torch and diffusers each raise their own
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{folder}: cannot be read ({reason}); download or copy it again") from error
    finally:
        logging.set_verbosity(verbosity)
    for problem in ("missing_keys", "unexpected_keys"):
        if keys := sorted(report[problem]):
            shown = ", ".join(keys[:10]) + (" …" if len(keys) > 10 else "")
            raise CheckpointError(
                f"{folder}: {len(keys)} {problem.replace('_', ' ')} ({shown}); expected a {kind.__name__}"
            )
    for name, parameter in module.named_parameters():
        if not torch.isfinite(parameter).all():
            raise CheckpointError(f"{folder}: {name} holds NaN or infinity; this checkpoint is damaged")
    return ready(module)


def ready(module: nn.Module) -> Any:
    """In evaluation mode and without gradients."""
    return module.eval().requires_grad_(False)


def load_autoencoder(folder: Path, variant: str | None) -> Autoencoder:
    """An ``AutoencoderKL`` or ``AutoencoderTiny`` from its folder, or from a pipeline's with a ``vae`` in it."""
    if not (folder / "config.json").is_file() and (folder / "vae" / "config.json").is_file():
        folder = folder / "vae"
    kind = json_object(folder / "config.json").get("_class_name")
    if kind not in AUTOENCODERS:
        raise CheckpointError(f"{folder}: is a {kind}; expected an {' or an '.join(AUTOENCODERS)}")
    if variant is not None and not list(folder.glob(f"*.{variant}.*")):
        variant = None  # a pipeline may have the transformer alone in this variant
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


def autoencoder_spec(autoencoder: Autoencoder) -> AutoencoderSpec:
    """What a bundle says of an autoencoder."""
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


def diffusion_spec(config: Any, guidance_channels: int) -> DiffusionSpec:
    """The forward process and conventions of a diffusers scheduler configuration."""
    return DiffusionSpec(
        betas=betas_of(config),
        prediction_type=config.prediction_type,
        guidance_channels=guidance_channels,
        timestep_spacing=config.timestep_spacing,
        steps_offset=config.steps_offset,
        set_alpha_to_one=config.set_alpha_to_one,
    )


def _check_transformer(path: Path) -> None:
    config = json_object(path)
    kind = config.get("_class_name")
    if kind != "DiTTransformer2DModel" and not (
        kind == "Transformer2DModel" and config.get("norm_type") == "ada_norm_zero"
    ):
        raise CheckpointError(f"{path}: is a {kind}; expected a class-conditional DiTTransformer2DModel")
    expected = {
        "norm_type": "ada_norm_zero",
        "activation_fn": "gelu-approximate",
        "attention_bias": True,
        "upcast_attention": False,
        "norm_elementwise_affine": False,
    }
    for key, value in expected.items():
        if (found := config.get(key, value)) != value:
            raise CheckpointError(f"{path}: {key} is {found!r}; only {value!r} is supported")
    channels, out = config.get("in_channels", 4), config.get("out_channels")
    if out not in (None, channels, 2 * channels):
        raise CheckpointError(
            f"{path}: {out} output channels for {channels} latent channels; expected as many or twice"
        )


# Schedulers of diffusion models: their configurations describe one forward process, whichever of them samples.
SCHEDULERS = (
    *("DDIMScheduler", "DDPMScheduler", "PNDMScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler"),
    *("DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "UniPCMultistepScheduler"),
    *("DEISMultistepScheduler", "HeunDiscreteScheduler", "LMSDiscreteScheduler"),
)
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")


def load_scheduler(path: Path) -> DDIMScheduler:
    """A scheduler folder's configuration, read as DDIM's: only what the forward process needs.

    Raises:
        CheckpointError: another kind of scheduler, clipping, thresholding, or a setting that no table has.
    """
    config = json_object(path)
    if (kind := config.get("_class_name")) not in SCHEDULERS:
        raise CheckpointError(
            f"{path}: is a {kind}; expected the scheduler of a diffusion model, such as DDIMScheduler (for velocity "
            "models see --family sit)"
        )
    for key in ("clip_sample", "thresholding"):
        # DDIMScheduler and DDPMScheduler clip unless told not to: the file may leave the key out.
        clips = key == "clip_sample" and kind in ("DDIMScheduler", "DDPMScheduler")
        if config.get(key, clips):
            raise CheckpointError(
                f"{path}: {key} is not supported (it is not linear in the network's output); set it to false"
            )
    prediction = config.get("prediction_type", "epsilon")
    for what, value, known in (
        ("prediction type", prediction, ("epsilon", "v_prediction")),
        ("beta schedule", config.get("beta_schedule", "linear"), BETA_SCHEDULES),
        ("timestep spacing", config.get("timestep_spacing", "leading"), ("leading", "trailing", "linspace")),
    ):
        if value not in known:
            raise CheckpointError(
                f"{path}: {what} {value!r} is not supported; expected {' or '.join(map(repr, known))}"
            )
    if config.get("rescale_betas_zero_snr") and prediction == "epsilon":
        raise CheckpointError(
            f"{path}: rescale_betas_zero_snr with epsilon prediction: at the first timestep the noise says nothing "
            "about the image; expected prediction_type 'v_prediction', or rescale_betas_zero_snr false"
        )
    names = DDIMScheduler().config.keys()
    settings = {key: value for key, value in config.items() if key in names and not key.startswith("_")}
    with _reported(path):
        scheduler = DDIMScheduler(**{**settings, "clip_sample": False, "thresholding": False})
        betas = betas_of(scheduler.config)
    if not all(0 < beta <= 1 for beta in betas):
        raise CheckpointError(f"{path}: betas are not between 0 and 1; download or copy it again")
    return scheduler


def betas_of(config: Any) -> tuple[float, ...]:
    """The forward process's betas in float64 from a diffusers scheduler configuration, rescaled if it says so."""
    betas = torch.tensor(_scheduled_betas(config), dtype=torch.float64)
    if config.rescale_betas_zero_snr:
        # Lin et al. 2023 (arXiv 2305.08891), algorithm 1: √ᾱ is shifted to end at 0 and scaled to begin where it did.
        root = (1 - betas).cumprod(0).sqrt()
        alpha_bar = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
        betas = 1 - alpha_bar / torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
    return tuple(betas.tolist())


def _scheduled_betas(config: Any) -> tuple[float, ...]:
    if config.trained_betas is not None:
        return tuple(float(beta) for beta in config.trained_betas)
    count = config.num_train_timesteps
    if config.beta_schedule == "linear":
        betas = torch.linspace(config.beta_start, config.beta_end, count, dtype=torch.float64)
    elif config.beta_schedule == "scaled_linear":
        betas = torch.linspace(config.beta_start**0.5, config.beta_end**0.5, count, dtype=torch.float64) ** 2
    else:
        times = torch.arange(count + 1, dtype=torch.float64) / count
        alpha_bar = torch.cos((times + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)
    return tuple(betas.tolist())


def json_object(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object."""
    if not path.is_file():
        raise CheckpointError(f"{path}: missing; {SUPPORTED}")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON ({error}); download or copy it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: not a JSON object; download or copy it again")
    return value
