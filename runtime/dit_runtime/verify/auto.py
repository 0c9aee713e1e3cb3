"""What ``auto`` is: the fastest engine here that matches the reference, and why it was chosen."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence

from dit_runtime.backends.open import TENSORRT, Engine, engine_for
from dit_runtime.backends.tensorrt.store import stored_engines
from dit_runtime.bundle.reader import Bundle
from dit_runtime.core.errors import EngineError, ParityError
from dit_runtime.verify.rung import format_table
from dit_runtime.verify.speed import Speed, rank_by_speed
from dit_runtime.verify.verdicts import store_verdict, stored_verdict
from dit_runtime.verify.verification import measure_rungs


def open_trusted_engine(bundle: Bundle, threads: int = 0, name: str = "auto", precision: str | None = None) -> Engine:
    """An engine with a passing verdict here; without a verdict the quick verify runs first.

    ``auto`` is TensorRT where ``dit-build`` made an engine that runs on the GPU here, else the fastest of the others
    (``dit_runtime.verify.speed``); one that does not match the reference is passed over. Which, and why, is said on
    stderr when it is found out, and not again.

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


def open_first_engine(bundle: Bundle, threads: int = 0) -> Engine:
    """The engine that ``auto`` tries first, whatever its verdict."""
    engine, _ = next(_in_order(bundle, threads, _say))
    return engine


def _in_order(bundle: Bundle, threads: int, say: Callable[[str], None]) -> Iterator[tuple[Engine, str]]:
    """The engines that ``auto`` may be, each opened when its turn comes, and why it has its place."""
    for engine in _built_engines(bundle, threads, say):
        yield engine, ", built for this GPU"
    found = rank_by_speed(bundle, threads, say)
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
        rungs = measure_rungs(bundle, engine, quick=True)
        store_verdict(bundle, engine, rungs, quick=True)
        passed = all(rung.passed for rung in rungs)
        if not passed:
            _say(format_table(rungs))
    return passed


def _built_engines(bundle: Bundle, threads: int, say: Callable[[str], None]) -> Iterator[Engine]:
    """The TensorRT engines of this bundle that can run here, and do all that may be asked."""
    from dit_runtime.backends.tensorrt.open import engine_from_store  # which is for a GPU

    built = {stored.library for stored in stored_engines(bundle)}
    for name, library in TENSORRT.items():
        if library in built:
            try:
                yield engine_from_store(bundle, name, threads, whole=True)
            except EngineError as error:
                say(f"{name} is not used: {error}")


def _say(line: str) -> None:
    print(line, file=sys.stderr)
