"""Open OpenVINO's engine by its name."""

from __future__ import annotations

from dit_runtime.backends.base import Backend, Candidate, EngineOptions
from dit_runtime.backends.openvino.engine import ANY_BATCH, OpenVinoEngine, load_core
from dit_runtime.bundle.precision import HALF, Precision
from dit_runtime.bundle.reader import Bundle
from dit_runtime.core.errors import EngineError


def open_openvino(bundle: Bundle, name: str, options: EngineOptions) -> OpenVinoEngine:
    """As ``Backend.open``."""
    return OpenVinoEngine(bundle, options.threads, options.precision, store=options.store, any_batch=name == ANY_BATCH)


def _find_candidate(bundle: Bundle, name: str) -> Candidate | None:
    """BF16 for a bundle of 16 bits on a CPU that has BF16; else FP32.

    ``auto`` tries one precision only. FP32 for an FP16 bundle is slower than BF16 and takes twice the disk for its
    prepared graphs, and BF16 is not what an FP32 bundle was exported for. Choose either with ``--precision``.
    """
    if name == ANY_BATCH:
        return None  # slower: for a server, whose batches change all the time
    try:
        capabilities = load_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    except EngineError:
        return None
    bf16 = bundle.manifest.precision.numbers in HALF and "BF16" in capabilities
    return Candidate(name, Precision.BF16 if bf16 else Precision.FP32)


BACKEND = Backend(open_openvino, _find_candidate, ("openvino",), keeps_graphs=True)
