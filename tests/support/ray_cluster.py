"""A small Ray cluster on 127.0.0.1, of processes of its own, that ends with the tests and leaves nothing behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from support.server import Caller
from support.waiting import await_true

# No report of use, no token in the home folder, no check of this machine's memory, and quick answers about deaths.
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "disabled",
    "RAY_memory_monitor_refresh_ms": "0",
    "RAY_worker_register_timeout_seconds": "120",
    "OMP_NUM_THREADS": "1",
}
HEAD = """
import sys, ray
ray.init("local", num_cpus=int(sys.argv[2]), include_dashboard=False, log_to_driver=False, _temp_dir=sys.argv[1],
         _node_ip_address="127.0.0.1", object_store_memory=100_000_000, logging_level="ERROR")
print(ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
"""

SERVE = """
import json, sys, ray
from ray import serve
from dit_serve.ray_serve import app
ray.init(sys.argv[1], log_to_driver=False, logging_level="ERROR")
serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[2])})
serve.run(app(json.loads(sys.argv[3])), name="dit", route_prefix="/")
print("ready", flush=True)
for line in sys.stdin:
    states = serve.status().applications["dit"].deployments["engines"].replica_states
    print("engines", states.get("RUNNING", 0), flush=True)
serve.shutdown()
"""


class Application(Caller):
    """An application of Serve, in a process of its own."""

    def __init__(self, port: int, process: subprocess.Popen[str]) -> None:
        super().__init__(port)
        self._process = process

    def count_engines(self) -> int:
        """Engines that are ready."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("count\n")
        self._process.stdin.flush()
        while not (line := self._process.stdout.readline()).startswith("engines "):
            assert line  # Ray prints what it sees dying
        return int(line.split()[1])


class RayCluster:
    """One node, which this class starts and ends.

    Attributes:
        address: ``HOST:PORT``.
    """

    def __init__(self, cpus: int = 4) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="ray", dir="/tmp"))  # a socket's path is short
        self._head = subprocess.Popen(
            [sys.executable, "-c", HEAD, str(self.folder), str(cpus)],
            env={**os.environ, **ENVIRONMENT},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._head.stdout is not None
        self.address = self._head.stdout.readline().strip()
        assert self.address, "no cluster"

    def workers(self, name: str) -> list[int]:
        """The processes of this cluster that Ray titles ``ray::NAME…``, by their number."""
        found = []
        for process in Path("/proc").iterdir():
            try:
                title = (process / "cmdline").read_bytes().decode(errors="replace")
                if title.startswith(f"ray::{name}") and str(self.folder) in self._environment_of(process):
                    found.append(int(process.name))
            except (OSError, ValueError):
                continue  # it has ended, or is no process
        return found

    def _environment_of(self, process: Path) -> str:
        """What says to which cluster a worker belongs: the command line of its parent, the raylet."""
        parent = (process / "stat").read_text().rpartition(")")[2].split()[1]
        return Path(f"/proc/{parent}/cmdline").read_bytes().decode(errors="replace")

    def kill_one(self, name: str) -> int:
        """Kill one process, as soon as there is one."""
        await_true(lambda: bool(self.workers(name)))
        process = self.workers(name)[0]
        os.kill(process, signal.SIGKILL)
        return process

    @contextmanager
    def serving(self, **arguments: Any) -> Iterator[Application]:
        """An application of Serve, on a port that was free, as ``serve run`` runs it."""
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        command = [sys.executable, "-c", SERVE, self.address, str(port), json.dumps(arguments)]
        with subprocess.Popen(
            command, env={**os.environ, **ENVIRONMENT}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n", "the application does not run"
            try:
                yield Application(port, process)
            finally:
                process.communicate("")

    def close(self) -> None:
        """End it, and remove its folder."""
        self._head.communicate("")
        end = time.monotonic() + 20
        while (
            time.monotonic() < end and shutil.rmtree(self.folder, ignore_errors=True) is None and self.folder.exists()
        ):
            time.sleep(0.1)
