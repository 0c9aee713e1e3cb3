"""Find the stored engine that runs a bundle here, check it against the GPU and its memory, and open it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from dit_runtime.backends.base import Backend, Candidate, EngineOptions
from dit_runtime.backends.tensorrt import api as tensorrt_api
from dit_runtime.backends.tensorrt.cuda import Cuda, CudaRuntime
from dit_runtime.backends.tensorrt.engine import TensorRtEngine
from dit_runtime.backends.tensorrt.memory import available_bytes_of, check_engine
from dit_runtime.backends.tensorrt.store import PRODUCTS, SIDECAR, StoredEngine, read_engines
from dit_runtime.bundle.reader import Bundle
from dit_runtime.core.errors import EngineError

# Each engine name, and the library that runs its plans.
TENSORRT = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}


def engine_from_store(
    bundle: Bundle,
    name: str,
    threads: int = 0,
    store: Path | None = None,
    cuda: Cuda | None = None,
    import_library: Callable[[str], tensorrt_api.TensorRT] = tensorrt_api.import_library,
    whole: bool = False,
) -> TensorRtEngine:
    """Open the engine that was built last for this bundle at its size, this library and this GPU.

    Args:
        bundle: at the size in use.
        name: a key of ``TENSORRT``.
        threads: for the record only.
        store: the engine store; None is the bundle's own ``engines`` folder.
        cuda: the GPU; None is the first that the process sees.
        import_library: imports a library by its name.
        whole: whether to skip engines that cannot guide or cannot decode whole images.

    Raises:
        EngineError: there is no library, driver or GPU; there is no engine, or only for another version or GPU; or the
            GPU has too little memory.
    """
    folder, damaged = store or bundle.engines, list[str]()
    library = import_library(TENSORRT[name])
    cuda = cuda or CudaRuntime()
    facts = cuda.read_device()
    built = [engine for engine in read_engines(bundle, store, damaged.append) if engine.library == library.name]
    refused: list[EngineError] = []
    for stored in sorted(built, key=_time_of, reverse=True):
        try:
            stored.check_device(library.name, library.version, facts.compute_capability, facts.name)
            if whole:
                _check_whole(bundle, stored, name)
        except EngineError as error:
            refused.append(error)
            continue
        check_engine(bundle.manifest, stored, available_bytes_of(facts))
        return TensorRtEngine(bundle, stored, library, cuda, threads)
    if refused:
        raise refused[0]
    height, width = bundle.manifest.image_size
    target = "this" if library.name == "tensorrt" else f"rtx --compute-capability {facts.compute_capability}"
    raise EngineError(
        f"{folder}: no engine of {PRODUCTS[library.name]} for images of {height}x{width}"
        f"{f' ({damaged[0]})' if damaged else ''}; run dit-build {bundle.path} --target {target}"
    )


def _time_of(engine: StoredEngine) -> float:
    try:
        return (engine.folder / SIDECAR).stat().st_mtime
    except OSError:  # removed a moment ago; to load it will say so
        return 0.0


def _check_whole(bundle: Bundle, stored: StoredEngine, name: str) -> None:
    """Raises EngineError for an engine that was built for tiles or without guidance."""
    manifest = bundle.manifest
    tile = stored.tile_for(manifest.model.latent_size)
    limit = None if tile is None else f"for tiles (--decode-tile {max(tile)})"
    if "step" in stored.graphs and not stored.graphs["step"].profiles_of(manifest.graphs["step"]).has_branches(2):
        limit = "without guidance"
    if limit is not None:
        raise EngineError(f"{stored.folder}: was built {limit}; choose it with --engine {name}")


def open_tensorrt(bundle: Bundle, name: str, options: EngineOptions) -> TensorRtEngine:
    """As ``Backend.open``."""
    if options.precision is not None:
        raise EngineError(
            f"precision {options.precision} with {name}: a built engine computes in the bundle's precision; leave "
            "--precision out, or use --engine openvino"
        )
    return engine_from_store(bundle, name, options.threads, options.store, whole=options.whole)


def _find_candidate(bundle: Bundle, name: str) -> Candidate | None:
    """An engine that was built for this bundle. Opening it checks whether it runs here."""
    built = {stored.library for stored in read_engines(bundle)}
    return Candidate(name, built=True) if TENSORRT[name] in built else None


BACKEND = Backend(open_tensorrt, _find_candidate, libraries=())
