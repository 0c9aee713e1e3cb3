"""The upper rungs: the sampler's noise, steps and trajectories, the autoencoder, and the images."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from dit_runtime.backends.base import Array
from dit_runtime.bundle.manifest import ENCODER
from dit_runtime.bundle.reader import STRONG, UNGUIDED
from dit_runtime.samplers.guidance import Guidance, branches_from_labels
from dit_runtime.samplers.noise import TorchNoise
from dit_runtime.samplers.schedule import A_Z, Schedule
from dit_runtime.sampling.batch import Batch
from dit_runtime.sampling.requests import ImageRequest
from dit_runtime.verify.budget import Series, compare_series
from dit_runtime.verify.metrics import (
    LEVELS,
    psnr,
    relative_error,
    ssim,
)
from dit_runtime.verify.replay import RecordedInputs, Replay, choose_shapes, cover_with_batches
from dit_runtime.verify.rung import Rung

Record = Mapping[str, Array]


def noise(replay: Replay, sampler: str, record: Record, schedule: Schedule) -> Rung:
    """The runtime's noise from the recorded seeds, against the noise that PyTorch drew."""
    image = record["latents"].shape[2:]
    streams = [TorchNoise(int(seed)) for seed in record["seeds"]]
    drawn = [np.stack([stream.normal(image) for stream in streams])]
    drawn += [np.stack([stream.normal(image) for stream in streams]) for _ in range(schedule.draws_noise.sum())]
    recorded = np.concatenate([record["latents"][:1], record["noise"][schedule.draws_noise]])
    error = relative_error(np.stack(drawn), recorded)
    return Rung(f"{sampler} noise", error, replay.budget.tolerance_of("noise"), "relative", "from the seeds")


def teacher_forced(replay: Replay, sampler: str, record: Record, schedule: Schedule) -> Rung:
    """Every step, each from the reference's own latents: errors do not add up, so the rung names the wrong step."""
    guidance, steps = float(record["guidance"]), range(len(schedule))
    advanced = [_run_step(replay, record, schedule, index, record["latents"][index]) for index in steps]
    labels = [f"step {index + 1}" for index in steps]
    rungs = []
    for position, (part, expected) in enumerate((("step", record["latents"][1:]), ("denoised", record["denoised"]))):
        # Near pure noise, a·z and b·e are hundreds and their sum is small: rounding is relative to the terms.
        terms = np.abs(schedule.coefficients[:, A_Z]) * np.abs(record["latents"][:-1]).max(axis=(1, 2, 3, 4))
        scales = [float(term) for term in terms] if part == "denoised" else [0.0] * len(steps)
        found = [pair[position] for pair in advanced]
        series = Series("step", labels, found, list(expected), scales)
        name, floors = f"{sampler} teacher-forced", f"{sampler} {part}"
        rungs.append(
            compare_series(replay.budget, name, "teacher_forced", floors, series, guidance, f"of {len(steps)}")
        )
    following, denoised = rungs
    worse = denoised if denoised.used > following.used else following
    return replace(worse, detail=f"{worse.detail}; {'denoised' if worse is denoised else 'next latents'}")


def free_running(replay: Replay, sampler: str, record: Record, schedule: Schedule) -> tuple[Array, Rung]:
    """A whole trajectory from the recorded noise: its last latents, and how far it is from the reference's."""
    guidance, steps = float(record["guidance"]), len(schedule)
    found = [record["latents"][0]]
    if replay.engine.info.loop_on_device:  # the loop on the device, which sampling uses
        found += _run_loop(replay, record, schedule)
    else:
        for index in range(steps):
            found.append(_run_step(replay, record, schedule, index, found[-1])[0])
    labels = [f"step {index + 1}" for index in range(steps)]
    series = Series("step", labels, found[1:], list(record["latents"][1:]))
    name, floors = f"{sampler} free-running", sampler
    if guidance == 1:
        name, floors = f"{name}, unguided", UNGUIDED
    if "decoded" in record:
        name, floors = f"{name}, strong", STRONG
    detail = f"of {steps}, guidance {guidance:g}"
    draws = bool(schedule.draws_noise.any())
    return found[-1], compare_series(replay.budget, name, "free_running", floors, series, guidance, detail, draws)


