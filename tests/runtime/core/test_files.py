"""Which links lead out of a folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from dit_runtime.core.errors import OutputError
from dit_runtime.core.reading import leads_outside
from dit_runtime.core.replace import check_writable


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A hub cache's repository with one blob, and a snapshot with a folder in it."""
    repository = tmp_path / "models--owner--name"
    (repository / "snapshots" / "commit" / "inner").mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "blobs" / "hash").write_text("blob")
    return repository


@pytest.mark.parametrize(
    ("target", "outside"),
    [
        ("../../blobs/hash", False),
        ("inner/file", False),
        ("../../blobs", True),
        ("../../refs/main", True),
        ("../../blobs/../refs/main", True),
        ("../../blobs/deeper/hash", True),
        ("../../../models--owner--other/blobs/hash", True),
        ("../../../elsewhere", True),
        ("/etc/passwd", True),
        ("link", True),
    ],
)
def test_a_snapshot_links_to_its_own_blobs_alone(repository: Path, target: str, outside: bool) -> None:
    """A file of a hub cache is a link to a blob of the same repository; any other link out is refused."""
    snapshot = repository / "snapshots" / "commit"
    (snapshot / "link").symlink_to(target)
    assert leads_outside(snapshot, snapshot / "link") is outside
    (snapshot / "inner" / "link").symlink_to(target if target.startswith("/") else f"../{target}")
    assert leads_outside(snapshot, snapshot / "inner" / "link") is outside


def test_a_folder_within_a_snapshot_reaches_the_blobs(repository: Path) -> None:
    """A bundle may be a folder of a hub repository; a file beside that folder is outside."""
    inner = repository / "snapshots" / "commit" / "inner"
    (inner / "link").symlink_to("../../../blobs/hash")
    assert not leads_outside(inner, inner / "link")
    (inner.parent / "beside").write_text("")
    assert leads_outside(inner, inner / ".." / "beside")


def test_blobs_that_lie_elsewhere_are_outside(repository: Path, tmp_path: Path) -> None:
    """Whoever packs a folder as a hub cache could make ``blobs``, or a blob, a link to anywhere."""
    snapshot = repository / "snapshots" / "commit"
    (snapshot / "link").symlink_to("../../blobs/secret")
    (tmp_path / "secret").write_text("secret")
    (repository / "blobs" / "secret").symlink_to(tmp_path / "secret")
    assert leads_outside(snapshot, snapshot / "link")
    (repository / "blobs").rename(tmp_path / "moved")
    (repository / "blobs").symlink_to(tmp_path)
    assert leads_outside(snapshot, snapshot / "link")


def test_a_path_that_cannot_be(tmp_path: Path) -> None:
    """A name that is too long, and a file in the place of a folder, are told before the work."""
    (tmp_path / "file").touch()
    for path, reason in (
        (tmp_path / ("a" * 300), "File name too long"),
        (tmp_path / "file" / "x", "cannot be written to"),
    ):
        with pytest.raises(OutputError, match=reason):
            check_writable(path)
    check_writable(tmp_path / "new" / "folder")


def test_an_ordinary_folder_has_no_blobs(tmp_path: Path) -> None:
    """Outside a hub cache, a folder named ``blobs`` is as foreign as any other."""
    for name in ("name/snapshots/commit", "name/blobs"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "name" / "blobs" / "hash").write_text("")
    folder = tmp_path / "name" / "snapshots" / "commit"
    (folder / "link").symlink_to("../../blobs/hash")
    assert leads_outside(folder, folder / "link")
    (folder / "plain").write_text("")
    assert not leads_outside(folder, folder / "plain")
