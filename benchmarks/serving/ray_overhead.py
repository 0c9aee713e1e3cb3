"""What Ray Serve adds to a request: its time over HTTP, less that of the same image from a batcher in this process.

    python benchmarks/serving/ray_overhead.py my.bundle

One caller asks for one image of one step at a time, at an application with one ingress and one engine on a cluster of
this machine, on a new connection and on one that is kept, and at a batcher here on as many threads, in turns. The
batcher's time includes the PNG file. Printed are medians and 95th percentiles in ms, also of the pairs' differences.
"""

from __future__ import annotations

import argparse
import http.client
import io
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dit_runtime import Pipeline
from dit_runtime.core.replace import replace_file
from dit_serve.jobs import Failed, Finished, Job
from dit_serve.model import Model
from dit_serve.ray_serve import app

TEXTS = {
    "batcher": "batcher in this process",
    "new": "Ray Serve, a new connection",
    "kept": "Ray Serve, a connection that is kept",
    "added_new": "added, a new connection",
    "added_kept": "added, a connection that is kept",
}


def image_here(model: Model, seed: int) -> bytes:
    """An image from the batcher, as PNG."""
    (request,) = model.pipe.prepare([0], seed, steps=1)
    found: list[Finished] = []
    done = threading.Event()

    def notify(event: Any) -> None:
        if isinstance(event, Failed):
            raise event.error
        if isinstance(event, Finished):
            found.append(event)
            done.set()

    model.batcher.submit([Job(request, notify)])
    done.wait()
    return model.png(found[0].image, request)


def image_there(connection: http.client.HTTPConnection, seed: int) -> bytes:
    """An image from the application; a connection that is closed is opened."""
    body = json.dumps({"labels": 0, "seeds": seed, "steps": 1})
    connection.request("POST", "/generate", body, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    content = answer.read()
    assert answer.status == 200, content
    return content


def difference_of(first: bytes, second: bytes) -> int:
    images = [np.asarray(Image.open(io.BytesIO(each))).astype(int) for each in (first, second)]
    return int(np.abs(images[0] - images[1]).max())


def measure(model: Model, port: int, count: int, warm: int) -> dict[str, Any]:
    kept = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    fresh = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    makers: dict[str, Callable[[int], bytes]] = {
        "batcher": lambda seed: image_here(model, seed),
        "new": lambda seed: image_there(fresh, seed),
        "kept": lambda seed: image_there(kept, seed),
    }
    times: dict[str, list[float]] = {name: [] for name in makers}
    largest = 0
    for seed in range(-warm, count):
        images = []
        for name, make in makers.items():
            start = time.perf_counter()
            images.append(make(seed))
            if seed >= 0:
                times[name].append((time.perf_counter() - start) * 1e3)
        fresh.close()
        largest = max(largest, *(difference_of(images[0], each) for each in images[1:]))
    kept.close()
    rows = {name: np.array(each) for name, each in times.items()}
    rows |= {f"added_{name}": rows[name] - rows["batcher"] for name in ("new", "kept")}
    shown = {name: {"p50": float(np.median(row)), "p95": float(np.quantile(row, 0.95))} for name, row in rows.items()}
    return {"requests": count, "largest_difference": largest, "ms": shown}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--engine", default="onnxruntime")
    parser.add_argument("--requests", type=int, default=300)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0"}
    import ray
    from ray import serve

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(app({"bundle": str(args.bundle), "engine": args.engine}), name="dit", route_prefix="/")
    model = Model("here", Pipeline(args.bundle, args.engine, threads=1), 8, 64)
    with model.batcher:
        found = {"engine": model.pipe.engine.info.name, "ray": ray.__version__}
        found |= measure(model, port, args.requests, 20) | {"cpus": os.cpu_count(), "load": os.getloadavg()[0]}
    serve.shutdown()
    ray.shutdown()
    print("| ms of one image of one step | median | 95th percentile |")
    print("|---|---|---|")
    for name, text in TEXTS.items():
        print(f"| {text} | {found['ms'][name]['p50']:.1f} | {found['ms'][name]['p95']:.1f} |")
    print(f"largest difference: {found['largest_difference']}")
    if args.output:
        with replace_file(args.output) as file:
            file.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
