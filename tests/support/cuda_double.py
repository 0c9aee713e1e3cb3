"""A GPU that is not there: CUDA and TensorRT on host memory, and strict about what the real ones get wrong in silence.

``Machine`` is the device. ``machine.cuda`` is a ``Cuda``, ``machine.library`` what ``tensorrt_api``
takes for TensorRT; it computes with ONNX Runtime. Work that is queued is done when it is waited for, and not before;
memory that was not written holds 0xFF (NaN, −1), and addresses are never used twice. What the contract forbids raises
``Misuse``, which the product does not catch.
"""

from __future__ import annotations

import functools
import gc
import hashlib
import itertools
import json
import threading
import weakref
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime

from dit_engines.build import graphs_of
from dit_engines.recipe import Recipe, profiles_of
from dit_runtime.backends.tensorrt.api import TensorRT
from dit_runtime.backends.tensorrt.cuda import ALIGNMENT, DeviceFacts
from dit_runtime.backends.tensorrt.store import StoredEngine, StoredGraph
from dit_runtime.bundle.reader import Bundle
from dit_runtime.core.errors import EngineError

GARBAGE = 0xFF
HEADER = b"a plan of the double\n"
FACTS = DeviceFacts("Double", "8.7", 8_000_000_000, 6_000_000_000, "540.4.0", True)
VERSION = "10.3.0"
Range = tuple[int, int]  # address and size


class Misuse(AssertionError):
    """What the contract of CUDA or TensorRT forbids."""


@dataclass(frozen=True)
class Work:
    """Something queued: what it does, the device memory that it touches, and the context or graph it belongs to."""

    name: str
    run: Callable[[], None]
    uses: tuple[Range, ...] = ()
    context: weakref.ref[Context] | None = None
    scratch: Range | None = None
    event: int | None = None
    graph: int | None = None


