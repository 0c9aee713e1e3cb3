"""Open ONNX Runtime's engines by name: ``onnxruntime`` on the CPU, ``onnxruntime-PROVIDER`` on a GPU."""

from __future__ import annotations

from dit_runtime.backends.base import Backend, Candidate, EngineOptions
from dit_runtime.backends.onnxruntime.engine import OnnxRuntimeEngine, import_onnxruntime
from dit_runtime.backends.onnxruntime.gpu import PROVIDERS
from dit_runtime.bundle.precision import Precision
from dit_runtime.bundle.reader import Bundle
from dit_runtime.core.errors import EngineError
from dit_runtime.core.machine import has_nvidia_driver

CPU = "onnxruntime"
UNTYPED = (Precision.BF16, Precision.FP8)  # what onnxruntime-tensorrt cannot be told to compute in


def open_onnxruntime(bundle: Bundle, name: str, options: EngineOptions) -> OnnxRuntimeEngine:
    """As ``Backend.open``."""
    provider = "cpu" if name == CPU else name.removeprefix(f"{CPU}-")
    if options.precision not in (None, Precision.FP32) or (options.precision and provider != "cpu"):
        raise EngineError(
            f"precision {options.precision} with {name}: ONNX Runtime computes in FP32 on a CPU, and in the bundle's "
            "precision on a GPU; leave --precision out, or use --engine openvino"
        )
    if provider == "tensorrt" and (own := bundle.manifest.precision.name) in UNTYPED:
        raise EngineError(
            f"{name} with a bundle in {own.upper()}: ONNX Runtime's TensorRT provider has no switch for it; use "
            "--engine tensorrt after dit-build"
        )
    return OnnxRuntimeEngine(bundle, options.threads, provider, options.store)


def _find_candidate(bundle: Bundle, name: str) -> Candidate | None:
    """The engine on the CPU, and CUDA's where there is a driver. The other providers build for minutes before use."""
    try:
        available = import_onnxruntime().get_available_providers()
    except EngineError:
        return None
    cuda = name == f"{CPU}-cuda" and PROVIDERS["cuda"] in available and has_nvidia_driver()
    return Candidate(name) if name == CPU or cuda else None


BACKEND = Backend(open_onnxruntime, _find_candidate, ("onnxruntime", "onnxruntime-gpu"))
