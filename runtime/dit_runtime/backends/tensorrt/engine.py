"""TensorRT's plans on a GPU, as an engine: what its sessions and its sampling loop share.

All work of an engine is queued on one stream, so one block of memory serves the activations of all its graphs, which
never run together. A lock makes each call whole: threads may share an engine, and take turns. Engines share nothing.

``session.py`` is for single calls, ``loop.py`` the loop that stays on the device.
"""

from __future__ import annotations

import hashlib
import mmap
import sys
import threading
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import numpy as np

from dit_runtime.backends.tensorrt import api as tensorrt_api
from dit_runtime.backends.tensorrt.api import TensorRT
from dit_runtime.backends.tensorrt.buffers import DeviceBuffer
from dit_runtime.backends.tensorrt.cuda import Cuda
from dit_runtime.backends.tensorrt.loop import DeviceLoop
from dit_runtime.backends.tensorrt.memory import check_engine, device_bytes, in_words
from dit_runtime.backends.tensorrt.session import (
    Fit,
    Loaded,
    TensorRtSession,
    find_fit,
)
from dit_runtime.backends.tensorrt.store import Shape, StoredEngine, StoredGraph
from dit_runtime.bundle.manifest import GraphSpec
from dit_runtime.bundle.reader import Bundle
from dit_runtime.core.errors import EngineError

Shape2 = tuple[int, int]  # (batch, branches)

# What contexts, CUDA graphs and the library's kernels may take besides. Assumed, not measured.
SMALL_BYTES = 32 << 20


