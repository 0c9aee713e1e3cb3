"""How training arguments and names tell in words that a model is no diffusion model that predicts ε."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

# Kin whose weights may have a DiT's names: their conventions are their own.
KIN_NAME = re.compile(r"repa(?![a-z])|lightning[_-]?dit|mask[_-]?dit|flow(?![a-z])", re.IGNORECASE)
_VELOCITY = frozenset(
    ("flow", "flowmatching", "fm", "rectified", "rf", "velocity", "v", "vpred", "interpolant", "interpolants", "edm")
)
# Words in the names of arguments that say what is predicted.
_TOPICS = frozenset(
    (
        *("objective", "loss", "pred", "predict", "predicts", "prediction", "target", "parameterization"),
        *("parametrization", "process", "type", "method", "framework"),
    )
)


def argument_of_velocity(arguments: Mapping[str, Any]) -> str | None:
    """The name of the first argument that says in words that the model does not predict ε; None if none does."""
    for name, value in arguments.items():
        is_on = value is True or (isinstance(value, str) and value.lower() == "true")
        says = isinstance(value, str) and _words(name) & _TOPICS and _words(value) & _VELOCITY
        if says or (is_on and _words(name) & _VELOCITY):
            return name
    return None


def _words(text: str) -> set[str]:
    return set(re.split(r"[^a-z0-9]+", text.lower()))
