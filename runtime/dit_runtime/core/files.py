"""Names and hashes of files."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

from dit_runtime.core.reading import FileError, open_file
from dit_runtime.core.replace import scratch_folder


def named(path: Path) -> Path:
    """A path whose last part is a name: ``.`` and ``..`` are followed. A link keeps its own name.

    A hub cache's files are links to files that are named by a hash.
    """
    return path.resolve() if path.name in ("", "..") else path


def add_name(file: Path, name: Path) -> None:
    """Give what a link leads to another name: a hard link, or a copy where there can be none.

    Raises:
        OSError: ``name`` cannot be written.
    """
    source = file.resolve()
    if name.is_file() and not name.is_symlink() and (name.samefile(source) or sha256_of(name) == sha256_of(source)):
        return
    name.parent.mkdir(parents=True, exist_ok=True)
    with scratch_folder(name.parent, name.name) as folder:
        temporary = folder / name.name
        try:
            os.link(source, temporary)
        except OSError:  # another file system, one without hard links, or a file of another user
            shutil.copyfile(source, temporary)
        temporary.replace(name)


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
