"""Reads an autoencoder from a single file: its configuration follows from the names and shapes of its parameters.

Two layouts of ``AutoencoderKL`` are read, diffusers' own and that of the latent-diffusion repository
(``encoder.down.0.block.0…``), alone or inside a whole pipeline's file; and diffusers' layout of ``AutoencoderTiny``.
No file tells how latents are scaled, so the scaling is asked for.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from diffusers import AutoencoderKL, AutoencoderTiny

from dit_export.checkpoints.diffusers_modules import explain_config_errors, freeze, read_json_object
from dit_export.checkpoints.random_weights import SkippedInitialization
from dit_export.checkpoints.weights import PICKLES, SAFE, StoredTensor, Weights, weights_from_file
from dit_runtime.core.errors import CheckpointError

Autoencoder: TypeAlias = AutoencoderKL | AutoencoderTiny
Stored: TypeAlias = Mapping[str, StoredTensor]
AUTOENCODERS = {"AutoencoderKL": AutoencoderKL, "AutoencoderTiny": AutoencoderTiny}
# A parameter that each layout has; what comes before it is the prefix of the autoencoder in a whole pipeline's file.
FIRST_OF_KL, FIRST_OF_TINY = "encoder.conv_in.weight", "encoder.layers.0.weight"
PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
# What training checkpoints of latent-diffusion and of VA-VAE hold beside the autoencoder.
TRAINING = ("loss.", "model_ema.", "foundation_model.", "linear_proj.")
EXPECTED = (
    f"expected an AutoencoderKL or AutoencoderTiny of diffusers, or latent-diffusion's layout, in a {SAFE}, "
    f"{', '.join(PICKLES[:-1])} or {PICKLES[-1]} file"
)
# latent-diffusion's names, and those of old versions of diffusers, as diffusers' names. Blocks of the decoder count
# from its end there.
RENAMES = tuple(
    (re.compile(pattern), name)
    for pattern, name in (
        (r"\.(down|up)\.(\d+)\.block\.", r".\1_blocks.\2.resnets."),
        (r"\.(down|up)\.(\d+)\.(down|up)sample\.", r".\1_blocks.\2.\3samplers.0."),
        (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
        (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
        (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
        (r"\.(down|up)\.(\d+)\.attn\.", r".\1_blocks.\2.attentions."),
        (r"\.nin_shortcut\.", ".conv_shortcut."),
        (r"coder\.norm_out\.", "coder.conv_norm_out."),
        (r"\.attentions\.(\d+)\.norm\.", r".attentions.\1.group_norm."),
        (r"\.attentions\.(\d+)\.(?:q|query)\.", r".attentions.\1.to_q."),
        (r"\.attentions\.(\d+)\.(?:k|key)\.", r".attentions.\1.to_k."),
        (r"\.attentions\.(\d+)\.(?:v|value)\.", r".attentions.\1.to_v."),
        (r"\.attentions\.(\d+)\.(?:proj_out|proj_attn)\.", r".attentions.\1.to_out.0."),
    )
)


def autoencoder_from_file(file: Path, scaling: tuple[float, ...] | None, part: str | None = None) -> Autoencoder:
    """An ``AutoencoderKL`` or ``AutoencoderTiny`` from a file with its weights, FP32 and in evaluation mode.

    Args:
        file: its weights. Where its configuration lies beside it (``config.json``), that configuration is used.
        scaling: the scaling factor of latents and maybe their shift, for a file without a configuration; empty where
            the model's file has statistics of the latents, which replace both.
        part: the key under which a training checkpoint holds the autoencoder; its configuration is not beside the file.

    Raises:
        CheckpointError: the file is unreadable or no such autoencoder, or the scaling is missing or known already.
    """
    stored = _autoencoder_part(file, weights_from_file(file, part))
    config = _config_beside(file) if part is None else None
    if config is None:
        name, settings = _config_from_shapes(file, stored)
        settings |= _check_scaling(file, scaling, name)
    else:
        refuse_scaling(file.parent / "config.json", scaling)
        name, settings = config["_class_name"], config
    with explain_config_errors(file), SkippedInitialization():
        module: Autoencoder = AUTOENCODERS[name].from_config(settings)
    _copy_weights(file, stored, module)
    frozen: Autoencoder = freeze(module)
    return frozen


def refuse_scaling(config: Path, scaling: tuple[float, ...] | None) -> None:
    """Check that no scaling is given where a configuration states it. Raises CheckpointError if one is given."""
    if scaling:
        raise CheckpointError(f"{config}: states the scaling of latents; leave --vae-scaling out")


def _autoencoder_part(file: Path, stored: Stored) -> dict[str, StoredTensor]:
    """The autoencoder's own tensors by diffusers' names.

    Raises:
        CheckpointError: there is no encoder, or there are several.
    """
    prefixes = sorted(
        {name.removesuffix(first) for first in (FIRST_OF_KL, FIRST_OF_TINY) for name in stored if name.endswith(first)}
    )
    if len(prefixes) > 1:
        shown = ", ".join(repr(prefix) for prefix in prefixes[:10])
        raise CheckpointError(f"{file}: holds {len(prefixes)} autoencoders ({shown}); save the one you mean alone")
    if not prefixes:
        shown = ", ".join(list(stored)[:3]) or "nothing"
        raise CheckpointError(f"{file}: holds no autoencoder with an encoder (it holds {shown} …); {EXPECTED}")
    averaged = {name: item for name, item in stored.items() if name.startswith("model_ema.")}
    found = {
        # latent-diffusion's average of a parameter has the parameter's name without its dots
        name.removeprefix(prefixes[0]): averaged.get(f"model_ema.{name.replace('.', '')}", item)
        for name, item in stored.items()
        if name.startswith(prefixes[0])
    }
    own = {name: item for name, item in found.items() if not name.startswith(TRAINING)}
    blocks = len({name.split(".")[2] for name in own if name.startswith("decoder.up.")})
    return {_rename(name, blocks): item for name, item in own.items() if prefixes[0] == "" or name.startswith(PARTS)}


def _rename(name: str, blocks: int) -> str:
    if name.startswith("decoder.up."):
        part, up, number, *rest = name.split(".")
        if number.isdecimal():
            name = ".".join((part, up, str(blocks - 1 - int(number)), *rest))
    for pattern, replacement in RENAMES:
        name = pattern.sub(replacement, name)
    return name


def _config_beside(file: Path) -> dict[str, Any] | None:
    """The configuration in the file's folder, if it is that of an autoencoder."""
    path = file.parent / "config.json"
    config = read_json_object(path) if path.is_file() else {}
    return config if config.get("_class_name") in tuple(AUTOENCODERS) else None


