"""The precisions. Each has one name, which manifests, commands, engines and audits share."""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum

from dit_runtime.core.errors import DiTError


class Precision(str, Enum):
    """The format in which numbers are stored and multiplied.

    In an ``INT8`` bundle the linear layers of the blocks multiply INT8, in an ``FP8`` bundle FP8 of 4 bits of exponent
    (E4M3), and all else is as in FP16. In a ``BF16`` bundle decoder and encoder are FP16.
    """

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"
    INT8 = "int8"
    FP8 = "fp8"

    def __str__(self) -> str:
        return self.value


# What graphs can be written in.
EXPORTED = (Precision.FP32, Precision.FP16, Precision.BF16, Precision.INT8, Precision.FP8)
# Precisions of 16 bits, in which a strongly typed graph computes.
HALF = (Precision.FP16, Precision.BF16)
# Precisions of the blocks' linear layers alone, whose numbers have scales that calibration finds.
QUANTIZED = (Precision.INT8, Precision.FP8)
# Further names that commands take.
ALIASES = {"f32": Precision.FP32}
# TensorRT's names of the datatypes, in its log, its inspector's JSON and the audits.
TENSORRT_DATATYPES = {
    Precision.FP32: "Float",
    Precision.FP16: "Half",
    Precision.BF16: "BFloat16",
    Precision.INT8: "Int8",
    Precision.FP8: "FP8",
}


def precision_named(name: str, error: type[DiTError]) -> Precision:
    """The precision of a name.

    Args:
        name: a value of ``Precision``, or a key of ``ALIASES``.
        error: the type of the error that is raised for any other name.
    """
    found = ALIASES.get(name)
    if found is None:
        try:
            found = Precision(name)
        except ValueError:
            raise error(f"precision {name!r} is unknown; choose one of {', '.join(Precision)}") from None
    return found


def is_kept(unit: str, kept_units: Iterable[str]) -> bool:
    """Whether a unit, such as ``blocks.17.mlp.fc1``, is one of the named units or inside one (``blocks.17.mlp``)."""
    return any(unit == kept or unit.startswith(f"{kept}.") for kept in kept_units)
