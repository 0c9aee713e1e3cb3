"""From a pipeline to a few-step table: the teacher once, a search for the times, a fit of the rows, a judgement."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from dit_runtime.core.errors import ParityError, SamplingError
from dit_runtime.core.progress import Progress
from dit_runtime.core.version import __version__
from dit_runtime.pipeline import Pipeline
from dit_runtime.samplers.by_name import count_default_steps
from dit_runtime.samplers.fitted import FittedFor, HeldOut
from dit_runtime.samplers.noise import Float32
from dit_runtime.samplers.schedule import Schedule
from dit_runtime.sampling.labels import Label
from dit_runtime.sampling.requests import ImageRequest
from dit_runtime.tuning.grid import Grid, grid_from_schedule
from dit_runtime.tuning.judge import Judgement, decode_all, judge, mean_squares, named_schedules, psnr_of
from dit_runtime.tuning.network import Network
from dit_runtime.tuning.own_path import path_positions
from dit_runtime.tuning.refine import refine_rows
from dit_runtime.tuning.request import BATCH_SIZE, MOST_STEPS, PICTURES, Teacher, TuneRequest
from dit_runtime.tuning.student import Positions, Student, fit_greedily, schedule_from_student
from dit_runtime.tuning.teacher import check_states, states_of_teacher
from dit_runtime.tuning.times import Fitted, log_ratio_positions, search_positions, uniform_positions

NAME, SPACING = "few", "fitted"
TEACHERS = ("ddim", 200), ("heun", 100)  # of ε and v prediction, and of velocity models
PULL = 1e-6
LEAST_STEPS = 2  # of a table that reaches a PSNR
SEARCHED = 16  # images that the search for the times looks at
FITS_A_STEP = 9  # fits of the search for each step, about: for the time left


@dataclass(frozen=True)
class Tuned:
    """A fitted table and how good it is.

    Attributes:
        schedule: the table; ``write_table`` writes it, and ``Pipeline`` samples with it.
        judgement: its figures on held-out images beside those of the named samplers.
        start: the times that the search started from: ``uniform`` or ``log-snr`` spacing, or ``trajectory``, the best
            on the teacher's own trajectory.
        starts_db: PSNR on the images of the search, with each of these times.
        searched_db: the same with the times that were found.
        evaluations: latents that the network was asked about in the fit, beside the teacher.
        state_bytes: of the teacher's latents in memory.
    """

    schedule: Schedule
    judgement: Judgement
    start: str
    starts_db: dict[str, float]
    searched_db: float
    evaluations: int
    state_bytes: int

    @property
    def is_best(self) -> bool:
        """Whether no named sampler is nearer to the teacher's held-out images."""
        best = self.judgement.best
        return best is None or best.psnr_db <= self.judgement.table.psnr_db


@dataclass(frozen=True)
class _Lesson:
    """What is fitted and what is held out.

    ``states`` and ``held_states`` are the teacher's latents ``[K + 1, N, C, H, W]``.
    """

    request: TuneRequest
    grid: Grid
    images: list[ImageRequest]
    held: list[ImageRequest]
    states: Float32
    held_states: Float32


def tune(
    pipe: Pipeline,
    steps: int,
    teacher: Teacher | None = None,
    pictures: int = PICTURES,
    labels: Sequence[Label] | None = None,
    guidance: float | Sequence[float] | None = None,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    seed: int = 0,
    batch_size: int = BATCH_SIZE,
) -> Tuned:
    """Fit a few-step table to a bundle. Nothing is written but the teacher's latents, in the engine store.

    Args:
        pipe: with the bundle and its engine.
        steps: network evaluations of the table.
        guidance: one scale, or several that one table serves.
        teacher, pictures, labels, guidance_interval, seed, batch_size: as the fields of ``TuneRequest``.

    Raises:
        SamplingError: the request does not fit the model, or latents are not finite.
        ParityError: a named sampler is nearer to the teacher on the held-out images.
    """
    scales = (guidance,) if isinstance(guidance, int | float) else guidance
    request = TuneRequest(
        steps=steps,
        teacher=teacher,
        pictures=pictures,
        labels=None if labels is None else tuple(labels),
        guidance=None if scales is None else tuple(scales),
        guidance_interval=guidance_interval,
        seed=seed,
        batch_size=batch_size,
    )
    tuned = fit_table(pipe, request)
    require_best(tuned)
    return tuned


