"""Store and read verdicts: whether an engine has matched the reference, with a bundle, on a machine.

Verdicts are in the folder ``verdicts`` of the engine store, outside the bundle's digest. Where the store cannot be
written, each process verifies again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Literal

from dit_runtime.backends.base import Engine
from dit_runtime.backends.profiles import BatchShape
from dit_runtime.bundle.reader import Bundle
from dit_runtime.core.decode import DecodeError, Positive, decode, read_json
from dit_runtime.core.errors import OutputError
from dit_runtime.core.machine import describe_machine
from dit_runtime.core.reading import VERDICT_BYTES
from dit_runtime.core.replace import check_place, clear_litter, hold_lock, replace_file
from dit_runtime.core.version import __version__
from dit_runtime.verify.coverage import Shapes
from dit_runtime.verify.rung import Rung, Verification
from dit_runtime.verify.verification import verification_of

VERDICTS = "verdicts"

Number = float | Literal["nan", "inf", "-inf"]  # JSON has only finite numbers


@dataclass(frozen=True)
class RungRecord:
    """A rung as ``Rung.as_json`` returns it."""

    name: str
    value: Number
    limit: Number
    unit: str
    detail: str
    ratio: Number | None
    threshold: Number | None
    first_over: str | None
    metrics: dict[str, Number]
    axis: str
    series: dict[str, tuple[Number, ...]]
    used: Number
    passed: bool


@dataclass(frozen=True)
class Verdict:
    """The content of a verdict's file.

    Attributes:
        bundle: the bundle's digest.
        image_size: height and width of an image in pixels.
        engine: the engine's name.
        machine: where the engine was verified, from ``describe_machine``.
        time: of the verification, in ISO 8601, UTC.
        quick: whether only the rungs of the quick verification were measured.
        passed: whether every rung passed.
        rungs: the measured rungs.
        shapes: the shapes at which each graph ran, as ``Coverage.shapes``.
    """

    bundle: str
    image_size: tuple[Positive, Positive]
    engine: str
    machine: dict[str, str]
    time: str
    quick: bool
    passed: bool
    rungs: tuple[RungRecord, ...]
    shapes: dict[str, tuple[tuple[Positive, Positive], ...]]

    @property
    def failed(self) -> tuple[str, ...]:
        """The names of the rungs that did not pass."""
        return tuple(rung.name for rung in self.rungs if not rung.passed)


def path_of_verdict(bundle: Bundle, engine: Engine) -> Path:
    """The file of the verdict on a bundle at its size in use, an engine and this machine.

    The file's name is a hash. It covers the engine's ``identity``, which changes with the plans, the driver and the
    arrangement of a graph.
    """
    facts = [
        bundle.digest,
        bundle.manifest.model.latent_size,
        engine.info.identity,
        __version__,
        describe_machine(),
    ]
    identity = json.dumps(facts, sort_keys=True)
    return bundle.engines / VERDICTS / f"{hashlib.sha256(identity.encode()).hexdigest()[:16]}.json"


def store_verdict(bundle: Bundle, engine: Engine, rungs: list[Rung], quick: bool, shapes: Shapes | None = None) -> None:
    """Write a verdict, unless the store cannot be written, or has a stronger one that another process may have written.

    Any verdict that fails is written. A quick one that passes replaces only another such one: a full one has more
    rungs, and a fault that was found is not gone where fewer rungs are measured. ``shapes`` are those that were
    visited.
    """
    clear_litter(bundle.engines / VERDICTS)
    passed = all(rung.passed for rung in rungs)
    verdict = Verdict(
        bundle=bundle.digest,
        image_size=bundle.manifest.image_size,
        engine=engine.info.name,
        machine=describe_machine(),
        time=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        quick=quick,
        passed=passed,
        rungs=tuple(RungRecord(**rung.as_json()) for rung in rungs),
        shapes={graph: tuple(visited) for graph, visited in (shapes or {}).items()},
    )
    with _held(bundle, engine):
        before = read_verdict(bundle, engine)
        if not (quick and passed and before is not None and not (before.quick and before.passed)):
            _write(bundle, engine, verdict)


def add_shape(bundle: Bundle, engine: Engine, graph: str, shape: BatchShape) -> None:
    """Add a visited shape to the stored verdict, if there is one."""
    with _held(bundle, engine):
        verdict = read_verdict(bundle, engine)
        if verdict is not None:
            visited = (*verdict.shapes.get(graph, ()), shape)
            _write(bundle, engine, replace(verdict, shapes={**verdict.shapes, graph: visited}))


@contextlib.contextmanager
def _held(bundle: Bundle, engine: Engine) -> Iterator[None]:
    """No other process changes the verdict meanwhile. Where the store has no locks, as on a full disk, that is left."""
    path = path_of_verdict(bundle, engine)
    lock = path.with_name(f".{path.stem}.lock")
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError, OutputError):
            check_place(lock, within=bundle.engines)
            lock.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(hold_lock(lock))
        yield


def _write(bundle: Bundle, engine: Engine, verdict: Verdict) -> None:
    with contextlib.suppress(OutputError), replace_file(path_of_verdict(bundle, engine), bundle.engines) as file:
        file.write_text(json.dumps(asdict(verdict), indent=1, allow_nan=False) + "\n")


def verify_each_size(
    bundle: Bundle, sizes: Sequence[tuple[int, int]], open_at: Callable[[Bundle], Engine], quick: bool = False
) -> list[Verification]:
    """Verify a bundle at several image sizes, and store the verdicts.

    Args:
        bundle: at its first size.
        sizes: heights and widths in pixels.
        open_at: opens an engine for the bundle at one size.
        quick: whether to measure only the rungs of the quick verification.

    Returns:
        The verification at each size.
    """

    def verify_at(size: tuple[int, int]) -> Verification:
        at = bundle.at(size)
        engine = open_at(at)
        try:
            found = verification_of(at, engine, quick)
        finally:
            engine.close()  # engines of two sizes need not fit at once
        store_verdict(at, engine, list(found.rungs), quick, found.coverage.shapes)
        return found

    return [verify_at(size) for size in sizes]


def join_rungs(found: Sequence[Verification]) -> list[Rung]:
    """All rungs of several verifications. With more than one size, each rung's name begins with its size."""
    if len(found) == 1:
        return list(found[0].rungs)
    sizes = [f"{height}x{width} " for height, width in (each.image_size for each in found)]
    return [
        replace(rung, name=size + rung.name) for size, each in zip(sizes, found, strict=True) for rung in each.rungs
    ]


