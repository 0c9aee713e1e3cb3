"""The part of CUDA that the TensorRT engine uses: an interface, and its implementation on ``cuda-bindings`` 12 and 13.

In the interface ``Cuda``, device memory is an address. Host memory that copies may read or write is a pinned numpy
array. Streams, events and graphs are handles. Copies, fills and launches are queued on a stream; their methods return
before the work is done.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.metadata
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from dit_runtime.core.errors import EngineError
from dit_runtime.core.machine import read_available_memory

ALIGNMENT = 256  # bytes: TensorRT asks it of every address, and every allocation has it

# Since L4T 36.4.7 a Jetson may refuse a large allocation although memory is free (NvMap error 12).
OUT_OF_MEMORY = (
    "use a smaller batch; on a Jetson with free memory, drop the file cache (sudo sysctl vm.drop_caches=3) or reboot"
)

Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class DeviceFacts:
    """A GPU as the driver describes it.

    Attributes:
        name: such as ``Orin, 8 SMs`` or ``NVIDIA L4``.
        compute_capability: such as ``8.7``.
        memory_bytes: all of the GPU's memory; of an integrated GPU, the system's memory.
        free_bytes: the memory that no program has taken.
        driver: the driver's version, such as ``540.4.0``; where the system does not tell, the CUDA version that the
            driver was made for, such as ``CUDA 12.6``.
        integrated: whether the GPU shares the system's memory, as on a Jetson.
    """

    name: str
    compute_capability: str
    memory_bytes: int
    free_bytes: int
    driver: str
    integrated: bool


class Cuda(Protocol):
    """One GPU. Every method raises EngineError with CUDA's name of the error.

    Between ``begin_capture`` and ``end_capture``, work that is queued on the stream is recorded and not done. In
    between, nothing may be allocated, freed or waited for. A recorded graph holds addresses, and reads the memory at
    each launch.
    """

    def read_device(self) -> DeviceFacts:
        """Read the GPU's facts as they are now."""
        ...

    def allocate(self, size: int) -> int:
        """Allocate ``size`` bytes on the device. The address is a multiple of ``ALIGNMENT``, the content undefined."""
        ...

    def free(self, address: int) -> None:
        """Free memory of ``allocate``. No queued work may still use it."""
        ...

    def allocate_pinned(self, size: int) -> Bytes:
        """Allocate ``size`` bytes of page-locked host memory ``[size]``, with undefined content."""
        ...

    def free_pinned(self, memory: Bytes) -> None:
        """Free memory of ``allocate_pinned``. The array must not be used afterwards."""
        ...

    def create_stream(self) -> int:
        """Create a stream that does not wait for the default stream."""
        ...

    def destroy_stream(self, stream: int) -> None: ...

    def create_event(self) -> int:
        """Create an event: a mark in a stream's work that the host can wait for."""
        ...

    def destroy_event(self, event: int) -> None: ...

    def record(self, event: int, stream: int) -> None:
        """Put an event after all work that is queued on a stream."""
        ...

    def wait(self, event: int) -> None:
        """Wait until the work before an event is done. Return at once if the event was never recorded."""
        ...

    def upload(self, target: int, source: NDArray[Any], stream: int) -> None:
        """Queue a copy of pinned memory to the device. ``source`` must not change before the copy is done."""
        ...

    def download(self, target: NDArray[Any], source: int, stream: int) -> None:
        """Queue a copy from the device to pinned memory. ``target`` holds the values after ``synchronize``."""
        ...

    def copy(self, target: int, source: int, size: int, stream: int) -> None:
        """Queue a copy of ``size`` bytes within the device. Source and target must not overlap."""
        ...

    def clear(self, address: int, size: int, stream: int) -> None:
        """Queue a fill of ``size`` bytes with zeros."""
        ...

    def synchronize(self, stream: int) -> None:
        """Wait until all work that is queued on a stream is done."""
        ...

    def begin_capture(self, stream: int) -> None:
        """Record the work that this thread queues on the stream from now on, instead of doing it."""
        ...

    def end_capture(self, stream: int) -> int:
        """Stop recording, and return the recorded graph, ready to be launched."""
        ...

    def abandon_capture(self, stream: int) -> None:
        """Stop recording, and drop the recorded work. Raises no error, because it is called after another error."""
        ...

    def launch(self, graph: int, stream: int) -> None:
        """Queue the work of a recorded graph."""
        ...

    def destroy_graph(self, graph: int) -> None: ...


