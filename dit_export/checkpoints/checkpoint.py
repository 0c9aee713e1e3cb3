"""A checkpoint as the exporter and the reference use it: one description of a model, and its weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel

from dit_export.checkpoints.autoencoders import Autoencoder, spec_of_autoencoder
from dit_export.checkpoints.families import FAMILIES
from dit_export.checkpoints.layouts import EMBEDDERS, Numerics
from dit_export.checkpoints.positions import (
    ROTARY,
    Positions,
    diffusers_table,
    is_official_table,
    is_rotary_table,
    official_table,
    rotary_table,
)
from dit_export.checkpoints.weights import Weights
from dit_runtime.bundle.manifest import NO_AUTOENCODER, AutoencoderSpec, DefaultsSpec, DiffusionSpec, ModelSpec
from dit_runtime.core.errors import CheckpointError

LARGEST_SIDE = 16384  # of an image, in pixels


@dataclass(frozen=True)
class Checkpoint:
    """A model, its weights by official name, and where they came from.

    Attributes:
        name, revision, weights_sha256: what the manifest says about the source.
        family: whose conventions the model follows, one of ``FAMILIES``.
        model: the model's shape at the first size.
        trained_size: the latent size (height, width) of the model's own positional table.
        sizes: the latent sizes to export; the first is the model's.
        channels: the output channels of the network, including those that the model does not use.
        numerics, diffusion, defaults: the conventions of the reference.
        weights: tensors by official name; for copies of the embedders see ``official_from_diffusers``.
        autoencoder: diffusers' module, unpatched; None of a policy.
        class_names: one name per class, or none.
        scheduler: diffusers' own scheduler; only in the diffusers family.
        transformer: loads diffusers' own transformer; only in the diffusers family.
        own_weights: a policy's tensors by its own names, for the reference.
    """

    name: str
    revision: str | None
    weights_sha256: str | None
    family: str
    model: ModelSpec
    trained_size: tuple[int, int]
    sizes: tuple[tuple[int, int], ...]
    channels: int
    numerics: Numerics
    diffusion: DiffusionSpec
    defaults: DefaultsSpec
    weights: Weights
    autoencoder: Autoencoder | None
    class_names: tuple[str, ...] = ()
    scheduler: DDIMScheduler | None = None
    transformer: Callable[[], DiTTransformer2DModel] | None = None
    own_weights: Weights | None = None

    @property
    def copies_differ(self) -> bool:
        """Whether the blocks' copies of the embedders have different weights."""
        return f"blocks.0.{EMBEDDERS[0]}" in self.weights

    @property
    def autoencoder_spec(self) -> AutoencoderSpec:
        return NO_AUTOENCODER if self.autoencoder is None else spec_of_autoencoder(self.autoencoder)

    @property
    def reference(self) -> str:
        """What the golden records are made with, in words."""
        return FAMILIES[self.family].describe_reference(self.model, self.diffusion)

    def at(self, size: tuple[int, int]) -> ModelSpec:
        """The model's shape at a latent size."""
        return replace(self.model, latent_size=size)

    def positions(self, size: tuple[int, int]) -> Positions:
        """The positional tables at a latent size, as the reference stores them or computes them."""
        spec = self.at(size)
        if not FAMILIES[self.family].stores_positions:
            return Positions(diffusers_table(spec.width, spec.grid, self.trained_size[0] // spec.patch_size))
        if size == self.trained_size:
            rotary = torch.stack([self.weights[name] for name in ROTARY]) if spec.rotary else None
            return Positions(self.weights["pos_embed"], rotary)
        rotary = rotary_table(spec.width // spec.heads, spec.grid) if spec.rotary else None
        return Positions(official_table(spec.width, spec.grid), rotary)


def checkpoint_at_sizes(checkpoint: Checkpoint, image_sizes: tuple[tuple[int, int], ...]) -> Checkpoint:
    """The checkpoint at these image sizes in pixels; without any, at its trained size.

    Raises:
        CheckpointError: a size does not fit the patches, is given twice, or has no positional table.
    """
    if not image_sizes:
        return checkpoint
    if checkpoint.autoencoder is None:
        raise CheckpointError(
            f"{checkpoint.name}: is a policy, whose chunk of actions has one length; leave --size out"
        )
    factor = checkpoint.autoencoder_spec.factor
    step = factor * checkpoint.model.patch_size
    for height, width in image_sizes:
        if height % step or width % step or not step <= min(height, width) <= max(height, width) <= LARGEST_SIDE:
            raise CheckpointError(
                f"size {height}x{width}: expected multiples of {step}, which is a patch of this model in pixels, up to "
                f"{LARGEST_SIDE}"
            )
    sizes = tuple((height // factor, width // factor) for height, width in image_sizes)
    if len(set(sizes)) != len(sizes):
        raise CheckpointError("sizes: one is there twice; name each size once")
    stores_positions = FAMILIES[checkpoint.family].stores_positions
    elsewhere = stores_positions and any(size != checkpoint.trained_size for size in sizes)
    grid = checkpoint.at(checkpoint.trained_size).grid
    if elsewhere and checkpoint.model.rotary and not is_rotary_table(checkpoint.weights, grid):
        raise CheckpointError(
            f"{checkpoint.name}: its rotary tables are not those of LightningDiT's code at {grid[0]}x{grid[1]} "
            "patches, so the tables for another size cannot be computed; leave --size out"
        )
    if elsewhere and not is_official_table(checkpoint.weights, grid):
        raise CheckpointError(
            f"{checkpoint.name}: its positional table is not the sines and cosines of the official code, so the table "
            "for another size cannot be computed; leave --size out"
        )
    return replace(checkpoint, sizes=sizes, model=checkpoint.at(sizes[0]))


def check_guidance_channels(guided: int, channels: int) -> None:
    """Check that guidance acts on at most the ``channels`` channels that latents have.

    Raises:
        CheckpointError: it acts on more.
    """
    if guided > channels:
        raise CheckpointError(f"guidance on {guided} channels: expected at most {channels}, as many as latents have")
