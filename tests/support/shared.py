"""Folders that are made once a session, whatever the number of workers."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest


def shared_folder(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A worker's own copy of what ``make`` writes into a folder; the first that needs it makes it, others wait.

    Tests may write into their worker's copy, as engines and verdicts are.
    """
    from filelock import FileLock

    own = factory.getbasetemp()
    session = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own
    made = session / "shared" / name
    made.parent.mkdir(exist_ok=True)
    with FileLock(f"{made}.lock"):
        if not made.is_dir():
            half = made.with_name(f"{name}.half")
            shutil.rmtree(half, ignore_errors=True)
            half.mkdir()
            make(half)
            half.rename(made)
    return Path(shutil.copytree(made, factory.mktemp(name, numbered=False) / "copy"))
