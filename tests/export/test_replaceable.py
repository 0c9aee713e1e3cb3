"""An export replaces bundles, and nothing else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from dit_export.bundle import check_replaceable

from dit_runtime.core.errors import OutputError


def make(folder: Path, *names: str, manifest: str = "{}") -> Path:
    for name in names:
        (folder / name).mkdir(parents=True)
    (folder / "manifest.json").write_text(manifest)
    return folder


def test_what_an_export_replaces(bundles: dict[str, Path], tmp_path: Path) -> None:
    """Bundles, also with a user's files beside the manifest, and bundles whose manifest is damaged."""
    check_replaceable(tmp_path / "nothing")
    check_replaceable(bundles["fp32"])
    named = json.dumps(dict.fromkeys(("schema", "producer", "graphs", "files")))
    check_replaceable(make(tmp_path / "more", "notes", manifest=named))
    check_replaceable(make(tmp_path / "damaged", "graphs", "golden", "golden-8x8", "engines", manifest='{"schema": '))


def test_what_an_export_does_not_replace(bundles: dict[str, Path], tmp_path: Path) -> None:
    """``manifest.json`` is a common name: a browser's extension and a web page have one too."""
    extension = make(tmp_path / "extension", "icons", manifest='{"manifest_version": 3, "name": "mine"}')
    damaged = make(tmp_path / "damaged", "graphs", "photos", manifest="")
    folder, file, odd = tmp_path / "folder", tmp_path / "file", tmp_path / "odd"
    (folder / "photos").mkdir(parents=True)
    file.write_text("mine")
    (odd / "manifest.json").mkdir(parents=True)
    for path in (extension, damaged, folder, file, odd, Path.home(), Path("/")):
        with pytest.raises(OutputError, match="is not a bundle, so it is not replaced; choose another --output"):
            check_replaceable(path)
    link = tmp_path / "link"
    link.symlink_to(shutil.copytree(bundles["fp32"], tmp_path / "real"))
    with pytest.raises(OutputError, match=r"link: is a link, so it is not replaced; choose --output .*/real"):
        check_replaceable(link)
