"""Read what ``dit-verify --json`` printed, here or on another machine; a damaged or foreign file is one clear line."""

from __future__ import annotations

import base64
import binascii
import io
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dit_runtime.core.errors import ResultsError
from dit_runtime.verify.results import Images, Results, Size
from dit_runtime.verify.rung import Rung, Verification

NOT_FINITE = ("inf", "-inf", "nan")  # JSON has no such numbers: the results hold them as words
ADVICE = "print the results again with dit-verify BUNDLE --json > FILE"

T = TypeVar("T")


def read_results(path: Path) -> Results:
    """Read a file that ``dit-verify --json`` printed.

    Raises:
        ResultsError: the file cannot be read, is damaged, or holds something else.
    """
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise ResultsError(f"{path}: cannot be read ({error.strerror}); {ADVICE}") from error
    except (ValueError, RecursionError) as error:
        raise ResultsError(f"{path}: got a file that is not JSON, expected verification results; {ADVICE}") from error
    try:
        return results_from_json(value)
    except ResultsError as error:
        raise ResultsError(f"{path}: {error}; {ADVICE}") from error


def results_from_json(value: object) -> Results:
    """The results that ``Results.as_json`` wrote; keys that this version does not know are left out.

    Raises:
        ResultsError: a key is missing, or its value is of another type or does not fit the others.
    """
    raw = _checked(value, dict, "the document")
    rungs = tuple(_rung(rung, f"rungs[{index}]") for index, rung in enumerate(_field(raw, "rungs", list)))
    if not rungs:
        raise ResultsError("got an empty list for rungs, expected a rung at least")
    verification = Verification(
        **{name: _field(raw, name, str) for name in ("bundle", "model", "precision", "reference", "engine")},
        image_size=_size(_field(raw, "image_size", list)),
        quick=_field(raw, "quick", bool),
        rungs=rungs,
        images=_images_from_json(_field(raw, "images", list)),
        magnitudes=_numbers_by_name(_field(raw, "magnitudes", dict), "magnitudes"),
    )
    if verification.passed is not _field(raw, "passed", bool):
        raise ResultsError(f"got passed = {raw['passed']}, expected {verification.passed}, which the rungs come to")
    return Results(
        verification=verification,
        image_sizes=tuple(_size(each) for each in _field(raw, "image_sizes", list)),
        machine=_field(raw, "machine", dict),
        environment=_field(raw, "environment", dict),
        files={name: _checked(each, str, f"files[{name!r}]") for name, each in _field(raw, "files", dict).items()},
    )


def _pixels_from_png(text: str, where: str) -> NDArray[np.uint8]:
    """The pixels ``[H, W, 3]`` of a PNG file in base64."""
    try:
        with Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=("PNG",)) as image:
            return np.asarray(image.convert("RGB"), np.uint8)
    # Pillow raises SyntaxError for a damaged chunk of a PNG file.
    except (OSError, ValueError, SyntaxError, binascii.Error, Image.DecompressionBombError) as error:
        raise ResultsError(f"got a damaged image at {where}, expected a PNG file in base64") from error


def _images_from_json(values: list[Any]) -> Images | None:
    pairs = []
    for index, value in enumerate(values):
        where = f"images[{index}]"
        raw = _checked(value, dict, where)
        pairs.append([_pixels_from_png(_field(raw, key, str, where), where) for key in ("engine", "reference")])
    if shapes := {pixels.shape for pair in pairs for pixels in pair}:
        if len(shapes) > 1:
            raise ResultsError(f"got images of {len(shapes)} sizes, expected one size")
        found, expected = (np.stack(side) for side in zip(*pairs, strict=True))
        return found, expected
    return None


def _rung(value: object, where: str) -> Rung:
    raw = _checked(value, dict, where)
    series = _field(raw, "series", dict, where)
    rung = Rung(
        name=_field(raw, "name", str, where),
        value=_number(_field(raw, "value", object, where), f"{where}.value"),
        limit=_number(_field(raw, "limit", object, where), f"{where}.limit"),
        unit=_field(raw, "unit", str, where),
        detail=_field(raw, "detail", str, where),
        ratio=_optional_number(raw, "ratio", where),
        threshold=_optional_number(raw, "threshold", where),
        first_over=None if _field(raw, "first_over", object, where) is None else _field(raw, "first_over", str, where),
        metrics=_numbers_by_name(_field(raw, "metrics", dict, where), f"{where}.metrics"),
        axis=_field(raw, "axis", str, where),
        series={
            name: [_number(each, f"{where}.series[{name!r}]") for each in _checked(values, list, f"{where}.series")]
            for name, values in series.items()
        },
    )
    # The page must not say "pass" where the machine that verified said "FAIL".
    if rung.passed is not _field(raw, "passed", bool, where):
        raise ResultsError(f"got {where}.passed = {raw['passed']}, expected {rung.passed}, which its numbers come to")
    return rung


def _size(value: object) -> Size:
    height, width = sides if len(sides := _checked(value, list, "image_size")) == 2 else (None, None)
    return _checked(height, int, "an image's height"), _checked(width, int, "an image's width")


def _numbers_by_name(raw: Mapping[str, Any], where: str) -> dict[str, float]:
    return {name: _number(value, f"{where}[{name!r}]") for name, value in raw.items()}


def _optional_number(raw: Mapping[str, Any], key: str, where: str) -> float | None:
    value = _field(raw, key, object, where)
    return None if value is None else _number(value, f"{where}.{key}")


def _number(value: object, where: str) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max:
        return float(value)
    if isinstance(value, str) and value in NOT_FINITE:
        return float(value)
    raise ResultsError(f"got {_short(value)} for {where}, expected a number")


def _field(raw: Mapping[str, Any], key: str, kind: type[T], where: str = "") -> T:
    path = f"{where}.{key}" if where else key
    if key not in raw:
        raise ResultsError(f"got no {path}, expected all keys that dit-verify --json prints")
    return _checked(raw[key], kind, path)


def _checked(value: object, kind: type[T], where: str) -> T:
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", int: "a whole number"}
        raise ResultsError(f"got {_short(value)} for {where}, expected {names[kind]}")
    return value


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
