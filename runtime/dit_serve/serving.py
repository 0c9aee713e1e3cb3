"""Run the application until it is told to stop: bundles opened, batchers started, signals answered."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dit_runtime.bundle.reader import name_for_size, open_bundle
from dit_runtime.core.errors import EngineError, OutputError, SamplingError
from dit_runtime.samplers.by_name import SAMPLERS
from dit_runtime.samplers.schedule import Schedule, read_table

if TYPE_CHECKING:
    import uvicorn

    from dit_serve.model import Model
    from dit_serve.request import ServeRequest

DRAIN_SECONDS = 300.0  # for images that are being made when the server is told to stop
STOPS = (signal.SIGINT, signal.SIGTERM)


def serve(request: ServeRequest, announce: Callable[[str], None] = lambda line: None) -> None:
    """Serve until SIGTERM or SIGINT; images that were asked for before that are finished.

    Args:
        request: what to serve, and where.
        announce: called with each line that whoever started the server may want to read.

    Raises:
        EngineError: the packages for serving are not installed, or an engine cannot be opened.
        BundleError: a bundle is missing or altered.
        OutputError: the address cannot be listened on.
    """
    try:
        import prometheus_client  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn
    except ImportError as error:
        raise EngineError(f"{error.name} is not installed; pip install 'dit-export[serve]'") from error
    from dit_serve.app import Server
    from dit_serve.warm_up import warm_up

    models = open_models(request)
    sockets = [_listen(request.host, request.port)]
    host, port = sockets[0].getsockname()[:2]
    app = Server(models, (*request.hosts, request.host), request.token, request.timeout).app()
    config = uvicorn.Config(app, log_level="warning", access_log=False, lifespan="off", server_header=False)
    with contextlib.ExitStack() as stack:
        for model in models:
            warm_up(model.pipe, request.batch_size)
            stack.enter_context(model.batcher)
            announce(f"{model.name}: {model.pipe.engine.info.name}, batches of {request.batch_size}")
        announce(f"serving on http://{f'[{host}]' if ':' in host else host}:{port}; Ctrl-C stops")
        asyncio.run(_run(uvicorn.Server(config), models, sockets))


def open_models(request: ServeRequest) -> list[Model]:
    """The bundles of a request, each at each of its sizes, which is a model of its own.

    Raises:
        BundleError, EngineError, ParityError, SamplingError: as ``serve``.
    """
    from dit_serve.model import Model
    from dit_serve.warm_up import open_pipeline

    models: list[Model] = []
    tables = read_tables(request.tables)
    for path, size in itertools.product(request.bundles, request.sizes or (None,)):
        pipe = open_pipeline(open_bundle(path, request.store), request.engine, request.threads, size, request.precision)
        name = name_of(path)
        if size is not None and size != request.sizes[0]:
            name = name_for_size(name, size)
        if name in {model.name for model in models}:
            raise SamplingError(f"{path}: two models of the name {name}; rename one folder, or leave a size out")
        models.append(Model(name, pipe, request.batch_size, request.most_waiting, tables))
    return models


def read_tables(paths: Sequence[Path]) -> dict[str, Schedule]:
    """Sampler tables by the names of their files, which no sampler may have."""
    tables: dict[str, Schedule] = {}
    for path in paths:
        if path.stem in SAMPLERS or path.stem in tables:
            raise SamplingError(f"{path}: {path.stem} is the name of another sampler here; rename the file")
        tables[path.stem] = read_table(path)
    return tables


def name_of(path: Path) -> str:
    """A bundle's name in requests: its folder's."""
    return path.resolve().name.removesuffix(".bundle")


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listening = socket.create_server((host, port), family=family, backlog=128)
        # asyncio sets it only for sockets that name their protocol. Without it the second packet of an answer waits for
        # the caller's system to confirm the first, which takes it 40 ms.
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return listening
    except OSError as error:
        raise OutputError(
            f"{host}:{port}: cannot listen there ({error.strerror or error}); choose another --port or --host"
        ) from error


async def _run(server: uvicorn.Server, models: Sequence[Model], sockets: list[socket.socket]) -> None:
    """Run uvicorn's server; the first signal lets it drain, the second ends it at once."""
    told = 0

    def stop() -> None:
        nonlocal told
        told += 1
        server.should_exit = True
        server.force_exit = told > 1
        if told > 1:
            for model in models:
                model.batcher.stop(finish=False, timeout=0)

    loop = asyncio.get_running_loop()
    for number in STOPS:
        loop.add_signal_handler(number, stop)
    server.capture_signals = _leave_signals  # type: ignore[method-assign]  # it would raise them again at its end
    await server.serve(sockets=sockets)
    for model in models:
        await asyncio.to_thread(model.batcher.stop, told < 2, DRAIN_SECONDS)


@contextlib.contextmanager
def _leave_signals() -> Iterator[None]:
    yield
