"""Choose an engine: ``auto`` is the fastest engine here that matches the reference.

``auto`` tries engines that ``dit-build`` made for the GPU here first, then the others by the time of a step
(``speed.py``). It skips engines built for tiles or without guidance; choose them with ``--engine``. An engine without a
verdict is verified by the quick verification before it is used. An engine that does not match the reference is skipped.
At a batch or with branches at which it was not verified, it is verified there first.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from dit_runtime.backends.base import Engine, EngineOptions, check_threads
from dit_runtime.backends.open import backend_named, engine_for, find_candidates
from dit_runtime.backends.profiles import BatchShape
from dit_runtime.bundle.reader import Bundle
from dit_runtime.core.errors import EngineError, ParityError
from dit_runtime.verify.coverage import Shapes, covers
from dit_runtime.verify.rung import format_rungs
from dit_runtime.verify.speed import Speed, rank_by_speed
from dit_runtime.verify.verdicts import add_shape, read_verdict, store_verdict
from dit_runtime.verify.verification import verification_of, verify_shape

AUTO = "auto"
logger = logging.getLogger(__name__)


@dataclass
class Trust:
    """The shapes at which an engine is verified. Other batches and branches are verified before their use.

    Attributes:
        bundle: at the size in use.
        engine: the opened engine.
        shapes: by graph, the shapes.
    """

    bundle: Bundle
    engine: Engine
    shapes: dict[str, list[BatchShape]]
    _known: set[BatchShape] = field(default_factory=set, init=False, repr=False)  # the answer, for each step of a loop

    def check(self, batch: int, branches: int) -> None:
        """Verify the step at a shape, unless it is verified.

        Raises:
            ParityError: the engine is wrong at this shape.
        """
        if (batch, branches) in self._known:
            return
        self._verify(batch, branches)
        self._known.add((batch, branches))

    def _verify(self, batch: int, branches: int) -> None:
        # A loop on a device has calls and captured graphs of its own.
        if covers(self.shapes, "loop" if self.engine.info.loop_on_device else "step", batch, branches):
            return
        logger.info("%s: first use of batch %d with %d branches, verifying it", self.engine.info.name, batch, branches)
        if failed := [rung for rung in verify_shape(self.bundle, self.engine, batch, branches) if not rung.passed]:
            raise ParityError(
                f"{self.engine.info.name} is wrong at a batch of {batch} with {branches} branches: {failed[0].name}, "
                f"{failed[0].detail}; use smaller batches (--batch-size 4), or name another engine with --engine"
            )
        for graph in ("step", "loop"):
            self.shapes.setdefault(graph, []).append((batch, branches))
            add_shape(self.bundle, self.engine, graph, (batch, branches))

    def batch_to_decode(self, images: int) -> int:
        """The most of so many images that one call of the decoder may get; all where no call of it is on record."""
        if not self.shapes.get("decoder"):
            return images
        return max((batch for batch in range(1, images + 1) if covers(self.shapes, "decoder", batch)), default=1)


@dataclass(frozen=True)
class Choice:
    """An engine with a passing verdict, and the reason for the choice.

    Attributes:
        engine: the opened engine.
        why: the reason that ``auto`` chose it, or ``named``.
        found_out: a line for each engine that was timed, verified or skipped; empty where everything was on record.
        trust: the shapes at which the engine is verified; None where nobody asked.
    """

    engine: Engine
    why: str
    found_out: tuple[str, ...] = ()
    trust: Trust | None = None


@dataclass
class _Report:
    """The lines of ``Choice.found_out``. Each line is also logged when it is added."""

    lines: list[str] = field(default_factory=list)

    def add(self, line: str) -> None:
        self.lines.append(line)
        logger.info(line)


def choose_engine(bundle: Bundle, threads: int = 0, name: str = AUTO, precision: str | None = None) -> Choice:
    """Choose an engine with a passing verdict on this machine. Without a verdict, the quick verification runs first.

    Args:
        bundle: at the size in use.
        threads: threads of the CPU; 0 lets the engine choose.
        name: ``auto``, or a key of ``backends.open.BACKENDS``.
        precision: for an engine that is named and has a choice; None is the engine's default.

    Raises:
        ParityError: no engine matches the reference, or the named engine does not.
        EngineError: no engine is installed, or no engine can run the bundle.
    """
    check_choice(name, precision)
    check_threads(threads)
    report, failed = _Report(), list[str]()
    if name != AUTO:
        engine = engine_for(bundle, name, threads, precision)
        if (verified := _passes(bundle, engine, report)) is not None:
            return Choice(engine, "named", tuple(report.lines), Trust(bundle, engine, verified))
        failed.append(engine.info.name)
        engine.close()
    else:
        unable: list[EngineError] = []
        for engine, why in _open_in_order(bundle, threads, report):
            try:
                verified = _passes(bundle, engine, report)
            except EngineError as error:  # such as too little memory, or no profile for the shape of a golden record
                report.add(f"{engine.info.name} is not used: {error}")
                unable.append(error)
                engine.close()
                continue
            if verified is not None:
                if report.lines:
                    report.add(f"engine: {engine.info.name}, {why}")
                return Choice(engine, why, tuple(report.lines), Trust(bundle, engine, verified))
            report.add(f"{engine.info.name} is not used: it does not match the PyTorch reference here")
            failed.append(engine.info.name)
            engine.close()
        if not failed and unable:
            raise unable[0]
    raise ParityError(
        f"{bundle.path}: {', '.join(failed)} does not match the PyTorch reference here; run dit-verify {bundle.path} "
        "to see where, or use an engine despite its verdict with --engine NAME"
    )


def open_named_engine(bundle: Bundle, name: str, threads: int = 0, precision: str | None = None) -> Engine:
    """Open an engine by its name, whatever its verdict, unless it is weakly typed: that one has to pass.

    Raises:
        ParityError: a weakly typed engine does not match the reference.
        EngineError: the engine cannot be opened.
    """
    engine = engine_for(bundle, name, threads, precision)
    if not engine.info.weakly_typed or _passes(bundle, engine, _Report()):
        return engine
    engine.close()
    raise ParityError(
        f"{bundle.path}: {engine.info.name} chooses precisions of its own, and does not match the PyTorch reference "
        f"here; run dit-verify {bundle.path} --engine {name} to see where, or use --engine onnxruntime-cuda"
    )


def check_choice(name: str, precision: str | None) -> None:
    """Raises EngineError for a precision without an engine's name: ``auto`` chooses the precision itself."""
    if name == AUTO and precision is not None:
        raise EngineError(f"precision {precision} with engine auto: name the engine too (--engine openvino)")


