"""Published models by name: those of Peebles & Xie 2022, table 1, which SiT shares, and LightningDiT's."""

from __future__ import annotations

import re
from dataclasses import dataclass

# Layers, width, heads. SiT and LightningDiT have models of the same shapes under their own names.
PRESETS = {
    "DiT-S": (12, 384, 6),
    "DiT-B": (12, 768, 12),
    "DiT-L": (24, 1024, 16),
    "DiT-XL": (28, 1152, 16),
}
_NAME = re.compile(r"(?:([DS]iT)-(S|B|L|XL)/([248])|(LightningDiT)-(?!L/1)(B|L|XL)/([12]))-(256|512)")
PRESET_NAMES = (
    "DiT- or SiT- with S, B, L or XL and patch size 2, 4 or 8, or LightningDiT-B/1, B/2, L/2, XL/1 or XL/2, each "
    "with image size 256 or 512, such as DiT-XL/2-256"
)
# The families that a preset of a kind may be of; the first is the usual one.
FAMILIES_OF_KIND = {
    "DiT": ("diffusers", "official"),
    "SiT": ("sit", "repa", "meanflow"),
    "LightningDiT": ("lightningdit",),
}


@dataclass(frozen=True)
class Preset:
    """A published model: its kind, its shape, and the side of its square images in pixels."""

    kind: str
    depth: int
    width: int
    heads: int
    patch_size: int
    image_side: int

    @property
    def families(self) -> tuple[str, ...]:
        """The families that it may be of; the first is the usual one."""
        return FAMILIES_OF_KIND[self.kind]


def preset_from_name(name: str) -> Preset | None:
    """The preset that a name such as ``DiT-XL/2-256`` means; None for any other name."""
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    kind, size, patch = match.group(1, 2, 3) if match[1] else match.group(4, 5, 6)
    depth, width, heads = PRESETS[f"DiT-{size}"]
    return Preset(kind, depth, width, heads, int(patch), int(match[7]))
