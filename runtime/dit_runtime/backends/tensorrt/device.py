"""What one TensorRT engine has on the GPU: a stream, a lock, memory for activations, and the loaded plans.

All work of an engine is queued on one stream, so its graphs never run together, and one memory block serves the
activations of all of them. Threads may share an engine; the lock lets one call run at a time. Engines share nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dit_runtime.backends.profiles import Fit, Profiles, Shape
from dit_runtime.backends.tensorrt import api as tensorrt_api
from dit_runtime.backends.tensorrt.api import TensorRT
from dit_runtime.backends.tensorrt.buffers import DeviceBuffer
from dit_runtime.backends.tensorrt.context import Context
from dit_runtime.backends.tensorrt.cuda import Cuda, DeviceFacts
from dit_runtime.backends.tensorrt.memory import available_bytes_of, check_engine, describe_bytes
from dit_runtime.backends.tensorrt.runtime_cache import RuntimeCache
from dit_runtime.backends.tensorrt.store import StoredEngine, StoredGraph
from dit_runtime.bundle.manifest import Manifest
from dit_runtime.core.errors import EngineError
from dit_runtime.core.reading import open_file

# Device memory for contexts, CUDA graphs and the library's kernels, in bytes. Assumed, not measured.
SMALL_BYTES = 32 << 20


class LoadedPlan:
    """A plan on the device.

    Attributes:
        engine: the library's object.
        tensors: its inputs and outputs by name.
        cache: the kernels that were compiled for the GPU.
    """

    def __init__(self, library: TensorRT, runtime: Any, content: memoryview, path: Path, facts: DeviceFacts) -> None:
        self._library = library
        self.engine = tensorrt_api.engine_from_plan(runtime, content)
        self.tensors = tensorrt_api.tensors_of(library, self.engine)
        self.cache = RuntimeCache(library, self.engine, path, facts)
        self._contexts: dict[int, Context] = {}

    def make_context(self, profile: int, cuda: Cuda, stream: int) -> Context:
        """Make an execution context that only one captured graph uses."""
        raw = tensorrt_api.make_context(self._library, self.engine, profile, stream, self.cache.content)
        cuda.synchronize(stream)  # until the context has switched to the profile
        return Context(raw)

    def context_for(self, profile: int, cuda: Cuda, stream: int) -> Context:
        """The context of a profile for calls that are not captured; made on first use."""
        if profile not in self._contexts:
            self._contexts[profile] = self.make_context(profile, cuda, stream)
        return self._contexts[profile]

    def activation_bytes_of(self, profile: int) -> int:
        return tensorrt_api.activation_bytes_of(self.engine, profile)


class Device:
    """The GPU as one engine uses it. A caller of any method holds ``lock``.

    Args:
        manifest: of the bundle at the size in use.
        stored: the plans.
        library: TensorRT or TensorRT-RTX, imported.
        cuda: the GPU.
        name: the engine's name, for messages.
        drop: called with a graph's name before its weights are unloaded; frees all that refers to them.
        free_idle: frees memory that no batch uses now; returns False where there is none.

    Attributes:
        stream: the stream on which all work is queued; 0 once the device is closed.
        activations: the memory block for activations that all contexts share.
        running: the graph whose work is being prepared or queued. Its weights are not unloaded to make room.
    """

    def __init__(
        self,
        manifest: Manifest,
        stored: StoredEngine,
        library: TensorRT,
        cuda: Cuda,
        name: str,
        drop: Callable[[str], None],
        free_idle: Callable[[], bool],
    ) -> None:
        self.manifest, self.stored, self.library, self.cuda, self.name = manifest, stored, library, cuda, name
        self._drop, self._free_idle = drop, free_idle
        self.lock = threading.RLock()
        self._profiles = stored.profiles(manifest)
        self._said: list[str] = []
        # The logger must outlive the runtime, and the runtime its engines.
        self._logger = tensorrt_api.make_logger(library, self._note)
        try:
            self._runtime = tensorrt_api.make_runtime(library, self._logger)
        except EngineError as error:
            raise EngineError(f"{name}: {error} ({self._describe_errors()})") from error
        self.stream = cuda.create_stream()
        self.activations = DeviceBuffer(cuda, self.stream, self.make_room)
        self.running: str | None = None
        self._loaded: dict[str, LoadedPlan] = {}
        self._loads: dict[str, int] = {}

    def find_stored_graph(self, graph: str) -> StoredGraph:
        """The stored plan of a graph.

        Raises:
            EngineError: the engine has no plan of that graph.
        """
        if graph not in self.stored.graphs:
            known = ", ".join(self.stored.graphs)
            raise EngineError(
                f"{self.name}: has no plan of the {graph}, only of {known}; choose another engine for the {graph}"
            )
        return self.stored.graphs[graph]

    def profiles_of(self, graph: str) -> Profiles:
        """The optimization profiles of a graph. Raises EngineError where the engine has no plan of that graph."""
        self.find_stored_graph(graph)
        return self._profiles[graph]

    def load(self, graph: str) -> LoadedPlan:
        """Load a graph's plan, to be run next: check and deserialize it, unless it is on the device already.

        Raises:
            EngineError: the plan was altered, the library refuses it, or the device has too little memory.
        """
        self.running = graph
        if graph not in self._loaded:
            self.check_open()
            self.make_room(self.find_stored_graph(graph).weights_bytes)
            self._loaded[graph] = self._deserialize(graph)
            self._loads[graph] = self._loads.get(graph, 0) + 1
        return self._loaded[graph]

    def _deserialize(self, graph: str) -> LoadedPlan:
        plan = self.stored.locate_plan(graph)
        self._said.clear()
        try:
            # The file is mapped. On a Jetson, a copy would take memory that the weights need.
            with (
                open_file(plan, self.stored.graphs[graph].plan_bytes, within=self.stored.folder) as file,
                mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
                memoryview(mapped) as content,
            ):
                # Hash the same bytes that are deserialized.
                self.stored.check_plan(graph, hashlib.sha256(content).hexdigest())
                try:
                    loaded = LoadedPlan(self.library, self._runtime, content, plan, self.cuda.read_device())
                except EngineError as error:
                    advice = "run dit-build again, or free memory"
                    raise EngineError(f"{plan}: {error} ({self._describe_errors()}); {advice}") from error
        except (OSError, ValueError) as error:
            raise EngineError(f"{plan}: cannot be read ({error}); run dit-build again") from error
        spec = self.manifest.graphs[graph]
        expected = {tensor.name: np.dtype(tensor.dtype) for tensor in (*spec.inputs, *spec.outputs)}
        for name, tensor in loaded.tensors.items():
            if tensor.dtype != expected.get(name):
                raise EngineError(
                    f"{plan}: has a tensor {name!r} of {tensor.dtype}, the bundle's {graph} has "
                    f"{expected.get(name, 'none of that name')}; run dit-build again"
                )
        return loaded

    def context_for(self, loaded: LoadedPlan, profile: int) -> Context:
        """The context of a profile for calls that are not captured. Raises EngineError where the library refuses."""
        with self._explaining():
            return loaded.context_for(profile, self.cuda, self.stream)

    def make_context(self, loaded: LoadedPlan, profile: int) -> Context:
        """A context that only one captured graph uses. Raises EngineError where the library refuses."""
        with self._explaining():
            return loaded.make_context(profile, self.cuda, self.stream)

    @contextlib.contextmanager
    def _explaining(self) -> Iterator[None]:
        """Add what the library's logger was told to an error of the library."""
        self._said.clear()
        try:
            yield
        except EngineError as error:
            raise EngineError(
                f"{self.name}: {error} ({self._describe_errors()}); run dit-verify on this engine"
            ) from error

    def count_loads(self, graph: str) -> int:
        """How often a graph has been loaded so far; 0 if the graph is not on the device now."""
        return self._loads[graph] if graph in self._loaded else 0

    def unload(self, graph: str) -> None:
        """Free a graph's weights, contexts and CUDA graphs. Loops keep their latents and their conditioning tables."""
        self.cuda.synchronize(self.stream)  # until the graph's last call is done
        self._drop(graph)
        if (loaded := self._loaded.pop(graph, None)) is not None:
            loaded.cache.keep()

    def check_memory(self, batch: int) -> None:
        """Check before the step is first loaded that the device has memory for a batch.

        Raises:
            EngineError: the memory does not suffice; the message has the need, the device's memory, and the batch that
                fits.
        """
        if not self._loads.get("step"):
            held = sum(self.stored.graphs[graph].weights_bytes for graph in self._loaded) + self.activations.size
            check_engine(self.manifest, self.stored, available_bytes_of(self.cuda.read_device()) + held, batch)

    def make_room(self, size: int) -> None:
        """Free memory until ``size`` bytes and ``SMALL_BYTES`` more are free.

        The weights of other graphs than ``running`` are freed first, the smallest first, then the memory of idle loops.
        Weights are loaded again when they are needed. That is slow where each batch needs the conditioner beside the
        step, but the result is right.

        Raises:
            EngineError: ``size`` bytes are not free, and nothing is left to free.
        """
        others = (graph for graph in self._loaded if graph != self.running)
        held = sorted(others, key=lambda graph: self.find_stored_graph(graph).weights_bytes)
        while (free := available_bytes_of(self.cuda.read_device())) < size + SMALL_BYTES:
            if held:
                self.unload(held.pop(0))
            elif self._free_idle():
                continue
            elif free >= size:
                return
            else:
                raise EngineError(
                    f"{self.name}: {describe_bytes(size)} of the GPU's memory are needed, {describe_bytes(free)} are "
                    "free; end other programs, or use a smaller batch"
                )

    def find_fit(self, graph: str, shapes: Mapping[str, Shape]) -> Fit:
        """Find the optimization profile that takes inputs of these shapes.

        Args:
            graph: name of the graph.
            shapes: by input.

        Raises:
            EngineError: no profile takes the shapes. The message has the shapes, the profiles, and how to build one.
        """
        profiles = self.profiles_of(graph)
        if (found := profiles.find_fit(shapes, self.find_stored_graph(graph).activation_bytes)) is not None:
            return found
        has = "; ".join(
            profiles.describe({name: (least, most) for name, (least, _, most) in each.items()})
            for each in profiles.shapes
        )
        raise EngineError(
            f"{self.name}: no optimization profile of the {graph} takes "
            f"{profiles.describe({name: (shape, shape) for name, shape in shapes.items()})}, only {has}; build an "
            "engine that does with dit-build (--batch, --branches, --rows, --decode-tile)"
        )

    def start(self, context: Context) -> None:
        """Queue the work of a context.

        Raises:
            EngineError: the library refuses. The message has the library's own errors.
        """
        with self._explaining():
            tensorrt_api.enqueue(context.raw, self.stream)

    def give_activations(self, context: Context, loaded: LoadedPlan, profile: int) -> None:
        """Give a context the shared memory block for activations, made as large as this context needs."""
        self.activations.reserve(max(loaded.activation_bytes_of(profile), 1))
        context.give_memory(self.activations.address, self.activations.size)

    def check_open(self) -> None:
        """Raises EngineError once the device is closed."""
        if not self.stream:
            raise EngineError(f"{self.name}: the engine is closed; open it again")

    def close(self) -> None:
        """Free the plans, the activations and the stream."""
        if not self.stream:
            return
        for graph in list(self._loaded):
            self.unload(graph)
        self.activations.free()
        self.cuda.destroy_stream(self.stream)
        self.stream = 0

    def _describe_errors(self) -> str:
        return "; ".join(" ".join(message.split()) for message in self._said) or "no reason given"

    def _note(self, severity: str, message: str) -> None:
        if severity == "error":
            self._said.append(message)