def _config_from_shapes(file: Path, stored: Stored) -> tuple[str, dict[str, Any]]:
    """The class and the settings, without the scaling, that the names and shapes of parameters tell.

    Raises:
        CheckpointError: a parameter is missing that tells them.
    """
    shapes = {name: item.shape for name, item in stored.items()}
    try:
        if FIRST_OF_TINY in shapes:
            # Channels and numbers of blocks are those of the published ones; other shapes are refused later.
            return "AutoencoderTiny", {"latent_channels": shapes["decoder.layers.0.weight"][1]}
        widths = [
            shapes[f"encoder.down_blocks.{block}.resnets.0.conv1.weight"][0]
            for block in range(_count(shapes, r"encoder\.down_blocks\.(\d+)\."))
        ]
        return "AutoencoderKL", {
            "in_channels": shapes[FIRST_OF_KL][1],
            "out_channels": shapes["decoder.conv_out.weight"][0],
            "down_block_types": tuple(
                f"{_attention_of(shapes, f'encoder.down_blocks.{block}')}DownEncoderBlock2D"
                for block in range(len(widths))
            ),
            "up_block_types": tuple(
                f"{_attention_of(shapes, f'decoder.up_blocks.{block}')}UpDecoderBlock2D" for block in range(len(widths))
            ),
            "block_out_channels": tuple(widths),
            "layers_per_block": _count(shapes, r"encoder\.down_blocks\.0\.resnets\.(\d+)\."),
            "latent_channels": shapes["decoder.conv_in.weight"][1],
            "use_quant_conv": "quant_conv.weight" in shapes,
            "use_post_quant_conv": "post_quant_conv.weight" in shapes,
            "mid_block_add_attention": "decoder.mid_block.attentions.0.to_q.weight" in shapes,
        }
    except (KeyError, IndexError) as error:
        raise CheckpointError(f"{file}: not an autoencoder that is known (no {error}); {EXPECTED}") from error


def _attention_of(names: Iterable[str], block: str) -> str:
    """What the class of a block with attention after each residual block begins with, as in VA-VAE's lowest level."""
    return "Attn" if f"{block}.attentions.0.to_q.weight" in names else ""


def _count(names: Iterable[str], pattern: str) -> int:
    return len({match[1] for name in names if (match := re.match(pattern, name))})


def _check_scaling(file: Path, scaling: tuple[float, ...] | None, name: str) -> dict[str, float]:
    """The settings of a scaling that was given.

    Raises:
        CheckpointError: none is given.
    """
    if scaling == ():
        return {}
    if scaling is None:
        known = (
            "1 for the published tiny ones"
            if name == "AutoencoderTiny"
            else "0.18215 for Stable Diffusion 1 and 2, which the published DiT and SiT use, 0.13025 for SDXL"
        )
        raise CheckpointError(
            f"{file}: a file does not tell how latents are scaled; add --vae-scaling FACTOR [SHIFT] ({known}), or name "
            "the autoencoder's folder, whose config.json tells it"
        )
    if name == "AutoencoderTiny" and len(scaling) > 1:
        raise CheckpointError(f"{file}: an AutoencoderTiny has no shift; give --vae-scaling the factor alone")
    return dict(zip(("scaling_factor", "shift_factor"), scaling, strict=False))


def _copy_weights(file: Path, stored: Stored, module: Autoencoder) -> None:
    """Fill a module with a file's tensors.

    Raises:
        CheckpointError: names or shapes are others than the module's, or a tensor is not finite.
    """
    expected = module.state_dict()
    missing, spare = sorted(expected.keys() - stored.keys()), sorted(stored.keys() - expected.keys())
    for what, names in (("missing", missing), ("spare", spare)):
        if names:
            shown = ", ".join(names[:10]) + (", …" if len(names) > 10 else "")
            raise CheckpointError(f"{file}: {len(names)} {what} parameters of an {type(module).__name__} ({shown})")
    weights = Weights(str(file), stored)
    for name, parameter in expected.items():
        # latent-diffusion's attention has convolutions of one pixel in the place of linear layers.
        shape, wanted = stored[name].shape, tuple(parameter.shape)
        if shape != wanted and (shape[: len(wanted)] != wanted or set(shape[len(wanted) :]) != {1}):
            raise CheckpointError(f"{file}: {name} is {list(shape)}, expected {list(wanted)}; {EXPECTED}")
        with torch.no_grad():
            parameter.copy_(weights[name].reshape(wanted))
