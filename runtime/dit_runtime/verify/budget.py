"""The error budget: an engine's error may be at most a threshold times PyTorch's own error in the same precision.

    ratio = error(engine, FP32 reference) / error(PyTorch in the engine's precision, FP32 reference)

For FP32 the denominator is the error of PyTorch in FP32 against PyTorch in FP64. An error is the relative L2 of a
block, an image or a step. The denominators (``floors``) and the thresholds are in the bundle; ``limits.py`` caps the
thresholds and the absolute limits, because a bundle must not excuse itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dit_runtime.backends.base import Array, EngineInfo
from dit_runtime.bundle.manifest import name_for_size
from dit_runtime.bundle.precision import QUANTIZED, Precision
from dit_runtime.bundle.reader import Bundle
from dit_runtime.core.errors import BundleError
from dit_runtime.verify.limits import LARGER_IS_BETTER, THRESHOLDS, TOLERANCES, limits_for_bundle
from dit_runtime.verify.metrics import measures, relative_error, relative_l2
from dit_runtime.verify.rung import Rung

# Rounding to float32 alone gives an error of at most half a unit in the last place, which is 2⁻²⁵ on average.
LEAST_FLOOR = 2.0**-25
# Where PyTorch's own error is above a tolerance, the limit is at most so many tolerances; 6 are known to be needed.
WIDEST = 10.0
# A clip holds most values where they must be, so an error is that of the few values within the bound: the largest is up
# to 10.2 times PyTorch's own L2 error (random models, guidance 8), where the threshold of L2 errors is 7.1.
PEAK_OF_CLIP = 2.0
FP16_MAX = 65504.0


@dataclass(frozen=True)
class Budget:
    """The limits at one of a bundle's sizes, for an engine of one precision.

    Attributes:
        precision: of the engine.
        tolerances: by kind of rung, the largest error.
        thresholds: by kind of rung, the largest ratio to PyTorch's own error.
        floors: by record, PyTorch's own errors.
        peak: how much larger than the L2 errors of the floors and thresholds a largest error may be.
    """

    precision: Precision
    tolerances: Mapping[str, float]
    thresholds: Mapping[str, float]
    floors: Mapping[str, Sequence[float]]
    peak: float = 1.0

    def tolerance_of(self, kind: str) -> float:
        """The absolute limit of a kind of rung.

        Raises:
            BundleError: the bundle has no tolerance of that kind.
        """
        if kind not in self.tolerances:
            raise BundleError(f"the manifest has no limit of {kind} for {self.precision}; export the bundle again")
        return self.tolerances[kind]

    def threshold_of(self, kind: str, guidance: float = 1.0, draws_noise: bool = False) -> float | None:
        """The largest ratio of a kind of rung at a guidance scale s; None where the bundle has no threshold of it.

        The guided output is e = s·ε_c − (s−1)·ε_∅. If the errors of the two branches are independent, the error of e is
        √(s² + (s−1)²) times a branch's error. It is at most 2s−1 times a branch's error, however the two are related.
        PyTorch's error may be the first case and an engine's error the second. So the threshold is multiplied by the
        quotient of the two, which is at most √2.

        A trajectory that draws noise has the quotient √2 at every scale. Its errors add up over the steps, and without
        guidance the quotient would leave no room: sound engines of random SiT models measured up to 0.98 in FP16 and
        0.99 in BF16 (``benchmarks/budget-rough.json``), where the thresholds are 1.0 and 1.3; those of smoother ones
        0.43 and 0.61 (``benchmarks/budget-velocity.json``).
        """
        least = self.thresholds.get(kind)
        if least is None:
            return None
        quotient = worst_gain_of(guidance) / math.hypot(guidance, guidance - 1)
        return least * max(quotient, math.sqrt(2) if draws_noise else 1.0)

    def limits_of(self, kind: str, record: str, count: int, threshold: float | None) -> list[float]:
        """The absolute limit of each of ``count`` members: the tolerance, or what the budget allows where that is more.

        A tolerance takes the reference to be far more exact than itself. Where PyTorch's own error is not, as in the
        last steps of diffusers' DDPM, whose FP32 arrays lose digits at low noise, the tolerance would judge the
        reference; there the budget, which divides by that error, is the limit. Members whose floor is unknown have the
        tolerance. No limit is above ``WIDEST`` tolerances, whatever the manifest says of PyTorch.
        """
        allowed = [floor * (threshold or 0.0) * self.peak for floor in self.floors.get(record, ())][:count]
        tolerance = self.tolerance_of(kind)
        limits = [min(max(tolerance, limit), WIDEST * tolerance) for limit in allowed]
        return limits + [tolerance] * (count - len(allowed))

    def ratios_of(self, record: str, errors: Sequence[float]) -> list[float]:
        """Each error divided by PyTorch's own.

        The bundle may have floors for all errors of a record, for none, or for the first steps of a trajectory. Errors
        without a floor have no ratio.
        """
        floors = self.floors.get(record, ())
        return [error / max(floor, LEAST_FLOOR) for error, floor in zip(errors, floors, strict=False)]


def worst_floor_of(budget: Budget, record: str) -> float | None:
    """PyTorch's own largest error in a record; None where it is not known."""
    floors = budget.floors.get(record, ())
    return max(max(floors), LEAST_FLOOR) if floors else None


def worst_gain_of(guidance: float) -> float:
    """The largest factor by which guidance of scale s increases an error of the branches: |s| + |s−1|."""
    return abs(guidance) + abs(guidance - 1)


