"""An engine from a bundle: its graphs compiled and audited, and stored unless the audit refuses one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from dit_engines.audit import find_unknowns
from dit_engines.build_host import BuildHost, build_host_for
from dit_engines.compile import compile_graphs, judge_audit
from dit_engines.engine_store import (
    STORE_OPTION,
    TIMING_CACHE,
    BuiltEngine,
    clear_lock,
    digest_of_written,
    explain_rebuild,
    find_engine,
    find_timing_cache,
    find_twin,
    folder_name,
    identity_of,
    link_plans,
    lock_store,
    sidecar_of,
    write_sidecar,
)
from dit_engines.recipe import Recipe
from dit_engines.targets import check_precision
from dit_runtime.bundle.manifest import ENCODER
from dit_runtime.bundle.precision import Precision
from dit_runtime.bundle.reader import Bundle
from dit_runtime.core.errors import BuildError
from dit_runtime.core.files import sha256_of
from dit_runtime.core.reading import TIMING_CACHE_BYTES, FileError
from dit_runtime.core.replace import check_writable, clear_litter, replace_folder

BUILT_GRAPHS = ("conditioner", "step", "decoder", ENCODER)  # the probe is for ONNX Runtime and OpenVINO only


def engine_from_bundle(
    bundle: Bundle,
    recipe: Recipe,
    store: Path | None = None,
    host: BuildHost | None = None,
    timing_cache: Path | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> BuiltEngine:
    """Compile a bundle's graphs, or find the engine in the store.

    A stored engine is used again when everything that decides what a build makes is the same (``identity_of``) and its
    plans still have their hashes. When another process builds the same engine, this process waits for it.

    Args:
        bundle: at the size in use.
        recipe: shapes and limits.
        store: where engines are kept; None is the bundle's own ``engines`` folder.
        host: where the engine is built; None finds it by the recipe's target.
        timing_cache: of an earlier build, to choose the same kernels; None takes the cache of the store's last build on
            this host.
        say: told when this process has to wait for another.

    Raises:
        BuildError: the GPU does not have the bundle's precision, the library is missing, a graph cannot be built, or
            the audit refuses the engine.
        BundleError: a file of the bundle is missing or altered.
        OutputError: the store cannot be written, or is full.
    """
    check_precision(bundle.manifest.precision.name, recipe.compute_capability, str(bundle.path))
    host = host or build_host_for(recipe.target, recipe.compute_capability)
    if timing_cache is not None and not host.times_kernels:
        raise BuildError(
            f"{timing_cache}: a timing cache with {host.library}, which times no kernels; leave --timing-cache out"
        )
    store = store or bundle.engines
    graphs = graphs_of(bundle)
    identity = identity_of(bundle, recipe, host, graphs, None if timing_cache is None else _digest_of(timing_cache))
    folder = store / folder_name(bundle, recipe, identity)
    clear_litter(store)
    if (engine := find_engine(folder, recipe)) is not None:
        clear_lock(folder)
        return engine
    check_writable(folder, STORE_OPTION)
    with lock_store(folder, say) as waited:
        if waited and (engine := find_engine(folder, recipe)) is not None:
            return engine
        twin = find_twin(store, identity, recipe)
        why = explain_rebuild(store, identity)
        with replace_folder(folder, STORE_OPTION) as temporary:
            if twin is not None:
                linked = link_plans(twin, temporary)  # the other bundle may have asked for less: judged again
                built = tuple(replace(graph, doubts=judge_audit(bundle, graph, host.library)) for graph in linked)
                why = (f"{twin.folder.name} has the same plans, made for another export of the same graphs",)
            else:
                cache = timing_cache or find_timing_cache(store, host)
                try:
                    built = compile_graphs(bundle, recipe, host, graphs, temporary, cache)
                except BuildError as error:
                    raise BuildError(f"{error}{_keep_messages(temporary, folder)}") from error
            digest = digest_of_written(temporary / TIMING_CACHE) if host.times_kernels else None
            write_sidecar(temporary, sidecar_of(bundle, recipe, host, identity, built, digest))
    return BuiltEngine(
        folder=folder,
        bundle=bundle.digest,
        builder=f"{host.library} {host.version}",
        recipe=recipe,
        graphs=built,
        reused=twin is not None,
        explanation=why,
        timing_cache=digest,
    )


def graphs_of(bundle: Bundle) -> tuple[str, ...]:
    """The graphs of a bundle that an engine holds."""
    return tuple(graph for graph in BUILT_GRAPHS if graph in bundle.manifest.graphs)


def as_json(engine: BuiltEngine) -> dict[str, Any]:
    """An engine for ``--json``: the sidecar's figures, and the shares that follow from them."""
    graphs = []
    for built in engine.graphs:
        item = built.as_json()
        for own, profile in zip(item["audit"]["profiles"], built.audit.profiles, strict=True):
            shares = {f"{each}_share": round(profile.share_of_all(each), 4) for each in Precision}
            own |= {**shares, "known_share": round(profile.known_share, 4)}
        graphs.append(item)
    return {
        "folder": str(engine.folder),
        "bundle": engine.bundle,
        "builder": engine.builder,
        "recipe": engine.recipe.as_json(),
        "reused": engine.reused,
        "explanation": list(engine.explanation),
        "notes": [note for built in engine.graphs for note in find_unknowns(built.audit, built.graph)],
        "doubts": [doubt for built in engine.graphs for doubt in built.doubts],
        "timing_cache": engine.timing_cache,
        "graphs": graphs,
    }


def _keep_messages(temporary: Path, folder: Path) -> str:
    """Keep the builder's messages of an engine that is not stored, beside its place in the store.

    Returns:
        What the error's message says of it; empty where the builder said nothing.
    """
    told = [path for path in temporary.iterdir() if path.suffix == ".log" or path.name.endswith(".layers.json")]
    if not told:
        return ""
    kept = folder.parent / f"{folder.name}.refused"
    with replace_folder(kept, STORE_OPTION) as target:
        for path in told:
            path.replace(target / path.name)
    return f"; what the builder said is in {kept}"


def _digest_of(path: Path) -> str:
    try:
        return sha256_of(path, TIMING_CACHE_BYTES)
    except FileError as error:
        raise BuildError(
            f"{path}: not a timing cache ({error}); leave --timing-cache out, or name the "
            f"{TIMING_CACHE} in an engine's folder"
        ) from error
