"""The contract of a backend: what it says of itself, how its graphs are run, and how its loop advances a batch.

A backend loads and runs graphs. Its folder has a module ``open`` with a ``Backend``, which opens an ``Engine`` for one
bundle at one size. Nothing asks an engine for anything that is not declared here.
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
from dit_runtime.samplers.noise import Float32

Array = NDArray[Any]
Int32 = NDArray[np.int32]


@dataclass(frozen=True)
class EngineInfo:
    """What an engine says of itself.

    Attributes:
        name: library, version, device and precision, for people and for the record.
        identity: the name, and what else decides its numbers: the very plans, the driver, how a graph was rearranged.
        library, version: of what runs the graphs.
        device: such as ``CPU`` or the GPU's name.
        precision: that it multiplies in where the bundle allows it.
        graphs: that it can run, by their names in the manifest.
        threads: of the CPU, 0 where the engine chooses.
        max_batch: most images in one call, None for no limit of its own.
        profiles: by graph, the shapes that it was built for; a graph that is not there takes any shape.
        tile: height and width of the latents that its decoder takes, None where it decodes whole images.
        loop_on_device: whether latents stay on its device for the whole loop, so that a step is more than a session's
            call.
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

    def has_branches(self, count: int) -> bool:
        """Whether the step runs with so many guidance branches."""
        return "step" not in self.profiles or self.profiles["step"].has_branches(count)

    def batch_of(self, count: int) -> int:
        """How many of ``count`` images go into one call."""
        return min(count, self.max_batch or count)

    def shapes(self, graph: str) -> list[BatchShape]:
        """Least, usual, interior and largest (batch, branches) of each profile; empty where any shape is taken."""
        found: list[BatchShape] = []
        for least, usual, largest in self.profiles[graph].ranges() if graph in self.profiles else ():
            interior = ((least[0] + largest[0]) // 2, (least[1] + largest[1]) // 2)
            found += [least, usual, interior, largest]
        return list(dict.fromkeys(found))


class Session(Protocol):
    """A loaded graph."""

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> list[Array]:
        """The named outputs. Inputs have the dtypes and shapes of the bundle's manifest.

        Raises:
            EngineError: the engine cannot run the graph at these shapes.
        """
        ...


class RunInputs(NamedTuple):
    """What the step graph reads of images side by side in one schedule, for all its rows.

    Made once, so that hardly any work is left between the engine's calls, where the caches are cold.

    Attributes:
        coefficients: ``[T, B, 17]``.
        guidance: ``[T, G, B, C]``, the weight of each branch.
        rows: ``[T, G, B]``, of the conditioning table.
        needed: how many branches each row of the schedule needs.
        draws: whether each row of the schedule draws noise.
    """

    coefficients: Float32
    guidance: Float32
    rows: Int32
    needed: list[int]
    draws: list[bool]


class StepResult(Protocol):
    """What a call of the step gave: ``state [B, 3, C, H, W]``, ``denoised [B, C, H, W]``, valid until the next call.

    ``at_hand`` is False where reading them waits for a device.
    """

    @property
    def at_hand(self) -> bool: ...
    @property
    def state(self) -> Float32: ...
    @property
    def denoised(self) -> Float32: ...


class Loop(Protocol):
    """A batch's latents, noise and conditioning table, and what advances them, one step a call.

    ``looks_ahead``: whether the conditioning table is to have the rows of a whole run before the run begins.
    """

    table: ConditioningTable
    looks_ahead: bool

    def add(self, latents: Float32) -> None:
        """Latents of further images ``[N, C, H, W]`` take the next positions; their memory and all noise are zero."""
        ...

    def keep(self, positions: Sequence[int]) -> None:
        """The images at these rising positions remain and close up; the others leave."""
        ...

    def run_row(self, inputs: RunInputs, row: int, noise: Float32 | None) -> StepResult:
        """One row of a run that was planned. ``noise [B, C, H, W]``; None leaves the noise as it was."""
        ...

    def run_step(
        self, coefficients: Float32, guidance: Float32, rows: Int32, noise: Float32 | None, drawing: Sequence[int]
    ) -> StepResult:
        """One call with inputs of its own.

        Args:
            coefficients: ``[B, 17]``.
            guidance: ``[G, B, C]``.
            rows: ``[G, B]``.
            noise: ``[N, C, H, W]`` of the positions in ``drawing``, None where nothing draws.
            drawing: positions whose row draws noise.
        """
        ...

    def close(self) -> None:
        """The batch is over."""
        ...


class Engine(Protocol):
    """A backend opened for one bundle at one size."""

    @property
    def info(self) -> EngineInfo:
        """What the engine says of itself."""
        ...

    def session(self, graph: str) -> Session:
        """The session of a graph of ``info.graphs``, loaded on first use.

        Raises:
            EngineError: the engine does not have the graph or cannot load it.
        """
        ...

    def release(self, graph: str) -> None:
        """Give back what a graph holds. Its session loads it again when it is run again."""
        ...

    def open_loop(self, limits: TableLimits) -> Loop:
        """A loop for one batch. An engine that has only sessions gives ``host_loop.HostLoop``."""
        ...

    def close(self) -> None:
        """Give back all that is held. The engine cannot be used afterwards."""
        ...


@dataclass(frozen=True)
class EngineOptions:
    """How an engine is opened.

    Attributes:
        threads: of the CPU; 0 lets the engine choose.
        precision: of an engine that has a choice; None is the bundle's own, or the nearest.
        store: where built engines are, None for the bundle's own folder, and where graphs may be kept in the engine's
            own form, None for nowhere.
        whole: only an engine that guides and decodes whole images.
    """

    threads: int = 0
    precision: Precision | None = None
    store: Path | None = None
    whole: bool = False


@dataclass(frozen=True)
class Candidate:
    """An engine that ``auto`` may choose: a name of ``open.BACKENDS`` and a precision.

    ``built``: ``dit-build`` made it for the device here, so that it comes before the others without being timed.
    """

    name: str
    precision: Precision | None = None
    built: bool = False


@dataclass(frozen=True)
class Backend:
    """What a backend's folder offers under each of its names.

    Attributes:
        open: opens an engine by a name, for a bundle at its size in use. Raises EngineError where the engine is not
            installed or cannot run here, with what to do.
        candidate: what ``auto`` may try under a name without being asked; None where that is nothing.
        libraries: distributions whose versions decide how fast its engines are.
        keeps_graphs: whether commands let it keep graphs in its own form in the bundle's store.
    """

    open: Callable[[Bundle, str, EngineOptions], Engine]
    candidate: Callable[[Bundle, str], Candidate | None]
    libraries: tuple[str, ...]
    keeps_graphs: bool = False
