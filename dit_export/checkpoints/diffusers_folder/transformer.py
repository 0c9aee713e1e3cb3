"""Reads diffusers' ``DiTTransformer2DModel``: its configuration, and its weights with the official names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DiTTransformer2DModel
from torch import Tensor

from dit_export.checkpoints.diffusers_folder.names import diffusers_names, embedder_names
from dit_export.checkpoints.diffusers_modules import explain_config_errors, read_json_object
from dit_export.checkpoints.key_errors import check_shapes
from dit_export.checkpoints.weights import StoredTensor, Weights, files_of_module, weights_from_file
from dit_runtime.bundle.manifest import ModelSpec
from dit_runtime.core.errors import CheckpointError


def read_transformer_config(folder: Path) -> Any:
    """The checked configuration of a ``DiTTransformer2DModel``, with diffusers' defaults filled in.

    Raises:
        CheckpointError: another architecture, or a setting that is not supported.
    """
    path = folder / "config.json"
    _check_transformer(path)
    known = {key: value for key, value in read_json_object(path).items() if not key.startswith("_")}
    with explain_config_errors(path), torch.device("meta"):
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


def spec_from_config(config: Any) -> ModelSpec:
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


def read_transformer_weights(folder: Path, config: Any, variant: str | None) -> dict[str, StoredTensor]:
    """The weights of a ``DiTTransformer2DModel`` folder, by diffusers' names.

    Raises:
        CheckpointError: weights are missing or left over, are there twice, or have another shape.
    """
    stored: dict[str, StoredTensor] = {}
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


def official_from_diffusers(source: str, stored: Mapping[str, StoredTensor], depth: int) -> Weights:
    """The same weights with the official names.

    Each block has a copy of the embedders. If all copies are equal, as they are in converted checkpoints, the result
    has one copy under the official name; otherwise block N's copy is ``blocks.N.t_embedder…`` and
    ``blocks.N.y_embedder…``.
    """

    def join(names: tuple[str, ...]) -> StoredTensor:
        if len(names) == 1:
            return stored[names[0]]
        rows = sum(stored[name].shape[0] for name in names)
        return StoredTensor(
            (rows, *stored[names[0]].shape[1:]), lambda: torch.cat([stored[name].read() for name in names])
        )

    translated = {official: join(names) for official, names in diffusers_names(depth).items()}
    copies = [embedder_names(block) for block in range(depth)]
    if not all(_are_equal(stored, [copy[name] for copy in copies]) for name in copies[0]):
        translated |= {
            f"blocks.{block}.{name}": stored[own] for block, copy in enumerate(copies) for name, own in copy.items()
        }
    return Weights(source, translated)


def diffusers_from_official(weights: Weights, depth: int) -> dict[str, Tensor]:
    """A ``DiTTransformer2DModel``'s weights from official ones, with equal embedders in each block."""
    names = diffusers_names(depth)
    for block in range(1, depth):
        names |= {f"{block} {name}": (own,) for name, own in embedder_names(block).items()}
    return {
        name: part
        for official, theirs in names.items()
        for name, part in zip(theirs, weights[official.split()[-1]].chunk(len(theirs)), strict=True)
    }


def _are_equal(stored: Mapping[str, StoredTensor], copies: list[str]) -> bool:
    first = stored[copies[0]].read()
    return all(torch.equal(stored[other].read(), first) for other in copies[1:])


def _check_transformer(path: Path) -> None:
    config = read_json_object(path)
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
