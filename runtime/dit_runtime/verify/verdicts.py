"""Which engines have matched the reference, with this bundle, on this machine.

Verdicts live in ``verdicts`` of the bundle's store, beside the engines and outside the bundle's digest. Where that
cannot be written nothing is stored and each process verifies anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from dit_runtime.backends.base import Engine
from dit_runtime.bundle.reader import Bundle
from dit_runtime.core.errors import OutputError
from dit_runtime.core.files import replace_file
from dit_runtime.core.machine import machine
from dit_runtime.core.version import __version__
from dit_runtime.verify.rung import Rung, Verification
from dit_runtime.verify.verification import verification_of

VERDICTS = "verdicts"


def verdict_path(bundle: Bundle, engine: Engine) -> Path:
    """Where the verdict on this bundle at its size, engine and machine is kept.

    An engine's ``identity`` says what its name does not: the very plans, the driver, how a graph was rearranged.
    """
    own = engine.info.identity
    facts = [bundle.digest, bundle.manifest.model.latent_size, own, __version__, machine()]
    identity = json.dumps(facts, sort_keys=True)
    return bundle.engines / VERDICTS / f"{hashlib.sha256(identity.encode()).hexdigest()[:16]}.json"


def store_verdict(bundle: Bundle, engine: Engine, rungs: list[Rung], quick: bool) -> None:
    """Write the verdict; without effect where the bundle cannot be written.

    A quick verdict that passes does not take the place of a full one, which knows more.
    """
    passed = all(rung.passed for rung in rungs)
    if quick and passed and stored_verdict(bundle, engine, full=True) is not None:
        return
    verdict: dict[str, Any] = {
        "bundle": bundle.digest,
        "image_size": bundle.manifest.image_size,
        "engine": engine.info.name,
        "machine": machine(),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "quick": quick,
        "passed": passed,
        "rungs": [rung.as_json() for rung in rungs],
    }
    with contextlib.suppress(OutputError), replace_file(verdict_path(bundle, engine)) as file:
        file.write_text(json.dumps(verdict, indent=1) + "\n")


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


def stored_verdict(bundle: Bundle, engine: Engine, full: bool = False) -> bool | None:
    """Whether the engine passed here before; None when it was never tried, or with ``full`` never by all rungs."""
    try:
        verdict = json.loads(verdict_path(bundle, engine).read_text())
        if verdict["bundle"] != bundle.digest or verdict["engine"] != engine.info.name:
            return None
        return None if full and verdict["quick"] else bool(verdict["passed"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def stored_verdicts(bundle: Bundle) -> list[dict[str, Any]]:
    """The verdicts on this bundle of this machine and others, the last first."""
    found = []
    for path in sorted((bundle.engines / VERDICTS).glob("*.json")):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            verdict = json.loads(path.read_text())
            if verdict["bundle"] == bundle.digest:
                failed = [rung["name"] for rung in verdict["rungs"] if not rung["passed"]]
                keys = ("engine", "image_size", "machine", "time", "quick", "passed")
                found.append({**{key: verdict[key] for key in keys}, "failed": failed})
    return sorted(found, key=lambda verdict: str(verdict["time"]), reverse=True)
