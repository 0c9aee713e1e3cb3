"""Ray, with a small cluster of its own: whoever is killed, every image is made once, and is the image made alone."""

from __future__ import annotations

import http.client
import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("ray", reason="pip install 'dit-export[ray]'")
pytest.importorskip("grpc")
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("starlette")
pytest.importorskip("prometheus_client")

from support.commands import ENTRIES
from support.ray_cluster import ENVIRONMENT, Application, RayCluster
from support.sample_command import ENGINE, made
from support.server import expected, pixels
from support.shards import check_equal_to_plain, times
from support.waiting import SECONDS, await_true

pytestmark = pytest.mark.slow  # a cluster of processes, which import this package once each

# Ten shards of four images.
SETTINGS = ("--labels", "all", "--count", 4, "--steps", 120, "--sampler", "ddim")
SHARDS = ("--shard-size", 4, "--batch-size", 2)


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    cluster = RayCluster()
    try:
        yield cluster
    finally:
        cluster.close()


@pytest.fixture(scope="module")
def bundle(bundles: dict[str, Path]) -> Path:
    return bundles["fp32"]


@pytest.fixture(scope="module")
def plain(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain") / "images"
    made(bundle, *SETTINGS, "-o", folder)
    return folder


@contextmanager
def sampling(cluster: RayCluster, bundle: Path, folder: Path, *options: Any) -> Iterator[subprocess.Popen[str]]:
    """``dit-sample`` with two workers of the cluster, in a process of its own."""
    code = f"import sys; sys.argv[0] = 'dit-sample'; {ENTRIES['dit-sample']}; main()"
    arguments = [bundle, *ENGINE, *SETTINGS, *SHARDS, "--ray", cluster.address, "--workers", 2, "-o", folder, *options]
    with subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, **ENVIRONMENT},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=SECONDS)
    return process.returncode, out, err


def shards_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("[!.]*.tar"))


def check_whole(folder: Path, plain: Path) -> None:
    assert len(shards_in(folder)) == 10
    check_equal_to_plain(folder, plain)
    assert not [*folder.glob(".*")], "what killed processes left"


def test_a_killed_worker(cluster: RayCluster, bundle: Path, plain: Path, tmp_path: Path) -> None:
    """Its shard is made by another; the driver says so and goes on."""
    folder = tmp_path / "out"
    with sampling(cluster, bundle, folder) as process:
        await_true(lambda: len(shards_in(folder)) >= 2)
        cluster.kill_one("ShardWorker.make")
        code, out, err = finish(process)
    assert (code, "40 images in 10 shards" in out) == (0, True), err
    assert "a worker died at shard 00000" in err
    assert (len(out.splitlines()), len(err.splitlines())) == (1, 1), (out, err)
    check_whole(folder, plain)


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_driver(stop: signal.Signals, cluster: RayCluster, bundle: Path, plain: Path, tmp_path: Path) -> None:
    """The same command goes on; shards that were there are not touched. A signal that can be heard ends in silence."""
    folder = tmp_path / "out"
    with sampling(cluster, bundle, folder) as process:
        await_true(lambda: len(shards_in(folder)) >= 2)
        process.send_signal(stop)
        code, out, err = finish(process)
    assert (code, out, err) == (-9 if stop == signal.SIGKILL else 130, "", "")
    await_true(lambda: not cluster.workers("ShardWorker"))
    assert stop == signal.SIGKILL or not [*folder.glob(".*")]
    before = {name: time for name, time in times(folder).items() if not name.startswith(".")}
    left = 10 - len(shards_in(folder))
    assert 0 < left <= 8
    with sampling(cluster, bundle, folder) as process:
        code, out, err = finish(process)
    assert code == 0, err
    assert f"{4 * left} images in {left} shards" in out
    assert {name: time for name, time in times(folder).items() if name in before} == before
    check_whole(folder, plain)