def has_passed(bundle: Bundle, engine: Engine, full: bool = False) -> bool | None:
    """Whether an engine passed an earlier verification on this machine.

    Args:
        bundle: at the size in use.
        engine: whose verdict is read.
        full: whether to ignore a verdict of the quick verification.

    Returns:
        None where there is no verdict.
    """
    verdict = read_verdict(bundle, engine)
    if verdict is None:
        return None
    return None if full and verdict.quick else verdict.passed


def read_verdict(bundle: Bundle, engine: Engine) -> Verdict | None:
    """Read the verdict on an engine on this machine; None where there is none."""
    verdict = _read(path_of_verdict(bundle, engine), bundle.engines)
    if verdict is None or (verdict.bundle, verdict.engine) != (bundle.digest, engine.info.name):
        return None
    return verdict


def read_verdicts(bundle: Bundle) -> list[Verdict]:
    """Read all verdicts on a bundle, of this machine and others, the latest first."""
    paths = sorted((bundle.engines / VERDICTS).glob("[!.]*.json"))  # a temporary file's name begins with a dot
    read = [_read(path, bundle.engines) for path in paths]
    found = [verdict for verdict in read if verdict is not None and verdict.bundle == bundle.digest]
    return sorted(found, key=lambda verdict: verdict.time, reverse=True)


def _read(path: Path, store: Path) -> Verdict | None:
    try:
        return decode(Verdict, read_json(path, VERDICT_BYTES, within=store))
    except DecodeError:
        return None
