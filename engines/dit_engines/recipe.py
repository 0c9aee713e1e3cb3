"""What to build: a target's properties, and the shapes that an engine takes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dit_engines.targets import RTX_COMPUTE_CAPABILITIES, target_named
from dit_runtime.backends.conditioning import TableLimits, bytes_of_row
from dit_runtime.backends.profiles import Profile, Shape
from dit_runtime.bundle.manifest import GraphSpec, Manifest, ModelSpec
from dit_runtime.core.errors import BuildError

USUAL_STEPS = 50


@dataclass(frozen=True)
class Recipe:
    """What an engine is built for: one plan of each graph, for one compute capability.

    Attributes:
        target: a name of ``TARGETS``.
        compute_capability: such as ``8.9``.
        batches: the largest numbers of images in a call, rising: 1, 4, 8 are the ranges 1, 2 to 4 and 5 to 8.
        branches: the counts G of guidance branches, rising.
        rows: the most rows of the conditioning table.
        decode_tile: side of the latents that the decoder takes at once; None is a whole image's.
        static: whether there is a profile for each of ``batches`` and ``branches`` exactly, and for nothing between.
        several_profiles: False when the library allows one profile: G is its dynamic axis, the batch is fixed.
        workspace_bytes: the most that a kernel may use besides its tensors.
        optimization_level: the builder's; None is the library's own.
        auxiliary_streams: the most streams beside the first; None is the library's choice.
    """

    target: str
    compute_capability: str
    batches: tuple[int, ...]
    branches: tuple[int, ...]
    rows: int
    decode_tile: int | None = None
    static: bool = False
    several_profiles: bool = True
    workspace_bytes: int = 4 << 30
    optimization_level: int | None = None
    auxiliary_streams: int | None = None

    @property
    def batch(self) -> int:
        """The most images in one call."""
        return self.batches[-1]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def recipe_for(
    target: str,
    compute_capability: str | None,
    batches: int | Sequence[int],
    branches: Sequence[int],
    rows: int,
    decode_tile: int | None = None,
    *,
    static: bool = False,
    version: tuple[int, ...] | None = None,
    library: str | None = None,
    workspace_bytes: int | None = None,
    auxiliary_streams: int | None = None,
) -> Recipe:
    """A checked recipe.

    Args:
        target: a name of ``TARGETS``.
        compute_capability: of the GPU; None is the target's own.
        batches: see ``Recipe``; one number is the range from 1 to it.
        branches: see ``Recipe``.
        rows: see ``Recipe``.
        decode_tile: see ``Recipe``.
        static: see ``Recipe``.
        version: of the library that will build, which decides how many profiles there may be; None is the oldest
            version with kernels for the target.
        library: that will build, when it is not the target's.
        workspace_bytes: see ``Recipe``; None is the target's.
        auxiliary_streams: see ``Recipe``.

    Raises:
        BuildError: a target or a compute capability that cannot be built for, or an impossible shape.
    """
    chosen = target_named(target)
    library = library or chosen.library
    capability = _capability_for(target, library, chosen.compute_capability, compute_capability)
    sizes = (batches,) if isinstance(batches, int) else tuple(sorted(batches))
    counts = tuple(sorted(branches))
    if not counts or counts[0] < 1 or len(set(counts)) != len(counts):
        raise BuildError(f"branches {tuple(branches)}: expected different whole numbers from 1, such as 1,2")
    if not sizes or sizes[0] < 1 or len(set(sizes)) != len(sizes) or rows < 2:
        raise BuildError(
            f"batches {sizes} and {rows} rows: expected different whole numbers from 1, such as 1,4,8, and 2 rows or "
            "more"
        )
    limit = chosen.profile_limit(version or chosen.least) if library == "tensorrt" else None
    if limit == 1 and len(sizes) * (len(counts) if static else 1) > 1:
        what = f"batches {_join(sizes)}" + (f" and branches {_join(counts)}" if static else "")
        raise BuildError(
            f"{what}: TensorRT {_join(version or chosen.least, '.')} builds right engines with one optimization "
            "profile only (fixed in 10.8); build an engine for each, for example with --batch 1"
            + (" --branches 2" if static else "")
        )
    return Recipe(
        target=target,
        compute_capability=capability,
        batches=sizes,
        branches=counts,
        rows=rows,
        decode_tile=decode_tile,
        static=static,
        several_profiles=limit is None,
        workspace_bytes=workspace_bytes or chosen.workspace_bytes,
        optimization_level=chosen.optimization_level if library == "tensorrt" else None,
        auxiliary_streams=auxiliary_streams,
    )


def _capability_for(target: str, library: str, own: str | None, given: str | None) -> str:
    capability = given or own
    if capability is None:
        raise BuildError(f"target {target}: name the GPU with --compute-capability; 8.9 is Ada, 12.0 is Blackwell")
    if own is not None and given not in (None, own):
        raise BuildError(f"target {target} has compute capability {own}, got {given}; choose target rtx or this")
    if library == "tensorrt_rtx" and capability not in RTX_COMPUTE_CAPABILITIES:
        raise BuildError(
            f"compute capability {capability!r}: these graphs build with TensorRT-RTX for "
            f"{', '.join(RTX_COMPUTE_CAPABILITIES)}"
        )
    return capability


def _join(numbers: Sequence[int], separator: str = ",") -> str:
    return separator.join(map(str, numbers))


def profiles_of(graph: GraphSpec, recipe: Recipe, manifest: Manifest) -> list[Profile]:
    """A graph's optimization profiles: narrow ones, one for each range of the batch and each branch count.

    The length R of the conditioning table is dynamic in all of them: the step only gathers rows of it, so no kernel's
    work depends on R.
    """
    axes = {axis for tensor in graph.inputs for axis in tensor.shape if isinstance(axis, str)}
    usual = 2 if 2 in recipe.branches else recipe.branches[-1]  # G=2 is classifier-free guidance
    counts = recipe.branches if "branches" in axes else (usual,)
    ranges = _batch_ranges_of(recipe) if "batch" in axes else [(1, 1, 1)]
    if not recipe.several_profiles and not recipe.static and len(counts) > 1:
        spans = [(counts[0], usual, counts[-1])]
    else:
        spans = [(count, count, count) for count in counts]
    return [_profile_for(graph, recipe, manifest, batch, span) for batch, span in itertools.product(ranges, spans)]


def _batch_ranges_of(recipe: Recipe) -> list[tuple[int, int, int]]:
    """Least, usual and largest batch of each profile. The first profile is tuned for one image."""
    if recipe.static or not recipe.several_profiles:
        return [(size, size, size) for size in recipe.batches]
    least = [1, *(size + 1 for size in recipe.batches[:-1])]
    return [(low, 1 if low == 1 else high, high) for low, high in zip(least, recipe.batches, strict=True)]


def _profile_for(
    graph: GraphSpec, recipe: Recipe, manifest: Manifest, batch: tuple[int, int, int], branches: tuple[int, int, int]
) -> Profile:
    height, width = manifest.model.latent_size
    tile, (image_height, image_width) = recipe.decode_tile or max(height, width), manifest.image_size
    sides = {
        "height": min(height, tile),
        "width": min(width, tile),
        "image_height": image_height,
        "image_width": image_width,
    }
    most = recipe.rows
    if any(tensor.name == manifest.table.name for tensor in graph.outputs):
        # The conditioner computes no more rows in one call, and the block that all contexts share grows with them.
        most = min(most, max(TableLimits().conditioner_bytes // bytes_of_row(manifest.table), 2))
    # Of 50 steps, with the null class's rows where there is guidance.
    rows = (1, min(USUAL_STEPS * branches[1], most), most)

    def shape(axes: tuple[int | str, ...], point: int) -> Shape:
        sizes = {"batch": batch[point], "branches": branches[point], "rows": rows[point], **sides}
        return tuple(sizes[axis] if isinstance(axis, str) else axis for axis in axes)

    return {
        tensor.name: (shape(tensor.shape, 0), shape(tensor.shape, 1), shape(tensor.shape, 2)) for tensor in graph.inputs
    }


def can_fuse_attention(model: ModelSpec) -> bool:
    """Whether TensorRT has a fused FP16 attention for this head size: 16 to 256, a multiple of 8."""
    head = model.width // model.heads
    return 16 <= head <= 256 and head % 8 == 0