def test_a_full_disk_in_a_shard(cluster: RayCluster, bundle: Path, plain: Path, tmp_path: Path) -> None:
    """On one worker, by a limit on its files' size: one line that names machine, file and reason; then it goes on."""
    folder = tmp_path / "out"
    with sampling(cluster, bundle, folder, "--workers", 1) as process:
        await_true(lambda: len(shards_in(folder)) >= 2)
        (worker,) = cluster.workers("ShardWorker")
        resource.prlimit(worker, resource.RLIMIT_FSIZE, (12_000, 12_000))
        code, out, err = finish(process)
    assert (code, out, len(err.splitlines())) == (1, "", 1), err
    assert f"{os.uname().nodename}: {folder}/00000" in err
    assert "cannot be written (File too large)" in err
    before = times(folder)
    assert len(before) < 10
    with sampling(cluster, bundle, folder) as process:
        code, _, err = finish(process)
    assert code == 0, err
    assert {name: time for name, time in times(folder).items() if name in before} == before
    check_whole(folder, plain)


def test_what_a_worker_refuses(cluster: RayCluster, bundle: Path, tmp_path: Path) -> None:
    """One line each, which names the machine: shards of other images, more workers than there is room for."""
    folder = tmp_path / "out"
    made(bundle, *SETTINGS, *SHARDS, "--shard", "1/10", "-o", folder)
    with sampling(cluster, bundle, folder, "--steps", 3) as process:
        code, out, err = finish(process)
    assert (code, out, len(err.splitlines())) == (1, "", 1), err
    assert err.startswith(f"dit-sample: {os.uname().nodename}: {folder}: its shards have steps 120, not 3")
    with sampling(cluster, bundle, folder, "--workers", 5) as process:
        code, out, err = finish(process)
    assert (code, out) == (1, "")
    assert err.startswith("dit-sample: 5 workers with 1 CPU each: the cluster has room for 4; ask for fewer --workers")


@pytest.fixture(scope="module")
def served(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the bundle, which a test may alter."""
    return Path(shutil.copytree(bundle, tmp_path_factory.mktemp("served") / "tiny.bundle"))


@pytest.fixture(scope="module")
def server(cluster: RayCluster, served: Path) -> Iterator[Application]:
    """Two engines with batches of four, and room for eight images more."""
    with cluster.serving(
        bundle=str(served), engine="onnxruntime", replicas="2", batch_size="4", max_queue=8, token=None
    ) as caller:
        yield caller


def gauge(server: Application, name: str) -> float:
    found = re.search(rf'^{name}{{model="tiny"}} (\S+)$', server.ask("/metrics")[2].decode(), re.MULTILINE)
    assert found is not None
    return float(found[1])


def steps_of(server: Application) -> float:
    """Steps of all engines, each of which tells them with an image."""
    server.ask_json("/generate", {"labels": [1] * 8, "steps": 1})
    return gauge(server, "dit_steps_total")


def await_engines(cluster: RayCluster, server: Application) -> None:
    """Until two are ready, and none is being opened beside them."""
    await_true(lambda: server.count_engines() == len(cluster.workers("ServeReplica:dit:engines")) == 2)


def test_images_of_an_application(server: Application, bundles: dict[str, Path], tmp_path: Path) -> None:
    """They are the pipeline's, with their record; the front is that of ``dit-serve``."""
    body = {"labels": [1, 2, 3], "seeds": [5, 6, 7], "steps": 6, "sampler": "dpmpp-2m"}
    images = expected(bundles, [1, 2, 3], [5, 6, 7], steps=6, sampler="dpmpp-2m")
    for each, image in zip(server.ask_json("/generate", body)["images"], images, strict=True):
        assert np.array_equal(pixels(each["image"]), image)
    status, _, content = server.ask("/generate", {**body, "labels": 1, "seeds": 5})
    (tmp_path / "image.png").write_bytes(content)
    assert (status, np.array_equal(pixels(content), images[0])) == (200, True)
    assert "the same as" in made(bundles["fp32"], "--from-image", tmp_path / "image.png", "-o", tmp_path / "again.png")
    events = server.events("/generate", {**body, "stream": True, "previews": 3})
    assert sorted(name for name, _ in events) == ["done"] + ["picture"] * 3 + ["preview"] * 3 + ["started"] * 3
    (found,) = server.ask_json("/v1/images/generations", {"prompt": "1", "seed": 5, "steps": 6, "sampler": "dpmpp-2m"})[
        "data"
    ]
    assert np.array_equal(pixels(found["b64_json"]), images[0])
    (model,) = server.ask_json("/info")["models"]
    assert (model["name"], model["engine"].startswith("onnxruntime")) == ("tiny", True)
    assert server.ask_json("/health") == {"status": "ok"}
    assert "<html" in server.ask("/")[2].decode()
    assert server.ask("/info", Host="evil.example")[0] == 403
    assert gauge(server, "dit_batch_size") == 8


def test_a_full_application(server: Application) -> None:
    """More than all engines and the queue have room for: 429, and none of the images is made."""
    before = gauge(server, "dit_images_total")
    status, headers, content = server.ask("/generate", {"labels": [1] * 17, "steps": 1})
    assert (status, int(headers["retry-after"]) >= 1) == (429, True)
    assert "17 more would exceed 16" in content.decode()
    assert gauge(server, "dit_images_total") == before


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes(stream: bool, server: Application) -> None:
    """Its images leave the engines' batches: thousands of steps are not made."""
    before = steps_of(server)
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=SECONDS)
    body = json.dumps({"labels": [1, 2, 3], "steps": 1000, "sampler": "ddim", "stream": stream})
    connection.request("POST", "/generate", body, {"Content-Type": "application/json"})
    await_true(lambda: gauge(server, "dit_running_images") == 3)
    assert connection.sock is not None
    connection.sock.shutdown(socket.SHUT_RDWR)
    connection.close()
    await_true(lambda: gauge(server, "dit_running_images") == 0)
    end = time.monotonic() + 2
    while time.monotonic() < end:  # in which all of them would be made
        assert steps_of(server) - before < 1000


