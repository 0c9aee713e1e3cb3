"""What a file says of its own training: arguments by name, whatever their kind.

The weights' shapes tell most of a model; names and shapes tell neither a DiT from a SiT, nor a SiT's path and the
direction of its time, nor whether the label table has a row for the null class. The training arguments may.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from dit_runtime.core.errors import CheckpointError

MODEL_NAME = re.compile(r"(?<![a-z])(DiT|SiT)(?![a-z])(?:[-_](S|B|L|XL)[/_-](\d+))?", re.IGNORECASE)
ALONE = "store the weights alone (a state dict) to go by their shapes"


@dataclass(frozen=True)
class Statements:
    """The training arguments of a file.

    Attributes:
        source: the file's name, for errors.
        arguments: by name; those that mean nothing here are ignored.
    """

    source: str
    arguments: Mapping[str, Any]

    def number(self, *names: str) -> int | float | None:
        """The number that the first of these arguments says; None if none is there.

        Raises:
            CheckpointError: it is no number.
        """
        for name in names:
            value = self.arguments.get(name)
            if isinstance(value, str) and re.fullmatch(r"\d{1,9}", value):
                value = int(value)
            if value is None or isinstance(value, bool):
                continue
            if not isinstance(value, int | float) or not abs(value) < 1e12:
                raise CheckpointError(
                    f"{self.source}: its training arguments say {name} = {quote(value)}; expected a number; {ALONE}"
                )
            return value
        return None

    def sides(self, *names: str) -> tuple[float, float] | None:
        """Height and width: the first of these arguments, a number for both or a pair; None if none is there.

        Raises:
            CheckpointError: it is neither.
        """
        for name in names:
            value = self.arguments.get(name)
            if isinstance(value, list | tuple):
                pair = [replace(self, arguments={name: side}).number(name) for side in value]
                if len(pair) != 2 or None in pair:
                    raise CheckpointError(
                        f"{self.source}: its training arguments say {name} = {value!s:.60}; expected a number, or "
                        f"two; {ALONE}"
                    )
                return pair[0] or 0, pair[1] or 0
            if (side := replace(self, arguments={name: value}).number(name)) is not None:
                return side, side
        return None

    def flag(self, *names: str) -> bool | None:
        """Whether the first of these arguments is true; None if none is there."""
        for name in names:
            value = self.arguments.get(name)
            value = {"true": True, "false": False}.get(value.lower()) if isinstance(value, str) else value
            if isinstance(value, bool):
                return value
        return None

    def text(self, *names: str) -> str | None:
        """The text of the first of these arguments; None if none is there."""
        found = (self.arguments.get(name) for name in names)
        return next((value for value in found if isinstance(value, str) and value), None)

    @property
    def model(self) -> re.Match[str] | None:
        """The family and, if it says so, the size and patch of the model's name."""
        name = self.text("model", "model_name", "arch", "model_type")
        return None if name is None else MODEL_NAME.search(name)

    def sign_of(self, names: tuple[str, ...]) -> str | None:
        """The first of these arguments that is there."""
        return next((name for name in names if name in self.arguments), None)


def quote(value: Any) -> str:
    """A value of an argument, for an error."""
    return repr(value)[:60] if isinstance(value, str | int | float | bool | None) else f"a {type(value).__name__}"
