"""What ``auto`` is: the fastest engine here that matches the reference, and why it was chosen.

Engines that ``dit-build`` made for the GPU here come first, then the others by the time of a step (``speed.py``). An
engine without a verdict is verified quickly before it is used; one that does not match the reference is passed over.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from dit_runtime.backends.base import Engine, EngineOptions
from dit_runtime.backends.open import backend_named, engine_for, find_candidates
from dit_runtime.bundle.reader import Bundle
from dit_runtime.core.errors import EngineError, ParityError
from dit_runtime.verify.rung import format_table
from dit_runtime.verify.speed import Speed, rank_by_speed
from dit_runtime.verify.verdicts import has_passed, store_verdict
from dit_runtime.verify.verification import verification_of

AUTO = "auto"
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Choice:
    """An engine with a passing verdict, and how it was found.

    Attributes:
        engine: opened.
        why: what ``auto`` chose it for, or that it was named.
        found_out: what was measured, verified and passed over on the way, a line each; empty where all was on record.
    """

    engine: Engine
    why: str
    found_out: tuple[str, ...] = ()


@dataclass
class _Report:
    """Lines of what is found out, logged as they come."""

    lines: list[str] = field(default_factory=list)

    def add(self, line: str) -> None:
        self.lines.append(line)
        logger.info(line)


def choose_engine(bundle: Bundle, threads: int = 0, name: str = AUTO, precision: str | None = None) -> Choice:
    """An engine with a passing verdict here; without a verdict the quick verify runs first.

    Args:
        bundle: at the size in use.
        threads: of the CPU; 0 lets the engine choose.
        name: ``auto``, or one of ``open.BACKENDS``.
        precision: of an engine that is named and has a choice.

    Raises:
        ParityError: no engine, or not the one that was named, matches the reference.
        EngineError: no engine is installed.
    """
    check_choice(name, precision)
    report, failed = _Report(), list[str]()
    if name != AUTO:
        engine = engine_for(bundle, name, threads, precision)
        if _passes(bundle, engine, report):
            return Choice(engine, "named", tuple(report.lines))
        failed.append(engine.info.name)
    else:
        unable: list[EngineError] = []
        for engine, why in _open_in_order(bundle, threads, report):
            try:
                passed = _passes(bundle, engine, report)
            except EngineError as error:  # such as no profile for a recorded shape, or too little memory
                report.add(f"{engine.info.name} is not used: {error}")
                unable.append(error)
                continue
            if passed:
                if report.lines:
                    report.add(f"engine: {engine.info.name}, {why}")
                return Choice(engine, why, tuple(report.lines))
            report.add(f"{engine.info.name} does not match the PyTorch reference here and is passed over")
            failed.append(engine.info.name)
        if not failed and unable:
            raise unable[0]
    raise ParityError(
        f"{bundle.path}: {', '.join(failed)} does not match the PyTorch reference here; see dit-verify {bundle.path}, "
        "or name the engine (--engine onnxruntime) to use it all the same"
    )


def check_choice(name: str, precision: str | None) -> None:
    """Raises EngineError for a precision without the engine that is to have it."""
    if name == AUTO and precision is not None:
        raise EngineError(f"precision {precision} with engine auto: name the engine too (--engine openvino)")


def open_first_engine(bundle: Bundle, threads: int = 0) -> Engine:
    """The engine that ``auto`` tries first, whatever its verdict."""
    engine, _ = next(_open_in_order(bundle, threads, _Report()))
    return engine


def _open_in_order(bundle: Bundle, threads: int, report: _Report) -> Iterator[tuple[Engine, str]]:
    """The engines that ``auto`` may be, each opened when its turn comes, and why it has its place."""
    for candidate in find_candidates(bundle):
        if candidate.built:
            options = EngineOptions(threads, candidate.precision, whole=True)
            try:
                yield backend_named(candidate.name).open(bundle, candidate.name, options), "built for this GPU"
            except EngineError as error:
                report.add(f"{candidate.name} is not used: {error}")
    found = rank_by_speed(bundle, threads, report.add)
    for index, speed in enumerate(found):
        engine = engine_for(bundle, speed.name, threads, speed.precision)
        yield engine, _explain_speed(speed, found[:index] + found[index + 1 :])


def _explain_speed(speed: Speed, others: Sequence[Speed]) -> str:
    compared = "".join(f"; {other.engine} {other.step_ms:.3g} ms" for other in others)
    return f"{speed.step_ms:.3g} ms a guided step{compared}" if compared else "the only one here"


def _passes(bundle: Bundle, engine: Engine, report: _Report) -> bool:
    """By the stored verdict, or by the quick verify, which is then stored."""
    passed = has_passed(bundle, engine)
    if passed is None:
        report.add(f"{engine.info.name}: first use of this bundle here, verifying it")
        rungs = list(verification_of(bundle, engine, quick=True).rungs)
        store_verdict(bundle, engine, rungs, quick=True)
        passed = all(rung.passed for rung in rungs)
        if not passed:
            logger.info(format_table(rungs))
    return passed