def test_a_killed_replica(cluster: RayCluster, server: Application, bundles: dict[str, Path]) -> None:
    """In the midst of a stream: its images are begun again, callers see ``retry`` and no error, and the same images."""
    await_engines(cluster, server)
    killed: list[int] = []
    seen: list[tuple[str, Any]] = []

    def kill_when_started() -> None:
        await_true(lambda: gauge(server, "dit_running_images") > 4)  # of one engine
        killed.append(cluster.kill_one("ServeReplica:dit:engines"))

    thread = threading.Thread(target=kill_when_started)
    thread.start()
    body = {"labels": list(range(8)), "seeds": 3, "steps": 400, "sampler": "ddim"}
    seen = server.events("/generate", {**body, "stream": True})
    thread.join(SECONDS)
    names = Counter(name for name, _ in seen)
    assert killed
    assert (names["picture"], names["error"], names["done"]) == (8, 0, 1)
    assert 1 <= names["retry"] <= 8
    images = expected(bundles, list(range(8)), 3, steps=400, sampler="ddim")
    for name, data in seen:
        if name == "picture":
            assert np.array_equal(pixels(data["image"]), images[data["index"]])
    await_engines(cluster, server)


def test_a_bundle_that_is_altered_under_an_application(
    cluster: RayCluster, server: Application, served: Path, bundles: dict[str, Path]
) -> None:
    """Engines that run go on with what they loaded. None is opened with the other bundle, also where one died."""
    await_engines(cluster, server)
    manifest = served / "manifest.json"
    content = manifest.read_bytes()
    body = {"labels": 4, "seeds": 2, "steps": 3}
    image = expected(bundles, [4], 2, steps=3)[0]
    try:
        manifest.write_bytes(content + b"\n")
        assert np.array_equal(pixels(server.ask("/generate", body)[2]), image)
        cluster.kill_one("ServeReplica:dit:engines")
        for _ in range(4):
            status, _, png = server.ask("/generate", body)
            assert (status, np.array_equal(pixels(png), image)) == (200, True)
    finally:
        manifest.write_bytes(content)
    await_engines(cluster, server)
