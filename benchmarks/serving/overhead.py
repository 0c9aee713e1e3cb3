"""What a request costs beyond the engine's own work: in the batch loop, and over HTTP.

    python benchmarks/serving/overhead.py my.bundle --output benchmarks/serving/overhead.json

One caller asks for one image of a few steps, again and again, in turn from: the pipeline in this process; the batch
loop in this process; and ``dit-serve`` in a process of its own, for a PNG file, JSON and events, over a connection that
stays open and over one for each request. Printed are the medians of the time, and of the CPU time of whoever makes the
image, and what both are beyond the pipeline. On a machine with other work the CPU time is the figure to look at.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import queue
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dit_runtime import Pipeline
from dit_runtime.core.machine import read_processor
from dit_runtime.core.replace import replace_file
from dit_serve.batcher import Batcher
from dit_serve.jobs import Finished, Job

STEPS = 4
WARM = 20
HERE = ("pipeline", "batch loop")  # in the process of the caller


@contextmanager
def serving(bundle: Path, engine: str, threads: int) -> Iterator[tuple[int, int]]:
    """``dit-serve`` in a process of its own; gives its port and its number."""
    code = "from dit_serve.command import main; main()"
    command = [sys.executable, "-c", code, os.fspath(bundle), "--port=0", f"--engine={engine}", f"--threads={threads}"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            while not (found := re.search(r"serving on http://127\.0\.0\.1:(\d+)", line := process.stderr.readline())):
                assert line, "dit-serve ended"
            yield int(found[1]), process.pid
        finally:
            process.send_signal(signal.SIGTERM)


def cpu_seconds(process: int) -> float:
    """CPU time of all threads of a process, which Linux counts in ns."""
    threads = Path(f"/proc/{process}/task").glob("*/schedstat")
    return sum(int(thread.read_text().split()[0]) for thread in threads) / 1e9


class Caller:
    """Asks a server. ``kept`` is whether its connection stays open."""

    def __init__(self, port: int, kept: bool = True, headers: dict[str, str] | None = None, **body: Any) -> None:
        self._port, self._kept, self._connection = port, kept, None
        self._headers = {"Content-Type": "application/json", **(headers or {})}
        self._body = {"steps": STEPS, **body}

    def __call__(self, seed: int) -> None:
        connection = self._connection or http.client.HTTPConnection("127.0.0.1", self._port)
        content = json.dumps({"labels": seed % 10, "seeds": seed, **self._body})
        connection.request("POST", "/generate", content, self._headers)
        answer = connection.getresponse()
        content = answer.read()
        assert answer.status == 200, content
        if self._kept:
            self._connection = connection
        else:
            connection.close()


def measure(bundle: Path, engine: str, threads: int, count: int) -> dict[str, Any]:
    """The median ms of every way to ask, taken in turn."""
    pipe = Pipeline(bundle, engine, threads)
    looped = Pipeline(bundle, engine, threads)
    events: queue.Queue[Any] = queue.Queue()
    with Batcher(looped) as batcher, serving(bundle, engine, threads) as (port, server):

        def loop(seed: int) -> None:
            (image,) = looped.prepare([seed % 10], seed, steps=STEPS)
            batcher.submit([Job(image, events.put)])
            while not isinstance(events.get(), Finished):
                pass

        ways: dict[str, Callable[[int], Any]] = {
            "pipeline": lambda seed: pipe([seed % 10], seed, steps=STEPS),
            "batch loop": loop,
            "PNG": Caller(port),
            "PNG, a connection each": Caller(port, kept=False),
            "JSON": Caller(port, headers={"Accept": "application/json"}),
            "events": Caller(port, stream=True),
        }
        times: dict[str, list[float]] = {way: [] for way in ways}
        works: dict[str, list[float]] = {way: [] for way in ways}
        for seed in range(WARM + count):
            for way, ask in ways.items():
                process = os.getpid() if way in HERE else server
                start, before = time.perf_counter(), cpu_seconds(process)
                ask(seed)
                times[way].append(time.perf_counter() - start)
                works[way].append(cpu_seconds(process) - before)
    median, cpu = (
        {way: statistics.median(each[WARM:]) * 1e3 for way, each in found.items()} for found in (times, works)
    )
    rows = [
        {
            "way": way,
            "ms": median[way],
            "beyond_ms": median[way] - median["pipeline"],
            "cpu_ms": cpu[way],
            "cpu_beyond_ms": cpu[way] - cpu["pipeline"],
        }
        for way in ways
    ]
    return {
        "engine": pipe.engine.info.name,
        "processor": read_processor().model,
        "image_size": list(pipe.manifest.image_size),
        "steps": STEPS,
        "requests": count,
        "load_average": os.getloadavg()[0],
        "rows": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--engine", default="onnxruntime")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--requests", type=int, default=300)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    found = measure(args.bundle, args.engine, args.threads, args.requests)
    print("| way | ms | beyond the pipeline | CPU ms | beyond the pipeline |")
    print("|---|---|---|---|---|")
    for row in found["rows"]:
        print(f"| {row['way']} |" + "".join(f" {value:.2f} |" for key, value in row.items() if key != "way"))
    if args.output:
        with replace_file(args.output) as file:
            file.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
