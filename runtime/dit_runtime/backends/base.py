"""The contract of a backend: the facts of its engine, how the engine runs graphs, and how a loop advances a batch.

A backend loads and runs graphs. Its folder has a module ``open`` with a ``Backend``. The ``Backend`` opens an
``Engine`` for one bundle at one size. Callers use only what is declared here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from dit_runtime.backends.conditioning import ConditioningTable, TableLimits
from dit_runtime.backends.profiles import BatchShape, Profiles
from dit_runtime.bundle.precision import Precision
from dit_runtime.bundle.reader import Bundle
from dit_runtime.core.errors import EngineError
from dit_runtime.core.machine import count_cpus
from dit_runtime.samplers.noise import Float32

Array = NDArray[Any]
Int32 = NDArray[np.int32]

THREADS_ANYWHERE = 64  # so many are taken on any machine, so that an image made on a larger one can be made again
THREADS_A_CPU = 4


def most_threads() -> int:
    """Most threads of the CPU that an engine takes here.

    Threads wait for each other in a loop: far more threads than CPUs take minutes for a step, and then gigabytes.
    """
    return max(THREADS_ANYWHERE, THREADS_A_CPU * count_cpus())


def check_threads(threads: int) -> None:
    """Raises EngineError for threads of the CPU outside 0 to ``most_threads()``; 0 is the engine's choice."""
    if type(threads) is not int or not 0 <= threads <= most_threads():
        raise EngineError(
            f"{threads!r:.80} threads: expected 0, for the engine's choice, to {most_threads()} on this machine"
        )


