"""Files and folders are replaced whole; what stops the writer is in ``test_writers.py``."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.stops import names_in

from dit_runtime.core import replace
from dit_runtime.core.errors import OutputError
from dit_runtime.core.replace import check_writable, clear_litter, replace_file, replace_folder

NEW = {"a": "new", "in/b": "new"}


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)


def read(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): path.read_text() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def replace_with_new(target: Path) -> None:
    with replace_folder(target) as folder:
        write(folder, NEW)


def test_a_reader_always_finds_a_folder(tmp_path: Path) -> None:
    """Fails if the folder is missing for a moment while another process replaces it."""
    target = tmp_path / "out"
    replace_with_new(target)
    code = f"""if True:
        from pathlib import Path
        from dit_runtime.core.replace import replace_folder
        for number in range(50):
            with replace_folder(Path({os.fspath(target)!r})) as folder:
                (folder / "a").write_text("new")
    """
    with subprocess.Popen([sys.executable, "-c", code]) as writer:
        reads = 0
        while writer.poll() is None:
            assert target.is_dir()
            reads += 1
    assert writer.returncode == 0
    assert reads > 200
    assert names_in(tmp_path) == {"out", "out/a"}


@pytest.mark.parametrize("exchanged", [True, False])
def test_three_writers_at_once(exchanged: bool, tmp_path: Path) -> None:
    """Each folder is one writer's, whole, and nobody's temporary folder is taken for a dead one's."""
    target = tmp_path / "out"
    code = f"""if True:
        import sys
        from pathlib import Path
        from dit_runtime.core import replace
        if not {exchanged}:
            replace.exchange = lambda *_: False
        for _ in range(30):
            replace._cleared.clear()  # as a process of its own would look each time
            with replace.replace_folder(Path({os.fspath(target)!r})) as folder:
                (folder / "a").write_text(sys.argv[1])
                (folder / "in").mkdir()
                (folder / "in" / "b").write_text(sys.argv[1])
    """
    processes = [subprocess.Popen([sys.executable, "-c", code, text]) for text in ("one", "two", "three")]
    assert [process.wait(60) for process in processes] == [0, 0, 0]
    assert len(set(read(target).values())) == 1
    assert names_in(tmp_path) == {"out", "out/a", "out/in", "out/in/b"}


def litter_in(folder: Path) -> set[str]:
    """What a killed writer of a file and one of a folder leave."""

    code = f"""if True:
        import os
        from pathlib import Path
        from dit_runtime.core.replace import replace_file, replace_folder
        folder = Path({os.fspath(folder)!r})
        with replace_file(folder / "file.txt") as file, replace_folder(folder / "out") as temporary:
            (temporary / "a").write_text("new")
            file.write_text("half")
            os.kill(os.getpid(), 9)
    """
    before = names_in(folder)
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    return names_in(folder) - before


def test_only_what_dead_writers_left_is_removed(tmp_path: Path) -> None:
    """What lives, what others made and what only looks alike stays, be it in a name's form, a link or a pipe."""
    with replace_file(tmp_path / "living.txt") as file, replace_folder(tmp_path / "living") as folder:
        litter = litter_in(tmp_path)
        assert {name.split(".")[1] for name in litter} == {"file", "out"}
        (dead,) = [name for name in litter if name.startswith(".file")]
        others = [
            ".out.x1y2z3.tmp",
            ".out.old.abcd1234",
            dead.replace(".file.", ".other."),
            f"{dead}.more.txt",
            dead[1:],
        ]
        for name in others:
            (tmp_path / name).write_text("mine")
        link, pipe = (replace._name_beside(tmp_path / name, replace.TEMPORARY) for name in ("link", "pipe"))
        link.symlink_to(tmp_path / others[0])
        os.mkfifo(pipe)
        kept = names_in(tmp_path) - litter
        clear_litter(tmp_path)
        assert names_in(tmp_path) == kept | litter  # this process has looked here already
        replace._cleared.clear()
        clear_litter(tmp_path)
        assert names_in(tmp_path) == kept
        assert file.exists()
        assert folder.exists()


@pytest.mark.parametrize("moment", ["mkdir", "_lock"])
def test_a_temporary_folder_taken_for_a_dead_ones(moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between its making and its lock another process may remove it: another is made."""
    owner = os if moment == "mkdir" else replace
    original, taken = getattr(owner, moment), list[Path]()

    def take(*args: object) -> None:
        if moment == "mkdir":
            original(*args)
        if not taken:
            taken.extend(tmp_path.glob(".out.*"))
            replace._remove_if_left(taken[0])
            assert not taken[0].exists()
        if moment != "mkdir":
            original(*args)

    monkeypatch.setattr(owner, moment, take)
    replace_with_new(tmp_path / "out")
    assert taken
    assert read(tmp_path / "out") == NEW


def test_a_folder_that_was_set_aside(tmp_path: Path) -> None:
    """It comes back where its place is empty, and goes where the new one is in place."""
    target = tmp_path / "out"
    for occupied in (False, True):
        aside = replace._name_beside(target, replace.OLD)
        aside.mkdir()
        (aside / "a").write_text("old")
        if occupied:
            replace_with_new(target)
        replace._cleared.clear()
        clear_litter(tmp_path)
        assert read(target) == (NEW if occupied else {"a": "old"})
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        shutil.rmtree(target)


def test_without_locks_nothing_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on file systems where folders have no locks: whether the writer lives is not known."""

    def flock(*_: object) -> None:
        raise OSError(9, "no locks")

    litter = litter_in(tmp_path)
    monkeypatch.setattr(fcntl, "flock", flock)
    replace_with_new(tmp_path / "out")
    assert litter <= names_in(tmp_path)
    assert read(tmp_path / "out") == NEW


def test_what_is_no_file_is_not_replaced(tmp_path: Path) -> None:
    """Root's ``--output /dev/null`` would take the device from the whole system. A link is replaced, not its file."""
    pipe, folder, link, file = (tmp_path / name for name in ("pipe", "folder", "link", "file"))
    os.mkfifo(pipe)
    folder.mkdir()
    file.write_text("mine")
    for path in (pipe, folder, Path("/dev/null"), Path("/dev/stdout")):
        with pytest.raises(OutputError, match="is not a regular file"), replace_file(path):
            pytest.fail("begun")
    link.symlink_to(file)
    with replace_file(link) as temporary:
        temporary.write_text("new")
    assert (link.is_symlink(), link.read_text(), file.read_text()) == (False, "new", "mine")
    link.unlink()
    link.symlink_to(folder)
    replace_with_new(link)
    assert (link.is_symlink(), read(link), list(folder.iterdir())) == (False, NEW, [])


def test_names(tmp_path: Path) -> None:
    """Long names have room for a temporary one; a path without a name of its own is refused before the work."""
    for name in ("n" * 255, "é" * 120 + ".png", "x." + "y" * 250, "line\nbreak", os.fsdecode(b"\xff.png")):
        with replace_file(tmp_path / name) as file:
            assert replace._target_of(file.name, replace.TEMPORARY) is not None
            file.write_text("new")
        assert (tmp_path / name).read_text() == "new"
    for path in (Path(), tmp_path / "..", Path("/")):
        with pytest.raises(OutputError, match="has no name of its own"):
            check_writable(path)
        with pytest.raises(OutputError, match="has no name of its own"), replace_folder(path):
            pytest.fail("begun")
