"""How much of what an engine takes the relation rungs visit: every small batch, and a sample of the larger ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dit_runtime.backends.base import EngineInfo
from dit_runtime.backends.profiles import BatchShape
from dit_runtime.bundle.macs import count_step_gmac
from dit_runtime.bundle.manifest import ModelSpec

CHEAP_GMAC = 1.0  # of one image's evaluation; for models that need more, fewer shapes are visited


@dataclass(frozen=True)
class Effort:
    """What the relation rungs visit.

    Attributes:
        batches: of the step, for each number of guidance branches.
        decoded: of decoder and encoder.
        mixed: sampling steps of each image of a batch whose images differ in sampler, steps and guidance.
        table_bytes: size of the conditioning table whose rows are read.
        rows: rows of that table that are drawn at random, besides those next to powers of two.
        repeats: further calls of the step at each small shape, before the first call is made again.
        sizes: whether the conditioner is called with many numbers of rows.
    """

    batches: Mapping[int, tuple[int, ...]]
    decoded: tuple[int, ...]
    mixed: tuple[int, ...]
    table_bytes: int
    rows: int
    repeats: int
    sizes: bool


QUICK = Effort({1: (1, 2, 3, 5), 2: (2, 5), 3: (2,)}, (1, 2, 3), (3, 6, 3), 64 << 20, rows=0, repeats=0, sizes=False)
FULL = Effort(
    {1: (*range(1, 9), 13, 32), 2: (*range(1, 9), 13, 32), 3: (1, 2, 3, 4), 4: (2,), 5: (1, 3)},
    (1, 2, 3, 4, 5),
    (3, 6, 3, 4, 2, 3, 5),
    256 << 20,
    rows=24,
    repeats=90,
    sizes=True,
)
QUICK_LARGE = Effort({1: (1, 2), 2: (2,), 3: (1,)}, (1, 2), (2, 2), 64 << 20, rows=0, repeats=0, sizes=False)
FULL_LARGE = Effort(
    {1: (1, 2, 3, 4, 6), 2: (1, 2, 3, 4), 3: (1, 2)}, (1, 2, 3), (3, 5, 2), 256 << 20, rows=8, repeats=0, sizes=True
)


def effort_for(model: ModelSpec, quick: bool) -> Effort:
    """How much is visited of a model's engines."""
    if count_step_gmac(model) > CHEAP_GMAC:
        return QUICK_LARGE if quick else FULL_LARGE
    return QUICK if quick else FULL


def list_batches(info: EngineInfo, graph: str, some: Sequence[int]) -> list[int]:
    """The batches of a graph to visit: ``some`` that the engine takes, and each profile's least, middle and largest."""
    most = info.max_batch
    if graph not in info.profiles:
        return sorted(batch for batch in {*some, most} if batch is not None and batch <= (most or batch))
    found = set()
    for least, _, largest in info.profiles[graph].ranges():
        found |= {batch for batch in some if batch <= largest[0]}
        found |= {least[0], (least[0] + largest[0]) // 2, largest[0]}
    return sorted(found)


def list_shapes(info: EngineInfo, effort: Effort) -> list[BatchShape]:
    """The ``(batch, branches)`` of the step to visit, from few branches to many."""
    ranges = info.profiles["step"].ranges() if "step" in info.profiles else []
    found = []
    for branches in sorted({*effort.batches, *(each.largest[1] for each in ranges)}):
        for batch in list_batches(info, "step", effort.batches.get(branches, ())):
            # A call with fewer images or branches is padded up to a profile's least shape.
            if not ranges or any(each.largest[0] >= batch and each.largest[1] >= branches for each in ranges):
                found.append((batch, branches))
    return found
