"""What ``serve run dit_serve.ray_serve:app KEY=VALUE …`` is asked for, before anything is opened."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dit_runtime.core.decode import show
from dit_runtime.core.errors import SamplingError

MOST = 1_000_000


@dataclass(frozen=True)
class RayArguments:
    """How a bundle is served on a Ray cluster.

    Attributes:
        bundle: its folder, under the same path on every node.
        replicas: engines, each with a device and a batch of its own; the least of them where ``max_replicas`` is given.
        max_replicas: most engines, as many as are needed; None keeps ``replicas``.
        gpus: of each engine: 1, or 0 for an engine on the CPU.
        cpus: of each engine; on the CPU also its threads, unless ``threads`` says otherwise.
        ingress: processes that answer HTTP, check requests and send images to engines.
        batch_size: most images in the batch of an engine.
        max_queue: most images that wait at one ingress.
        timeout: seconds for a request that names none.
        token, hosts: as ``dit-serve`` takes them.
        tables: sampler tables.
        engine, precision, store, size, threads: as ``Pipeline`` and ``open_bundle`` take them.
    """

    bundle: Path
    replicas: int = 1
    max_replicas: int | None = None
    gpus: int = 0
    cpus: int = 1
    ingress: int = 1
    batch_size: int = 8
    max_queue: int = 64
    timeout: float = 300.0
    token: str | None = None
    hosts: tuple[str, ...] = ()
    tables: tuple[Path, ...] = ()
    engine: str = "auto"
    precision: str | None = None
    store: Path | None = None
    size: tuple[int, int] | None = None
    threads: int = 0


def read_arguments(given: Mapping[str, Any]) -> RayArguments:
    """The arguments, whose values are text on a command line and may be numbers in a file of Serve's.

    Raises:
        SamplingError: a key is unknown, or a value is not what it should be.
    """
    if unknown := [key for key in given if key not in READERS]:
        raise SamplingError(f"{str(unknown[0])!r:.80}: unknown; expected {', '.join(READERS)}")
    if "bundle" not in given:
        raise SamplingError("expected bundle=FOLDER, that of a bundle that dit-export wrote")
    values: dict[str, Any] = {}
    for key, value in given.items():
        if value is None:  # as a file of Serve's may say
            continue
        try:
            values[key] = READERS[key](value)
        except (ValueError, TypeError) as error:
            raise SamplingError(f"{key}={show(value)}: expected {EXPECTED.get(key, 'text')}") from error
    found = RayArguments(**values)
    if found.max_replicas is not None and found.max_replicas < found.replicas:
        raise SamplingError(f"max_replicas={found.max_replicas}: expected at least replicas={found.replicas}")
    return found


def _whole(least: int) -> Callable[[Any], int]:
    def read(value: Any) -> int:
        number = int(str(value))
        if not least <= number <= MOST:
            raise ValueError
        return number

    return read


def _seconds(value: Any) -> float:
    seconds = float(value)
    if not 0 < seconds <= 86400:
        raise ValueError
    return seconds


def _size(value: Any) -> tuple[int, int]:
    height, width = (int(part) for part in str(value).lower().split("x"))
    return height, width


def _path(value: Any) -> Path:
    """Workers have another current folder."""
    return Path(value).absolute()


def _texts(value: Any) -> tuple[str, ...]:
    return tuple(str(value).split(",")) if isinstance(value, str) else tuple(map(str, value))


READERS: dict[str, Callable[[Any], Any]] = {
    "bundle": _path,
    "replicas": _whole(1),
    "max_replicas": _whole(1),
    "gpus": _whole(0),
    "cpus": _whole(1),
    "ingress": _whole(1),
    "batch_size": _whole(1),
    "max_queue": _whole(1),
    "timeout": _seconds,
    "token": str,
    "hosts": _texts,
    "tables": lambda value: tuple(map(_path, _texts(value))),
    "engine": str,
    "precision": str,
    "store": _path,
    "size": _size,
    "threads": _whole(0),
}
EXPECTED = {
    **dict.fromkeys(
        ("replicas", "max_replicas", "cpus", "ingress", "batch_size", "max_queue"), "a whole number from 1"
    ),
    **dict.fromkeys(("gpus", "threads"), "a whole number from 0"),
    **dict.fromkeys(("bundle", "store"), "a path"),
    "timeout": "seconds above 0 and at most 86400",
    "size": "HEIGHTxWIDTH in pixels, such as 256x384",
    "tables": "paths with commas between them",
    "hosts": "names with commas between them",
}
