"""The engine of OpenVINO on the CPU: in FP32, or in BF16 by the bundle's own precision policy.

The graphs of an FP16 bundle say which tensors are FP16, and OpenVINO has no FP16 on CPUs. With the precision ``bf16``
these tensors become BF16 and the others stay FP32, so that the residual stream is not rounded; OpenVINO's own switch
would run everything in BF16. Those of a BF16 bundle are BF16 already. The graph is also rearranged for speed
(``passes``). With the precision ``fp32`` these tensors become FP32. In both cases the graph is written to the engine
store once (``prepare_graph``), and its weights are mapped from there. OpenVINO packs them, and the packed copy is the
only one in anonymous memory.
"""

from __future__ import annotations

import contextlib
import functools
import queue
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dit_runtime.backends.base import Array, EngineInfo
from dit_runtime.backends.conditioning import TableLimits
from dit_runtime.backends.host_loop import HostLoop
from dit_runtime.backends.openvino.passes import ARRANGEMENT, rearrange
from dit_runtime.backends.outputs import check_outputs
from dit_runtime.backends.prepared import CheckedGraph, Facts, facts_of, find_prepared, load_prepared
from dit_runtime.bundle.manifest import AUTOENCODER, GraphSpec
from dit_runtime.bundle.precision import HALF, Precision
from dit_runtime.bundle.reader import Bundle
from dit_runtime.core.errors import DiTError, EngineError
from dit_runtime.core.libraries import without_module
from dit_runtime.core.machine import check_memory, read_processor

PRECISIONS = (Precision.FP32, Precision.BF16)
SHAPES = 2  # compiled models that a graph keeps: with and without guidance
MODEL = "model.xml"  # file of a prepared graph
ANY_BATCH = "openvino-any"  # name of the engine whose graphs are compiled for batches of any size
BATCH = "batch"  # an axis of any length for that engine alone
ROWS = "rows"  # an axis of any length: the step only looks rows of the conditioning table up, so length costs nothing

Key = tuple[tuple[int, ...], ...]
Source = Path | CheckedGraph | None


