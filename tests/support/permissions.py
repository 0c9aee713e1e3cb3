"""Files that may not be read, for a test that runs as root, who may read all."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# linux/capability.h: version 3 has two 32-bit words of each set.
_VERSION = 0x20080522
_READ_ALL = 1 << 1 | 1 << 2  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH


class _Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _Sets(ctypes.Structure):
    _fields_ = (("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32))


@contextlib.contextmanager
def as_anybody() -> Iterator[None]:
    """This thread is bound by the modes of files, as any user is; skips the test where that cannot be had."""
    if os.geteuid() != 0:
        yield
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header, sets = _Header(_VERSION, 0), (_Sets * 2)()
    if libc.capget(ctypes.byref(header), sets):
        pytest.skip("this system has no capabilities")
    before = sets[0].effective
    sets[0].effective = before & ~_READ_ALL
    assert libc.capset(ctypes.byref(header), sets) == 0
    try:
        yield
    finally:
        sets[0].effective = before
        assert libc.capset(ctypes.byref(header), sets) == 0


@contextlib.contextmanager
def unreadable(path: Path) -> Iterator[None]:
    """A file or folder of mode 0, which this thread may not read."""
    mode = path.stat().st_mode
    path.chmod(0)
    try:
        with as_anybody():
            with pytest.raises(PermissionError):
                os.listdir(path) if path.is_dir() else path.open("rb")  # noqa: PTH208
            yield
    finally:
        path.chmod(mode)