def open_first_engine(bundle: Bundle, threads: int = 0) -> Engine:
    """Open the engine that ``auto`` tries first, whatever its verdict.

    Raises:
        EngineError: no engine is installed.
    """
    engine, _ = next(_open_in_order(bundle, threads, _Report()))
    return engine


def open_to_verify(name: str, precision: str | None) -> Callable[[Bundle], Engine]:
    """What opens an engine to be verified, for a bundle at one size: as named, or the first that ``auto`` tries.

    Raises:
        EngineError: a precision without an engine's name.
    """
    check_choice(name, precision)
    return lambda bundle: open_first_engine(bundle) if name == AUTO else engine_for(bundle, name, 0, precision)


def _open_in_order(bundle: Bundle, threads: int, report: _Report) -> Iterator[tuple[Engine, str]]:
    """Open the engines that ``auto`` may choose, one after the other, and yield each with the reason for its rank."""
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


def _passes(bundle: Bundle, engine: Engine, report: _Report) -> dict[str, list[BatchShape]] | None:
    """The shapes at which the engine is verified, by its stored verdict, or by the quick verification, whose verdict is
    then stored; None where it does not pass."""
    verdict = read_verdict(bundle, engine)
    passed = None if verdict is None else verdict.passed
    shapes: Shapes = {} if verdict is None else verdict.shapes
    if passed is None:
        report.add(f"{engine.info.name}: first use of this bundle here, verifying the engine")
        found = verification_of(bundle, engine, quick=True)
        rungs = list(found.rungs)
        store_verdict(bundle, engine, rungs, quick=True, shapes=found.coverage.shapes)
        passed, shapes = found.passed, found.coverage.shapes
        if not passed:
            for line in format_rungs(rungs).split("\n"):
                logger.info(line)
    return {graph: list(visited) for graph, visited in shapes.items()} if passed else None
