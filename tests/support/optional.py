"""Libraries that not every Python has: a test that asks one for anything is skipped where it is not installed."""

from __future__ import annotations

from typing import Any

import pytest


class Library:
    """A library by its name, imported when it is first used."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith("_"):  # pytest looks into what a test module imports, before any test runs
            raise AttributeError(attribute)
        return getattr(pytest.importorskip(self._name), attribute)


torch = Library("torch")
diffusers = Library("diffusers")
onnx = Library("onnx")
openvino = Library("openvino")
