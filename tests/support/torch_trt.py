"""In TensorRT's place on a GPU that has torch and no TensorRT: the same calls, and the graph runs on torch.

``module(place)`` is what ``tensorrt_api`` looks up in the library, as ``cuda_double.module`` is. A context reads and
writes the very addresses that it was given, on the very stream, so that all that surrounds TensorRT can be run and
captured on the device: memory, streams, copies, CUDA graphs, contexts. It proves nothing of TensorRT itself.

``CudaPlace`` is a GPU. ``DoublePlace`` is the double's host memory, on which the same code runs without one.
"""

from __future__ import annotations

import contextlib
import json
import os
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # the same sums on each stream and in each thread

import numpy as np
import torch

from support.cuda_double import ALIGNMENT, GARBAGE, HEADER, Description, Machine, Range, Work
from support.onnx_on_torch import Network

Shapes = dict[str, tuple[int, ...]]


class Place(Protocol):
    """Where the tensors are. ``device`` is torch's name of it."""

    device: str

    def make_pool(self) -> Any:
        """Memory for what a context computes on the way, kept from one run to the next."""
        ...

    def run(self, stream: int, work: Callable[[], None], uses: tuple[Range, ...], scratch: Range, pool: Any) -> None:
        """Queue work on a stream."""
        ...

    def read(self, address: int, shape: tuple[int, ...], dtype: str) -> torch.Tensor:
        """The tensor at an address, without a copy."""
        ...

    def write(self, address: int, value: torch.Tensor) -> None:
        """Copy a tensor to an address."""
        ...


class _Memory:
    """Device memory as torch takes it (``__cuda_array_interface__``, version 3)."""

    def __init__(self, address: int, shape: tuple[int, ...], dtype: str) -> None:
        kind = np.dtype(dtype).str
        self.__cuda_array_interface__ = {"data": (address, False), "shape": shape, "typestr": kind, "version": 3}


class CudaPlace:
    """The GPU that torch takes by default, which is the first that the process sees."""

    device = "cuda"

    def __init__(self) -> None:
        torch.cuda.init()
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
        torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, True
        torch.zeros(1, device="cuda")
        self._views: dict[tuple[int, tuple[int, ...], str], torch.Tensor] = {}

    def make_pool(self) -> Any:
        # A captured graph writes its intermediate tensors at each launch: nothing else may ever get their memory.
        return torch.cuda.MemPool()

    def run(self, stream: int, work: Callable[[], None], uses: tuple[Range, ...], scratch: Range, pool: Any) -> None:
        with (
            torch.inference_mode(),
            torch.cuda.stream(torch.cuda.ExternalStream(stream)),
            torch.cuda.use_mem_pool(pool),
        ):
            work()

    def read(self, address: int, shape: tuple[int, ...], dtype: str) -> torch.Tensor:
        # Made once: within a capture nothing is asked of the driver.
        key = (address, shape, dtype)
        if key not in self._views:
            if len(self._views) > 4096:
                self._views.clear()
            self._views[key] = torch.as_tensor(_Memory(*key), device="cuda")
        return self._views[key]

    def write(self, address: int, value: torch.Tensor) -> None:
        self.read(address, tuple(value.shape), str(value.dtype).removeprefix("torch.")).copy_(value)


class DoublePlace:
    """The memory and the streams of the double."""

    device = "cpu"

    def __init__(self, machine: Machine) -> None:
        self._machine = machine

    def make_pool(self) -> None:
        return None

    def run(self, stream: int, work: Callable[[], None], uses: tuple[Range, ...], scratch: Range, pool: Any) -> None:
        self._machine.called("enqueue", allowed_in_capture=True)

        def run() -> None:
            with torch.inference_mode():
                work()

        self._machine.queue(stream, Work("a network", run, uses, scratch=scratch))

    def read(self, address: int, shape: tuple[int, ...], dtype: str) -> torch.Tensor:
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        return torch.from_numpy(self._machine.at(address, size).view(dtype).reshape(shape))

    def write(self, address: int, value: torch.Tensor) -> None:
        array = value.contiguous().numpy()
        self._machine.write(address, array.reshape(-1).view(np.uint8), array.nbytes)


class Engine(Description):
    """``ICudaEngine``: its graph's weights are on the device from the start."""

    def __init__(self, place: Place, description: dict[str, Any], logger: Any) -> None:
        super().__init__(description)
        self.place, self.logger = place, logger
        self.network = Network(Path(description["onnx"]), place.device)
        if place.device == "cuda":
            torch.cuda.synchronize()  # the weights' copies were queued on another stream than the engine's

    def create_execution_context(self, how: str) -> Context:
        if how != "user managed":
            raise ValueError("a context that allocates memory of its own")
        return Context(self)


