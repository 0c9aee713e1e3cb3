"""Changes of what goes into an engine's graphs and loop and comes out, at inputs that no golden record has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from fault import Patch
from faulty_engine import Alter, Array, Arrays, Spoil

from dit_runtime.backends.host_loop import HostLoop
from dit_runtime.samplers.schedule import LOG_SIGMA, NOISE


def spoil(values: Arrays, place: int | slice = slice(None)) -> None:
    """Mix a little of the image's own mirror image in."""
    for value in values.values():
        value[place] = 0.9 * value[place] + 0.1 * value[place][..., ::-1]


def at_batch(wrong: Callable[[int], bool], place: int | slice = slice(None)) -> Spoil:
    def change(inputs: Arrays, outputs: Arrays) -> None:
        if wrong(len(next(iter(inputs.values())))):
            spoil(outputs, place)

    return change


def step_at(wrong: Callable[[int, int], bool]) -> Spoil:
    def change(inputs: Arrays, outputs: Arrays) -> None:
        if wrong(*inputs["rows"].shape[::-1]):
            spoil(outputs)

    return change


def keep_slot_at(wrong: Callable[[int, int], bool]) -> Spoil:
    """Slot 2 is stale at some batches and branches."""

    def change(inputs: Arrays, outputs: Arrays) -> None:
        if wrong(*inputs["rows"].shape[::-1]) and "next_state" in outputs:
            outputs["next_state"][:, 2] = inputs["state"][:, 2]

    return change


# Faults at few batches and numbers of branches: rung, a part of its detail, and the change of the step's outputs.
SHAPE_FAULTS: dict[str, tuple[str, str, Spoil]] = {
    "wrong at batches 9 to 12 only": ("batch invariance", "at batch 9", step_at(lambda n, _: 9 <= n <= 12)),
    "wrong at batch 13 only": ("batch invariance", "at batch 13", step_at(lambda n, _: n == 13)),
    "wrong at batch 16 only": ("batch invariance", "at batch 16", step_at(lambda n, _: n == 16)),
    "wrong at odd batches from 7": ("batch invariance", "at batch 7", step_at(lambda n, _: n >= 7 and n % 2 == 1)),
    "the last image of eleven": ("batch invariance", "image 11 at batch 11", at_batch(lambda n: n == 11, 10)),
    "wrong from batch 25": ("batch invariance", "at batch 36", step_at(lambda n, _: n >= 25)),
    "wrong with guidance at batch 11 only": (
        *("guidance of each image", "at batch 11, G=2"),
        step_at(lambda n, g: (n, g) == (11, 2)),
    ),
    "the third branch is wrong at batch 6 only": (
        *("branches", "at batch 6, G=3"),
        step_at(lambda n, g: (n, g) == (6, 3)),
    ),
    "the third branch is wrong at batch 14 only": (
        *("guidance of each image", "at batch 14, G=3"),
        step_at(lambda n, g: (n, g) == (14, 3)),
    ),
    "four branches are wrong at batches 10 to 12": (
        *("guidance of each image", "at batch 10, G=4"),
        step_at(lambda n, g: g == 4 and 10 <= n <= 12),
    ),
    "slot 2 is stale with guidance at batch 7 only": (
        *("sampler of each image", "slot 2"),
        keep_slot_at(lambda n, g: (n, g) == (7, 2)),
    ),
    "slot 2 is stale at batch 12 only": (
        "sampler of each image",
        "slot 2",
        keep_slot_at(lambda n, g: (n, g) == (12, 1)),
    ),
}


def wrap_rows(most: int) -> Alter:
    def change(inputs: Arrays) -> None:
        inputs["rows"] %= most

    return change


def use_neighbour(inputs: Arrays) -> None:
    inputs["labels"][inputs["labels"] == 5] = 4


def spoil_rows_from(first: int) -> Spoil:
    def change(inputs: Arrays, outputs: Arrays) -> None:
        (table,) = outputs.values()
        table[first:] = table[:1]

    return change


def drop_third_branch(inputs: Arrays) -> None:
    inputs["guidance"][2:] = 0


def use_first_of(name: str, axis: int) -> Alter:
    def change(inputs: Arrays) -> None:
        inputs[name][:] = np.take(inputs[name], [0], axis=axis)

    return change


def keep_slot(inputs: Arrays, outputs: Arrays) -> None:
    if len(inputs["state"]) > 1 and "next_state" in outputs:
        outputs["next_state"][:, 2] = inputs["state"][:, 2]


def add_noise(inputs: Arrays, outputs: Arrays) -> None:
    silent = inputs["coefficients"][:, NOISE] == 0
    outputs["next_state"][silent, 0] += 0.01 * inputs["noise"][silent]


def flip_images(inputs: Arrays, outputs: Arrays) -> None:
    if len(inputs["latents"]) == 1 and "images" in outputs:
        outputs["images"][:] = outputs["images"][:, ::-1].copy()


def whole_timesteps(inputs: Arrays) -> None:
    inputs["timesteps"][:] = np.floor(inputs["timesteps"])


def leak() -> dict[str, Spoil]:
    """After 400 calls of the step, those with two images are wrong."""
    calls: list[int] = []

    def change(inputs: Arrays, outputs: Arrays) -> None:
        calls.append(1)
        if len(calls) > 400 and inputs["rows"].shape == (1, 2):
            spoil(outputs)

    return {"step": change}


def stay_stale() -> dict[str, Spoil]:
    """The second call at a batch of 3 gives the first one's result."""
    kept: dict[str, Array] = {}

    def change(inputs: Arrays, outputs: Arrays) -> None:
        if inputs["rows"].shape[1] == 3:
            for name, value in outputs.items():
                if name in kept and kept[name].shape == value.shape:
                    value[:] = kept[name]
                kept[name] = value.copy()

    return {"step": change}


