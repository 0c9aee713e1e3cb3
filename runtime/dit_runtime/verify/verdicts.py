"""Which engines have matched the reference, with this bundle, on this machine.

Verdicts live in ``verdicts`` of the bundle's store, beside the engines and outside the bundle's digest. Where that
cannot be written nothing is stored and each process verifies anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Literal

from dit_runtime.backends.base import Engine
from dit_runtime.bundle.reader import Bundle
from dit_runtime.core.decode import DecodeError, Positive, decode, read_json
from dit_runtime.core.errors import OutputError
from dit_runtime.core.files import replace_file
from dit_runtime.core.machine import describe_machine
from dit_runtime.core.version import __version__
from dit_runtime.verify.rung import Rung, Verification
from dit_runtime.verify.verification import verification_of

VERDICTS = "verdicts"
VERDICT_LIMIT = 16 << 20  # bytes: far above any, and little to read

Number = float | Literal["nan", "inf", "-inf"]  # JSON has no numbers that are not finite


@dataclass(frozen=True)
class RungRecord:
    """A rung as ``Rung.as_json`` gives it."""

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
    """A verdict as its file has it: on which bundle at which size, of which engine, where, when, and rung by rung."""

    bundle: str
    image_size: tuple[Positive, Positive]
    engine: str
    machine: dict[str, str]
    time: str
    quick: bool
    passed: bool
    rungs: tuple[RungRecord, ...]

    @property
    def failed(self) -> tuple[str, ...]:
        """The names of the rungs that did not pass."""
        return tuple(rung.name for rung in self.rungs if not rung.passed)


def path_of_verdict(bundle: Bundle, engine: Engine) -> Path:
    """Where the verdict on this bundle at its size, engine and machine is kept.

    An engine's ``identity`` says what its name does not: the very plans, the driver, how a graph was rearranged.
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


def store_verdict(bundle: Bundle, engine: Engine, rungs: list[Rung], quick: bool) -> None:
    """Write the verdict; without effect where the bundle cannot be written.

    A quick verdict that passes does not take the place of a full one, which knows more.
    """
    passed = all(rung.passed for rung in rungs)
    if quick and passed and has_passed(bundle, engine, full=True) is not None:
        return
    verdict = Verdict(
        bundle=bundle.digest,
        image_size=bundle.manifest.image_size,
        engine=engine.info.name,
        machine=describe_machine(),
        time=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        quick=quick,
        passed=passed,
        rungs=tuple(RungRecord(**rung.as_json()) for rung in rungs),
    )
    with contextlib.suppress(OutputError), replace_file(path_of_verdict(bundle, engine)) as file:
        file.write_text(json.dumps(asdict(verdict), indent=1, allow_nan=False) + "\n")


def verify_each_size(
    bundle: Bundle, sizes: Sequence[tuple[int, int]], opened: Callable[[Bundle], Engine], quick: bool = False
) -> list[Verification]:
    """Verify a bundle at image sizes, each with an engine of its own, and store the verdicts."""

    def verification(size: tuple[int, int]) -> Verification:
        at = bundle.at(size)
        engine = opened(at)  # gone when this returns: two sizes need not fit at once
        found = verification_of(at, engine, quick)
        store_verdict(at, engine, list(found.rungs), quick)
        return found

    return [verification(size) for size in sizes]


def join_rungs(found: Sequence[Verification]) -> list[Rung]:
    """All rungs; of several sizes each says its own."""
    if len(found) == 1:
        return list(found[0].rungs)
    sizes = [f"{height}x{width} " for height, width in (each.image_size for each in found)]
    return [
        replace(rung, name=size + rung.name) for size, each in zip(sizes, found, strict=True) for rung in each.rungs
    ]


def verify_sizes(
    bundle: Bundle, sizes: Sequence[tuple[int, int]], opened: Callable[[Bundle], Engine], quick: bool = False
) -> tuple[str, list[Rung]]:
    """The engine's name and all rungs of ``verify_each_size``."""
    found = verify_each_size(bundle, sizes, opened, quick)
    return found[-1].engine, join_rungs(found)


def has_passed(bundle: Bundle, engine: Engine, full: bool = False) -> bool | None:
    """Whether the engine passed here before; None when it was never tried, or with ``full`` never by all rungs."""
    verdict = _read(path_of_verdict(bundle, engine))
    if verdict is None or (verdict.bundle, verdict.engine) != (bundle.digest, engine.info.name):
        return None
    return None if full and verdict.quick else verdict.passed


def read_verdicts(bundle: Bundle) -> list[Verdict]:
    """The verdicts on this bundle of this machine and others, the last first."""
    read = [_read(path) for path in sorted((bundle.engines / VERDICTS).glob("*.json"))]
    found = [verdict for verdict in read if verdict is not None and verdict.bundle == bundle.digest]
    return sorted(found, key=lambda verdict: verdict.time, reverse=True)


def _read(path: Path) -> Verdict | None:
    try:
        return decode(Verdict, read_json(path, VERDICT_LIMIT))
    except DecodeError:
        return None
