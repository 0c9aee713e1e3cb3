"""The engine that runs TensorRT's plans on a GPU: sessions for single calls, and a loop that stays on the device."""

from __future__ import annotations

import sys
from types import TracebackType

from dit_runtime.backends.base import EngineInfo
from dit_runtime.backends.conditioning import TableLimits
from dit_runtime.backends.tensorrt.api import TensorRT
from dit_runtime.backends.tensorrt.cuda import Cuda
from dit_runtime.backends.tensorrt.device import Device
from dit_runtime.backends.tensorrt.loop import DeviceLoop
from dit_runtime.backends.tensorrt.session import TensorRtSession
from dit_runtime.backends.tensorrt.store import StoredEngine
from dit_runtime.bundle.reader import Bundle
from dit_runtime.core.errors import EngineError

# Graphs whose calls are captured as CUDA graphs too: they run in the same shape again and again, and have hundreds of
# kernels. The step has a loop of its own.
CAPTURED = ("decoder",)


class TensorRtEngine:
    """An engine on plans that ``dit-build`` made, on the GPU of this machine. Close it to free the device's memory.

    Args:
        bundle: at the size in use.
        stored: plans of that bundle.
        library: TensorRT or TensorRT-RTX, imported.
        cuda: the GPU.
        threads: for the record only; the CPU computes nothing.
        captured: whether the loop's steps and the decoder are captured as CUDA graphs; False queues each kernel in
            every call.

    Raises:
        EngineError: the plans are of another bundle, image size, library, version or GPU.
    """

    _opened = False

    def __init__(
        self,
        bundle: Bundle,
        stored: StoredEngine,
        library: TensorRT,
        cuda: Cuda,
        threads: int = 0,
        captured: bool = True,
    ) -> None:
        facts = cuda.read_device()
        if (stored.bundle, stored.image_size) != (bundle.digest, bundle.manifest.image_size):
            built_for, here = (_size_in_words(size) for size in (stored.image_size, bundle.manifest.image_size))
            raise EngineError(
                f"{stored.folder}: built from bundle {stored.bundle[:12]} for {built_for} images, this is "
                f"{bundle.digest[:12]} for {here}; run dit-build on this bundle"
            )
        stored.check_device(library.name, library.version, facts.compute_capability, facts.name)
        self.bundle, self.stored, self._captured = bundle, stored, captured
        self._sessions: dict[str, TensorRtSession] = {}
        self._loops: list[DeviceLoop] = []
        self._idle: list[DeviceLoop] = []
        name = f"{library.name} {library.version} {facts.name}, plans {stored.folder.name}"
        plans = sorted(graph.plan_sha256 for graph in stored.graphs.values())
        profiles = stored.profiles(bundle.manifest)
        self.info = EngineInfo(
            name=name,
            identity=f"{name}, {' '.join(plans)}, driver {facts.driver}",
            library=library.name,
            version=library.version,
            device=facts.name,
            precision=bundle.manifest.precision.name,
            graphs=tuple(stored.graphs),
            threads=threads,
            max_batch=profiles["step"].largest_batch if "step" in profiles else None,
            profiles=profiles,
            tile=stored.tile_for(bundle.manifest.model.latent_size),
            loop_on_device=True,
            prepares_shapes=True,
        )
        self.device = Device(bundle.manifest, stored, library, cuda, name, self._drop, self._free_idle)
        self._opened = True

    def session(self, graph: str) -> TensorRtSession:
        """The session of a graph. The graph's plan is loaded when the session runs.

        Raises:
            EngineError: the engine has no plan of the graph.
        """
        with self.device.lock:
            if graph not in self._sessions:
                self.device.find_stored_graph(graph)
                captured = self._captured and graph in CAPTURED
                self._sessions[graph] = TensorRtSession(self.device, graph, captured)
            return self._sessions[graph]

    def open_loop(self, limits: TableLimits) -> DeviceLoop:
        """Open a loop that stays on the device, for one batch: an idle loop with its CUDA graphs, or a further one."""
        with self.device.lock:
            self.device.check_open()
            self.device.running = None
            for loop in self._idle:
                if loop.limits == limits:
                    self._idle.remove(loop)
                    return loop
            loop = DeviceLoop(self.device, limits, self._give_back, self._captured)
            self._loops.append(loop)
            return loop

    def release(self, graph: str) -> None:
        """As ``Engine.release``. The weights are loaded again when a session or a loop needs them."""
        with self.device.lock:
            if graph == "step":
                self._free_idle()
            self.device.unload(graph)

    def close(self) -> None:
        """As ``Engine.close``."""
        with self.device.lock:
            for loop in self._loops:
                loop.free()
            self._loops, self._idle = [], []
            self.device.close()

    def __enter__(self) -> TensorRtEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        # At the interpreter's end CUDA may be unloaded already; the driver then frees the process's memory.
        if self._opened and not sys.is_finalizing():
            self.close()

    def _give_back(self, loop: DeviceLoop) -> None:
        """Take a loop back whose batch is over: it is idle."""
        with self.device.lock:
            if loop in self._loops and loop not in self._idle:
                self._idle.append(loop)

    def _free_idle(self) -> bool:
        """Free the idle loops. Returns False where no loop is idle."""
        for loop in self._idle:
            loop.free()
            self._loops.remove(loop)
        freed, self._idle = bool(self._idle), []
        return freed

    def _drop(self, graph: str) -> None:
        """Free all that refers to a graph's weights."""
        if graph in self._sessions:
            self._sessions[graph].free()
        if graph == "step":
            for loop in self._loops:
                loop.drop_graphs()


def _size_in_words(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
