"""The sets of weights in a file, and which of them is meant.

A training checkpoint holds the weights that were trained and often an average of them (EMA), which is the model. A set
is a dict of a pickle, or the names of a flat file that share a prefix: ``model.`` and ``model_ema.`` of Lightning.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from dit_export.checkpoints.allowlist_unpickler import Record
from dit_export.checkpoints.key_errors import describe_nearest_layout, short_name
from dit_export.checkpoints.stored import StoredTensor
from dit_runtime.core.errors import CheckpointError

Tensors = Mapping[str, StoredTensor]

# Parts of a name that torch's wrappers put in, anywhere.
WRAPPERS = frozenset(("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"))
# Names by which a set of a DiT's weights, and the prefix before all its names, are recognized.
ANCHORS = ("x_embedder.proj.weight", "y_embedder.embedding_table.weight", "final_layer.linear.weight")
# What averages keep beside the weights.
COUNTERS = frozenset(("n_averaged", "num_updates", "decay", "initted", "step", "optimization_step", "min_decay"))
AVERAGES = frozenset(("ema", "emas", "swa", "average", "averaged", "averages", "avg", "shadow", "polyak"))
NOT_WEIGHTS = re.compile(r"(opt|optim|optimizers?|optimizer_states?|(lr_)?schedulers?|scaler|rng.*|loops)$", re.I)
WHOLE = "."  # the path of a file that is itself a set
DEEPEST, MOST = 4, 1000  # how deep dicts are searched, and how many


@dataclass(frozen=True)
class WeightSet:
    """Weights by name.

    Attributes:
        path: where they are: keys of dicts and the names' prefix, with dots between.
        tensors: by name, without the prefix and without the parts that wrappers put in.
        averaged: whether they are an average of the weights that were trained.
        is_dit: whether the names are a DiT's.
        others: tensors that lie beside the set and belong to none.
    """

    path: str
    tensors: Tensors
    averaged: bool
    is_dit: bool
    others: tuple[str, ...] = ()


@dataclass(frozen=True)
class Unread:
    """An average that cannot be read by the names of its parameters: its path, and its form in words."""

    path: str
    form: str


def choose_weights(source: str, content: Any, wanted: str | None) -> tuple[WeightSet, tuple[str, ...]]:
    """The set that is meant, and the paths of the other ones.

    Args:
        source: the file's name, for errors.
        content: what the file holds.
        wanted: the path of the set (``--weights``); None takes the averaged one, or the only one.

    Raises:
        CheckpointError: there is none, or none of that path, or several that could be meant.
    """
    if not isinstance(content, dict):
        raise _error_for_no_weights(source, content)
    dicts = list(_walk(content, ()))
    sets = [found for keys, value in dicts for found in _sets_of_dict(source, keys, value)]
    unread = [found for keys, value in dicts for found in _unread_averages(keys, value)]
    if wanted is not None:
        return _set_of_path(source, sets, unread, wanted)
    if not sets:
        if unread:
            raise _error_for_unread(source, unread[0], [])
        raise _error_for_no_weights(source, content)
    possible = [one for one in sets if one.is_dit]
    pool = [one for one in possible if one.averaged]
    unread += [Unread(one.path, "parameters of other names") for one in sets if _is_strange_average(one)]
    if unread and possible and not pool:
        raise _error_for_unread(source, unread[0], possible)
    pool = pool or possible or _likeliest(sets)
    if len(pool) > 1:
        raise CheckpointError(
            f"{source}: holds {len(pool)} sets of {'averaged ' if pool[0].averaged else ''}weights "
            f"({_list(pool)}); choose one with --weights"
        )
    chosen = pool[0]
    if chosen.others:  # they may be part of the model
        shown = ", ".join(map(short_name, chosen.others[:5])) + (", …" if len(chosen.others) > 5 else "")
        raise CheckpointError(
            f"{source}: holds {len(chosen.others)} tensors beside the weights {chosen.path} ({shown}); if they "
            f"are no part of the model, leave them out with --weights {chosen.path}; with them it is "
            f"{describe_nearest_layout((*chosen.tensors, *chosen.others))}"
        )
    return chosen, tuple(one.path for one in possible if one.path != chosen.path)


def name_without_wrappers(name: str) -> str:
    """A parameter's name without what torch's wrappers put in."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def strip_wrappers(source: str, tensors: Tensors) -> dict[str, StoredTensor]:
    """The same tensors without the parts of their names that torch's wrappers put in.

    Raises:
        CheckpointError: two names become one.
    """
    found: dict[str, StoredTensor] = {}
    for name, tensor in tensors.items():
        if (short := name_without_wrappers(name)) in found:
            raise CheckpointError(
                f"{source}: {short_name(short)} is there twice, with and without a wrapper's prefix "
                f"({short_name(name)})"
            )
        found[short] = tensor
    return found


