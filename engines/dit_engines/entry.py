"""What the command's script calls; importing this module imports next to nothing."""

from typing import NoReturn

from dit_runtime.core.entry import start


def build() -> NoReturn:
    """``dit-build``."""
    start("dit_engines.command")
