"""A bundle on Ray Serve: ``serve run dit_serve.ray_serve:app bundle=my.bundle replicas=8 gpus=1``.

Two deployments. Engines own a device and a running batch each. The ingress, which needs no device, is the application
of ``dit-serve``: it checks requests, and sends their images one by one to engines. An engine that dies in the midst of
an image costs that image's caller an event ``retry``: the ingress sends the image to another one, and the same seed
gives the same image. ``ray`` is imported in functions alone.
"""

from __future__ import annotations

import asyncio
import importlib
import pickle
import time
import uuid
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from dit_runtime.backends.base import EngineInfo
from dit_runtime.bundle.reader import Bundle, open_bundle
from dit_runtime.core.errors import BundleError, EngineError
from dit_runtime.core.machine import count_cpus
from dit_runtime.core.text import one_line
from dit_runtime.pipeline import Pipeline, check_makes_images
from dit_runtime.samplers.schedule import Schedule
from dit_runtime.sampling.requests import ImageRequest
from dit_serve.batcher import Batcher
from dit_serve.images import RequestedImages
from dit_serve.jobs import Failed, Finished, QueueFullError, StoppingError
from dit_serve.ray_arguments import RayArguments, read_arguments
from dit_serve.remote import Call, Engines, RemoteBatcher, RemoteEngine, RemoteModel, Told
from dit_serve.serving import name_of, read_tables
from dit_serve.warm_up import open_pipeline, warm_up

if TYPE_CHECKING:
    from starlette.applications import Starlette

AHEAD = 4  # an engine is sent a batch and the AHEADth part of one: images that join as soon as there is room, and no
# more, since Serve sends images that come at once to engines without much balance
OPENING_SECONDS = 60.0  # for which a request waits until an engine is ready
HEALTH_SECONDS = 30.0  # for an image of one step, and between two steps
DRAIN_SECONDS = 300.0  # for images that are being made when an engine is to end
SCHEDULES = 64  # that an engine keeps, so that images with equal ones share them


def app(arguments: Mapping[str, Any]) -> Any:
    """Build the application of Ray Serve.

    Args:
        arguments: ``RayArguments`` by name, as text or numbers.

    Raises:
        SamplingError: an argument is unknown or not what it should be, a table does not fit the bundle, or the bundle
            is a policy's.
        BundleError: the bundle is missing or damaged.
        EngineError: the packages for serving are not installed.
    """
    try:
        import prometheus_client  # noqa: F401
        import starlette  # noqa: F401

        serve: Any = importlib.import_module("ray.serve")
    except ImportError as error:
        raise EngineError(f"{error.name} is not installed; pip install 'dit-export[ray]'") from error
    asked = read_arguments(arguments)
    bundle = open_bundle(asked.bundle, asked.store)
    check_makes_images(bundle)
    read_tables(asked.tables)
    options: dict[str, Any] = {"num_replicas": asked.replicas}
    if asked.max_replicas is not None:
        options = {
            "autoscaling_config": {
                "min_replicas": asked.replicas,
                "max_replicas": asked.max_replicas,
                "target_ongoing_requests": asked.batch_size,
            }
        }
    engines = serve.deployment(
        EngineReplica,
        name="engines",
        max_ongoing_requests=_sent_to_one(asked),
        ray_actor_options={"num_cpus": asked.cpus, "num_gpus": asked.gpus},
        graceful_shutdown_timeout_s=DRAIN_SECONDS,
        health_check_timeout_s=2 * HEALTH_SECONDS,
        logging_config={"enable_access_log": False},
        **options,
    ).bind(asked, bundle.digest)
    ingress = serve.deployment(
        serve.ingress()(Ingress),
        name="ingress",
        num_replicas=asked.ingress,
        max_ongoing_requests=10_000,  # its own queue says when it is full, with 429
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=DRAIN_SECONDS,
        logging_config={"enable_access_log": False},
    )
    return ingress.bind(asked, bundle.digest, engines)


