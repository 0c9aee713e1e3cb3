"""Wait for what another thread or process does."""

from __future__ import annotations

import time
from collections.abc import Callable

SECONDS = 60  # in which any of this is done, on a busy machine too


def await_true(condition: Callable[[], bool]) -> None:
    """Wait until a condition is true."""
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)
