"""Errors for parameters that do not fit a layout, with the layout that their names are most like."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from dit_runtime.core.errors import CheckpointError

Shapes = Mapping[str, tuple[int, ...]]

# Patterns of names that each layout must have. The first of those that fit best is named. All but the last two cannot
# be exported: the error says what they are.
KNOWN_LAYOUTS = {
    "a training file of REPA's kin (a SiT with other projectors than REPA's own)": (r"projectors?\.",),
    "a flow model of other blocks than a SiT's": (r"(decoder_blocks|encoder_blocks)\.\d+\.",),
    "a text-conditioned transformer (PixArt, SD3, Flux, Sana and others)": (
        r"(caption_projection|adaln_single|context_embedder|text_embedd|txt_in|txt_norm|caption_norm)\.",
        r".*\b(attn2|cross_attn\.kv_linear|add_k_proj|txt_mlp|txt_attn|y_proj|img_mod)\b",
    ),
    "lerobot's multi-task DiT policy (export its folder, with config.json beside the weights)": (
        r"noise_predictor\.transformer_blocks\.",
        r"noise_predictor\.time_mlp\.",
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
LONGEST_NAME = 80  # characters, of a name in a message
SUPPORTED = (
    "expected a class-conditional DiT or SiT: a diffusers DiTPipeline folder, or a file (.pt, .safetensors) with the "
    "official names"
)


def check_shapes(source: str, found: Shapes, expected: Shapes) -> None:
    """Check that parameters have the expected names and shapes.

    Raises:
        CheckpointError: names are missing or left over, or a shape is another; it names ten of them at most.
    """
    missing, extra = [key for key in expected if key not in found], [key for key in found if key not in expected]
    if missing or extra:
        raise error_for_keys(source, found, missing, extra)
    wrong = [key for key in expected if tuple(found[key]) != tuple(expected[key])]
    if wrong:
        shown = "; ".join(f"{short_name(key)} {list(found[key])}, expected {list(expected[key])}" for key in wrong[:10])
        raise CheckpointError(f"{source}: {len(wrong)} weights of another shape ({shown}{_ellipsis(wrong)})")


def error_for_keys(source: str, found: Iterable[str], missing: list[str], extra: list[str]) -> CheckpointError:
    """The error for missing and unexpected names; it also says which known layout the names are most like."""
    parts = [
        f"{len(keys)} {kind} ({', '.join(map(short_name, sorted(keys)[:10]))}{_ellipsis(keys)})"
        for kind, keys in (("missing keys", missing), ("unexpected keys", extra))
        if keys
    ]
    return CheckpointError(f"{source}: {' and '.join(parts)}; {describe_nearest_layout(found)}")


def describe_nearest_layout(keys: Iterable[str]) -> str:
    """Which known layout the names are most like, and which layouts are supported."""
    names = list(keys)
    shares = {
        layout: sum(any(re.match(pattern, key) for key in names) for pattern in patterns) / len(patterns)
        for layout, patterns in KNOWN_LAYOUTS.items()
    }
    best = max(shares, key=lambda layout: shares[layout])
    return f"most like {best}; {SUPPORTED}" if shares[best] else f"like no layout that is known; {SUPPORTED}"


def short_name(name: str) -> str:
    """A name from a file as a message shows it: printable, and not long."""
    plain = name if name.isprintable() else ascii(name)
    return plain if len(plain) <= LONGEST_NAME else f"{plain[:LONGEST_NAME]}…"


def _ellipsis(keys: list[str]) -> str:
    return ", …" if len(keys) > 10 else ""
