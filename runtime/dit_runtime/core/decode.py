"""JSON files read strictly: the text within bounds, then frozen dataclasses with every value of its declared type.

A file may come from elsewhere or be damaged. ``read_json`` gives its values or one ``DecodeError``; ``decode`` makes a
dataclass of them, or says in one line where the first wrong value is, what it is and what was expected there:
``graphs.step.inputs[2].dtype: got 3, expected text``. Every field must be there that is not ``optional``,
and nothing else.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import re
import reprlib
import sys
import types
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np

from dit_runtime.core.reading import FileError, read_file

T = TypeVar("T")

OPTIONAL = "optional"  # in the metadata of a field

NoneType = type(None)
WORDS = {
    **{int: "a whole number", float: "a finite number", str: "text", bool: "true or false"},
    **{NoneType: "null", Any: "a value"},
}

MOST_DEPTH = 32  # of lists and objects inside each other; our own files have 8 at most
MOST_VALUES = 1_000_000  # our own largest file, a table of 10,000 steps, has a fifth of it

_LONGEST_WHOLE = 20  # characters of a whole number of 64 bits
_NO_MARKS = bytes(set(range(256)) - set(b'[]{},"'))
_STEPS = np.zeros(256, np.int8)
_STEPS[list(b"[{")], _STEPS[list(b"]}")] = 1, -1
_PIECE = 1 << 20  # bytes

# What moves a terminal's cursor, ends a line of a log, or turns the direction of writing.
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")

_short = reprlib.Repr()  # of a value in a message: one line of at most some hundred characters
_short.maxlevel, _short.maxlist, _short.maxdict = 1, 3, 3
_short.maxstring = _short.maxlong = _short.maxother = 60


class DecodeError(FileError):
    """A file or its JSON is not what was declared. The message is one line, without the file's name."""


@dataclasses.dataclass(frozen=True)
class Range:
    """The numbers that a field may hold, both ends included: ``Annotated[int, Range(1)]``."""

    least: float = -math.inf
    most: float = math.inf


Positive = Annotated[int, Range(1)]
Natural = Annotated[int, Range(0)]
Amount = Annotated[float, Range(0)]


def json_from_bytes(content: bytes, constants: bool = False) -> Any:
    """The values of a JSON text in UTF-8: numbers are finite and whole ones have at most 64 bits, text is Unicode.

    ``constants`` lets NaN and the infinities be, which Python writes: diffusers' files hold them.

    Raises:
        DecodeError: not JSON, another number or text in it, a key twice in one object, more than ``MOST_DEPTH`` levels
            or ``MOST_VALUES`` values.
    """
    _check_amount(content)
    try:
        raw = json.loads(
            content.decode(),
            parse_constant=float if constants else _refuse_constant,
            parse_float=_finite_from_text,
            parse_int=_whole_from_text,
            object_pairs_hook=_object_from_pairs,
        )
        if b"\\u" in content:
            json.dumps(raw, ensure_ascii=False).encode()  # half a surrogate pair has no code
    except DecodeError:
        raise
    except UnicodeEncodeError as error:
        raise DecodeError("not JSON: it holds half a surrogate pair, which is no character") from error
    except ValueError as error:
        raise DecodeError(f"not JSON: {error}") from error
    return raw


def _check_amount(content: bytes) -> None:
    """Check how deep and how much a JSON text is before it is parsed.

    A parser recurses, and two bytes can be an object of fifty.
    """
    if b"\\" in content:
        content = content.replace(b"\\\\", b"").replace(b'\\"', b"")
    marks = content.translate(None, _NO_MARKS).replace(b'""', b"")
    outside = b"".join(marks.split(b'"')[::2])
    depth = deepest = 0
    for start in range(0, len(outside), _PIECE):
        steps = _STEPS[np.frombuffer(outside[start : start + _PIECE], np.uint8)]
        depths = depth + steps.cumsum(dtype=np.int64)
        depth, deepest = int(depths[-1]), max(deepest, int(depths.max()))
    if deepest > MOST_DEPTH:
        raise DecodeError(f"not JSON: nested {deepest} levels deep, expected {MOST_DEPTH} at most")
    if len(outside) > MOST_VALUES:
        raise DecodeError(f"not JSON: about {len(outside)} values, expected {MOST_VALUES} at most")


