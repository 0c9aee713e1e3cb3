"""The web application: JSON in, images or events out. Nothing in a request names a file."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hmac
import json
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from dit_runtime.core.errors import DiTError, SamplingError
from dit_runtime.core.version import __version__
from dit_runtime.samplers.by_name import samplers_for
from dit_runtime.sampling.requests import ImageRequest
from dit_serve.bodies import BODY_BYTES, GenerateBody, ImagesBody, read_body
from dit_serve.images import RequestedImages
from dit_serve.jobs import (
    DeadlineError,
    Event,
    Failed,
    Finished,
    Preview,
    QueueFullError,
    Retried,
    Started,
    StoppingError,
)
from dit_serve.metrics import Metrics
from dit_serve.model import ServedModel

HEALTH_SECONDS = 30.0  # for one image of one step
PAGE = Path(__file__).with_name("page.html")
# The page's own script and styles, this server, and images in the page itself: nothing from elsewhere.
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; connect-src 'self'; "
    "form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
)
LOCAL = ("127.0.0.1", "localhost", "[::1]")

# The status of an answer by its error; any other error of ours is a fault of the engine.
STATUSES: tuple[tuple[type[DiTError], int], ...] = (
    (QueueFullError, 429),
    (StoppingError, 503),
    (DeadlineError, 504),
    (SamplingError, 400),
)

Handler = Callable[[Request], Awaitable[Response]]
Format = Callable[[int, Event], tuple[str, Mapping[str, Any]] | None]


class Server:
    """The handlers of the application.

    Args:
        models: by their names; the first is the default.
        hosts: names under which the server may be asked, beside the local ones; ``*`` allows all.
        token: what ``Authorization: Bearer`` must hold; None asks for nothing.
        timeout: seconds for the images of a request that names none.
    """

    def __init__(
        self, models: Sequence[ServedModel], hosts: Sequence[str] = (), token: str | None = None, timeout: float = 300.0
    ) -> None:
        self._models = {model.name: model for model in models}
        self._default, self._token, self._timeout = models[0], token, timeout
        self._hosts = {*LOCAL, *hosts}
        self.metrics = Metrics(self._models)

    def app(self) -> Starlette:
        """The application."""
        routes = [
            Route("/", self._guarded(self.page, open_to_all=True), methods=["GET"]),
            Route("/generate", self._guarded(self.generate), methods=["POST"]),
            Route("/v1/images/generations", self._guarded(self.images), methods=["POST"]),
            Route("/v1/models", self._guarded(self.models), methods=["GET"]),
            Route("/info", self._guarded(self.info), methods=["GET"]),
            Route("/metrics", self._guarded(self.show_metrics), methods=["GET"]),
            Route("/health", self._guarded(self.health, open_to_all=True), methods=["GET"]),
        ]
        return Starlette(routes=routes)

    async def page(self, request: Request) -> Response:
        """``GET /``: the page, which asks for a token itself where the server asks for one."""
        return HTMLResponse(PAGE.read_text(encoding="utf-8"), headers={"Content-Security-Policy": POLICY})

    async def generate(self, request: Request) -> Response:
        """``POST /generate``: one image as PNG, several as JSON, or events."""
        body = read_body(GenerateBody, await _content(request))
        model = self._model(body.model, body.image_size)
        requests = body.prepare(model.pipe, model.tables)
        made = self._submit(model, requests, body)

        def event(index: int, event: Event) -> tuple[str, Mapping[str, Any]] | None:
            label, seed = requests[index].labels, requests[index].seed
            about = {"index": index, "seed": seed, "label": {str(key): value for key, value in label.items()}}
            if isinstance(event, Started):
                return "started", about
            if isinstance(event, Retried):
                return "retry", {**about, "attempt": event.attempt}
            if isinstance(event, Preview):
                image = _base64(model.png(event.image))
                return "preview", {**about, "step": event.step, "steps": event.steps, "image": image}
            if isinstance(event, Finished):
                image = _base64(model.png(event.image, requests[index], body.eta, event.batches))
                return "picture", {**about, "seconds": event.seconds, "image": image}
            return "error", {**about, "status": _status_of(event.fault), "message": str(event.error)}

        if body.stream:
            return _stream(made, event, last=("done", {}))
        finished = await _await_images(request, made)
        if len(finished) == 1 and "application/json" not in request.headers.get("accept", ""):
            content = await asyncio.to_thread(model.png, finished[0].image, requests[0], body.eta, finished[0].batches)
            return Response(content, media_type="image/png")
        told = [await asyncio.to_thread(event, index, each) for index, each in enumerate(finished)]
        return JSONResponse({"images": [data for _, data in filter(None, told)]})

    async def images(self, request: Request) -> Response:
        """``POST /v1/images/generations``, as OpenAI's clients call it."""
        asked = read_body(ImagesBody, await _content(request))
        model = self._model(asked.model, asked.image_size)
        body = asked.as_generate(model.pipe)
        requests = body.prepare(model.pipe, model.tables)
        made = self._submit(model, requests, body)
        created = int(time.time())
        height, width = model.pipe.manifest.image_size
        about = {"created_at": created, "size": f"{width}x{height}", "output_format": "png"}
        about |= {"quality": "auto", "background": "opaque"}
        seen = dict.fromkeys(range(len(requests)), 0)

        def event(index: int, event: Event) -> tuple[str, Mapping[str, Any]] | None:
            if isinstance(event, Started | Retried):
                return None
            if isinstance(event, Failed):
                return "error", {"type": "error", "error": _error_body(event.fault)["error"]}
            final = isinstance(event, Finished)
            name = "image_generation.completed" if final else "image_generation.partial_image"
            if isinstance(event, Finished):
                png = model.png(event.image, requests[index], 0.0, event.batches)
            else:
                png = model.png(event.image)
            told = {"type": name, "b64_json": _base64(png), **about}
            if not final:
                told["partial_image_index"] = seen[index]
                seen[index] += 1
            return name, told

        if body.stream:
            return _stream(made, event, last=None)
        finished = await _await_images(request, made)
        files = [
            await asyncio.to_thread(model.png, each.image, asked_image, 0.0, each.batches)
            for each, asked_image in zip(finished, requests, strict=True)
        ]
        data = [{"b64_json": _base64(file)} for file in files]
        return JSONResponse({"created": created, "data": data, "size": about["size"], "output_format": "png"})

    async def models(self, request: Request) -> Response:
        """``GET /v1/models``."""
        data = [{"id": name, "object": "model", "created": 0, "owned_by": "dit-export"} for name in self._models]
        return JSONResponse({"object": "list", "data": data})

    async def info(self, request: Request) -> Response:
        """``GET /info``: what is served, by which engine, and how busy it is."""
        return JSONResponse({"version": __version__, "models": [_describe(each) for each in self._models.values()]})

    async def health(self, request: Request) -> Response:
        """``GET /health``: whether every model makes an image, of one step."""
        for model in self._models.values():
            requests = model.pipe.prepare([0], 0, steps=1)
            try:
                made = RequestedImages(model.batcher, requests, HEALTH_SECONDS, 0)
            except QueueFullError:
                continue  # it is busy making images
            await _await_images(request, made)
        return JSONResponse({"status": "ok"})

    async def show_metrics(self, request: Request) -> Response:
        """``GET /metrics``, in Prometheus' text format."""
        content, kind = self.metrics.text()
        return Response(content, media_type=kind)

    def _submit(self, model: ServedModel, requests: Sequence[ImageRequest], body: GenerateBody) -> RequestedImages:
        previews = body.previews if body.stream else 0
        return RequestedImages(model.batcher, requests, body.timeout or self._timeout, previews)

    def _model(self, name: str | None, size: tuple[int, int] | None) -> ServedModel:
        alone = len({each.pipe.bundle.digest for each in self._models.values()}) == 1
        if name is None or (name not in self._models and alone):
            model = self._default  # OpenAI's clients must name a model
        elif name not in self._models:
            raise SamplingError(f"model {name!r:.80}: expected one of {', '.join(self._models)}")
        else:
            model = self._models[name]
        if size in (None, model.pipe.manifest.image_size):
            return model
        return self._model_at(model, size)

    def _model_at(self, model: ServedModel, size: tuple[int, int]) -> ServedModel:
        """A model at another of its sizes, which is a model of its own. Raises SamplingError where there is none."""
        found = {
            each.pipe.manifest.image_size: each
            for each in self._models.values()
            if each.pipe.bundle.digest == model.pipe.bundle.digest
        }
        if size not in found:
            known = ", ".join(f"{height}x{width}" for height, width in found)
            raise SamplingError(
                f"images of height {size[0]} and width {size[1]}: this server makes {known} (height x width) of "
                f"{model.name}"
            )
        return found[size]

    def _guarded(self, handler: Handler, open_to_all: bool = False) -> Handler:
        """A handler with its checks before it, and every error as JSON; each answer is counted."""

        async def guarded(request: Request) -> Response:
            start = time.perf_counter()
            try:
                refusal = self._refusal(request, open_to_all)
                answer = refusal if refusal is not None else await handler(request)
            except DiTError as error:
                answer = JSONResponse(_error_body(error), _status_of(error), _headers_for(error))
            except ClientDisconnect:
                answer = PlainTextResponse("", 499)
            self.metrics.count(request.url.path, answer.status_code, time.perf_counter() - start)
            return answer

        return guarded

    def _refusal(self, request: Request, open_to_all: bool) -> Response | None:
        """The answer to a request that is not heard: another host's page, no token, or no JSON."""
        host = request.headers.get("host", "")
        name = host if host.endswith("]") else host.rpartition(":")[0] or host
        if "*" not in self._hosts and name not in self._hosts:
            return _refuse(
                403, f"host {name!r:.80}: this server does not answer under that name; see dit-serve --hosts"
            )
        if self._token is not None and not open_to_all:
            given = request.headers.get("authorization", "")
            if not hmac.compare_digest(given.encode(), f"Bearer {self._token}".encode()):
                return _refuse(401, "expected the header Authorization: Bearer TOKEN", {"WWW-Authenticate": "Bearer"})
        if request.method == "POST":
            kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
            if kind != "application/json":
                return _refuse(415, f"content type {kind!r:.80}: expected application/json")
        return None


