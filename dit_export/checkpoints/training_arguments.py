"""The arguments of a training run that its checkpoint stores, whatever their form, as plain values."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from dit_export.checkpoints.allowlist_unpickler import Record

# Where checkpoints keep them.
KEYS = (
    *("args", "arguments", "train_args", "training_args", "config", "cfg", "conf", "hparams", "hyper_parameters"),
    *("model_args", "model_config", "model_kwargs", "settings", "options", "opts"),
)
DEEPEST = 3  # configurations have sections
MOST = 10_000
LONGEST_TEXT = 1 << 20  # characters of arguments as JSON


def arguments_from_content(content: Any) -> dict[str, Any]:
    """The training arguments in what a file holds, sections and all, by their own names; empty if there are none.

    An argparse Namespace, a SimpleNamespace, a dict, a dataclass, OmegaConf's containers and JSON text are read alike;
    so are plain values beside the weights.
    """
    found: dict[str, Any] = {}
    if isinstance(content, dict):
        for key in KEYS:
            if key in content:
                _collect(content[key], found, DEEPEST)
        _collect({key: item for key, item in content.items() if isinstance(item, str | int | float)}, found, DEEPEST)
    return found


def _collect(value: Any, found: dict[str, Any], depth: int) -> None:
    for name, item in _fields_of(value).items():
        plain = _plain(item)
        inside = _fields_of(plain)
        if inside and depth:
            _collect(plain, found, depth - 1)
        elif not inside and len(found) < MOST:
            found.setdefault(str(name), plain)


def _fields_of(value: Any) -> Mapping[Any, Any]:
    """The fields of an object, or the items of a dict; nothing for any other value."""
    fields = value.fields if isinstance(value, Record) else value
    if isinstance(fields, str) and fields.lstrip().startswith("{") and len(fields) <= LONGEST_TEXT:
        try:
            fields = json.loads(fields)
        except (ValueError, RecursionError):
            return {}
    if isinstance(fields, tuple) and len(fields) == 2:  # an object with slots: its dict, and its slots
        fields = {name: item for part in fields if isinstance(part, dict) for name, item in part.items()}
    if isinstance(fields, dict) and isinstance(fields.get("_content"), dict):  # OmegaConf
        fields = fields["_content"]
    return fields if isinstance(fields, dict) else {}


def _plain(value: Any) -> Any:
    """The value inside a node of OmegaConf; others as they are."""
    if isinstance(value, Record) and isinstance(value.fields, dict) and "_val" in value.fields:
        return value.fields["_val"]
    return value
