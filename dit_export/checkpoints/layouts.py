"""A DiT's parameters by name: the official layout, diffusers' as a translation into it, and what a file's keys say.

Inside the exporter every checkpoint has the official names (facebookresearch/DiT ``models.py``, which SiT shares). The
three conditionings that were never published extend them: ``blocks.N.norm1`` to ``norm3`` and
``final_layer.norm_final`` are LayerNorms with weights where nothing modulates them, and cross-attention is
``blocks.N.cross_attn.{q,kv,proj}``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from dit_runtime.bundle.macs import FREQUENCIES, MODULATIONS
from dit_runtime.bundle.manifest import ModelSpec
from dit_runtime.core.errors import CheckpointError

# Peebles & Xie 2022, table 1: layers, width, heads.
PRESETS = {
    "DiT-S": (12, 384, 6),
    "DiT-B": (12, 768, 12),
    "DiT-L": (24, 1024, 16),
    "DiT-XL": (28, 1152, 16),
}

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Numerics:
    """Where implementations of one and the same DiT differ. The defaults are the official code's."""

    frequency_shift: float = 0.0  # exponent i/(128 − shift): 1 in diffusers, 0 in the official code
    attention_eps: float = 1e-6  # LayerNorm before attention
    mlp_eps: float = 1e-6  # LayerNorm before the MLP
    final_eps: float = 1e-6  # LayerNorm before the output projection