class Context:
    """``IExecutionContext``: refuses what it was not given, and runs the graph at the given addresses."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.nvtx_verbosity = "detailed"
        self._profile: int | None = None
        self._shapes: Shapes = {}
        self._addresses: dict[str, int] = {}
        self._scratch: Range | None = None
        self._pool = engine.place.make_pool()

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        if not 0 <= index < self.engine.num_optimization_profiles:
            raise RuntimeError("set_optimization_profile_async failed")  # as the bindings
        self._profile = index
        return True

    def set_device_memory(self, address: int, size: int) -> None:
        if address % ALIGNMENT:
            raise ValueError(f"memory for activations at {address:#x} is not aligned")
        self._scratch = (address, size)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self._shapes[name] = tuple(shape)
        return self._profile is not None and self.engine.takes(name, tuple(shape), self._profile)

    def set_tensor_address(self, name: str, address: int) -> bool:
        if address % ALIGNMENT:
            raise ValueError(f"{name} at {address:#x} is not aligned")
        self._addresses[name] = address
        return name in self.engine.tensors

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.engine.shape_of(name, self._shapes)

    def execute_async_v3(self, stream: int) -> bool:
        engine = self.engine
        missing = [name for name in engine.tensors if name not in self._addresses]
        needed = None if self._profile is None else engine.get_device_memory_size_for_profile_v2(self._profile)
        if missing or needed is None or self._scratch is None or self._scratch[1] < needed:
            engine.logger.log(1, f"not given: {missing}, {needed} bytes for activations, of {self._scratch}")
            return False
        scratch = (self._scratch[0], needed)
        uses = tuple((self._addresses[name], engine.bytes_of(name, self._shapes)) for name in engine.tensors)
        run = weakref.WeakMethod(self._compute)
        addresses, shapes = dict(self._addresses), dict(self._shapes)
        engine.place.run(stream, lambda: _alive(run)(addresses, shapes, scratch), uses, scratch, self._pool)
        return True

    def _compute(self, addresses: Mapping[str, int], shapes: Shapes, scratch: Range) -> None:
        engine, place = self.engine, self.engine.place
        inputs = {
            name: place.read(addresses[name], shapes[name], tensor["dtype"])
            for name, tensor in engine.tensors.items()
            if tensor["is_input"]
        }
        for name, value in engine.network.run(inputs).items():
            place.write(addresses[name], value)
        place.read(*_bytes_at(scratch)).fill_(GARBAGE)  # what lies there beside the activations is seen to be lost


def _alive(method: weakref.WeakMethod[Callable[..., None]]) -> Callable[..., None]:
    found = method()
    if found is None:
        raise RuntimeError("an execution context was destroyed before its work was done")
    return found


def _bytes_at(scratch: Range) -> tuple[int, tuple[int, ...], str]:
    return scratch[0], (scratch[1],), "uint8"


def module(place: Place) -> SimpleNamespace:
    """The ``tensorrt`` module: what ``tensorrt_api`` looks up in it."""

    class Logger:
        INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

        def log(self, severity: int, message: str) -> None: ...

    class Runtime:
        engine_host_code_allowed: bool | None = None

        def __init__(self, logger: Logger) -> None:
            self._logger = logger

        def deserialize_cuda_engine(self, plan: Any) -> Engine | None:
            content = bytes(plan)
            if not content.startswith(HEADER):
                self._logger.log(Logger.ERROR, "Serialization assertion magicTagRead == kMAGIC_TAG failed.")
                return None
            try:
                return Engine(place, json.loads(content[len(HEADER) :]), self._logger)
            except (torch.cuda.OutOfMemoryError, NotImplementedError) as error:
                self._logger.log(Logger.ERROR, str(error))
                return None

    return SimpleNamespace(
        ILogger=Logger,
        Runtime=Runtime,
        TensorIOMode=SimpleNamespace(INPUT="input", OUTPUT="output"),
        ExecutionContextAllocationStrategy=SimpleNamespace(USER_MANAGED="user managed"),
        ProfilingVerbosity=SimpleNamespace(NONE="none"),
        nptype=np.dtype,
    )


@contextlib.contextmanager
def memory_given_back() -> Iterator[None]:
    """What torch keeps of the device's memory for itself is given back at the end. No engine may be open then."""
    yield
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        with contextlib.suppress(AttributeError):  # torch keeps a workspace for each stream that there ever was
            torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()
