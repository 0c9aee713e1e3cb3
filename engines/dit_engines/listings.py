"""An engine as text for a terminal."""

from __future__ import annotations

from dit_engines.audit import find_unknowns
from dit_engines.engine_store import BuiltEngine, BuiltGraph
from dit_engines.recipe import Recipe
from dit_runtime.backends.tensorrt.memory import Need
from dit_runtime.backends.tensorrt.store import describe_platform
from dit_runtime.bundle.precision import Precision
from dit_runtime.bundle.reader import Bundle
from dit_runtime.core.text import join_lines


def format_engine(engine: BuiltEngine, bundle: Bundle, need: Need, explain: bool) -> str:
    """A line for each optimization profile, the largest kernels of the step, and the memory that sampling needs."""
    recipe = engine.recipe
    library, _, version = engine.builder.partition(" ")
    state = "already built" if engine.reused else "built"
    name = bundle.manifest.precision.name
    shown = (Precision.FP16, *(() if name in (Precision.FP32, Precision.FP16) else (name,)))
    lines = []
    if explain:
        why = engine.explanation or ("nothing differs",)
        lines += ["why: " + "; ".join(why)]
    lines += [
        f"{engine.folder}: {state} for {describe_platform(library, version, recipe.compute_capability, None)}, batch ≤ "
        f"{recipe.batch} (the builder's own figures)",
        f"{'graph':<20} {'weights':>10} {'activations':>12} {'kernels':>8} {'reformats':>10} {'waits':>6} "
        f"{'fused attention':>16}" + "".join(f" {f'in {each.upper()}':>8}" for each in shown),
    ]
    model = bundle.manifest.model
    for built in engine.graphs:
        for index, profile in enumerate(built.audit.profiles):
            fused = f"{profile.fused_attention} of {model.attentions}" if built.graph == "step" else "-"
            lines.append(
                f"{profile_name(built, index, recipe):<20} {built.audit.weights_bytes / 1e6:>7.1f} MB "
                f"{profile.activation_bytes / 1e6:>9.1f} MB {profile.kernels:>8} {profile.reformats:>10} "
                f"{profile.synchronizations:>6} {fused:>16}"
                + "".join(f" {profile.share_of_all(each):>8.1%}" for each in shown)
            )
    for built in engine.graphs:
        if built.graph == "step" and (largest := built.audit.profiles[-1].largest):
            names = ", ".join(f"{item.name.split(' ')[0]} {item.share:.1%}" for item in largest[:3])
            lines.append(f"largest kernels of the step by multiply-adds: {names}")
        lines += find_unknowns(built.audit, built.graph)
    if doubts := [doubt for built in engine.graphs for doubt in built.doubts]:
        lines += [f"doubt: {doubt}" for doubt in doubts]
        lines.append(f"the audit doubts this engine; dit-verify decides: dit-verify {bundle.path} --engine tensorrt")
    lines.append(f"sampling {recipe.batch} with {recipe.branches[-1]} branches needs {need.describe()}")
    return join_lines(lines)


def profile_name(built: BuiltGraph, index: int, recipe: Recipe) -> str:
    """``step B=5-8 G=2``: a graph, and the batch and branches of its profile when the graph has several."""
    profile = built.profiles[index]
    words = [built.graph]
    (first, *_) = profile
    if built.graph == "step":
        branches, batch = (sorted({points[axis] for points in profile["rows"]}) for axis in (0, 1))
        if len(recipe.batches) > 1 or recipe.static:
            words.append(f"B={_range_text(batch)}")
        words.append(f"G={_range_text(branches)}")
    elif len(built.profiles) > 1:
        words.append(f"B={_range_text(sorted({points[0] for points in profile[first]}))}")
    return " ".join(words)


def _range_text(sizes: list[int]) -> str:
    return str(sizes[0]) if sizes[0] == sizes[-1] else f"{sizes[0]}-{sizes[-1]}"