def precision_for_limits(bundle: Bundle, info: EngineInfo) -> Precision:
    """The precision whose limits apply to an engine.

    It is BF16 for an engine that multiplies in BF16. Else it is the graphs' precision, also for an engine that
    multiplies more exactly: the weights are rounded to the graphs' precision in any case.
    """
    return Precision.BF16 if info.precision == Precision.BF16 else bundle.manifest.precision.name


def budget_for(bundle: Bundle, precision: Precision) -> Budget:
    """The error budget of a bundle at its size in use, for one precision: the stricter of its limits and our own.

    Raises:
        BundleError: the bundle has no limits for that precision.
    """
    manifest = bundle.manifest
    if precision not in manifest.tolerances:
        raise BundleError(
            f"{bundle.path}: has no limits for {precision}, only for {', '.join(manifest.tolerances)}; "
            "export the bundle again"
        )
    floors = manifest.floors.get(precision, {})
    if not bundle.default_size:
        suffix = name_for_size("", manifest.model.latent_size)
        floors = {name[: -len(suffix)]: values for name, values in floors.items() if name.endswith(suffix)}
    # An engine that runs the rest of an INT8 or FP8 bundle in BF16 has the errors of both.
    names = tuple(dict.fromkeys((precision, manifest.precision.name)))
    names = names if manifest.precision.name in QUANTIZED else (precision,)
    tolerances, own = (
        _laxest(limits_for_bundle(each, manifest.precision.name), names) for each in (TOLERANCES, THRESHOLDS)
    )
    tolerances = _cap(_laxest(manifest.tolerances, names), tolerances)
    thresholds = _cap({**own, **_laxest(manifest.thresholds, names)}, own)
    peak = PEAK_OF_CLIP if manifest.model.clips else 1.0
    return Budget(precision, tolerances, thresholds, floors, peak)


def _laxest(limits: Mapping[str, Mapping[str, float]], names: Sequence[str]) -> dict[str, float]:
    """By kind of rung the laxest of the limits of these precisions."""
    found: dict[str, float] = {}
    for kind, limit in (item for name in names for item in limits.get(name, {}).items()):
        laxest = min if kind in LARGER_IS_BETTER else max
        found[kind] = laxest(limit, found.get(kind, limit))
    return found


def _cap(limits: Mapping[str, float], own: Mapping[str, float]) -> dict[str, float]:
    """The limits by kind of rung, none laxer than the runtime's own."""
    strictest = {kind: max if kind in LARGER_IS_BETTER else min for kind in limits}
    return {kind: strictest[kind](limit, own.get(kind, limit)) for kind, limit in limits.items()}


@dataclass(frozen=True)
class Series:
    """The members that a rung compares: blocks, images or steps.

    Attributes:
        axis: the kind of the members, for a plot's axis.
        labels: a name of each member, for messages.
        found: the engine's array of each member.
        expected: the reference's array of each member.
        scales: of each member, a magnitude to which the rounding error is relative, where it is larger than the
            expected values; empty where the expected values decide.
    """

    axis: str
    labels: Sequence[str]
    found: Sequence[Array]
    expected: Sequence[Array]
    scales: Sequence[float] = ()


def compare_series(
    budget: Budget,
    name: str,
    kind: str,
    record: str,
    series: Series,
    guidance: float = 1.0,
    detail: str = "",
    draws_noise: bool = False,
) -> Rung:
    """Compare a series: each error with its limit, the largest ratio with the threshold.

    The rung's value and limit are those of the member that uses most of its limit.

    Args:
        budget: the limits and the floors.
        name: of the rung.
        kind: the kind of rung, whose limits apply.
        record: the record, whose floors apply.
        series: the members to compare.
        guidance: the guidance scale of the series.
        detail: what was compared, for messages; the worst and the first failing member are added.
        draws_noise: whether the series is a trajectory of a sampler that draws noise.
    """
    scales = series.scales or [0.0] * len(series.found)
    pairs = list(zip(series.found, series.expected, strict=True))
    errors = [relative_l2(*pair) for pair in pairs]
    largest = [relative_error(*pair, scale) for pair, scale in zip(pairs, scales, strict=True)]
    ratios = budget.ratios_of(record, errors)
    threshold = budget.threshold_of(kind, guidance, draws_noise) if ratios else None
    limits = budget.limits_of(kind, record, len(errors), threshold)
    beyond = [not error <= limit for error, limit in zip(largest, limits, strict=True)]
    closest = int(np.argmax([error / max(limit, 1e-300) for error, limit in zip(largest, limits, strict=True)]))
    if threshold is not None:
        beyond[: len(ratios)] = [wide or ratio > threshold for wide, ratio in zip(beyond, ratios, strict=False)]
    first = series.labels[beyond.index(True)] if True in beyond else None
    # The largest ratio decides where there are floors: the member with the larger error may just have larger values.
    worst = series.labels[int(np.argmax(ratios if ratios else largest))]
    where = [f"first: {first}"] if first is not None else []
    if worst != first:
        where.append(f"worst: {worst}")
    if len(pairs) == 1:
        where = []
    if lost := [label for label, (one, _) in zip(series.labels, pairs, strict=True) if not np.isfinite(one).all()]:
        where = [f"not finite: {lost[0]}"]
    flat = [np.concatenate([np.ravel(one) for one in side]) for side in (series.found, series.expected)]
    return Rung(
        name,
        largest[closest],
        limits[closest],
        "relative",
        "; ".join([*where, *([detail] if detail else [])]),
        ratio=max(ratios) if ratios else None,
        threshold=threshold,
        first_over=first,
        metrics=measures(*flat),
        axis=series.axis,
        series={
            "error": errors,
            "floor": list(budget.floors.get(record, ()))[: len(errors)],
            "ratio": ratios,
            "magnitude": [float(np.abs(one).max()) for one in series.found],
        },
    )
