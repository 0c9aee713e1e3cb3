"""The commands, in this process or in one of their own, and what ``make install`` puts beside them."""

from __future__ import annotations

import contextlib
import importlib
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

import pytest

ROOT = Path(__file__).parents[2]
MODULES = {
    "dit-export": "dit_export.command",
    "dit-build": "dit_engines.command",
    "dit-sample": "dit_runtime.commands.sample",
    "dit-verify": "dit_runtime.commands.verify",
    "dit-bench": "dit_runtime.commands.bench",
    "dit-serve": "dit_serve.command",
    "dit-triton": "dit_serve.triton_command",
    "dit-tune": "dit_runtime.commands.tune",
}
# How an installation's script gets each command's main.
ENTRIES = {
    "dit-export": "from dit_export.entry import export as main",
    "dit-build": "from dit_engines.entry import build as main",
    "dit-sample": "from dit_runtime.commands.entry import sample as main",
    "dit-verify": "from dit_runtime.commands.entry import verify as main",
    "dit-bench": "from dit_runtime.commands.entry import bench as main",
    "dit-serve": "from dit_serve.entry import serve as main",
    "dit-triton": "from dit_serve.entry import triton as main",
    "dit-tune": "from dit_runtime.commands.entry import tune as main",
}


def bindings(name: str) -> Path:
    """The folder of a generation's Python bindings, which ``make install`` puts there; skips the test without it."""
    folder = ROOT / "build" / "bindings" / name
    tags = [line for file in folder.glob("*.dist-info/WHEEL") for line in file.read_text().splitlines()]
    if not [tag for tag in tags if tag.startswith((f"Tag: cp3{sys.version_info.minor}-", "Tag: py3-"))]:
        pytest.skip(f"{name}'s bindings are not installed: make install, with a Python that they have a wheel for")
    return folder


def run_command(*argv: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """A command of this distribution in this process: ``run_command("dit-sample", …)``.

    It has imported already what a process of its own would take seconds to import. What the command leaves in the
    process (signal handlers, hooks, the folder it works in) is put back; its output is all that is written to file
    descriptors 1 and 2, by its own children too.
    """
    name, *rest = (str(item) for item in argv)

    def main() -> None:
        importlib.import_module(MODULES[name]).main(rest)

    before = Path.cwd()
    os.chdir(cwd or before)
    try:
        with references_in_this_process() if name == "dit-export" else contextlib.nullcontext():
            return run_here(main, [name, *rest])
    finally:
        os.chdir(before)


def run_process(*argv: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """A command of this distribution in a process of its own; ``options`` are ``subprocess.run``'s."""
    name, *rest = (str(item) for item in argv)
    code = f"import sys; sys.argv[0] = {name!r}; from {MODULES[name]} import main; main(sys.argv[1:])"
    return subprocess.run([sys.executable, "-c", code, *rest], capture_output=True, text=True, check=False, **options)


def run_here(work: Callable[[], object], argv: list[str]) -> subprocess.CompletedProcess[str]:
    """``work`` as a process's main: an exit becomes a code, an exception a traceback and code 1."""
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM)
    handlers, hook = [signal.getsignal(number) for number in signals], sys.unraisablehook
    arguments, sys.argv = sys.argv, argv
    code = 0
    with captured() as (out, err):
        try:
            with default_warnings(err):
                work()
        except SystemExit as done:
            if isinstance(done.code, str):
                print(done.code, file=err)
            code = done.code if isinstance(done.code, int) else int(done.code is not None)
        except Exception:  # noqa: BLE001  # as an interpreter would end
            traceback.print_exc(file=err)
            code = 1
        finally:
            sys.argv, sys.unraisablehook = arguments, hook
            for number, handler in zip(signals, handlers, strict=True):
                signal.signal(number, handler)
        texts = read_all(out), read_all(err)
    return subprocess.CompletedProcess(argv, code, *texts)


@contextlib.contextmanager
def captured() -> Iterator[tuple[TextIO, TextIO]]:
    """What is written to file descriptors 1 and 2 goes to two files instead."""
    with contextlib.ExitStack() as stack:
        files = []
        for number, name in ((1, "stdout"), (2, "stderr")):
            getattr(sys, name).flush()
            file = stack.enter_context(tempfile.TemporaryFile("w+", encoding="utf-8", buffering=1))
            before = os.dup(number)
            stack.callback(os.close, before)
            os.dup2(file.fileno(), number)
            stack.callback(os.dup2, before, number)
            stack.callback(setattr, sys, name, getattr(sys, name))
            setattr(sys, name, file)
            files.append(file)
        yield files[0], files[1]


def read_all(file: TextIO) -> str:
    file.flush()
    file.seek(0)
    return file.read()


@contextlib.contextmanager
def default_warnings(err: TextIO) -> Iterator[None]:
    """Warnings as an interpreter shows them, where pytest would raise them."""

    def show(message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: object) -> None:
        print(warnings.formatwarning(message, category, filename, lineno), end="", file=err)

    with warnings.catch_warnings():
        warnings.simplefilter("default")
        for category in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
            warnings.simplefilter("ignore", category)
        warnings.showwarning = show
        yield


@contextlib.contextmanager
def references_in_this_process() -> Iterator[None]:
    """The export's reference process runs here instead, as a process of its own would run it: 4 s less of imports."""
    from dit_export.reference import process

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(process, "command_of_module", lambda module, *arguments: [module, *arguments])
        patch.setattr(process, "run_child", run_module)
        yield


def run_module(command: list[str], text: str) -> subprocess.CompletedProcess[str]:
    """``run_child`` of a module with arguments, ``[MODULE, …]``, in this process."""
    import torch

    module, *arguments = command

    def main() -> None:
        warnings.filterwarnings("ignore", ".*found in sys.modules", RuntimeWarning)  # it is imported for its functions
        runpy.run_module(module, run_name="__main__", alter_sys=True)

    threads, stdin = torch.get_num_threads(), sys.stdin
    with tempfile.TemporaryFile("w+", encoding="utf-8") as sys.stdin:
        sys.stdin.write(text)
        sys.stdin.seek(0)
        try:
            done = run_here(main, [module, *arguments])
        finally:
            sys.stdin = stdin
            torch.set_num_threads(threads)
    print(done.stderr, end="", file=sys.stderr, flush=True)
    return done