def read_device() -> DeviceFacts:
    """Read the facts of the first GPU that this process sees (``CUDA_VISIBLE_DEVICES``).

    Raises:
        EngineError: no GPU, no driver or no ``cuda-bindings``.
    """
    return CudaRuntime().read_device()


class CudaRuntime:
    """``Cuda`` on the CUDA runtime of ``cuda-bindings`` 12 or 13, on the first GPU that the process sees.

    Raises:
        EngineError: no ``cuda-bindings``, no driver, or no GPU.
    """

    def __init__(self) -> None:
        self._rt = _import_runtime()
        count = self._call("looking for a GPU", "cudaGetDeviceCount")
        if not count:
            raise EngineError("no NVIDIA GPU is visible here; see CUDA_VISIBLE_DEVICES, or choose another engine")

    def read_device(self) -> DeviceFacts:
        properties = self._call("asking for the GPU", "cudaGetDeviceProperties", 0)
        free, total = self._call("asking for the GPU's memory", "cudaMemGetInfo")
        name, integrated = properties.name.decode("utf-8", "replace").rstrip("\0"), bool(properties.integrated)
        if integrated:
            # All Orins have the same name and compute capability, but a plan is for one number of multiprocessors.
            name = f"{name}, {properties.multiProcessorCount} SMs"
            # The driver counts the system's file cache as taken memory.
            free = max(int(free), read_available_memory() or 0)
        return DeviceFacts(
            name=name,
            compute_capability=f"{properties.major}.{properties.minor}",
            memory_bytes=int(total),
            free_bytes=int(free),
            driver=self._read_driver(),
            integrated=integrated,
        )

    def _read_driver(self) -> str:
        try:
            return Path("/sys/module/nvidia/version").read_text(encoding="ascii").strip()
        except (OSError, ValueError):
            number = self._call("asking for the driver", "cudaDriverGetVersion")
            return f"CUDA {number // 1000}.{number % 1000 // 10}"

    def allocate(self, size: int) -> int:
        return int(self._call(f"allocating {size} bytes", "cudaMalloc", size))

    def free(self, address: int) -> None:
        self._call("freeing device memory", "cudaFree", address)

    def allocate_pinned(self, size: int) -> Bytes:
        address = int(
            self._call(f"allocating {size} pinned bytes", "cudaHostAlloc", size, self._rt.cudaHostAllocDefault)
        )
        return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))

    def free_pinned(self, memory: Bytes) -> None:
        self._call("freeing pinned memory", "cudaFreeHost", memory.ctypes.data)

    def create_stream(self) -> int:
        return int(self._call("making a stream", "cudaStreamCreateWithFlags", self._rt.cudaStreamNonBlocking))

    def destroy_stream(self, stream: int) -> None:
        self._call("destroying a stream", "cudaStreamDestroy", stream)

    def create_event(self) -> int:
        return int(self._call("making an event", "cudaEventCreateWithFlags", self._rt.cudaEventDisableTiming))

    def destroy_event(self, event: int) -> None:
        self._call("destroying an event", "cudaEventDestroy", event)

    def record(self, event: int, stream: int) -> None:
        self._call("recording an event", "cudaEventRecord", event, stream)

    def wait(self, event: int) -> None:
        self._call("waiting for an event", "cudaEventSynchronize", event)

    def upload(self, target: int, source: NDArray[Any], stream: int) -> None:
        kind = self._rt.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._queue_copy("to the device", target, _address_of(source), source.nbytes, kind, stream)

    def download(self, target: NDArray[Any], source: int, stream: int) -> None:
        kind = self._rt.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._queue_copy("from the device", _address_of(target), source, target.nbytes, kind, stream)

    def copy(self, target: int, source: int, size: int, stream: int) -> None:
        kind = self._rt.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        self._queue_copy("within the device", target, source, size, kind, stream)

    def _queue_copy(self, way: str, target: int, source: int, size: int, kind: Any, stream: int) -> None:
        self._call(f"copying {size} bytes {way}", "cudaMemcpyAsync", target, source, size, kind, stream)

    def clear(self, address: int, size: int, stream: int) -> None:
        self._call(f"clearing {size} bytes", "cudaMemsetAsync", address, 0, size, stream)

    def synchronize(self, stream: int) -> None:
        self._call("waiting for the GPU", "cudaStreamSynchronize", stream)

    def begin_capture(self, stream: int) -> None:
        # Thread-local: other threads may allocate meanwhile without an error in the capture.
        mode = self._rt.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("beginning a graph", "cudaStreamBeginCapture", stream, mode)

    def end_capture(self, stream: int) -> int:
        recorded = self._call("ending a graph", "cudaStreamEndCapture", stream)
        try:
            return int(self._call("making a graph ready", "cudaGraphInstantiate", recorded, 0))
        finally:
            self._call("freeing a recorded graph", "cudaGraphDestroy", recorded)

    def abandon_capture(self, stream: int) -> None:
        _, *graph = self._rt.cudaStreamEndCapture(stream)
        if graph and int(graph[0] or 0):
            self._rt.cudaGraphDestroy(graph[0])

    def launch(self, graph: int, stream: int) -> None:
        self._call("launching a graph", "cudaGraphLaunch", graph, stream)

    def destroy_graph(self, graph: int) -> None:
        self._call("destroying a graph", "cudaGraphExecDestroy", graph)

    def _call(self, doing: str, function: str, *arguments: Any) -> Any:
        """Call a function of CUDA's runtime, check its status, and return its other results: one, or a tuple."""
        try:
            status, *values = getattr(self._rt, function)(*arguments)
        except RuntimeError as error:  # of cuda-bindings up to 12.8, where libcuda cannot be loaded
            raise _error_without_driver(str(error)) from error
        if status != self._rt.cudaError_t.cudaSuccess:
            if status.name == "cudaErrorInsufficientDriver":
                raise _error_of_old_driver()
            if status.name == "cudaErrorNoDevice":
                raise _error_without_driver(status.name)
            (_, text) = self._rt.cudaGetErrorString(status)
            advice = OUT_OF_MEMORY if status.name == "cudaErrorMemoryAllocation" else "run dit-verify"
            raise EngineError(f"CUDA, {doing}: {status.name} ({text.decode('utf-8', 'replace')}); {advice}")
        return values[0] if len(values) == 1 else tuple(values)


