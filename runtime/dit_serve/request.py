"""What a server is asked for, before anything is opened."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

PORT = 7860


@dataclass(frozen=True)
class ServeRequest:
    """How to serve bundles.

    Attributes:
        bundles: their folders; the first is the default of a request.
        host, port: where to listen; port 0 is one that the system chooses.
        hosts: names under which others ask, beside the local ones and ``host``; ``*`` allows all.
        token: what callers must send as ``Authorization: Bearer TOKEN``; None asks for none.
        batch_size: most images in a running batch.
        most_waiting: most images in a queue.
        tables: files of sampler tables, which requests name by the file's name without its ending.
        timeout: seconds for a request that names none.
        sizes: height and width of images, of each bundle; none is the bundle's first. The first is a request's default.
        engine, precision, store, threads: as ``Pipeline`` and ``open_bundle`` take them.
    """

    bundles: tuple[Path, ...]
    host: str = "127.0.0.1"
    port: int = PORT
    hosts: tuple[str, ...] = ()
    token: str | None = None
    batch_size: int = 8
    most_waiting: int = 64
    tables: tuple[Path, ...] = ()
    timeout: float = 300.0
    engine: str = "auto"
    precision: str | None = None
    store: Path | None = None
    sizes: tuple[tuple[int, int], ...] = ()
    threads: int = 0
