"""Rungs of every class and timestep: a few random projections of each condition's row, which kilobytes hold.

A row of the conditioning table is hundreds of kilobytes in a large model. Its projection on random signs tells it from
every other row, and the root mean square of a few projections of an error is the error's norm.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from dit_runtime.backends.base import Array
from dit_runtime.backends.conditioning import TableLimits, bytes_of_row
from dit_runtime.bundle.reader import CONDITIONS
from dit_runtime.bundle.records import PROJECTIONS
from dit_runtime.verify.budget import LEAST_FLOOR
from dit_runtime.verify.effort import Effort
from dit_runtime.verify.relation import Relation
from dit_runtime.verify.replay import Replay, show_time
from dit_runtime.verify.rung import Rung

FEW = 8  # rows of a call that the rung "conditioner" has compared with the reference
ROUNDING = 1e-13  # of a projection in float64, relative to the row
LARGEST_POWER = 7  # calls next to powers of two up to 128 are made; beyond, the largest call
DRAWN = 64  # timesteps of a record that are drawn between the others


def signs_for(values: int) -> NDArray[np.float64]:
    """Random signs ``[values, PROJECTIONS]``, the same on every machine and with every version of numpy."""
    words = np.random.PCG64(0).random_raw(-(-values * PROJECTIONS // 64))
    bits = np.unpackbits(np.asarray(words, "<u8").view(np.uint8))[: values * PROJECTIONS]
    return np.asarray(2.0 * bits - 1, np.float64).reshape(-1, PROJECTIONS)


def project(rows: Array, signs: NDArray[np.float64]) -> NDArray[np.float64]:
    """Project rows ``[R, …]`` on signs: ``[R, PROJECTIONS]``."""
    flat = rows.reshape(len(rows), -1).astype(np.float64)
    return np.asarray(flat @ signs, np.float64)


def relative_norms(difference: Array, norms: Array) -> NDArray[np.float64]:
    """The relative L2 ``[R]`` of errors, from their projections ``[R, PROJECTIONS]`` and the rows' norms ``[R]``."""
    return np.asarray(np.sqrt(np.mean(np.square(difference), axis=1)) / np.maximum(norms, 1e-30), np.float64)


def choose_conditions(timesteps: int, label_rows: int, times: int = 1) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Choose timesteps ``[R]`` and labels ``[R]`` so that every row of the label table and every timestep is there.

    The timesteps of a model of two times are ``[R, 2]``; the second is at most the first.

    Args:
        timesteps: the training timesteps; 0 is a velocity model, whose time is from 0 to 1.
        label_rows: the rows of the label table: a class each, and the null class where there is one.
        times: how many times the model gets.
    """
    random = np.random.default_rng(0)
    count = max(timesteps or 4 * DRAWN, label_rows)
    whole = np.arange(count) % timesteps if timesteps else np.linspace(0, 1, count)
    between = random.uniform(0, max(timesteps - 1, 1), DRAWN)
    labels = np.concatenate([random.permutation(count), random.integers(0, count, DRAWN)]) % label_rows
    chosen = np.concatenate([whole, between]).astype(np.float32)
    return (chosen if times == 1 else with_second_times(chosen, random)), labels


def with_second_times(first: NDArray[np.float32], random: np.random.Generator) -> NDArray[np.float32]:
    """Times ``[R]`` with second ones beside them, drawn from 0 to the first: ``[R, 2]``, for t − r or r alike."""
    return np.stack([first, first * random.random(len(first), np.float32)], axis=1)


def conditions(replay: Replay, effort: Effort) -> Iterator[Rung]:
    """Every class and timestep against the reference, where the bundle has the record; then calls of other sizes."""
    manifest = replay.bundle.manifest
    record = replay.bundle.records(CONDITIONS) if replay.bundle.has_records(CONDITIONS) else None
    if record is None:
        model = manifest.model
        timesteps, labels = choose_conditions(len(manifest.diffusion.betas), model.label_rows, model.times)
    else:
        timesteps, labels = record["timesteps"], record["labels"]
    most = max(1, TableLimits().conditioner_bytes // bytes_of_row(manifest.table))
    if "conditioner" in replay.engine.info.profiles:
        most = min(most, replay.engine.info.profiles["conditioner"].largest_batch)
    signs = signs_for(int(np.prod([int(axis) for axis in manifest.table.shape[1:]])))
    order = np.arange(len(timesteps))
    few = _run(replay, timesteps, labels, np.split(order, range(min(FEW, most), len(order), min(FEW, most))), signs)
    if record is not None:
        yield _compare_with_record(replay, record, few)
    norms = np.sqrt(np.mean(np.square(few), axis=1))
    relation, floors = Relation(replay.budget, "conditioner calls"), CONDITIONS if record is not None else "conditioner"
    shuffled, first = np.random.default_rng(1).permutation(order), 0
    for size in _list_sizes(most, effort):
        index = np.take(shuffled, np.arange(first, first + size), mode="wrap")
        first += size
        found = _run(replay, timesteps, labels, [index], signs)
        errors = np.nan_to_num(relative_norms(found - few[index], norms[index]), nan=np.inf)
        worst = int(np.argmax(errors))
        error = 0.0 if errors[worst] < ROUNDING else float(errors[worst])
        where = f"row {worst} of a call of {size}"
        relation.add_error("conditioner", floors, error, error, where)
    yield relation.rung(f"calls of up to {most} rows")


def _list_sizes(most: int, effort: Effort) -> list[int]:
    """Rows of the calls to make: one, the most, and in a full verification numbers next to powers of two."""
    powers = range(1, LARGEST_POWER + 1) if effort.sizes else ()
    between = [size for power in powers for size in (2**power - 1, 2**power, 2**power + 1)]
    return sorted({size for size in (1, 3, *between, most) if size <= most})


def _run(
    replay: Replay, timesteps: Array, labels: Array, calls: list[NDArray[np.int64]], signs: NDArray[np.float64]
) -> NDArray[np.float64]:
    """The projections of conditions, computed in calls of these conditions each."""
    return np.concatenate([project(replay.compute_table(timesteps[index], labels[index]), signs) for index in calls])


def _compare_with_record(replay: Replay, record: Mapping[str, Array], found: Array) -> Rung:
    """Each condition's row against the reference's, by the limits of the rung "conditioner"."""
    budget, labels = replay.budget, record["labels"]
    errors = np.nan_to_num(relative_norms(found - record["projections"], record["norms"]), nan=np.inf)
    worst = int(np.argmax(errors))
    floor = max(budget.floors.get(CONDITIONS, ()), default=0.0)
    has_null = replay.model.has_null
    label = "null" if has_null and labels[worst] == replay.model.null_class else labels[worst]
    detail = f"timestep {show_time(record['timesteps'][worst])} label {label}"
    count, times = len(np.unique(labels)), len(np.unique(record["timesteps"], axis=0))
    kind = "observations" if replay.model.observation else "classes"
    visited = f"{count - has_null} {kind}{' and null' if has_null else ''}, {times} timesteps"
    rung = Rung(
        "classes and timesteps",
        float(errors[worst]),
        budget.tolerance_of("conditioner"),
        "relative",
        f"worst: {detail}; {visited}",
        ratio=float(errors[worst]) / max(floor, LEAST_FLOOR) if floor else None,
        threshold=budget.threshold_of("conditioner") if floor else None,
        metrics={"relative_l2": float(errors[worst])},
    )
    return rung if rung.passed else replace(rung, first_over=detail)