def read_json(path: Path, limit_bytes: int, within: Path | None = None, constants: bool = False) -> Any:
    """The values of a JSON file, opened as ``open_file`` does; ``constants`` as in ``json_from_bytes``.

    Raises:
        DecodeError: the file cannot be read, or as ``json_from_bytes``.
    """
    try:
        content = read_file(path, limit_bytes, within)
    except FileError as error:
        raise DecodeError(str(error)) from error.__cause__
    return json_from_bytes(content, constants)


def schema_of(raw: object) -> int:
    """The number that says how to read the rest of a file. Raises DecodeError where there is none."""
    if type(raw) is not dict or "schema" not in raw:
        raise DecodeError(f"schema: missing, expected {_expected(int)}")
    return decode(int, raw["schema"], "schema")


def optional(default: Any) -> Any:
    """A field of a dataclass that JSON leaves out where it has this default: what files without it mean is known."""
    return dataclasses.field(default=default, metadata={OPTIONAL: True})


def without_defaults(value: Any) -> dict[str, Any]:
    """``dataclasses.asdict`` without the ``optional`` fields that have their defaults; not those inside containers."""
    plain = dataclasses.asdict(value)
    for field in dataclasses.fields(value):
        inside = getattr(value, field.name)
        if dataclasses.is_dataclass(inside) and not isinstance(inside, type):
            plain[field.name] = without_defaults(inside)
    kind: Any = type(value)
    for name, default in _optional_fields(kind).items():
        if getattr(value, name) == default:
            del plain[name]
    return plain


def decode(kind: type[T], raw: object, where: str = "") -> T:
    """A value of ``kind`` from the values that JSON has.

    Args:
        kind: a dataclass. Its fields are ``int``, ``float`` (a whole number becomes one), ``str`` (without control
            characters), ``bool``, ``None``,
            a ``Literal``, an enum by its values, ``tuple``, ``list``, ``dict`` with keys of text, another dataclass, a
            union of these, one of these ``Annotated`` with a ``Range``, or ``Any``. ``kind`` may be one of these too.
        raw: what ``read_json`` gave.
        where: the place of ``raw`` in its file, with which the message begins.

    Raises:
        DecodeError: a field is missing or unknown, a value has another type or is out of its range.
    """
    value: T = _value(kind, raw, where)
    return value


def _value(kind: Any, raw: Any, where: str) -> Any:
    origin, inner = get_origin(kind), get_args(kind)
    if kind is Any:
        return raw
    if origin in (Union, types.UnionType):
        return _value_of_union(kind, raw, where)
    if origin is Annotated:
        with contextlib.suppress(DecodeError):  # so that the message says the range too
            value = _value(inner[0], raw, where)
            if all(bound.least <= value <= bound.most for bound in kind.__metadata__):
                return value
    elif dataclasses.is_dataclass(kind) and type(raw) is dict:
        return _dataclass_from_object(kind, raw, where)
    elif origin is dict and type(raw) is dict:
        return {_value(str, key, where): _value(inner[1], item, _inside(where, key)) for key, item in raw.items()}
    elif origin in (tuple, list) and type(raw) is list:
        kinds = inner[:1] * len(raw) if _any_length(kind) else inner
        if len(kinds) == len(raw):
            return origin(_value(kinds[index], item, f"{where}[{index}]") for index, item in enumerate(raw))
    elif (choices := _choices(kind)) is not None:
        for plain, choice in choices:
            if type(raw) is type(plain) and raw == plain:
                return choice
    elif kind is float:
        if type(raw) in (int, float) and abs(raw) <= sys.float_info.max:
            return float(raw)
    elif type(raw) is kind:
        if kind is str and _CONTROLS.search(raw):
            raise DecodeError(f"{where}: got {show(raw)}, expected text without control characters".removeprefix(": "))
        return raw
    raise _wrong(kind, raw, where)


