"""Checkpoints of the Hugging Face hub, and which names mean one: a mistyped path is never asked of the hub."""

from __future__ import annotations

import contextlib
import difflib
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from dit_export.checkpoints.weights import PICKLES, SAFE
from dit_runtime.core.errors import CheckpointError
from dit_runtime.core.reading import kind_of

HUB_ID = re.compile(r"([\w-][\w.-]*)/[\w.-]+(@[\w./-]+)?")
CACHED = re.compile(r"models--(.+)")  # the folder of a repository in a hub cache; -- stands for the slash


def find_local(name: str) -> Path | None:
    """The file or folder of that name; None where there is none, or none that can be seen."""
    return Path(name) if name and kind_of(Path(name)) in ("file", "folder") else None


def check_hub_id(name: str, expected: str) -> None:
    """Check that a name which is nothing in the file system can only mean a repository of the hub.

    ``expected`` is what the name may be, for the message.

    Raises:
        CheckpointError: it is no hub id, it has the suffix of a weights file, or its first part is a folder here.
    """
    match = HUB_ID.fullmatch(name)
    if match is None or name.endswith((SAFE, *PICKLES)):
        raise CheckpointError(f"{name or repr(name):.300}: {_describe_missing(name)}; expected {expected}")
    if match[2] is None and Path(match[1]).is_dir():
        raise CheckpointError(
            f"{name}: {_describe_missing(name)}; expected {expected}; {name}@main is the hub's repository"
        )


def _describe_missing(name: str) -> str:
    """What is wrong with a path that does not exist, with the names that are near its first wrong part."""
    path = Path(name)
    if not path.parts:
        return "no name"
    try:
        if path.is_symlink():
            return f"is a link to {path.readlink()}, which is not there"
        if path.exists():
            return "neither a file nor a folder"
        parent = next(folder for folder in path.parents if folder.exists())
        names = sorted(other.name for other in parent.iterdir())
    except (OSError, ValueError) as error:
        return f"cannot be opened ({getattr(error, 'strerror', error)})"
    wrong = path.relative_to(parent).parts[0]
    near = [other for other in names if other.casefold().startswith(wrong.casefold())]
    near += [other for other in difflib.get_close_matches(wrong, names, cutoff=0.7) if other not in near]
    return f"no such file or folder; {parent} has {', '.join(near[:5])}" if near else "no such file or folder"


def hub_id_of_snapshot(folder: Path) -> tuple[str, str] | None:
    """The hub id and the commit of a snapshot in a hub cache, ``models--OWNER--NAME/snapshots/COMMIT``; else None."""
    whole = folder.absolute()
    match = CACHED.fullmatch(whole.parent.parent.name)
    if match is None or whole.parent.name != "snapshots":
        return None
    return match[1].replace("--", "/", 1), whole.name


def download_repository(hub_id: str, patterns: Sequence[str], is_complete: Callable[[Path], bool]) -> Path:
    """The folder with a hub repository's files; its name is the repository's commit.

    Args:
        hub_id: ``owner/name`` or ``owner/name@revision``.
        patterns: which files to download.
        is_complete: whether a folder of the cache holds all that is needed; the hub is then not asked.

    Raises:
        CheckpointError: the repository is neither cached nor reachable, or has no such files.
    """
    from huggingface_hub import snapshot_download

    name, _, revision = hub_id.partition("@")
    options: dict[str, Any] = {"revision": revision or None, "allow_patterns": list(patterns)}
    try:
        try:
            folder = Path(snapshot_download(name, local_files_only=True, **options))
            if is_complete(folder):
                return folder
        except Exception:  # noqa: BLE001, S110  # not cached: its exception types vary with the version
            pass
        with _quiet():
            folder = Path(snapshot_download(name, **options))
    except Exception as error:
        raise CheckpointError(f"{hub_id}: {_explain(error, revision)}") from error
    if not folder.is_dir():
        raise CheckpointError(
            f"{hub_id}: the hub's repository has no diffusers files ({', '.join(patterns)}); if it has a weights file, "
            "download it and give its path"
        )
    return folder


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep huggingface_hub from writing: its errors become ours, and its progress bars are for terminals."""
    from huggingface_hub import utils

    verbosity, quiet = utils.logging.get_verbosity(), not (sys.stderr.isatty() or utils.are_progress_bars_disabled())
    utils.logging.set_verbosity(utils.logging.ERROR)
    if quiet:
        utils.disable_progress_bars()
    try:
        yield
    finally:
        utils.logging.set_verbosity(verbosity)
        if quiet:
            utils.enable_progress_bars()


def _explain(error: Exception, revision: str) -> str:
    """Why a download failed and what to do. The hub's own first line names a status and an address."""
    from huggingface_hub import errors

    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, errors.HfHubHTTPError):
        error = error.__cause__  # why the hub was not asked further
    if isinstance(error, errors.GatedRepoError):
        return "the hub asks to accept this repository's terms; accept them on its page, then log in with hf auth login"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "the hub has no such repository, or it is private; check the name, or log in with hf auth login"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"the hub's repository has no revision {revision or 'main'!r}; check what follows the @"
    if isinstance(error, errors.IncompleteSnapshotError):
        return "only a part of it is in the hub's cache, and the hub cannot be reached; go online and try again"
    if isinstance(error, errors.LocalEntryNotFoundError):
        return "not in the hub's cache, and the hub cannot be reached; go online, or give a folder that you downloaded"
    if isinstance(error, errors.HfHubHTTPError) and error.response.status_code in (401, 403):
        return "the hub refuses access; log in with hf auth login"
    if isinstance(error, errors.HfHubHTTPError):
        return f"the hub answers with status {error.response.status_code}; try again later"
    reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
    return f"the download from the hub failed ({reason}); try again: whole files are kept"
