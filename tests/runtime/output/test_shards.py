"""Shards: every image once, whatever is stopped; the images of a plain run; bytes that follow from the images alone."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import re
import resource
import shutil
import socket
import tarfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from support.commands import run_process
from support.sample_command import ENGINE, dit_sample, made, record, refused
from support.shards import check_equal_to_plain, images_in, members, times

from dit_runtime.core.errors import EngineError, OutputError, SamplingError
from dit_runtime.core.progress import Progress
from dit_runtime.output import ray_shards, shard_record
from dit_runtime.output.ray_shards import Room
from dit_runtime.output.request import LabelledImages, OutputRequest, SampleRequest, ShardSettings
from dit_runtime.output.shard_record import RECORD
from dit_runtime.output.shards import ShardMaker, write_shards

SETTINGS = ("--labels", "all", "--count", 2, "--steps", 2, "--sampler", "ddim", "--seed", 3)


@pytest.fixture
def bundle(bundles: dict[str, Path]) -> Path:
    return bundles["fp32"]


@pytest.fixture(scope="module")
def plain(bundles: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain") / "images"
    made(bundles["fp32"], *SETTINGS, "-o", folder)
    return folder


@pytest.mark.parametrize("kind", ["tar", "folder"])
def test_shards_have_the_images_of_a_plain_run(kind: str, bundle: Path, plain: Path, tmp_path: Path) -> None:
    """Batches of three in shards of eight: each image and record is that of a folder without shards."""
    folder = tmp_path / "out"
    out = made(bundle, *SETTINGS, "--shard-size", 8, "--shard-format", kind, "--batch-size", 3, "-o", folder, "--json")
    suffix = ".tar" if kind == "tar" else ""
    names = [f"{number:06d}{suffix}" for number in range(3)]
    assert json.loads(out)["files"] == [str(folder / name) for name in names]
    assert sorted(times(folder)) == [*names, RECORD]
    check_equal_to_plain(folder, plain)
    found = members(folder / names[1])
    stems = [f"{index:05d}_class{index // 2}_seed{index + 3}" for index in range(8, 16)]
    assert sorted(found) == sorted(f"{stem}.{end}" for stem in stems for end in ("png", "json", "cls"))
    about = json.loads(found[f"{stems[0]}.json"])
    (tmp_path / "one.png").write_bytes(found[f"{stems[0]}.png"])
    assert about.pop("index") == 8
    assert {f"dit.{key}": value for key, value in about.items()} == {
        key: value for key, value in record(tmp_path / "one.png").items() if key != "dit.pixels"
    }
    assert found[f"{stems[0]}.cls"] == b"4"
    again = made(bundle, "--from-image", tmp_path / "one.png", "-o", tmp_path / "again.png")
    assert "the same as" in again


def test_the_bytes_of_a_tar_file_follow_from_its_images(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No time, user or machine in a header; members of one image are side by side, as WebDataset needs them."""
    made(bundle, *SETTINGS, "--shard-size", 20, "-o", tmp_path / "a")
    monkeypatch.setattr("time.time", lambda: 4e9)
    monkeypatch.setattr("os.getuid", lambda: 1234)
    made(bundle, *SETTINGS, "--shard-size", 20, "-o", tmp_path / "b")
    assert (tmp_path / "a" / "000000.tar").read_bytes() == (tmp_path / "b" / "000000.tar").read_bytes()
    with tarfile.open(tmp_path / "a" / "000000.tar", "r:") as file:
        headers = file.getmembers()
    assert {(each.mtime, each.uid, each.gid, each.uname, each.gname, each.mode) for each in headers} == {
        (0, 0, 0, "", "", 0o644)
    }
    keys = [each.name.partition(".")[0] for each in headers]
    assert keys == sorted(keys)


def test_a_mixture_has_no_class_file(bundle: Path, tmp_path: Path) -> None:
    made(bundle, "--labels", "3:0.7+5:0.3", "--steps", 1, "--shard-size", 4, "-o", tmp_path / "out")
    assert sorted(members(tmp_path / "out" / "000000.tar")) == ["00000_class3+5_seed0.json", "00000_class3+5_seed0.png"]