async def _content(request: Request) -> bytes:
    """A request's body. Raises SamplingError above ``BODY_BYTES``."""
    content = b""
    async for part in request.stream():
        content += part
        if len(content) > BODY_BYTES:
            raise SamplingError(f"the request's body has more than {BODY_BYTES} bytes; ask for fewer images at once")
    return content


async def _await_images(request: Request, made: RequestedImages) -> list[Finished]:
    """All images of a request; who hangs up cancels them.

    Raises:
        DiTError: of the first image that failed.
        ClientDisconnect: nobody waits any more.
    """

    async def collect() -> list[Finished]:
        found: dict[int, Finished] = {}
        async for index, event in made.iterate_events():
            if isinstance(event, Failed):
                raise event.fault
            if isinstance(event, Finished):
                found[index] = event
        return [found[index] for index in sorted(found)]

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    async with made:
        collecting, watching = asyncio.create_task(collect()), asyncio.create_task(watch())
        try:
            await asyncio.wait((collecting, watching), return_when=asyncio.FIRST_COMPLETED)
            if not collecting.done():
                raise ClientDisconnect
            return collecting.result()
        finally:
            for task in (collecting, watching):
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError, DiTError):
                    await task


def _stream(made: RequestedImages, name: Format, last: tuple[str, Mapping[str, Any]] | None) -> Response:
    """Server-sent events of a request's images; who hangs up cancels them."""

    async def events() -> AsyncIterator[str]:
        async with made:
            async for index, event in made.iterate_events():
                if (told := await asyncio.to_thread(name, index, event)) is not None:
                    yield _event(*told)
            if last is not None:
                yield _event(*last)

    return StreamingResponse(events(), media_type="text/event-stream", headers={"Cache-Control": "no-store"})


