"""The engine store as ``dit-build`` writes it: an engine's name, its sidecar, the lock, and what can be used again.

The name of an engine's folder has a hash of everything that decides what is in it: the ONNX files and their weights,
recipe and profiles, library and version, GPU and driver. ``dit_runtime.backends.tensorrt.store`` reads the store.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from dit_engines.audit import Audit, audit_from_json
from dit_engines.build_host import BuildHost
from dit_engines.recipe import Recipe, profiles_of
from dit_runtime.backends.profiles import Profile
from dit_runtime.backends.tensorrt.api import BUILDER_FLAGS
from dit_runtime.backends.tensorrt.store import (
    SCHEMA,
    SIDECAR,
    EngineRecord,
    StoredEngine,
    engine_from_record,
    read_record,
)
from dit_runtime.bundle.reader import Bundle
from dit_runtime.core.decode import DecodeError
from dit_runtime.core.errors import EngineError, OutputError
from dit_runtime.core.files import sha256_of
from dit_runtime.core.reading import TIMING_CACHE_BYTES, FileError, check_file
from dit_runtime.core.replace import check_place

TIMING_CACHE = "timing.cache"
# Beside a graph's plan: the builder's messages, and the inspector's JSON where the plan could be inspected.
LOG, LAYERS = "{}.log", "{}.layers.json"
STORE_OPTION = "--store"


@dataclass(frozen=True)
class BuiltGraph:
    """A compiled graph: its plan's size and hash, profiles, audit, and the seconds that the build took.

    ``doubts`` are what the audit found in a plan that is stored all the same (``compile.judge_audit``).
    """

    graph: str
    plan: str
    plan_bytes: int
    plan_sha256: str
    seconds: float
    profiles: tuple[Profile, ...]
    audit: Audit
    doubts: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """The graph as the sidecar has it."""
        return {
            **asdict(self),
            "weights_bytes": self.audit.weights_bytes,
            "activation_bytes": [profile.activation_bytes for profile in self.audit.profiles],
        }


@dataclass(frozen=True)
class BuiltEngine:
    """An engine in the store.

    Attributes:
        folder: of the engine, in the store.
        bundle: the bundle's digest.
        builder: library and version.
        recipe: what was asked for.
        graphs: the compiled graphs.
        reused: whether the engine or its plans were in the store before.
        explanation: why they were not: each field that differs from the nearest engine in the store.
        timing_cache: the SHA-256 of the cache after the build; None by TensorRT-RTX, which has none.
    """

    folder: Path
    bundle: str
    builder: str
    recipe: Recipe
    graphs: tuple[BuiltGraph, ...]
    reused: bool
    explanation: tuple[str, ...] = ()
    timing_cache: str | None = None


def identity_of(
    bundle: Bundle, recipe: Recipe, host: BuildHost, graphs: Sequence[str], timing_cache: str | None
) -> dict[str, Any]:
    """Everything that decides what a build makes, field by field.

    Args:
        bundle: at the size in use.
        recipe: of the build.
        host: where the engine is built.
        graphs: names of the graphs.
        timing_cache: the digest of the cache that the user named; None without one.
    """
    manifest = bundle.manifest
    fields: dict[str, Any] = {
        "library": host.library,
        "TensorRT": host.version,
        "GPU": host.gpu,
        "driver": host.driver,
        "image size": list(manifest.image_size),
        "timing cache": timing_cache,
        "builder flags": list(BUILDER_FLAGS[host.library]),
        **{name.replace("_", " "): value for name, value in recipe.as_json().items()},
    }
    for name in graphs:
        graph = manifest.graphs[name]
        fields[f"{name} ONNX"] = manifest.files[graph.file].sha256
        fields[f"{name} weights"] = manifest.files[graph.weights].sha256
        fields[f"{name} profiles"] = profiles_of(graph, recipe, manifest)
    normal: dict[str, Any] = json.loads(json.dumps(fields))  # JSON has lists for tuples
    return normal


def folder_name(bundle: Bundle, recipe: Recipe, identity: Mapping[str, Any]) -> str:
    """The name of an engine's folder: target, compute capability, and a hash of the bundle and the identity."""
    text = json.dumps([SCHEMA, bundle.digest, identity], sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    return f"{recipe.target}-sm{recipe.compute_capability.replace('.', '')}-{digest}"


def sidecar_of(
    bundle: Bundle,
    recipe: Recipe,
    host: BuildHost,
    identity: Mapping[str, Any],
    graphs: Sequence[BuiltGraph],
    timing_cache: str | None,
) -> dict[str, Any]:
    """The sidecar of an engine that its audit did not refuse; TF32 was off in every build."""
    return {
        "schema": SCHEMA,
        "bundle": bundle.digest,
        "image_size": list(bundle.manifest.image_size),
        "library": host.library,
        "version": host.version,
        "target": recipe.target,
        "compute_capability": host.compute_capability,
        "gpu": host.gpu,
        "driver": host.driver,
        "recipe": recipe.as_json(),
        "identity": dict(identity),
        "timing_cache": None if timing_cache is None else {"file": TIMING_CACHE, "sha256": timing_cache},
        "tf32": False,
        "graphs": [graph.as_json() for graph in graphs],
    }


def write_sidecar(folder: Path, sidecar: Mapping[str, Any]) -> None:
    """Write the sidecar of an engine into its folder."""
    (folder / SIDECAR).write_text(json.dumps(sidecar, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def find_engine(folder: Path, recipe: Recipe) -> BuiltEngine | None:
    """The engine in ``folder``; None when its sidecar is damaged or a plan does not have its hash."""
    try:
        record = read_record(folder)
        stored = engine_from_record(folder, record)
        for graph in stored.graphs:
            stored.find_plan(graph)
        return _engine_from_record(stored, record, recipe)
    except (EngineError, DecodeError):
        return None


def _engine_from_record(stored: StoredEngine, record: EngineRecord, recipe: Recipe) -> BuiltEngine:
    """Raises DecodeError for a damaged audit."""
    graphs = []
    for item in record.graphs:
        own, audit = stored.graphs[item.graph], audit_from_json(item.audit)
        graphs.append(
            BuiltGraph(
                graph=own.graph,
                plan=own.plan,
                plan_bytes=own.plan_bytes,
                plan_sha256=own.plan_sha256,
                seconds=item.seconds,
                profiles=own.profiles,
                audit=audit,
                doubts=item.doubts,
            )
        )
    builder = f"{stored.library} {stored.version}"
    return BuiltEngine(
        stored.folder,
        stored.bundle,
        builder,
        recipe,
        tuple(graphs),
        reused=True,
        timing_cache=record.timing_cache.sha256 if record.timing_cache is not None else None,
    )


def find_twin(store: Path, identity: Mapping[str, Any], recipe: Recipe) -> BuiltEngine | None:
    """An engine with the same plans, made for another bundle: one that differs in its golden records, say."""
    for folder, found in _identities_in(store):
        if found == identity and (engine := find_engine(folder, recipe)) is not None:
            return engine
    return None


def link_plans(engine: BuiltEngine, folder: Path) -> tuple[BuiltGraph, ...]:
    """Put an engine's plans and timing cache into another folder too: as links, or as copies where links fail.

    The builder's messages and the inspector's JSON come too where they are there.

    Raises:
        OutputError: a file of the engine is missing, or not a plain file.
    """
    told = [name.format(graph.graph) for graph in engine.graphs for name in (LOG, LAYERS)]
    told = [TIMING_CACHE, *told]
    told = [name for name in told if (engine.folder / name).is_file() and not (engine.folder / name).is_symlink()]
    for name in (*(graph.plan for graph in engine.graphs), *told):
        try:
            check_file(engine.folder / name, None, within=engine.folder)
            os.link(engine.folder / name, folder / name)
        except FileError as error:
            raise OutputError(
                f"{engine.folder / name}: {error}; remove {engine.folder} and run dit-build again"
            ) from error
        except OSError:
            shutil.copyfile(engine.folder / name, folder / name)
    return tuple(replace(graph, seconds=0.0) for graph in engine.graphs)


def digest_of_written(path: Path) -> str:
    """The SHA-256 of a file that this build has just written.

    Raises:
        OutputError: it is not there any more, since somebody removed the store meanwhile.
    """
    try:
        return sha256_of(path)
    except FileError as error:
        raise OutputError(
            f"{path}: {error}, and was just written: the engine store was removed or replaced meanwhile; run dit-build "
            "again"
        ) from error


def find_timing_cache(store: Path, host: BuildHost) -> Path | None:
    """The timing cache of the store's last build by the same library on the same GPU; None when there is none.

    A build with this cache chooses the kernels that the last build chose. A cache without its digest is left out.
    """
    found: list[tuple[float, Path]] = []
    wanted = (host.library, host.version, host.compute_capability, host.gpu, host.driver)
    for folder in _folders_of(store):
        try:
            record = read_record(folder)
            path = folder / TIMING_CACHE
            made = (record.library, record.version, record.compute_capability, record.gpu, record.driver)
            if (
                made == wanted
                and record.timing_cache is not None
                and not path.is_symlink()
                and sha256_of(path, TIMING_CACHE_BYTES, within=folder) == record.timing_cache.sha256
            ):
                found.append((path.stat().st_mtime, path))
        except (EngineError, OSError, FileError):
            continue
    return max(found)[1] if found else None


def explain_rebuild(store: Path, identity: Mapping[str, Any]) -> tuple[str, ...]:
    """Why no engine in the store can be used: the fields that differ from the nearest engine, as before → now."""
    nearest: list[str] | None = None
    for folder, found in _identities_in(store):
        fields = [
            f"{_short_text(name)}: {_short_text(found.get(name))} → {_short_text(identity.get(name))}"
            for name in {**found, **identity}
            if found.get(name) != identity.get(name)
        ]
        if not fields:
            fields = [f"{folder.name}: its plans or its sidecar are damaged, or it is for another export"]
        if nearest is None or len(fields) < len(nearest):
            nearest = fields
    return ("no engine in the store",) if nearest is None else tuple(nearest)


def _short_text(value: Any) -> str:
    if isinstance(value, str) and len(value) == 64:
        return f"{value[:12]}…"
    text = "none" if value is None else value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else f"{hashlib.sha256(text.encode()).hexdigest()[:12]}…"


def _identities_in(store: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    for folder in _folders_of(store):
        with contextlib.suppress(EngineError):
            yield folder, read_record(folder).identity


def _folders_of(store: Path) -> list[Path]:
    return sorted(path.parent for path in store.glob(f"*/{SIDECAR}") if not path.parent.name.startswith("."))


@contextlib.contextmanager
def lock_store(folder: Path, say: Callable[[str], None]) -> Iterator[bool]:
    """Keep other processes from building ``folder``; gives whether this one had to wait for another.

    ``say`` is told once when it has to wait.

    Raises:
        OutputError: the store cannot be written, or the lock's file is a link or no plain file.
    """
    path = _lock_of(folder)
    check_place(path, folder.parent, STORE_OPTION)
    lock = FileLock(path)
    waited = False
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            waited = True
            say(f"another process builds {folder.name}; waiting for it")
            lock.acquire()
    except OSError as error:
        raise OutputError(
            f"{folder.parent}: cannot be written ({error.strerror or error}); choose another {STORE_OPTION}"
        ) from error
    try:
        yield waited
    finally:
        path.unlink(missing_ok=True)  # while the lock is held: filelock takes no lock on a file that is gone
        lock.release()


def clear_lock(folder: Path) -> None:
    """Remove the lock's file of an engine that a killed process left."""
    path = _lock_of(folder)
    if path.is_symlink() or not path.is_file():
        return
    with contextlib.suppress(OSError, Timeout), FileLock(path).acquire(blocking=False):
        path.unlink(missing_ok=True)


def _lock_of(folder: Path) -> Path:
    return folder.parent / f".{folder.name}.lock"