class OpenVinoEngine:
    """An engine of OpenVINO on the CPU.

    Args:
        bundle: at the size in use.
        threads: threads of the CPU, in all streams together; 0 lets OpenVINO choose.
        precision: FP32 or BF16; None is BF16 for an FP16 or BF16 bundle on a CPU that has BF16, else FP32.
        streams: how many calls of one session run side by side, each from its own thread, for throughput.
        shapes: for how many sets of input shapes a graph stays compiled. Each compiled model holds packed weights. The
            least recently used model is dropped for a further set of shapes.
        pinning: whether threads stay on their cores; None lets OpenVINO choose. False is right for processes that
            share cores.
        any_batch: whether a graph is compiled once for batches of any size, with guidance and without, instead of once
            for each. A step of the demo model takes 1.2 to 1.8 times as long; results are not bit-equal to the others.
        store: the engine store, where prepared graphs are kept, such as ``bundle.engines``. None keeps none; the
            weights of an FP16 bundle are then in memory twice.

    Raises:
        EngineError: OpenVINO is not installed, or the CPU does not have the precision.
    """

    def __init__(
        self,
        bundle: Bundle,
        threads: int = 0,
        precision: Precision | None = None,
        *,
        streams: int = 1,
        shapes: int = SHAPES,
        pinning: bool | None = None,
        store: Path | None = None,
        any_batch: bool = False,
    ) -> None:
        self._openvino = import_openvino()
        self.bundle, self.streams, self.shapes = bundle, streams, shapes
        self._core = load_core()
        chosen, version = self._choose(precision), self._openvino.__version__.partition("-")[0]
        name = f"openvino {version} CPU {chosen}{' for any batch' if any_batch else ''}"
        self.open_axes = (ROWS, BATCH) if any_batch else (ROWS,)
        self.info = EngineInfo(
            name=name,
            identity=f"{name}, arrangement {ARRANGEMENT}",
            library="openvino",
            version=version,
            device="CPU",
            precision=chosen,
            graphs=tuple(bundle.manifest.graphs),
            threads=threads,
            prepares_shapes=not any_batch,
        )
        self._bf16 = chosen == Precision.BF16
        self._folder = None if store is None else store / "openvino"
        self._properties: dict[str, Any] = {
            "PERFORMANCE_HINT": "LATENCY" if streams == 1 else "THROUGHPUT",
            "NUM_STREAMS": streams,
        }
        if threads:
            self._properties["INFERENCE_NUM_THREADS"] = threads
        if pinning is not None:
            self._properties["ENABLE_CPU_PINNING"] = pinning
        self._sessions: dict[str, _OpenVinoSession] = {}
        self._sources: dict[str, Future[Source]] = {}

    def _choose(self, asked: Precision | None) -> Precision:
        if asked not in (None, *PRECISIONS):
            raise EngineError(f"precision {asked} with OpenVINO: choose one of {', '.join(PRECISIONS)}")
        able = "BF16" in self._core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        if asked == Precision.BF16 and not able:
            raise EngineError(
                f"precision bf16: this CPU ({read_processor().model}) has no BF16 instructions (avx512_bf16 or "
                "amx_bf16); use --precision fp32"
            )
        lowered = able and self.bundle.manifest.precision.numbers in HALF
        return asked or (Precision.BF16 if lowered else Precision.FP32)

    def session(self, graph: str) -> _OpenVinoSession:
        if graph not in self._sessions:
            self._sources[graph] = _start_check(partial(self._find_source, graph))
            self._sessions[graph] = _OpenVinoSession(self, graph)
        return self._sessions[graph]

    def release(self, graph: str) -> None:
        """As ``Engine.release``."""
        if graph in self._sessions:
            self._sessions[graph].release()

    def open_loop(self, limits: TableLimits) -> HostLoop:
        """As ``Engine.open_loop``."""
        return HostLoop(self, self.bundle.manifest, limits)

    def close(self) -> None:
        """As ``Engine.close``."""
        for session in self._sessions.values():
            session.release()

    def compile(self, graph: str, shapes: Mapping[str, Sequence[int]]) -> Any:
        """Compile a graph for input shapes.

        Args:
            graph: name of the graph in the manifest.
            shapes: of every input; -1 is an axis of any length.

        Raises:
            EngineError: too little memory, or OpenVINO cannot read or compile the graph.
        """
        spec = self.bundle.manifest.graphs[graph]
        policy = self.bundle.manifest.precision
        typed = policy.numbers in HALF
        values = self.bundle.manifest.files[spec.weights].bytes // (2 if typed else 4)
        check_memory(values * (2 if self._bf16 else 4), f"the {graph} on {self.info.name}")
        # The graphs of an FP16 bundle say which tensors are BF16; only the autoencoder is in BF16 throughout, because
        # it gains nothing from its FP32 parts. OpenVINO's own switch makes all of a graph BF16, and the conditioner's
        # timesteps must not be. A BF16 bundle has an FP16 autoencoder, so that BF16 does not show in images.
        lowered = self._lowers(graph) and (graph in AUTOENCODER or (not typed and graph != "conditioner"))
        properties = {
            **self._properties,
            "INFERENCE_PRECISION_HINT": "bf16" if lowered else "dynamic" if typed else "f32",
            "EXECUTION_MODE_HINT": "PERFORMANCE" if lowered else "ACCURACY",
        }
        with self._explain_errors(f"{self.bundle.path}: {self.info.name} cannot load the {graph}"):
            loaded = self._load(graph, lambda model: self._compile_model(model, shapes, properties))
        self.bundle.check_in_place()
        return loaded

    def _lowers(self, graph: str) -> bool:
        """Whether the tensors of 16 bits of a graph are BF16 here; else they are FP32."""
        return self._bf16 and not (graph in AUTOENCODER and self.bundle.manifest.precision.name == Precision.BF16)

    def _compile_model(self, model: Any, shapes: Mapping[str, Sequence[int]], properties: dict[str, Any]) -> Any:
        model.reshape({name: list(shape) for name, shape in shapes.items()})
        return self._core.compile_model(model, "CPU", properties)

    def _find_source(self, graph: str) -> Source:
        """Find and check what to read a graph from: a prepared graph, or an FP32 bundle's own file; else None."""
        if self.bundle.manifest.precision.numbers not in HALF:
            return self.bundle.graph(graph)  # OpenVINO maps its weights
        return None if self._folder is None else find_prepared(self._folder, self._facts_for(graph))

    def _facts_for(self, graph: str) -> Facts:
        form = {"precision": str(self.info.precision), "arrangement": ARRANGEMENT}
        return facts_of(self.bundle, graph, f"openvino {self.info.version}", form)

    def _load(self, graph: str, compiled: Callable[[Any], Any]) -> Any:
        """Load a graph as OpenVINO's model, without FP16 tensors, and compile it, which reads the mapped weights."""
        checked = self._sources.pop(graph, None)
        source = self._find_source(graph) if checked is None else checked.result()
        if isinstance(source, Path):
            return compiled(self._read(source))
        if self._folder is not None:
            found = load_prepared(
                self._folder,
                self._facts_for(graph),
                lambda target: self._write(graph, target),
                lambda folder: compiled(self._core.read_model(folder / MODEL)),
                source,
            )
            if found is not None:
                return found
        return compiled(self._retype(graph))

    def _read(self, path: Path) -> Any:
        """Read a graph, and rearrange it for BF16.

        The factors 1 of ONNX's Gemm are removed: OpenVINO would copy weights to multiply them by 1.
        """
        model = self._core.read_model(path)
        for node in model.get_ordered_ops():
            if node.get_type_name() == "Multiply":
                for factor, other in ((0, 1), (1, 0)):
                    source = node.input_value(factor).get_node()
                    if source.get_type_name() == "Constant" and np.array_equal(
                        source.get_data(dtype=np.float32), np.float32(1)
                    ):
                        node.output(0).replace(node.input_value(other))
                        break
        if self._bf16:  # FP32 would gain 1 to 2 %, but its weights would be copied and not mapped
            rearrange(model)
        return model

    def _write(self, graph: str, folder: Path) -> None:
        model = self._retype(graph)
        self._openvino.save_model(model, folder / MODEL, compress_to_fp16=False)
        size = sum(node.get_byte_size() for node in model.get_ops() if node.get_type_name() == "Constant")
        # OpenVINO raises no error on a full disk. It stores equal constants once; large constants are never equal.
        if (folder / "model.bin").stat().st_size < 0.9 * size:
            raise OSError(f"{folder}: the weights were not written in full")

    def _retype(self, graph: str) -> Any:
        """Read the bundle's graph, and change every tensor of 16 bits to this engine's precision.

        Inputs and outputs that are FP16, such as the conditioning table of cross-attention, stay so.
        """
        openvino = self._openvino
        from openvino import opset13

        own = openvino.Type.bf16 if self._lowers(graph) else openvino.Type.f32
        others = {openvino.Type.f16, openvino.Type.bf16} - {own}
        model = self._read(self.bundle.graph(graph))
        results = [node for node in model.get_results() if node.get_output_element_type(0) == openvino.Type.f16]
        for node in model.get_ordered_ops():
            if node.get_output_size() == 0 or node.get_output_element_type(0) not in others:
                continue
            readers = list(node.output(0).get_target_inputs())
            if node.get_type_name() == "Constant":
                values = np.asarray(node.get_data(dtype=np.float32))
                if own == openvino.Type.bf16:
                    tensor = openvino.Tensor(_bfloat16_from_float32(values), openvino.Shape(list(values.shape)), own)
                else:
                    tensor = openvino.Tensor(values)
                replacement = openvino.op.Constant(tensor, shared_memory=False)  # the array is freed after this
            elif node.get_type_name() == "Convert":
                replacement = opset13.convert(node.input_value(0), own)
            elif node.get_type_name() == "Parameter":
                replacement = opset13.convert(node.output(0), own)
            else:
                continue  # its type follows from its inputs
            if node.get_type_name() != "Parameter":
                replacement.set_friendly_name(node.get_friendly_name())
            for reader in readers:
                reader.replace_source_output(replacement.output(0))
        for result in results:
            source = result.input_value(0)
            names = source.get_names()
            rounded = opset13.convert(source, openvino.Type.f16)
            result.input(0).replace_source_output(rounded.output(0))
            source.set_names(set())
            rounded.output(0).set_names(names)
        model.validate_nodes_and_infer_types()
        return model

    @contextlib.contextmanager
    def _explain_errors(self, what: str) -> Iterator[None]:
        try:
            yield
        except DiTError:
            raise
        except Exception as error:  # RuntimeError, or whatever numpy and OpenVINO's wrappers make of a strange graph
            self.bundle.check_in_place()
            raise EngineError(
                f"{what} ({_reason_of(error)}); install the openvino of the constraints file or use another engine"
            ) from error


