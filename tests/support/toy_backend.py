"""A whole backend: ONNX's own reference implementation runs the graphs, slowly and on any machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx.reference

from dit_runtime.backends.base import Array, Backend, Candidate, EngineInfo, EngineOptions
from dit_runtime.backends.conditioning import TableLimits
from dit_runtime.backends.host_loop import HostLoop
from dit_runtime.bundle.precision import Precision
from dit_runtime.bundle.reader import Bundle


class ToySession:
    def __init__(self, path: str) -> None:
        self._evaluator = onnx.reference.ReferenceEvaluator(path)

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> list[Array]:
        return self._evaluator.run(list(outputs), dict(inputs))


class ToyEngine:
    def __init__(self, bundle: Bundle) -> None:
        self._bundle, self._sessions = bundle, dict[str, ToySession]()
        name, graphs = f"toy {onnx.__version__} CPU", tuple(bundle.manifest.graphs)
        self.info = EngineInfo(name, name, "onnx", onnx.__version__, "CPU", Precision.FP32, graphs)

    def session(self, graph: str) -> ToySession:
        if graph not in self._sessions:
            self._sessions[graph] = ToySession(str(self._bundle.graph(graph)))
        return self._sessions[graph]

    def release(self, graph: str) -> None:
        self._sessions.pop(graph, None)

    def open_loop(self, limits: TableLimits) -> HostLoop:
        return HostLoop(self, self._bundle.manifest, limits)

    def close(self) -> None:
        self._sessions.clear()


def open_toy(bundle: Bundle, name: str, options: EngineOptions) -> ToyEngine:
    return ToyEngine(bundle)


def find_candidate(bundle: Bundle, name: str) -> Candidate | None:
    return None  # too slow for ``auto`` to try


BACKEND = Backend(open_toy, find_candidate, libraries=("onnx",))
