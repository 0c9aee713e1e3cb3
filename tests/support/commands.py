"""The commands, and what ``make install`` puts beside them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def bindings(name: str) -> Path:
    """The folder of a generation's Python bindings, which ``make install`` puts there; skips the test without it."""
    folder = ROOT / "build" / "bindings" / name
    if not folder.is_dir():
        pytest.skip(f"{name}'s bindings are not installed: make install, with a Python that they have a wheel for")
    return folder


def run_command(*argv: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
    """A command of this distribution, as ``module:main`` in a process of its own: ``run_command("dit-sample", …)``."""
    modules = {
        "dit-export": "dit_export.command",
        "dit-build": "dit_engines.command",
        "dit-sample": "dit_runtime.commands.sample",
        "dit-verify": "dit_runtime.commands.verify",
        "dit-bench": "dit_runtime.commands.bench",
    }
    name, *rest = (str(item) for item in argv)
    code = f"import sys; sys.argv[0] = {name!r}; from {modules[name]} import main; main(sys.argv[1:])"
    return subprocess.run([sys.executable, "-c", code, *rest], capture_output=True, text=True, check=False, **options)
