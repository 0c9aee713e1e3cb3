"""Which engines have matched the reference, with this bundle, on this machine.

Verdicts live in ``BUNDLE/engines/verdicts``, outside the bundle's digest. In a read-only bundle nothing is stored and
each process verifies anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from dit_runtime.bundle import ENGINES, Bundle
from dit_runtime.engines import Engine, open_engine
from dit_runtime.errors import OutputError, ParityError
from dit_runtime.files import replaced_file
from dit_runtime.verify import Rung, format_table, verified


def machine() -> dict[str, str]:
    """What a verdict is tied to besides bundle and engine."""
    processor = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                processor = line.partition(":")[2].strip()
                break
    return {"system": platform.system(), "architecture": platform.machine(), "processor": processor}


def verdict_path(bundle: Bundle, engine: Engine) -> Path:
    """Where the verdict on this bundle at its size, engine and machine is kept."""
    identity = json.dumps([bundle.digest, bundle.manifest.model.latent_size, engine.name, machine()], sort_keys=True)
    return bundle.path / ENGINES / "verdicts" / f"{hashlib.sha256(identity.encode()).hexdigest()[:16]}.json"


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
        "engine": engine.name,
        "machine": machine(),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "quick": quick,
        "passed": passed,
        "rungs": [rung.as_json() for rung in rungs],
    }
    with contextlib.suppress(OutputError), replaced_file(verdict_path(bundle, engine)) as file:
        file.write_text(json.dumps(verdict, indent=1) + "\n")


def verified_sizes(
    bundle: Bundle, sizes: Sequence[tuple[int, int]], opened: Callable[[Bundle], Engine], quick: bool = False
) -> tuple[str, list[Rung]]:
    """Verify a bundle at picture sizes, each with an engine of its own, and store the verdicts.

    Returns:
        The engine's name and all rungs; of several sizes each says its own.
    """
    rungs: list[Rung] = []
    for height, width in sizes:
        at = bundle.at((height, width))
        engine = opened(at)
        found = verified(at, engine, quick)
        store_verdict(at, engine, found, quick)
        label = f"{height}x{width} " if len(sizes) > 1 else ""
        rungs += [replace(rung, name=label + rung.name) for rung in found]
    return engine.name, rungs


def stored_verdict(bundle: Bundle, engine: Engine, full: bool = False) -> bool | None:
    """Whether the engine passed here before; None when it was never tried, or with ``full`` never by all rungs."""
    try:
        verdict = json.loads(verdict_path(bundle, engine).read_text())
        if verdict["bundle"] != bundle.digest or verdict["engine"] != engine.name:
            return None
        return None if full and verdict["quick"] else bool(verdict["passed"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def trusted_engine(bundle: Bundle, threads: int = 0) -> Engine:
    """``engine=auto``: an engine with a passing verdict here; without a verdict the quick verify runs first.

    Raises:
        ParityError: the engine does not match the reference.
        EngineError: no engine is installed.
    """
    engine = open_engine(bundle, threads=threads)
    passed = stored_verdict(bundle, engine)
    if passed is None:
        print(f"{engine.name}: first use of this bundle here, verifying it", file=sys.stderr)
        rungs = verified(bundle, engine, quick=True)
        store_verdict(bundle, engine, rungs, quick=True)
        passed = all(rung.passed for rung in rungs)
        if not passed:
            print(format_table(rungs), file=sys.stderr)
    if not passed:
        raise ParityError(
            f"{bundle.path}: {engine.name} does not match the PyTorch reference here; see dit-verify {bundle.path}, "
            "or name the engine (--engine onnxruntime) to use it all the same"
        )
    return engine
