"""Models that came after DiT and are not supported: recognized by the names of their parameters, refused by their own.

Their files would otherwise be said to have keys too many or too few.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from dit_runtime.core.errors import CheckpointError


@dataclass(frozen=True)
class Descendant:
    """A model that is not supported.

    Attributes:
        name: its own.
        difference: what it has that no supported family has.
        patterns: each matches a name of its parameters from the beginning, or after a wrapper's name.
        nearest: the family that is nearest to it.
    """

    name: str
    difference: str
    patterns: tuple[str, ...]
    nearest: str


_TOKENS = "a modulation for each token"
_SKIPS = "long skips between its halves"

# The first of which all patterns are there is named.
DESCENDANTS = (
    Descendant("MDT", f"side blocks and {_SKIPS}", (r"(en_inblocks|sideblocks)\.\d+\.",), "official"),
    Descendant("DiT-MoE", "experts in place of the MLP", (r"blocks\.\d+\.(moe|mlp)\.(experts|gate)\.",), "official"),
    Descendant("U-ViT", _SKIPS, (r"in_blocks\.\d+\.", r"out_blocks\.\d+\."), "official"),
    Descendant("MaskDiT", "a decoder of masked tokens", (r"decoder_blocks\.\d+\.", r"decoder_layer\."), "official"),
    Descendant("REG", "a class token as a second state", (r"cls_projectors2\.", r"final_layer\."), "repa"),
    Descendant("RAE's DiT with a DDT head", _TOKENS, (r"s_embedder\.", r"t_embedder\.W"), "lightningdit"),
    Descendant("RAE's LightningDiT", "random Fourier features of time", (r"t_embedder\.W",), "lightningdit"),
    Descendant("DDT", f"an encoder, a decoder and {_TOKENS}", (r"(s_embedder|encoder_blocks)\.",), "lightningdit"),
    Descendant("JiT", "pixels in place of latents", (r"x_embedder\.proj1\.",), "lightningdit"),
    Descendant("improved MeanFlow", "tokens of guidance and time", (r"omega_(embedder|tokens)",), "meanflow"),
    Descendant(
        "MeanFlow with a guidance scale as an input",
        "a third embedder",
        (r"w_embedder\.", r"r_embedder\."),
        "meanflow",
    ),
    Descendant("Decoupled MeanFlow", "the second time in its later blocks alone", (r"logvar_linear\.",), "meanflow"),
)


def refuse_descendants(source: str, names: Iterable[str]) -> None:
    """Check that these are not the names of a model that is known and not supported.

    Raises:
        CheckpointError: they are; it names the model and the nearest family that is supported.
    """
    present = list(names)
    for model in DESCENDANTS:
        signs = [
            next((name for name in present if re.match(rf"(?:.+\.)?{pattern}", name)), None)
            for pattern in model.patterns
        ]
        if None not in signs:
            raise CheckpointError(
                f"{source}: is {model.name}, with {model.difference} ({signs[0]}), which is not supported; the nearest "
                f"family that is: {model.nearest}"
            )
