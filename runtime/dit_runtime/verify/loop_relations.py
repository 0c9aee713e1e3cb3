"""The relation of the sampling loop: what it gives each image of a mixed batch, step by step.

The images have different samplers, numbers of steps, guidance and labels; one joins later, and each leaves when it is
finished. The loop is the engine's own, which sampling uses. From each state that it had, each image's next state
follows from the step's results with that image alone (``made_images.py``), its schedule and its noise.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from dit_runtime.backends.base import Array
from dit_runtime.backends.profiles import BatchShape
from dit_runtime.backends.step import state_from_latents
from dit_runtime.samplers.guidance import Guidance, branches_from_labels
from dit_runtime.samplers.noise import Noise
from dit_runtime.samplers.schedule import A_Z, B_E, BOUND, CLEAN, INPUT, LOG_SIGMA, LOG_SIGMA_V, MATRIX, NOISE, Schedule
from dit_runtime.sampling.batch import Batch
from dit_runtime.sampling.requests import ImageRequest
from dit_runtime.verify.effort import Effort
from dit_runtime.verify.made_images import (
    Expected,
    coefficients_to_predict,
    expected_from_terms,
    factor_to_read_variance,
    variance_from_latents,
)
from dit_runtime.verify.metrics import relative_error
from dit_runtime.verify.relation import Relation
from dit_runtime.verify.replay import RecordedInputs, Replay
from dit_runtime.verify.rung import Rung
from dit_runtime.verify.updates import add_update, list_schedules

SCALES = (1.5, 1.0, 3.0)  # of guidance, image by image
# Samplers, image by image: one of the third order, one that draws noise of learned variance, one without memory. The
# first one draws no noise, so that the place of an image that draws is not its place among those that draw.
ORDER = (
    *("dpmpp-3m", "ddpm", "ddim", "euler-ancestral", "unipc", "dpmpp-2m-sde", "dpmpp-2m"),
    *("heun", "sde-heun", "euler", "sde-euler", "meanflow"),
)
SEED = 31  # of the first image
STEPS_OF_SHAPE = 3  # the last image joins in the second; a graph is captured there, and replayed in the third


class _Image(NamedTuple):
    """An image in the loop: the state ``[3, C, H, W]`` that it must have, and the row that comes next."""

    request: ImageRequest
    stream: Noise
    state: Array
    row: int


def mixed_batch(replay: Replay, effort: Effort, shapes: Sequence[BatchShape] = ()) -> Rung:
    """Each image of a mixed batch, after each step of the engine's loop, against what it must be.

    Args:
        replay: the bundle and the engine.
        effort: how many images, and steps of each.
        shapes: of a loop on a device, which is not the step's session: further batches and branches to run it at.
    """
    relation = Relation(replay.budget, "mixed batch")
    requests = make_requests(replay, effort.mixed[: replay.engine.info.batch_of(len(effort.mixed))])
    largest, _ = _run(replay, relation, requests)
    if replay.engine.info.loop_on_device:
        for batch, branches in shapes:
            _run(replay, relation, make_requests(replay, (STEPS_OF_SHAPE,) * batch, branches))
    samplers = " ".join(dict.fromkeys(request.schedule.sampler for request in requests))
    return relation.rung(f"{len(requests)} images, {largest} at once, {samplers}")


def replay_table(replay: Replay, table: Schedule) -> Iterator[Rung]:
    """A user's sampler table in the engine's loop, for images that differ in guidance and label.

    Teacher-forced, each step from the state that the loop had; free-running, the last latents against the table's
    formula in float64 around the network's outputs, which never takes the loop's latents.
    """
    most = replay.engine.info.batch_of(len(SCALES))
    requests = make_requests(replay, [table.steps] * most, table=table)
    relation = Relation(replay.budget, f"{table.sampler} teacher-forced")
    largest, states = _run(replay, relation, requests)
    yield relation.rung(f"{len(requests)} images, {largest} at once")
    factor = factor_to_read_variance(2 * replay.bundle.records("forward_1")["v"])
    walked = np.stack([_walk(replay, request, factor) for request in requests])
    limit = replay.budget.tolerance_of("free_running")
    error = relative_error(np.stack(states)[:, 0], walked)
    yield Rung(f"{table.sampler} free-running", error, limit, "relative", f"last latents of {len(requests)} images")


def _walk(replay: Replay, request: ImageRequest, factor: np.float32) -> Array:
    """The last latents of an image, float64 ``[C, H, W]``, by its schedule's formula."""
    latents, stream = request.make_initial_latents((replay.model.latent_channels, *replay.model.latent_size))
    state = np.zeros((3, *latents.shape))
    state[0] = latents
    for row, coefficients in enumerate(request.schedule.coefficients.astype(np.float64)):
        e, v = _predict(replay, request, state[0].astype(np.float32), row, factor)
        denoised = coefficients[A_Z] * state[0] + coefficients[B_E] * e.value
        state = np.einsum("ij,jchw->ichw", coefficients[MATRIX:INPUT].reshape(3, 3), state)
        state += coefficients[INPUT:LOG_SIGMA, None, None, None] * e.value
        if request.schedule.clips:
            state[0] += coefficients[CLEAN] * np.clip(denoised, -coefficients[BOUND], coefficients[BOUND])
        if request.schedule.draws_noise[row]:
            spread = np.exp(coefficients[LOG_SIGMA] + coefficients[LOG_SIGMA_V] * v) * coefficients[NOISE]
            state[0] += spread * request.draw_noise(stream, latents.shape)
    return np.asarray(state[0])