def _run_loop(replay: Replay, record: Record, schedule: Schedule) -> list[Array]:
    """The latents after each row of the engine's own loop, with the noise of the recorded seeds."""
    manifest, guidance = replay.bundle.manifest, Guidance(float(record["guidance"]))
    images, observations = [], replay.list_observations()
    for label, seed in zip(record["labels"], record["seeds"], strict=True):
        weights = {int(label): 1.0}
        null = manifest.model.null_class  # without a null class, the class that the records are guided away from
        own = branches_from_labels(weights, guidance, schedule, manifest.model, manifest.diffusion, null)
        request = ImageRequest(weights, int(seed), schedule, guidance, None, own, observations=observations)
        images.append(request)
    most = replay.engine.info.batch_of(len(images))
    parts = []
    for first in range(0, len(images), most):
        with Batch(replay.engine, manifest) as batch:
            batch.add(list(enumerate(images[first : first + most])))
            parts.append([batch.advance(read=True).latents.copy() for _ in range(len(schedule))])
    return [np.concatenate(each) for each in zip(*parts, strict=True)]


def _run_step(replay: Replay, record: Record, schedule: Schedule, index: int, latents: Array) -> tuple[Array, Array]:
    """The next latents and the denoised estimate of one step from the given latents."""
    batch = len(latents)
    timesteps = np.repeat(schedule.timesteps[schedule.rows[index]][None], batch, axis=0)
    images = RecordedInputs(latents, timesteps, record["labels"], float(record["guidance"]))
    coefficients = np.repeat(schedule.coefficients[index : index + 1], batch, axis=0)
    next_state, denoised = replay.run_step(images, coefficients, record["noise"][index])
    return next_state[:, 0], denoised


def decoder(replay: Replay) -> Rung:
    """The reference's latents decoded to float images, at each batch size that is verified."""
    record = replay.read_decoder_record()
    count = len(record["latents"])
    found: list[Array] = []
    asked: list[int] = []
    sizes = [batch for batch, _ in choose_shapes(replay.engine.info, "decoder", count)]
    for batch in sizes:
        for index in cover_with_batches(count, batch):
            found += list(replay.run_decoder(record["latents"][index], "decoded"))
            asked += [int(item) for item in index]
    budget = replay.budget
    # Every evaluation of an image has the floor of that image.
    floors = budget.floors.get(replay.name_of_floors("decoder"), ())
    budget = replace(budget, floors={"decoder": [floors[index] for index in asked] if len(floors) >= count else []})
    expected = [record["decoded"][index] for index in asked]
    labels = [f"image {index + 1}" for index in asked]
    series = Series("image", labels, found, expected, [float(np.abs(record["decoded"]).max())] * len(found))
    tile = "" if replay.tile is None else f"tiles of {'x'.join(map(str, replay.tile))}, "
    detail = f"{tile}batches {' '.join(map(str, sizes))}"
    return compare_series(budget, "decoder", "decoder", "decoder", series, detail=detail)


def quantized(replay: Replay) -> Rung:
    """uint8 images of the reference's latents: the mean signed difference tells truncation from rounding, and the
    difference of each channel shows a wrong order of channels."""
    record = replay.read_decoder_record()
    images = replay.run_decoder(record["latents"], "images")
    bias = (images.astype(np.float64) - record["images"]).mean(axis=(0, 1, 2))
    detail = f"mean Δ of red, green, blue {' '.join(f'{channel:+.2g}' for channel in bias)} of {LEVELS:g}"
    limit = replay.budget.tolerance_of("image_bias")
    return Rung("uint8 images", float(np.abs(bias).max()), limit, "levels", detail)


