"""A small Ray cluster on 127.0.0.1, of processes of its own, that ends with the tests and leaves nothing behind."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

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

    def close(self) -> None:
        """End it, and remove its folder."""
        self._head.communicate("")
        end = time.monotonic() + 20
        while (
            time.monotonic() < end and shutil.rmtree(self.folder, ignore_errors=True) is None and self.folder.exists()
        ):
            time.sleep(0.1)
