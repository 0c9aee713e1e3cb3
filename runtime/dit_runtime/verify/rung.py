"""A verification and its rungs, from the bottom up: each rung is one comparison with the reference.

A rung passes when it keeps its absolute limit and, where PyTorch's own error is known, its error budget too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dit_runtime.core.text import join_lines
from dit_runtime.verify.coverage import Coverage

AT_LEAST = ("dB", "share", "SSIM", "times")  # the units in which a larger value is better


@dataclass(frozen=True)
class Rung:
    """One comparison. It passes at or below ``limit``; with a unit of ``AT_LEAST`` it passes at or above ``limit``.

    Attributes:
        name, detail: what was compared, and where the error is largest or first too large.
        value, limit, unit: the absolute gate.
        ratio, threshold: the error budget. ``ratio`` is the engine's error over PyTorch's own error in the same
            precision, the largest ratio of the series; ``threshold`` is the largest ratio that passes. None where
            PyTorch's own error is not known.
        first_over: the first member of the series that is beyond the budget, as a person says it: ``block 17``.
        metrics: ``max_abs``, ``relative_l2`` and ``cosine``; images also have ``psnr`` and ``ssim``.
        axis: what one member of the series is: ``block``, ``step``, ``image`` or another word.
        series: one number for each member: ``error`` (relative L2), ``floor`` (PyTorch's own error), ``ratio`` and
            ``magnitude`` (max |x|).
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
        """The share of its limit or of its budget that a rung uses, the larger of the two; above 1 the rung fails."""
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
        """A value or a limit of this rung as text, with its unit."""
        return {"dB": f"{value:.1f} dB", "share": f"{value:.2%}", "SSIM": f"{value:.5f}", "times": f"{value:.3g}×"}.get(
            self.unit, f"{value:.2e}"
        )

    def as_json(self) -> dict[str, Any]:
        """All fields and the verdict. Numbers that are not finite become words, since JSON has no such numbers."""
        values: dict[str, Any] = _plain({**asdict(self), "used": self.used})
        return {**values, "passed": self.passed}


@dataclass(frozen=True)
class Verification:
    """What the verification of one bundle on one engine, at one image size, found.

    Attributes:
        bundle: the bundle's digest.
        model, reference: what was exported, and what the engine was compared with.
        precision: the precision that the engine computes in.
        engine: the engine's name.
        image_size: height and width of the images in pixels.
        quick: whether the verification left out the rungs that say where a fault is rather than whether there is one.
        rungs: the comparisons, from the bottom up.
        images: the engine's images and the reference's, uint8 ``[N, H, W, 3]`` each; None where the engine makes none
            of the recorded images.
        magnitudes: max |x| of each of the reference's units on its trajectory, as in the manifest.
        coverage: what was visited of all that the engine takes.
        guidance: the largest guidance scale whose trajectory was compared with the reference's.
        actions: whether it is a policy's, which makes actions and no images.
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
    coverage: Coverage = field(default_factory=Coverage)
    guidance: float = 1.0
    actions: bool = False

    @property
    def passed(self) -> bool:
        return all(rung.passed for rung in self.rungs)

    def as_json(self) -> dict[str, Any]:
        """All fields but the images, and the verdict."""
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
            "guidance": self.guidance,
            "actions": self.actions,
            "coverage": self.coverage.as_json(),
            "rungs": [rung.as_json() for rung in self.rungs],
        }


def format_rungs(rungs: Sequence[Rung]) -> str:
    """The rungs as a table for a terminal: the absolute gate, the error budget, the verdict, and where the error is."""
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
    return join_lines(lines)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
