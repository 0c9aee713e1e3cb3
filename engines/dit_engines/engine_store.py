"""The writing side of the engine store: what names an engine, who may write it, and what of the old can be used again.

An engine's folder is named after everything that decides what is in it: the bytes of the ONNX and its weights, recipe
and profiles, library and version, GPU and driver. ``dit_runtime.backends.tensorrt.store`` reads what is written here.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from dit_engines.audit import Audit, audit_from_json
from dit_engines.build_host import BuildHost
from dit_engines.recipe import Recipe, profiles_of
from dit_runtime.backends.profiles import Profile
from dit_runtime.backends.tensorrt.store import SCHEMA, SIDECAR, StoredEngine, engine_from_sidecar, read_sidecar
from dit_runtime.bundle.reader import Bundle
from dit_runtime.core.errors import EngineError, OutputError
from dit_runtime.core.files import sha256_of

TIMING_CACHE = "timing.cache"
STORE_OPTION = "--store"


@dataclass(frozen=True)
class BuiltGraph:
    """A compiled graph: its plan's size and hash, profiles, audit, and the seconds it took."""

    graph: str
    plan: str
    plan_bytes: int
    plan_sha256: str
    seconds: float
    profiles: tuple[Profile, ...]
    audit: Audit

    def as_json(self) -> dict[str, Any]:
        """As the sidecar holds it."""
        return {
            **asdict(self),
            "weights_bytes": self.audit.weights_bytes,
            "activation_bytes": [profile.activation_bytes for profile in self.audit.profiles],
        }


