"""Shards on a Ray cluster: a driver gives shards to workers until all of them are there, whoever is killed meanwhile.

A shard that is there is done. So a worker that died costs its own shard, which another one makes, and a driver that
died costs what its workers had begun: the same command goes on. ``ray`` is imported in functions alone.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import signal
import socket
import sys
import threading
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dit_runtime.bundle.reader import open_bundle
from dit_runtime.core.errors import EngineError, SamplingError
from dit_runtime.core.progress import Progress
from dit_runtime.core.replace import clear_litter
from dit_runtime.core.streams import DEBUG
from dit_runtime.core.text import one_line
from dit_runtime.core.version import __version__
from dit_runtime.output.provenance import Entry
from dit_runtime.output.ray_worker import Failure, ShardWorker
from dit_runtime.output.request import LabelledImages, SampleRequest
from dit_runtime.output.shards import ShardCount, ShardPlan, check_shard_output, plan_shards
from dit_runtime.output.writer import Written
from dit_runtime.pipeline import check_makes_images

ATTEMPTS = 3  # deaths of workers at one shard, or while they open, with no success between
POLL_SECONDS = 0.5
CONNECT_SECONDS = 10.0
HTTP_2 = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))  # how a client of gRPC begins
SETTINGS = b"\x04"  # the kind of a server's first frame
ON_CPU = ("openvino", "onnxruntime")  # engines that need no GPU
WATCH = "watch"  # the thread of a worker that tells how far it is

logger = logging.getLogger(__name__)


def write_shards_on_ray(request: SampleRequest) -> Written:
    """Make all shards of a request that are missing, on its cluster. Every machine sees the same paths.

    Raises:
        SamplingError: the bundle is a policy's.
        EngineError: Ray is not installed, there is no cluster at the address, it has no room for the workers, or a
            worker died three times at one shard.
        DiTError: as ``ShardMaker``, on whichever machine, and as ``write_shards``.
    """
    cluster, images = request.cluster, request.images
    assert cluster is not None
    assert isinstance(images, LabelledImages)
    check_shard_output(request.output)
    request = _with_absolute_paths(request)
    bundle = open_bundle(request.bundle, request.store)
    check_makes_images(bundle)
    plan = plan_shards(bundle.manifest, images, request.output)
    try:
        with _joined(cluster.address) as ray:
            room = _room_for(ray.nodes(), request.engine, request.threads, cluster.workers)
            if not request.threads and not room.gpus:
                request = replace(request, threads=room.cpus)
            driver = _Driver(ray, request, plan, bundle.digest, room)
            return driver.run()
    finally:
        clear_litter(plan.path, again=True)  # of the workers that were killed


@dataclass(frozen=True)
class Room:
    """What workers get.

    Attributes:
        workers: most of them at once.
        cpus, gpus: of each.
    """

    workers: int
    cpus: int
    gpus: int


def _room_for(nodes: list[dict[str, Any]], engine: str, threads: int, workers: int | None) -> Room:
    """Share a cluster's nodes among workers. Raises EngineError where they do not fit."""
    resources = [node["Resources"] for node in nodes if node["Alive"] and node["Resources"].get("CPU", 0) >= 1]
    has_gpus = any(each.get("GPU", 0) >= 1 for each in resources)
    gpus = int(engine not in ON_CPU and (engine != "auto" or has_gpus))

    def fitting(cpus: int) -> int:
        return sum(_fitting(each, cpus, gpus) for each in resources)

    if gpus or threads:
        cpus = threads or 1
        asked = workers or max(1, fitting(cpus))
    else:
        asked = workers or max(1, len(resources))
        most = max((int(each["CPU"]) for each in resources), default=1)
        cpus = next((cpus for cpus in range(most, 1, -1) if fitting(cpus) >= asked), 1)
    if asked > fitting(cpus):
        need = f"{cpus} CPU{'s' * (cpus > 1)}" + " and 1 GPU" * gpus
        raise EngineError(
            f"{asked} workers with {need} each: the cluster has room for {fitting(cpus)}; ask for fewer --workers, or "
            "start more nodes"
        )
    return Room(asked, cpus, gpus)


