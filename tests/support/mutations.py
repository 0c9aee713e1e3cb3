"""Hostile changes of a JSON document, one at a time and all of them: the same for every kind of file that is read."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

Place = tuple[str | int, ...]

LONG_LIST = 6  # of a longer list of plain values only the first, second and last one are changed


class Raw(str):
    """A value as it is written in the file, for what ``json.dumps`` does not write."""


# What replaces each value: each kind of JSON, borders of numbers, names that lead elsewhere, and text for terminals.
HOSTILE: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 7, 2**31, 2**63, 2**64 - 1, 4 * 10**12, 10**400, Raw("9" * 5000)),
    *(0.5, -0.0, 1e308, -1e308, 5e-324, Raw("NaN"), Raw("-Infinity"), Raw("1e999"), Raw("1" + "0" * 400 + ".5")),
    *("", "a" * 100_000, "\x1b[31mred\n\r\u2028", "\ud800", "a\0b", "../../etc/passwd", "/dev/zero", "1*2*height", "٣"),
    *([], {}, [None], [[]], {"": None}, [0] * 3, [1] * 50_000, Raw("[" * 400 + "]" * 400), Raw("{" * 99_999)),
)


@dataclass(frozen=True)
class Mutation:
    """A changed document: what was changed in it, and its text, which is made when it is asked for."""

    name: str
    make: Callable[[], str]

    @property
    def text(self) -> str:
        return self.make()


def places(raw: Any, here: Place = ()) -> Iterator[Place]:
    """Every value of a JSON document by the keys and indices that lead to it; of a long list of numbers a few."""
    if isinstance(raw, dict):
        items = list(raw.items())
    elif isinstance(raw, list):
        items = list(enumerate(raw))
        if len(items) > LONG_LIST and not any(isinstance(item, dict | list) for item in raw):
            items = [*items[:2], items[-1]]
    else:
        items = []
    for key, value in items:
        yield (*here, key)
        yield from places(value, (*here, key))


def mutate(raw: Any) -> Iterator[Mutation]:
    """Each value replaced by each of ``HOSTILE`` and by its neighbours, removed, doubled, or with another beside it."""
    hostile = [(value, describe_value(value)) for value in HOSTILE]
    for place in ((), *places(raw)):
        here = value_at(raw, place)
        for value, name in (*hostile, *((value, describe_value(value)) for value in _nearby(here))):
            yield Mutation(f"{describe(place)} = {name}", partial(replaced, raw, place, value))
        if place:
            yield Mutation(f"{describe(place)} removed", partial(removed, raw, place))
        if isinstance(here, dict):
            yield Mutation(f"{describe(place)} with one more", partial(replaced, raw, (*place, "more"), 1))
            inside = json.dumps(here)[1:-1]
            yield Mutation(f"{describe(place)} twice", partial(replaced, raw, place, Raw(f"{{{inside}, {inside}}}")))
        if isinstance(here, list):
            yield Mutation(f"{describe(place)} doubled", partial(replaced, raw, place, here * 2))


def _nearby(value: Any) -> tuple[Any, ...]:
    if isinstance(value, bool) or value is None:
        return ()
    if isinstance(value, int):
        return value + 1, value - 1, value * 2, -value, float(value), str(value)
    if isinstance(value, float):
        return -value, value * 1e6, str(value)
    if isinstance(value, str):
        return f"{value}x", value[:-1], value.upper(), f"./{value}", f"{value}\0"
    return ()


def value_at(raw: Any, place: Place) -> Any:
    for key in place:
        raw = raw[key]
    return raw


def changed(raw: Any, place: Place, change: Callable[[Any, Any], object]) -> str:
    """The text of a copy in which ``change(inner, key)`` changed what ``place`` leads to."""
    if not place:
        return json.dumps(raw)
    found = copy.deepcopy(raw)
    change(value_at(found, place[:-1]), place[-1])
    return json.dumps(found)


def replaced(raw: Any, place: Place, value: Any) -> str:
    """The text of a copy with another value at ``place``."""
    mark = "\ue000"  # no document has it
    plain = mark if isinstance(value, Raw) else value
    text = changed(raw, place, lambda inner, key: inner.__setitem__(key, plain)) if place else json.dumps(plain)
    return text.replace(json.dumps(mark), value) if isinstance(value, Raw) else text


def removed(raw: Any, place: Place) -> str:
    """The text of a copy without the value at ``place``."""
    return changed(raw, place, lambda inner, key: inner.pop(key))


def describe(place: Place) -> str:
    return ".".join(map(str, place)) or "all"


def describe_value(value: Any) -> str:
    if isinstance(value, int) and abs(value) > 10**30:
        return "an enormous whole number"
    return repr(value)[:40]