@dataclass(frozen=True)
class BuiltEngine:
    """What a folder of the engine store holds, and how it came there.

    ``reused``: it was there. ``explanation``: what differs from the nearest engine that was there, a line a field.
    ``timing_cache``: the SHA-256 of the cache after the build.
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
    bundle: Bundle, recipe: Recipe, place: BuildHost, graphs: Sequence[str], timing_cache: str | None
) -> dict[str, Any]:
    """Everything that decides what a build makes, field by field.

    Args:
        bundle: at the size in use.
        recipe: of the build.
        place: where.
        graphs: that are built.
        timing_cache: the digest of one that the user named.
    """
    manifest = bundle.manifest
    fields: dict[str, Any] = {
        "library": place.library,
        "TensorRT": place.version,
        "GPU": place.gpu,
        "driver": place.driver,
        "image size": list(manifest.image_size),
        "timing cache": timing_cache,
        **{name.replace("_", " "): value for name, value in recipe.as_json().items()},
    }
    for name in graphs:
        graph = manifest.graphs[name]
        fields[f"{name} ONNX"] = manifest.files[graph.file].sha256
        fields[f"{name} weights"] = manifest.files[graph.weights].sha256
        fields[f"{name} profiles"] = profiles_of(graph, recipe, manifest)
    normal: dict[str, Any] = json.loads(json.dumps(fields))  # tuples as JSON gives them back
    return normal


def folder_name(bundle: Bundle, recipe: Recipe, identity: Mapping[str, Any]) -> str:
    """The engine's folder in the store: target, GPU and a hash of all that matters."""
    text = json.dumps([SCHEMA, bundle.digest, identity], sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    return f"{recipe.target}-sm{recipe.compute_capability.replace('.', '')}-{digest}"


def sidecar_of(
    bundle: Bundle,
    recipe: Recipe,
    place: BuildHost,
    identity: Mapping[str, Any],
    graphs: Sequence[BuiltGraph],
    timing_cache: str,
) -> dict[str, Any]:
    """The sidecar of an engine that has passed its audit; TF32 was off in each of its builds."""
    return {
        "schema": SCHEMA,
        "bundle": bundle.digest,
        "image_size": list(bundle.manifest.image_size),
        "library": place.library,
        "version": place.version,
        "target": recipe.target,
        "compute_capability": place.compute_capability,
        "gpu": place.gpu,
        "driver": place.driver,
        "recipe": recipe.as_json(),
        "identity": dict(identity),
        "timing_cache": {"file": TIMING_CACHE, "sha256": timing_cache},
        "tf32": False,
        "graphs": [graph.as_json() for graph in graphs],
    }


def write_sidecar(folder: Path, sidecar: Mapping[str, Any]) -> None:
    """Write the sidecar into a folder that is not yet in its place."""
    (folder / SIDECAR).write_text(json.dumps(sidecar, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def find_engine(folder: Path, recipe: Recipe) -> BuiltEngine | None:
    """The engine in ``folder`` when its sidecar is sound and its plans have their hashes."""
    try:
        raw = read_sidecar(folder)
        stored = engine_from_sidecar(folder, raw)
        for graph in stored.graphs:
            stored.plan(graph)
        return _built(stored, raw, recipe)
    except (EngineError, KeyError, TypeError, ValueError):
        return None


def _built(stored: StoredEngine, raw: Mapping[str, Any], recipe: Recipe) -> BuiltEngine:
    graphs = []
    for item in raw["graphs"]:
        own = stored.graphs[item["graph"]]
        audit = audit_from_json(item["audit"])
        graphs.append(
            BuiltGraph(
                own.graph, own.plan, own.plan_bytes, own.plan_sha256, float(item["seconds"]), own.profiles, audit
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
        timing_cache=raw["timing_cache"]["sha256"],
    )


def find_twin(store: Path, identity: Mapping[str, Any], recipe: Recipe) -> BuiltEngine | None:
    """A whole engine of the same content, made for another bundle: one that differs in its golden records, say."""
    for folder, found in _identities(store):
        if found == identity and (engine := find_engine(folder, recipe)) is not None:
            return engine
    return None


def link_plans(engine: BuiltEngine, folder: Path) -> tuple[BuiltGraph, ...]:
    """Give an engine's plans and timing cache to another folder, without a second copy where the file system can."""
    for name in (*(graph.plan for graph in engine.graphs), TIMING_CACHE):
        try:
            os.link(engine.folder / name, folder / name)
        except OSError:
            shutil.copyfile(engine.folder / name, folder / name)
    return tuple(replace(graph, seconds=0.0) for graph in engine.graphs)


def pinned_cache(store: Path, place: BuildHost) -> Path | None:
    """The timing cache of the last build here, by the same version on the same GPU, when it has its digest.

    With it a build chooses the kernels that the last one chose.
    """
    found: list[tuple[float, Path]] = []
    wanted = (place.library, place.version, place.compute_capability, place.gpu, place.driver)
    for folder in _folders(store):
        try:
            raw = read_sidecar(folder)
            path, digest = folder / TIMING_CACHE, raw["timing_cache"]["sha256"]
            made = tuple(raw[name] for name in ("library", "version", "compute_capability", "gpu", "driver"))
            if made == wanted and not path.is_symlink() and sha256_of(path) == digest:
                found.append((path.stat().st_mtime, path))
        except (EngineError, OSError, KeyError, TypeError):
            continue
    return max(found)[1] if found else None


def explain_rebuild(store: Path, identity: Mapping[str, Any]) -> tuple[str, ...]:
    """Why nothing in the store is what is asked for: the fields that differ from the nearest engine, before → now."""
    nearest: list[str] | None = None
    for folder, found in _identities(store):
        fields = [
            f"{name}: {_shown(found.get(name))} → {_shown(identity.get(name))}"
            for name in {**found, **identity}
            if found.get(name) != identity.get(name)
        ]
        if not fields:
            fields = [f"{folder.name}: its plans or sidecar are damaged, or were made for another export"]
        if nearest is None or len(fields) < len(nearest):
            nearest = fields
    return ("no engine in the store",) if nearest is None else tuple(nearest)


def _shown(value: Any) -> str:
    if isinstance(value, str) and len(value) == 64:
        return f"{value[:12]}…"
    text = "none" if value is None else value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else f"{hashlib.sha256(text.encode()).hexdigest()[:12]}…"


def _identities(store: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    for folder in _folders(store):
        with contextlib.suppress(EngineError):
            if isinstance(found := read_sidecar(folder).get("identity"), dict):
                yield folder, found


def _folders(store: Path) -> list[Path]:
    return sorted(path.parent for path in store.glob(f"*/{SIDECAR}") if not path.parent.name.startswith("."))


@contextlib.contextmanager
def lock_store(folder: Path) -> Iterator[bool]:
    """Keep others from building what will be ``folder``; gives whether another one had to be waited for.

    Raises:
        OutputError: the store cannot be written.
    """
    path = folder.parent / f".{folder.name}.lock"
    waited = False
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        while True:
            file = path.open("w")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                waited = True
                print(f"dit-build: another one builds {folder.name}; waiting for it", file=sys.stderr)
                fcntl.flock(file, fcntl.LOCK_EX)
            # The one before removed its file: a lock on that keeps nobody out.
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                break
            file.close()
    except OSError as error:
        raise OutputError(
            f"{folder.parent}: cannot be written ({error.strerror or error}); choose another {STORE_OPTION}"
        ) from error
    try:
        yield waited
    finally:
        path.unlink(missing_ok=True)
        file.close()
