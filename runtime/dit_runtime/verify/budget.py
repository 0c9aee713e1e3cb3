"""The error budget: an engine may be as wrong as PyTorch itself is in the same precision, times a threshold.

    ratio = error(engine, FP32 reference) / error(PyTorch in the engine's precision, FP32 reference)

and for FP32 the denominator is PyTorch in FP32 against PyTorch in FP64. Errors are relative L2 of each block, image
or step. Denominators (``floors``) and thresholds come with the bundle.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dit_runtime.backends.base import Array, EngineInfo
from dit_runtime.bundle.manifest import name_for_size
from dit_runtime.bundle.precision import Precision
from dit_runtime.bundle.reader import Bundle
from dit_runtime.core.errors import BundleError
from dit_runtime.verify.metrics import measures, relative_error, relative_l2
from dit_runtime.verify.rung import Rung

# A result that is rounded to float32 at all is off by half a unit in the last place at most, 2⁻²⁵ on the average.
LEAST_FLOOR = 2.0**-25
FP16_MAX = 65504.0


@dataclass(frozen=True)
class Budget:
    """What a bundle at one of its sizes allows an engine of one precision. ``floors`` are by record."""

    precision: Precision
    tolerances: Mapping[str, float]
    thresholds: Mapping[str, float]
    floors: Mapping[str, Sequence[float]]

    def tolerance_of(self, kind: str) -> float:
        """The absolute limit of a kind of rung.

        Raises:
            BundleError: the bundle has none.
        """
        if kind not in self.tolerances:
            raise BundleError(f"the manifest has no limit of {kind} for {self.precision}; export the bundle again")
        return self.tolerances[kind]

    def threshold_of(self, kind: str, guidance: float = 1.0) -> float | None:
        """The most that a ratio of a kind of rung may be at a guidance scale; None where the bundle has none.

        Guided, e = s·ε_c − (s−1)·ε_∅. If the branches' errors are independent, they add up to √(s² + (s−1)²) times a
        branch's, and however they are related to at most 2s−1 times. PyTorch's may be the one and an engine's the
        other, so the threshold of a branch grows by the quotient, √2 at the most.
        """
        least = self.thresholds.get(kind)
        if least is None:
            return None
        return least * worst_gain_of(guidance) / math.hypot(guidance, guidance - 1)

    def ratios_of(self, record: str, errors: Sequence[float]) -> list[float]:
        """Each error over PyTorch's own, for as many as are known: none, all, or the first steps of a trajectory."""
        floors = self.floors.get(record, ())
        return [error / max(floor, LEAST_FLOOR) for error, floor in zip(errors, floors, strict=False)]


def worst_gain_of(guidance: float) -> float:
    """Most that guidance of scale s multiplies an error of both branches with: |s| + |s−1|, from 1 on 2s−1."""
    return abs(guidance) + abs(guidance - 1)


def precision_for_limits(bundle: Bundle, info: EngineInfo) -> Precision:
    """The precision whose limits an engine is held to.

    BF16 where the engine multiplies in it, else as the graphs are written: an engine that multiplies more exactly still
    has their rounded weights.
    """
    return Precision.BF16 if info.precision == Precision.BF16 else bundle.manifest.precision.name


def budget_for(bundle: Bundle, precision: Precision) -> Budget:
    """The budget of a bundle at its size in use.

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
    return Budget(precision, manifest.tolerances[precision], manifest.thresholds.get(precision, {}), floors)


@dataclass(frozen=True)
class Series:
    """What a rung compares, member by member: blocks, images or steps.

    Attributes:
        axis: what the members are.
        labels: each member as a person says it.
        found, expected: the engine's and the reference's.
        scales: magnitudes that rounding is relative to where they are above the expected ones; of each member.
    """

    axis: str
    labels: Sequence[str]
    found: Sequence[Array]
    expected: Sequence[Array]
    scales: Sequence[float] = ()


def compare_series(
    budget: Budget, name: str, kind: str, record: str, series: Series, guidance: float = 1.0, detail: str = ""
) -> Rung:
    """The rung of a series: its worst member against the absolute limit, its largest ratio against the threshold.

    Args:
        budget: limits and PyTorch's own errors.
        name: of the rung.
        kind: whose limits apply.
        record: whose floors are the series'.
        series: what is compared.
        guidance: the scale that the series was made with.
        detail: what was compared, for people; where it is worst, and first wrong, is added.
    """
    scales = series.scales or [0.0] * len(series.found)
    pairs = list(zip(series.found, series.expected, strict=True))
    errors = [relative_l2(*pair) for pair in pairs]
    largest = [relative_error(*pair, scale) for pair, scale in zip(pairs, scales, strict=True)]
    ratios, limit = budget.ratios_of(record, errors), budget.tolerance_of(kind)
    threshold = budget.threshold_of(kind, guidance) if ratios else None
    beyond = [error > limit for error in largest]
    if threshold is not None:
        beyond[: len(ratios)] = [wide or ratio > threshold for wide, ratio in zip(beyond, ratios, strict=False)]
    first = series.labels[beyond.index(True)] if True in beyond else None
    # By the budget where there is one: of two members the one with smaller numbers may be the one that is wrong.
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
        max(largest),
        limit,
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
