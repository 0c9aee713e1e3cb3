"""Bundles of the tiny checkpoint, exported in this process.

``python tests/support/exports.py FOLDER [NAME…]`` makes them for a Python that cannot export:
``DIT_TEST_BUNDLES=FOLDER``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])  # not this folder, whose triton.py is not the library

from support.checkpoints import make_checkpoint
from support.commands import run_command

# name → options of dit-export
TINY = {
    "fp32": (),
    "fp16": ("--fp16",),
    "sized": ("--encoder", "--no-verify", "--size", "32x32", "32x48", "48x48"),
    "fp16-encoder": ("--fp16", "--encoder", "--no-verify"),
    "bf16": ("--bf16", "--no-verify"),
    "int8": ("--int8", "--no-verify"),
    "fp8": ("--fp8", "--no-verify"),
}
GIVEN = ("fp32", "fp16", "sized", "int8")  # what the runtime's tests need


def export(checkpoint: Path, output: Path, *options: str | Path) -> Path:
    """Export with the command; it compares the bundle with PyTorch, unless told not to, and has to succeed."""
    done = run_command("dit-export", checkpoint, *options, "-o", output)
    assert done.returncode == 0, done.stderr + done.stdout
    print(done.stdout)
    return output


def main(folder: Path, names: Sequence[str]) -> None:
    """Make ``checkpoint/tiny``, and NAME.bundle of each name, in ``folder``."""
    checkpoint = make_checkpoint(folder / "checkpoint" / "tiny")
    for name in names:
        export(checkpoint, folder / f"{name}.bundle", *TINY[name])


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:] or GIVEN)