class TensorRtEngine:
    """Plans of ``dit-build`` on the GPU present. Close it to give the device's memory back.

    Args:
        bundle: at the size in use.
        stored: of that bundle.
        library: TensorRT or TensorRT-RTX, imported.
        cuda: the GPU.
        threads: for the record; the CPU computes nothing here.
        captured: whether the loop's steps are CUDA graphs; False queues each kernel every time.

    Attributes:
        graphs: those that there are plans of; never the probe.
        stream: on which all work is queued.
        activations: the block that all contexts share.
        running: the graph whose work is being made ready or queued, and whose weights make room for nothing.

    Raises:
        EngineError: plans of another bundle, size, library, version or GPU, or a plan that is not what was built.
    """

    def __init__(
        self,
        bundle: Bundle,
        stored: StoredEngine,
        library: TensorRT,
        cuda: Cuda,
        threads: int = 0,
        captured: bool = True,
    ) -> None:
        facts = cuda.device()
        if (stored.bundle, stored.image_size) != (bundle.digest, bundle.manifest.image_size):
            raise EngineError(
                f"{stored.folder}: built from bundle {stored.bundle[:12]} for {_by(stored.image_size)} images, this "
                f"is {bundle.digest[:12]} for {_by(bundle.manifest.image_size)}; run dit-build on this bundle"
            )
        stored.check_device(library.name, library.version, facts.compute_capability, facts.name)
        self.bundle, self.stored, self.threads, self.captured = bundle, stored, threads, captured
        self.graphs = tuple(stored.graphs)
        self.name = f"{library.name} {library.version} {facts.name}, plans {stored.folder.name}"
        plans = sorted(graph.plan_sha256 for graph in stored.graphs.values())
        self.identity = f"{self.name}, {' '.join(plans)}, driver {facts.driver}"
        self.library, self.cuda, self.lock = library, cuda, threading.RLock()
        self.max_batch: int | None = max(largest[0] for _, _, largest in self.profiles("step"))
        self._said: list[str] = []
        self._logger = tensorrt_api.logger(library, self._noted)  # must outlive the runtime, and that its engines
        self._runtime = tensorrt_api.runtime_of(library, self._logger)
        self.stream = cuda.stream()
        self.activations = DeviceBuffer(cuda, self.stream, self.room)
        self.running: str | None = None
        self._loaded: dict[str, Loaded] = {}
        self._loads: dict[str, int] = {}
        self._sessions: dict[str, TensorRtSession] = {}
        self._loops: list[DeviceLoop] = []
        self._idle: list[DeviceLoop] = []

    def profiles(self, graph: str) -> list[tuple[Shape2, Shape2, Shape2]]:
        """Least, usual and largest (batch, branches) of each profile; rows in place of a batch for the conditioner."""
        spec, stored = self.bundle.manifest.graphs[graph], self._stored(graph)

        def size(shapes: Mapping[str, tuple[Shape, Shape, Shape]], axis: str, point: int) -> int | None:
            found = [
                shapes[tensor.name][point][tensor.shape.index(axis)] for tensor in spec.inputs if axis in tensor.shape
            ]
            return found[0] if found else None

        def pair(shapes: Mapping[str, tuple[Shape, Shape, Shape]], point: int) -> Shape2:
            batch = size(shapes, "batch", point) or size(shapes, "rows", point)
            return batch or 1, size(shapes, "branches", point) or 1

        return [(pair(shapes, 0), pair(shapes, 1), pair(shapes, 2)) for shapes in stored.profiles]

    def session(self, graph: str) -> TensorRtSession:
        """The session of a graph. Its plan is loaded when it runs."""
        with self.lock:
            if graph not in self._sessions:
                self._stored(graph)
                self._sessions[graph] = TensorRtSession(self, graph)
            return self._sessions[graph]

    def steps(self, table_bytes: int, conditioner_bytes: int) -> DeviceLoop:
        """A loop that stays on the device, for one batch at a time: one that is idle, with its graphs, or another."""
        with self.lock:
            self._check_open()
            self.running = None
            for steps in self._idle:
                if steps.bounds == (table_bytes, conditioner_bytes):
                    self._idle.remove(steps)
                    return steps
            steps = DeviceLoop(self, table_bytes, conditioner_bytes)
            self._loops.append(steps)
            return steps

    def give_back(self, steps: DeviceLoop) -> None:
        """A batch is over and its loop idle."""
        with self.lock:
            if steps in self._loops and steps not in self._idle:
                self._idle.append(steps)

    def load(self, graph: str) -> Loaded:
        """A graph's plan on the device, to be run next; checked and deserialized where it is not there.

        Raises:
            EngineError: the plan is not what was built, or the library refuses it; or too little memory for it.
        """
        self.running = graph
        if graph not in self._loaded:
            self._check_open()
            self.room(self._stored(graph).weights_bytes)
            plan = self.stored.plan_file(graph)
            self._said.clear()
            try:
                # Mapped: on a Jetson a copy would take of the memory that the weights are about to need.
                with (
                    plan.open("rb") as file,
                    mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
                    memoryview(mapped) as content,
                ):
                    self.stored.check_plan(graph, hashlib.sha256(content).hexdigest())  # of what is deserialized
                    try:
                        loaded = Loaded(self.library, self._runtime, content)
                    except EngineError as error:
                        advice = "run dit-build again, or free memory"
                        raise EngineError(f"{plan}: {error} ({self._why()}); {advice}") from error
            except (OSError, ValueError) as error:
                raise EngineError(f"{plan}: cannot be read ({error}); run dit-build again") from error
            spec = self.bundle.manifest.graphs[graph]
            expected = {tensor.name: np.dtype(tensor.dtype) for tensor in (*spec.inputs, *spec.outputs)}
            for name, tensor in loaded.tensors.items():
                if tensor.dtype != expected.get(name):
                    raise EngineError(
                        f"{plan}: has a tensor {name!r} of {tensor.dtype}, the bundle's {graph} has "
                        f"{expected.get(name, 'none')}; run dit-build again"
                    )
            self._loaded[graph] = loaded
            self._loads[graph] = self._loads.get(graph, 0) + 1
        return self._loaded[graph]

    def loads(self, graph: str) -> int:
        """How often a graph that is on the device has been loaded; 0 where it is not there."""
        return self._loads[graph] if graph in self._loaded else 0

    def release(self, graph: str) -> None:
        """Free a graph's weights. It is loaded again when it is needed.

        A loop that is under way has the step loaded again.
        """
        with self.lock:
            if graph == "step":
                self._free_idle()
            self._unload(graph)

    def check_memory(self, batch: int) -> None:
        """Say before the step is first loaded that a batch does not fit.

        Raises:
            EngineError: what it needs, what the device has, and the batch that would fit.
        """
        if not self._loads.get("step"):
            held = sum(self.stored.graphs[graph].weights_bytes for graph in self._loaded) + self.activations.size
            check_engine(self.bundle.manifest, self.stored, device_bytes(self.cuda.device()) + held, batch)

    def room(self, size: int) -> None:
        """Free other weights, the smallest first, then loops that are idle, while ``size`` bytes and a little more do
        not fit.

        Weights are loaded again when they are needed: slow, where another batch's labels bring the conditioner back
        beside the step, but right. Those of ``running`` stay.

        Raises:
            EngineError: nothing is left to be freed.
        """
        others = (graph for graph in self._loaded if graph != self.running)
        held = sorted(others, key=lambda graph: self._stored(graph).weights_bytes)
        while (free := device_bytes(self.cuda.device())) < size + SMALL_BYTES:
            if held:
                self._unload(held.pop(0))
            elif self._idle:
                self._free_idle()
            elif free >= size:
                return
            else:
                raise EngineError(
                    f"{self.name}: {in_words(size)} of the GPU's memory are needed, {in_words(free)} are free; end "
                    "other programs, or use a smaller batch"
                )

    def _free_idle(self) -> None:
        for steps in self._idle:
            steps.free()
            self._loops.remove(steps)
        self._idle = []

    def _unload(self, graph: str) -> None:
        """Free a graph's weights and what is made from them; a loop that is under way keeps its latents and table."""
        self.cuda.synchronize(self.stream)  # its last call
        if graph in self._sessions:
            self._sessions[graph].free()
        if graph == "step":
            for steps in self._loops:
                steps.drop_graphs()
        self._loaded.pop(graph, None)

    def fit(self, graph: str, shapes: Mapping[str, Shape]) -> Fit:
        """The profile that takes inputs of these shapes.

        Raises:
            EngineError: there is none: the shapes, what there is, and how to have it built.
        """
        spec, stored = self.bundle.manifest.graphs[graph], self._stored(graph)
        if (found := find_fit(spec, stored, shapes)) is not None:
            return found
        profiles = [{name: (least, most) for name, (least, _, most) in each.items()} for each in stored.profiles]
        has = "; ".join(_axes(spec, profile) for profile in profiles)
        raise EngineError(
            f"{self.name}: no optimization profile of the {graph} takes "
            f"{_axes(spec, {name: (shape, shape) for name, shape in shapes.items()})}, only {has}; build for it with "
            "dit-build (--batch, --branches, --rows, --decode-tile)"
        )

    def start(self, context: Any) -> None:
        """Queue a context's work.

        Raises:
            EngineError: the library refuses, with what it said.
        """
        self._said.clear()
        try:
            tensorrt_api.enqueue(context, self.stream)
        except EngineError as error:
            raise EngineError(f"{self.name}: {error} ({self._why()}); run dit-verify on this engine") from error

    def give_activations(self, context: Any, loaded: Loaded, profile: int) -> None:
        """The block that all contexts share, as large as this one needs."""
        self.activations.reserve(max(loaded.activation_bytes(profile), 1))
        tensorrt_api.give_memory(context, self.activations.address, self.activations.size)

    def close(self) -> None:
        """Give back all that is held on the device. The engine cannot be used afterwards."""
        with self.lock:
            for steps in self._loops:
                steps.free()
            self._loops, self._idle = [], []
            for graph in list(self._loaded):
                self.release(graph)
            self.activations.free()
            if self.stream:
                self.cuda.destroy_stream(self.stream)
                self.stream = 0

    def __enter__(self) -> TensorRtEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        # At the interpreter's end CUDA may be gone, and the driver frees what a process had.
        if getattr(self, "stream", 0) and not sys.is_finalizing():
            self.close()

    def _stored(self, graph: str) -> StoredGraph:
        if graph not in self.stored.graphs:
            known = ", ".join(self.stored.graphs)
            raise EngineError(f"{self.name}: has no plan of the {graph}, only of {known}; choose another engine for it")
        return self.stored.graphs[graph]

    def _check_open(self) -> None:
        if not self.stream:
            raise EngineError(f"{self.name}: is closed; open it again")

    def _why(self) -> str:
        return "; ".join(" ".join(message.split()) for message in self._said) or "no reason given"

    def _noted(self, severity: str, message: str) -> None:
        if severity == "error":
            self._said.append(message)


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def _axes(spec: GraphSpec, shapes: Mapping[str, tuple[Shape, Shape]]) -> str:
    """The dynamic axes of inputs between a least and a largest shape: ``batch 2 to 4, branches 2``."""
    sizes: dict[str, str] = {}
    for tensor in spec.inputs:
        for axis, low, high in zip(tensor.shape, *shapes[tensor.name], strict=True):
            if isinstance(axis, str):
                sizes[axis] = str(low) if low == high else f"{low} to {high}"
    return ", ".join(f"{axis} {size}" for axis, size in sizes.items())
