"""What a command does besides its work: sockets that it opens and programs that it starts, its children's too."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

STRACE = ("strace", "-f", "-qq", "--seccomp-bpf")  # a filter: only calls that are traced take longer
# Every Python reads it when it starts. Of a program, what matters is its first word.
HOOK = """
import os, sys

def note(event, arguments):
    if event == "subprocess.Popen":
        told = os.fsdecode(arguments[0])
    elif event in ("os.exec", "os.posix_spawn", "os.system"):
        told = os.fsdecode(arguments[0])
    elif event == "socket.__new__":
        told = str(int(arguments[1]))
    elif event.startswith("socket.") or event in ("os.fork", "os.forkpty", "pty.spawn"):
        told = repr(arguments)
    else:
        return
    import json
    with open({log!r}, "a") as file:
        file.write(json.dumps([event, told]) + "\\n")

sys.addaudithook(note)
"""


def run_watched(
    argv: Sequence[str | Path], folder: Path, **options: object
) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """Run a command, and list each socket that it opens and each program that it starts but this Python.

    Python's own audit events tell, and strace where it is installed and allowed, which sees what libraries do in C.
    Sockets of the machine's own services (AF_UNIX: the C library looks for a cache of user names) are none.
    """
    folder.mkdir(exist_ok=True)
    log, trace = folder / "audit.log", folder / "trace"
    (folder / "sitecustomize.py").write_text(HOOK.replace("{log!r}", repr(str(log))))
    # An empty entry would be the current folder.
    paths = [str(folder), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    words = [str(word) for word in argv]
    if can_trace():
        words = [*STRACE, "-o", str(trace), "-e", "trace=socket,execve,execveat", *words]
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment, **options)  # type: ignore[call-overload]
    events = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    found = [f"{event} {told}" for event, told in events if not _is_ours(event, told)]
    if trace.exists():
        lines = trace.read_text(errors="replace").splitlines()
        found += [line for line in lines if "socket(" in line and "socket(AF_UNIX" not in line]
        programs = [match[1] for line in lines if (match := re.search(r'execve\("([^"]*)"', line))]
        found += [f"execve {program}" for program in programs if not _is_python(program)]
    return done, found


@cache
def can_trace() -> bool:
    """Whether strace is installed, and this system lets it trace."""
    words = [*STRACE, "-e", "trace=socket", "true"]
    return shutil.which("strace") is not None and subprocess.run(words, capture_output=True).returncode == 0


def _is_ours(event: str, told: str) -> bool:
    return (event == "subprocess.Popen" and _is_python(told)) or (event == "socket.__new__" and told == "1")


def _is_python(program: str) -> bool:
    return program == sys.executable
