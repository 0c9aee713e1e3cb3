"""What the command's script calls; importing this module imports next to nothing."""

from __future__ import annotations

from dit_runtime.core.entry import TYPE_CHECKING, start

if TYPE_CHECKING:
    from typing import NoReturn


def serve() -> NoReturn:
    """``dit-serve``."""
    start("dit_serve.command")


def triton() -> NoReturn:
    """``dit-triton``."""
    start("dit_serve.triton_command")