def _walk(value: dict[Any, Any], keys: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], dict[Any, Any]]]:
    """The dict and those inside it, with the keys that lead there; not those of optimizers and their like."""
    found = [(keys, value)]
    for index in range(MOST):
        if index == len(found):
            return
        path, inside = found[index]
        yield path, inside
        if len(path) < DEEPEST:
            for key, item in inside.items():
                if isinstance(item, Record):  # a pickled module: its parameters are not by name
                    continue
                if isinstance(item, dict) and not NOT_WEIGHTS.match(str(key)) and len(found) < MOST:
                    found.append(((*path, str(key)), item))


def _sets_of_dict(source: str, keys: tuple[str, ...], value: dict[Any, Any]) -> Iterator[WeightSet]:
    tensors = {str(name): item for name, item in value.items() if isinstance(item, StoredTensor)}
    if not tensors:
        return
    averaged = {name for name in tensors if re.match(r"(model_)?ema\.", name)}
    undotted = averaged if all(name.count(".") == 1 for name in averaged) else set()
    plain = strip_wrappers(source, {name: item for name, item in tensors.items() if name not in undotted})
    prefixes = sorted({name.removesuffix(anchor) for name in plain for anchor in ANCHORS if _ends_with(name, anchor)})
    if not prefixes:
        yield WeightSet(".".join(keys) or WHOLE, plain, _is_average(keys, tensors), is_dit=False)
        return
    groups: dict[str, dict[str, StoredTensor]] = {prefix: {} for prefix in prefixes}
    others = []
    for name, item in plain.items():
        fitting = [prefix for prefix in prefixes if name.startswith(prefix)]
        prefix = max(fitting, key=len, default=None)
        if prefix is not None and name.removeprefix(prefix) not in COUNTERS:
            groups[prefix][name.removeprefix(prefix)] = item
        elif name.rpartition(".")[2] not in COUNTERS:
            others.append(name)
    for prefix, group in groups.items():
        path = (*keys, *prefix.rstrip(".").split(".")) if prefix else keys
        yield WeightSet(".".join(path) or WHOLE, group, _is_average(path, tensors), True, tuple(others))
        if average := _undotted_average(prefix, group, tensors, undotted):
            yield WeightSet(".".join((*keys, "model_ema")), average, True, True)


def _undotted_average(
    prefix: str, group: Tensors, tensors: Tensors, undotted: set[str]
) -> dict[str, StoredTensor] | None:
    """The average that latent-diffusion's ``LitEma`` keeps: names without dots, and without what was not trained."""
    short = {name.partition(".")[2]: tensors[name] for name in undotted}
    names = {name: f"{prefix}{name}".partition(".")[2].replace(".", "") for name in group}
    if not any(name in short for name in names.values()):
        return None
    return {
        name: short.get(undotted_name, group[name])
        for name, undotted_name in names.items()
        if undotted_name in short or name == "pos_embed"
    }


def _ends_with(name: str, anchor: str) -> bool:
    return name == anchor or name.endswith(f".{anchor}")