def _dataclass_from_object(kind: Any, raw: dict[str, Any], where: str) -> Any:
    hints = _fields(kind)
    if unknown := [name for name in raw if name not in hints]:
        raise DecodeError(f"{_inside(where, unknown[0])}: unknown, expected only {', '.join(hints)}")
    if missing := [name for name in hints if name not in raw and name not in _optional_fields(kind)]:
        raise DecodeError(f"{_inside(where, missing[0])}: missing, expected {_expected(hints[missing[0]])}")
    return kind(**{name: _value(hint, raw[name], _inside(where, name)) for name, hint in hints.items() if name in raw})


def _value_of_union(kind: Any, raw: Any, where: str) -> Any:
    kinds = [each for each in get_args(kind) if each is not NoneType or raw is None]
    for each in kinds:
        try:
            return _value(each, raw, where)
        except DecodeError:
            if len(kinds) == 1 and type(raw) in (dict, list):  # the place inside says more
                raise
    raise _wrong(kind, raw, where)


@functools.cache
def _fields(kind: Any) -> dict[str, Any]:
    hints = get_type_hints(kind, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


@functools.cache
def _optional_fields(kind: Any) -> dict[str, Any]:
    """The default of each field that may be left out."""
    return {field.name: field.default for field in dataclasses.fields(kind) if field.metadata.get(OPTIONAL)}


def _any_length(kind: Any) -> bool:
    return get_origin(kind) is list or get_args(kind)[-1] is Ellipsis


def _choices(kind: Any) -> list[tuple[Any, Any]] | None:
    """Of a literal or an enum: each value as JSON has it, and what it becomes."""
    if get_origin(kind) is Literal:
        return [(choice, choice) for choice in get_args(kind)]
    return [(choice.value, choice) for choice in kind] if isinstance(kind, type) and issubclass(kind, Enum) else None


def _wrong(kind: Any, raw: Any, where: str) -> DecodeError:
    return DecodeError(f"{where}: got {show(raw)}, expected {_expected(kind)}".removeprefix(": "))


def _expected(kind: Any) -> str:
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return " or ".join(_expected(each) for each in inner)
    if origin is Annotated:
        (bound,) = kind.__metadata__
        least = f" from {bound.least:g}" if math.isfinite(bound.least) else ""
        return _expected(inner[0]) + least + (f" to {bound.most:g}" if math.isfinite(bound.most) else "")
    if origin in (tuple, list):
        return "a list" if _any_length(kind) else f"a list of {len(inner)}"
    if (choices := _choices(kind)) is not None:
        return f"one of {', '.join(repr(plain) for plain, _ in choices)}"
    return "an object" if origin is dict or dataclasses.is_dataclass(kind) else WORDS[kind]


def show(value: object) -> str:
    """A value in a message: one line of at most some hundred characters."""
    return _short.repr(value)


def replace_controls(text: str) -> str:
    """The text with an underscore for each control character: what ``decode`` takes."""
    return _CONTROLS.sub("_", text)


def _inside(where: str, name: str) -> str:
    """The place of a field or key: ``model.depth``, ``files['a.onnx']``."""
    if not (name.isascii() and name.isidentifier() and len(name) < 60):
        return f"{where}[{show(name)}]"
    return f"{where}.{name}" if where else name


def _finite_from_text(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise DecodeError(f"not JSON: it holds {show(text)}, which is beyond every floating-point number")
    return number


def _whole_from_text(text: str) -> int:
    number = int(text) if len(text) <= _LONGEST_WHOLE else 2**64
    if not -(2**63) <= number < 2**64:
        raise DecodeError(f"not JSON: it holds {show(text)}, which is beyond 64 bits")
    return number


def _refuse_constant(name: str) -> NoReturn:
    raise DecodeError(f"not JSON: it holds {name}, which is not a finite number")


def _object_from_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise DecodeError(f"not JSON: key {show(key)} is there twice")
        found[key] = value
    return found
