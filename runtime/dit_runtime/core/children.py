"""Children: how a module of ours is started in an interpreter of its own, and ended with this process."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dit_runtime.core.streams import stderr_of_children

_PR_SET_PDEATHSIG = 1  # of linux/prctl.h
PACKAGES = ("dit_runtime", "dit_engines", "dit_export")


def command_of_module(module: str, *arguments: str) -> list[str]:
    """The command that runs ``module`` as ``__main__`` in a fresh interpreter, with this process's ``sys.path``.

    ``python -m`` would look for every module in the current folder first, which may be a bundle of somebody else's. The
    child does not look there, unless our own packages were imported from there: a checkout may be the current folder.
    """
    code = (
        f"import sys; sys.path[:] = {_find_import_path()!a}; import runpy; "
        f"from dit_runtime.core.children import end_with_parent; end_with_parent(); "
        f"runpy.run_module({module!a}, run_name='__main__', alter_sys=True)"
    )
    return [sys.executable, "-c", code, *arguments]


def start_child(command: Sequence[str], **options: Any) -> subprocess.Popen[str]:
    """Start a child with text pipes for stdin and stdout; ``options`` are ``subprocess.Popen``'s.

    Ctrl-C in a terminal is for all its processes. The parent answers it: the child has it blocked from its first
    instruction on.
    """
    options = {"stderr": stderr_of_children(), **options}
    with _blocked(signal.SIGINT):
        return subprocess.Popen(
            list(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8", errors="replace", **options
        )


def run_child(command: Sequence[str], text: str) -> subprocess.CompletedProcess[str]:
    """Run a child on ``text`` as its stdin, and wait for it; an interrupt ends it."""
    with start_child(command) as process:
        try:
            out, _ = process.communicate(text)
        except BaseException:
            process.kill()
            raise
    return subprocess.CompletedProcess(process.args, process.returncode, out)


def end_with_parent() -> None:
    """Let the system end this process when its parent is gone, where it can: even a killed parent leaves no child."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


@contextlib.contextmanager
def _blocked(number: signal.Signals) -> Iterator[None]:
    """Hold a signal back meanwhile; processes that are started in here never get it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {number})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _find_import_path() -> list[str]:
    """``sys.path`` with absolute entries, without the current folder unless it holds a package of ours."""
    files = [sys.modules[name].__file__ for name in PACKAGES if name in sys.modules]
    keep = any(_is_current_folder(Path(file).parents[1]) for file in files if file is not None)
    return [os.fspath(path.absolute()) for path in map(Path, sys.path) if keep or not _is_current_folder(path)]


def _is_current_folder(path: Path) -> bool:
    try:
        return path.samefile(os.curdir)
    except OSError:  # an entry of sys.path need not exist
        return False
