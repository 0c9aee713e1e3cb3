"""Soak an engine: random legal work for a given time, compared with the host, with the memory watched.

The case of a number is drawn from the seed and that number alone. The first case that fails ends the soak; it is run
again on a new engine, with those before it where it passes alone, and made as small as it can be.
"""

from __future__ import annotations

import gc
import itertools
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from dit_runtime.backends.base import EngineInfo
from dit_runtime.bundle.reader import Bundle
from dit_runtime.core.errors import SamplingError
from dit_runtime.core.progress import Progress
from dit_runtime.verify.soak_cases import (
    SoakCase,
    SoakImage,
    coverage_of,
    draw_case,
    draw_size,
    json_from_cases,
    simplest_sampler,
)
from dit_runtime.verify.soak_host import Hosts, TimeOverError, UnusableError
from dit_runtime.verify.soak_run import (
    MEMORY_BYTES,
    Bench,
    Failure,
    Open,
    resident_bytes,
    run_cases,
    time_limit,
)
from dit_runtime.verify.soak_shrink import Cases, last_cases, shrink

LEAST_CASES = 48  # before the memory of the second half is compared with that of the first: shapes are still new before
LEAST_SHRINK_S, MOST_SHRINK_S = 30.0, 300.0
RACE_TRIES = 3  # runs of a case with several threads, which may pass by chance
SUSPECTS = 3  # cases after which memory grew most, that are tried alone
MANY_REPEATS = 256  # of a case whose memory is suspected


@dataclass(frozen=True)
class SoakResult:
    """What a soak found.

    Attributes:
        bundle: the bundle's digest.
        engine: the engine's name.
        precision: that the limits are of.
        seed: of the cases.
        seconds: without the time of shrinking.
        cases, images, rows: how many ran: cases, images of them, and rows of the images' schedules.
        skipped: cases whose results are not finite on the host.
        exact: whether the engine gives the same work's latents twice bit for bit; repeats are then held to that.
        used: the largest share of a limit.
        memory: bytes of this process after each case; empty where the system does not say.
        memory_limit: how much it may grow, in bytes.
        coverage: the values of each field that decides an engine's work.
        failure: what went wrong; None is a pass.
        case: number of the case that failed.
        shrunk: the smallest cases that fail so on a new engine, as JSON; None where the failure did not come again.
    """

    bundle: str
    engine: str
    precision: str
    seed: int
    seconds: float
    cases: int
    images: int
    rows: int
    skipped: int
    exact: bool
    used: float
    memory: tuple[int, ...]
    memory_limit: int
    coverage: Mapping[str, Sequence[Any]]
    failure: Failure | None
    case: int | None
    shrunk: str | None

    @property
    def passed(self) -> bool:
        """Whether cases ran and none failed."""
        return self.failure is None and self.cases > 0

    def as_json(self) -> dict[str, Any]:
        """All fields and the verdict."""
        used = self.used if math.isfinite(self.used) else str(self.used)
        return {**asdict(self), "used": used, "passed": self.passed}


def soak(
    bundle: Bundle,
    open_at: Open,
    seconds: float,
    seed: int,
    most_cases: int | None = None,
    memory_bytes: int = MEMORY_BYTES,
) -> SoakResult:
    """Run random cases for a time, or until one fails.

    Args:
        bundle: at its first size.
        open_at: opens the engine for the bundle at one size.
        seconds: after which the soak ends; a case that runs then does not count. Shrinking has as much time again,
            between ``LEAST_SHRINK_S`` and ``MOST_SHRINK_S``.
        seed: of the cases.
        most_cases: end after so many; None has no limit.
        memory_bytes: how much memory may grow.

    Raises:
        EngineError: the engine or ONNX Runtime cannot be opened.
        BundleError: the bundle has no limits for the engine's precision.
    """
    this = _Soak(bundle, open_at, seed, memory_bytes)
    try:
        return this.run(seconds, most_cases)
    finally:
        this.hosts.close()


