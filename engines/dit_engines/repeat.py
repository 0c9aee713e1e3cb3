"""The same build several times: how much the plans differ when nothing else does."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dit_engines.build import graphs_of
from dit_engines.build_host import BuildHost
from dit_engines.compile import compile_graphs
from dit_engines.engine_store import (
    TIMING_CACHE,
    BuiltGraph,
    digest_of_written,
    identity_of,
    sidecar_of,
    write_sidecar,
)
from dit_engines.recipe import Recipe
from dit_runtime.backends.tensorrt.api import import_library
from dit_runtime.backends.tensorrt.cuda import CudaRuntime
from dit_runtime.backends.tensorrt.engine import TensorRtEngine
from dit_runtime.backends.tensorrt.store import read_engine
from dit_runtime.bench.parts import (
    DECODER,
    GUIDED,
    PLAIN,
    time_parts,
)
from dit_runtime.bundle.reader import Bundle
from dit_runtime.core.errors import OutputError
from dit_runtime.core.replace import scratch_folder
from dit_runtime.core.text import join_lines
from dit_runtime.verify.verification import verification_of

STEPS, CALLS = 20, 20  # of a timed loop, and of each part


@dataclass(frozen=True)
class OnDevice:
    """What a build does on its GPU: the largest parity error of its forwards, and median milliseconds for one image of
    a step (with guidance when the engine has it) and of the decoder.
    """

    error: float
    step_ms: float
    decoder_ms: float


Measure = Callable[[Path, Sequence[BuiltGraph]], OnDevice]  # runs the plans in a folder


@dataclass(frozen=True)
class GraphSpread:
    """One graph in all builds: the figures of each build, in their order.

    ``kernels``, ``fused_attention`` and ``activation_bytes`` have a row for each build and a number for each profile;
    ``distinct_plans`` counts the plans' different SHA-256.
    """

    graph: str
    seconds: tuple[float, ...]
    plan_bytes: tuple[int, ...]
    distinct_plans: int
    kernels: tuple[tuple[int, ...], ...]
    fused_attention: tuple[tuple[int, ...], ...]
    activation_bytes: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Spread:
    """All graphs in all builds, and what each build does on the GPU when there is one."""

    builds: int
    builder: str
    graphs: tuple[GraphSpread, ...]
    on_device: tuple[OnDevice, ...] | None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def repeat_builds(
    bundle: Bundle,
    recipe: Recipe,
    host: BuildHost,
    builds: int,
    timing_cache: Path | None = None,
    measure: Measure | None = None,
) -> Spread:
    """Build ``builds`` times in temporary folders: nothing is kept.

    Args:
        bundle: at the size in use.
        recipe: shapes and limits.
        host: library and GPU.
        builds: how many.
        timing_cache: that each build begins with; None begins with nothing, which shows the most spread.
        measure: runs a build's plans; None when no GPU here can.

    Raises:
        BuildError: a build fails, or does not pass its audit.
        OutputError: no room for the plans.
    """
    runs: list[tuple[BuiltGraph, ...]] = []
    on_device: list[OnDevice] = []
    try:
        for _ in range(builds):
            with scratch_folder(Path(tempfile.gettempdir()), "dit-build") as folder:
                run = compile_graphs(bundle, recipe, host, graphs_of(bundle), folder, timing_cache)
                if measure is not None:
                    on_device.append(measure(folder, run))
                runs.append(run)
    except OSError as error:
        raise OutputError(f"no room for plans ({error}); set TMPDIR to a folder on another disk") from error
    graphs = tuple(_spread_of(graphs) for graphs in zip(*runs, strict=True))
    return Spread(builds, f"{host.library} {host.version}", graphs, tuple(on_device) if measure else None)


def measure_on_gpu(bundle: Bundle, recipe: Recipe, host: BuildHost) -> Measure | None:
    """A function that verifies and times plans that the GPU here built; None when engines are built ahead of time."""
    if host.gpu is None:
        return None
    identity = identity_of(bundle, recipe, host, graphs_of(bundle), None)

    def measure(folder: Path, graphs: Sequence[BuiltGraph]) -> OnDevice:
        digest = digest_of_written(folder / TIMING_CACHE) if host.times_kernels else None
        write_sidecar(folder, sidecar_of(bundle, recipe, host, identity, graphs, digest))
        engine = TensorRtEngine(bundle, read_engine(folder), import_library(host.library), CudaRuntime())
        try:
            rungs = verification_of(bundle, engine, quick=True).rungs
            parts = time_parts(bundle, engine, 1, STEPS, CALLS)
        finally:
            engine.close()
        error = max(rung.value for rung in rungs if rung.name.startswith("forward"))
        step = parts[GUIDED if GUIDED in parts else PLAIN]
        return OnDevice(error, step.p50_ms, parts[DECODER].p50_ms)

    return measure


def _spread_of(graphs: Sequence[BuiltGraph]) -> GraphSpread:
    profiles = [built.audit.profiles for built in graphs]
    return GraphSpread(
        graph=graphs[0].graph,
        seconds=tuple(built.seconds for built in graphs),
        plan_bytes=tuple(built.plan_bytes for built in graphs),
        distinct_plans=len({built.plan_sha256 for built in graphs}),
        kernels=tuple(tuple(profile.kernels for profile in own) for own in profiles),
        fused_attention=tuple(tuple(profile.fused_attention for profile in own) for own in profiles),
        activation_bytes=tuple(tuple(profile.activation_bytes for profile in own) for own in profiles),
    )


def format_spread(spread: Spread) -> str:
    """The spread as text for a terminal: one figure when all builds agree, else the least and the most."""
    lines = [
        f"{spread.builds} builds with {spread.builder}",
        f"{'graph':<14} {'seconds':>13} {'plan MB':>13} {'plans':>12} {'kernels':>15}",
    ]
    for graph in spread.graphs:
        kernels = " ".join(_range_text(column, "d") for column in zip(*graph.kernels, strict=True))
        plans = "identical" if graph.distinct_plans == 1 else f"{graph.distinct_plans} differ"
        sizes = _range_text([size / 1e6 for size in graph.plan_bytes], ".2f")
        lines.append(f"{graph.graph:<14} {_range_text(graph.seconds, '.1f'):>13} {sizes:>13} {plans:>12} {kernels:>15}")
    if spread.on_device is None:
        return join_lines([*lines, "parity error and time: not measured, since the plans are for another machine"])
    columns = {
        "parity error": _range_text([each.error for each in spread.on_device], ".2e"),
        "step ms": _range_text([each.step_ms for each in spread.on_device], ".3f"),
        "decoder ms": _range_text([each.decoder_ms for each in spread.on_device], ".3f"),
    }
    return join_lines([*lines, *(f"{name}: {values}" for name, values in columns.items())])


def _range_text(values: Sequence[float], form: str) -> str:
    least, most = format(min(values), form), format(max(values), form)
    return least if least == most else f"{least} to {most}"
