"""A Hugging Face hub cache as huggingface_hub lays it out: each file of a snapshot is a link to a blob."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def snapshot_from_folder(folder: Path, cache: Path, name: str = "owner/name") -> Path:
    """The snapshot of a hub repository with this folder's files, in a cache that is made."""
    repository = cache / f"models--{name.replace('/', '--')}"
    snapshot, blobs = repository / "snapshots" / COMMIT, repository / "blobs"
    blobs.mkdir(parents=True)
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        link = snapshot / file.relative_to(folder)
        blob = blobs / hashlib.sha256(str(file.relative_to(folder)).encode() + file.read_bytes()).hexdigest()
        shutil.copyfile(file, blob)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    return snapshot
