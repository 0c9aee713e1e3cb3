"""Which stored engine runs a bundle here: found, held against the GPU and its memory, and only then opened."""

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

# The names of these engines, and the library of each.
TENSORRT = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}


def engine_from_store(
    bundle: Bundle,
    name: str,
    threads: int = 0,
    store: Path | None = None,
    cuda: Cuda | None = None,
    imported: Callable[[str], tensorrt_api.TensorRT] = tensorrt_api.import_library,
    whole: bool = False,
) -> TensorRtEngine:
    """The engine last built for this bundle at its size, this library and this GPU.

    Args:
        bundle: whose engines.
        name: a key of ``TENSORRT``.
        threads: for the record.
        store: where engines are kept; None is the bundle's own ``engines`` folder.
        cuda: the GPU; None is the first that the process sees.
        imported: gives a library by its name.
        whole: only one that guides and decodes whole images.

    Raises:
        EngineError: no library, driver or GPU; nothing built, or for another version or GPU; too little memory.
    """
    folder, damaged = store or bundle.engines, list[str]()
    library = imported(TENSORRT[name])
    cuda = cuda or CudaRuntime()
    facts = cuda.read_device()
    built = [engine for engine in read_engines(bundle, store, damaged.append) if engine.library == library.name]
    refused: list[EngineError] = []
    for stored in sorted(built, key=lambda engine: (engine.folder / SIDECAR).stat().st_mtime, reverse=True):
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


def _check_whole(bundle: Bundle, stored: StoredEngine, name: str) -> None:
    """Raises EngineError for an engine that was built for less than may be asked of it."""
    manifest = bundle.manifest
    tile = stored.tile_for(manifest.model.latent_size)
    lacking = None if tile is None else f"for tiles (--decode-tile {max(tile)})"
    if "step" in stored.graphs and not stored.graphs["step"].profiles_of(manifest.graphs["step"]).has_branches(2):
        lacking = "without guidance"
    if lacking is not None:
        raise EngineError(f"{stored.folder}: was built {lacking}; choose it with --engine {name}")


def open_tensorrt(bundle: Bundle, name: str, options: EngineOptions) -> TensorRtEngine:
    """As ``Backend.open``."""
    if options.precision is not None:
        raise EngineError(
            f"precision {options.precision} with {name}: a built engine computes as the bundle says; leave it out, or "
            "use --engine openvino"
        )
    return engine_from_store(bundle, name, options.threads, options.store, whole=options.whole)


def _find_candidate(bundle: Bundle, name: str) -> Candidate | None:
    """An engine that was built for this bundle; whether it runs here is known when it is opened."""
    built = {stored.library for stored in read_engines(bundle)}
    return Candidate(name, built=True) if TENSORRT[name] in built else None


BACKEND = Backend(open_tensorrt, _find_candidate, libraries=())
