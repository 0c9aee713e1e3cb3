"""Triton Inference Server on the CPU, from the wheel nvidia-pytriton in an environment of its own.

``make build/triton/installed`` makes the environment: the wheel needs numpy 1.26. Its Python runs the models and, as
``triton_client.py``, the clients.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.commands import ROOT
from support.waiting import SECONDS, await_true

ENVIRONMENT = ROOT / "build" / "triton"


def packages() -> Path:
    """Where the environment's packages are; skips the test where it was not made."""
    found = [*ENVIRONMENT.glob("lib/python3.*/site-packages/pytriton")]
    if not (ENVIRONMENT / "installed").is_file() or not found:
        pytest.skip("Triton is not installed: make build/triton/installed, where there is a wheel of nvidia-pytriton")
    return found[0].parent


class Triton:
    """A server with a model repository, whose models are loaded one by one. A context manager."""

    def __init__(self, folder: Path, repository: Path) -> None:
        self._site, self._folder, self.repository = packages(), folder, repository
        self.http, self.grpc, self.metrics_port = (free_port() for _ in range(3))

    def __enter__(self) -> Triton:
        server = self._site / "pytriton" / "tritonserver"
        version = self._site.parent.name.removeprefix("python")
        backends = self._folder / "backends"
        shutil.copytree(server / "backends", backends)
        stub = server / "python_backend_stubs" / version / "triton_python_backend_stub"
        shutil.copy2(stub, backends / "python")  # where Triton looks for it, for this version of Python
        libraries = (str(self._site / "nvidia_pytriton.libs"), sysconfig.get_config_var("LIBDIR"))
        environment = {
            **os.environ,
            "LD_LIBRARY_PATH": os.pathsep.join(libraries),
            "PATH": os.pathsep.join((str(ENVIRONMENT / "bin"), os.environ["PATH"])),  # whose python3 the stub takes
            "OMP_NUM_THREADS": "1",
        }
        ports = [f"--http-port={self.http}", f"--grpc-port={self.grpc}", f"--metrics-port={self.metrics_port}"]
        command = [
            *(os.fspath(server / "bin" / "tritonserver"), f"--model-repository={self.repository}"),
            *(f"--backend-directory={backends}", "--model-control-mode=explicit", *ports),
            *("--http-address=127.0.0.1", "--grpc-address=127.0.0.1", "--metrics-address=127.0.0.1"),
        ]
        self.log = self._folder / "log"
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )
        await_true(self._is_ready)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):  # after a stub was killed, it waits for half a minute
            self._process.wait(5)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # with its stubs
        self._process.wait(SECONDS)

    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def _is_ready(self) -> bool:
        assert not self.has_ended(), self.log.read_text(errors="replace")
        with contextlib.suppress(OSError):
            return self.ask("/v2/health/ready")[0] == 200
        return False

    def ask(self, path: str, body: Any = None, timeout: float = SECONDS, port: int | None = None) -> tuple[int, str]:
        """Status and content of an answer; a GET without a body."""
        connection = http.client.HTTPConnection("127.0.0.1", port or self.http, timeout=timeout)
        try:
            content = None if body is None else json.dumps(body).encode()
            connection.request("GET" if body is None else "POST", path, content)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()
        finally:
            connection.close()

    def load(self, model: str) -> tuple[int, str]:
        return self.ask(f"/v2/repository/models/{model}/load", {})

    def unload(self, model: str) -> None:
        assert self.ask(f"/v2/repository/models/{model}/unload", {})[0] == 200

    @contextlib.contextmanager
    def loaded(self, *models: str) -> Iterator[None]:
        for model in models:
            assert self.load(model) == (200, "")
        yield
        for model in models:
            self.unload(model)

    def generate(self, model: str, timeout: float = SECONDS, **body: Any) -> tuple[int, Any]:
        """One image by Triton's HTTP endpoint of generated answers."""
        status, content = self.ask(f"/v2/models/{model}/generate", {"format": "png", **body}, timeout)
        return status, json.loads(content)

    def figures(self, name: str) -> dict[str, float]:
        """A metric of each instance."""
        _, text = self.ask("/metrics", port=self.metrics_port)
        lines = re.findall(rf'^{name}{{.*?instance="(.*?)".*?}} (\S+)$', text, re.MULTILINE)
        return {instance: float(value) for instance, value in lines}

    def run_client(self, steps: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
        """What ``triton_client.py`` got; arrays as arrays."""
        command = [os.fspath(ENVIRONMENT / "bin" / "python"), os.fspath(Path(__file__).with_name("triton_client.py"))]
        addresses = {"http": f"127.0.0.1:{self.http}", "grpc": f"127.0.0.1:{self.grpc}"}
        done = subprocess.run(
            [*command, os.fspath(folder)],
            input=json.dumps({**addresses, "steps": steps}),
            capture_output=True,
            text=True,
            check=False,
            timeout=SECONDS,
        )
        assert done.returncode == 0, done.stderr
        found: list[dict[str, Any]] = json.loads(done.stdout)
        for each in found:
            for answer in each["answers"]:
                answer |= dict(np.load(folder / answer.pop("file"))) if "file" in answer else {}
        return found


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port: int = listening.getsockname()[1]
        return port