def test_what_is_there_is_not_made_again(bundle: Path, plain: Path, tmp_path: Path) -> None:
    """A scheduler's tasks, in any order, and one that was lost; other batches are no other images."""
    folder = tmp_path / "out"
    for part in (3, 1, 2):
        made(bundle, *SETTINGS, "--shard-size", 3, "--shard", f"{part}/3", "-o", folder)
    check_equal_to_plain(folder, plain)
    before = times(folder)
    assert "every image is there already" in made(bundle, *SETTINGS, "--shard-size", 3, "-o", folder)
    assert times(folder) == before
    (folder / "000004.tar").unlink()
    (folder / ".000004.tar.half").write_bytes(b"not a shard")
    out = made(bundle, *SETTINGS, "--shard-size", 3, "--batch-size", 2, "-o", folder)
    assert "3 images in 1 shards" in out
    (folder / ".000004.tar.half").unlink()
    after = times(folder)
    assert [name for name in after if after[name] != before[name]] == ["000004.tar"]
    check_equal_to_plain(folder, plain)


OTHERS: dict[tuple[Any, ...], str] = {
    ("--steps", 3): "its shards have steps 2, not 3",
    ("--sampler", "unipc"): "sampler 'ddim', not 'unipc'",
    ("--guidance", 2): "guidance 4.0, not 2.0",
    ("--guidance", *range(1, 21)): "guidance 4.0, not '",
    ("--count", 3): "images 20, not 30",
    ("--seed", 4): "seeds '3 to 22', not '4 to 23'",
    ("--labels", *[1] * 10): "labels '",
    ("--shard-size", 9): "shard_size 8, not 9",
    ("--shard-format", "folder"): "kind 'tar', not 'folders'",
    ("--negative-label", 2): "negative_label None, not 2",
    ("--noise-dtype", "float16"): "noise_dtype 'float32', not 'float16'",
}


def test_other_images_in_the_same_folder_are_refused(bundle: Path, tmp_path: Path) -> None:
    """The message says what differs, and nothing is written; an engine that is another makes other images too."""
    folder, ask = tmp_path / "out", (bundle, *SETTINGS, "--shard-size", 8)
    made(*ask, "-o", folder)
    for changes, words in OTHERS.items():
        refused(words, *ask, "-o", folder, *changes, folder=folder)
    written = json.loads((folder / RECORD).read_text())
    (folder / RECORD).write_text(json.dumps({**written, "engine": "another"}))
    refused("engine 'another', not 'onnxruntime", *ask, "-o", folder, folder=folder)


def test_the_same_images_in_other_words(bundle: Path, tmp_path: Path) -> None:
    """``all`` and the numbers of all classes are the same; a scale for each image may be that of all."""
    folder = tmp_path / "out"
    made(bundle, *SETTINGS, "--shard-size", 8, "-o", folder)
    numbers = ("--labels", *range(9), "class 9")
    assert "already" in made(bundle, *SETTINGS, *numbers, "--guidance", *[4] * 20, "--shard-size", 8, "-o", folder)


