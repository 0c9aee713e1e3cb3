"""Whether what a recipe makes will fit the device, asked before it is built and again with the builder's figures."""

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

# RTX 1.7's builder gives each graph of small models 8 MiB beyond the tensors that are alive at once.
BUILDER_BYTES = 8 << 20


def count_usual_rows(recipe: Recipe, batch: int) -> int:
    """Rows of the conditioning table of 50 steps, each image of another class; the null class's are shared."""
    return min(USUAL_STEPS * (batch + recipe.branches[-1] - 1), recipe.rows)


def estimate_graphs(bundle: Bundle, recipe: Recipe, graphs: tuple[str, ...]) -> dict[str, StoredGraph]:
    """Weights as the bundle holds them, and activations by what lives at once in the ONNX, at each profile's largest.

    An estimate: a builder fuses, so that it holds less, and gives its convolutions workspace, which comes on top.
    """
    found = {}
    for name in graphs:
        graph = bundle.manifest.graphs[name]
        profiles = profiles_of(graph, recipe, bundle.manifest)
        path = bundle.path / graph.file
        live = [
            work_of_graph(path, {tensor: points[2] for tensor, points in profile.items()}).live_bytes
            for profile in profiles
        ]
        weights = bundle.manifest.files[graph.weights].bytes
        sizes = tuple(size + BUILDER_BYTES for size in live)
        found[name] = StoredGraph(name, "", 0, "", tuple(profiles), weights, sizes)
    return found


def stored_graphs_from_built(graphs: tuple[BuiltGraph, ...]) -> dict[str, StoredGraph]:
    """The builder's own figures in the store's terms."""
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
    """What sampling needs with engines for no more than ``batch`` images.

    A smaller engine than the recipe's is taken to need activations in proportion.
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


def check_memory(bundle: Bundle, recipe: Recipe, place: BuildHost, graphs: tuple[str, ...]) -> Need | None:
    """The estimated need before a build; None where the device's memory is not known.

    Raises:
        EngineError: more than the device has, with the batch that would fit.
    """
    if place.memory_bytes is None:
        return None
    estimate = estimate_graphs(bundle, recipe, graphs)
    available = estimate_available_bytes(place.memory_bytes, place.shared_memory)
    return check_fits(lambda batch: need_at(bundle, recipe, estimate, batch, True), recipe.batch, available)
