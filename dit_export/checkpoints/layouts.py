"""The official layout of a DiT: the name and shape of each parameter, and the model that they describe.

Inside the exporter every checkpoint has the official names (facebookresearch/DiT ``models.py``, which SiT shares); each
format translates its own names into them. The three conditionings that were never published extend the official names:
``blocks.N.norm1`` to ``norm3`` and ``final_layer.norm_final`` are LayerNorms with weights where nothing modulates them,
and cross-attention is ``blocks.N.cross_attn.{q,kv,proj}``. ``blocks.N.attn.{q_norm,k_norm}`` are timm's LayerNorms of
queries and keys over each head, where a model was trained with them. LightningDiT (hustvl/LightningDiT
``models/lightningdit.py``) adds its own: RMSNorms have a weight alone, ``blocks.N.mlp.{w12,w3}`` is SwiGLU, and
``feat_rope.freqs_{cos,sin}`` are the tables of its rotary positions. MeanFlow's second timestep embedder is
``r_embedder`` (zhuyu-cs/MeanFlow ``sit.py``).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Literal

from dit_export.checkpoints.key_errors import Shapes, check_shapes, error_for_keys
from dit_export.checkpoints.positions import ROTARY
from dit_export.checkpoints.presets import PRESETS
from dit_runtime.bundle.macs import FREQUENCIES, MODULATIONS
from dit_runtime.bundle.manifest import ModelSpec
from dit_runtime.core.errors import CheckpointError

SECOND_EMBEDDER = tuple(f"r_embedder.mlp.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias"))
NORM_PARTS = {"layer": ("weight", "bias"), "rms": ("weight",)}
# The timestep and label embedders.
EMBEDDERS = (
    *(f"t_embedder.mlp.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")),
    "y_embedder.embedding_table.weight",
)


@dataclass(frozen=True)
class Numerics:
    """The numbers in which implementations of the same DiT differ. The defaults are the official code's."""

    frequency_shift: float = 0.0  # exponent i/(128 − shift): 1 in diffusers, 0 in the official code
    attention_eps: float = 1e-6  # LayerNorm before attention
    mlp_eps: float = 1e-6  # LayerNorm before the MLP
    final_eps: float = 1e-6  # LayerNorm before the output projection
    qk_eps: float = 1e-5  # LayerNorm of queries and keys: timm's Attention takes nn.LayerNorm's default
    qk_rms_eps: float = 1e-6  # RMSNorm of queries and keys
    rotary_base: float = 10000.0  # of a policy's rotary positions; other models store their tables


