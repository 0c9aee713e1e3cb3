"""What a format of checkpoint is: how to recognize it, and how to read it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dit_export.checkpoints.checkpoint import Checkpoint
from dit_export.checkpoints.source import Source


@dataclass(frozen=True)
class Location:
    """Where a checkpoint is.

    Attributes:
        path: its folder or file; None for a preset with random weights, which has neither.
        name: its name for the record.
        revision: the revision of a hub id, else None.
    """

    path: Path | None
    name: str
    revision: str | None = None


@dataclass(frozen=True)
class CheckpointFormat:
    """One format of checkpoint.

    Attributes:
        options: which of ``source.OPTION_PURPOSES`` this format takes; ``load_checkpoint`` refuses the others.
        recognizes: whether a location holds this format.
        load: reads it. It raises a CheckpointError for whatever it cannot read.
    """

    options: frozenset[str]
    recognizes: Callable[[Location], bool]
    load: Callable[[Source, Location], Checkpoint]
