"""Inference engines behind one small interface: a session per graph, arrays in, arrays out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from numpy.typing import NDArray

from dit_runtime.backends.onnxruntime.engine import OnnxRuntimeEngine, import_onnxruntime
from dit_runtime.backends.onnxruntime.gpu import PROVIDERS, has_driver
from dit_runtime.backends.openvino.engine import OpenVinoEngine, import_openvino
from dit_runtime.bundle.reader import Bundle
from dit_runtime.core.errors import EngineError

__all__ = [
    "ENGINES",
    "TENSORRT",
    "Array",
    "Candidate",
    "Engine",
    "OnnxRuntimeEngine",
    "OpenVinoEngine",
    "Session",
    "candidates",
    "engine_for",
    "open_engine",
]

# TensorRT's engines, which dit-build makes, and their libraries.
TENSORRT = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
ENGINES = (*TENSORRT, "openvino", "onnxruntime", *(f"onnxruntime-{name}" for name in PROVIDERS))

Array = NDArray[Any]


class Session(Protocol):
    """A loaded graph."""

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> list[Array]:
        """The named outputs. Inputs have the dtypes and shapes of the bundle's manifest."""
        ...


class Engine(Protocol):
    """What runs a bundle's graphs.

    Attributes:
        name: with version, device and precision, for the record.
        max_batch: most images in one call, None for no limit of its own.
        threads: of the CPU, 0 where the engine chooses.
    """

    name: str
    max_batch: int | None
    threads: int

    def session(self, graph: str) -> Session:
        """The session of a graph (``step``, ``decoder``, …: the manifest's names), loaded on first use."""
        ...

    def release(self, graph: str) -> None:
        """Give back what a graph holds. Its session loads it again when it is run again."""
        ...


@dataclass(frozen=True)
class Candidate:
    """An engine as ``open_engine`` takes it: its name and precision."""

    name: str
    precision: str | None = None


def open_engine(
    bundle: Bundle, name: str, threads: int = 0, precision: str | None = None, store: Path | None = None
) -> Engine:
    """The engine to run a bundle with.

    Args:
        bundle: whose graphs, at its size in use.
        name: one of ``ENGINES``.
        threads: of the CPU; 0 lets the engine choose.
        precision: ``f32`` or ``bf16``; None is the bundle's own where the engine has it, or the nearest.
        store: where TensorRT's engines are, None for the bundle's own folder, and where others may keep graphs in their
            own form (``Bundle.engines``), None for nowhere.

    Raises:
        EngineError: unknown, not installed, or not able to run here (the message says what to do).
    """
    if name in TENSORRT and precision is None:
        from dit_runtime.backends.tensorrt.open import engine_from_store  # it needs this module's protocols

        return engine_from_store(bundle, name, threads, store)
    if name == "openvino":
        return OpenVinoEngine(bundle, threads, precision, store=store)
    if name not in ENGINES:
        raise EngineError(f"engine {name!r} is unknown; choose auto or one of {', '.join(ENGINES)}")
    provider = "cpu" if name == "onnxruntime" else name.removeprefix("onnxruntime-")
    if precision not in (None, "f32") or (precision and provider != "cpu"):
        raise EngineError(
            f"precision {precision!r} with {name}: ONNX Runtime computes in FP32 on a CPU, and a GPU's engine as the "
            "bundle says; leave it out, or use --engine openvino"
        )
    return OnnxRuntimeEngine(bundle, threads, provider, store)


def engine_for(bundle: Bundle, name: str, threads: int = 0, precision: str | None = None) -> Engine:
    """``open_engine`` as the commands call it: what OpenVINO prepares is kept in the bundle's store.

    Without that, the weights of an FP16 bundle would be in memory twice.
    """
    return open_engine(bundle, name, threads, precision, bundle.engines if name == "openvino" else None)


def candidates(bundle: Bundle) -> list[Candidate]:
    """The engines that are installed and can be tried here without asking, the fastest expected first.

    Left to be named by the user: what builds for minutes (TensorRT's and RTX's providers), BF16 for a bundle that was
    exported in FP32, and OpenVINO's FP32 where it has BF16, which would keep twice the weights on disk to lose.
    """
    found = []
    try:
        if PROVIDERS["cuda"] in import_onnxruntime().get_available_providers() and has_driver():
            found.append(Candidate("onnxruntime-cuda"))
        onnxruntime = [Candidate("onnxruntime")]
    except EngineError:
        onnxruntime = []
    try:
        capabilities = import_openvino().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    except EngineError:
        return found + onnxruntime
    bf16 = bundle.manifest.precision.name == "fp16" and "BF16" in capabilities
    return [*found, Candidate("openvino", "bf16" if bf16 else "f32"), *onnxruntime]
