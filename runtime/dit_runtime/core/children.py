"""Children: how a module of ours is started in an interpreter of its own."""

from __future__ import annotations

import os
import sys
from pathlib import Path

PACKAGES = ("dit_runtime", "dit_engines", "dit_export")


def command_of_module(module: str, *arguments: str) -> list[str]:
    """The command that runs ``module`` as ``__main__`` in a fresh interpreter, with this process's ``sys.path``.

    ``python -m`` would look for every module in the current folder first, which may be a bundle of somebody else's. The
    child does not look there, unless our own packages were imported from there: a checkout may be the current folder.
    """
    code = (
        f"import sys; sys.path[:] = {_find_import_path()!a}; import runpy; "
        f"runpy.run_module({module!a}, run_name='__main__', alter_sys=True)"
    )
    return [sys.executable, "-c", code, *arguments]


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