def official_shapes(spec: ModelSpec, channels: int) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter of a DiT with ``channels`` output channels."""
    d, hidden, p = spec.width, spec.mlp_width, spec.patch_size
    shapes: dict[str, tuple[int, ...]] = {
        "x_embedder.proj.weight": (d, spec.latent_channels, p, p),
        "x_embedder.proj.bias": (d,),
        **_linear("t_embedder.mlp.0", FREQUENCIES, d),
        **_linear("t_embedder.mlp.2", d, d),
        "y_embedder.embedding_table.weight": (spec.classes + 1, d),
        "pos_embed": (1, spec.tokens, d),
    }
    adaptive = spec.conditioning in MODULATIONS
    for index in range(spec.depth):
        block = f"blocks.{index}"
        shapes |= _linear(f"{block}.attn.qkv", d, 3 * d) | _linear(f"{block}.attn.proj", d, d)
        shapes |= _linear(f"{block}.mlp.fc1", d, hidden) | _linear(f"{block}.mlp.fc2", hidden, d)
        if adaptive:
            shapes |= _linear(f"{block}.adaLN_modulation.1", d, MODULATIONS[spec.conditioning] * d)
            continue
        shapes |= _norm(f"{block}.norm1", d) | _norm(f"{block}.norm2", d)
        if spec.conditioning == "cross-attention":
            shapes |= _norm(f"{block}.norm3", d) | _linear(f"{block}.cross_attn.q", d, d)
            shapes |= _linear(f"{block}.cross_attn.kv", d, 2 * d) | _linear(f"{block}.cross_attn.proj", d, d)
    shapes |= _linear("final_layer.linear", d, p * p * channels)
    shapes |= _linear("final_layer.adaLN_modulation.1", d, 2 * d) if adaptive else _norm("final_layer.norm_final", d)
    return shapes


def _linear(name: str, inputs: int, outputs: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def _norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


# What a spec is read from, and how many axes each has.
ESSENTIAL = {
    "x_embedder.proj.weight": 4,
    "y_embedder.embedding_table.weight": 2,
    "pos_embed": 3,
    "final_layer.linear.weight": 2,
    "blocks.0.attn.qkv.weight": 2,
    "blocks.0.mlp.fc1.weight": 2,
}


def official_spec(
    source: str, shapes: Shapes, *, heads: int | None, learned_variance: bool, grid: Callable[[int], tuple[int, int]]
) -> tuple[ModelSpec, int]:
    """The model of a file with official names, from its shapes, and the network's output channels.

    ``heads`` is in no shape: None takes the paper's preset of that depth and width. ``learned_variance`` False says
    that a second half of the output channels, if there is one, is not used (SiT). ``grid`` tells the rows and columns
    of the positional table, given the patch size: its values know them, its shape does not.

    Raises:
        CheckpointError: another layout, keys missing or left over, shapes that do not fit together.
    """
    if missing := [key for key in ESSENTIAL if key not in shapes]:
        raise wrong_keys(source, shapes, missing, [])
    modulation = shapes.get("blocks.0.adaLN_modulation.1.weight", (1, 1))
    for key, shape, axes in [
        *((key, shapes[key], axes) for key, axes in ESSENTIAL.items()),
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
    if (rows := shapes["y_embedder.embedding_table.weight"][0]) < 2:
        raise CheckpointError(f"{source}: a label table of {rows} row; expected a row per class and one for null")
    height, columns = grid(patch)
    depth = block_count(source, shapes)
    spec = ModelSpec(
        conditioning=_conditioning(shapes, width),
        latent_channels=channels,
        latent_size=(height * patch, columns * patch),
        patch_size=patch,
        width=width,
        depth=depth,
        heads=_heads(source, heads, depth, width),
        mlp_width=shapes["blocks.0.mlp.fc1.weight"][0],
        classes=rows - 1,
        learned_variance=learned_variance and outputs == 2 * channels,
    )
    check_shapes(source, shapes, official_shapes(spec, outputs))
    return spec, outputs


def block_count(source: str, shapes: Iterable[str]) -> int:
    """How many blocks the keys name.

    Raises:
        CheckpointError: they are not numbered from 0 without a gap.
    """
    found = (re.match(r"blocks\.(\d+)\.", key) for key in shapes)
    numbers = {int(match[1]) for match in found if match}
    if absent := sorted(set(range(len(numbers))) - numbers):
        raise CheckpointError(
            f"{source}: {len(numbers)} blocks, and none has the number {absent[0]}; expected them from 0 without a gap"
        )
    return len(numbers)


def _conditioning(shapes: Shapes, width: int) -> str:
    if "blocks.0.cross_attn.q.weight" in shapes:
        return "cross-attention"
    modulation = shapes.get("blocks.0.adaLN_modulation.1.weight")
    if modulation is None:
        return "in-context" if "blocks.0.norm1.weight" in shapes else "adaln-zero"
    return "adaln" if modulation[0] == MODULATIONS["adaln"] * width else "adaln-zero"


def _heads(source: str, heads: int | None, depth: int, width: int) -> int:
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


def check_shapes(source: str, found: Shapes, expected: Shapes) -> None:
    """Raises CheckpointError for keys that are missing, left over or of another shape, at most ten named."""
    missing, extra = [key for key in expected if key not in found], [key for key in found if key not in expected]
    if missing or extra:
        raise wrong_keys(source, found, missing, extra)
    wrong = [key for key in expected if tuple(found[key]) != tuple(expected[key])]
    if wrong:
        shown = "; ".join(f"{key} {list(found[key])}, expected {list(expected[key])}" for key in wrong[:10])
        raise CheckpointError(f"{source}: {len(wrong)} weights of another shape ({shown}{_more(wrong)})")


def wrong_keys(source: str, found: Iterable[str], missing: list[str], extra: list[str]) -> CheckpointError:
    """The error for keys that do not fit, with the nearest layout that is known."""
    parts = [
        f"{len(keys)} {what} ({', '.join(sorted(keys)[:10])}{_more(keys)})"
        for what, keys in (("missing keys", missing), ("unexpected keys", extra))
        if keys
    ]
    return CheckpointError(f"{source}: {' and '.join(parts)}; {nearest_layout(found)}")


def _more(keys: list[str]) -> str:
    return ", …" if len(keys) > 10 else ""


# What each layout cannot do without; the first six cannot be exported, and say what they are.
LAYOUTS = {
    "a text-conditioned transformer (PixArt, SD3, Flux, Sana and others)": (
        r"(caption_projection|adaln_single|context_embedder|text_embedd|txt_in|txt_norm|caption_norm)\.",
        r".*\b(attn2|cross_attn\.kv_linear|add_k_proj|txt_mlp|txt_attn|y_proj|img_mod)\b",
    ),
    "a U-Net of Stable Diffusion": (r"(down_blocks|up_blocks|mid_block)\.", r"(time_embedding|conv_in)\."),
    "an autoencoder": (r"decoder\.(conv_in|layers|mid_block)", r"encoder\.(conv_in|layers|mid_block)"),
    "a vision transformer": (r"cls_token", r"patch_embed\.proj"),
    "a LoRA": (r".*lora_[AB]\.", r".*lora\.(up|down)"),
    "a quantized or packed model": (r".*\.(qweight|scales|zeros|weight_scale)$",),
    "diffusers' DiTTransformer2DModel": (
        r"transformer_blocks\.\d+\.norm1\.(emb|linear)\.",
        r"transformer_blocks\.\d+\.(attn1|ff)\.",
        r"proj_out_[12]\.",
        r"pos_embed\.proj\.",
    ),
    "the official DiT (or SiT)": (
        r"[xty]_embedder\.",
        r"blocks\.\d+\.(attn|mlp)\.",
        r"blocks\.\d+\.(adaLN_modulation|norm1|cross_attn)\.",
        r"final_layer\.",
        r"pos_embed$",
    ),
}
SUPPORTED = (
    "expected a class-conditional DiT or SiT: a diffusers DiTPipeline folder, or a file (.pt, .safetensors) with the "
    "official names"
)


def nearest_layout(keys: Iterable[str]) -> str:
    """Which known layout keys are most like, and what is supported."""
    names = list(keys)
    shares = {
        layout: sum(any(re.match(pattern, key) for key in names) for pattern in patterns) / len(patterns)
        for layout, patterns in LAYOUTS.items()
    }
    best = max(shares, key=lambda layout: shares[layout])
    return f"most like {best}; {SUPPORTED}" if shares[best] else f"like no layout that is known; {SUPPORTED}"


def diffusers_names(depth: int) -> dict[str, tuple[str, ...]]:
    """For each official name the parameters of a ``DiTTransformer2DModel`` that hold it, one below the other.

    The embedders are named where block 0 has its copy; see ``embedder_names``.
    """
    pairs: dict[str, tuple[str, ...]] = {
        "x_embedder.proj": ("pos_embed.proj",),
        "final_layer.adaLN_modulation.1": ("proj_out_1",),
        "final_layer.linear": ("proj_out_2",),
    }
    for index in range(depth):
        block, theirs = f"blocks.{index}", f"transformer_blocks.{index}"
        pairs[f"{block}.attn.qkv"] = tuple(f"{theirs}.attn1.to_{name}" for name in "qkv")
        pairs[f"{block}.attn.proj"] = (f"{theirs}.attn1.to_out.0",)
        pairs[f"{block}.mlp.fc1"] = (f"{theirs}.ff.net.0.proj",)
        pairs[f"{block}.mlp.fc2"] = (f"{theirs}.ff.net.2",)
        pairs[f"{block}.adaLN_modulation.1"] = (f"{theirs}.norm1.linear",)
    names = {
        f"{name}.{kind}": tuple(f"{item}.{kind}" for item in theirs)
        for name, theirs in pairs.items()
        for kind in ("weight", "bias")
    }
    return names | {name: (theirs,) for name, theirs in embedder_names(0).items()}


EMBEDDERS = (
    *(f"t_embedder.mlp.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")),
    "y_embedder.embedding_table.weight",
)


def embedder_names(block: int) -> dict[str, str]:
    """Official name → diffusers' name of the embedders' copy in a block."""
    prefix = f"transformer_blocks.{block}.norm1.emb."
    theirs = (
        *(f"timestep_embedder.linear_{layer}.{kind}" for layer in (1, 2) for kind in ("weight", "bias")),
        "class_embedder.embedding_table.weight",
    )
    return {name: prefix + other for name, other in zip(EMBEDDERS, theirs, strict=True)}
