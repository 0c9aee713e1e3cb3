"""The one way to open what is read: regular files only, no link out of their folder, and never more than a bound.

A bundle, a store or a file that an option names may come from elsewhere. A pipe would wait for its other end, a device
may have no end, and a link may lead to what nobody meant to give away. So a file is opened only when it is a regular
one of at most the bytes that its kind can have, and nothing of it is read before.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO, Literal

MIB, GIB = 1 << 20, 1 << 30
# The most bytes of each kind of file: far more than any of them has, and little enough to be held in memory. A graph,
# its weights and a golden record have the bytes that the manifest says.
MANIFEST_BYTES = 16 * MIB
VERDICT_BYTES = 16 * MIB
SIDECAR_BYTES = 16 * MIB
SPEEDS_BYTES = MIB
TABLE_BYTES = 16 * MIB  # 20,000 rows have 8
KEEP_LIST_BYTES = MIB
CONFIG_BYTES = 16 * MIB  # of a checkpoint's JSON files
RESULTS_BYTES = 256 * MIB  # images of 1024 pixels are a tenth of it
IMAGE_BYTES = 512 * MIB
NOISE_BYTES = 256 * MIB  # 4096 images of 512 pixels
TIMING_CACHE_BYTES = GIB
KERNELS_BYTES = GIB  # that TensorRT-RTX compiled on a GPU
GRAPH_BYTES = 512 * MIB  # of an ONNX file without its weights

HUB_REPOSITORIES = ("models--", "datasets--", "spaces--")  # how the folders of a hub cache's repositories begin

_FLAGS = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC


class FileError(ValueError):
    """A file cannot be read. The message is one line, without the file's name."""


def open_file(path: str | Path, limit_bytes: int | None, within: Path | None = None) -> BinaryIO:
    """Open a regular file to read it from its start.

    Args:
        path: of the file. What is not a regular file, as a pipe, a device or a folder, is refused and never waited for;
            nor is one of /proc or /sys, which have no size, and some of which wait.
        limit_bytes: the most bytes that the file may have; None is a file that is read in pieces, whatever its size.
        within: a folder that no link may lead out of: the bundle, the store or the checkpoint that the file belongs to.
            None is a file that the user named, which may be a link to anywhere.

    Raises:
        FileError: the file is missing, larger, not a regular file, or a link out of ``within``.
    """
    try:
        real = path if within is None else _path_inside(path, within)
        if not stat.S_ISREG(Path(real).stat().st_mode):  # to open a device can do something already
            raise FileError("not a regular file")
        handle = os.open(real, _FLAGS if within is None else _FLAGS | os.O_NOFOLLOW)
        try:
            found = os.fstat(handle)
            if not stat.S_ISREG(found.st_mode):
                raise FileError("not a regular file")
            if limit_bytes is not None and found.st_size > limit_bytes:
                raise FileError(f"{found.st_size} bytes, larger than {limit_bytes} bytes")
            if not found.st_size and os.pread(handle, 1, 0):
                raise FileError("a file that the system makes up while it is read, expected one that is stored")
            return os.fdopen(handle, "rb")
        except BaseException:
            os.close(handle)
            raise
    except OSError as error:
        raise FileError(f"cannot be read ({error.strerror or error})") from error
    except FileError:
        raise
    except ValueError as error:  # a NUL or half a surrogate pair in a name
        raise FileError(f"cannot be read (no file can have this name: {error})") from error


def read_file(path: str | Path, limit_bytes: int, within: Path | None = None) -> bytes:
    """The content of a regular file of at most ``limit_bytes``. Arguments and errors are those of ``open_file``."""
    try:
        with open_file(path, limit_bytes, within) as file:
            expected = os.fstat(file.fileno()).st_size
            content = file.read(expected + 1)  # Python makes room for as many bytes as are asked for
            if len(content) > expected:  # it grows
                content += file.read(limit_bytes + 1 - len(content))
    except OSError as error:
        raise FileError(f"cannot be read ({error.strerror or error})") from error
    if len(content) > limit_bytes:
        raise FileError(f"larger than {limit_bytes} bytes")
    return content


def check_file(path: str | Path, limit_bytes: int | None, within: Path | None = None) -> None:
    """Check a file that a library opens by its name. Arguments and errors are those of ``open_file``."""
    open_file(path, limit_bytes, within).close()


def kind_of(path: Path) -> Literal["file", "folder", "other"] | None:
    """What a path names, once links are followed; None where nothing is, or no file can have such a name.

    What is in a folder that may not be searched is ``other``: whoever reads it says so.
    """
    try:
        mode = path.stat().st_mode
    except PermissionError:
        return "other"
    except (OSError, ValueError):  # Path.exists raises some of them
        return None
    return "file" if stat.S_ISREG(mode) else "folder" if stat.S_ISDIR(mode) else "other"


def leads_outside(folder: Path, path: Path) -> bool:
    """Whether a path in a folder is, once its links are followed, anywhere but in that folder.

    The snapshots of a Hugging Face hub cache hold links: ``models--OWNER--NAME/snapshots/COMMIT/FILE`` leads to
    ``models--OWNER--NAME/blobs/HASH``. The blobs of a folder's own repository count as inside the folder; those of
    another repository do not. A path that cannot be followed, such as a link to itself, leads outside.
    """
    try:
        inside, target = folder.resolve(), path.resolve()
    except (OSError, RuntimeError, ValueError):
        return True
    if target.is_relative_to(inside):
        return target.is_symlink()  # only a link in a circle still is one
    for snapshot in (inside, *inside.parents):
        repository = snapshot.parent.parent
        if snapshot.parent.name == "snapshots" and repository.name.startswith(HUB_REPOSITORIES):
            return target.parent != repository / "blobs"
    return True


def _path_inside(path: str | Path, within: Path) -> str:
    """The path without links. Raises FileError where it leads out of ``within``, OSError where there is no file."""
    real = os.path.realpath(path, strict=True)
    if leads_outside(within, Path(real)):
        raise FileError(f"a link out of {within}")
    return real
