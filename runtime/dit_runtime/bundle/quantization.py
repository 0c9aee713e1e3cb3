"""Quantization to 8 bits: which linear layers an INT8 or FP8 bundle quantizes, and how their calibration was made.

Symmetric, with zero points of 0. A weight has a scale for each output channel; a layer's input has one scale, which
calibration found: x ≈ scale · clamp(round(x / scale), -128, 127), where ties are rounded to even. The channels of an
input have factors, which the weight is divided by: channels that are much larger than others would cost the others
their levels. Factors are powers of 2, so nothing is rounded. They are in what makes the input: in the conditioning
table and in place of the 1 that adaLN adds to its scale, or in the weights of a LayerNorm. An MLP's second layer has a
product of its own for them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from dit_runtime.bundle.precision import Precision
from dit_runtime.core.arrays import Array
from dit_runtime.core.decode import Natural, Range


@dataclass(frozen=True)
class NumberFormat:
    """A format of 8 bits.

    Attributes:
        dtype: its name in ONNX.
        largest: what the largest |x| of a range becomes.
        step: all numbers of the format are multiples of it.
    """

    dtype: str
    largest: float
    step: float


FORMATS = {
    Precision.INT8: NumberFormat("int8", 127, 1),
    Precision.FP8: NumberFormat("float8e4m3fn", 448, 2.0**-9),  # E4M3FN: 4 bits of exponent, 3 of fraction
}
LARGEST = 127  # what the largest |x| of a range becomes
SMOOTHED = ("attn.qkv", "cross_attn.q", "mlp.fc1", "mlp.fc2")  # the layers that have factors
MULTIPLIED = "mlp.fc2"  # the layer of a block whose input the step multiplies by its factors
MODULATED = ("attn.qkv", "mlp.fc1")  # the layers whose input adaLN makes
FACTORS = 2.0**-6, 2.0**6  # the least and the largest
LINEARS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")  # of a block
CROSS_ATTENTION_LINEARS = ("attn.qkv", "attn.proj", "cross_attn.q", "cross_attn.proj", "mlp.fc1", "mlp.fc2")


@dataclass(frozen=True)
class CalibrationSpec:
    """How the ranges of a quantized bundle were found.

    Attributes:
        seed: of the images' noise; the first image has this seed, each further one the next.
        labels: of the images whose trajectories were run.
        sampler: whose loop was run, in PyTorch.
        steps: of a trajectory; every timestep of it counts.
        guidance: the guidance scale.
    """

    seed: Natural
    labels: tuple[Natural, ...]
    sampler: str
    steps: Annotated[int, Range(1, 10_000)]
    guidance: float


def is_block_linear(name: str) -> bool:
    """Whether a name is that of a linear layer of a block: ``blocks.17.mlp.fc1``."""
    return re.fullmatch(rf"blocks\.[0-9]+\.({'|'.join(map(re.escape, CROSS_ATTENTION_LINEARS))})", name) is not None


def linears_of(conditioning: str, depth: int) -> tuple[str, ...]:
    """The linear layers that calibration measures, in the order of the network."""
    names: Sequence[str] = CROSS_ATTENTION_LINEARS if conditioning == "cross-attention" else LINEARS
    return tuple(f"blocks.{index}.{name}" for index in range(depth) for name in names)


def smoothed_channels(conditioning: str, width: int, hidden: int) -> dict[str, int]:
    """How many factors each layer of a block has that has some, in the order of the network."""
    names = CROSS_ATTENTION_LINEARS if conditioning == "cross-attention" else LINEARS
    return {name: hidden if name == MULTIPLIED else width for name in names if name in SMOOTHED}


def factors_by_layer(factors: Array, conditioning: str, width: int, hidden: int) -> dict[str, Array]:
    """The factors ``[in]`` by the layer's name, from a record's ``[depth, …]``, where a row has those of a block."""
    found = {}
    for block, row in enumerate(factors):
        first = 0
        for name, count in smoothed_channels(conditioning, width, hidden).items():
            found[f"blocks.{block}.{name}"] = row[first : first + count]
            first += count
    return found


def normed_layers(conditioning: str) -> tuple[str, ...]:
    """The layers of a block whose factors a LayerNorm holds, in the order of the LayerNorms; none with adaLN."""
    return {"in-context": MODULATED, "cross-attention": ("attn.qkv", "cross_attn.q", "mlp.fc1")}.get(conditioning, ())


def stores_factors(conditioning: str, name: str) -> bool:
    """Whether the step stores the factors of a layer's input, as ``NAME.factor``."""
    return name.endswith(MULTIPLIED) or (conditioning in ("adaln", "adaln-zero") and name.endswith(MODULATED))
