"""Read labels as users write them: class numbers, class names and mixtures of classes."""

from __future__ import annotations

import difflib
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from dit_runtime.bundle.manifest import Manifest
from dit_runtime.core.errors import SamplingError

Label = int | str | Mapping[int | str, float]


def list_labels(labels: Sequence[Label] | Label) -> list[Label]:
    """The labels of several images. One label alone, whose characters or classes are no labels, is a list of one.

    What is no label at all is in the list too: ``weights_from_label`` refuses it.
    """
    given: Any = labels.tolist() if isinstance(labels, np.ndarray) else labels
    alone = isinstance(given, str | bytes | Mapping) or not isinstance(given, Iterable)
    found: list[Label] = [given] if alone else list(given)
    return found


def weights_from_label(label: Label, manifest: Manifest) -> dict[int, float]:
    """The weight of each class number in a label.

    Args:
        label: a class number, a class name, text of several classes (``3:0.7+5:0.3`` or ``Bag+Coat``), or weights by
            class number or name.
        manifest: of the bundle; it has the classes and their names.

    Raises:
        SamplingError: a class is unknown or named twice, or a weight is not a finite number.
    """
    if isinstance(label, str) and "+" in label and not _classes_named(label, manifest):
        parts = [part.strip() for part in label.split("+")]
        split = [part.rsplit(":", 1) for part in parts]
        if all(":" not in part for part in parts):
            split = [[part, str(1 / len(parts))] for part in parts]
        try:
            label = {name: float(weight) for name, weight in split}
        except ValueError as error:
            raise SamplingError(f"label {label!r}: expected LABEL:WEIGHT+LABEL:WEIGHT, such as 3:0.7+5:0.3") from error
        if len(label) != len(parts):
            raise SamplingError(f"label {'+'.join(parts)!r}: names a class twice; name it once, with one weight")
    if not isinstance(label, Mapping):
        return {number_from_label(label, manifest): 1.0}
    try:
        weights = {number_from_label(name, manifest): float(weight) for name, weight in label.items()}
    except (TypeError, ValueError):  # a weight that is no number
        weights = {}
    if not weights or len(weights) != len(label) or not all(np.isfinite(weight) for weight in weights.values()):
        raise SamplingError(f"label {dict(label)!r}: expected distinct classes with finite weights")
    return weights


def number_from_label(label: int | str, manifest: Manifest) -> int:
    """The class number of a label: a number, a number as text, or a class name in upper or lower case.

    Raises:
        SamplingError: no class has that number or name, or several have that name.
    """
    classes = manifest.model.classes
    if isinstance(label, str) and not (label.isascii() and label.removeprefix("-").isdigit() and len(label) < 9):
        matches, names = _classes_named(label, manifest), manifest.class_names
        if len(matches) > 1:
            shown = ", ".join(map(str, matches[:10])) + (", …" if len(matches) > 10 else "")
            raise SamplingError(
                f"label {label!r:.80}: {len(matches)} classes have that name, {shown}; expected one of these numbers"
            )
        if not matches:
            known = "; ".join(_names_near(label, names)) if names else "none in this bundle"
            raise SamplingError(f"label {label!r:.80}: 0 classes have that name; expected a number or one of: {known}")
        return matches[0]
    try:
        if isinstance(label, bool):
            raise TypeError("a truth value is no class number")
        number = int(label) if isinstance(label, str) else operator.index(label)
    except TypeError as error:
        raise SamplingError(f"label {label!r:.80}: expected a class number or name") from error
    if not 0 <= number < classes:
        raise SamplingError(f"label {number}: expected 0 to {classes - 1}, the classes of this model")
    return number


def _names_near(label: str, names: Sequence[str]) -> list[str]:
    """The names that are most like a label, or where none is like it, the first ones; ten at most."""
    by_part = {part.strip().casefold(): name for name in names for part in (name, *name.split(","))}
    near = difflib.get_close_matches(label.strip().casefold(), by_part, 10)
    return list(dict.fromkeys(by_part[part] for part in near)) or list(names[:10])


def _classes_named(label: str, manifest: Manifest) -> list[int]:
    """The numbers of the classes with that name. A class of ImageNet has several: "tench, Tinca tinca"."""
    wanted = label.strip().casefold()
    return [
        index
        for index, name in enumerate(manifest.class_names)
        if wanted in (name.casefold(), *(part.strip().casefold() for part in name.split(",")))
    ]
