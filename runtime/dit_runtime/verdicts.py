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
from dit_runtime.engines import TENSORRT, Engine, engine_for
from dit_runtime.errors import EngineError, OutputError, ParityError
from dit_runtime.files import replaced_file
from dit_runtime.ladder import Rung, Verification, format_table
from dit_runtime.store import stored_engines
from dit_runtime.verify import verification_of, verified

VERDICTS = "verdicts"


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
    return bundle.path / ENGINES / VERDICTS / f"{hashlib.sha256(identity.encode()).hexdigest()[:16]}.json"


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


def verifications(
    bundle: Bundle, sizes: Sequence[tuple[int, int]], opened: Callable[[Bundle], Engine], quick: bool = False
) -> list[Verification]:
    """Verify a bundle at picture sizes, each with an engine of its own, and store the verdicts."""
    found = []
    for height, width in sizes:
        at = bundle.at((height, width))
        engine = opened(at)
        verification = verification_of(at, engine, quick)
        store_verdict(at, engine, list(verification.rungs), quick)
        found.append(verification)
    return found


def joined_rungs(found: Sequence[Verification]) -> list[Rung]:
    """All rungs; of several sizes each says its own."""
    if len(found) == 1:
        return list(found[0].rungs)
    sizes = [f"{height}x{width} " for height, width in (each.image_size for each in found)]
    return [
        replace(rung, name=size + rung.name) for size, each in zip(sizes, found, strict=True) for rung in each.rungs
    ]


def verified_sizes(
    bundle: Bundle, sizes: Sequence[tuple[int, int]], opened: Callable[[Bundle], Engine], quick: bool = False
) -> tuple[str, list[Rung]]:
    """The engine's name and all rungs of ``verifications``."""
    found = verifications(bundle, sizes, opened, quick)
    return found[-1].engine, joined_rungs(found)


def stored_verdict(bundle: Bundle, engine: Engine, full: bool = False) -> bool | None:
    """Whether the engine passed here before; None when it was never tried, or with ``full`` never by all rungs."""
    try:
        verdict = json.loads(verdict_path(bundle, engine).read_text())
        if verdict["bundle"] != bundle.digest or verdict["engine"] != engine.name:
            return None
        return None if full and verdict["quick"] else bool(verdict["passed"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def stored_verdicts(bundle: Bundle) -> list[dict[str, Any]]:
    """The verdicts on this bundle of this machine and others, the last first."""
    found = []
    for path in sorted((bundle.path / ENGINES / VERDICTS).glob("*.json")):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            verdict = json.loads(path.read_text())
            if verdict["bundle"] == bundle.digest:
                failed = [rung["name"] for rung in verdict["rungs"] if not rung["passed"]]
                keys = ("engine", "image_size", "machine", "time", "quick", "passed")
                found.append({**{key: verdict[key] for key in keys}, "failed": failed})
    return sorted(found, key=lambda verdict: str(verdict["time"]), reverse=True)


def trusted_engine(bundle: Bundle, threads: int = 0, name: str = "auto", precision: str | None = None) -> Engine:
    """An engine with a passing verdict here; without a verdict the quick verify runs first.

    ``auto`` is TensorRT where ``dit-build`` made an engine that runs on the GPU here, else ONNX Runtime on the CPU; why
    an engine that was built is not taken is said on stderr.

    Raises:
        ParityError: the engine does not match the reference.
        EngineError: no engine is installed.
    """
    engine = _built_engine(bundle, threads) if name == "auto" else None
    engine = engine or engine_for(bundle, name, threads, precision)
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


def _built_engine(bundle: Bundle, threads: int) -> Engine | None:
    """The TensorRT engine of this bundle that can run here, if there is one."""
    built = {stored.library for stored in stored_engines(bundle)}
    for name, library in TENSORRT.items():
        if library in built:
            try:
                return engine_for(bundle, name, threads)
            except EngineError as error:
                print(f"{name} is not used: {error}", file=sys.stderr)
    return None