@dataclass(frozen=True)
class EngineInfo:
    """The facts of an engine.

    Attributes:
        name: library, version, device and precision, for messages and records.
        identity: the name, and all else that decides the engine's numbers: the plans' hashes, the driver's version,
            the arrangement of a graph. Verdicts are stored by it.
        library: name of the library that runs the graphs.
        version: the library's version.
        device: ``CPU``, or the GPU's name.
        precision: the precision of the engine's products, outside the units that the bundle keeps in FP32.
        graphs: the graphs that the engine can run, by their names in the manifest.
        threads: threads of the CPU; 0 where the engine chooses.
        max_batch: most images in one call; None for no limit.
        profiles: by graph, the shapes that the graph was built for; a graph without an entry takes any shape.
        tile: height and width in latent pixels of the tiles that the decoder takes; None for whole images.
        loop_on_device: whether latents stay on the device for the whole loop. A call of a session then does less work
            than a step of the loop.
        prepares_shapes: whether the first call at a batch and branches takes longer, because a graph is captured or
            compiled for them.
        weakly_typed: whether the library chooses the precision of each operation itself, whatever the graph says. Such
            an engine is used only with a passing verdict, even where it is named.

    Raises:
        EngineError: too many threads.
    """

    name: str
    identity: str
    library: str
    version: str
    device: str
    precision: Precision
    graphs: tuple[str, ...]
    threads: int = 0
    max_batch: int | None = None
    profiles: Mapping[str, Profiles] = field(default_factory=dict)
    tile: tuple[int, int] | None = None
    loop_on_device: bool = False
    prepares_shapes: bool = False
    weakly_typed: bool = False

    def __post_init__(self) -> None:
        check_threads(self.threads)

    def has_branches(self, count: int) -> bool:
        """Whether the step can run with ``count`` guidance branches."""
        return "step" not in self.profiles or self.profiles["step"].has_branches(count)

    def batch_of(self, count: int) -> int:
        """The number of images in one call, when ``count`` images are to be run."""
        return min(count, self.max_batch or count)

    def shapes_of(self, graph: str) -> list[BatchShape]:
        """Least, usual, largest and an interior (batch, branches) of each profile of a graph, each once.

        Empty for a graph that takes any shape.
        """
        found: list[BatchShape] = []
        for least, usual, largest in self.profiles[graph].ranges() if graph in self.profiles else ():
            interior = ((least[0] + largest[0]) // 2, (least[1] + largest[1]) // 2)
            found += [least, usual, interior, largest]
        return list(dict.fromkeys(found))


class Session(Protocol):
    """A loaded graph."""

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> list[Array]:
        """Run the graph and return the named outputs.

        Args:
            inputs: every input of the graph by name, with the dtypes and shapes of the bundle's manifest.
            outputs: names of the outputs to return, in this order.

        Raises:
            EngineError: the engine cannot run the graph at these shapes.
        """
        ...


class RunInputs(NamedTuple):
    """The step's small inputs for a whole run: all rows of one schedule that the images of a batch share.

    They are made once before the run, because work between two calls of the engine runs with cold caches.

    Attributes:
        coefficients: ``[T, B, 17]`` float32, the sampler's numbers; ``[T, B, 19]`` with a clip.
        guidance: ``[T, G, B, C]`` float32, the weight of each branch.
        rows: ``[T, G, B]`` int32, rows of the conditioning table.
        needed: for each row of the schedule, the number of branches.
        draws: for each row of the schedule, whether it draws noise.
    """

    coefficients: Float32
    guidance: Float32
    rows: Int32
    needed: list[int]
    draws: list[bool]


class StepResult(Protocol):
    """The result of one step: ``state [B, 3, C, H, W]`` and ``denoised [B, C, H, W]``, valid until the next step.

    ``at_hand`` is False where the arrays are on a device: reading them waits for the device.
    """

    @property
    def at_hand(self) -> bool: ...
    @property
    def state(self) -> Float32: ...
    @property
    def denoised(self) -> Float32: ...


class Loop(Protocol):
    """The latents, noise and conditioning table of a batch. Each call of ``run_row`` or ``run_step`` does one step.

    Attributes:
        table: which rows of the conditioning table are computed.
        looks_ahead: whether all rows of the conditioning table that a run needs are computed before the run.
    """

    table: ConditioningTable
    looks_ahead: bool

    def add(self, latents: Float32) -> None:
        """Add images at the next positions of the batch.

        Their sampler memory is zero. The noise of every image in the batch is set to zero.

        Args:
            latents: ``[N, C, H, W]``.
        """
        ...

    def keep(self, positions: Sequence[int]) -> None:
        """Keep the images at these rising positions, in this order, and remove the others."""
        ...

    def run_row(self, inputs: RunInputs, row: int, noise: Float32 | None) -> StepResult:
        """Do one step with the inputs of one row of a run.

        Args:
            inputs: of the whole run.
            row: index of the schedule's row.
            noise: ``[B, C, H, W]``; None leaves the noise as it was.
        """
        ...

    def run_step(
        self, coefficients: Float32, guidance: Float32, rows: Int32, noise: Float32 | None, drawing: Sequence[int]
    ) -> StepResult:
        """Do one step of images that are at different rows or in different schedules.

        Args:
            coefficients: ``[B, 17]``, the sampler's numbers; ``[B, 19]`` with a clip.
            guidance: ``[G, B, C]``, the weight of each branch.
            rows: ``[G, B]``, rows of the conditioning table.
            noise: ``[N, C, H, W]`` for the positions in ``drawing``; None where no image draws noise.
            drawing: positions of the images that draw noise in this step.
        """
        ...

    def close(self) -> None:
        """End the batch."""
        ...


class Engine(Protocol):
    """A backend opened for one bundle at one size."""

    @property
    def info(self) -> EngineInfo:
        """The facts of the engine."""
        ...

    def session(self, graph: str) -> Session:
        """The session of a graph, one of ``info.graphs``. The graph is loaded on first use.

        Raises:
            EngineError: the engine does not have the graph or cannot load it.
        """
        ...

    def release(self, graph: str) -> None:
        """Free the memory of a graph. Its session loads the graph again when it runs again."""
        ...

    def open_loop(self, limits: TableLimits) -> Loop:
        """Open a loop for one batch. An engine that has only sessions returns a ``host_loop.HostLoop``."""
        ...

    def close(self) -> None:
        """Free all memory. The engine cannot be used afterwards."""
        ...


@dataclass(frozen=True)
class EngineOptions:
    """How to open an engine.

    Attributes:
        threads: threads of the CPU; 0 lets the engine choose.
        precision: the precision of the products, for an engine that has a choice; None is the bundle's own precision,
            or the nearest that the engine has.
        store: the engine store. TensorRT reads its plans there; None is the bundle's own ``engines`` folder. Other
            backends keep prepared graphs there; None keeps none.
        whole: whether to skip built engines that cannot guide or cannot decode whole images.
    """

    threads: int = 0
    precision: Precision | None = None
    store: Path | None = None
    whole: bool = False


@dataclass(frozen=True)
class Candidate:
    """An engine that ``auto`` may choose.

    Attributes:
        name: a key of ``open.BACKENDS``.
        precision: the precision to open it with; None is the engine's default.
        built: whether ``dit-build`` made it. ``auto`` tries built engines before all others, and does not time them.
    """

    name: str
    precision: Precision | None = None
    built: bool = False


@dataclass(frozen=True)
class Backend:
    """What a backend's folder offers, for each engine name that the table ``open.BACKENDS`` gives it.

    Attributes:
        open: opens the engine of a name for a bundle at its size in use. Raises EngineError, with what to do, where
            the library is not installed or cannot run here.
        candidate: gives the engine that ``auto`` may try under a name; None where ``auto`` must not try that name.
        libraries: distributions whose versions decide the engines' speed.
        keeps_graphs: whether commands let the backend keep prepared graphs in the engine store.
    """

    open: Callable[[Bundle, str, EngineOptions], Engine]
    candidate: Callable[[Bundle, str], Candidate | None]
    libraries: tuple[str, ...]
    keeps_graphs: bool = False
