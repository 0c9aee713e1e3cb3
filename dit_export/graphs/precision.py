"""The precision policy as data: which named unit of the network computes in which dtype.

TensorRT 11 has no FP16 switch, so precision is written into the graph (strongly typed). Units are named as the graph's
nodes are: ``conditioner``, ``patch_embed``, ``blocks.17.attn``, ``blocks.17.mlp``, ``final``, ``decoder``,
``encoder``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from dit_runtime.bundle.manifest import ENCODER, ModelSpec
from dit_runtime.core.errors import CheckpointError

# First and last layer are 0.4 % of the demo's step weights, less in larger models, and see the latents themselves.
FP16_KEEPS_FP32 = ("patch_embed", "final")
KEEP_LIST_BYTES = 1 << 20  # of a keep-list file; the longest sensible one is a thousandth of it


@dataclass(frozen=True)
class Precision:
    """``fp32`` or ``fp16`` with the units (name prefixes at dots) that stay FP32.

    Whatever the policy: residual stream, adaLN arithmetic, normalization statistics, timestep features, softmax and the
    sampler are FP32.
    """

    name: str
    keep_fp32: tuple[str, ...] = ()

    def dtype(self, unit: str) -> torch.dtype:
        return torch.float32 if self.name == "fp32" or is_kept(unit, self.keep_fp32) else torch.float16


FP32 = Precision("fp32")
FP16 = Precision("fp16", FP16_KEEPS_FP32)


def is_kept(unit: str, keep_fp32: Iterable[str]) -> bool:
    """Whether a unit is one of those, or inside one: ``blocks.17.attn`` is inside ``blocks.17``."""
    return any(unit == prefix or unit.startswith(prefix + ".") for prefix in keep_fp32)


def fp16_keeping(units: Iterable[str]) -> Precision:
    """FP16 with further units in FP32."""
    return Precision("fp16", tuple(dict.fromkeys((*FP16_KEEPS_FP32, *units))))


def units_of(model: ModelSpec) -> tuple[str, ...]:
    """The units of a model's policy, in the order of the network."""
    parts = ("attn", "cross_attn", "mlp") if model.conditioning == "cross-attention" else ("attn", "mlp")
    blocks = [f"blocks.{index}.{part}" for index in range(model.depth) for part in parts]
    return "conditioner", "patch_embed", *blocks, "final", "decoder", ENCODER


def check_units(precision: Precision, model: ModelSpec) -> None:
    """Check that the model has what is to be kept in FP32: a name of nothing would keep nothing, silently.

    Raises:
        CheckpointError: it has not.
    """
    units = units_of(model)
    for kept in precision.keep_fp32:
        if not any(is_kept(unit, [kept]) for unit in units):
            raise CheckpointError(
                f"--keep-fp32 {kept}: this model has no such unit; expected conditioner, decoder, {ENCODER}, blocks.N "
                f"or {', '.join(unit.replace('.0.', '.N.') for unit in units if '.0.' in unit)} with N below "
                f"{model.depth}"
            )


def keep_list(items: Sequence[str]) -> tuple[str, ...]:
    """Units from the command line: names, or files with a name a line, where ``#`` begins a comment.

    Raises:
        CheckpointError: a file that is not such a list.
    """
    units: list[str] = []
    for item in items:
        path = Path(item)
        if not path.is_file():
            if path.suffix == ".txt" or len(path.parts) > 1:
                raise CheckpointError(f"--keep-fp32 {item}: no such file; make one with dit-export --bisect BUNDLE")
            units.append(item)
            continue
        if path.stat().st_size > KEEP_LIST_BYTES:
            raise CheckpointError(f"--keep-fp32 {item}: {path.stat().st_size} bytes, expected a list of units' names")
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"--keep-fp32 {item}: not a list of units' names ({error})") from error
        names = [name for line in lines if (name := line.partition("#")[0].strip())]
        if wrong := next((name for name in names if len(name.split()) > 1), None):
            raise CheckpointError(f"--keep-fp32 {item}: {wrong!r} is not a unit's name; expected one name a line")
        units += names
    return tuple(dict.fromkeys(units))