def _fitting(resources: Mapping[str, float], cpus: int, gpus: int) -> int:
    count = int(resources.get("CPU", 0) // cpus)
    return min(count, int(resources.get("GPU", 0) // gpus)) if gpus else count


@contextlib.contextmanager
def _joined(address: str) -> Iterator[Any]:
    """Ray, joined to a cluster, which is left at the end.

    Raises:
        EngineError: Ray is not installed, or no cluster is there.
    """
    try:
        ray = importlib.import_module("ray")
    except ImportError as error:
        raise EngineError(f"{error.name} is not installed; pip install 'dit-export[ray]'") from error
    if ray.is_initialized():  # by the program that calls us
        yield ray
        return
    _check_address(address)
    options: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **options)
    except ConnectionError as error:
        raise _no_cluster(address, "there is none" if address == "auto" else one_line(error, 200)) from error
    except Exception as error:  # Ray raises errors of any kind
        raise _no_cluster(address, one_line(error, 200)) from error
    if threading.current_thread() is threading.main_thread():
        for number, handler in handlers.items():
            signal.signal(number, handler)  # Ray has put its own there
    try:
        # Ray prints what it sees dying on stdout, where the command's results go.
        with (
            Path(os.devnull).open("w", encoding="utf-8") as nowhere,
            contextlib.redirect_stdout(sys.stderr if os.environ.get(DEBUG) else nowhere),
        ):
            yield ray
    finally:
        ray.shutdown()


def _check_address(address: str) -> None:
    """Raises EngineError where nobody listens, or no gRPC server does: Ray would wait for ever."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if address in ("auto", "local"):
        return
    if not (host and port.isdecimal() and int(port) < 65536):
        raise EngineError(f"{address!r:.80}: no address of a Ray cluster; expected auto, local or HOST:PORT")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS) as connection:
            if os.environ.get("RAY_USE_TLS", "0") == "0":
                connection.sendall(HTTP_2)
                if connection.recv(9)[3:4] != SETTINGS:
                    raise ConnectionError("what listens there is no Ray cluster")
    except OSError as error:
        raise _no_cluster(address, error.strerror or str(error)) from error


def _no_cluster(address: str, reason: str) -> EngineError:
    return EngineError(
        f"{address}: no Ray cluster can be joined there ({reason}); start one with ray start --head, or use --ray local"
    )


@dataclass(eq=False)
class _Worker:
    """A worker as the driver knows it.

    Attributes:
        actor: its handle.
        finished: images of the shards that it has made.
        seen: images that it told of, with the share of the running shard.
        asked: how far it is, once it answers.
    """

    actor: Any
    finished: int = 0
    seen: int = 0
    asked: Any = None


class _Driver:
    """Gives shards to workers, and starts a worker for each that dies."""

    def __init__(self, ray: Any, request: SampleRequest, plan: ShardPlan, digest: str, room: Room) -> None:
        self._ray, self._request, self._plan, self._digest, self._room = ray, request, plan, digest, room
        self._todo = deque(plan.missing())
        self._count = ShardCount(plan)
        self._workers: list[_Worker] = []
        self._idle: list[_Worker] = []
        self._busy: dict[Any, tuple[_Worker, int | None]] = {}  # None: it opens its engine
        self._deaths = Counter[int | None]()
        self._entry: Entry | None = None

    def run(self) -> Written:
        """Until all shards are there."""
        images = sum(len(self._plan.images_of(number)) for number in self._todo)
        try:
            with Progress(f"sampling with {self._room.workers} workers", images) as bar:
                while self._is_working():
                    self._start_workers()
                    self._give_shards()
                    for reference in self._ray.wait(list(self._busy), timeout=POLL_SECONDS)[0]:
                        self._take(reference, bar)
                    self._show_progress(bar)
            assert self._entry is not None
            return self._count.finish(self._entry)
        finally:
            for worker in self._workers:
                self._ray.kill(worker.actor)

    def _is_working(self) -> bool:
        """Whether a shard is left; one worker opens its engine all the same, and so checks the request."""
        return bool(self._entry is None or self._todo or any(number is not None for _, number in self._busy.values()))

    def _start_workers(self) -> None:
        """The first one alone: it writes down how the shards are made, and what is wrong is said once."""
        opening = sum(number is None for _, number in self._busy.values())
        wanted = 1 if self._entry is None else min(self._room.workers, len(self._todo) + len(self._busy) - opening)
        options = {"num_cpus": self._room.cpus, "num_gpus": self._room.gpus, "concurrency_groups": {WATCH: 1}}
        while len(self._workers) < wanted:
            worker = _Worker(self._ray.remote(**options)(ShardWorker).remote())
            self._workers.append(worker)
            self._busy[worker.actor.open.remote(self._request, self._digest, __version__)] = worker, None

    def _give_shards(self) -> None:
        while self._idle and self._todo:
            worker, number = self._idle.pop(), self._todo.popleft()
            self._busy[worker.actor.make.remote(number)] = worker, number

    def _take(self, reference: Any, bar: Progress) -> None:
        """Take a worker's answer, or note that it died."""
        worker, number = self._busy.pop(reference)
        try:
            answer = self._ray.get(reference)
        except self._ray.exceptions.RayError as error:
            self._replace(worker, number, error, bar)
            return
        if number is None:
            self._deaths[None] = 0
        else:
            self._deaths.clear()
        if isinstance(answer, Failure):
            failed = type(answer.error)(f"{answer.host}: {answer.error}")
            if not isinstance(failed, SamplingError) or number is None:
                raise failed
            self._count.fail(failed)
        elif number is None:
            self._entry = self._entry or answer
        else:
            self._count.add(number, len(self._plan.images_of(number)))
        if number is not None:
            worker.finished += len(self._plan.images_of(number))
            bar.advance(worker.finished - worker.seen)
            worker.seen = worker.finished
        self._idle.append(worker)

    def _replace(self, worker: _Worker, number: int | None, error: Exception, bar: Progress) -> None:
        """A worker died: its shard is made by another one, after the others, in case that it was the shard.

        Raises:
            EngineError: that happens all the time, and nothing else.
        """
        self._workers.remove(worker)
        bar.advance(worker.finished - worker.seen)
        self._deaths[number] += 1
        what = "before an engine was open" if number is None else f"at shard {self._plan.file_of(number).name}"
        logger.info("a worker died %s; another one takes its place", what)
        if self._deaths[number] >= ATTEMPTS:
            raise EngineError(
                f"{ATTEMPTS} workers died {what} ({one_line(_reason_of(error), 200)}); if memory is short, ask for "
                "fewer --workers or a smaller --batch-size; the same command goes on from the shards that are there"
            )
        if number is not None:
            self._todo.append(number)

    def _show_progress(self, bar: Progress) -> None:
        """Ask the workers how far they are, and show what they have answered."""
        for worker, number in self._busy.values():
            if number is None:
                continue
            if worker.asked is not None and self._ray.wait([worker.asked], timeout=0)[0]:
                with contextlib.suppress(self._ray.exceptions.RayError):  # it died, which its shard's answer says too
                    seen = max(self._ray.get(worker.asked), worker.seen)
                    bar.advance(seen - worker.seen)
                    worker.seen = seen
                worker.asked = None
            if worker.asked is None:
                worker.asked = worker.actor.progress.options(concurrency_group=WATCH).remote()


def _reason_of(error: Exception) -> str:
    """The telling line of what Ray says of a death, which are many."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "memory" in line.lower() or "exit" in line.lower()]
    return (telling or lines or [type(error).__name__])[0]


def _with_absolute_paths(request: SampleRequest) -> SampleRequest:
    """Workers have another current folder."""

    def absolute(path: Path | None) -> Path | None:
        return None if path is None else path.absolute()

    inputs = request.inputs
    return replace(
        request,
        bundle=request.bundle.absolute(),
        output=replace(request.output, path=request.output.path.absolute()),
        inputs=replace(inputs, noise=absolute(inputs.noise), table=absolute(inputs.table), init=absolute(inputs.init)),
        store=absolute(request.store),
        cluster=None,
    )
