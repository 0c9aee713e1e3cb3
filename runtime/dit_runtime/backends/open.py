"""Open an engine by its name: the table of backends, and the functions that read it."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from dit_runtime.backends.base import Backend, Candidate, Engine, EngineOptions
from dit_runtime.bundle.precision import Precision, precision_named
from dit_runtime.bundle.reader import Bundle
from dit_runtime.core.errors import EngineError
from dit_runtime.core.machine import Processor, explain_slow_int8, read_processor

logger = logging.getLogger(__name__)

# Each name that ``--engine`` takes, and the module with its ``BACKEND``. ``auto`` tries engines in this order: the one
# that is expected to be fastest first.
BACKENDS = {
    "tensorrt": "dit_runtime.backends.tensorrt.open",
    "tensorrt-rtx": "dit_runtime.backends.tensorrt.open",
    "onnxruntime-cuda": "dit_runtime.backends.onnxruntime.open",
    "openvino": "dit_runtime.backends.openvino.open",
    "openvino-any": "dit_runtime.backends.openvino.open",
    "onnxruntime": "dit_runtime.backends.onnxruntime.open",
    "onnxruntime-tensorrt": "dit_runtime.backends.onnxruntime.open",
    "onnxruntime-rtx": "dit_runtime.backends.onnxruntime.open",
}


def backend_named(name: str) -> Backend:
    """The backend of an engine's name. The backend's module is imported; the library that runs graphs is not.

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
    """Open an engine for a bundle.

    Args:
        bundle: at the size in use.
        name: a key of ``BACKENDS``.
        threads: threads of the CPU; 0 lets the engine choose.
        precision: ``fp32`` or ``bf16``, for an engine that has a choice; None is the bundle's own precision, or the
            nearest that the engine has.
        store: the engine store, such as ``bundle.engines``. TensorRT reads its plans there; None is the bundle's own
            folder. Other backends keep prepared graphs there; None keeps none.

    Raises:
        EngineError: the name is unknown, its library is not installed, or the engine cannot run here. The message says
            what to do.
    """
    asked = None if precision is None else precision_named(precision, EngineError)
    engine = backend_named(name).open(bundle, name, EngineOptions(threads, asked, store))
    if bundle.manifest.precision.name == Precision.INT8 and engine.info.device == "CPU":
        _say_if_slow(read_processor())
    return engine


@lru_cache
def _say_if_slow(processor: Processor) -> None:
    """Log, once, that this processor does not multiply INT8."""
    if (line := explain_slow_int8(processor)) is not None:
        logger.warning(line)


def engine_for(bundle: Bundle, name: str, threads: int = 0, precision: str | None = None) -> Engine:
    """``open_engine`` as the commands call it: the engine keeps its prepared graphs in the bundle's engine store.

    Without prepared graphs, OpenVINO has the weights of an FP16 bundle in memory twice.
    """
    return open_engine(bundle, name, threads, precision, bundle.engines if backend_named(name).keeps_graphs else None)


def find_candidates(bundle: Bundle) -> Iterator[Candidate]:
    """Yield what ``auto`` may try here without being asked, the fastest expected first.

    A backend's library is imported when its turn comes.
    """
    for name in BACKENDS:
        candidate = backend_named(name).candidate(bundle, name)
        if candidate is not None:
            yield candidate
