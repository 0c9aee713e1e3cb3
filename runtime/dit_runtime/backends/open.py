"""Engines by name: the table of backends, and what opens them."""

from __future__ import annotations

import importlib
from pathlib import Path

from dit_runtime.backends.base import Backend, Candidate, Engine, EngineOptions
from dit_runtime.bundle.precision import precision_named
from dit_runtime.bundle.reader import Bundle
from dit_runtime.core.errors import EngineError

# Each name that ``--engine`` takes, and the module with its ``BACKEND``. What ``auto`` may try is tried in this order:
# the fastest expected first.
BACKENDS = {
    "tensorrt": "dit_runtime.backends.tensorrt.open",
    "tensorrt-rtx": "dit_runtime.backends.tensorrt.open",
    "onnxruntime-cuda": "dit_runtime.backends.onnxruntime.open",
    "openvino": "dit_runtime.backends.openvino.open",
    "onnxruntime": "dit_runtime.backends.onnxruntime.open",
    "onnxruntime-tensorrt": "dit_runtime.backends.onnxruntime.open",
    "onnxruntime-rtx": "dit_runtime.backends.onnxruntime.open",
}


def backend_named(name: str) -> Backend:
    """The backend of an engine's name. Its module is imported, the library that it runs is not.

    Raises:
        EngineError: there is no engine of that name.
    """
    if name not in BACKENDS:
        raise EngineError(f"engine {name!r} is unknown; choose auto or one of {', '.join(BACKENDS)}")
    backend: Backend = importlib.import_module(BACKENDS[name]).BACKEND
    return backend


def open_engine(
    bundle: Bundle, name: str, threads: int = 0, precision: str | None = None, store: Path | None = None
) -> Engine:
    """The engine to run a bundle with.

    Args:
        bundle: whose graphs, at its size in use.
        name: one of ``BACKENDS``.
        threads: of the CPU; 0 lets the engine choose.
        precision: ``fp32`` or ``bf16``, of an engine that has a choice; None is the bundle's own, or the nearest.
        store: where TensorRT's engines are, None for the bundle's own folder, and where other engines keep graphs in
            their own form (``Bundle.engines``), None for nowhere.

    Raises:
        EngineError: unknown, not installed, or not able to run here (the message says what to do).
    """
    asked = None if precision is None else precision_named(precision, EngineError)
    return backend_named(name).open(bundle, name, EngineOptions(threads, asked, store))


def engine_for(bundle: Bundle, name: str, threads: int = 0, precision: str | None = None) -> Engine:
    """``open_engine`` as the commands call it: graphs that the engine prepares are kept in the bundle's store.

    Without that, the weights of an FP16 bundle would be in memory twice.
    """
    return open_engine(bundle, name, threads, precision, bundle.engines if backend_named(name).keeps_graphs else None)


def find_candidates(bundle: Bundle) -> list[Candidate]:
    """What ``auto`` may try here without being asked, the fastest expected first."""
    found = (backend_named(name).candidate(bundle, name) for name in BACKENDS)
    return [candidate for candidate in found if candidate is not None]
