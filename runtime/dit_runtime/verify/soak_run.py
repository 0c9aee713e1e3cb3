"""Run a soak's cases on an engine, and compare with the host's results of the same work.

The host is ONNX Runtime on the CPU, with the bundle's own graphs. It runs each image alone, so that a fault of a shape,
of a place in the batch or of what ran before shows as a difference.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass

import numpy as np

from dit_runtime.backends.base import Array, Engine
from dit_runtime.bundle.manifest import ENCODER
from dit_runtime.bundle.reader import Bundle
from dit_runtime.core.errors import DiTError
from dit_runtime.core.machine import memory_use
from dit_runtime.core.text import one_line
from dit_runtime.samplers.schedule import Schedule
from dit_runtime.sampling.requests import ImageRequest
from dit_runtime.verify.budget import budget_for, precision_for_limits
from dit_runtime.verify.metrics import psnr, relative_error
from dit_runtime.verify.soak_cases import SoakCase, SoakImage, request_for, simplest_sampler, start_image
from dit_runtime.verify.soak_host import Check, Host, Hosts, TimeOverError, decode, encode, sample

MEMORY_BYTES = 64 << 20  # how much memory may grow once every shape was seen
WARM_REPEATS = 4  # of one case, before its memory is judged
SPREAD = 0.1  # the disturbance that measures how chaotic an image is, in limits


@dataclass(frozen=True)
class Failure:
    """What went wrong: ``kind`` is ``error``, ``latents``, ``images``, ``encoder``, ``repeat`` or ``memory``."""

    kind: str
    text: str


Open = Callable[[Bundle], Engine]


def resident_bytes() -> int:
    """The memory that this process has; 0 where the system does not say."""
    return memory_use().get("resident", 0)


class Bench:
    """The engine under test, opened for a bundle at one size, beside the host.

    Attributes:
        engine: the engine under test.
        exact: whether it gives the same work's latents twice bit for bit.
        precision: that the limits are of.
        used: the largest share of a limit that any result used so far.
    """

    def __init__(self, bundle: Bundle, open_at: Open, host: Host, memory_bytes: int = MEMORY_BYTES) -> None:
        self.bundle, self._host, self._memory_bytes = bundle, host, memory_bytes
        self.engine = open_at(bundle)
        try:
            self._budget = budget_for(bundle, precision_for_limits(bundle, self.engine.info))
        except DiTError:
            self.engine.close()
            raise
        self.precision = self._budget.precision
        self.exact, self.used = True, 0.0

    def close(self) -> None:
        """Close the engine; the host stays open."""
        self.engine.close()

    def measure_exactness(self) -> None:
        """Run some work twice, and set ``exact``."""
        manifest = self.bundle.manifest
        requests = [request_for(SoakImage(simplest_sampler(manifest), 2, seed=1), manifest, self._host.start_of)]
        first, second = (sample(self.engine, manifest, requests, 1, lambda: None) for _ in range(2))
        self.exact = bool(np.array_equal(first[0], second[0]))

    def run(self, case: SoakCase, check: Check = lambda: None) -> Failure | None:
        """Run a case on the engine. None is a pass.

        Raises:
            UnusableError: the host's own results are not finite.
            SamplingError: the model cannot run the case.
            TimeOverError: from ``check``.
        """
        manifest = self.bundle.manifest
        schedules: dict[tuple[object, ...], Schedule] = {}
        requests = [request_for(image, manifest, self._host.start_of, schedules) for image in case.images]
        pairs = zip(case.images, requests, strict=True)
        expected = [self._host.latents_of(image, request, check) for image, request in pairs]
        for image in case.images:
            if image.strength is not None and (failure := self._check_encoder(image)) is not None:
                return failure
        if case.decoded:
            self._host.load("decoder")
        stop = threading.Event()

        def check_all() -> None:
            if stop.is_set():
                raise TimeOverError
            check()

        def work(number: int) -> Failure | None:
            return self._run_thread(case, number, requests, expected, check_all)

        if case.threads == 1:
            return work(0)
        with ThreadPoolExecutor(case.threads) as pool:
            futures = [pool.submit(work, number) for number in range(case.threads)]
            try:
                while not all(future.done() for future in futures):
                    wait(futures, timeout=0.2)
                    check()
                return next((found for future in futures if (found := future.result())), None)
            finally:
                stop.set()  # after an interrupt the threads end with their step

    def _run_thread(
        self,
        case: SoakCase,
        number: int,
        requests: Sequence[ImageRequest],
        expected: Sequence[Array],
        check: Check,
    ) -> Failure | None:
        """Run the images of a case ``repeats`` times, in an order of this thread's own."""
        order = np.roll(np.arange(len(requests)), -number).tolist()
        images, own = [case.images[index] for index in order], [requests[index] for index in order]
        wanted = [expected[index] for index in order]
        first: list[Array] = []
        before = 0
        for repeat in range(case.repeats):
            try:
                for graph in case.releases if repeat else ():
                    self.engine.release(graph)
                found = sample(self.engine, self.bundle.manifest, own, case.batch, check)
                decoded = self._decode(found, case.decoded) if case.decoded else None
            except TimeOverError:
                raise
            except Exception as error:  # noqa: BLE001  # whatever an engine raises on legal work is its failure
                return _failure_of(error, f"repeat {repeat + 1}")
            failure = self._compare(images, own, found, wanted, check)
            if failure is None and decoded is not None:
                failure = self._compare_images(found, decoded)
            if failure is not None:
                return failure
            if repeat == 0:
                first = found
            elif self.exact and not all(map(np.array_equal, first, found)):
                return Failure("repeat", f"repeat {repeat + 1} of the same work has other latents than the first")
            if repeat + 1 == WARM_REPEATS:
                before = resident_bytes()
            elif repeat >= WARM_REPEATS and (grown := resident_bytes() - before) > self._memory_bytes:
                return Failure("memory", f"{grown >> 20} MiB more after {repeat + 1} repeats of the same work")
        return None

    def _check_encoder(self, image: SoakImage) -> Failure | None:
        if ENCODER not in self.engine.info.graphs:
            return None
        try:
            found = encode(self.engine, start_image(image, self.bundle.manifest))
        except Exception as error:  # noqa: BLE001  # as in _run_thread
            return _failure_of(error, "encoder")
        size, limit = relative_error(found, self._host.start_of(image)), self._budget.tolerance_of("encoder")
        self.used = max(self.used, size / limit)
        text = f"latents of the start image have a relative error of {size:.2g}, limit {limit:.2g}"
        return Failure("encoder", text) if not size <= limit else None

    def _compare(
        self,
        images: Sequence[SoakImage],
        requests: Sequence[ImageRequest],
        found: Sequence[Array],
        expected: Sequence[Array],
        check: Check,
    ) -> Failure | None:
        """Compare latents. An image that an error of the engine's size alone changes more has a wider limit."""
        tolerance = self._budget.tolerance_of("free_running")
        for index, (image, request, one, wanted) in enumerate(zip(images, requests, found, expected, strict=True)):
            error = relative_error(one, wanted)
            limit = tolerance * max(1.0, float(np.abs(request.branches.weights).sum(axis=1).max()))
            if error > limit:
                limit = max(limit, tolerance * self._host.spread_of(image, request, SPREAD * tolerance, check))
            self.used = max(self.used, error / limit)
            if not error <= limit:
                where = f"image {index + 1} of {len(images)}"
                return Failure("latents", f"{where} has a relative error of {error:.2g}, limit {limit:.2g}")
        return None

    def _decode(self, latents: Sequence[Array], batch: int) -> Array:
        """The engine's uint8 images ``[N, H, W, 3]``."""
        return decode(self.engine, self._crop(latents), self.engine.info.batch_of(batch))[0]

    def _crop(self, latents: Sequence[Array]) -> Array:
        height, width = self.engine.info.tile or latents[0].shape[1:]
        return np.stack([one[:, :height, :width] for one in latents])

    def _compare_images(self, latents: Sequence[Array], images: Array) -> Failure | None:
        """Compare the engine's images with the host's of the same latents, so that only the decoder differs."""
        limit = self._budget.tolerance_of("image_psnr")
        for index, one in enumerate(self._crop(latents)):
            expected, pixels = self._host.decode(one)
            if not np.isfinite(pixels).all():
                continue
            level = psnr(images[index], expected[0])
            self.used = max(self.used, 10 ** ((limit - level) / 20))
            if level < limit:
                where = f"image {index + 1} of {len(images)}"
                return Failure("images", f"{where} has a PSNR of {level:.1f} dB, limit {limit:.1f} dB")
        return None


