"""The paper's models by name: Peebles & Xie 2022, table 1."""

from __future__ import annotations

import re
from dataclasses import dataclass

# Layers, width, heads. SiT has the same models under its own name.
PRESETS = {
    "DiT-S": (12, 384, 6),
    "DiT-B": (12, 768, 12),
    "DiT-L": (24, 1024, 16),
    "DiT-XL": (28, 1152, 16),
}
_NAME = re.compile(r"([DS]iT)-(S|B|L|XL)/([248])-(256|512)")


@dataclass(frozen=True)
class Preset:
    """A model of the paper: its shape, the side of its square images in pixels, and whether it is a SiT."""

    depth: int
    width: int
    heads: int
    patch_size: int
    image_side: int
    is_sit: bool


def preset_from_name(name: str) -> Preset | None:
    """The preset that a name such as ``DiT-XL/2-256`` means; None for any other name."""
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    depth, width, heads = PRESETS[f"DiT-{match[2]}"]
    return Preset(depth, width, heads, int(match[3]), int(match[4]), match[1] == "SiT")
