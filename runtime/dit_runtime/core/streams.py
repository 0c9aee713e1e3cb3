"""The standard streams of a process of ours: what is printed never fails, and nobody else's text is beside it."""

from __future__ import annotations

import contextlib
import io
import os
import select
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO

DEBUG = "DIT_DEBUG"  # this environment variable shows tracebacks and what libraries print
ESCAPES = "backslashreplace"  # how a character is printed that the terminal's encoding lacks


@contextlib.contextmanager
def guarded_streams(keep_stderr: bool = False) -> Iterator[Callable[[], OSError | None]]:
    """Give this process a stdout and a stderr that never raise, and libraries none at all.

    A library that prints from C or C++ writes to the file descriptors 1 and 2. These lead nowhere meanwhile, and with
    ``DIT_DEBUG`` set to stderr; ``sys.stdout`` and ``sys.stderr`` have descriptors of their own. ``keep_stderr`` leaves
    the descriptor 2 alone.
    A character that an encoding lacks is escaped. What cannot be written is dropped.

    A descriptor that was closed leads nowhere too: the next file that is opened would get its number, and what is
    printed.

    Streams that somebody has put in the place of Python's own are left alone.

    Yields:
        A function that flushes both streams and gives the error that stopped stdout, if any. A reader that went away
        and a stdout that was closed are none: nobody wants the rest.
    """
    if not owns_streams():
        yield lambda: None
        return
    with contextlib.ExitStack() as stack:
        _open_closed_descriptors()
        shown = keep_stderr or bool(os.environ.get(DEBUG))
        out, out_raw = _take_over(stack, 1, sys.stdout, 2 if shown else None)
        error, _ = _take_over(stack, 2, sys.stderr, 2 if shown else None)
        stack.callback(setattr, sys, "stdout", sys.stdout)
        stack.callback(setattr, sys, "stderr", sys.stderr)
        sys.stdout, sys.stderr = out, error

        def finish() -> OSError | None:
            out.flush()
            error.flush()
            return None if isinstance(out_raw.error, BrokenPipeError) else out_raw.error

        stack.callback(finish)
        yield finish


def owns_streams() -> bool:
    """Whether stdout and stderr are Python's own: no other program has put streams of its own there."""
    return sys.stdout is sys.__stdout__ and sys.stderr is sys.__stderr__


def write_safely(stream: TextIO | None, text: str) -> None:
    """Write to a stream of whatever encoding; a stream that cannot be written to gets nothing."""
    if stream is None:
        return
    encoding = getattr(stream, "encoding", None) or "utf-8"
    with contextlib.suppress(OSError, ValueError):  # ValueError: it is closed
        stream.write(text.encode(encoding, ESCAPES).decode(encoding))
        stream.flush()


def stderr_of_children() -> int | None:
    """The descriptor that a child of ours gets as stderr; None is this process's own."""
    try:
        return sys.stderr.fileno()
    except (AttributeError, OSError, ValueError):  # another program has put a stream of its own there
        return None


class _Raw(io.RawIOBase):
    """A file descriptor that is written to until it fails; what comes after that is dropped."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self.error: OSError | None = None

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def write(self, data: Any) -> int:
        while self.error is None:
            try:
                return os.write(self._descriptor, data)
            except BlockingIOError:  # a pipe that another process has made non-blocking, and that is full
                select.select([], [self._descriptor], [])
            except OSError as error:
                self.error = error
        return len(data)


def _take_over(
    stack: contextlib.ExitStack, number: int, before: TextIO | None, instead: int | None
) -> tuple[io.TextIOWrapper, _Raw]:
    """A stream of its own to where the descriptor ``number`` leads, which leads to ``instead`` until the stack ends."""
    if before is not None:
        with contextlib.suppress(OSError):
            before.flush()
    own = os.dup(number)
    stack.callback(os.close, own)
    other = os.open(os.devnull, os.O_WRONLY) if instead is None else os.dup(instead)
    os.dup2(other, number)
    os.close(other)
    stack.callback(os.dup2, own, number)
    raw = _Raw(own)
    errors = before.errors if before is not None else None
    stream = io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=before.encoding if before is not None else "utf-8",
        errors=ESCAPES if errors in (None, "strict", "surrogateescape") else errors,
        line_buffering=number == 2 or raw.isatty(),
    )
    return stream, raw


def _open_closed_descriptors() -> None:
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest that is free, which is this one