class Machine:
    """Device and pinned memory, streams with their queues, events, graphs; and counts of what was called."""

    def __init__(self, facts: DeviceFacts = FACTS, version: str = VERSION, library: str = "tensorrt") -> None:
        self.facts = facts
        self.capturable = True  # what TensorRT-RTX says of its contexts
        self.memory: dict[int, np.ndarray] = {}
        self.written: dict[int, np.ndarray] = {}  # which bytes of it were
        self.weights: dict[str, list[int]] = {}  # of each graph, its engines' bytes
        self.pinned: dict[int, np.ndarray] = {}
        self.queues: dict[int, deque[Work]] = {}
        self.graphs: dict[int, list[Work]] = {}
        self.events: set[int] = set()
        self.capturing: dict[int, tuple[list[Work], int]] = {}
        self.vouched: set[str] = set()
        self.calls: Counter[str] = Counter()
        self.peak = 0
        self._handles = itertools.count(1)
        self._next = 0x7000_0000_0000
        self.cuda = Cuda(self)
        self.library = TensorRT(module(self), library, version)

    @property
    def used(self) -> int:
        """Bytes of device memory: allocations and weights."""
        return sum(map(len, self.memory.values())) + sum(map(sum, self.weights.values()))

    def take(self, size: int) -> int:
        address, self._next = self._next, self._next + (-(-size // ALIGNMENT) + 1) * ALIGNMENT
        self.memory[address], self.written[address] = np.full(size, GARBAGE, np.uint8), np.zeros(size, bool)
        self.peak = max(self.peak, self.used)
        return address

    def at(self, address: int, size: int) -> np.ndarray:
        """Live device memory ``[size]``."""
        first = self._block(address, size)
        return self.memory[first][address - first : address - first + size]

    def marks(self, address: int, size: int) -> np.ndarray:
        """Which bytes of live device memory were written ``[size]``."""
        first = self._block(address, size)
        return self.written[first][address - first : address - first + size]

    def write(self, address: int, values: np.ndarray | int, size: int, known: bool = True) -> None:
        self.at(address, size)[:] = values
        self.marks(address, size)[:] = known

    def read(self, address: int, size: int) -> np.ndarray:
        if not self.marks(address, size).all():
            raise Misuse(f"memory at {address:#x} is read that was never written")
        return self.at(address, size)

    def _block(self, address: int, size: int) -> int:
        for first, block in self.memory.items():
            if first <= address and address + size <= first + len(block):
                return first
        raise Misuse(f"{size} bytes at {address:#x} are not allocated, or not any more: a stale address")

    def check_pinned(self, array: np.ndarray) -> None:
        first, size = array.ctypes.data, array.nbytes
        if not array.flags.c_contiguous or not any(
            start <= first and first + size <= start + len(block) for start, block in self.pinned.items()
        ):
            raise Misuse("a copy of host memory that is not pinned, or not any more")

    def called(self, name: str, allowed_in_capture: bool = False) -> None:
        self.calls[name] += 1
        mine = any(thread == threading.get_ident() for _, thread in self.capturing.values())
        if mine and not allowed_in_capture:
            raise Misuse(f"{name} while a stream is being captured")

    def queue(self, stream: int, work: Work) -> None:
        if stream not in self.queues:
            raise Misuse(f"{work.name} on stream {stream}, which does not exist")
        for address, size in work.uses:
            self.at(address, size)
        if stream in self.capturing:
            self.capturing[stream][0].append(work)
            return
        for other, waiting in self.queues.items():
            if other != stream and any(_overlap(work.scratch, queued.scratch) for queued in waiting):
                raise Misuse("two contexts in flight on two streams share memory for their activations")
        self.queues[stream].append(work)

    def work(self, stream: int, count: int | None = None) -> None:
        """Do what is queued on a stream, all of it or so much."""
        queue = self.queues[stream]
        for _ in range(len(queue) if count is None else count):
            queue.popleft().run()

    def waiting(self) -> list[Work]:
        return [work for queue in self.queues.values() for work in queue]

    def is_busy(self, context: Context) -> bool:
        return any(work.context is not None and work.context() is context for work in self.waiting())

    def check_closed(self) -> None:
        """Raises Misuse where anything is still held."""
        held = {
            "device memory": self.memory,
            "weights": {graph: sizes for graph, sizes in self.weights.items() if sizes},
            "pinned memory": self.pinned,
            "streams": self.queues,
            "graphs": self.graphs,
            "events": self.events,
        }
        if leaks := {name: len(things) for name, things in held.items() if things}:
            raise Misuse(f"not given back: {leaks}")


def _overlap(one: Range | None, other: Range | None) -> bool:
    return one is not None and other is not None and one[0] < sum(other) and other[0] < sum(one)


class Cuda:
    """``dit_runtime.backends.tensorrt.cuda.Cuda`` on a machine."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine

    def read_device(self) -> DeviceFacts:
        self._machine.called("read_device")
        return replace(self._machine.facts, free_bytes=self._machine.facts.memory_bytes - self._machine.used)

    def allocate(self, size: int) -> int:
        machine = self._machine
        machine.called("allocate")
        if size <= 0:
            raise Misuse(f"allocating {size} bytes")
        if machine.used + size > machine.facts.memory_bytes:
            raise EngineError(f"CUDA, allocating {size} bytes: cudaErrorMemoryAllocation (out of memory)")
        return machine.take(size)

    def free(self, address: int) -> None:
        machine = self._machine
        machine.called("free")
        if address not in machine.memory:
            raise Misuse(f"free of {address:#x}, which is not allocated: freed twice?")
        block = (address, len(machine.memory[address]))
        for work in machine.waiting():
            if any(_overlap(block, used) for used in (*work.uses, work.scratch)):
                raise Misuse(f"free of memory that {work.name} still uses")
        del machine.memory[address], machine.written[address]

    def allocate_pinned(self, size: int) -> np.ndarray:
        self._machine.called("allocate_pinned")
        memory = np.full(size, GARBAGE, np.uint8)
        self._machine.pinned[memory.ctypes.data] = memory
        return memory

    def free_pinned(self, memory: np.ndarray) -> None:
        self._machine.called("free_pinned")
        if self._machine.pinned.pop(memory.ctypes.data, None) is None:
            raise Misuse("free of pinned memory that is not allocated: freed twice?")
        memory[:] = GARBAGE

    def create_stream(self) -> int:
        self._machine.called("create_stream")
        handle = next(self._machine._handles)
        self._machine.queues[handle] = deque()
        return handle

    def destroy_stream(self, stream: int) -> None:
        self._machine.called("destroy_stream")
        if self._machine.queues.pop(stream, None):
            raise Misuse("a stream was destroyed with work on it")

    def create_event(self) -> int:
        self._machine.called("create_event")
        handle = next(self._machine._handles)
        self._machine.events.add(handle)
        return handle

    def destroy_event(self, event: int) -> None:
        self._machine.called("destroy_event")
        self._machine.events.remove(event)

    def record(self, event: int, stream: int) -> None:
        self._machine.called("record")
        self._machine.queue(stream, Work("an event", lambda: None, event=event))

    def wait(self, event: int) -> None:
        self._machine.called("wait")
        for stream, queue in self._machine.queues.items():
            for count, work in reversed(list(enumerate(queue, 1))):
                if work.event == event:
                    self._machine.work(stream, count)
                    break

    def upload(self, target: int, source: np.ndarray, stream: int) -> None:
        machine = self._machine
        machine.called("upload", allowed_in_capture=True)
        machine.check_pinned(source)

        def run() -> None:
            machine.check_pinned(source)
            machine.write(target, source.reshape(-1).view(np.uint8), source.nbytes)

        machine.queue(stream, Work("upload", run, ((target, source.nbytes),)))

    def download(self, target: np.ndarray, source: int, stream: int) -> None:
        machine = self._machine
        machine.called("download", allowed_in_capture=True)
        machine.check_pinned(target)

        def run() -> None:
            machine.check_pinned(target)
            target.reshape(-1).view(np.uint8)[:] = machine.read(source, target.nbytes)

        machine.queue(stream, Work("download", run, ((source, target.nbytes),)))

    def copy(self, target: int, source: int, size: int, stream: int) -> None:
        machine = self._machine
        machine.called("copy", allowed_in_capture=True)
        if _overlap((target, size), (source, size)):
            raise Misuse("a copy within the device overlaps itself")

        def run() -> None:
            machine.at(target, size)[:] = machine.at(source, size)
            machine.marks(target, size)[:] = machine.marks(source, size)

        machine.queue(stream, Work("copy", run, ((target, size), (source, size))))

    def clear(self, address: int, size: int, stream: int) -> None:
        machine = self._machine
        machine.called("clear", allowed_in_capture=True)

        def run() -> None:
            machine.write(address, 0, size)

        machine.queue(stream, Work("clear", run, ((address, size),)))

    def synchronize(self, stream: int) -> None:
        self._machine.called("synchronize")
        if stream not in self._machine.queues:
            raise Misuse(f"synchronize of stream {stream}, which does not exist")
        self._machine.work(stream)

    def begin_capture(self, stream: int) -> None:
        self._machine.called("begin_capture")
        if stream not in self._machine.queues:
            raise Misuse("capture needs a stream of its own")
        self._machine.capturing[stream] = ([], threading.get_ident())

    def end_capture(self, stream: int) -> int:
        self._machine.called("end_capture", allowed_in_capture=True)
        if stream not in self._machine.capturing:
            raise Misuse("end of a capture that was not begun")
        if gc.isenabled():
            raise Misuse("a capture in which garbage may be collected, and with it another engine's memory be freed")
        works, _ = self._machine.capturing.pop(stream)
        handle = next(self._machine._handles)
        self._machine.graphs[handle] = works
        return handle

    def abandon_capture(self, stream: int) -> None:
        self._machine.called("abandon_capture", allowed_in_capture=True)
        self._machine.capturing.pop(stream, None)

    def launch(self, graph: int, stream: int) -> None:
        self._machine.called("launch")
        if graph not in self._machine.graphs:
            raise Misuse("launch of a graph that does not exist, or not any more")
        for work in self._machine.graphs[graph]:
            context = work.context and work.context()
            if work.context is not None and context is None:
                raise Misuse("launch of a graph whose execution context is gone")
            if context is not None and context.captured != context.bound():
                raise Misuse("launch of a graph whose context was bound anew after it was captured")
            self._machine.queue(stream, replace(work, graph=graph))

    def destroy_graph(self, graph: int) -> None:
        self._machine.called("destroy_graph")
        if self._machine.graphs.pop(graph, None) is None:
            raise Misuse("a graph was destroyed twice")
        if any(work.graph == graph for work in self._machine.waiting()):
            raise Misuse("a graph was destroyed before its launch was done")


@functools.cache
def _onnxruntime(path: str) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


class Description:
    """What a plan of ``plans_for`` says of itself, by the names of ``ICudaEngine``."""

    def __init__(self, description: dict[str, Any]) -> None:
        self.description = description
        self.tensors = {tensor["name"]: tensor for tensor in description["tensors"]}
        self.num_io_tensors = len(self.tensors)
        self.num_optimization_profiles = len(description["profiles"])

    def get_tensor_name(self, index: int) -> str:
        return list(self.tensors)[index]

    def get_tensor_mode(self, name: str) -> str:
        return "input" if self.tensors[name]["is_input"] else "output"

    def get_tensor_dtype(self, name: str) -> str:
        return self.tensors[name]["dtype"]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(-1 if isinstance(axis, str) else axis for axis in self.tensors[name]["shape"])

    def get_tensor_profile_shape(self, name: str, index: int) -> list[tuple[int, ...]]:
        return [tuple(shape) for shape in self.description["profiles"][index][name]]

    def get_device_memory_size_for_profile_v2(self, index: int) -> int:
        return self.description["activations"][index]

    def takes(self, name: str, shape: tuple[int, ...], profile: int) -> bool:
        """Whether a profile takes an input's shape."""
        least, _, largest = self.get_tensor_profile_shape(name, profile)
        return len(shape) == len(least) and all(
            low <= size <= high for low, size, high in zip(least, shape, largest, strict=True)
        )

    def shape_of(self, name: str, inputs: dict[str, tuple[int, ...]]) -> tuple[int, ...]:
        """The shape of a tensor where the inputs have these shapes."""
        tensor = self.tensors[name]
        if tensor["is_input"]:
            return inputs[name]
        sizes = {
            axis: size
            for given, shape in inputs.items()
            for axis, size in zip(self.tensors[given]["shape"], shape, strict=True)
        }
        return tuple(_size(axis, sizes) for axis in tensor["shape"])

    def bytes_of(self, name: str, inputs: dict[str, tuple[int, ...]]) -> int:
        """The size of a tensor where the inputs have these shapes."""
        return int(np.prod(self.shape_of(name, inputs))) * np.dtype(self.tensors[name]["dtype"]).itemsize


class Engine(Description):
    """``ICudaEngine``: only what ``tensorrt_api`` uses of it."""

    def __init__(self, machine: Machine, description: dict[str, Any], logger: Any) -> None:
        super().__init__(description)
        self.machine, self.logger = machine, logger
        sizes = machine.weights.setdefault(description["graph"], [])
        sizes.append(description["weights"])
        machine.peak = max(machine.peak, machine.used)
        weakref.finalize(self, sizes.remove, description["weights"])

    def create_runtime_config(self) -> RuntimeConfig:
        if self.machine.library.name != "tensorrt_rtx":
            raise AttributeError("create_runtime_config")
        return RuntimeConfig(self)

    def create_execution_context(self, how: Any) -> Context:
        if self.machine.library.name != "tensorrt_rtx":
            if how != "user managed":
                raise Misuse("a context that allocates memory of its own")
            return Context(self)
        if how.strategy != "user managed":
            raise Misuse("a context that allocates memory of its own")
        if how.dynamic_shapes_kernel_specialization_strategy != "eager":
            raise Misuse("a context whose kernels are replaced while a CUDA graph may be captured")
        known = set() if how.cache is None else how.cache.kernels
        if self.description["graph"] not in known:
            self.machine.calls["compile"] += 1
            known.add(self.description["graph"])
        return Context(self)


class RuntimeConfig:
    """``IRuntimeConfig`` of TensorRT-RTX."""

    def __init__(self, engine: Engine) -> None:
        self._machine = engine.machine
        self.strategy: str | None = None
        self.dynamic_shapes_kernel_specialization_strategy: str | None = None
        self.cache: RuntimeCache | None = None

    def set_execution_context_allocation_strategy(self, strategy: str) -> None:
        self.strategy = strategy

    def create_runtime_cache(self) -> RuntimeCache:
        return RuntimeCache(self._machine)

    def set_runtime_cache(self, cache: RuntimeCache) -> bool:
        self.cache = cache
        return True


class RuntimeCache:
    """``IRuntimeCache`` of TensorRT-RTX: the graphs whose kernels were compiled, for one driver."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self.kernels: set[str] = set()

    def serialize(self) -> bytes:
        return json.dumps([self._machine.facts.driver, sorted(self.kernels)]).encode()

    def deserialize(self, content: bytes) -> bool:
        try:
            driver, kernels = json.loads(content)
        except ValueError:
            return False
        if driver != self._machine.facts.driver:
            return False
        self.kernels = set(kernels)
        return True


class Context:
    """``IExecutionContext``: checks that all is bound, in the profile and alive, and computes when it is waited for."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.machine = engine, engine.machine
        self.profile: int | None = None
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.memory: Range | None = None
        self.warm: list[Any] = []
        self.captured: Any = None
        self.asked = False  # whether it can be captured
        self.nvtx_verbosity = "detailed"

    def bound(self) -> Any:
        return (self.profile, dict(self.shapes), dict(self.addresses), self.memory)

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        self._check_idle("the profile")
        self.profile, this = None, weakref.ref(self)

        def run() -> None:
            if (context := this()) is not None:
                context.profile = index

        if not 0 <= index < self.engine.num_optimization_profiles:
            raise RuntimeError("set_optimization_profile_async failed")  # the bindings never return False
        self.machine.queue(stream, Work("the switch of a profile", run))
        return True

    def is_stream_capturable(self, stream: int) -> bool:
        self.asked = True
        return self.machine.capturable

    def set_device_memory(self, address: int, size: int) -> None:
        self.machine.called("set_device_memory")
        self._check_idle("the memory for activations")
        self.machine.at(address, size)
        if address % ALIGNMENT:
            raise Misuse("memory for activations that is not aligned")
        self.memory = (address, size)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.machine.called("set_input_shape")
        self._check_idle("a shape")
        if self.profile is None:
            raise Misuse(f"the shape of {name} before the profile was chosen and the stream waited for")
        self.shapes[name] = tuple(shape)
        return self.engine.takes(name, shape, self.profile)

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.machine.called("set_tensor_address")
        self._check_idle("an address")
        if address % ALIGNMENT:
            raise Misuse(f"{name} at {address:#x} is not aligned")
        self.addresses[name] = address
        return name in self.engine.tensors

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.engine.shape_of(name, self.shapes)

    def execute_async_v3(self, stream: int) -> bool:
        machine, engine = self.machine, self.engine
        machine.called("enqueue", allowed_in_capture=True)
        if self.profile is None:
            raise Misuse("a context was started before its profile was chosen and the stream waited for")
        if missing := [name for name in engine.tensors if name not in self.addresses]:
            raise Misuse(f"tensor {missing[0]} is not bound")
        needed = engine.get_device_memory_size_for_profile_v2(self.profile)
        if self.memory is None or self.memory[1] < needed:
            raise Misuse(f"{self.memory and self.memory[1]} bytes for activations, {needed} are needed")
        scratch = (self.memory[0], needed)
        ranges = {name: (self.addresses[name], engine.bytes_of(name, self.shapes)) for name in engine.tensors}
        for name, own in ranges.items():
            if _overlap(own, scratch):
                raise Misuse(f"{name} lies in the memory for activations")
            for other, theirs in ranges.items():
                written = not (engine.tensors[name]["is_input"] and engine.tensors[other]["is_input"])
                if name < other and written and _overlap(own, theirs):
                    raise Misuse(f"{name} and {other} overlap")
        bound = self.bound()
        if stream not in machine.capturing and self.nvtx_verbosity != "none":
            raise Misuse("a context that describes each kernel to a profiler")
        if stream in machine.capturing:
            if machine.library.name == "tensorrt_rtx" and not (self.asked and machine.capturable):
                raise Misuse("a context of TensorRT-RTX was captured that did not say that it can be")
            if bound not in self.warm:
                raise Misuse("a context was captured that has not been run so before")
            if self.captured is not None:
                raise Misuse("a context was captured for a second graph")
            self.captured = bound
        run = functools.partial(_compute, machine, weakref.ref(self), bound, ranges, scratch)
        machine.queue(stream, Work("a network", run, tuple(ranges.values()), weakref.ref(self), scratch))
        return True

    def _check_idle(self, what: str) -> None:
        if self.machine.is_busy(self):
            raise Misuse(f"{what} of a context was changed while its work is queued")


def _size(axis: int | str, sizes: dict[Any, int]) -> int:
    """Of an axis, a number or such as ``8*height``."""
    product = 1
    for part in str(axis).split("*"):
        product *= int(part) if part.isdecimal() else sizes[part]
    return product


def _compute(
    machine: Machine, this: weakref.ref[Context], bound: Any, ranges: dict[str, Range], scratch: Range
) -> None:
    context = this()
    if context is None:
        raise Misuse("an execution context or its engine was destroyed before its work was done")
    if bound != context.bound():
        raise Misuse("a context was bound anew before its work was done")
    engine = context.engine
    outputs = [name for name, tensor in engine.tensors.items() if not tensor["is_input"]]
    inputs = {}
    for name, tensor in engine.tensors.items():
        if tensor["is_input"]:
            # Of a conditioning table only the rows that are used need be there.
            read = machine.at if name == engine.description["table"] else machine.read
            values = read(*ranges[name]).view(tensor["dtype"])
            inputs[name] = values.reshape(context.get_tensor_shape(name)).copy()
    if (table := engine.description["table"]) in inputs:
        if not ((inputs["rows"] >= 0) & (inputs["rows"] < len(inputs[table]))).all():
            raise Misuse(f"a row is read outside the conditioning table, which has {len(inputs[table])}")
        present = machine.marks(*ranges[table]).reshape(len(inputs[table]), -1).all(axis=1)
        if not present[inputs["rows"]].all():
            raise Misuse("a row of the conditioning table is read that was never written")
    results = _onnxruntime(engine.description["onnx"]).run(outputs, inputs)
    machine.write(scratch[0], GARBAGE, scratch[1], known=False)
    for name, result in zip(outputs, results, strict=True):
        assert result.shape == context.get_tensor_shape(name)
        machine.write(ranges[name][0], np.ascontiguousarray(result).reshape(-1).view(np.uint8), ranges[name][1])
    context.warm.append(bound)


def module(machine: Machine) -> SimpleNamespace:
    """The ``tensorrt`` module: what ``tensorrt_api`` looks up in it."""

    class Logger:
        INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

        def log(self, severity: int, message: str) -> None: ...

    class Runtime:
        def __init__(self, logger: Logger) -> None:
            self.engine_host_code_allowed: bool | None = None
            self._logger = logger

        def deserialize_cuda_engine(self, plan: Any) -> Engine | None:
            machine.called("deserialize")
            content = bytes(plan)
            if hashlib.sha256(content).hexdigest() not in machine.vouched or self.engine_host_code_allowed is not False:
                raise Misuse("a plan was deserialized that no sidecar vouches for, or with code for the host allowed")
            if not content.startswith(HEADER):
                self._logger.log(Logger.ERROR, "Serialization assertion\nmagicTagRead == kMAGIC_TAG failed.")
                return None
            description = json.loads(content[len(HEADER) :])
            if machine.used + description["weights"] > machine.facts.memory_bytes:
                raise Misuse("weights that do not fit: the real library may take the process with it")
            return Engine(machine, description, self._logger)

    return SimpleNamespace(
        ILogger=Logger,
        Runtime=Runtime,
        TensorIOMode=SimpleNamespace(INPUT="input", OUTPUT="output"),
        ExecutionContextAllocationStrategy=SimpleNamespace(USER_MANAGED="user managed"),
        DynamicShapesKernelSpecializationStrategy=SimpleNamespace(EAGER="eager"),
        ProfilingVerbosity=SimpleNamespace(NONE="none"),
        nptype=np.dtype,
    )


def stored_on(machine: Machine, bundle: Bundle, folder: Path, recipe: Recipe) -> StoredEngine:
    """What ``dit-build`` would have stored for this machine, with plans that only it can run."""
    stored = plans_for(bundle, folder, recipe, machine.library, machine.facts)
    machine.vouched |= {graph.plan_sha256 for graph in stored.graphs.values()}
    return stored


def plans_for(bundle: Bundle, folder: Path, recipe: Recipe, library: TensorRT, facts: DeviceFacts) -> StoredEngine:
    """Plans that say which graph to run, for whatever reads them in place of TensorRT."""
    folder.mkdir(parents=True, exist_ok=True)
    graphs = {}
    for number, name in enumerate(graphs_of(bundle), 1):
        spec, profiles = (
            bundle.manifest.graphs[name],
            profiles_of(bundle.manifest.graphs[name], recipe, bundle.manifest),
        )
        # Figures that differ, so that the wrong one is seen; the decoder's are the largest, as in life.
        each = {"decoder": 64}.get(name, 8) * np.dtype(np.float32).itemsize
        first = spec.inputs[0].name
        activations = [each * int(np.prod(profile[first][2])) + index for index, profile in enumerate(profiles)]
        content = (
            HEADER
            + json.dumps(
                {
                    "graph": name,
                    "table": bundle.manifest.table.name,
                    "onnx": str(bundle.graph(name)),
                    "profiles": profiles,
                    "activations": activations,
                    "weights": 100_000 * number,
                    "tensors": [
                        {"name": tensor.name, "dtype": tensor.dtype, "shape": tensor.shape, "is_input": is_input}
                        for is_input, tensors in ((True, spec.inputs), (False, spec.outputs))
                        for tensor in tensors
                    ],
                }
            ).encode()
        )
        (folder / f"{name}.plan").write_bytes(content)
        digest = hashlib.sha256(content).hexdigest()
        graphs[name] = StoredGraph(
            name, f"{name}.plan", len(content), digest, tuple(profiles), 100_000 * number, tuple(activations)
        )
    return StoredEngine(
        folder=folder,
        bundle=bundle.digest,
        image_size=bundle.manifest.image_size,
        library=library.name,
        version=library.version,
        target=recipe.target,
        compute_capability=facts.compute_capability,
        gpu=facts.name,
        driver=facts.driver,
        recipe={},
        graphs=graphs,
    )
