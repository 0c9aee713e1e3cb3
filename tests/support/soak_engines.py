"""A backend with a fault that is chosen: ONNX Runtime, whose calls pass through the fault."""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from dit_runtime.backends.base import Array, Backend, EngineOptions
from dit_runtime.backends.conditioning import TableLimits
from dit_runtime.backends.host_loop import HostLoop
from dit_runtime.backends.onnxruntime.engine import OnnxRuntimeEngine
from dit_runtime.bundle.reader import Bundle

Inputs = Mapping[str, Array]
Run = Callable[[], list[Array]]
# (memory of the engine, graph, inputs, the sound call) → outputs
Fault = Callable[[dict[str, Any], str, Inputs, Run], list[Array]]


def sound(memory: dict[str, Any], graph: str, inputs: Inputs, run: Run) -> list[Array]:
    return run()


def wrong_at_batch_3(memory: dict[str, Any], graph: str, inputs: Inputs, run: Run) -> list[Array]:
    """The last image of three is a tenth too large."""
    found = run()
    if graph == "step" and len(inputs["state"]) == 3:
        found[0][2] *= 1.1
    return found


def stale_after_a_larger_batch(memory: dict[str, Any], graph: str, inputs: Inputs, run: Run) -> list[Array]:
    """A batch that comes after a larger one has something of that one."""
    found = run()
    if graph == "step":
        if memory.get("batch", 0) > len(inputs["state"]):
            found[0] += 0.1
        memory["batch"] = len(inputs["state"])
    return found


def keeps_memory(memory: dict[str, Any], graph: str, inputs: Inputs, run: Run) -> list[Array]:
    """Each step keeps half a mebibyte, in pages of its own, so that no memory that was freed before is taken."""
    if graph == "step":
        pages = mmap.mmap(-1, 1 << 19)
        pages.write(bytes(1 << 19))
        memory.setdefault("kept", []).append(pages)
    return run()


def one_thread_alone(memory: dict[str, Any], graph: str, inputs: Inputs, run: Run) -> list[Array]:
    """A call from another thread than the first is an error."""
    if memory.setdefault("thread", threading.get_ident()) != threading.get_ident():
        raise RuntimeError("called from another thread")
    return run()


def decoder_after_a_release(memory: dict[str, Any], graph: str, inputs: Inputs, run: Run) -> list[Array]:
    """A decoder that was loaded again makes negatives."""
    found = run()
    if graph == "decoder" and "decoder" in memory.get("released", ()):
        found[0] = 255 - found[0]
    return found


def step_after_a_release(memory: dict[str, Any], graph: str, inputs: Inputs, run: Run) -> list[Array]:
    """A step that was loaded again is off by less than any limit."""
    found = run()
    if graph == "step" and "step" in memory.get("released", ()):
        found[0] *= np.float32(1 + 1e-6)
    return found


def third_branch_ignored(memory: dict[str, Any], graph: str, inputs: Inputs, run: Run) -> list[Array]:
    if graph == "step" and len(inputs["rows"]) > 2:
        inputs["rows"][2] = inputs["rows"][1]
    return run()


class FaultySession:
    def __init__(self, engine: FaultyEngine, graph: str) -> None:
        self._engine, self._graph = engine, graph

    def run(self, inputs: Inputs, outputs: Sequence[str]) -> list[Array]:
        given = {name: np.array(value) for name, value in inputs.items()}
        session = self._engine.inner.session(self._graph)
        return self._engine.fault(
            self._engine.memory, self._graph, given, lambda: [np.array(one) for one in session.run(given, outputs)]
        )


class FaultyEngine:
    def __init__(self, bundle: Bundle, fault: Fault) -> None:
        self.inner, self.fault, self.memory = OnnxRuntimeEngine(bundle, threads=1), fault, dict[str, Any]()
        self.info, self._manifest = self.inner.info, bundle.manifest

    def session(self, graph: str) -> FaultySession:
        return FaultySession(self, graph)

    def release(self, graph: str) -> None:
        self.memory.setdefault("released", set()).add(graph)
        self.inner.release(graph)

    def open_loop(self, limits: TableLimits) -> HostLoop:
        return HostLoop(self, self._manifest, limits)

    def close(self) -> None:
        self.memory.clear()
        self.inner.close()


def backend_with(fault: Fault) -> Backend:
    def open_faulty(bundle: Bundle, name: str, options: EngineOptions) -> FaultyEngine:
        return FaultyEngine(bundle, fault)

    return Backend(open_faulty, lambda bundle, name: None, libraries=())
