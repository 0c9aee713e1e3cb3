"""Where a command begins and ends: signals are answered before anything else is imported, and after all is done.

This module imports what every interpreter has imported already. The package's own ``__init__`` does the same.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # signal itself imports enum, functools and collections first
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType
    from typing import Any, NoReturn

INTERRUPTED = 130
STOPS = (_signal.SIGINT, _signal.SIGTERM, _signal.SIGHUP)  # Ctrl-C, the system's or a scheduler's end, a lost terminal

_stopped = False


def start(module: str) -> NoReturn:
    """Import a command's module and run its ``main``; a signal meanwhile ends the process at once and in silence.

    While modules are imported nothing has been written yet, and after ``main`` everything has.
    """
    try:
        answer_stops(_leave)
        import atexit

        # Registered first, it runs last. While the interpreter is taken apart, a signal would find no answer.
        atexit.register(answer_stops, _signal.SIG_IGN)
        __import__(module)
        sys.modules[module].main()
    except KeyboardInterrupt:  # before the first line, or after the last
        os._exit(INTERRUPTED)
    finally:
        answer_stops(_leave)
    sys.exit(0)


def answer_stops(answer: Callable[[int, FrameType | None], Any] | int) -> None:
    """Let ``answer`` be called on every signal of ``STOPS`` that this process was not started to ignore."""
    for number in STOPS:
        if _signal.getsignal(number) != _signal.SIG_IGN:
            _signal.signal(number, answer)


def interrupt(signum: int, frame: FrameType | None) -> NoReturn:
    """Raise KeyboardInterrupt, so that everything is cleaned up on the way out; ``was_stopped`` tells it later."""
    global _stopped
    _stopped = True
    raise KeyboardInterrupt


def was_stopped() -> bool:
    """Whether the work was interrupted: a library may have made another error of the KeyboardInterrupt."""
    return _stopped


def forget_stops() -> None:
    """A work begins that nobody has interrupted yet."""
    global _stopped
    _stopped = False


def _leave(signum: int, frame: FrameType | None) -> NoReturn:
    os._exit(INTERRUPTED)
