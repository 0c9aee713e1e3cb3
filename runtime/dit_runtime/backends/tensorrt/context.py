"""An execution context that remembers what it was given, so that a call tells the library only what has changed."""

from __future__ import annotations

from typing import Any

from dit_runtime.backends.profiles import Shape
from dit_runtime.backends.tensorrt import api as tensorrt_api


class Context:
    """An execution context of the library's.

    Args:
        raw: the library's object, without memory.
    """

    def __init__(self, raw: Any) -> None:
        self.raw = raw
        self._memory: tuple[int, int] | None = None
        self._bound: dict[str, tuple[int, Shape | None]] = {}

    def give_memory(self, address: int, size: int) -> None:
        """As ``tensorrt_api.give_memory``."""
        if self._memory != (address, size):
            tensorrt_api.give_memory(self.raw, address, size)
            self._memory = (address, size)

    def bind(self, name: str, address: int, shape: Shape | None = None) -> None:
        """As ``tensorrt_api.bind``."""
        if self._bound.get(name) != (address, shape):
            self._bound.pop(name, None)  # the library may refuse, and then has half of it
            tensorrt_api.bind(self.raw, name, address, shape)
            self._bound[name] = (address, shape)

    def output_shape_of(self, name: str) -> Shape:
        """As ``tensorrt_api.output_shape_of``."""
        return tensorrt_api.output_shape_of(self.raw, name)
