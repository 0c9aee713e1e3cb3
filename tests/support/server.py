"""A server in a thread of this process, and what its callers expect."""

from __future__ import annotations

import asyncio
import base64
import http.client
import io
import json
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn
from PIL import Image

from dit_runtime import Pipeline
from dit_runtime.samplers.schedule import Schedule
from dit_serve.app import Server
from dit_serve.model import Model
from support.waiting import SECONDS

TOKEN = "a token"


class Caller:
    """Asks a server of this machine.

    Attributes:
        port: where the server listens.
    """

    def __init__(self, port: int) -> None:
        self.port = port

    def ask(self, path: str, body: Any = None, **headers: str) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=SECONDS)
        content = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"} | {
            name.replace("_", "-"): text for name, text in headers.items()
        }
        try:
            connection.request("GET" if body is None else "POST", path, content, headers)
            answer = connection.getresponse()
            return answer.status, {key.lower(): value for key, value in answer.getheaders()}, answer.read()
        finally:
            connection.close()

    def ask_json(self, path: str, body: Any = None, **headers: str) -> Any:
        status, _, content = self.ask(path, body, Accept="application/json", **headers)
        assert status == 200, content
        return json.loads(content)

    def events(self, path: str, body: Any) -> list[tuple[str, Any]]:
        status, headers, content = self.ask(path, body)
        assert status == 200, content
        assert headers["content-type"].startswith("text/event-stream")
        found = []
        for block in content.decode().strip().split("\n\n"):
            name, data = block.split("\n")
            found.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
        return found


class Running(Caller):
    """A server in a thread of this process."""

    def __init__(
        self,
        bundle: Path,
        tables: Mapping[str, Schedule] | None = None,
        models: Sequence[Model] = (),
        **options: Any,
    ) -> None:
        self.models = models or [
            Model("tiny", Pipeline(bundle, "onnxruntime", threads=1), batch_size=4, most_waiting=8, tables=tables)
        ]
        self.model = self.models[0]
        self.socket = socket.create_server(("127.0.0.1", 0))
        super().__init__(self.socket.getsockname()[1])
        app = Server(self.models, **options).app()
        self.server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False, lifespan="off"))
        self.thread = threading.Thread(target=lambda: asyncio.run(self.server.serve(sockets=[self.socket])))

    def __enter__(self) -> Running:
        for model in self.models:
            model.batcher.__enter__()
        self.thread.start()
        while not self.server.started:
            time.sleep(0.005)
        return self

    def __exit__(self, *_: object) -> None:
        self.server.should_exit = True
        self.thread.join(SECONDS)
        for model in self.models:
            model.batcher.stop(finish=False)
        self.socket.close()
        assert not self.thread.is_alive()


def pixels(png: bytes | str) -> Any:
    content = base64.b64decode(png) if isinstance(png, str) else png
    return np.asarray(Image.open(io.BytesIO(content)))


def expected(bundles: dict[str, Path], labels: list[Any], seeds: Any, **settings: Any) -> Any:
    return Pipeline(bundles["fp32"], "onnxruntime", threads=1)(labels, seeds, **settings)