def official_shapes(spec: ModelSpec, channels: int) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter of a DiT with ``channels`` output channels."""
    d, hidden, p = spec.width, spec.mlp_width, spec.patch_size
    shapes: dict[str, tuple[int, ...]] = {
        "x_embedder.proj.weight": (d, spec.latent_channels, p, p),
        "x_embedder.proj.bias": (d,),
        **_linear_shapes("t_embedder.mlp.0", FREQUENCIES, d),
        **_linear_shapes("t_embedder.mlp.2", d, d),
        "y_embedder.embedding_table.weight": (spec.label_rows, d),
        "pos_embed": (1, spec.tokens, d),
    }
    if spec.times == 2:
        shapes |= _linear_shapes("r_embedder.mlp.0", FREQUENCIES, d) | _linear_shapes("r_embedder.mlp.2", d, d)
    adaptive = spec.conditioning in MODULATIONS
    for index in range(spec.depth):
        block = f"blocks.{index}"
        shapes |= _linear_shapes(f"{block}.attn.qkv", d, 3 * d) | _linear_shapes(f"{block}.attn.proj", d, d)
        for part in ("q_norm", "k_norm") if spec.qk_norm != "none" else ():
            shapes |= _norm_shapes(f"{block}.attn.{part}", d // spec.heads, spec.qk_norm)
        if spec.mlp == "swiglu":
            shapes |= _linear_shapes(f"{block}.mlp.w12", d, 2 * hidden) | _linear_shapes(f"{block}.mlp.w3", hidden, d)
        else:
            shapes |= _linear_shapes(f"{block}.mlp.fc1", d, hidden) | _linear_shapes(f"{block}.mlp.fc2", hidden, d)
        if spec.norm == "rms":
            shapes |= _norm_shapes(f"{block}.norm1", d, "rms") | _norm_shapes(f"{block}.norm2", d, "rms")
        if adaptive:
            shapes |= _linear_shapes(f"{block}.adaLN_modulation.1", d, MODULATIONS[spec.conditioning] * d)
            continue
        shapes |= _norm_shapes(f"{block}.norm1", d) | _norm_shapes(f"{block}.norm2", d)
        if spec.conditioning == "cross-attention":
            shapes |= _norm_shapes(f"{block}.norm3", d) | _linear_shapes(f"{block}.cross_attn.q", d, d)
            shapes |= _linear_shapes(f"{block}.cross_attn.kv", d, 2 * d) | _linear_shapes(
                f"{block}.cross_attn.proj", d, d
            )
    if spec.rotary:
        shapes |= dict.fromkeys(ROTARY, (spec.tokens, d // spec.heads))
    if spec.norm == "rms":
        shapes |= _norm_shapes("final_layer.norm_final", d, "rms")
    shapes |= _linear_shapes("final_layer.linear", d, p * p * channels)
    shapes |= (
        _linear_shapes("final_layer.adaLN_modulation.1", d, 2 * d)
        if adaptive
        else _norm_shapes("final_layer.norm_final", d)
    )
    return shapes


def _linear_shapes(name: str, inputs: int, outputs: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def _norm_shapes(name: str, width: int, kind: str = "layer") -> dict[str, tuple[int, ...]]:
    return {f"{name}.{part}": (width,) for part in NORM_PARTS[kind]}


_Q_NORM = "blocks.0.attn.q_norm.weight"

# The parameters whose shapes describe the model, and how many axes each has.
ESSENTIAL = {
    "x_embedder.proj.weight": 4,
    "y_embedder.embedding_table.weight": 2,
    "pos_embed": 3,
    "final_layer.linear.weight": 2,
    "blocks.0.attn.qkv.weight": 2,
}
_MLPS = {"gelu": "blocks.0.mlp.fc1.weight", "swiglu": "blocks.0.mlp.w12.weight"}


def official_spec(
    source: str,
    shapes: Shapes,
    *,
    heads: int | None,
    learned_variance: bool,
    has_null: Callable[[int], bool],
    grid: Callable[[int], tuple[int, int]],
) -> tuple[ModelSpec, int]:
    """The model that the shapes of a file with official names describe, and the network's output channels.

    Args:
        source: the file's name, for errors.
        shapes: the shape of each parameter.
        heads: the number of attention heads, which only a norm of queries and keys tells; None takes that, or the
            paper's model of the same depth and width.
        learned_variance: whether a second half of the output channels, if there is one, is the variance; SiT does not
            use it.
        has_null: tells whether the last of so many rows of the label table is the null class.
        grid: gives the rows and columns of the positional table for a patch size; the table's values tell them, its
            shape does not.

    Raises:
        CheckpointError: another layout, keys that are missing or left over, or shapes that do not fit together.
    """
    mlp: Literal["gelu", "swiglu"] = "swiglu" if _MLPS["swiglu"] in shapes else "gelu"
    essential = {**ESSENTIAL, _MLPS[mlp]: 2}
    if missing := [key for key in essential if key not in shapes]:
        raise error_for_keys(source, shapes, missing, [])
    modulation = shapes.get("blocks.0.adaLN_modulation.1.weight", (1, 1))
    for key, shape, axes in [
        *((key, shapes[key], axes) for key, axes in essential.items()),
        ("blocks.0.adaLN_modulation.1.weight", modulation, 2),
    ]:
        if len(shape) != axes or min(shape) < 1:
            raise CheckpointError(f"{source}: {key} {list(shape)}; expected {axes} axes, none of them empty")
    width, channels, patch, other = shapes["x_embedder.proj.weight"]
    if patch != other:
        raise CheckpointError(f"{source}: patches of {patch}x{other}; expected square ones")
    outputs, rest = divmod(shapes["final_layer.linear.weight"][0], patch * patch)
    if rest or outputs not in (channels, 2 * channels):
        raise CheckpointError(
            f"{source}: final_layer.linear.weight has {shapes['final_layer.linear.weight'][0]} rows for patches of "
            f"{patch}x{patch} and {channels} latent channels; expected {patch * patch * channels} or twice as many"
        )
    rows = shapes["y_embedder.embedding_table.weight"][0]
    null = has_null(rows)
    depth = count_blocks(source, shapes)
    normalizes = _Q_NORM in shapes
    if normalizes:
        heads = _heads_of_norm(source, shapes[_Q_NORM], heads, width)
    conditioning = _find_conditioning(shapes, width)
    has_rms = "blocks.0.norm1.weight" in shapes and "blocks.0.norm1.bias" not in shapes
    if conditioning != "adaln-zero" and (has_rms or mlp == "swiglu" or ROTARY[0] in shapes):
        raise CheckpointError(
            f"{source}: blocks.0.adaLN_modulation.1.weight {list(modulation)} beside RMSNorm, SwiGLU or rotary "
            f"positions; expected {6 * width} rows (a LightningDiT without shift is not supported)"
        )
    spec = ModelSpec(
        conditioning=conditioning,
        latent_channels=channels,
        latent_size=(shapes["pos_embed"][1] * patch, patch),  # whatever has so many tokens, until the shapes fit
        patch_size=patch,
        width=width,
        depth=depth,
        heads=_find_heads(source, heads, depth, width),
        mlp_width=shapes[_MLPS[mlp]][0] // (2 if mlp == "swiglu" else 1),
        classes=rows - null,
        learned_variance=learned_variance and outputs == 2 * channels,
        has_null=null,
        qk_norm=("layer" if _Q_NORM.replace("weight", "bias") in shapes else "rms") if normalizes else "none",
        norm="rms" if has_rms else "layer",
        mlp=mlp,
        rotary=ROTARY[0] in shapes,
        times=2 if any(name in shapes for name in SECOND_EMBEDDER) else 1,
    )
    check_shapes(source, shapes, official_shapes(spec, outputs))
    height, columns = grid(patch)
    return replace(spec, latent_size=(height * patch, columns * patch)), outputs


def count_blocks(source: str, shapes: Iterable[str]) -> int:
    """How many blocks the keys name.

    Raises:
        CheckpointError: the blocks are not numbered from 0 without a gap.
    """
    found = (re.match(r"blocks\.(\d+)\.", key) for key in shapes)
    numbers = {int(match[1]) for match in found if match}
    if absent := sorted(set(range(len(numbers))) - numbers):
        raise CheckpointError(
            f"{source}: {len(numbers)} blocks, and none has the number {absent[0]}; expected them from 0 without a gap"
        )
    return len(numbers)


def _find_conditioning(shapes: Shapes, width: int) -> str:
    if "blocks.0.cross_attn.q.weight" in shapes:
        return "cross-attention"
    modulation = shapes.get("blocks.0.adaLN_modulation.1.weight")
    if modulation is None:
        return "in-context" if "blocks.0.norm1.weight" in shapes else "adaln-zero"
    return "adaln" if modulation[0] == MODULATIONS["adaln"] * width else "adaln-zero"


def _heads_of_norm(source: str, shape: tuple[int, ...], heads: int | None, width: int) -> int:
    """The number of heads that the norm of queries tells, whose ``shape`` is one head's."""
    size = shape[0] if len(shape) == 1 else 0
    if not size or width % size:
        raise CheckpointError(f"{source}: {_Q_NORM} {list(shape)}; expected one axis, a divisor of the width {width}")
    if heads not in (None, width // size):
        raise CheckpointError(
            f"{source}: --heads or the file says {heads} heads, and the norms of queries are of heads of {size}, which "
            f"are {width // size} for width {width}; leave --heads out"
        )
    return width // size


def _find_heads(source: str, heads: int | None, depth: int, width: int) -> int:
    if heads is None:
        presets = [heads for layers, size, heads in PRESETS.values() if (layers, size) == (depth, width)]
        if not presets:
            raise CheckpointError(
                f"{source}: {depth} blocks of width {width} are none of {', '.join(PRESETS)}, and no shape tells the "
                "number of attention heads; say it with --heads"
            )
        heads = presets[0]
    if width % heads:
        raise CheckpointError(f"{source}: {heads} heads for width {width}; expected a divisor of the width")
    return heads
