"""Where a command begins and ends: signals are answered before anything else is imported, and after all is done."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType
from typing import NoReturn

INTERRUPTED = 130
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # Ctrl-C, the system's or a scheduler's end, a lost terminal

_stopped = False


def start(module: str) -> NoReturn:
    """Import a command's module and run its ``main``; a signal meanwhile ends the process at once and in silence.

    While modules are imported nothing has been written yet, and after ``main`` everything has.
    """
    try:
        answer_stops(_leave)
        __import__(module)
        sys.modules[module].main()
    except KeyboardInterrupt:  # before the first line, or after the last
        os._exit(INTERRUPTED)
    finally:
        answer_stops(_leave)
    sys.exit(0)


def answer_stops(answer: signal._HANDLER) -> None:
    """Let ``answer`` be called on every signal of ``STOPS`` that this process was not started to ignore."""
    for number in STOPS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, answer)


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
