"""Stop a piece of work before or after each of its file operations: by a kill, or by an interrupt.

The work runs in a forked child each time. What libraries in C++ write is not seen, only what is done before and after.
"""

from __future__ import annotations

import builtins
import fcntl
import functools
import io
import itertools
import os
import re
import signal
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dit_runtime.core import replace

OPERATIONS = (
    *("chmod", "fsync", "ftruncate", "link", "mkdir", "open", "remove", "rename", "replace", "rmdir", "symlink"),
    *("truncate", "unlink", "utime", "write"),
)
MOMENTS = ("before", "after")
STOPS = (signal.SIGKILL, signal.SIGINT)
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC

Stop = Callable[[], None]


class Stopper:
    """Counts operations; stops this process at one of them."""

    def __init__(self, number: int, moment: str, stop: Stop) -> None:
        self.number, self.moment, self.stop, self.count = number, moment, stop, 0

    def around(self, operation: Callable[..., Any], matters: Callable[..., bool] = lambda *_, **__: True) -> Any:
        """The operation, counted where it matters."""

        @functools.wraps(operation)
        def counted(*args: Any, **options: Any) -> Any:
            if not matters(*args, **options):
                return operation(*args, **options)
            number, self.count = self.count, self.count + 1
            if number == self.number and self.moment == "before":
                self.stop()
            found = operation(*args, **options)
            if number == self.number and self.moment == "after":
                self.stop()
            return found

        return counted

    def install(self) -> None:
        """In this process, for good."""
        for name in OPERATIONS:
            matters = (lambda _, flags, *__, **___: bool(flags & WRITING)) if name == "open" else None
            setattr(os, name, self.around(getattr(os, name), *filter(None, [matters])))
        fcntl.flock = self.around(fcntl.flock)
        replace.exchange = self.around(replace.exchange)
        opened = io.open

        def open_file(file: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
            found = opened(file, mode, *args, **options)
            return _Written(found, self) if set(mode) & set("wax+") else found

        io.open = builtins.open = self.around(open_file, lambda file, mode="r", *_, **__: bool(set(mode) & set("wax+")))


class _Written:
    """A file whose writes are operations."""

    def __init__(self, file: Any, stopper: Stopper) -> None:
        self._file = file
        self.write, self.close = stopper.around(self._write), stopper.around(file.close)

    def _write(self, content: Any) -> Any:
        written = self._file.write(content)
        self._file.flush()  # else a kill would find it all in the buffer
        return written

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _Written:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def run_forked(work: Callable[[], object], number: int = -1, moment: str = "", stop: int = 0) -> tuple[int, bool]:
    """Run in a child that ends at an operation. Its exit code, negative for a signal, and whether it came so far."""
    readable, writable = os.pipe()
    child = os.fork()
    if child == 0:
        code, write = 99, os.write

        def stop_here() -> None:
            write(writable, b"here")
            if stop == signal.SIGINT:
                raise KeyboardInterrupt
            os.kill(os.getpid(), stop)

        try:
            Stopper(number, moment, stop_here).install()
            work()
            code = 0
        except KeyboardInterrupt:
            code = 130
        except SystemExit as done:
            code = done.code if isinstance(done.code, int) else 1
        except BaseException:  # noqa: BLE001  # the child must never go on as the test
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(writable)
    with os.fdopen(readable, "rb") as pipe:
        stopped = pipe.read() == b"here"
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), stopped


def stop_everywhere(
    work: Callable[[], object],
    reset: Callable[[], object],
    check: Callable[[], object],
    folder: Path,
    only: Callable[[int], bool] = lambda number: True,
) -> int:
    """Stop the work at each operation, and run it again.

    Args:
        work: writes into the folder; ``reset`` puts the folder as it was before.
        reset: see there.
        check: asserts that what was written is the old or the new, in full.
        folder: of whose files only those may be there in the end that an undisturbed run leaves.
        only: which operations are stopped at, by number.

    Returns:
        How many operations the work has.
    """
    reset()
    before = names_in(folder)
    assert run_forked(work) == (0, False)
    check()
    expected = names_in(folder)
    total, seen = 0, set[str]()
    for moment, stop in itertools.product(MOMENTS, STOPS):
        for number in itertools.count():
            if not only(number):
                continue
            reset()
            code, stopped = run_forked(work, number, moment, stop)
            if not stopped:
                assert code == 0
                total = max(total, number)
                break
            where = f"{signal.Signals(stop).name} {moment} operation {number}"
            assert code == (130 if stop == signal.SIGINT else -stop), where
            try:
                check()
                if stop == signal.SIGINT:
                    left = names_in(folder) - before - expected
                    assert all(name.endswith(".lock") for name in left), left  # which the next run takes away
                if (state := describe_state(folder)) in seen:
                    continue  # what the next run finds decides what it does
                seen.add(state)
                assert run_forked(work) == (0, False)
                check()
                assert names_in(folder) == expected, names_in(folder)
            except Exception as error:
                raise AssertionError(f"{where}: {error}") from error
    return total


def names_in(folder: Path) -> set[str]:
    """All paths in a folder."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def describe_state(folder: Path) -> str:
    """All that is in a folder, without what is random in the names of temporary files."""
    return repr(
        sorted(
            (re.sub(r"\.[0-9a-f]{16}\.dit-", ".dit-", str(path)), path.read_bytes() if path.is_file() else None)
            for path in folder.rglob("*")
        )
    )
