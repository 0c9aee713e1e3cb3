"""The lower rungs: a block's inputs, a block's output, and the network's output."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np

from dit_runtime.backends.base import Array
from dit_runtime.bundle.precision import QUANTIZED, Precision
from dit_runtime.samplers.schedule import B_E, COEFFICIENTS, LOG_SIGMA_V, NOISE
from dit_runtime.verify.budget import FP16_MAX, Series, compare_series
from dit_runtime.verify.metrics import relative_error, relative_l2
from dit_runtime.verify.replay import RecordedInputs, Replay, choose_shapes, cover_with_batches, show_time
from dit_runtime.verify.rung import Rung
from dit_runtime.verify.updates import PARTS, expect_update

# The vectors that adaLN has in the conditioning table for each block, in their order.
VECTORS = {
    "adaln-zero": ("attention shift", "attention scale", "attention gate", "MLP shift", "MLP scale", "MLP gate"),
    "adaln": ("attention shift", "attention scale", "MLP shift", "MLP scale"),
}
NAMED_UNITS = 4  # of so many units that need FP32, the rung "FP16 range" names each


def fp16_range(replay: Replay) -> Rung:
    """How far the reference's own numbers stay below FP16's largest number, in the units that compute in FP16."""
    manifest = replay.bundle.manifest
    policy = manifest.precision
    units = {unit: value for unit, value in manifest.magnitudes.items() if policy.precision_of(unit) == Precision.FP16}
    # The residual stream after a block is FP32 in every precision.
    units = {unit: value for unit, value in units.items() if not unit.rpartition(".")[2].isdecimal()}
    worst = max(units, key=lambda unit: units[unit], default="nothing")
    largest, margin = units.get(worst, 0.0), replay.budget.tolerance_of("fp16_range")
    beyond = [unit for unit, value in units.items() if value and not FP16_MAX / value >= margin]
    cure = ""
    if beyond:
        kept = f"--keep-fp32 {' '.join(beyond)}" if len(beyond) <= NAMED_UNITS else "--keep-fp32"
        kept = f"--fp16 {kept}" if policy.name in QUANTIZED else kept
        cure = f"; export again with {kept}"
        if policy.name == Precision.FP16:
            cure += ", or with the list that dit-export --bisect finds"
    return Rung(
        "FP16 range",
        FP16_MAX / largest if largest else float("inf"),
        margin,
        "times",
        f"{worst} reaches {largest:.4g} of {FP16_MAX:g}{cure}",
        axis="unit",
        series={"magnitude": list(units.values())},
    )


def conditioner(replay: Replay) -> Rung:
    """Timesteps and labels → the conditioning table, entry by entry, at each number of rows that is verified."""
    record = replay.bundle.records("conditioner")
    count = len(record["table"])
    sizes = sorted({count, *(rows for rows, _ in choose_shapes(replay.engine.info, "conditioner", count))})
    asked = [np.arange(rows) % count for rows in sizes]
    found = np.concatenate(
        [replay.compute_table(record["timesteps"][index], record["labels"][index]) for index in asked]
    )
    expected = record["table"][np.concatenate(asked)]
    entries = range(expected.shape[1])
    series = Series(
        "entry",
        _entries(replay, len(entries)),
        [found[:, index] for index in entries],
        [expected[:, index] for index in entries],
        [float(np.abs(expected).max())] * len(entries),
    )
    detail = f"{count} pairs of timestep and label; rows {' '.join(map(str, sizes))}"
    return compare_series(replay.budget, "conditioner", "conditioner", "conditioner", series, detail=detail)


def _entries(replay: Replay, count: int) -> list[str]:
    """The name of each entry of a row of the conditioning table."""
    if replay.model.conditioning == "in-context":
        return ["timestep's token", "label's token"]
    if replay.model.conditioning == "cross-attention":
        return [f"block {index} keys and values" for index in range(count)]
    names = VECTORS[replay.model.conditioning]
    of_blocks = [f"block {index} {name}" for index in range(replay.model.depth) for name in names]
    return of_blocks if replay.model.observation else [*of_blocks, "final shift", "final scale"]


def embedding(replay: Replay) -> Rung:
    """Patches and positions as they enter the first block: a block whose gates are closed returns its input."""
    record = replay.bundle.records("blocks")
    first, *_ = replay.run_blocks(RecordedInputs.from_record(record), np.zeros_like(record["table"]))
    found = first[:1, :: int(record["token_stride"])]
    series = Series("", [""], [found], [record["tokens"]])
    return compare_series(replay.budget, "embedding", "embedding", "embedding", series, detail="patches and positions")


def blocks(replay: Replay) -> Rung:
    """Every block's output, for one guided image and the reference's own conditioning table."""
    record = replay.bundle.records("blocks")
    stride = int(record["token_stride"])
    found = [output[:, ::stride] for output in replay.run_blocks(RecordedInputs.from_record(record), record["table"])]
    labels = [f"block {index}" for index in range(replay.model.depth)]
    series = Series("block", labels, found, list(record["outputs"]))
    return compare_series(replay.budget, "blocks", "blocks", "blocks", series, detail=f"of {len(labels)}")


def forward(replay: Replay, branches: int) -> Iterator[Rung]:
    """The guided prediction, and the variance, at each shape that is verified."""
    record = replay.bundle.records(f"forward_{branches}")
    images = RecordedInputs.from_record(record)
    shapes = choose_shapes(replay.engine.info, "step", len(images.latents), (1, 2))
    # An engine without a shape of one branch computes it with a second branch, which shares the first branch's weight.
    shapes = [shape for shape in shapes if (shape[1] == 1) == (branches == 1)] or shapes[:1]
    sizes = " ".join(str(batch) if most <= 2 else f"{batch}·G{most}" for batch, most in shapes)
    evaluated = _evaluate(replay, images, record, shapes)
    parts = {"": ("forward", "e", images.guidance)}
    if replay.model.learned_variance:
        parts[" variance"] = ("variance", "v", 1.0)  # guidance does not act on it
    for part, (kind, key, guidance) in parts.items():
        expected = record[key]
        worst: dict[int, tuple[Array, int]] = {}  # by image: its worst evaluation, and the batch size
        for image, batch, outputs in evaluated:
            error = relative_l2(outputs[key], expected[image])
            if image not in worst or error > relative_l2(worst[image][0], expected[image]):
                worst[image] = outputs[key], batch
        series = Series(
            "image",
            [
                f"timestep {show_time(images.timesteps[image])} label {images.labels[image]} at batch {batch}"
                for image, (_, batch) in sorted(worst.items())
            ],
            [worst[image][0] for image in sorted(worst)],
            [expected[image] for image in sorted(worst)],
            # Rounding is relative to the largest value of all images.
            [float(np.abs(expected).max())] * len(worst),
        )
        name, floors = f"forward G={branches}{part}", f"forward_{branches}{part}"
        rung = compare_series(replay.budget, name, kind, floors, series, guidance, f"batches {sizes}")
        yield rung if rung.passed else _with_channels(rung, series)


def update(replay: Replay) -> Rung:
    """The sampler's update, from a state whose three slots differ and a row of the schedule in which no number is 0.

    The expected result is computed in float64 from the engine's own e and v (``samplers/schedule.py``). So every slot
    and every coefficient is verified, also those that the recorded samplers do not use.
    """
    record = replay.bundle.records("forward_1")
    every = RecordedInputs.from_record(record)
    shape = choose_shapes(replay.engine.info, "step", len(every.latents), (1, 2))[0]
    images = every.select(cover_with_batches(len(every.latents), shape[0])[0])
    evaluated = _evaluate(replay, images, record, [shape])
    e, v = (np.stack([outputs[part] for _, _, outputs in evaluated]) for part in ("e", "v"))
    random = np.random.default_rng(0)
    row = random.uniform(0.5, 1.5, COEFFICIENTS) * np.where(np.arange(COEFFICIENTS) % 2, 1, -1)
    row[LOG_SIGMA_V] = 0.5 / max(float(np.abs(v).max(initial=0)), 1e-3)
    row = np.append(row, [1.0, -0.7]) if replay.model.clips else row  # a bound that some values are beyond
    coefficients = np.repeat(row[None].astype(np.float32), shape[0], axis=0)
    noise = random.standard_normal(images.latents.shape).astype(np.float32)
    inputs = replay.make_inputs(images, coefficients, noise, shape[1])
    inputs["state"][:, 1:] = random.standard_normal(inputs["state"][:, 1:].shape)
    found = replay.engine.session("step").run(inputs, ["next_state", "denoised"])
    images_alone = zip(inputs["state"], e, v, coefficients, noise, strict=True)
    expected = zip(*(expect_update(*image) for image in images_alone), strict=True)
    parts = zip(PARTS, [*found[0].swapaxes(0, 1), found[1]], expected, strict=True)
    errors = {part: relative_error(one, np.stack([each.value for each in wanted])) for part, one, wanted in parts}
    worst = max(errors, key=lambda part: errors[part] if np.isfinite(errors[part]) else np.inf)
    limit = replay.budget.tolerance_of("update")
    return Rung("sampler update", errors[worst], limit, "relative", f"worst: {worst}; all {len(row)} coefficients")


def _evaluate(
    replay: Replay, images: RecordedInputs, record: Mapping[str, Array], shapes: Sequence[tuple[int, int]]
) -> list[tuple[int, int, dict[str, Array]]]:
    """Evaluations of the images at shapes ``(batch, branches)``: the image's index, the batch size, ``e`` and ``v``."""
    # v is read from the noise's scale exp(h·v). exp and log round relative to 1, however small v is, so h is large:
    # h·v is at most 40, and exp(40) is far below float32's largest number.
    largest = float(np.abs(record["v"]).max(initial=0))
    factor = np.float32(2.0 ** np.clip(np.floor(np.log2(40 / max(largest, 1e-3))), -6, 6))
    found = []
    for batch, branches in shapes:
        coefficients = np.zeros((batch, COEFFICIENTS), np.float32)
        coefficients[:, [B_E, NOISE]] = 1  # denoised = e
        coefficients[:, LOG_SIGMA_V] = factor  # next z = exp(h·v) with unit noise
        for index in cover_with_batches(len(images.latents), batch):
            noise = np.ones_like(images.latents[index])
            next_state, e = replay.run_step(images.select(index), coefficients, noise, branches)
            with np.errstate(divide="ignore", invalid="ignore"):
                v = np.log(next_state[:, 0]) / factor
            found += [(int(image), batch, {"e": e[row], "v": v[row]}) for row, image in enumerate(index)]
    return found


def _with_channels(rung: Rung, series: Series) -> Rung:
    """The rung with its wrong channels, where not all channels are wrong: guidance may act on too few channels."""
    errors = np.abs(np.stack(series.found) - np.stack(series.expected)).max(axis=(0, 2, 3))
    wrong = [str(channel) for channel, error in enumerate(errors) if not error <= errors.max() / 10]
    if not np.isfinite(errors).all() or len(wrong) == len(errors):
        return rung
    return replace(rung, detail=f"{rung.detail}; channel {', '.join(wrong)} of {len(errors)}")