class _OpenVinoSession:
    """A graph that is compiled when it first runs at a set of shapes. Several threads may run it."""

    def __init__(self, engine: OpenVinoEngine, graph: str) -> None:
        self._engine, self._graph = engine, graph
        self._spec = engine.bundle.manifest.graphs[graph]
        self._requests: OrderedDict[Key, queue.SimpleQueue[Any]] = OrderedDict()
        self._lock = threading.Lock()

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> list[Array]:
        waiting = self._requests_for(_shapes_of(self._spec, inputs, self._engine.open_axes))
        request = waiting.get()
        try:
            found = request.infer(
                {name: np.ascontiguousarray(value) for name, value in inputs.items()},
                share_inputs=True,
                share_outputs=True,
            )
            results = [np.array(found[name]) for name in outputs]  # copies: the next call overwrites these arrays
        except Exception as error:  # RuntimeError, or whatever numpy and OpenVINO's wrappers make of a strange graph
            shapes = ", ".join(f"{name} {value.dtype}{list(value.shape)}" for name, value in inputs.items())
            raise EngineError(
                f"{self._engine.info.name}, graph {self._graph} failed on {shapes}: {_reason_of(error)}; try a smaller "
                "batch"
            ) from error
        finally:
            waiting.put(request)
        check_outputs(f"{self._engine.info.name}, graph {self._graph}", self._spec, inputs, outputs, results)
        return results

    def release(self) -> None:
        with self._lock:
            self._requests.clear()

    def _requests_for(self, shapes: dict[str, tuple[int, ...]]) -> queue.SimpleQueue[Any]:
        """The queue of free inference requests of the model for these shapes; the model is compiled if need be."""
        key = tuple(shapes.values())
        with self._lock:
            if key not in self._requests:
                while len(self._requests) >= max(self._engine.shapes, 1):
                    self._requests.popitem(last=False)
                compiled = self._engine.compile(self._graph, shapes)
                self._requests[key] = queue.SimpleQueue()
                for _ in range(self._engine.streams):
                    self._requests[key].put(compiled.create_infer_request())
            self._requests.move_to_end(key)
            return self._requests[key]


