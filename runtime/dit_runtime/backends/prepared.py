"""Graphs in an engine's own form, kept so that the next start is fast and weights are read from a file, not held.

    STORE/ENGINE/KEY/prepared.json    what it was made from, with what and for what; size and SHA-256 of the other files
    STORE/ENGINE/KEY/*                the engine's files of one graph
    STORE/ENGINE/.KEY.lock            held while they are made: a second process waits for them

KEY covers all that ``prepared.json`` says. So what another machine or version made is never opened, and the folder may
be deleted at any time. A file is given to an engine only when it has the size and hash that ``prepared.json`` says.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from dit_runtime.bundle.manifest import FileSpec
from dit_runtime.bundle.reader import Bundle
from dit_runtime.core.decode import DecodeError, decode, read_json
from dit_runtime.core.errors import OutputError
from dit_runtime.core.files import replace_folder, sha256_of
from dit_runtime.core.machine import read_processor

logger = logging.getLogger(__name__)

SIDECAR = "prepared.json"
SIDECAR_LIMIT = 1 << 20  # bytes: far above any, and little to read


@dataclass(frozen=True)
class Facts:
    """What a prepared graph depends on: the bundle's digest and the graph's file, how it is arranged, and for what."""

    bundle: str
    file: str
    form: dict[str, str]
    version: str
    processor: str
    flags: tuple[str, ...]

    @property
    def source(self) -> tuple[str, str, dict[str, str]]:
        """What was prepared; the other facts say with what and where."""
        return self.bundle, self.file, self.form


@dataclass(frozen=True)
class Prepared(Facts):
    """``prepared.json``: the facts, and size and hash of each file."""

    files: dict[str, FileSpec]


def facts_of(bundle: Bundle, graph: str, version: str, form: Mapping[str, str]) -> Facts:
    """What a prepared graph depends on.

    Args:
        bundle: whose graph.
        graph: its name in the manifest, at the bundle's size.
        version: the engine's.
        form: the engine's own settings that decide what is in the files.
    """
    cpu = read_processor()
    return Facts(bundle.digest, bundle.manifest.graphs[graph].file, dict(form), version, cpu.model, cpu.flags)


def prepare_graph(folder: Path, facts: Facts, make: Callable[[Path], None]) -> Path | None:
    """The folder of a prepared graph in ``folder`` (``STORE/ENGINE``): found and checked, or made.

    Args:
        folder: where the engine's prepared graphs are.
        facts: of ``facts_of``.
        make: writes the files into a folder that exists and is empty.

    Returns:
        None where it can be neither found nor written (a read-only bundle, a full disk): nothing is said, since the
        engine works without it.
    """
    target = _folder_of(folder, facts)
    if _is_whole(target, facts):
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / f".{target.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # until it is closed, by the end of the process if need be
            if _is_whole(target, facts):  # another process was first
                return target
            made_again = f"{target}: damaged, made again" if target.exists() else _describe_other(folder, facts)
            with replace_folder(target) as temporary:
                make(temporary)
                files = {
                    file.name: FileSpec(file.stat().st_size, sha256_of(file)) for file in sorted(temporary.iterdir())
                }
                sidecar = json.dumps(asdict(Prepared(**vars(facts), files=files)), indent=1) + "\n"
                (temporary / SIDECAR).write_text(sidecar, encoding="utf-8")
    except (OSError, OutputError):
        return None
    if made_again:
        logger.info(made_again)
    return target


def find_prepared(folder: Path, facts: Facts) -> Path | None:
    """As ``prepare_graph``, of a graph that is there and whole; None for any other."""
    target = _folder_of(folder, facts)
    return target if _is_whole(target, facts) else None


def _folder_of(folder: Path, facts: Facts) -> Path:
    return folder / hashlib.sha256(json.dumps(asdict(facts), sort_keys=True).encode()).hexdigest()[:16]


def _is_whole(target: Path, facts: Facts) -> bool:
    """Whether a folder is what its name says, and every file in it the one that was written."""
    prepared = _read_sidecar(target)
    if prepared is None or prepared != Prepared(**vars(facts), files=prepared.files):
        return False
    try:
        present = {path.name for path in target.iterdir()} - {SIDECAR}
        return present == set(prepared.files) and all(
            not (path := target / name).is_symlink()
            and path.stat().st_size == file.bytes
            and sha256_of(path) == file.sha256
            for name, file in prepared.files.items()
        )
    except OSError:
        return False


def _read_sidecar(target: Path) -> Prepared | None:
    path = target / SIDECAR
    if target.is_symlink() or path.is_symlink():
        return None
    try:
        return decode(Prepared, read_json(path, SIDECAR_LIMIT))
    except DecodeError:
        return None


def _describe_other(folder: Path, facts: Facts) -> str | None:
    """A line about the same graph made by another version or for another processor, if there is one."""
    for path in sorted(folder.glob(f"*/{SIDECAR}")):
        found = _read_sidecar(path.parent)
        if found is not None and found.source == facts.source:
            there, here = (f"{each.version} on {each.processor}" for each in (found, facts))
            if there == here:
                here = "a processor with other instructions"
            return f"{folder}: {Path(facts.file).stem} is there for {there}; made again for {here}"
    return None
