"""Prepared graphs: graphs in a backend's own form, kept on disk.

With them the next start is fast, and the weights are mapped from a file and not held in anonymous memory.

    STORE/BACKEND/KEY/prepared.json    the facts that the graph depends on; size and SHA-256 of the other files
    STORE/BACKEND/KEY/*                the files of one graph in the backend's own form
    STORE/BACKEND/.KEY.lock            held while a process makes the files: a second process waits

KEY is the hash of the facts, so a graph that another machine or version made is never opened. A file is given to the
backend's library only when it has the size and hash that ``prepared.json`` says. The folder may be deleted or altered
at any time, also between that check and the moment when the library has read the files: the graph is made again then,
or the engine works without.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

from dit_runtime.bundle.manifest import FileSpec
from dit_runtime.bundle.reader import Bundle
from dit_runtime.core.decode import DecodeError, decode, read_json
from dit_runtime.core.errors import DiTError, OutputError
from dit_runtime.core.files import sha256_of
from dit_runtime.core.machine import read_processor
from dit_runtime.core.reading import SIDECAR_BYTES, FileError
from dit_runtime.core.replace import check_place, clear_litter, hold_lock, replace_folder

logger = logging.getLogger(__name__)

Model = TypeVar("Model")
Stamps = dict[str, tuple[int, ...]]  # by file name: what changes with the file's content

SIDECAR = "prepared.json"


@dataclass(frozen=True)
class Facts:
    """All that a prepared graph depends on.

    Attributes:
        bundle: the bundle's digest.
        file: the graph's file in the bundle.
        form: the backend's settings that decide the files' content.
        version: the backend's library and its version.
        processor: the CPU's model.
        flags: the CPU's instruction sets.
    """

    bundle: str
    file: str
    form: dict[str, str]
    version: str
    processor: str
    flags: tuple[str, ...]

    @property
    def source(self) -> tuple[str, str, dict[str, str]]:
        """Bundle, file and form: the facts that do not depend on the machine or the library."""
        return self.bundle, self.file, self.form


@dataclass(frozen=True)
class Prepared(Facts):
    """The content of ``prepared.json``: the facts, and the size and hash of each other file."""

    files: dict[str, FileSpec]


def facts_of(bundle: Bundle, graph: str, version: str, form: Mapping[str, str]) -> Facts:
    """The facts that a prepared graph depends on, with those of the CPU here.

    Args:
        bundle: at the size in use.
        graph: name of the graph in the manifest.
        version: the backend's library and its version, such as ``openvino 2026.1``.
        form: the backend's settings that decide the files' content.
    """
    cpu = read_processor()
    return Facts(bundle.digest, bundle.manifest.graphs[graph].file, dict(form), version, cpu.model, cpu.flags)


@dataclass(frozen=True)
class CheckedGraph:
    """A prepared graph whose files were as they were written when they were checked."""

    folder: Path
    stamps: Stamps

    def is_unchanged(self) -> bool:
        """Whether the files are those that were checked."""
        try:
            return _stamps_of(self.folder) == self.stamps
        except OSError:
            return False


def load_prepared(
    folder: Path,
    facts: Facts,
    make: Callable[[Path], None],
    load: Callable[[Path], Model],
    found: CheckedGraph | None = None,
) -> Model | None:
    """Load a prepared graph. It is made first where there is none, and again where it changes while it is loaded.

    Args:
        folder: the folder of the backend's prepared graphs, ``STORE/BACKEND``.
        facts: from ``facts_of``.
        make: writes the files into the empty folder that it is given.
        load: opens the files in the graph's folder.
        found: from ``find_prepared``, a moment ago.

    Returns:
        What ``load`` returns; None where there is no graph that can be made and loaded. The caller then works without.
    """
    for _ in range(2):
        checked = found or prepare_graph(folder, facts, make)
        found = None
        if checked is None:
            return None
        try:
            model = load(checked.folder)
        except Exception as error:  # noqa: BLE001  # the libraries have no exceptions in common
            if checked.is_unchanged():
                reason = (str(error).splitlines() or [type(error).__name__])[-1]
                logger.info(f"{checked.folder}: cannot be loaded ({reason}), so not used")
                return None
            continue
        if checked.is_unchanged():
            return model
    return None


def prepare_graph(folder: Path, facts: Facts, make: Callable[[Path], None]) -> CheckedGraph | None:
    """Find a prepared graph and check its files, or make it. The arguments are those of ``load_prepared``.

    Returns:
        None where there is no such graph and none can be written, as in a read-only bundle or on a full disk. That is
        not reported, because the engine works without prepared graphs.
    """
    if (found := find_prepared(folder, facts)) is not None:
        return found
    target = _folder_of(folder, facts)
    try:
        check_place(lock := folder / f".{target.name}.lock", within=folder.parent)
        folder.mkdir(parents=True, exist_ok=True)
        with hold_lock(lock):
            if (found := _check_graph(target, facts)) is not None:  # another process made it meanwhile
                return found
            made_again = f"{target}: damaged, so made again" if target.exists() else _describe_other(folder, facts)
            with replace_folder(target) as temporary:
                make(temporary)
                stamps = _stamps_of(temporary)  # before the hashes: what is altered between them is seen
                files = {
                    file.name: FileSpec(file.stat().st_size, sha256_of(file)) for file in sorted(temporary.iterdir())
                }
                sidecar = json.dumps(asdict(Prepared(**vars(facts), files=files)), indent=1) + "\n"
                (temporary / SIDECAR).write_text(sidecar, encoding="utf-8")
    except OutputError:
        return None
    except DiTError:
        raise
    except Exception:  # noqa: BLE001  # a library's, on a full disk: what else is wrong, the caller meets again
        return None
    if made_again:
        logger.info(made_again)
    return CheckedGraph(target, stamps)


def find_prepared(folder: Path, facts: Facts) -> CheckedGraph | None:
    """A prepared graph whose files are as they were written; None where there is none."""
    clear_litter(folder)
    return _check_graph(_folder_of(folder, facts), facts)


def _folder_of(folder: Path, facts: Facts) -> Path:
    return folder / hashlib.sha256(json.dumps(asdict(facts), sort_keys=True).encode()).hexdigest()[:16]


def _check_graph(target: Path, facts: Facts) -> CheckedGraph | None:
    """The graph in a folder; None where it is not of these facts, or a file in it is not as it was written."""
    prepared = _read_sidecar(target)
    if prepared is None or prepared != Prepared(**vars(facts), files=prepared.files):
        return None
    try:
        stamps = _stamps_of(target)
        whole = set(stamps) == set(prepared.files) and all(
            not (path := target / name).is_symlink()
            and path.stat().st_size == file.bytes
            and sha256_of(path, file.bytes, within=target) == file.sha256
            for name, file in prepared.files.items()
        )
    except (OSError, FileError):
        return None
    return CheckedGraph(target, stamps) if whole else None


def _stamps_of(folder: Path) -> Stamps:
    """Raises OSError where the folder or a file in it is missing."""
    found = {path.name: path.lstat() for path in folder.iterdir() if path.name != SIDECAR}
    return {name: (each.st_ino, each.st_size, each.st_mtime_ns, each.st_ctime_ns) for name, each in found.items()}


def _read_sidecar(target: Path) -> Prepared | None:
    path = target / SIDECAR
    if target.is_symlink() or path.is_symlink():
        return None
    try:
        return decode(Prepared, read_json(path, SIDECAR_BYTES, within=target))
    except DecodeError:
        return None


def _describe_other(folder: Path, facts: Facts) -> str | None:
    """A line about the same graph of another version or processor; None where there is no such graph."""
    for path in sorted(path for path in folder.glob(f"*/{SIDECAR}") if path.parent.name[0] != "."):
        found = _read_sidecar(path.parent)
        if found is not None and found.source == facts.source:
            other, here = (f"{each.version} on {each.processor}" for each in (found, facts))
            if other == here:
                here = "a processor with other instructions"
            return f"{folder}: {Path(facts.file).stem} was prepared for {other}; prepared again for {here}"
    return None
