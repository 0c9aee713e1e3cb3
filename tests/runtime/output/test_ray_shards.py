"""The driver of shards on Ray, with a Ray of this process whose workers die when they are told to."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.sample_command import ENGINE, dit_sample, made
from support.shards import check_equal_to_plain

from dit_runtime.output import ray_worker
from dit_runtime.output.ray_worker import ShardWorker

SETTINGS = ("--labels", "all", "--steps", 2, "--batch-size", 2)
SHARDS = ("--shard-size", 2, "--ray", "local")


class ActorDiedError(Exception):
    pass


class Call:
    """What ``ACTOR.METHOD.remote(…)`` gives: it is done when somebody waits for it."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self._work, self.done = work, False

    def finish(self) -> None:
        if self.done:
            return
        self.done = True
        try:
            self.value, self.error = self._work(), None
        except ActorDiedError as error:
            self.error = error


class Actor:
    """A worker in this process. Its methods die where the test says so."""

    def __init__(self, worker: ShardWorker, dies: Callable[[str, tuple[Any, ...]], bool]) -> None:
        self._worker, self._dies, self._dead = worker, dies, False

    def __getattr__(self, name: str) -> Any:
        def remote(*arguments: Any) -> Call:
            def work() -> Any:
                self._dead |= self._dies(name, arguments)
                if self._dead:
                    raise ActorDiedError("The actor died.\nWorker exit type: it used too much memory.")
                return getattr(self._worker, name)(*arguments)

            return Call(work)

        return SimpleNamespace(remote=remote, options=lambda **_: SimpleNamespace(remote=remote))


class FakeRay:
    """As much of ``ray`` as the driver uses, on one node of two CPUs."""

    exceptions = SimpleNamespace(RayError=ActorDiedError)

    def __init__(self, dies: Callable[[str, tuple[Any, ...]], bool], ours: bool = True) -> None:
        self._dies, self._ours = dies, ours
        self.actors, self.killed, self.made = 0, 0, list[Any]()
        self.is_shut_down = False

    def is_initialized(self) -> bool:
        return not self._ours

    def init(self, *_: Any, **__: Any) -> None:
        assert self._ours

    def shutdown(self) -> None:
        self.is_shut_down = True

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True, "Resources": {"CPU": 2.0}}]

    def remote(self, **options: Any) -> Callable[[type[ShardWorker]], Any]:
        assert options == {"num_cpus": 1, "num_gpus": 0, "concurrency_groups": {"watch": 1}}

        def make() -> Actor:
            self.actors += 1
            return Actor(ShardWorker(), self._note)

        return lambda kind: SimpleNamespace(remote=make)

    def _note(self, name: str, arguments: tuple[Any, ...]) -> bool:
        if name == "make":
            self.made.append(arguments[0])
        return self._dies(name, arguments)

    def wait(self, calls: list[Call], timeout: float) -> tuple[list[Call], list[Call]]:
        calls[0].finish()
        return [each for each in calls if each.done], [each for each in calls if not each.done]

    def get(self, call: Call) -> Any:
        call.finish()
        if call.error is not None:
            raise call.error
        return call.value

    def kill(self, actor: Actor) -> None:
        self.killed += 1


def run(
    bundle: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, dies: Callable[..., bool], **options: Any
) -> tuple[FakeRay, Any]:
    ray = FakeRay(dies, **options)
    monkeypatch.setitem(sys.modules, "ray", ray)  # type: ignore[arg-type]
    return ray, dit_sample(bundle, *ENGINE, *SETTINGS, *SHARDS, "--workers", 2, "-o", folder)


@pytest.fixture
def bundle(bundles: dict[str, Path]) -> Path:
    return bundles["fp32"]


def test_a_worker_that_dies(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its shard is made again after the others, by a worker that takes its place."""
    deaths = iter([True])
    ray, done = run(
        bundle,
        tmp_path / "out",
        monkeypatch,
        lambda name, given: (name, given) == ("make", (1,)) and next(deaths, False),
    )
    assert (done.code, "10 images in 5 shards" in done.out) == (0, True), done
    assert done.err == "a worker died at shard 000001.tar; another one takes its place\n"
    assert sorted(ray.made) == [0, 1, 1, 2, 3, 4]
    assert ray.made[-1] == 1
    assert (ray.actors, ray.killed, ray.is_shut_down) == (3, 2, True)
    made(bundle, *SETTINGS, "-o", tmp_path / "plain")
    check_equal_to_plain(tmp_path / "out", tmp_path / "plain")


def test_a_shard_at_which_workers_die(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For want of memory, say: all others are made first, and then one line says which, and what may help."""
    ray, done = run(bundle, tmp_path / "out", monkeypatch, lambda name, given: (name, given) == ("make", (1,)))
    assert (done.code, done.out) == (1, "")
    assert done.err.splitlines()[-1] == (
        "dit-sample: 3 workers died at shard 000001.tar (Worker exit type: it used too much memory.); if memory is "
        "short, ask for fewer --workers or a smaller --batch-size; the same command goes on from the shards that are "
        "there"
    )
    assert len(list((tmp_path / "out").glob("*.tar"))) == 4
    assert ray.made[-3:] == [1, 1, 1]


def test_workers_that_die_before_they_work(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ray, done = run(bundle, tmp_path / "out", monkeypatch, lambda name, given: name == "open")
    assert (done.code, "3 workers died before an engine was open" in done.err) == (1, True)
    assert (ray.actors, ray.made) == (3, [])


def test_what_is_there_is_checked_by_one_worker(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where no shard is left: another request is refused there too. A program's own Ray is left as it is."""
    made(bundle, *SETTINGS, "--shard-size", 2, "-o", tmp_path / "out")
    ray, done = run(bundle, tmp_path / "out", monkeypatch, lambda *_: False, ours=False)
    assert (done.code, "already" in done.out, ray.actors, ray.is_shut_down) == (0, True, 1, False)
    monkeypatch.setattr(sys.modules[__name__], "SETTINGS", (*SETTINGS, "--seed", 5))
    ray, done = run(bundle, tmp_path / "out", monkeypatch, lambda *_: False)
    assert (done.code, "seeds '0 to 9', not '5 to 14'" in done.err, ray.actors) == (1, True, 1)


def test_a_machine_that_is_not_alike(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another version or another bundle there: one line that names the machine, and no shard."""
    monkeypatch.setattr(ray_worker.socket, "gethostname", lambda: "node-7")
    monkeypatch.setattr(ray_worker, "__version__", "0.0.1")
    _, done = run(bundle, tmp_path / "out", monkeypatch, lambda *_: False)
    assert done.code == 1
    assert done.err.startswith("dit-sample: node-7: has dit-export 0.0.1, and ")
    monkeypatch.undo()
    monkeypatch.setattr(ray_worker.socket, "gethostname", lambda: "node-7")
    opened = ShardWorker.open
    monkeypatch.setattr(
        ShardWorker, "open", lambda self, request, digest, version: opened(self, request, "0" * 64, version)
    )
    _, done = run(bundle, tmp_path / "out", monkeypatch, lambda *_: False)
    assert done.err.startswith(f"dit-sample: node-7: {bundle}: is bundle ")
    assert "and 000000000000… where the work was begun" in done.err
    assert not list(tmp_path.glob("out/*"))
