"""What a verification visited of all that an engine takes: figures beside the verdict, from the calls themselves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dit_runtime.backends.base import EngineInfo
from dit_runtime.backends.profiles import BatchShape
from dit_runtime.bundle.manifest import Manifest
from dit_runtime.verify.effort import EXACT, SPREAD
from dit_runtime.verify.visits import Visits

Shapes = Mapping[str, Sequence[BatchShape]]  # by graph, batches (of the conditioner, rows) and branches

SLOTS = 3


@dataclass(frozen=True)
class Coverage:
    """What was visited.

    Attributes:
        shapes: the shapes at which each graph ran.
        counts: by kind of input, how many were visited, and of how many.
        left: what the engine takes and nothing visited, in words.
    """

    shapes: Shapes = field(default_factory=dict)
    counts: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    left: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """All fields as JSON values."""
        return {
            "shapes": {graph: [list(shape) for shape in shapes] for graph, shapes in self.shapes.items()},
            "counts": {kind: list(pair) for kind, pair in self.counts.items()},
            "left": list(self.left),
        }


def coverage_of(visits: Visits, info: EngineInfo, manifest: Manifest, compared: bool) -> Coverage:
    """What was visited of an engine.

    Args:
        visits: what the engine was asked.
        info: of the engine.
        manifest: of the bundle.
        compared: whether every class was compared with the reference.
    """
    shapes = {graph: tuple(sorted(found)) for graph, found in sorted(visits.shapes.items())}
    classes = 0 if manifest.model.observation else manifest.model.label_rows
    whole = range(len(manifest.diffusion.betas))
    counts = {
        **({"classes and null": (len(visits.labels & set(range(classes))), classes)} if classes else {}),
        "rows of the longest table": (len(visits.rows), visits.longest),
        "slots of the state": (len(visits.slots), SLOTS),
    }
    if whole:
        counts["training timesteps"] = (len(visits.timesteps & set(map(float, whole))), len(whole))
    left = [*_list_left(shapes, info, ("step", "decoder") if manifest.has_decoder else ("step",))]
    if not compared:
        left.append("classes beside the recorded images', against the reference: export the bundle again")
    if len(visits.labels) < classes:
        left.append(f"{classes - len(visits.labels)} classes")
    return Coverage(shapes, counts, tuple(left))


def _list_left(shapes: Shapes, info: EngineInfo, graphs: Sequence[str]) -> list[str]:
    """The batches and branches of step and decoder that the engine takes and nothing visited."""
    left = []
    for graph in graphs:
        found = shapes.get(graph, ())
        largest = max((batch for batch, _ in found), default=0)
        if graph not in info.profiles:
            for branches in sorted({count for _, count in found}):
                seen = {batch for batch, count in found if count == branches}
                if between := [batch for batch in range(1, max(seen)) if batch not in seen]:
                    left.append(f"{graph}{f' G={branches}' if graph == 'step' else ''}: batches {_ranges(between)}")
            if info.max_batch is None or info.max_batch > largest:
                left.append(f"{graph}: batches above {largest}")
            if graph == "step":
                left.append(f"step: G above {max((count for _, count in found), default=0)}")
            continue
        for least, _, most in info.profiles[graph].ranges():
            for branches in range(least[1], most[1] + 1):
                missing = [batch for batch in range(least[0], most[0] + 1) if (batch, branches) not in found]
                if missing:
                    left.append(f"{graph}{f' G={branches}' if graph == 'step' else ''}: batches {_ranges(missing)}")
    return left


def _ranges(numbers: Sequence[int]) -> str:
    """Rising numbers in words: ``4, 6 to 9``."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]} to {part[-1]}" for part in parts)


def covers(shapes: Shapes, graph: str, batch: int, branches: int = 1) -> bool:
    """Whether a graph is trusted at a shape: a verification visited it.

    Above ``EXACT``, where batches are sampled, a batch is also trusted between two that were visited, with the same
    branches, of which the larger is at most ``SPREAD`` times the smaller.
    """
    visited = [size for size, count in shapes.get(graph, ()) if count == branches]
    if batch in visited:
        return True
    below = max((size for size in visited if size < batch), default=0)
    above = min((size for size in visited if size > batch), default=math.inf)
    return batch > EXACT and above <= SPREAD * below


def format_coverage(coverage: Coverage) -> list[str]:
    """What was visited and what was left, in two lines."""
    by_branches: dict[int, list[int]] = {}
    for batch, branches in coverage.shapes.get("step", ()):
        by_branches.setdefault(branches, []).append(batch)
    visited = [f"G={branches} at batches {_ranges(sorted(sizes))}" for branches, sizes in sorted(by_branches.items())]
    visited += [f"{found} of {total} {kind}" for kind, (found, total) in coverage.counts.items()]
    lines = [f"visited: {'; '.join(visited)}"] if visited else []
    return lines + ([f"not visited: {'; '.join(coverage.left)}"] if coverage.left else [])