def _run(replay: Replay, relation: Relation, requests: Sequence[ImageRequest]) -> tuple[int, list[Array]]:
    """Run images in one batch, the last of which joins later, and compare each.

    Returns:
        The most images that were in the batch, and the last state of each.
    """
    shape = (replay.model.latent_channels, *replay.model.latent_size)
    images, largest, waiting = dict[int, _Image](), 0, list(enumerate(requests))
    factor = factor_to_read_variance(2 * replay.bundle.records("forward_1")["v"])
    with Batch(replay.engine, replay.bundle.manifest) as batch:
        while waiting or len(batch):
            # All but the last image at once; it joins beside images that have begun.
            joining = waiting[: max(1, len(waiting) - 1)]
            waiting = waiting[len(joining) :]
            batch.add(joining)
            for key, request in joining:
                latents, stream = request.make_initial_latents(shape)
                images[key] = _Image(request, stream, state_from_latents(latents[None])[0], 0)
            largest = max(largest, len(batch))
            advance = batch.advance(read=True)
            for place, key in enumerate(advance.keys):
                state, denoised = advance.result.state[place], advance.result.denoised[place]
                where = f"at place {place + 1} of {len(advance.keys)}"
                _check(relation, replay, images[key], [*state, denoised], where, factor)
                image = images[key]
                images[key] = image._replace(state=state.copy(), row=image.row + 1)
    return largest, [images[key].state for key in range(len(requests))]


def make_requests(
    replay: Replay, steps: Sequence[int], most: int | None = None, table: Schedule | None = None
) -> list[ImageRequest]:
    """Images that differ in sampler, steps, guidance and label; one is a mixture of labels.

    Args:
        replay: the bundle and the engine.
        steps: sampling steps of each image.
        most: guidance branches of the image with most, the first one; None makes the second one a mixture of two.
        table: the schedule of all images, in place of the named samplers'.
    """
    manifest, branches = replay.bundle.manifest, replay.engine.info.has_branches(2)
    classes, guided, requests = manifest.model.classes, branches and manifest.model.has_null, []
    for image, own_steps in enumerate(steps):
        schedule = table
        if schedule is None:
            schedules = {each.sampler: each for each in list_schedules(manifest, own_steps)}
            usable = [schedules[name] for name in ORDER if name in schedules]
            schedule = usable[image % len(usable)]
        guidance = Guidance(SCALES[image % len(SCALES)] if guided else 1.0)
        label = (3 * image + 1) % classes
        labels = {label: 1.0}
        if most is not None:
            guidance = Guidance(SCALES[0] if guided and most > 1 and not image else 1.0)
            count = min(classes, max(1, most - (guidance.scale != 1))) if not image else 1
            labels = {(label + more) % classes: 1 / count for more in range(count)}
        elif image == 1 and branches and classes > 1:
            labels = {label: 0.75, (label + 1) % classes: 0.25}
        own = branches_from_labels(labels, guidance, schedule, manifest.model, manifest.diffusion)
        observations = replay.list_observations()
        request = ImageRequest(labels, SEED + image, schedule, guidance, None, own, observations=observations)
        requests.append(request)
    return requests


def _check(
    relation: Relation, replay: Replay, image: _Image, found: list[Array], where: str, factor: np.float32
) -> None:
    """Compare an image's three slots and ``denoised`` with what they must be. Draws the image's noise."""
    request, row = image.request, image.row
    schedule, latents = request.schedule, image.state[0]
    coefficients = schedule.coefficients[row]
    noise = np.zeros_like(latents)
    if schedule.draws_noise[row]:
        noise = request.draw_noise(image.stream, latents.shape)
    e, v = _predict(replay, request, latents, row, factor)
    step = f"after row {row + 1} of {schedule.sampler}, guidance {request.guidance.scale:g}, {where}"
    add_update(relation, found, image.state, e, v, coefficients, noise, step)


def _predict(
    replay: Replay, request: ImageRequest, latents: Array, row: int, factor: np.float32
) -> tuple[Expected, Array]:
    """The guided network output of an image, from each branch alone, and the variance ``[C, H, W]`` of branch 0."""
    branches, schedule = request.branches, request.schedule
    time = np.array([schedule.timesteps[schedule.rows[row]]])
    coefficients, ones = coefficients_to_predict(1, factor), np.ones_like(latents[None])
    terms, variance = [], np.zeros_like(latents)
    for branch in range(int(branches.needed[row])):
        label = branches.labels[branch : branch + 1]
        inputs = RecordedInputs(latents[None], time, label, 1.0)
        state, e = replay.run_step(inputs, coefficients, ones)
        if not branch:
            variance = variance_from_latents(state[0, 0], factor)
        terms.append(branches.weights[row, branch][:, None, None] * e[0].astype(np.float64))
    return expected_from_terms(terms), variance
