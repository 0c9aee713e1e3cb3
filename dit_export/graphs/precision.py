"""The precision policy as data: which named unit of the network computes in which dtype.

TensorRT 11 has no FP16 switch, so the precision is written into the graph (strongly typed). Units are named as the
graph's nodes are: ``conditioner``, ``patch_embed``, ``blocks.17.attn``, ``blocks.17.mlp``, ``final``, ``decoder``,
``encoder``. Whatever the policy, these are FP32: the residual stream, the adaLN arithmetic, normalization statistics,
timestep features, softmax and the sampler. In a BF16 policy decoder and encoder are FP16. An INT8 or FP8 policy is
that of FP16, with INT8 or FP8 products in the blocks' linear layers (``blocks.17.mlp.fc1``).
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from dit_runtime.bundle.manifest import ENCODER, ModelSpec, PrecisionSpec
from dit_runtime.bundle.precision import QUANTIZED, Precision, is_kept
from dit_runtime.bundle.quantization import linears_of
from dit_runtime.core.errors import CheckpointError
from dit_runtime.core.reading import KEEP_LIST_BYTES, FileError, kind_of, read_file

# First and last layer are 0.4 % of the demo's step weights, less in larger models, and see the latents themselves.
FP16_KEEPS_FP32 = ("patch_embed", "final")

FP32 = PrecisionSpec(Precision.FP32, ())
FP16 = PrecisionSpec(Precision.FP16, FP16_KEEPS_FP32)
BF16 = PrecisionSpec(Precision.BF16, FP16_KEEPS_FP32)
# What a graph can be exported in, and torch's dtype for it.
DTYPES = {Precision.FP32: torch.float32, Precision.FP16: torch.float16, Precision.BF16: torch.bfloat16}


def dtype_of(precision: PrecisionSpec, unit: str) -> torch.dtype:
    """The dtype of a named unit's numbers, before any of its products is quantized."""
    return DTYPES[precision.precision_of(unit)]


def make_fp16_policy(keep_fp32: Iterable[str]) -> PrecisionSpec:
    """FP16 with these units in FP32, beside the units that FP16 always keeps in FP32."""
    return PrecisionSpec(FP16.name, tuple(dict.fromkeys((*FP16_KEEPS_FP32, *keep_fp32))))


def make_bf16_policy(keep_fp32: Iterable[str]) -> PrecisionSpec:
    """BF16 with these units in FP32, beside those that FP16 always keeps in FP32; decoder and encoder are FP16."""
    return PrecisionSpec(BF16.name, make_fp16_policy(keep_fp32).keep_fp32)


def make_int8_policy(keep_fp16: Iterable[str]) -> PrecisionSpec:
    """INT8 with these linear layers, or all layers of these units, in FP16."""
    return make_quantized_policy(Precision.INT8, keep_fp16)


def make_quantized_policy(name: Precision, keep_fp16: Iterable[str]) -> PrecisionSpec:
    """INT8 or FP8 with these linear layers, or all layers of these units, in FP16."""
    return PrecisionSpec(name, FP16_KEEPS_FP32, tuple(dict.fromkeys(keep_fp16)))


def units_of(model: ModelSpec) -> tuple[str, ...]:
    """The units of a model's policy, in the order of the network."""
    parts = ("attn", "cross_attn", "mlp") if model.conditioning == "cross-attention" else ("attn", "mlp")
    blocks = [f"blocks.{index}.{part}" for index in range(model.depth) for part in parts]
    return "conditioner", "patch_embed", *blocks, "final", "decoder", ENCODER


def check_units(precision: PrecisionSpec, model: ModelSpec) -> None:
    """Check that the model has each unit to keep in FP32 or FP16: a name without one would keep nothing, silently.

    Raises:
        CheckpointError: a name belongs to no unit.
    """
    units = units_of(model)
    for name in precision.keep_fp32:
        if not any(is_kept(unit, [name]) for unit in units):
            raise CheckpointError(
                f"--keep-fp32 {name}: this model has no such unit; expected conditioner, decoder, {ENCODER}, blocks.N "
                f"or {', '.join(unit.replace('.0.', '.N.') for unit in units if '.0.' in unit)} with N below "
                f"{model.depth}"
            )
    linears = linears_of(model.conditioning, model.depth)
    for name in precision.keep_fp16:
        if not any(is_kept(linear, [name]) for linear in linears):
            raise CheckpointError(
                f"--keep-fp16 {name}: this model has no such unit; expected blocks.N, blocks.N.mlp, "
                f"{', '.join(name.replace('.0.', '.N.') for name in linears if '.0.' in name)} or a like name, with N "
                f"below {model.depth}"
            )
    if precision.name in QUANTIZED and not any(map(precision.quantizes, linears)):
        raise CheckpointError(
            f"--keep-fp16 names every linear layer, so nothing would be {precision.name.upper()}; use --fp16"
        )


def read_keep_list(items: Sequence[str], option: str = "--keep-fp32") -> tuple[str, ...]:
    """The units that ``option`` names, ``--keep-fp32`` or ``--keep-fp16``, each once.

    ``items`` are names of units, or files with one name a line, where ``#`` begins a comment. The files are UTF-8, or
    UTF-16 with a byte order mark.

    Raises:
        CheckpointError: a file is missing or is not such a list.
    """
    units: list[str] = []
    for item in (items,) if isinstance(items, str) else items:
        path = Path(item)
        if kind_of(path) in ("file", "other"):
            units += _units_from_file(path, option)
        elif path.suffix == ".txt" or len(path.parts) > 1:
            raise CheckpointError(f"{option} {item}: no such file; make one with dit-export --bisect BUNDLE")
        else:
            units.append(item)
    return tuple(dict.fromkeys(units))


def _units_from_file(path: Path, option: str) -> list[str]:
    try:
        content = read_file(path, KEEP_LIST_BYTES)
        # Editors and shells of Windows write a byte order mark, and PowerShell's redirection UTF-16.
        encoding = "utf-16" if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
        text = content.decode(encoding)
        if "\0" in text:  # UTF-16 without a byte order mark, UTF-32, or no text
            raise ValueError("it holds the character NUL; save it as UTF-8")
        lines = text.splitlines()
    except (FileError, ValueError) as error:
        raise CheckpointError(f"{option} {path}: not a list of units' names ({error})") from error
    names = [name for line in lines if (name := line.partition("#")[0].strip())]
    if wrong := next((name for name in names if len(name.split()) > 1), None):
        raise CheckpointError(f"{option} {path}: {wrong!r} is not a unit's name; expected one name a line")
    return names
