"""What engines of tests say of themselves."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from dit_runtime.backends.base import EngineInfo
from dit_runtime.bundle.manifest import GRAPHS
from dit_runtime.bundle.precision import Precision
from dit_runtime.bundle.reader import Bundle

if TYPE_CHECKING:
    from dit_engines.audit import ProfileAudit


def info_of(name: str, **facts: Any) -> EngineInfo:
    """An engine's facts: of one that takes any shape, unless said otherwise."""
    defaults: dict[str, Any] = {
        "identity": name,
        "library": name,
        "version": "0",
        "device": "CPU",
        "precision": Precision.FP32,
        "graphs": GRAPHS,
    }
    return EngineInfo(name=name, **{**defaults, **facts})


def step_on_rtx(bundle: Bundle, store: Path) -> list[ProfileAudit]:
    """What the audit finds of each profile of the step, which TensorRT-RTX builds for batches of one and two."""
    from dit_engines.build import engine_from_bundle
    from dit_engines.recipe import recipe_for

    built = engine_from_bundle(bundle, recipe_for("rtx", "8.9", 2, (1, 2), 64), store)
    (step,) = (graph for graph in built.graphs if graph.graph == "step")
    return list(step.audit.profiles)
