"""The precisions, by the one name that each has in manifests, commands, engines and audits."""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum

from dit_runtime.core.errors import DiTError


class Precision(str, Enum):
    """What numbers are stored and multiplied in. ``INT8`` is a name without an implementation yet."""

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"
    INT8 = "int8"

    def __str__(self) -> str:
        return self.value


# Names that commands also take.
ALIASES = {"f32": Precision.FP32}
# TensorRT's names of datatypes, in its log, its inspector's JSON and the audits made from them.
TENSORRT_DATATYPES = {
    Precision.FP32: "Float",
    Precision.FP16: "Half",
    Precision.BF16: "BFloat16",
    Precision.INT8: "Int8",
}


def precision_named(name: str, error: type[DiTError]) -> Precision:
    """The precision of a name.

    Args:
        name: a value of ``Precision``, or one of ``ALIASES``.
        error: raised for any other name.
    """
    found = ALIASES.get(name)
    if found is None:
        try:
            found = Precision(name)
        except ValueError:
            raise error(f"precision {name!r} is unknown; choose one of {', '.join(Precision)}") from None
    return found


def is_kept(unit: str, keep_fp32: Iterable[str]) -> bool:
    """Whether a unit, such as ``blocks.17.mlp.fc1``, is one of the named units or inside one (``blocks.17.mlp``)."""
    return any(unit == kept or unit.startswith(f"{kept}.") for kept in keep_fp32)
