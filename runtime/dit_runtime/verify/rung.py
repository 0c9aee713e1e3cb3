"""The record of a verification: rungs from the bottom up, each one comparison with the reference.

A rung passes when it keeps an absolute limit and, where PyTorch's own error is known, the error budget too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

AT_LEAST = ("dB", "share", "SSIM", "times")  # units of which more is better


@dataclass(frozen=True)
class Rung:
    """One comparison. It passes at or below ``limit``, or with a unit of ``AT_LEAST`` at or above it.

    Attributes:
        name, detail: what was compared, and where it is worst or first wrong.
        value, limit, unit: the absolute gate.
        ratio, threshold: the error budget: the engine's error over PyTorch's own in the same precision, the largest of
            the series, and the most it may be; None where PyTorch's own error is not known.
        first_over: the first of the series beyond the budget, as a person says it: ``block 17``.
        metrics: ``max_abs``, ``relative_l2``, ``cosine``; of images ``psnr`` and ``ssim``.
        axis: what the series run along: ``block``, ``step``, ``image``, or another word for their members.
        series: along that axis ``error`` (relative L2), ``floor`` (PyTorch's own), ``ratio``, ``magnitude`` (max |x|).
    """

    name: str
    value: float
    limit: float
    unit: str
    detail: str = ""
    ratio: float | None = None
    threshold: float | None = None
    first_over: str | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    axis: str = ""
    series: Mapping[str, Sequence[float]] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        return self.within_limit and self.within_budget

    @property
    def within_limit(self) -> bool:
        if not math.isfinite(self.value):
            return self.unit in ("dB", "times") and self.value == math.inf  # identical images, nothing to overflow
        return self.value >= self.limit if self.unit in AT_LEAST else self.value <= self.limit

    @property
    def within_budget(self) -> bool:
        return self.ratio is None or self.threshold is None or self.ratio <= self.threshold

    @property
    def used(self) -> float:
        """How much of its limit or its budget a rung uses, the larger of the two; above 1 it fails."""
        if self.unit == "dB":
            decades = (self.limit - self.value) / 20
            absolute = 10**decades if decades < 300 else math.inf
        elif self.unit in ("share", "SSIM"):
            absolute = (1 - self.value) / (1 - self.limit) if self.limit < 1 else float(self.value < 1) * 2
        else:
            value, limit = (self.limit, self.value) if self.unit in AT_LEAST else (self.value, self.limit)
            absolute = value / limit if limit else math.inf
        budget = 0.0 if self.ratio is None or not self.threshold else self.ratio / self.threshold
        return math.inf if math.isnan(absolute + budget) else max(absolute, budget)

    def text(self, value: float) -> str:
        """A value or limit of this rung with its unit."""
        return {"dB": f"{value:.1f} dB", "share": f"{value:.2%}", "SSIM": f"{value:.5f}", "times": f"{value:.3g}×"}.get(
            self.unit, f"{value:.2e}"
        )

    def as_json(self) -> dict[str, Any]:
        """All of it and the verdict; numbers that are not finite as words, since JSON has none."""
        values: dict[str, Any] = _plain({**asdict(self), "used": self.used})
        return {**values, "passed": self.passed}


@dataclass(frozen=True)
class Verification:
    """What a bundle on an engine came to.

    Attributes:
        bundle: the bundle's digest.
        model, precision, reference: what was exported, the precision that the engine computes in, and what it was
            compared with.
        engine: its name.
        image_size: height and width of images.
        quick: whether rungs were left out that say where a fault is rather than whether there is one.
        rungs: from the bottom up.
        images: the engine's own and the reference's, uint8 ``[N, H, W, 3]`` each; None where it did not come to them.
        magnitudes: max |x| of the reference's units on its trajectory, as in the manifest.
    """

    bundle: str
    model: str
    precision: str
    reference: str
    engine: str
    image_size: tuple[int, int]
    quick: bool
    rungs: tuple[Rung, ...]
    images: tuple[NDArray[np.uint8], NDArray[np.uint8]] | None = None
    magnitudes: Mapping[str, float] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        return all(rung.passed for rung in self.rungs)

    def as_json(self) -> dict[str, Any]:
        """Everything but the images."""
        return {
            "bundle": self.bundle,
            "model": self.model,
            "precision": self.precision,
            "reference": self.reference,
            "engine": self.engine,
            "image_size": list(self.image_size),
            "quick": self.quick,
            "passed": self.passed,
            "magnitudes": dict(self.magnitudes),
            "rungs": [rung.as_json() for rung in self.rungs],
        }


def format_table(rungs: Sequence[Rung]) -> str:
    """The rungs as a table for people: the absolute gate, the error budget, and where."""
    width = max([24, *(len(rung.name) for rung in rungs)])
    lines = [f"{'rung':<{width}}  {'measured':>10}  {'limit':>10}  {'× PyTorch':>9}  {'limit':>5}  verdict"]
    for rung in rungs:
        ratio = "-" if rung.ratio is None else f"{rung.ratio:.2f}"
        threshold = "-" if rung.ratio is None or rung.threshold is None else f"{rung.threshold:.1f}"
        verdict = "pass" if rung.passed else "FAIL"
        line = (
            f"{rung.name:<{width}}  {rung.text(rung.value):>10}  {rung.text(rung.limit):>10}  "
            f"{ratio:>9}  {threshold:>5}  {verdict:<7}"
        )
        lines.append(f"{line}  {rung.detail}".rstrip())
    return "\n".join(lines)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