def _start_check(check: Callable[[], Source]) -> Future[Source]:
    """Start a check in a daemon thread, for which the end of the process does not wait.

    Hashing the gigabytes of a step takes as long as compiling a conditioner, so both are done at the same time.
    """
    result: Future[Source] = Future()

    def run() -> None:
        try:
            result.set_result(check())
        except BaseException as error:  # noqa: BLE001  # raised again where the result is asked for
            result.set_exception(error)

    threading.Thread(target=run, name="dit-check", daemon=True).start()
    return result


def _shapes_of(spec: GraphSpec, inputs: Mapping[str, Array], open_axes: Collection[str]) -> dict[str, tuple[int, ...]]:
    """The inputs' shapes, with -1 for axes of any length.

    Raises:
        EngineError: a shape does not fit the manifest. OpenVINO would reshape the graph to it without an error.
    """
    sizes: dict[str, int] = {}
    shapes = {}
    for tensor in spec.inputs:
        shape = inputs[tensor.name].shape
        expected = [sizes.get(axis, axis) if isinstance(axis, str) else axis for axis in tensor.shape]
        if len(shape) != len(expected) or any(
            isinstance(axis, int) and axis != size for axis, size in zip(expected, shape, strict=True)
        ):
            raise EngineError(f"input {tensor.name} is {list(shape)}, expected [{', '.join(map(str, expected))}]")
        sizes.update((axis, size) for axis, size in zip(tensor.shape, shape, strict=True) if isinstance(axis, str))
        shapes[tensor.name] = tuple(
            -1 if axis in open_axes else size for axis, size in zip(tensor.shape, shape, strict=True)
        )
    return shapes


def _bfloat16_from_float32(values: Array) -> Array:
    """Finite float32 → BF16 as uint16 of the same shape, rounded to nearest, ties to even."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    return ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)


def _reason_of(error: Exception) -> str:
    """The last line of OpenVINO's message, which says what is wrong. The lines before it name OpenVINO's source."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def import_openvino() -> Any:
    """Import OpenVINO. Raises EngineError where it is not installed."""
    try:
        # Imported with it, OpenVINO tells google-analytics.com so, from a process that it forks for that, and writes an
        # identity into the home folder. It has no switch, but does without.
        with without_module("openvino_telemetry"):
            import openvino
    except ImportError as error:
        raise EngineError("OpenVINO is not installed; pip install 'dit-export[openvino]'") from error
    return openvino


@functools.cache
def load_core() -> Any:
    """OpenVINO's ``Core``, one for the whole process, which never ends. Raises EngineError as ``import_openvino``.

    A ``Core`` gives its thread a signal stack (sigaltstack), and puts back the one before it when it and all its models
    are gone. Of two cores that do not end in the reverse order of their making, the second puts back the stack of the
    first, which is no memory any more: the next signal, a Ctrl-C, ends the process by SIGSEGV.
    """
    return import_openvino().Core()
