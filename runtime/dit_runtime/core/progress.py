"""A progress bar with the time left, on stderr, for programs that show one."""

from __future__ import annotations

import sys
import time

from dit_runtime.core.streams import write_safely
from dit_runtime.core.text import one_line

WIDTH = 24
LONGEST_LABEL = 60

_asked = False  # by the program: a library draws nothing in another program's terminal


def show_progress(shown: bool = True) -> None:
    """Let progress bars be drawn from now on, or not."""
    global _asked
    _asked = shown


class Progress:
    """A bar over ``total`` pieces of work: ``with Progress("sampling", 50) as bar: bar.advance()``.

    Draws nothing unless the program asks for it (``show_progress``) and stderr is a terminal.
    """

    def __init__(self, label: str, total: int) -> None:
        self._label, self._total, self._done = label, max(total, 1), 0
        self._shown = _asked and sys.stderr is not None and sys.stderr.isatty()
        self._start = time.monotonic()
        self._drawn = 0.0

    def __enter__(self) -> Progress:
        self._draw()
        return self

    def __exit__(self, *_: object) -> None:
        if self._shown:
            write_safely(sys.stderr, "\r\x1b[K")

    def advance(self, count: int = 1) -> None:
        """So many more pieces are done."""
        self._done += count
        now = time.monotonic()
        if now - self._drawn > 0.1 or self._done >= self._total:
            self._drawn = now
            self._draw()

    def skip(self, count: int) -> None:
        """So many pieces need not be done: they count neither as done nor as left."""
        self._total = max(self._total - count, 1)

    def describe(self, label: str) -> None:
        """Say which work is being done now."""
        self._label = label
        self._draw()

    def _draw(self) -> None:
        if not self._shown:
            return
        spent = time.monotonic() - self._start
        share = min(self._done / self._total, 1.0)
        filled = round(share * WIDTH)
        left = f"{spent / share - spent:.0f} s left" if share > 0 else "..."
        full, empty = "█░" if _can_print("█░") else "#-"
        bar = full * filled + empty * (WIDTH - filled)
        label = one_line(self._label, LONGEST_LABEL)
        write_safely(sys.stderr, f"\r\x1b[K{label} {bar} {self._done}/{self._total}  {spent:.0f} s, {left}")


def _can_print(text: str) -> bool:
    try:
        text.encode(sys.stderr.encoding or "utf-8")
    except UnicodeEncodeError:
        return False
    return True
