"""``dit-serve`` in a process of its own: it says where it listens, drains on SIGTERM, and ends with 0."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from support.commands import ENTRIES, run_command
from support.waiting import SECONDS, await_true

pytest.importorskip("uvicorn", reason="pip install 'dit-export[serve]'")
pytest.importorskip("starlette")
pytest.importorskip("prometheus_client")


@contextmanager
def serving(bundle: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    code = f"import sys; sys.argv[0] = 'dit-serve'; {ENTRIES['dit-serve']}; main()"
    options = ("--engine", "onnxruntime", "--threads", "1", "--port", "0", *options)
    command = [sys.executable, "-c", code, os.fspath(bundle), *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            lines = []
            while not (found := re.search(r"serving on http://127\.0\.0\.1:(\d+)", lines[-1] if lines else "")):
                lines.append(process.stderr.readline() if process.stderr else "")
                assert lines[-1], lines
            yield process, int(found[1])
        finally:
            process.kill()


def ask(port: int, body: dict[str, Any]) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=SECONDS)
    try:
        connection.request("POST", "/generate", json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_running_images_finish(bundles: dict[str, Path], stop: signal.Signals) -> None:
    """Fails if a caller loses an image that is being made, new ones are taken, or the exit code is not 0."""
    with serving(bundles["fp32"]) as (process, port):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=SECONDS)
        body = {"labels": 1, "steps": 250, "sampler": "ddim", "stream": True, "previews": 10}
        connection.request("POST", "/generate", json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        assert answer.readline() == b"event: started\n"
        process.send_signal(stop)
        rest = answer.read().decode()
        answer.close()
        connection.close()
        assert rest.count("event: picture") == 1
        assert rest.endswith("event: done\ndata: {}\n\n")
        out, err = process.communicate(timeout=SECONDS)
        assert (process.returncode, out, err) == (0, "", "")
        with pytest.raises(OSError, match="refused"):
            ask(port, body)


def test_a_second_signal_ends_it_at_once(bundles: dict[str, Path]) -> None:
    with serving(bundles["fp32"]) as (process, port):
        found: list[Any] = []

        def wait() -> None:
            try:
                found.append(ask(port, {"labels": [1] * 8, "steps": 1000, "sampler": "ddim"}))
            except OSError as error:
                found.append(error)

        waiting = threading.Thread(target=wait)
        waiting.start()
        await_true(lambda: json.loads(info(port))["models"][0]["load"]["running"] == 8)
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGTERM)
        while process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(0.5)
            except subprocess.TimeoutExpired:
                continue
        waiting.join(SECONDS)
        assert found
        assert isinstance(found[0], OSError) or found[0][0] == 503


def info(port: int) -> bytes:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=SECONDS)
    try:
        connection.request("GET", "/info")
        return connection.getresponse().read()
    finally:
        connection.close()


def test_no_packet_of_an_answer_waits() -> None:
    """Nagle's algorithm is off: head and body of an answer are two packets, and the second would wait for 40 ms."""
    from dit_serve.serving import _listen

    with _listen("127.0.0.1", 0) as server, socket.create_connection(server.getsockname()):
        connection, _ = server.accept()
        with connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_what_cannot_be_served(bundles: dict[str, Path], tmp_path: Path) -> None:
    """One line each: a port that is taken, no bundle, two of one name, an engine that is unknown."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for options, message in (
            ((bundles["fp32"], "--port", port), f"127.0.0.1:{port}: cannot listen there"),
            ((tmp_path / "none.bundle",), "no such bundle"),
            ((bundles["fp32"], bundles["fp32"]), "two models of the name fp32"),
            ((bundles["fp32"], "--engine", "unknown"), "unknown"),
            ((bundles["fp32"], "--port", "70000"), "expected a port from 0 to 65535"),
        ):
            engine = () if "--engine" in options else ("--engine", "onnxruntime")
            done = run_command("dit-serve", *options, *engine)
            assert (done.returncode, done.stdout) == (1, "")
            assert message in done.stderr
            assert len(done.stderr.splitlines()) == 1
