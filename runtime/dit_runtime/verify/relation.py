"""A relation between an engine's own results, as a rung: how far the results are from what the relation says.

What the golden records anchor, relations carry to inputs that no record has. Two results that must be equal may be
apart by twice what each may be apart from the reference: the same tolerances and the same error budget apply, doubled.
An engine's own noise sets no limit, because a faulty engine would excuse itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from dit_runtime.backends.base import Array
from dit_runtime.verify.budget import Budget, worst_floor_of
from dit_runtime.verify.metrics import comparable
from dit_runtime.verify.rung import Rung

SIDES = 2  # results that are compared, each of which may be in error


@dataclass
class Relation:
    """Collects the comparisons of a relation, and keeps the worst.

    Attributes:
        budget: the limits.
        name: of the rung.
        largest: the largest relative L2 so far.
    """

    budget: Budget
    name: str
    largest: float = 0.0
    _worst: Rung | None = None

    def add(self, kind: str, record: str, found: Array, expected: Array, where: str, scale: float, norm: float) -> None:
        """Compare two results.

        Args:
            kind: the kind of rung whose limits apply.
            record: the record whose floors apply; its largest floor counts.
            found, expected: two results that must be equal.
            where: what was compared, for messages.
            scale: the magnitude to which max |Δ| is relative.
            norm: the norm to which ‖Δ‖ is relative.
        """
        value = error = math.inf
        if comparable(found, expected):
            difference = found.astype(np.float64) - expected
            value = float(np.abs(difference).max(initial=0)) / max(scale, 1e-30)
            error = float(np.linalg.norm(difference)) / max(norm, 1e-30)
        self.add_error(kind, record, value, error, where)

    def add_error(self, kind: str, record: str, value: float, error: float, where: str) -> None:
        """As ``add``, with max |Δ| relative to the scale, and ‖Δ‖ relative to the norm."""
        floor, threshold = worst_floor_of(self.budget, record), self.budget.threshold_of(kind)
        rung = Rung(
            self.name,
            value,
            SIDES * self.budget.tolerance_of(kind),
            "relative",
            where,
            ratio=None if floor is None or threshold is None else error / floor,
            threshold=None if floor is None or threshold is None else SIDES * threshold,
            metrics={"relative_l2": error},
        )
        self._keep(rung, error)

    def add_exact(self, kind: str, value: float, where: str) -> None:
        """Add an error that no sound engine has beyond float32's rounding; the tolerance is not doubled."""
        self._keep(Rung(self.name, value, self.budget.tolerance_of(kind), "relative", where), value)

    @property
    def compared(self) -> bool:
        """Whether anything was compared."""
        return self._worst is not None

    def _keep(self, rung: Rung, error: float) -> None:
        self.largest = max(self.largest, error)
        # Of two that fail, the first one says more: the shapes are visited from the least up.
        if self._worst is None or (rung.used > self._worst.used and self._worst.passed):
            self._worst = rung

    def rung(self, detail: str) -> Rung:
        """The rung of the worst comparison.

        Args:
            detail: what was visited, for messages.
        """
        worst = self._worst
        assert worst is not None, f"{self.name}: nothing was compared"
        where = "bit-equal" if not self.largest else f"{'worst' if worst.passed else 'first'}: {worst.detail}"
        return Rung(
            worst.name,
            worst.value,
            worst.limit,
            worst.unit,
            f"{where}; {detail}",
            worst.ratio,
            worst.threshold,
            None if worst.passed else worst.detail,
            worst.metrics,
        )