def _is_average(path: tuple[str, ...], tensors: Tensors) -> bool:
    words = {word for part in path for word in re.split(r"[^a-z]+", part.lower())}
    return bool(words & AVERAGES) or "n_averaged" in tensors


def _unread_averages(keys: tuple[str, ...], value: dict[Any, Any]) -> Iterator[Unread]:
    """Averages of which no parameter has a name here: lists, and what a class of their own keeps."""
    for key, item in value.items():
        path = (*keys, str(key))
        if isinstance(item, dict | StoredTensor) or not _is_average(path, {}) or not _holds_weights(item, DEEPEST):
            continue
        if isinstance(item, Record):
            yield Unread(".".join(path), f"inside a pickled {short_name(item.class_name)}")
        elif any(isinstance(one, StoredTensor) for one in item):
            yield Unread(".".join(path), "a list without names, as diffusers' EMAModel keeps them")
        else:
            yield Unread(".".join(path), "inside a list")


def _holds_weights(value: Any, depth: int) -> bool:
    """Whether there is a tensor of one axis or more in a value, its items, or the fields of its objects."""
    if isinstance(value, StoredTensor):
        return len(value.shape) > 0
    inside = value.fields if isinstance(value, Record) else value
    items = inside.values() if isinstance(inside, dict) else inside if isinstance(inside, list | tuple) else ()
    return depth >= 0 and any(_holds_weights(item, depth - 1) for item in islice(items, MOST))


def _is_strange_average(one: WeightSet) -> bool:
    """Whether it is an average of weights, matrices among them, whose names are no DiT's."""
    return one.averaged and not one.is_dit and any(len(item.shape) > 1 for item in one.tensors.values())


def _set_of_path(
    source: str, sets: list[WeightSet], unread: list[Unread], wanted: str
) -> tuple[WeightSet, tuple[str, ...]]:
    for one in sets:
        if one.path == wanted:
            return one, tuple(other.path for other in sets if other.is_dit and other.path != wanted)
    if inside := [one for one in unread if one.path == wanted or one.path.startswith(f"{wanted}.")]:
        raise _error_for_unread(source, inside[0], [one for one in sets if one.is_dit])
    raise CheckpointError(
        f"{source}: --weights {wanted}: no weights there; there is {_list([one for one in sets if one.is_dit] or sets)}"
    )


def _likeliest(sets: list[WeightSet]) -> list[WeightSet]:
    """Of sets that are no DiT's, the one whose names the error shows: the average, or the largest."""
    averaged = [one for one in sets if one.averaged and len(one.tensors) > 1]
    return [max(averaged or sets, key=lambda one: len(one.tensors))]


def _error_for_unread(source: str, average: Unread, sets: list[WeightSet]) -> CheckpointError:
    cure = f"choose others with --weights ({_list(sets)}), or " if sets else ""
    return CheckpointError(
        f"{source}: its averaged weights ({short_name(average.path)}) are {average.form}; {cure}copy them into a model "
        "and save its state_dict()"
    )


def _error_for_no_weights(source: str, content: Any) -> CheckpointError:
    if isinstance(content, Record):
        return CheckpointError(
            f"{source}: is a whole pickled {short_name(content.class_name)}, and reading it could execute code; save "
            "model.state_dict() instead, on a machine where you trust it"
        )
    if not isinstance(content, dict):
        return CheckpointError(
            f"{source}: holds no state dict but a {type(content).__name__}; expected parameters by name"
        )
    records = [item.class_name for item in content.values() if isinstance(item, Record)]
    keys = ", ".join(map(short_name, sorted(map(str, content))[:10]))
    what = f"; a pickled {short_name(records[0])} could execute code and is not read" if records else ""
    return CheckpointError(
        f"{source}: holds no state dict ({keys}){what}; expected parameters by name, or a dict of them under "
        "'ema' or 'model'"
    )


def _list(sets: list[WeightSet]) -> str:
    shown = [f"{short_name(one.path)} ({len(one.tensors)} tensors)" for one in sets[:10]]
    return ", ".join([*shown, "…"] if len(sets) > 10 else shown) or "none"
