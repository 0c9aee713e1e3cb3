"""Check that the device has memory for a recipe's engine: before the build, and again with the builder's figures."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from dit_engines.build_host import BuildHost
from dit_engines.engine_store import BuiltGraph
from dit_engines.graph_work import work_of_graph
from dit_engines.recipe import USUAL_STEPS, Recipe, profiles_of
from dit_runtime.backends.tensorrt.memory import (
    Need,
    check_fits,
    estimate_available_bytes,
    need_of,
)
from dit_runtime.backends.tensorrt.store import StoredGraph
from dit_runtime.bundle.reader import Bundle

# The builder of RTX 1.7 gives each graph of a small model 8 MiB more than its live tensors need.
BUILDER_BYTES = 8 << 20


def count_usual_rows(recipe: Recipe, batch: int) -> int:
    """Count the rows of the conditioning table for 50 steps, with another class for each image and one null class."""
    return min(USUAL_STEPS * (batch + recipe.branches[-1] - 1), recipe.rows)


def estimate_graphs(bundle: Bundle, recipe: Recipe, graphs: tuple[str, ...]) -> dict[str, StoredGraph]:
    """Estimate each graph's memory before the build.

    The weights are the bundle's. The activations are the tensors that are alive at the same time in the ONNX, at each
    profile's largest shapes. A builder's figures differ: it needs less where it fuses operations, and more for the
    workspace of convolutions.

    Args:
        bundle: at the size in use.
        recipe: what to build.
        graphs: names of the graphs.

    Raises:
        BundleError: a graph's file is missing, altered or damaged.
    """
    found = {}
    for name in graphs:
        graph = bundle.manifest.graphs[name]
        profiles = profiles_of(graph, recipe, bundle.manifest)
        path = bundle.structure(name)
        live = [
            work_of_graph(path, {tensor: points[2] for tensor, points in profile.items()}).live_bytes
            for profile in profiles
        ]
        weights = bundle.manifest.files[graph.weights].bytes
        sizes = tuple(size + BUILDER_BYTES for size in live)
        found[name] = StoredGraph(name, "", 0, "", tuple(profiles), weights, sizes)
    return found


def stored_graphs_from_built(graphs: tuple[BuiltGraph, ...]) -> dict[str, StoredGraph]:
    """Built graphs, with the builder's figures, as the runtime's ``StoredGraph``."""
    return {
        built.graph: StoredGraph(
            graph=built.graph,
            plan=built.plan,
            plan_bytes=built.plan_bytes,
            plan_sha256=built.plan_sha256,
            profiles=built.profiles,
            weights_bytes=built.audit.weights_bytes,
            activation_bytes=tuple(profile.activation_bytes for profile in built.audit.profiles),
        )
        for built in graphs
    }


def need_at(bundle: Bundle, recipe: Recipe, graphs: Mapping[str, StoredGraph], batch: int, estimated: bool) -> Need:
    """The memory that sampling needs with an engine for at most ``batch`` images.

    The activations and tensors of an engine for a smaller batch than the recipe's are assumed to be in proportion.

    Args:
        bundle: at the size in use.
        recipe: of the engine.
        graphs: the memory of each graph.
        batch: images in one call.
        estimated: whether ``graphs`` are estimates.
    """
    scaled = {
        name: replace(
            graph, activation_bytes=tuple(math.ceil(size * batch / recipe.batch) for size in graph.activation_bytes)
        )
        if name != "conditioner"
        else graph
        for name, graph in graphs.items()
    }
    need = need_of(
        bundle.manifest, scaled, recipe.batch, recipe.branches[-1], count_usual_rows(recipe, batch), estimated=estimated
    )
    return replace(need, buffers=math.ceil(need.buffers * batch / recipe.batch))


def check_memory(bundle: Bundle, recipe: Recipe, host: BuildHost, graphs: tuple[str, ...]) -> Need | None:
    """Check before a build that the device has memory for the engine, and return the estimated need.

    Args:
        bundle: at the size in use.
        recipe: what to build.
        host: the build host, with its device's memory.
        graphs: names of the graphs to build.

    Returns:
        None where the device's memory is unknown.

    Raises:
        EngineError: the device has too little memory. The message has the largest batch that fits.
    """
    if host.memory_bytes is None:
        return None
    estimate = estimate_graphs(bundle, recipe, graphs)
    available = estimate_available_bytes(host.memory_bytes, host.shared_memory)
    return check_fits(lambda batch: need_at(bundle, recipe, estimate, batch, True), recipe.batch, available)
