"""Inference engines behind one small interface: a session per graph, arrays in, arrays out."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from dit_runtime.bundle import Bundle
from dit_runtime.errors import EngineError

if TYPE_CHECKING:
    import onnxruntime

ENGINES = ("onnxruntime",)

Array = NDArray[Any]


class Session(Protocol):
    """A loaded graph."""

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> list[Array]:
        """The named outputs. Inputs have the dtypes and shapes of the bundle's manifest."""
        ...


class Engine(Protocol):
    """What runs a bundle's graphs.

    Attributes:
        name: with version and device, for the record.
        max_batch: most pictures in one call, None for no limit of its own.
        threads: of the CPU, 0 where the engine chooses.
    """

    name: str
    max_batch: int | None
    threads: int

    def session(self, graph: str) -> Session:
        """The session of a graph (``step``, ``decoder``, …: the manifest's names), loaded on first use."""
        ...


class OnnxRuntimeEngine:
    """ONNX Runtime on the CPU. ``threads``: 0 lets ONNX Runtime choose."""

    max_batch: int | None = None

    def __init__(self, bundle: Bundle, threads: int = 0) -> None:
        self._runtime = _imported_onnxruntime()
        self._bundle, self.threads = bundle, threads
        self._sessions: dict[str, _OnnxRuntimeSession] = {}
        self.name = f"onnxruntime {self._runtime.__version__} CPU"

    def session(self, graph: str) -> Session:
        if graph not in self._sessions:
            path = self._bundle.graph(graph)
            options = self._runtime.SessionOptions()
            options.intra_op_num_threads = self.threads
            options.log_severity_level = 3
            try:
                session = self._runtime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])
            except Exception as error:  # its exception types are not public
                raise EngineError(
                    f"{path}: {self.name} cannot load it ({str(error).splitlines()[0]}); "
                    "install the onnxruntime of the constraints file or another engine"
                ) from error
            self._sessions[graph] = _OnnxRuntimeSession(session, f"{self.name}, graph {graph}")
        return self._sessions[graph]


class _OnnxRuntimeSession:
    def __init__(self, session: onnxruntime.InferenceSession, name: str) -> None:
        self._session, self._name = session, name

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> list[Array]:
        try:
            results = self._session.run(list(outputs), {key: np.ascontiguousarray(v) for key, v in inputs.items()})
        except Exception as error:  # its exception types are not public
            shapes = ", ".join(f"{key} {value.dtype}{list(value.shape)}" for key, value in inputs.items())
            raise EngineError(
                f"{self._name} failed on {shapes}: {str(error).splitlines()[0]}; try a smaller batch"
            ) from error
        return [np.asarray(result) for result in results]


def open_engine(bundle: Bundle, name: str = "auto", threads: int = 0) -> Engine:
    """The engine to run a bundle with. ``auto`` is the fastest one installed.

    Raises:
        EngineError: unknown, or not installed (the message says what to install).
    """
    if name in ("auto", "onnxruntime"):
        return OnnxRuntimeEngine(bundle, threads)
    raise EngineError(f"engine {name!r} is unknown; choose auto or one of {', '.join(ENGINES)}")


def _imported_onnxruntime() -> Any:
    variants = [name for name in ("onnxruntime", "onnxruntime-gpu") if _installed(name)]
    if len(variants) == 2:
        raise EngineError(
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other's files; keep one: "
            "pip uninstall -y onnxruntime onnxruntime-gpu, then pip install 'dit-export[cpu]' or 'dit-export[gpu]'"
        )
    try:
        import onnxruntime
    except ImportError as error:
        raise EngineError(
            "no inference engine is installed; on a CPU: pip install 'dit-export[cpu]' (ONNX Runtime)"
        ) from error
    return onnxruntime


def _installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
