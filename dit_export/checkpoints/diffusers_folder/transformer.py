"""Reads diffusers' ``DiTTransformer2DModel``: its configuration, and its weights with the official names."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DiTTransformer2DModel
from torch import Tensor

from dit_export.checkpoints.diffusers_folder.names import diffusers_names, embedder_names
from dit_export.checkpoints.diffusers_modules import explain_config_errors, read_json_object
from dit_export.checkpoints.key_errors import Shapes, check_shapes
from dit_export.checkpoints.weights import StoredTensor, Weights, files_of_module, weights_from_file
from dit_runtime.bundle.manifest import ModelSpec
from dit_runtime.core.errors import CheckpointError

NUMBERS = (
    *("num_attention_heads", "attention_head_dim", "in_channels", "num_layers", "sample_size", "patch_size"),
    "num_embeds_ada_norm",
)
LARGEST_GRID = 512  # patches along a side of the trained size; diffusers computes the positions of all of them


def read_transformer_config(folder: Path, shapes: Shapes) -> Any:
    """The checked configuration of a ``DiTTransformer2DModel``, with diffusers' defaults filled in.

    ``shapes``: of the weights beside it. The numbers are held against them before diffusers computes from the numbers.

    Raises:
        CheckpointError: another architecture, a setting that is not supported, or other numbers than the weights have.
    """
    path = folder / "config.json"
    known = {key: value for key, value in read_json_object(path).items() if not key.startswith("_")}
    _check_numbers(path, known, shapes)
    with explain_config_errors(path), torch.device("meta"):
        config = DiTTransformer2DModel.from_config(known).config
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


def read_transformer_weights(folder: Path, variant: str | None) -> dict[str, StoredTensor]:
    """The weights of a ``DiTTransformer2DModel`` folder, by diffusers' names.

    Raises:
        CheckpointError: weights cannot be read, or are there twice.
    """
    stored: dict[str, StoredTensor] = {}
    for file in files_of_module(folder, variant):
        found = weights_from_file(file)
        if twice := sorted(stored.keys() & found):
            raise CheckpointError(f"{file}: {twice[0]} is in another shard too; download the folder again")
        stored |= found
    return stored


def check_transformer_weights(folder: Path, config: Any, shapes: Shapes) -> None:
    """Check that the weights are those that diffusers' module has with this configuration.

    Raises:
        CheckpointError: weights are missing or left over, or have another shape.
    """
    with torch.device("meta"):
        expected = DiTTransformer2DModel.from_config(config).state_dict()
    check_shapes(str(folder), shapes, {name: tuple(tensor.shape) for name, tensor in expected.items()})


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


def _check_numbers(path: Path, known: Mapping[str, Any], shapes: Shapes) -> None:
    """Check the numbers of a configuration, and that they are those of the weights.

    Raises:
        CheckpointError: one is none, or the weights say another.
    """
    defaults = inspect.signature(DiTTransformer2DModel.__init__).parameters
    numbers = {key: known.get(key, defaults[key].default) for key in NUMBERS}
    for key, value in numbers.items():
        if type(value) is not int or value < 1:
            raise CheckpointError(
                f"{path}: not a configuration that diffusers can build ({key} is {value!r:.60}; expected a whole "
                "number from 1); download it again"
            )
    patches = shapes.get("pos_embed.proj.weight", ())
    table = shapes.get("transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight", ())
    blocks = {match[1] for name in shapes if (match := re.match(r"transformer_blocks\.(\d+)\.", name))}
    width = numbers["num_attention_heads"] * numbers["attention_head_dim"]
    if len(patches) != 4 or len(table) != 2:
        return  # of another layout, which the check of all names tells
    classes, rows = numbers["num_embeds_ada_norm"], table[0]
    if rows != classes + 1:
        raise CheckpointError(
            f"{path}: num_embeds_ada_norm says {classes} classes, and the label table has {rows} rows; diffusers' "
            f"model has one row per class and one for null, so it needs {classes + 1}; correct the one that is wrong"
        )
    for what, stated, found in (
        ("num_layers", numbers["num_layers"], len(blocks)),
        ("num_attention_heads times attention_head_dim", width, patches[0]),
        ("in_channels", numbers["in_channels"], patches[1]),
        ("patch_size", numbers["patch_size"], patches[2]),
    ):
        if stated != found:
            raise CheckpointError(
                f"{path}: {what} is {stated}, and the weights beside it say {found}; correct the one that is wrong"
            )
    side = numbers["sample_size"] // numbers["patch_size"]
    if side > LARGEST_GRID:
        raise CheckpointError(
            f"{path}: sample_size {numbers['sample_size']} is {side}x{side} patches of {numbers['patch_size']}; "
            f"expected at most {LARGEST_GRID}x{LARGEST_GRID}"
        )


def check_kind(folder: Path) -> None:
    """Check that a folder's configuration is of a class-conditional DiT, with the settings that are supported.

    Raises:
        CheckpointError: it is another model's, or a setting is another.
    """
    path = folder / "config.json"
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