def _address_of(memory: NDArray[Any]) -> int:
    assert memory.flags.c_contiguous
    return memory.ctypes.data


def _error_without_driver(reason: str) -> EngineError:
    return EngineError(
        f"no NVIDIA driver that works here ({reason}); install one (on a Jetson it comes with JetPack), or choose "
        "another engine"
    )


def _error_of_old_driver() -> EngineError:
    """The error where the driver is older than the CUDA runtime that cuda-bindings has in it (CUDA's error 35)."""
    try:
        has = f"cuda-bindings {importlib.metadata.version('cuda-bindings')} has"
    except importlib.metadata.PackageNotFoundError:
        has = "cuda-bindings has"
    return EngineError(
        "no NVIDIA driver that works here (cudaErrorInsufficientDriver, 35): there is none, or it is older than the "
        f"CUDA runtime that {has} in it; on JetPack 6 pip install 'cuda-bindings==12.8.*', elsewhere install or update "
        "the driver (CUDA 13 needs 580 or later), or pip install 'cuda-bindings<13'"
    )


def _import_runtime() -> Any:
    try:
        return importlib.import_module("cuda.bindings.runtime")
    except ImportError as error:
        raise EngineError(
            f"cuda-bindings is not installed for this Python ({error}); on JetPack 6 pip install "
            "'dit-export[jetson6]', on JetPack 7 'dit-export[jetson7]', elsewhere 'dit-export[tensorrt]'"
        ) from error