@contextmanager
def serving(answer: bytes) -> Iterator[int]:
    """The port of a server that says one thing to its one caller."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def speak() -> None:
            with contextlib.suppress(OSError), server.accept()[0] as connection:
                connection.sendall(answer)
                connection.recv(100)

        thread = threading.Thread(target=speak, daemon=True)
        thread.start()
        yield server.getsockname()[1]


def test_what_cannot_be(bundle: Path, tmp_path: Path) -> None:
    """One line each, before the work."""
    folder = tmp_path / "out"
    made(bundle, *SETTINGS, "--shard-size", 8, "-o", folder)
    (folder / RECORD).rename(tmp_path / "kept.json")
    ask = ("--shard-size", 8, "-o", folder)
    refused(f"is there, and no {RECORD} says how it was made", bundle, *SETTINGS, *ask, folder=folder)
    for content in (b"{", b"[1]", b'{"a": 1, "a": 2}', b"{}" + b" " * shard_record.RECORD_BYTES):
        (folder / RECORD).write_bytes(content)
        refused("cannot be read as the record of shards", bundle, *SETTINGS, *ask, folder=folder)
    (folder / RECORD).unlink()
    (folder / RECORD).symlink_to("/dev/zero")
    refused("cannot be read as the record of shards", bundle, *SETTINGS, *ask, folder=folder)
    (folder / RECORD).unlink()
    shutil.copy(tmp_path / "kept.json", folder / RECORD)
    file = tmp_path / "file"
    file.touch()
    for arguments, words in (
        (("--shard-size", 8, "-o", tmp_path / "x.png"), "is the name of one image, and shards need a folder"),
        (("--shard-size", 8, "-o", file), "is a file, and shards need a folder"),
        ((*ask, "--overwrite"), "a shard that is there is done"),
        ((*ask, "--shard", "1/4"), "4 parts of 3 shards of 8 images: expected at most one part for each shard"),
        (("--shard-size", 0, "-o", folder), "expected a whole number from 1"),
        (("--shard-format", "tar", "-o", folder), "--shard-format without --shard-size"),
        (("--ray", "auto", "-o", folder), "--ray without --shard-size"),
        ((*ask, "--workers", 2), "--workers without --ray"),
        ((*ask, "--ray", "nowhere"), "no address of a Ray cluster"),
        ((*ask, "--ray", "127.0.0.1:1"), "127.0.0.1:1: no Ray cluster can be joined there (Connection refused)"),
    ):
        if "--ray" in arguments and "auto" not in arguments and not importlib.util.find_spec("ray"):
            continue
        refused(words, bundle, *SETTINGS, *arguments, folder=tmp_path)
    with serving(b"HTTP/1.0 400 Bad request\r\n\r\n") as port:
        if importlib.util.find_spec("ray"):
            words = "what listens there is no Ray cluster"
            refused(words, bundle, *SETTINGS, *ask, "--ray", f"127.0.0.1:{port}", folder=tmp_path)
    refused("--shard-size with --from-image", bundle, "--from-image", file, "--shard-size", 8, folder=tmp_path)


def maker_of(bundle: Path, folder: Path, size: int = 5, **images: Any) -> ShardMaker:
    asked = LabelledImages(("all",), settings={"steps": 2}, **images)
    output = OutputRequest(folder, shards=ShardSettings(size))
    return ShardMaker(SampleRequest(bundle, asked, output, engine="onnxruntime", threads=1))


def spoil(maker: ShardMaker, monkeypatch: pytest.MonkeyPatch, *calls: int) -> None:
    """Let calls of the decoder, by their number, fail as for pixels that are not finite."""
    decode, done = maker._pipe.decode, iter(range(1000))

    def decode_some(*arguments: Any) -> Any:
        if next(done) in calls:
            raise SamplingError("decoded pixels are not finite")
        return decode(*arguments)

    monkeypatch.setattr(maker._pipe, "decode", decode_some)


def test_an_image_that_is_not_finite_costs_its_own_shard(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The night's other shards are made, and the command fails with the shard's name; a later run makes it."""
    maker = maker_of(bundle, tmp_path / "out", 2)
    spoil(maker, monkeypatch, 0, 3)
    with pytest.raises(SamplingError, match=r"shard 000000.tar: decoded pixels .*; 1 more shards failed; 3 shards are"):
        write_shards(maker, Progress("", 1))
    assert sorted(times(tmp_path / "out")) == ["000001.tar", "000002.tar", "000004.tar", RECORD]
    assert write_shards(maker_of(bundle, tmp_path / "out", 2), Progress("", 1)).count == 4
    assert len(images_in(tmp_path / "out")) == 10


