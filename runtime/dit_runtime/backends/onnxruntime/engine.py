"""The engine of ONNX Runtime: on the CPU, or on a GPU through one of its execution providers."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dit_runtime.backends.base import Array, EngineInfo
from dit_runtime.backends.conditioning import TableLimits
from dit_runtime.backends.host_loop import HostLoop
from dit_runtime.backends.onnxruntime.gpu import (
    open_gpu_session,
    open_provider,
    reason_of,
    run_bound,
)
from dit_runtime.backends.onnxruntime.loop import ResidentLoop
from dit_runtime.backends.onnxruntime.steps import MOST_GRAPHS, UNCAPTURED, FixedSteps, run_options
from dit_runtime.backends.onnxruntime.widening import widen_graph
from dit_runtime.backends.outputs import check_outputs
from dit_runtime.backends.prepared import facts_of, load_prepared
from dit_runtime.bundle.manifest import SIZED_GRAPHS, GraphSpec
from dit_runtime.bundle.precision import Precision
from dit_runtime.bundle.reader import Bundle
from dit_runtime.bundle.tensor_places import check_places
from dit_runtime.core.errors import DiTError, EngineError
from dit_runtime.core.libraries import switch_telemetry_off
from dit_runtime.core.reading import GRAPH_BYTES, read_file

Call = Callable[[Mapping[str, Array], Sequence[str]], list[Array]]

CPU = "CPUExecutionProvider"
MODEL, WEIGHTS = "model.onnx", "model.weights"  # the files of a prepared graph
# These graphs run once, or for a few rows: packing their weights costs more time than it saves, and a copy in memory.
UNPACKED = ("probe", "conditioner")

logger = logging.getLogger(__name__)


class OnnxRuntimeEngine:
    """An engine of ONNX Runtime.

    Args:
        bundle: at the size in use.
        threads: threads of the CPU; 0 lets ONNX Runtime choose.
        provider: ``cpu``, or a key of ``gpu.PROVIDERS``.
        store: the engine store, where prepared graphs are kept: optimized, with packed weights that are mapped and
            not held in anonymous memory, at twice the weights' size on disk. None keeps none. On the CPU only.

    Raises:
        EngineError: ONNX Runtime is not installed, or does not have the provider.
    """

    def __init__(self, bundle: Bundle, threads: int = 0, provider: str = "cpu", store: Path | None = None) -> None:
        self._runtime = import_onnxruntime()
        self._bundle = bundle
        self._provider = None if provider == "cpu" else open_provider(self._runtime, provider)
        self._folder = None if store is None else store / "onnxruntime"
        self._sessions: dict[str, _OnnxRuntimeSession] = {}
        device = "CPU" if self._provider is None else self._provider.device
        # With ``trt_fp16_enable`` TensorRT may compute what the graph keeps in FP32 (residuals, adaLN) in FP16.
        weak = provider == "tensorrt" and bundle.manifest.precision.numbers == Precision.FP16
        name = f"onnxruntime {self._runtime.__version__} {device}{', weakly typed' if weak else ''}"
        self.info = EngineInfo(
            name=name,
            identity=name,
            library="onnxruntime",
            version=self._runtime.__version__,
            device=device,
            precision=Precision.FP32 if self._provider is None else bundle.manifest.precision.name,
            graphs=tuple(bundle.manifest.graphs),
            threads=threads,
            loop_on_device=provider == "cuda",
            weakly_typed=weak,
        )

    def session(self, graph: str) -> _OnnxRuntimeSession:
        if graph not in self._sessions:
            self._sessions[graph] = _OnnxRuntimeSession(
                functools.partial(self._load, graph),
                f"{self.info.name}, graph {graph}",
                self._bundle.manifest.graphs[graph],
            )
        return self._sessions[graph]

    def release(self, graph: str) -> None:
        """As ``Engine.release``."""
        if graph in self._sessions:
            self._sessions[graph].release()

    def open_loop(self, limits: TableLimits) -> HostLoop:
        """As ``Engine.open_loop``. With the CUDA provider the loop stays on the GPU."""
        if self.info.loop_on_device:
            return ResidentLoop(self, self._bundle.manifest, limits, self.session("step"), self._runtime)
        return HostLoop(self, self._bundle.manifest, limits)

    def close(self) -> None:
        """As ``Engine.close``."""
        for session in self._sessions.values():
            session.release()

    def _load(self, graph: str) -> Call:
        path = self._bundle.graph(graph)
        try:
            loaded = self._load_on_cpu(graph, path) if self._provider is None else self._load_on_gpu(graph, path)
            self._bundle.check_in_place()
            return loaded
        except DiTError:
            raise
        except Exception as error:  # ONNX Runtime's exception types are not public
            self._bundle.check_in_place()
            raise EngineError(
                f"{path}: {self.info.name} cannot load the graph ({reason_of(error)}); install the onnxruntime of the "
                "constraints file, or use another engine"
            ) from error

    def _load_on_gpu(self, graph: str, path: Path) -> Call:
        assert self._provider is not None
        manifest, runtime, provider = self._bundle.manifest, self._runtime, self._provider
        precision = manifest.precision.name
        captured = graph == "step" and self.info.loop_on_device
        try:
            session = open_gpu_session(runtime, provider, path, self._make_options(), precision, captured)
        except EngineError as error:
            if not captured:
                raise
            # ONNX Runtime opens no session with CUDA graphs where it copies between CPU and GPU in mid-graph.
            session, captured = open_gpu_session(runtime, provider, path, self._make_options(), precision), False
            logger.warning("the step is not captured as a CUDA graph: %s", error)
        table = manifest.table.name if graph in SIZED_GRAPHS else None
        options = run_options(runtime, UNCAPTURED) if captured else None
        return functools.partial(run_bound, session, provider, table, options)

    def _load_on_cpu(self, graph: str, path: Path) -> Call:
        options = self._make_options()
        if graph in UNPACKED:
            if self._bundle.manifest.precision.name == Precision.FP32:
                options.add_session_config_entry("session.disable_prepacking", "1")
        elif self._folder is not None:
            facts = facts_of(self._bundle, graph, f"onnxruntime {self._runtime.__version__}", {"weights": "packed"})
            prepared = load_prepared(self._folder, facts, lambda target: self._write(path, target), self._open_prepared)
            if prepared is not None:
                return functools.partial(_run, prepared)
        return functools.partial(_run, self._open(path, options))

    def _open_prepared(self, folder: Path) -> Any:
        options = self._make_options()
        # The prepared graph is optimized already.
        options.graph_optimization_level = self._runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
        path, weights = folder / MODEL, folder / WEIGHTS
        check_places(
            read_file(path, GRAPH_BYTES, within=folder), WEIGHTS, weights.stat().st_size if weights.exists() else 0
        )
        return self._open(path, options)

    def _write(self, path: Path, folder: Path) -> None:
        options = self._make_options()
        options.optimized_model_filepath = os.fspath(folder / MODEL)
        for key, value in (
            ("optimized_model_external_initializers_file_name", WEIGHTS),
            ("optimized_model_external_initializers_min_size_in_bytes", "1024"),
            ("save_external_prepacked_constant_initializers", "1"),
        ):
            options.add_session_config_entry(f"session.{key}", value)
        self._open(path, options)

    def _make_options(self) -> Any:
        options = self._runtime.SessionOptions()
        options.intra_op_num_threads = self.info.threads
        options.log_severity_level = 4  # an error is raised too, with the same text
        return options

    def _open(self, path: Path, options: Any) -> Any:
        if self._bundle.manifest.precision.name == Precision.BF16 and path.name != MODEL:  # a prepared graph is FP32
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
            return self._runtime.InferenceSession(widen_graph(read_file(path, GRAPH_BYTES)), options, providers=[CPU])
        return self._runtime.InferenceSession(os.fspath(path), options, providers=[CPU])


def _run(session: Any, inputs: Mapping[str, Array], outputs: Sequence[str]) -> list[Array]:
    found: list[Array] = session.run(list(outputs), dict(inputs))
    return found


class _OnnxRuntimeSession:
    """A graph that is loaded when the session is made, and loaded again when it runs after ``release``."""

    def __init__(self, load: Callable[[], Call], name: str, spec: GraphSpec) -> None:
        self._load, self._name, self._spec = load, name, spec
        self._call: Call | None = load()
        self._idle: list[FixedSteps] = []
        self._made = 0

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> list[Array]:
        call = self._call = self._call or self._load()
        with self._explaining(inputs):
            found = call({name: np.ascontiguousarray(value) for name, value in inputs.items()}, outputs)
        results = [np.asarray(result) for result in found]
        check_outputs(self._name, self._spec, inputs, outputs, results)
        return results

    def take_steps(self, runtime: Any) -> FixedSteps:
        """The steps for a loop on the GPU: those that an earlier loop gave back, with their CUDA graphs, or others."""
        call = self._call = self._call or self._load()
        if self._idle:
            return self._idle.pop()
        assert isinstance(call, functools.partial)  # of run_bound
        session, provider, _, uncaptured = call.args
        first = self._made * MOST_GRAPHS
        self._made += 1
        numbers = range(first, first + MOST_GRAPHS) if uncaptured is not None else range(0)
        return FixedSteps(runtime, session, provider.memory, numbers)

    def run_steps(self, steps: FixedSteps, inputs: Mapping[str, Array]) -> tuple[Any, Any]:
        """Put the inputs, and run one step (``FixedSteps.run``)."""
        with self._explaining(inputs):
            for name, value in inputs.items():
                steps.put(name, value)
            return steps.run()

    def give_back(self, steps: FixedSteps) -> None:
        """Keep the steps for the next loop, unless their graph was released."""
        if isinstance(self._call, functools.partial) and steps.session is self._call.args[0]:
            self._idle.append(steps)

    @contextlib.contextmanager
    def _explaining(self, inputs: Mapping[str, Array]) -> Iterator[None]:
        """Raise EngineError, with the inputs' shapes, for an error of ONNX Runtime."""
        try:
            yield
        except Exception as error:  # ONNX Runtime's exception types are not public
            shapes = ", ".join(f"{key} {value.dtype}{list(value.shape)}" for key, value in inputs.items())
            raise EngineError(f"{self._name} failed on {shapes}: {reason_of(error)}; try a smaller batch") from error

    def release(self) -> None:
        self._call = None
        self._idle.clear()


def import_onnxruntime() -> Any:
    """Import ONNX Runtime. Raises EngineError where it is not installed."""
    switch_telemetry_off()
    try:
        import onnxruntime
    except ImportError as error:
        raise EngineError(
            "no inference engine is installed; on a CPU: pip install 'dit-export[cpu]' (ONNX Runtime)"
        ) from error
    return onnxruntime
