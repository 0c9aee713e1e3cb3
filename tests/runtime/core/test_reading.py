"""What is read is a regular file of a bounded size, in its own folder; anything else is refused at once."""

from __future__ import annotations

import os
import socket
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from dit_runtime.core.files import sha256_of
from dit_runtime.core.reading import FileError, check_file, leads_outside, open_file, read_file


def fifo(path: Path) -> None:
    os.mkfifo(path)


def unix_socket(path: Path) -> None:
    os.chdir(path.parent)  # the names of sockets are short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path.name)


def link_to(target: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


def giant(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(20 << 30)  # sparse: it takes no space


NOT_REGULAR = {
    "a pipe": fifo,
    "a socket": unix_socket,
    "a folder": Path.mkdir,
    "a link to a device": link_to("/dev/zero"),
    "a link to a terminal": link_to("/dev/tty"),
    "a link to a folder": link_to("."),
}


@pytest.mark.parametrize("reader", [open_file, read_file, check_file, sha256_of])
@pytest.mark.parametrize("kind", NOT_REGULAR)
def test_what_is_no_regular_file(
    kind: str, reader: Callable[..., object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails by waiting for ever, or by reading a device to its end."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "it"
    NOT_REGULAR[kind](path)
    with pytest.raises(FileError, match=r"^not a regular file$"):
        reader(path, 100)
    with pytest.raises(FileError, match=r"^(not a regular file|a link out of .*)$"):
        reader(path, 100, tmp_path)


def test_a_pipe_that_comes_between_the_checks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kind of a file is asked of the opened file too: a name can lead to another file the next moment."""
    path = tmp_path / "it"
    path.write_text("text")
    regular = path.stat()
    path.unlink()
    os.mkfifo(path)
    monkeypatch.setattr(Path, "stat", lambda self, **_: regular)
    with pytest.raises(FileError, match="not a regular file"):
        open_file(path, 100)


def test_more_bytes_than_the_bound(tmp_path: Path) -> None:
    """A file of 20 GB is refused by its size, before any of it is in memory."""
    path = tmp_path / "it"
    giant(path)
    tracemalloc.start()
    with pytest.raises(FileError, match=r"^21474836480 bytes, larger than 1048576 bytes$"):
        read_file(path, 1 << 20)
    assert tracemalloc.get_traced_memory()[1] < 1 << 18
    tracemalloc.stop()
    path.write_bytes(b"x" * 10)
    assert read_file(path, 10) == b"x" * 10
    with pytest.raises(FileError, match="larger than 9 bytes"):
        read_file(path, 9)
    with open_file(path, None) as file:
        assert file.read() == b"x" * 10


@pytest.mark.parametrize("name", ["/proc/self/status", "/proc/self/maps"])
def test_a_file_of_the_system(name: str) -> None:
    """Files of /proc are regular and say that they have 0 bytes; to read one such as /proc/kmsg can wait for ever."""
    with pytest.raises(FileError, match="makes up while it is read"):
        read_file(name, 1 << 20)


def test_a_large_bound_takes_no_memory(tmp_path: Path) -> None:
    """Memory is taken for what is there, not for what would be allowed."""
    path = tmp_path / "it"
    path.write_bytes(b"x" * 10)
    tracemalloc.start()
    assert read_file(path, 1 << 40) == b"x" * 10
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_links(tmp_path: Path) -> None:
    """A user's own link may lead anywhere; one in a folder that came from elsewhere only inside that folder."""
    folder, elsewhere = tmp_path / "folder", tmp_path / "folder-2"
    (folder / "inner").mkdir(parents=True)
    elsewhere.mkdir()
    for path in (folder / "own", elsewhere / "secret"):
        path.write_text(path.name)
    (folder / "inner" / "inside").symlink_to("../own")
    (folder / "outside").symlink_to("../folder-2/secret")
    (folder / "absolute").symlink_to(elsewhere / "secret")
    (folder / "chain").symlink_to("outside")
    (folder / "deep").symlink_to(elsewhere)
    (folder / "loop").symlink_to("loop")
    (folder / "nowhere").symlink_to("missing")
    (tmp_path / "alias").symlink_to(folder)
    for within in (folder, tmp_path / "alias"):
        assert read_file(folder / "inner" / "inside", 100, within) == b"own"
        assert read_file(within / "own", 100, within) == b"own"
        for name in ("outside", "absolute", "chain", "deep/secret", "../folder-2/secret"):
            assert leads_outside(within, folder / name)
            with pytest.raises(FileError, match=r"^a link out of "):
                read_file(folder / name, 100, within)
            assert read_file(folder / name, 100) == b"secret"
    for within in (None, folder):
        with pytest.raises(FileError, match=r"^cannot be read \(.*symbolic links\)$"):
            read_file(folder / "loop", 100, within)
        with pytest.raises(FileError, match=r"^cannot be read \(No such file"):
            read_file(folder / "nowhere", 100, within)


@pytest.mark.parametrize("name", ["a\0b", "\ud800", "x" * 300, "own/below", ""])
def test_names_that_no_file_has(name: str, tmp_path: Path) -> None:
    """Any text can stand in a file as another file's name."""
    (tmp_path / "own").write_text("own")
    for within in (None, tmp_path):
        with pytest.raises(FileError, match=r"^(cannot be read \(|not a regular file)"):
            read_file(tmp_path / name, 100, within)
    if "\0" in name:
        assert leads_outside(tmp_path, tmp_path / name)
