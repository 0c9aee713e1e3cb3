"""Import PyTorch and diffusers without what they do besides."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path

from dit_runtime.core.libraries import switch_telemetry_off, without_module


def import_libraries() -> None:
    """Import PyTorch and diffusers, for a process of our own: they start no program and open no socket.

    PyTorch imports NVIDIA's bindings if they are installed, and these start ``ldconfig``. Nothing here needs them from
    PyTorch. diffusers imports requests, which opens a socket to see whether there is IPv6. The hub's client does not
    use it.

    Raises:
        OSError: the current folder does not exist any more.
    """
    switch_telemetry_off()
    Path.cwd()  # without a current folder, MKL would end the process, and say nothing of use
    with without_module("cuda.bindings"), _without_ipv6():
        import diffusers  # noqa: F401  # it imports PyTorch


@contextlib.contextmanager
def _without_ipv6() -> Iterator[None]:
    before, socket.has_ipv6 = socket.has_ipv6, False
    try:
        yield
    finally:
        socket.has_ipv6 = before