def _event(name: str, data: Mapping[str, Any]) -> str:
    return f"event: {name}\ndata: {json.dumps(data)}\n\n"


def _describe(model: ServedModel) -> dict[str, Any]:
    manifest, info = model.pipe.manifest, model.pipe.engine.info
    return {
        "name": model.name,
        "model": manifest.source.name,
        "bundle": model.pipe.bundle.digest,
        "precision": manifest.precision.name,
        "engine": info.name,
        "image_size": list(manifest.image_size),
        "classes": manifest.model.classes,
        "class_names": list(manifest.class_names),
        "samplers": [*samplers_for(manifest.diffusion), *model.tables],
        "tables": {name: table.steps for name, table in model.tables.items()},
        "defaults": asdict(manifest.defaults),
        "load": asdict(model.batcher.load()),
    }


def _status_of(error: DiTError) -> int:
    return next((status for kind, status in STATUSES if isinstance(error, kind)), 500)


def _headers_for(error: DiTError) -> dict[str, str]:
    return {"Retry-After": str(max(1, math.ceil(error.seconds)))} if isinstance(error, QueueFullError) else {}


def _error_body(error: DiTError) -> dict[str, Any]:
    status = _status_of(error)
    kind = "invalid_request_error" if status == 400 else "rate_limit_error" if status == 429 else "server_error"
    return {"error": {"message": str(error), "type": kind, "param": None, "code": None}}


def _refuse(status: int, message: str, headers: Mapping[str, str] | None = None) -> Response:
    body = {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": None}}
    return JSONResponse(body, status, headers)


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode("ascii")
