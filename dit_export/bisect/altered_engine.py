"""Runs altered graphs of a bundle on ONNX Runtime, behind the interface of ``dit_runtime``'s engines."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from dit_export.bisect.fp16_operations import Operation
from dit_export.bisect.graph_edits import Array, detach_weights
from dit_runtime.backends.base import EngineInfo, Session
from dit_runtime.backends.conditioning import TableLimits
from dit_runtime.backends.host_loop import HostLoop
from dit_runtime.backends.onnxruntime.engine import import_onnxruntime
from dit_runtime.bundle.manifest import Manifest
from dit_runtime.bundle.precision import Precision
from dit_runtime.core.errors import EngineError


@dataclass
class AlteredEngine:
    """An engine of ``dit_runtime`` on altered graphs of a bundle; each graph is loaded when it is first used."""

    info: EngineInfo
    manifest: Manifest
    load: Callable[[str], Session]
    loaded: dict[str, Session] = field(default_factory=dict)

    def session(self, graph: str) -> Session:
        graph = "probe" if graph == "step" else graph
        if graph not in self.loaded:
            self.loaded[graph] = self.load(graph)
        return self.loaded[graph]

    def release(self, graph: str) -> None:
        """Nothing: the probe is the step too, and a trial is short."""

    def open_loop(self, limits: TableLimits) -> HostLoop:
        """As ``Engine.open_loop``."""
        return HostLoop(self, self.manifest, limits)

    def close(self) -> None:
        """As ``Engine.close``: the sessions are gone with the engine."""


def open_altered_engine(
    name: str, manifest: Manifest, load: Callable[[str], Session], threads: int, without: str | None = None
) -> AlteredEngine:
    """An engine on altered graphs, in ONNX Runtime in FP32.

    Args:
        name: its name and identity.
        manifest: of the bundle.
        load: loads an altered graph by its name.
        threads: CPU threads; 0 lets ONNX Runtime choose.
        without: a graph of the bundle that it does not have.
    """
    info = EngineInfo(
        name=name,
        identity=name,
        library="onnxruntime",
        version=import_onnxruntime().__version__,
        device="CPU",
        precision=Precision.FP32,
        graphs=tuple(graph for graph in manifest.graphs if graph != without),
        threads=threads,
    )
    return AlteredEngine(info, manifest, load)


class AlteredSession:
    """An altered graph in ONNX Runtime.

    ``measured``: names of outputs that hold the max |x| of an operation's result. After each run, ``largest`` has the
    largest value of all runs for each operation.
    """

    def __init__(
        self,
        model: ir.Model,
        measured: Mapping[str, Operation] | None = None,
        largest: dict[Operation, float] | None = None,
        threads: int = 0,
    ) -> None:
        runtime = import_onnxruntime()
        self._types = {value.name: value.dtype for value in model.graph.inputs}
        self._measured, self._largest = measured or {}, {} if largest is None else largest
        serialized, arrays = detach_weights(model)
        options = runtime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads
        self._weights = [runtime.OrtValue.ortvalue_from_numpy(array) for array in arrays.values()]
        options.add_external_initializers(list(arrays), self._weights)
        try:
            self._session = runtime.InferenceSession(serialized, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its exception types are not public
            raise EngineError(
                f"graph {model.graph.name} with FP32 islands: ONNX Runtime cannot load it "
                f"({str(error).splitlines()[0]}); report it with the bundle's manifest"
            ) from error

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> list[Array]:
        single = ir.DataType.FLOAT
        feeds = {
            key: np.ascontiguousarray(value, np.float32 if self._types[key] == single else value.dtype)
            for key, value in inputs.items()
            if key in self._types
        }
        results = self._session.run([*outputs, *self._measured], feeds)
        for operation, value in zip(self._measured.values(), results[len(outputs) :], strict=True):
            reached = float(np.nan_to_num(value, nan=np.inf))  # NaN: not even FP32 can hold the result
            self._largest[operation] = max(reached, self._largest.get(operation, 0.0))
        return [np.asarray(result) for result in results[: len(outputs)]]
