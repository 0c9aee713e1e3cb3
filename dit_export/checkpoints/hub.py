"""Downloads from the Hugging Face hub."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dit_runtime.core.errors import CheckpointError

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+(@[\w.-]+)?")


def download_snapshot(hub_id: str, patterns: Sequence[str], required: Sequence[str]) -> Path:
    """The folder with a hub repository's files; its name is the repository's commit.

    Args:
        hub_id: ``owner/name`` or ``owner/name@revision``.
        patterns: which files to download.
        required: files that the cache must hold for it to be used without asking the hub.

    Raises:
        CheckpointError: the repository is neither cached nor reachable.
    """
    from huggingface_hub import snapshot_download

    name, _, revision = hub_id.partition("@")
    options: dict[str, Any] = {"revision": revision or None, "allow_patterns": list(patterns)}
    try:
        try:
            folder = Path(snapshot_download(name, local_files_only=True, **options))
            cached = all((folder / part).is_file() for part in required)
        except Exception:  # noqa: BLE001  # not cached: its exception types vary with the version
            cached = False
        return folder if cached else Path(snapshot_download(name, **options))
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{hub_id}: no such folder, and as a hub id it is neither cached nor reachable ({reason}); "
            "check the name, or download the repository and give its folder"
        ) from error