def require_best(tuned: Tuned) -> None:
    """Raises ParityError where a named sampler is better than the table."""
    best, table = tuned.judgement.best, tuned.judgement.table
    if best is not None and not tuned.is_best:
        raise ParityError(
            f"few-step table of {tuned.schedule.steps} steps: {table.psnr_db:.1f} dB on held-out images, and "
            f"{best.name} has {best.psnr_db:.1f} dB, so the table is not used; fit more --pictures, or sample with "
            f"{best.name}"
        )


def fit_table(pipe: Pipeline, request: TuneRequest) -> Tuned:
    """Fit and judge a table, whether or not it is better than the named samplers.

    Raises:
        SamplingError: the request does not fit the model, or latents are not finite.
    """
    lesson = _prepare(pipe, request)
    student, start, starts, searched, evaluations = _fit(pipe, lesson)
    schedule = schedule_from_student(student, lesson.grid, f"{NAME}-{request.steps}", SPACING)
    named = list(named_schedules(pipe, request.steps))
    with Progress("comparing", len(named) + 1) as bar:
        judgement = judge(
            pipe, lesson.held, lesson.held_states[-1], [(schedule.sampler, schedule), *named], request.batch_size,
            bar.advance,
        )  # fmt: skip
    return Tuned(
        schedule=replace(schedule, fitted=_record(pipe, lesson, judgement)),
        judgement=judgement,
        start=start,
        starts_db=starts,
        searched_db=searched,
        evaluations=evaluations,
        state_bytes=lesson.states.nbytes + lesson.held_states.nbytes,
    )


