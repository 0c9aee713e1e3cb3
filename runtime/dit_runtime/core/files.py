"""Atomic writes: after an interruption a file is the old one or the new one, never a part of one."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from dit_runtime.core.errors import OutputError
from dit_runtime.core.reading import FileError, kind_of, leads_outside, open_file


@contextlib.contextmanager
def replace_file(path: Path, within: Path | None = None) -> Iterator[Path]:
    """A temporary file beside ``path``: it replaces ``path`` when the block succeeds, and is removed otherwise.

    ``within`` is the store that the file belongs to, as ``check_place`` has it; None is a file that the user named.

    Raises:
        OutputError: the file cannot be written.
    """
    temporary = None
    if within is not None:
        check_place(path, within)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=path.suffix, dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        temporary.chmod(0o666 & ~_get_umask())
        temporary.replace(path)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror or error}); choose another --output") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def replace_folder(path: Path, option: str = "--output") -> Iterator[Path]:
    """A temporary folder beside ``path``: it replaces ``path`` when the block succeeds, and is removed otherwise.

    ``option`` is the command's option that names the folder, for the message.

    Raises:
        OutputError: the folder cannot be written.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        temporary.chmod(0o777 & ~_get_umask())
        yield temporary
        if path.exists():
            # rename(2) does not replace a folder with content: the old one goes aside first, and back after a failure.
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
    """Say before the work that a file or folder cannot be written at ``path``.

    ``option`` is the command's option that names the path, for the message.

    Raises:
        OutputError: the nearest path above that exists is not a folder, or cannot be written to.
    """
    parent = next(folder for folder in path.absolute().parents if kind_of(folder))
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise OutputError(f"{path}: {parent} cannot be written to; choose another {option}")


def named(path: Path) -> Path:
    """A path whose last part is a name: ``.`` and ``..`` are followed. A link keeps its own name.

    A hub cache's files are links to files that are named by a hash.
    """
    return path.resolve() if path.name in ("", "..") else path


def check_place(path: Path, within: Path, option: str = "--store") -> None:
    """Check where a file of a store is written: whoever made the store must not choose another place for it.

    ``option`` is the command's option that names the store, for the message.

    Raises:
        OutputError: a link leads out of the store, or a link, a pipe, a device or a folder is there.
    """
    try:
        plain = stat.S_ISREG(path.lstat().st_mode)
    except OSError:
        plain = True  # nothing is there
    if not plain or leads_outside(within, path):
        raise OutputError(
            f"{path.parent}: cannot be written ({path.name} is a link or no plain file); choose another {option}"
        )


def add_name(file: Path, name: Path) -> None:
    """Give what a link leads to another name: a hard link, or a copy where there can be none.

    Raises:
        OSError: ``name`` cannot be written.
    """
    source = file.resolve()
    if name.is_file() and not name.is_symlink() and (name.samefile(source) or sha256_of(name) == sha256_of(source)):
        return
    name.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{name.name}.", dir=name.parent) as folder:
        temporary = Path(folder) / name.name
        try:
            os.link(source, temporary)
        except OSError:  # another file system, one without hard links, or a file of another user
            shutil.copyfile(source, temporary)
        temporary.replace(name)


def _get_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def sha256_of(path: Path, limit_bytes: int | None = None, within: Path | None = None) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal. The file is opened as ``open_file`` does.

    Raises:
        FileError: the file cannot be opened or read.
    """
    digest = hashlib.sha256()
    try:
        with open_file(path, limit_bytes, within) as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise FileError(f"cannot be read ({error.strerror or error})") from error
    return digest.hexdigest()
