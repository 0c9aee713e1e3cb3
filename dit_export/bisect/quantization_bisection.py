"""Finds the linear layers of an INT8 bundle whose quantization costs most: a list to keep in FP16.

What a layer costs is measured: the network's prediction with this layer alone quantized, against the prediction with
none. Errors of different layers are nearly independent, so their squares add up, and a layer has a share of the squared
error. Layers that cost most for their multiply-adds come first. The list is a beginning of this order: of the layers
that stand out, as far as a share of the multiply-adds allows; or the shortest with which the images reach a level.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dit_export.bisect.bisection import find_beginning
from dit_export.bisect.graph_edits import Array
from dit_export.bisect.quantization_trials import QuantizationTrials
from dit_export.reference.record_settings import CHEAP_GMAC
from dit_runtime.bundle.macs import count_step_gmac, count_tokens
from dit_runtime.bundle.reader import Bundle
from dit_runtime.core.errors import CheckpointError, ParityError
from dit_runtime.core.progress import Progress
from dit_runtime.verify.metrics import relative_l2

MOST_FP16 = 0.1  # of the quantized layers' multiply-adds, unless another share is asked for
STANDS_OUT = (
    2.0  # times its share of the multiply-adds, the share of the squared error of a layer that is worth keeping
)


@dataclass(frozen=True)
class Wanted:
    """How much is kept in FP16.

    Attributes:
        most_fp16: at most this share of the quantized layers' multiply-adds, 0 to 1, and only layers that stand out.
        least_psnr: instead, as few layers as give the worst image of the first recorded trajectory this PSNR in dB
            against the FP32 model's.

    Raises:
        CheckpointError: a number is out of its range.
    """

    most_fp16: float = MOST_FP16
    least_psnr: float | None = None

    def __post_init__(self) -> None:
        if not 0 < self.most_fp16 <= 1:
            raise CheckpointError(f"--most-fp16 {self.most_fp16:g}: expected a share above 0, up to 1, such as 0.1")
        if self.least_psnr is not None and not 0 < self.least_psnr < 100:
            raise CheckpointError(f"--least-psnr {self.least_psnr:g}: expected decibels above 0, below 100, such as 42")


@dataclass(frozen=True)
class LayerCost:
    """What the quantization of a layer costs, and what keeping it in FP16 would.

    Attributes:
        unit: the layer's name.
        error: relative L2 error of the prediction with this layer alone quantized.
        share: of the sum of all layers' squared errors.
        weights_bytes: how many bytes its weight takes more in FP16.
        macs: its share of the quantized layers' multiply-adds.
    """

    unit: str
    error: float
    share: float
    weights_bytes: int
    macs: float

    @property
    def worth(self) -> float:
        """Its share of the squared error, in its shares of the multiply-adds."""
        return self.share / self.macs

    def __str__(self) -> str:
        return (
            f"alone off by {self.error:.2%}, {self.share:.1%} of the squared error for {self.macs:.1%} of the INT8 "
            "multiply-adds"
        )


@dataclass(frozen=True)
class QuantizationBisection:
    """What a bisection of an INT8 bundle found. Pairs are before and after the layers are kept in FP16.

    Attributes:
        engine: the name of the engine that it ran on.
        layers: every quantized layer, the one that costs most first.
        findings: the layers to keep in FP16 beyond those of the bundle's policy; empty if none is worth it.
        keep_fp16: the units of the bundle's policy and the found layers.
        error: relative L2 error of the guided prediction against the FP32 model's.
        psnr: of the worst image against the FP32 model's in dB; None where it was not measured.
        weights_bytes: bytes of the weights file of the step.
        int8_gmac: INT8 multiply-adds of a branch of an image in 10⁹.
        exact: whether the layers' weights were the checkpoint's.
        wanted: how much was to be kept.
        trials: how often the network was evaluated, without images.
        seconds: how long the search took.
    """

    engine: str
    layers: tuple[LayerCost, ...]
    findings: tuple[LayerCost, ...]
    keep_fp16: tuple[str, ...]
    error: tuple[float, float]
    psnr: tuple[float, float] | None
    weights_bytes: int
    int8_gmac: tuple[float, float]
    exact: bool
    wanted: Wanted
    trials: int
    seconds: float

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def quantization_bisection_of(
    bundle: Bundle, weights: Mapping[str, Array] | None, wanted: Wanted | None = None
) -> QuantizationBisection:
    """Find the layers of an INT8 bundle whose quantization costs most.

    Args:
        bundle: the bundle at the size in use.
        weights: the checkpoint's FP32 weights of the step by module. None undoes the rounding of inputs alone.
        wanted: how much is kept; None is the usual share.

    Raises:
        BundleError: a file of the bundle is missing or altered.
        CheckpointError: the weights are not those that the bundle was quantized from.
        EngineError: ONNX Runtime is missing or cannot run a graph.
        ParityError: the PSNR that is wanted is not reached with all layers in FP16.
    """
    start, wanted = time.monotonic(), wanted or Wanted()
    manifest = bundle.manifest
    trials = QuantizationTrials(bundle, weights)
    cheap = count_step_gmac(manifest.model) <= CHEAP_GMAC
    with Progress("bisecting", len(trials.layers) + 3) as bar:
        costs = _measure_costs(trials, bar)
        if wanted.least_psnr is None:
            findings = choose_within(costs, wanted.most_fp16)
        else:
            findings = choose_for_images(trials, costs, wanted.least_psnr)
        bar.advance()
        units = [each.unit for each in findings]
        error = trials.measure_error(()), trials.measure_error(units)
        psnr = (trials.measure_psnr(()), trials.measure_psnr(units)) if cheap or wanted.least_psnr is not None else None
        bar.advance()
    total = sum(layer.numbers.size for layer in trials.layers.values()) * count_tokens(manifest.model) / 1e9
    return QuantizationBisection(
        engine=trials.engine_name,
        layers=tuple(sorted(costs, key=lambda each: -each.error)),
        findings=findings,
        keep_fp16=(*manifest.precision.keep_fp16, *units),
        error=error,
        psnr=psnr,
        weights_bytes=manifest.files[manifest.graphs["step"].weights].bytes,
        int8_gmac=(total, total * (1 - sum(each.macs for each in findings))),
        exact=trials.exact,
        wanted=wanted,
        trials=trials.evaluations,
        seconds=round(time.monotonic() - start, 1),
    )


def _measure_costs(trials: QuantizationTrials, bar: Progress) -> list[LayerCost]:
    """The cost of each layer, the one that is most worth keeping first."""
    none = trials.predict(())
    bar.advance()
    errors = {}
    for name in trials.layers:
        errors[name] = relative_l2(trials.predict([name]), none)
        bar.advance()
    squares = math.fsum(error**2 for error in errors.values())
    numbers = sum(layer.numbers.size for layer in trials.layers.values())
    costs = [
        LayerCost(
            unit=name,
            error=errors[name],
            share=errors[name] ** 2 / squares if squares else 0.0,
            weights_bytes=layer.added_bytes,
            macs=layer.numbers.size / numbers,
        )
        for name, layer in trials.layers.items()
    ]
    return sorted(costs, key=lambda each: -each.worth)


def choose_within(order: Sequence[LayerCost], most_fp16: float) -> tuple[LayerCost, ...]:
    """The layers that stand out, in their order, as far as they fit into a share of the multiply-adds."""
    chosen: list[LayerCost] = []
    for each in order:
        if each.worth >= STANDS_OUT and sum(one.macs for one in (*chosen, each)) <= most_fp16:
            chosen.append(each)
    return tuple(chosen)


def choose_for_images(
    trials: QuantizationTrials, order: Sequence[LayerCost], least_psnr: float
) -> tuple[LayerCost, ...]:
    """The shortest beginning of the order with which the worst image reaches a level in dB."""

    def reaches(kept: Sequence[LayerCost]) -> bool:
        return trials.measure_psnr([each.unit for each in kept]) >= least_psnr

    if reaches(()):
        return ()
    if not reaches(order):
        best = trials.measure_psnr([each.unit for each in order])
        cure = "ask for less" if trials.exact else "name the checkpoint too, for the weights that INT8 rounded"
        raise ParityError(
            f"{trials.bundle.path}: with all {len(order)} layers in FP16 the worst image is at {best:.1f} dB of the "
            f"FP32 model's, below --least-psnr {least_psnr:g}; {cure}"
        )
    return find_beginning(order, reaches)
