"""Whatever stops what writes, and whenever: the old or the new is there, whole, and the next run is as ever."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.writers import COMMANDS, PLAIN


def stop(bundles: dict[str, Path], folder: Path, every: int, *names: str) -> None:
    """Kill and interrupt them before and after one of so many of their file operations."""
    for precision, path in bundles.items():
        (folder / f"{precision}.bundle").symlink_to(path)
    done = subprocess.run(
        [sys.executable, "-m", "support.writers", folder, str(every), *names],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_file_or_folder_stopped_at_every_operation(tmp_path: Path) -> None:
    stop({}, tmp_path, 1, *(each.__name__ for each in PLAIN))


@pytest.mark.parametrize(("name", "every"), [("sample_folder", 71), ("sample_shards", 71), ("build", 23)])
def test_a_command_stopped_at_some_operations(name: str, every: int, bundles: dict[str, Path], tmp_path: Path) -> None:
    stop(bundles, tmp_path, every, name)


@pytest.mark.slow  # hundreds of stops, and the command runs once more after most of them
@pytest.mark.parametrize("name", [each.__name__ for each in COMMANDS])
def test_a_command_stopped_at_every_operation(name: str, bundles: dict[str, Path], tmp_path: Path) -> None:
    if name == "export":
        pytest.importorskip("torch")
    stop(bundles, tmp_path, 1, name)