def _float_images(replay: Replay, final: Array, record: Record, floors: str) -> Rung:
    """The images of the engine's own trajectory before rounding.

    FP32's errors are below one level of uint8, so the budget is measured on these images.
    """
    series = Series(
        "image",
        [f"image {index + 1}" for index in range(len(final))],
        list(replay.run_decoder(final, "decoded")),
        list(record["decoded"]),
        [float(np.abs(record["decoded"]).max())] * len(final),
    )
    unlimited = replace(replay.budget, tolerances={**replay.budget.tolerances, "image": np.inf})
    return compare_series(unlimited, "", "image", floors, series)


def worst_psnr(found: Array, expected: Array) -> tuple[float, int]:
    """The least PSNR of uint8 images in dB, and the image's index."""
    if found.shape != expected.shape:
        return -math.inf, 0
    levels = [psnr(one, wanted) for one, wanted in zip(found, expected, strict=True)]
    worst = int(np.argmin(levels))
    return levels[worst], worst


def strong_images(replay: Replay, final: Array, record: Record, sampler: str) -> Rung:
    """The worst image of the trajectory at a strong guidance scale, against the reference's image."""
    found = replay.run_decoder(final, "images")
    floats = _float_images(replay, final, record, f"{STRONG} image")
    level, worst = worst_psnr(found, record["images"])
    where = "" if floats.first_over is None else f"{floats.detail}; "
    return replace(
        floats,
        name="image PSNR, strong",
        value=level,
        limit=replay.budget.tolerance_of("image_psnr"),
        unit="dB",
        detail=f"{where}worst: image {worst + 1} of {len(found)}; {sampler}, guidance {float(record['guidance']):g}",
        metrics={**floats.metrics, "psnr": level, "ssim": ssim(found, record["images"])},
    )


def images(replay: Replay, final: Array, sampler: str) -> tuple[tuple[Array, Array], list[Rung]]:
    """The images of the engine's own trajectory, against the reference's images. The worst image decides."""
    record, budget, final = replay.read_decoder_record(), replay.budget, replay.crop_to_tile(final)
    found, expected = replay.run_decoder(final, "images"), record["images"]
    floats = _float_images(replay, final, record, replay.name_of_floors("image"))
    detail = f"{sampler}, free-running"
    (level, worst), similarity = worst_psnr(found, expected), ssim(found, expected)
    metrics = {
        "max_abs": float(np.abs(found.astype(int) - expected.astype(int)).max()),
        "psnr": level,
        "ssim": similarity,
    }
    within = float(np.mean(np.abs(found.astype(int) - expected.astype(int)) <= 1))
    # A tile may be flat in the reference too.
    varied = [image for image, wanted in zip(found, expected, strict=True) if wanted.std()]
    spread = min((float(image.std()) for image in varied), default=math.inf)
    return (found, expected), [
        replace(
            floats,
            name="image PSNR",
            value=level,
            limit=budget.tolerance_of("image_psnr"),
            unit="dB",
            detail=f"{'' if floats.first_over is None else f'{floats.detail}; '}worst: image {worst + 1}; {detail}",
            metrics={**floats.metrics, **metrics},
        ),
        Rung("image SSIM", similarity, budget.tolerance_of("image_ssim"), "SSIM", detail),
        Rung("image within one level", within, budget.tolerance_of("image_one_level"), "share", detail),
        Rung(
            "image is not constant",
            1.0 if spread > 0 else 0.0,
            1.0,
            "share",
            f"least deviation {spread:.1f} of {LEVELS:g} levels",
        ),
    ]


def encoder(replay: Replay) -> Rung:
    """Images → latents; for an encoder with a posterior also its deviation."""
    record = replay.bundle.records(ENCODER)
    names = [tensor.name for tensor in replay.bundle.manifest.graphs[ENCODER].outputs]
    session = replay.engine.session(ENCODER)  # the pipeline encodes one image at a time
    each = [session.run({"images": image[None]}, names) for image in record["images"]]
    found = [np.concatenate(parts) for parts in zip(*each, strict=True)]
    series = Series("output", names, found, [record[name] for name in names])
    return compare_series(replay.budget, ENCODER, "encoder", "encoder", series)
