"""What to build: a target's properties and the shapes an engine is specialized for."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from dit_runtime.bundle import GraphSpec, Manifest, ModelSpec
from dit_runtime.errors import BuildError

# TensorRT-RTX 1.7 builds ahead of time for these, on any machine.
RTX_COMPUTE_CAPABILITIES = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")
TARGETS = ("rtx",)


@dataclass(frozen=True)
class Recipe:
    """One engine per graph, for one compute capability.

    ``batch``: the largest number of pictures in a call. ``branches``: the guidance branch counts G, a profile of the
    step for each. ``rows``: the largest conditioning table. ``decode_tile``: side of the latents that the decoder takes
    at once, None for all of a picture's.
    """

    target: str
    compute_capability: str
    batch: int
    branches: tuple[int, ...]
    rows: int
    decode_tile: int | None = None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def recipe_for(
    target: str,
    compute_capability: str,
    batch: int,
    branches: tuple[int, ...],
    rows: int,
    decode_tile: int | None = None,
) -> Recipe:
    """A checked recipe.

    Raises:
        BuildError: a target or a compute capability that cannot be built for, or an impossible shape.
    """
    if target not in TARGETS:
        raise BuildError(f"target {target!r} is not supported; choose one of {', '.join(TARGETS)}")
    if compute_capability not in RTX_COMPUTE_CAPABILITIES:
        raise BuildError(
            f"compute capability {compute_capability!r}: TensorRT-RTX builds for {', '.join(RTX_COMPUTE_CAPABILITIES)}"
        )
    if not branches or min(branches) < 1 or len(set(branches)) != len(branches):
        raise BuildError(f"branches {branches}: expected different whole numbers from 1, such as 1,2")
    if rows < 2 or batch < 1:
        raise BuildError(f"batch {batch} and {rows} rows: expected a batch from 1 and at least 2 rows")
    return Recipe(target, compute_capability, batch, tuple(sorted(branches)), rows, decode_tile)


# Shapes at the minimum, optimum and maximum of a profile.
Profile = dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]


def profiles_of(graph: GraphSpec, recipe: Recipe, manifest: Manifest) -> list[Profile]:
    """A graph's optimization profiles: narrow ones, one per branch count where the graph has branches."""
    has_branches = any("branches" in tensor.shape for tensor in graph.inputs)
    return [_profile(graph, recipe, manifest, branches) for branches in (recipe.branches if has_branches else (1,))]


def _profile(graph: GraphSpec, recipe: Recipe, manifest: Manifest, branches: int) -> Profile:
    height, width = manifest.model.latent_size
    tile, (image_height, image_width) = recipe.decode_tile or max(height, width), manifest.image_size
    sides = {
        "height": min(height, tile),
        "width": min(width, tile),
        "image_height": image_height,
        "image_width": image_width,
    }

    def shapes(sizes: dict[str, int], shape: tuple[int | str, ...]) -> tuple[int, ...]:
        return tuple((sizes | sides)[axis] if isinstance(axis, str) else axis for axis in shape)

    lowest = {"batch": 1, "branches": branches, "rows": 1}
    # One picture of 50 steps with its null rows is the case to be fastest at.
    usual = {"batch": 1, "branches": branches, "rows": min(50 * branches, recipe.rows)}
    highest = {"batch": recipe.batch, "branches": branches, "rows": recipe.rows}
    return {
        tensor.name: (shapes(lowest, tensor.shape), shapes(usual, tensor.shape), shapes(highest, tensor.shape))
        for tensor in graph.inputs
    }


def can_fuse_attention(model: ModelSpec) -> bool:
    """Whether TensorRT has a fused FP16 attention for this head size: 16 to 256, a multiple of 8."""
    head = model.width // model.heads
    return 16 <= head <= 256 and head % 8 == 0