def fall_back_in_sum(inputs: Arrays) -> None:
    """A branch without weight counts after all."""
    inputs["guidance"][1:][inputs["guidance"][1:] == 0] = 0.02


def forget_variance(inputs: Arrays) -> None:
    inputs["coefficients"][1:, LOG_SIGMA + 1] = 0


def change_inputs(graph: str, name: str, change: Callable[[Array], Array]) -> dict[str, Alter]:
    def alter(inputs: Arrays) -> None:
        inputs[name][:] = change(inputs[name])

    return {graph: alter}


def repeat_row(rows: Array) -> Array:
    """Rows that are whole multiples of 64 are read as the first one."""
    return np.where(rows % 64 == 0, 0, rows)


def share_null(inputs: Arrays) -> None:
    """The branches after the first one read the first image's row."""
    inputs["rows"][1:] = inputs["rows"][1:, :1].copy()


def reuse_noise(inputs: Arrays) -> None:
    inputs["noise"][:] = inputs["noise"][:1].copy()


def keep_noise() -> dict[str, Spoil]:
    """Noise is added again from the call before, where the batch is the same."""
    kept: dict[tuple[int, ...], Array] = {}

    def change(inputs: Arrays, outputs: Arrays) -> None:
        noise = inputs["noise"]
        if len(noise) > 1 and "next_state" in outputs and noise.shape in kept:
            scale = np.exp(inputs["coefficients"][:, LOG_SIGMA]) * inputs["coefficients"][:, NOISE]
            outputs["next_state"][:, 0] += 0.05 * scale[:, None, None, None] * (kept[noise.shape] - noise)
        kept[noise.shape] = noise.copy()

    return {"step": change}


def drop_negative_of_third(weights: Array) -> Array:
    changed = weights.copy()
    changed[2:] = np.maximum(changed[2:], 0)
    return changed


def leak_padding(inputs: Arrays, outputs: Arrays) -> None:
    """At a batch that is no power of two, the last image has some of the image that filled the batch up."""
    batch = len(inputs["state"])
    if batch & (batch - 1):
        for value in outputs.values():
            value[-1] = 0.95 * value[-1] + 0.05 * value[0]


def swap_slots_from_three(inputs: Arrays, outputs: Arrays) -> None:
    if len(inputs["state"]) >= 3 and "next_state" in outputs:
        outputs["next_state"][:, 1:] = outputs["next_state"][:, :0:-1].copy()


def silence_last(inputs: Arrays) -> None:
    inputs["coefficients"][1:][-1:, NOISE] = 0


def repeat_row_before(inputs: Arrays, outputs: Arrays) -> None:
    """The last row of an odd call of the conditioner is the row before it."""
    (table,) = outputs.values()
    if len(table) > 1 and len(table) % 2:
        table[-1] = table[-2]


def move_level(inputs: Arrays, outputs: Arrays) -> None:
    if "images" in outputs:
        outputs["images"][1:] = np.minimum(outputs["images"][1:].astype(int) + 1, 255)


def share_deviation(inputs: Arrays, outputs: Arrays) -> None:
    outputs["std"][:] = outputs["std"][:1].copy()


def use_first_guidance(run: Any, loop: Any, coefficients: Array, guidance: Array, *others: Any) -> Any:
    return run(loop, coefficients, np.repeat(guidance[:, :1], guidance.shape[1], axis=1), *others)


def use_first_coefficients(run: Any, loop: Any, coefficients: Array, *others: Any) -> Any:
    return run(loop, np.repeat(coefficients[:1], len(coefficients), axis=0), *others)


def use_second_rows(run: Any, loop: Any, coefficients: Array, guidance: Array, rows: Array, *others: Any) -> Any:
    """The third image reads the second one's rows."""
    rows = rows.copy()
    rows[:, 2:3] = rows[:, 1:2]
    return run(loop, coefficients, guidance, rows, *others)


def put_noise_first(run: Any, loop: Any, *args: Any) -> Any:
    """Noise goes to the first images instead of those that draw it."""
    *others, drawing = args
    return run(loop, *others, list(range(len(drawing)))[::-1])


def keep_noise_of_first(run: Any, loop: Any, coefficients: Array, guidance: Array, rows: Array, *others: Any) -> Any:
    """The noise of the first step is used in all."""
    noise, drawing = others
    if noise is not None:
        first = loop.__dict__.setdefault("first_noise", noise)
        noise = np.resize(first, noise.shape)
    return run(loop, coefficients, guidance, rows, noise, drawing)


def keep_first(keep: Any, loop: Any, positions: Any) -> None:
    """The images that remain are the first ones."""
    keep(loop, list(range(len(positions))))


def forget_when_joined(add: Any, loop: Any, latents: Array) -> None:
    """An image that joins begins at zero."""
    add(loop, np.zeros_like(latents) if hasattr(loop, "begun") else latents)
    loop.begun = True


def in_loop(change: Any, method: str = "run_step", loop: Any = HostLoop) -> tuple[Patch]:
    """A changed method of a sampling loop."""
    original = getattr(loop, method)
    return ((loop, method, lambda own, *args: change(original, own, *args)),)


LOOP_FAULTS = {
    "the loop has guidance of the first image for all": (use_first_guidance, "run_step"),
    "the loop has coefficients of the first image for all": (use_first_coefficients, "run_step"),
    "the loop gives the third image the second one's rows": (use_second_rows, "run_step"),
    "the loop puts noise to the first images": (put_noise_first, "run_step"),
    "the loop uses the first step's noise again": (keep_noise_of_first, "run_step"),
    "the loop keeps other images than those that remain": (keep_first, "keep"),
    "the loop loses an image that joins": (forget_when_joined, "add"),
}