def _prepare(pipe: Pipeline, request: TuneRequest) -> _Lesson:
    """Check the whole request, then run the teacher."""
    if pipe.manifest.model.times > 1:
        raise SamplingError(
            f"{pipe.manifest.source.name}: gets two times and predicts the average velocity of a whole step "
            "(MeanFlow), so it needs no few-step table; use its own sampler with 1 or 2 steps"
        )
    images = _teacher_images(pipe, request)
    grid = grid_from_schedule(images[0].schedule)
    if request.steps >= len(grid):
        raise SamplingError(
            f"{request.steps} steps of a few-step table: the teacher has {len(grid)}; expected fewer than it has"
        )
    check_states(pipe, len(grid), len(images))
    pipe.check_batch(1)
    size = pipe.engine.info.batch_of(request.batch_size)
    with Progress("teacher", len(grid) * -(-len(images) // size)) as bar:
        states = states_of_teacher(pipe, images, request.batch_size, bar.advance)
    half = len(images) - len(images) // 2
    return _Lesson(request, grid, images[:half], images[half:], states[:, :half], states[:, half:])


def _teacher_images(pipe: Pipeline, request: TuneRequest) -> list[ImageRequest]:
    """The images to make with the teacher; the first half are fitted."""
    manifest = pipe.manifest
    flow, total = manifest.diffusion.path is not None, request.pictures
    sampler, steps, *spacing = request.teacher or TEACHERS[flow]
    if request.teacher is None:
        steps = count_default_steps(sampler, manifest.model, manifest.diffusion, steps)
    half = total - total // 2
    labels = list(request.labels or _spread(manifest.model.classes))
    scales = list(request.guidance or (manifest.defaults.guidance,))
    # Labels and scales begin anew in the half that is held out, so that both halves have the same.
    order = [*range(half), *range(total - half)]
    chosen: list[Label] = [labels[(at // len(scales)) % len(labels)] for at in order]
    return pipe.prepare(
        chosen,
        seeds=request.seed,
        sampler=sampler,
        steps=steps,
        spacing=spacing[0] if spacing else None,
        guidance=[scales[at % len(scales)] for at in order],
        guidance_interval=request.guidance_interval,
    )


def _spread(classes: int) -> list[int]:
    """All classes, in an order whose beginning is spread over them: by the golden ratio."""
    if classes < 2:
        return [0]
    stride = next(step for step in range(max(round(classes * 0.618), 1), 2 * classes) if np.gcd(step, classes) == 1)
    return [index * stride % classes for index in range(classes)]


def _fit(pipe: Pipeline, lesson: _Lesson) -> tuple[Student, str, dict[str, float], float, int]:
    """The fitted student, the spacing it started from, and the PSNR of the starts and of what the search found."""
    grid, steps, size = lesson.grid, lesson.request.steps, lesson.request.batch_size
    wanted = decode_all(pipe, lesson.states[-1], size)
    with Network(pipe, lesson.images, size) as network, Progress("fitting", FITS_A_STEP * steps) as bar:

        def fit(count: int, positions: Positions, before: Fitted | None) -> Fitted:
            known = None if before is None else (before.student, before.walk)
            student, walk = fit_greedily(network, grid, lesson.states[:, :count], positions, PULL, known)
            made = decode_all(pipe, walk.latents[-1].astype(np.float32), size)
            return Fitted(student, walk, float(mean_squares(made, wanted[:count]).mean()))

        few = min(SEARCHED, len(lesson.images))
        spacings = {"uniform": uniform_positions(grid, steps), "log-snr": log_ratio_positions(grid, steps)}
        spacings["trajectory"] = path_positions(grid, lesson.states[:, :few], list(spacings.values()), PULL)
        starts = {name: fit(few, positions, None) for name, positions in spacings.items()}
        start = min(starts, key=lambda name: starts[name].error)
        found = search_positions(lambda at, known: fit(few, at, known), starts[start], len(grid), bar.advance)
        whole = _fit_rows(network, lesson, found.student.positions, bar.advance)
        levels = {name: float(psnr_of(each.error)) for name, each in starts.items()}
        return whole, start, levels, float(psnr_of(found.error)), network.evaluations


def _fit_rows(network: Network, lesson: _Lesson, positions: Positions, tried: Callable[[], None]) -> Student:
    """The rows at these positions, on all images: one by one, then all together."""
    student, walk = fit_greedily(network, lesson.grid, lesson.states, positions, PULL)
    return refine_rows(network, lesson.grid, lesson.states, student, walk, tried)[0]


def _record(pipe: Pipeline, lesson: _Lesson, judgement: Judgement) -> FittedFor:
    table, best, schedule = judgement.table, judgement.best, lesson.grid.schedule
    images: Sequence[ImageRequest] = lesson.images
    return FittedFor(
        bundle=pipe.bundle.digest,
        model=pipe.manifest.source.name,
        size=pipe.manifest.image_size,
        teacher=f"{schedule.sampler}:{schedule.steps}",
        teacher_spacing=schedule.spacing,
        guidance=tuple(sorted({image.guidance.scale for image in images})),
        guidance_interval=lesson.request.guidance_interval,
        labels=tuple(max(image.labels, key=image.labels.__getitem__) for image in images),
        seed=lesson.request.seed,
        engine=pipe.engine.info.name,
        version=__version__,
        held_out=HeldOut(
            pictures=len(lesson.held),
            psnr_db=round(table.psnr_db, 3),
            psnr_low_db=round(table.low_db, 3),
            psnr_high_db=round(table.high_db, 3),
            latent_error=table.latent_error,
            named=best.name if best else "none",
            named_psnr_db=round(best.psnr_db, 3) if best else 0.0,
        ),
    )


def fit_until(pipe: Pipeline, request: TuneRequest, level_db: float) -> Tuned:
    """Fit tables of more and more steps until one reaches ``level_db`` on the held-out images.

    Raises:
        SamplingError: no table of up to ``MOST_STEPS`` steps does, or as ``fit_table``.
    """
    best = 0.0
    for steps in range(LEAST_STEPS, MOST_STEPS + 1):
        tuned = fit_table(pipe, replace(request, steps=steps))
        best = max(best, tuned.judgement.table.psnr_db)
        if tuned.is_best and tuned.judgement.table.psnr_db >= level_db:
            return tuned
    raise SamplingError(
        f"no table of up to {MOST_STEPS} steps reaches {level_db:g} dB on held-out images, the best {best:.1f} dB; ask "
        "for less, or fit more --pictures"
    )