class _Soak:
    def __init__(self, bundle: Bundle, open_at: Open, seed: int, memory_bytes: int) -> None:
        self._bundle, self._open_at, self._seed, self._memory_bytes = bundle, open_at, seed, memory_bytes
        self.hosts = Hosts()
        self._simplest = simplest_sampler(bundle.manifest)
        # Cases are drawn again when they are needed: an hour of them would take much of the memory that is judged.
        self._numbers: list[int] = []  # of the cases that ran
        self._opened_at = 0  # how many cases ran before the engine in use was opened
        self._infos: dict[tuple[int, int] | None, EngineInfo] = {}
        self._memory: list[int] = []
        self._images = self._rows = 0
        self._coverage: dict[str, set[Any]] = {}
        self._skipped, self._exact, self._used = 0, True, 0.0

    def run(self, seconds: float, most_cases: int | None) -> SoakResult:
        start = time.monotonic()
        at = self._bundle.at(self._size(0))
        bench = Bench(at, self._open_at, self.hosts.at(at), self._memory_bytes)
        try:
            bench.measure_exactness()
            self._exact = bench.exact
            with Progress(f"soaking {bench.engine.info.name}, seed {self._seed}", math.ceil(seconds)) as bar:
                clock = _Clock(bar, start, seconds)
                bench, failure = self._run_all(bench, clock, most_cases)
            info, limits = bench.engine.info, bench.precision
        finally:
            bench.close()
        spent = time.monotonic() - start
        number = self._numbers[-1] if failure is not None else None
        shrunk = None if failure is None else self._shrink(failure, min(max(seconds, LEAST_SHRINK_S), MOST_SHRINK_S))
        return SoakResult(
            bundle=self._bundle.digest,
            engine=info.name,
            precision=limits,
            seed=self._seed,
            seconds=spent,
            cases=len(self._numbers),
            images=self._images,
            rows=self._rows,
            skipped=self._skipped,
            exact=self._exact,
            used=self._used,
            memory=tuple(self._memory),
            memory_limit=self._memory_bytes,
            coverage={name: sorted(values) for name, values in self._coverage.items()},
            failure=failure,
            case=number,
            shrunk=None if shrunk is None else json_from_cases(shrunk),
        )

    def _size(self, index: int) -> tuple[int, int] | None:
        return draw_size(self._seed, index, self._bundle.manifest.image_sizes)

    def _run_all(self, bench: Bench, clock: _Clock, most_cases: int | None) -> tuple[Bench, Failure | None]:
        """Run the cases; the bench that is open at the end, and the failure."""
        for index in itertools.count():
            if index == most_cases or clock.is_over():
                break
            at = self._bundle.at(self._size(index))
            if at.manifest.image_size != bench.bundle.manifest.image_size:
                bench.close()
                bench = Bench(at, self._open_at, self.hosts.at(at), self._memory_bytes)
                self._opened_at = len(self._numbers)
                bench.exact = self._exact
            self._infos[self._size(index)] = bench.engine.info
            case = self._case(index)
            try:
                failure = bench.run(case, clock.check)
            except TimeOverError:
                break
            except UnusableError:
                self._skipped += 1
                continue
            self._count(index, case)
            self._used = max(self._used, bench.used)
            failure = failure or self._judge_memory()
            if failure is not None:
                return bench, failure
        return bench, None

    def _case(self, index: int) -> SoakCase:
        size = self._size(index)
        return draw_case(self._seed, index, self._bundle.at(size).manifest, self._infos[size], size)

    def _count(self, index: int, case: SoakCase) -> None:
        self._numbers.append(index)
        self._images += len(case.images)
        self._rows += sum(image.steps for image in case.images)
        for name, values in coverage_of(case).items():
            self._coverage.setdefault(name, set()).update(values)

    def _judge_memory(self) -> Failure | None:
        """Compare the least memory of the last quarter of the cases with the most of the first half."""
        gc.collect()
        if not (resident := resident_bytes()):
            return None
        self._memory.append(resident)
        count = len(self._memory)
        if count < LEAST_CASES:
            return None
        grown = min(self._memory[-(count // 4) :]) - max(self._memory[: count // 2])
        if grown <= self._memory_bytes:
            return None
        return Failure("memory", f"{grown >> 20} MiB more, limit {self._memory_bytes >> 20} MiB, over {count} cases")

    def _shrink(self, failure: Failure, seconds: float) -> Cases | None:
        """The smallest cases that fail on a new engine; None where none did in the time."""
        check = time_limit(time.monotonic() + seconds)

        def fails(cases: Cases) -> bool:
            tries = RACE_TRIES if failure.kind != "memory" and any(case.threads > 1 for case in cases) else 1
            try:
                for _ in range(tries):
                    found = run_cases(self._bundle, self._open_at, cases, self.hosts, check, self._memory_bytes)
                    if found is not None and found.kind == failure.kind:
                        return True
            except (TimeOverError, UnusableError, SamplingError):
                return False
            return False

        with Progress("shrinking the case that failed", 1):
            found = next((cases for cases in self._suspects(failure) if fails(cases)), None)
            return None if found is None else shrink(found, fails, self._simplest)

    def _suspects(self, failure: Failure) -> Sequence[Cases]:
        """The cases that may fail on a new engine, the shortest first."""
        if failure.kind != "memory":
            return list(last_cases([self._case(index) for index in self._numbers[self._opened_at :]]))
        grown = [after - before for before, after in zip(self._memory, self._memory[1:], strict=False)]
        most = sorted(range(len(grown)), key=lambda index: grown[index], reverse=True)[:SUSPECTS]
        suspects = [self._case(self._numbers[index + 1]) for index in most]
        plain = SoakCase((SoakImage(self._simplest),), repeats=MANY_REPEATS)
        return [(case,) for case in (plain, replace(plain, decoded=1), *_repeated(suspects))]


def _repeated(cases: Iterable[SoakCase]) -> Iterator[SoakCase]:
    return (replace(case, repeats=MANY_REPEATS, threads=1, releases=()) for case in cases)


class _Clock:
    """The time of a soak, shown as a bar of seconds."""

    def __init__(self, bar: Progress, start: float, seconds: float) -> None:
        self._bar, self._start, self._seconds, self._shown = bar, start, seconds, 0
        self._limit = time_limit(start + seconds)

    def is_over(self) -> bool:
        return time.monotonic() >= self._start + self._seconds

    def check(self) -> None:
        """Raises TimeOverError when the time is over."""
        spent = int(time.monotonic() - self._start)
        if spent > self._shown:
            self._bar.advance(spent - self._shown)
            self._shown = spent
        self._limit()
