"""Which stored engine runs a bundle here: found, held against the GPU and its memory, and only then opened."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from dit_runtime.backends.open import TENSORRT
from dit_runtime.backends.tensorrt import api as tensorrt_api
from dit_runtime.backends.tensorrt.cuda import Cuda, CudaRuntime
from dit_runtime.backends.tensorrt.engine import TensorRtEngine
from dit_runtime.backends.tensorrt.memory import check_engine, device_bytes
from dit_runtime.backends.tensorrt.store import (
    PRODUCTS,
    SIDECAR,
    StoredEngine,
    stored_engines,
)
from dit_runtime.bundle.reader import Bundle
from dit_runtime.core.errors import EngineError
from dit_runtime.verify.replay import tile_of


def engine_from_store(
    bundle: Bundle,
    name: str,
    threads: int = 0,
    store: Path | None = None,
    cuda: Cuda | None = None,
    imported: Callable[[str], tensorrt_api.TensorRT] = tensorrt_api.library,
    whole: bool = False,
) -> TensorRtEngine:
    """The engine last built for this bundle at its size, this library and this GPU.

    Args:
        bundle: whose engines.
        name: a key of ``engines.TENSORRT``.
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
    facts = cuda.device()
    built = [engine for engine in stored_engines(bundle, store, damaged.append) if engine.library == library.name]
    refused: list[EngineError] = []
    for stored in sorted(built, key=lambda engine: (engine.folder / SIDECAR).stat().st_mtime, reverse=True):
        try:
            stored.check_device(library.name, library.version, facts.compute_capability, facts.name)
            if whole:
                _check_whole(bundle, stored, name)
        except EngineError as error:
            refused.append(error)
            continue
        check_engine(bundle.manifest, stored, device_bytes(facts))
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
    tile = tile_of(stored, bundle.manifest.model.latent_size)
    lacking = None if tile is None else f"for tiles (--decode-tile {max(tile)})"
    if "step" in stored.graphs and all(profile["rows"][2][0] < 2 for profile in stored.graphs["step"].profiles):
        lacking = "without guidance"
    if lacking is not None:
        raise EngineError(f"{stored.folder}: was built {lacking}; name it (--engine {name}) to have it")