def run_cases(
    bundle: Bundle,
    open_at: Open,
    cases: Sequence[SoakCase],
    hosts: Hosts,
    check: Check = lambda: None,
    memory_bytes: int = MEMORY_BYTES,
) -> Failure | None:
    """Run cases one after the other on an engine that is opened for them; an engine of another size at a new size.

    Raises:
        UnusableError, SamplingError, TimeOverError: as ``Bench.run``.
        BundleError: the bundle has no such size.
    """
    bench: Bench | None = None
    try:
        for case in cases:
            at = bundle.at(case.size)
            if bench is None or bench.bundle.manifest.image_size != at.manifest.image_size:
                if bench is not None:
                    bench.close()
                bench = Bench(at, open_at, hosts.at(at), memory_bytes)
                bench.measure_exactness()
            if failure := bench.run(case, check):
                return failure
        return None
    finally:
        if bench is not None:
            bench.close()


def _failure_of(error: Exception, where: str) -> Failure:
    text = str(error) if isinstance(error, DiTError) else one_line(f"{type(error).__name__}: {error}")
    return Failure("error", f"{where}: {text}")


def time_limit(deadline: float) -> Check:
    """A check that raises TimeOverError after a time of ``time.monotonic``."""

    def check() -> None:
        if time.monotonic() > deadline:
            raise TimeOverError

    return check
