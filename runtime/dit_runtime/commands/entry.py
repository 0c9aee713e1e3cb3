"""What the commands' scripts call; importing this module imports next to nothing."""

from typing import NoReturn

from dit_runtime.core.entry import start


def sample() -> NoReturn:
    """``dit-sample``."""
    start("dit_runtime.commands.sample")


def verify() -> NoReturn:
    """``dit-verify``."""
    start("dit_runtime.commands.verify")


def bench() -> NoReturn:
    """``dit-bench``."""
    start("dit_runtime.commands.bench")