def test_an_engine_that_makes_nothing_finite_ends_soon(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After three shards, not after the last of thousands."""
    maker = maker_of(bundle, tmp_path / "out", 1)
    spoil(maker, monkeypatch, *range(1000))
    tried: list[int] = []
    make = maker.make
    monkeypatch.setattr(maker, "make", lambda number, bar: (tried.append(number), make(number, bar))[1])
    with pytest.raises(SamplingError, match=r"shard 000000\.tar"):
        write_shards(maker, Progress("", 1))
    assert tried == [0, 1, 2]


def test_a_full_disk_in_a_shard(bundle: Path, plain: Path, tmp_path: Path) -> None:
    """One line (here by a limit on file sizes), no part of a shard is left, and the same command goes on."""
    folder = tmp_path / "out"
    arguments = [*map(str, (bundle, *ENGINE, *SETTINGS, "--batch-size", 3, "--shard-size", 6, "-o", folder))]
    assert run_process("dit-sample", *arguments, "--shard", "1/4").returncode == 0
    before, limit = times(folder), (folder / "000000.tar").stat().st_size * 2 // 3

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    done = run_process("dit-sample", *arguments, preexec_fn=limited)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        f"dit-sample: {folder}/000001.tar: cannot be written (File too large); free some space, or mend what it is, "
        "and the same command goes on from the shards that are there\n"
    )
    assert times(folder) == before
    assert "14 images in 3 shards" in made(bundle, *arguments[1:])
    assert {name: times(folder)[name] for name in before} == before
    check_equal_to_plain(folder, plain)


def test_a_folder_that_is_begun_again_gets_no_shard_of_the_old_run(bundle: Path, tmp_path: Path) -> None:
    """A worker whose driver was killed may finish its shard after the folder was emptied for other images."""
    folder = tmp_path / "out"
    old = maker_of(bundle, folder)
    shutil.rmtree(folder)
    with pytest.raises(OutputError, match="was removed while shards were made"):
        old.make(0)
    shutil.rmtree(folder, ignore_errors=True)
    maker_of(bundle, folder, seeds=9)
    with pytest.raises(OutputError, match="seeds '9 to 18', not '0 to 9'"):
        old.make(0)
    assert sorted(times(folder)) == [RECORD]


def test_two_begin_at_once(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second writes its record after the first has looked for one: the first then sees that it is another."""
    folder, write = tmp_path / "out", shard_record._write_once

    def write_late(file: Path, content: bytes) -> None:
        monkeypatch.setattr(shard_record, "_write_once", write)
        maker_of(bundle, folder, seeds=9)
        write(file, content)

    monkeypatch.setattr(shard_record, "_write_once", write_late)
    with pytest.raises(OutputError, match="seeds '9 to 18', not '0 to 9'"):
        maker_of(bundle, folder)


def node(cpus: float, gpus: float = 0, alive: bool = True) -> dict[str, Any]:
    return {"Alive": alive, "Resources": {"CPU": cpus, **({"GPU": gpus} if gpus else {})}}


@pytest.mark.parametrize(
    ("nodes", "engine", "threads", "workers", "room"),
    [
        ([node(8)], "auto", 0, None, Room(1, 8, 0)),
        ([node(8)], "auto", 0, 3, Room(3, 2, 0)),
        ([node(8), node(4), node(0), node(9, alive=False)], "onnxruntime", 0, None, Room(2, 4, 0)),
        ([node(4), node(4), node(4)], "openvino", 0, 2, Room(2, 4, 0)),
        ([node(8)], "openvino", 3, None, Room(2, 3, 0)),
        ([node(16, 8), node(16, 4), node(64)], "auto", 0, None, Room(12, 1, 1)),
        ([node(16, 8)], "tensorrt", 0, 2, Room(2, 1, 1)),
        ([node(16, 8)], "openvino", 0, 2, Room(2, 8, 0)),
        ([node(8)], "auto", 0, 9, "9 workers with 1 CPU each: the cluster has room for 8"),
        ([node(8)], "auto", 5, 2, "2 workers with 5 CPUs each: the cluster has room for 1"),
        ([node(8)], "tensorrt", 0, None, "1 workers with 1 CPU and 1 GPU each: the cluster has room for 0"),
        ([node(0)], "auto", 0, None, "1 workers with 1 CPU each: the cluster has room for 0"),
    ],
)
def test_what_each_worker_gets(
    nodes: list[dict[str, Any]], engine: str, threads: int, workers: int | None, room: Room | str
) -> None:
    """A GPU each where the engine is on one; else the CPUs are shared. More than there is would wait for ever."""
    if isinstance(room, Room):
        assert ray_shards._room_for(nodes, engine, threads, workers) == room
    else:
        with pytest.raises(EngineError, match=re.escape(room)):
            ray_shards._room_for(nodes, engine, threads, workers)


def test_without_ray(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line with what installs it."""
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    done = dit_sample(bundle, *SETTINGS, "--shard-size", 8, "--ray", "auto", "-o", tmp_path / "out")
    assert (done.code, done.err) == (1, "dit-sample: ray is not installed; pip install 'dit-export[ray]'\n")
    assert not [*tmp_path.iterdir()]
