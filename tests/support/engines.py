"""What engines of tests say of themselves."""

from __future__ import annotations

from typing import Any

from dit_runtime.backends.base import EngineInfo
from dit_runtime.bundle.manifest import GRAPHS
from dit_runtime.bundle.precision import Precision


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
