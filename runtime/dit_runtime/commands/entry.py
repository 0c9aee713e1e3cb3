"""What the commands' scripts call; importing this module imports next to nothing."""

from __future__ import annotations

from dit_runtime.core.entry import TYPE_CHECKING, start

if TYPE_CHECKING:
    from typing import NoReturn


def sample() -> NoReturn:
    """``dit-sample``."""
    start("dit_runtime.commands.sample")


def verify() -> NoReturn:
    """``dit-verify``."""
    start("dit_runtime.commands.verify")


def bench() -> NoReturn:
    """``dit-bench``."""
    start("dit_runtime.commands.bench")


def tune() -> NoReturn:
    """``dit-tune``."""
    start("dit_runtime.commands.tune")