class EngineReplica:
    """An engine with its batch, in a process of its own.

    Raises:
        BundleError: the bundle is missing or altered, or is another one than that which the application was built for.
        EngineError: the engine cannot be opened.
    """

    def __init__(self, asked: RayArguments, digest: str) -> None:
        threads = asked.threads or (0 if asked.gpus else asked.cpus)
        bundle = _open_same(asked, digest)
        self._pipe = open_pipeline(bundle, asked.engine, threads, asked.size, asked.precision)
        warm_up(self._pipe, asked.batch_size)  # every graph is loaded, and checked, before it is said to be ready
        self._batcher = Batcher(self._pipe, asked.batch_size, _sent_to_one(asked))
        self._batcher.__enter__()
        info = self._pipe.engine.info
        self._maker = {"engine": info.name, "threads": info.threads, "cpus": count_cpus()}
        self._key = uuid.uuid4().hex
        self._schedules: dict[bytes, Schedule] = {}
        self._seen = 0, 0, time.monotonic()  # images and steps at the last check of its health, and when they changed

    def describe(self) -> EngineInfo:
        """The facts of the engine."""
        return self._pipe.engine.info

    async def make(self, request: ImageRequest, seconds: float | None, preview_steps: int) -> AsyncIterator[Told]:
        """Make an image: its events, the last of which has the image or an error. Who leaves cancels it.

        Args:
            request: of a pipeline of the same bundle.
            seconds: until it must be finished.
            preview_steps: a preview after so many steps each.
        """
        request = replace(request, schedule=self._shared(request.schedule))
        try:
            made = RequestedImages(self._batcher, [request], seconds, preview_steps)
        except (QueueFullError, StoppingError) as error:  # the ingress asks another one
            yield self._tell(Failed(StoppingError(str(error))))
            return
        async with made:
            async for _, event in made.iterate_events():
                yield self._tell(event)

    async def check_health(self) -> None:
        """Called by Serve, which replaces an engine that fails: an idle one makes an image of one step.

        Raises:
            EngineError: no image can be made, or a step does not end.
            DiTError: of the image.
        """
        load = self._batcher.load()
        images, steps, since = self._seen
        if (load.images, load.steps) != (images, steps):
            self._seen = load.images, load.steps, time.monotonic()
        if load.images > images:
            return
        if load.running:
            if time.monotonic() - self._seen[2] > HEALTH_SECONDS:
                raise EngineError(f"no step has ended for {time.monotonic() - since:.0f} s")
            return
        async with RequestedImages(self._batcher, self._pipe.prepare([0], 0, steps=1), HEALTH_SECONDS, 0) as made:
            async for _, event in made.iterate_events():
                if isinstance(event, Failed):
                    raise event.error

    def _tell(self, event: Any) -> Told:
        return Told(event, self._maker if isinstance(event, Finished) else {}, self._key, self._batcher.load())

    def _shared(self, schedule: Schedule) -> Schedule:
        """The same schedule for all images with equal ones: they share the preparation of their steps."""
        if len(self._schedules) >= SCHEDULES:
            self._schedules.clear()
        return self._schedules.setdefault(pickle.dumps(schedule), schedule)


class Ingress:
    """The application of ``dit-serve`` before engines elsewhere."""

    def __init__(self, asked: RayArguments, digest: str, engines: Any) -> None:
        self._asked, self._digest, self._engines = asked, digest, engines
        self._opening: asyncio.Task[Starlette] | None = None

    def __serve_build_asgi_app__(self) -> Any:  # Serve's name
        """What Serve calls for an application that needs the deployment's handles."""

        async def answer(scope: Any, receive: Any, send: Any) -> None:  # uvicorn knows ASGI 3 by a function
            await self._answer(scope, receive, send)

        return answer

    async def _answer(self, scope: Any, receive: Any, send: Any) -> None:
        """One request, in the terms of ASGI. The first ones wait until an engine has said what it is."""
        from starlette.responses import JSONResponse

        if scope["type"] == "lifespan":
            await _answer_lifespan(receive, send)
            return
        if self._opening is None or (self._opening.done() and self._opening.exception() is not None):
            self._opening = asyncio.create_task(self._open())
        answer: Any
        try:
            answer = await asyncio.wait_for(asyncio.shield(self._opening), OPENING_SECONDS)
        except (asyncio.TimeoutError, TimeoutError):  # one class from Python 3.11 on
            answer = JSONResponse({"error": {"message": "no engine is ready yet; try again later"}}, 503)
        except Exception as error:  # noqa: BLE001  # Ray raises errors of any kind where no engine can be opened
            answer = JSONResponse({"error": {"message": one_line(error, 300)}}, 503)
        await answer(scope, receive, send)

    async def _open(self) -> Starlette:
        return _app_before(self._asked, self._digest, self._engines, await self._engines.describe.remote())


async def _answer_lifespan(receive: Any, send: Any) -> None:
    """There is nothing to do at the start and at the end."""
    while True:
        kind = (await receive())["type"]
        await send({"type": f"{kind}.complete"})
        if kind == "lifespan.shutdown":
            return


def _app_before(asked: RayArguments, digest: str, handle: Any, info: EngineInfo) -> Starlette:
    """The application of ``dit-serve``, whose images are made by engines of Ray."""
    from dit_serve.app import Server

    exceptions: Any = importlib.import_module("ray.exceptions")
    unavailable: Any = importlib.import_module("ray.serve.exceptions").ReplicaUnavailableError
    make = handle.options(method_name="make", stream=True)

    def call(request: ImageRequest, seconds: float | None, preview_steps: int) -> Call:
        found: Call = make.remote(request, seconds, preview_steps)
        return found

    lost = (
        *(exceptions.RayActorError, exceptions.WorkerCrashedError, exceptions.NodeDiedError),
        *(exceptions.ObjectLostError, exceptions.OutOfMemoryError, unavailable),
    )
    count = asked.max_replicas or asked.replicas
    sent = -(-_sent_to_one(asked) * count // asked.ingress)
    batcher = RemoteBatcher(Engines(call, lost, asked.batch_size, count, sent), asked.max_queue)
    pipe = Pipeline(_open_same(asked, digest), RemoteEngine(info), size=asked.size)
    model = RemoteModel(name_of(asked.bundle), pipe, batcher, read_tables(asked.tables))
    return Server([model], asked.hosts, asked.token, asked.timeout).app()


def _sent_to_one(asked: RayArguments) -> int:
    """Most images that an engine is sent and that are not finished."""
    return asked.batch_size + -(-asked.batch_size // AHEAD)


def _open_same(asked: RayArguments, digest: str) -> Bundle:
    """Raises BundleError where the bundle is not the one that the application was built for."""
    bundle = open_bundle(asked.bundle, asked.store)
    if bundle.digest != digest:
        raise BundleError(
            f"{asked.bundle}: is bundle {bundle.digest[:12]}… here, and this application serves {digest[:12]}…; copy "
            "the same bundle to every node, or run the application again"
        )
    return bundle
