"""Which engines have matched the reference, with this bundle, on this machine.

Verdicts live in ``verdicts`` of the bundle's store, beside the engines and outside the bundle's digest. Where that
cannot be written nothing is stored and each process verifies anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from dit_runtime.bundle import Bundle
from dit_runtime.choice import Speed, fastest_first
from dit_runtime.cpu import machine
from dit_runtime.engines import TENSORRT, Engine, engine_for
from dit_runtime.errors import EngineError, OutputError, ParityError
from dit_runtime.files import replaced_file
from dit_runtime.ladder import Rung, Verification, format_table
from dit_runtime.store import stored_engines
from dit_runtime.verify import verification_of, verified

VERDICTS = "verdicts"


def verdict_path(bundle: Bundle, engine: Engine) -> Path:
    """Where the verdict on this bundle at its size, engine and machine is kept.

    An engine's ``identity`` says what its name does not: the very plans, the driver, how a graph was rearranged.
    """
    from dit_runtime import __version__  # the package imports this module

    own = getattr(engine, "identity", engine.name)
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

    def verification(size: tuple[int, int]) -> Verification:
        at = bundle.at(size)
        engine = opened(at)  # gone when this returns: two sizes need not fit at once
        found = verification_of(at, engine, quick)
        store_verdict(at, engine, list(found.rungs), quick)
        return found

    return [verification(size) for size in sizes]


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
    for path in sorted((bundle.engines / VERDICTS).glob("*.json")):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            verdict = json.loads(path.read_text())
            if verdict["bundle"] == bundle.digest:
                failed = [rung["name"] for rung in verdict["rungs"] if not rung["passed"]]
                keys = ("engine", "image_size", "machine", "time", "quick", "passed")
                found.append({**{key: verdict[key] for key in keys}, "failed": failed})
    return sorted(found, key=lambda verdict: str(verdict["time"]), reverse=True)


def trusted_engine(bundle: Bundle, threads: int = 0, name: str = "auto", precision: str | None = None) -> Engine:
    """An engine with a passing verdict here; without a verdict the quick verify runs first.

    ``auto`` is TensorRT where ``dit-build`` made an engine that runs on the GPU here, else the fastest of the others
    (``dit_runtime.choice``); one that does not match the reference is passed over. Which, and why, is said on stderr
    when it is found out, and not again.

    Raises:
        ParityError: no engine, or not the one that was named, matches the reference.
        EngineError: no engine is installed.
    """
    check_choice(name, precision)
    failed = []
    if name != "auto":
        engine = engine_for(bundle, name, threads, precision)
        if stored_verdict(bundle, engine) is None:
            _say(f"{engine.name}: first use of this bundle here, verifying it")
        if _passed(bundle, engine):
            return engine
        failed.append(engine.name)
    else:
        unable: list[EngineError] = []
        said: list[str] = []

        def say(line: str) -> None:
            said.append(line)
            _say(line)

        for engine, why in _in_order(bundle, threads, say):
            if stored_verdict(bundle, engine) is None:
                say(f"{engine.name}: first use of this bundle here, verifying it")
            try:
                passed = _passed(bundle, engine)
            except EngineError as error:  # such as no profile for a recorded shape, or too little memory
                say(f"{engine.name} is not used: {error}")
                unable.append(error)
                continue
            if passed:
                if said:
                    _say(f"engine: {engine.name}{why}")
                return engine
            say(f"{engine.name} does not match the PyTorch reference here and is passed over")
            failed.append(engine.name)
        if not failed and unable:
            raise unable[0]
    raise ParityError(
        f"{bundle.path}: {', '.join(failed)} does not match the PyTorch reference here; see dit-verify {bundle.path}, "
        "or name the engine (--engine onnxruntime) to use it all the same"
    )


def check_choice(name: str, precision: str | None) -> None:
    """Raises EngineError for a precision without the engine that is to have it."""
    if name == "auto" and precision is not None:
        raise EngineError(f"precision {precision} with engine auto: name the engine too (--engine openvino)")


def first_engine(bundle: Bundle, threads: int = 0) -> Engine:
    """The engine that ``auto`` tries first, whatever its verdict."""
    engine, _ = next(_in_order(bundle, threads, _say))
    return engine


def _in_order(bundle: Bundle, threads: int, say: Callable[[str], None]) -> Iterator[tuple[Engine, str]]:
    """The engines that ``auto`` may be, each opened when its turn comes, and why it has its place."""
    for engine in _built_engines(bundle, threads, say):
        yield engine, ", built for this GPU"
    found = fastest_first(bundle, threads, say)
    for index, speed in enumerate(found):
        engine = engine_for(bundle, speed.name, threads, speed.precision)
        yield engine, _why(speed, found[:index] + found[index + 1 :])


def _why(speed: Speed, others: Sequence[Speed]) -> str:
    compared = "".join(f"; {other.engine} {other.step_ms:.3g} ms" for other in others)
    return f", {speed.step_ms:.3g} ms a guided step{compared}" if compared else ", the only one here"


def _passed(bundle: Bundle, engine: Engine) -> bool:
    """By the stored verdict, or by the quick verify, which is then stored."""
    passed = stored_verdict(bundle, engine)
    if passed is None:
        rungs = verified(bundle, engine, quick=True)
        store_verdict(bundle, engine, rungs, quick=True)
        passed = all(rung.passed for rung in rungs)
        if not passed:
            _say(format_table(rungs))
    return passed


def _built_engines(bundle: Bundle, threads: int, say: Callable[[str], None]) -> Iterator[Engine]:
    """The TensorRT engines of this bundle that can run here, and do all that may be asked."""
    from dit_runtime.tensorrt_engine import engine_from_store  # which is for a GPU

    built = {stored.library for stored in stored_engines(bundle)}
    for name, library in TENSORRT.items():
        if library in built:
            try:
                yield engine_from_store(bundle, name, threads, whole=True)
            except EngineError as error:
                say(f"{name} is not used: {error}")


def _say(line: str) -> None:
    print(line, file=sys.stderr)
