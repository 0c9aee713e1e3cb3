"""How much of what an engine takes the relations visit: every batch up to ``EXACT``, and a sample of larger ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dit_runtime.backends.base import EngineInfo
from dit_runtime.backends.profiles import BatchShape
from dit_runtime.bundle.macs import count_step_gmac
from dit_runtime.bundle.manifest import ModelSpec

EXACT = 16  # a batch up to this one is trusted only where it was visited itself
SPREAD = 1.5  # the largest quotient of two visited batches between which a larger batch is trusted
CHEAP_GMAC = 1.0  # of one image's evaluation; for models that need more, fewer shapes are visited


@dataclass(frozen=True)
class Effort:
    """What the relation rungs visit.

    Attributes:
        batches: of the step, for each number of guidance branches.
        thorough: batches of the step up to this one are called with all that is tried, larger ones once.
        decoded: of decoder and encoder.
        sampled: whether each profile is visited at every batch up to ``EXACT`` and at a sample of the larger ones, and
            not at its least, middle and largest batch alone.
        mixed: sampling steps of each image of a batch whose images differ in sampler, steps and guidance.
        table_bytes: size of the conditioning table whose rows are read.
        rows: rows of that table that are drawn at random, besides those next to powers of two.
        first_rows: rows from the table's first on that are all read.
        repeats: further calls of the step at each small shape, before the first call is made again.
        sizes: whether the conditioner is called with many numbers of rows.
    """

    batches: Mapping[int, tuple[int, ...]]
    thorough: int
    decoded: tuple[int, ...]
    mixed: tuple[int, ...]
    table_bytes: int
    rows: int = 0
    first_rows: int = 0
    repeats: int = 0
    sizes: bool = False
    sampled: bool = False


def sample_batches(least: int, largest: int) -> list[int]:
    """The batches of a range to visit: all up to ``EXACT``, then ``SPREAD`` times the one before, and the last."""
    found = list(range(least, min(largest, EXACT) + 1)) or [least]
    while found[-1] < largest:
        found.append(min(int(SPREAD * found[-1]), largest))
    return found


SMALL = tuple(range(1, EXACT + 1))
ALL = tuple(sample_batches(1, 36))
QUICK = Effort({1: (1, 2, 3, 5), 2: (2, 5), 3: (2,)}, 5, (1, 2, 3), (3, 6, 3), 64 << 20)
FULL = Effort(
    {1: ALL, 2: ALL, 3: SMALL, 4: SMALL, 5: (1, 3)},
    thorough=8,
    decoded=SMALL,
    mixed=(3, 6, 3, 4, 2, 3, 5),
    table_bytes=256 << 20,
    rows=24,
    first_rows=2048,
    repeats=90,
    sizes=True,
    sampled=True,
)
QUICK_LARGE = Effort({1: (1, 2), 2: (2,), 3: (1,)}, 2, (1, 2), (2, 2), 64 << 20)
# Without profiles, which GPUs' engines have, a batch of a large model takes seconds: ``auto`` verifies those that are
# not among these before it goes there.
FULL_LARGE = Effort(
    {1: (1, 2, 3, 4, 6), 2: (1, 2, 3, 4), 3: (1, 2)},
    thorough=4,
    decoded=(1, 2, 3),
    mixed=(3, 5, 2),
    table_bytes=256 << 20,
    rows=8,
    sizes=True,
    sampled=True,
)


def effort_for(model: ModelSpec, quick: bool) -> Effort:
    """How much is visited of a model's engines."""
    if count_step_gmac(model) > CHEAP_GMAC:
        return QUICK_LARGE if quick else FULL_LARGE
    return QUICK if quick else FULL


def list_batches(info: EngineInfo, graph: str, some: Sequence[int], sampled: bool) -> list[int]:
    """The batches of a graph to visit: ``some`` that the engine takes, and batches of each profile.

    Args:
        info: of the engine.
        graph: name of the graph.
        some: batches of a graph whatever its profiles.
        sampled: as ``Effort.sampled``.
    """
    most = info.max_batch
    if graph not in info.profiles:
        return sorted(batch for batch in {*some, most} if batch is not None and batch <= (most or batch))
    found = set()
    for least, _, largest in info.profiles[graph].ranges():
        found |= {batch for batch in some if batch <= largest[0]}
        found |= {least[0], (least[0] + largest[0]) // 2, largest[0]}
        if sampled:
            found |= set(sample_batches(least[0], largest[0]))
    return sorted(found)


def list_shapes(info: EngineInfo, effort: Effort) -> list[BatchShape]:
    """The ``(batch, branches)`` of the step to visit, from few branches to many."""
    ranges = info.profiles["step"].ranges() if "step" in info.profiles else []
    found = []
    for branches in sorted({*effort.batches, *(each.largest[1] for each in ranges)}):
        for batch in list_batches(info, "step", effort.batches.get(branches, ()), effort.sampled):
            # A call with fewer images or branches is padded up to a profile's least shape.
            if not ranges or any(each.largest[0] >= batch and each.largest[1] >= branches for each in ranges):
                found.append((batch, branches))
    return found
