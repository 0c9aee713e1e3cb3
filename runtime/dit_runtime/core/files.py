"""Atomic writes: after an interruption there is either the old file or the new one, never half of one."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from dit_runtime.core.errors import OutputError


@contextlib.contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """A temporary sibling to write to; it becomes ``path`` when the block ends well, and is removed otherwise."""
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=path.suffix, dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror or error}); choose another --output") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def replace_folder(path: Path, option: str = "--output") -> Iterator[Path]:
    """A temporary sibling folder that becomes ``path`` (replacing an older one) when the block ends well.

    ``option`` is the command's that names the place, for the message.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        temporary.chmod(0o777 & ~_umask())
        yield temporary
        if path.exists():
            # rename(2) does not replace a folder that has content: move the old one aside first, and back on failure.
            aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.old.", dir=path.parent))
            path.replace(aside)
            try:
                temporary.replace(path)
            except BaseException:
                aside.replace(path)
                raise
            shutil.rmtree(aside, ignore_errors=True)
        else:
            temporary.replace(path)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror or error}); choose another {option}") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def check_writable(path: Path, option: str = "--output") -> None:
    """Say now, rather than after the work, that a file or folder cannot be written at ``path``.

    ``option`` is the command's that names the place, for the message.

    Raises:
        OutputError: the nearest existing folder above ``path`` is not a folder or not writable.
    """
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise OutputError(f"{path}: {parent} cannot be written to; choose another {option}")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
