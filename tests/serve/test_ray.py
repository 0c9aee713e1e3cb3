"""Ray, with a small cluster of its own: whoever is killed, every image is made once, and is the image made alone."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from support.commands import ENTRIES
from support.ray_cluster import ENVIRONMENT, RayCluster
from support.sample_command import ENGINE, made
from support.shards import check_equal_to_plain, times
from support.waiting import SECONDS, await_true

pytest.importorskip("ray", reason="pip install 'dit-export[ray]'")

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
    assert len(err.splitlines()) == 1
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
