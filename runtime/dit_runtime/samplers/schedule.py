"""A schedule, which is a sampler's work as numbers, and the sampler table, its JSON file.

The state has three slots: s₀, the latents z_t as the network gets them, and s₁ and s₂, the sampler's memory. With the
guided network output e and the learned-variance channels v, one row of 17 numbers (a, b, A row by row, B, g, h, k)
means

    denoised = a·s₀ + b·e
    s'ᵢ      = Σⱼ Aᵢⱼ·sⱼ + Bᵢ·e          i = 0, 1, 2
    s'₀     += exp(g + h·v)·k·noise

The step graph evaluates one row for each image. At run time a sampler does nothing else.

A row of a model that clips has two numbers more, a bound r and a weight w, and means

    denoised = a·s₀ + b·e, between −r and r
    s'₀     += w·denoised

so A and B are what does not go through the clip. The clip is in no sampler's A and B, because a value beyond the bound
may be thousands of times larger, and would leave its rounding in the sum.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dit_runtime.core.decode import Range, decode, read_json, replace_controls, show
from dit_runtime.core.errors import SamplingError
from dit_runtime.core.reading import TABLE_BYTES
from dit_runtime.core.replace import replace_file
from dit_runtime.samplers.fitted import FittedFor

COEFFICIENTS = 17
CLIPPED = 19  # numbers of a row with a clip

# Of numbers in a schedule. DPM-Solver++ at LEAST_ALPHA_BAR needs 4096; above 8e6, 1/float32's resolution, terms of a
# row would cancel to nothing.
LARGEST = 1e6

LONGEST_NAME = 255  # characters of a sampler's name, which goes into the record of an image
MOST_ROWS = 20_000  # of a sampler table: of Heun at the most steps that a velocity model takes
MOST_STARTS = 16

OPTIONAL = ("sampler", "spacing", "rows", "initial", "start", "draws_noise", "completes_step", "skipped", "fitted")

# Columns of a row.
A_Z, B_E = 0, 1  # denoised = a·s₀ + b·e
MATRIX = 2  # nine numbers, row by row
INPUT = 11  # three numbers
LOG_SIGMA, LOG_SIGMA_V, NOISE = 14, 15, 16  # g, h, k
BOUND, CLEAN = 17, 18  # r, w

NO_BOUND = float(np.finfo(np.float32).max)

Float64 = NDArray[np.float64]

# A combination of s₀, s₁, s₂ and e is four numbers, its weights.
S0, S1, S2, E = np.eye(4)
NOTHING = np.zeros(4)


@dataclass(frozen=True)
class Schedule:
    """A sampler's work for one image: T network evaluations at U distinct times.

    Attributes:
        sampler: the sampler's name, for the record.
        spacing: how the timesteps were chosen, for the record.
        timesteps: float32 ``[U]``, the distinct timesteps that the network gets; of a model of two times ``[U, 2]``.
        rows: int32 ``[T]``, the index in ``timesteps`` of each evaluation.
        coefficients: float32 ``[T, 17]``, a row for each evaluation; ``[T, 19]`` with a clip.
        initial: float32 ``[T, 2]``, scales of signal and noise in z before each row, where image-to-image can start.
        start: float32 ``[S]``: z before the first row is Σᵢ startᵢ · the i-th draw of noise. In image-to-image
            ``initial[0]``, with the image and the first draw, replaces the first term.
        draws_noise: bool ``[T]``, whether the reference draws noise at this row, so that seeds agree with it.
        completes_step: bool ``[T]``, False for an inner evaluation, which is not a step of its own.
        skipped: steps that were left out before the first row; above 0 the schedule needs an image to start from.
        fitted: what a table of ``dit-tune`` was fitted for; None for every other schedule.
    """

    sampler: str
    spacing: str
    timesteps: NDArray[np.float32]
    rows: NDArray[np.int32]
    coefficients: NDArray[np.float32]
    initial: NDArray[np.float32]
    start: NDArray[np.float32]
    draws_noise: NDArray[np.bool_]
    completes_step: NDArray[np.bool_]
    skipped: int = 0
    fitted: FittedFor | None = None

    @property
    def clips(self) -> bool:
        """Whether the rows have a bound of the denoised estimate."""
        return int(self.coefficients.shape[1]) == CLIPPED

    @property
    def uses_variance(self) -> bool:
        """Whether any row depends on v, the learned variance."""
        return bool(np.any(self.coefficients[:, LOG_SIGMA_V] != 0))

    @property
    def steps(self) -> int:
        """Completed steps, without the skipped ones."""
        return int(self.completes_step.sum())

    @property
    def times(self) -> NDArray[np.float32]:
        """The times of each evaluation ``[T, 1]``, of a model of two times ``[T, 2]``."""
        return self.timesteps[self.rows].reshape(len(self.rows), -1)

    def __len__(self) -> int:
        return len(self.rows)


def make_row(
    denoised: Float64,
    z: Float64,
    memory: Float64 = NOTHING,
    memory_2: Float64 = NOTHING,
    noise: float = 0.0,
    log_sigma: tuple[float, float] = (0.0, 0.0),
    clip: tuple[float, float] | None = None,
) -> Float64:
    """One row ``[17]`` from combinations ``[4]`` of (s₀, s₁, s₂, e): the denoised estimate and the next state's slots.

    ``noise`` is k, the scale of the row's noise. ``log_sigma`` is (g, h), for noise with a scale that depends on v.
    ``clip`` is (r, w), the bound of the denoised estimate and its weight in z, for a row ``[19]``.
    """
    matrix = np.stack([z, memory, memory_2])
    more = () if clip is None else clip
    return np.concatenate([denoised[[0, 3]], matrix[:, :3].reshape(-1), matrix[:, 3], log_sigma, [noise], more])


def widen_rows(coefficients: NDArray[np.float32], clips: bool) -> NDArray[np.float32]:
    """Rows ``[…, 17 or 19]`` as the step of a model takes them: ``[…, 19]`` where it ``clips``, else ``[…, 17]``.

    A row without a bound gets one that no number is beyond. A row that has one stays as it is.
    """
    if not clips or coefficients.shape[-1] == CLIPPED:
        return coefficients
    more = np.broadcast_to(np.array([NO_BOUND, 0], np.float32), (*coefficients.shape[:-1], 2))
    return np.concatenate([coefficients, more], axis=-1)


def drop_clip(coefficients: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rows ``[T, 17]`` that do what ``[T, 17 or 19]`` do to latents whose denoised estimate is within the bound."""
    plain = coefficients[:, :COEFFICIENTS].copy()
    if coefficients.shape[1] == CLIPPED:
        plain[:, MATRIX] += coefficients[:, CLEAN] * coefficients[:, A_Z]
        plain[:, INPUT] += coefficients[:, CLEAN] * coefficients[:, B_E]
    return plain


def schedule_from_rows(
    sampler: str,
    spacing: str,
    times: ArrayLike,
    rows: Sequence[Float64] | Float64,
    initial: ArrayLike,
    draws: ArrayLike = False,
    completes: ArrayLike = True,
    start: Sequence[float] = (1.0,),
    skipped: int = 0,
) -> Schedule:
    """A schedule from one time, row and pair of scales (signal, noise) for each evaluation, all in float64.

    A model of two times has a pair of times for each evaluation.

    Raises:
        SamplingError: a number that is not finite, or above ``LARGEST``.
    """
    evaluated = np.asarray(times, np.float64).astype(np.float32)
    distinct, first, inverse = np.unique(evaluated, return_index=True, return_inverse=True, axis=0)
    order = np.argsort(first)
    with np.errstate(over="ignore", invalid="ignore"):
        coefficients = np.asarray(rows, np.float64).astype(np.float32)
    count = len(evaluated)
    bad = np.flatnonzero(~(np.abs(coefficients) <= LARGEST).all(axis=1))
    if len(bad) or not np.isfinite(np.asarray(start)).all():
        where = f"step {bad[0] + 1} of {count}" if len(bad) else "the start"
        raise SamplingError(
            f"sampler {sampler} with {spacing} spacing: its formula has no usable value at {where} of this noise "
            "schedule; use another sampler, spacing or number of steps"
        )
    return Schedule(
        sampler=sampler,
        spacing=spacing,
        timesteps=distinct[order],
        rows=np.argsort(order)[inverse.reshape(-1)].astype(np.int32),
        coefficients=coefficients,
        initial=np.asarray(initial, np.float64).astype(np.float32),
        start=np.asarray(start, np.float64).astype(np.float32),
        draws_noise=np.broadcast_to(np.asarray(draws, np.bool_), count).copy(),
        completes_step=np.broadcast_to(np.asarray(completes, np.bool_), count).copy(),
        skipped=skipped,
    )


def skip_steps(schedule: Schedule, skipped: int) -> Schedule:
    """The schedule without its first ``skipped`` steps, to start from an image.

    This suits samplers without memory; a multistep sampler begins again at order 1 instead (``schedule_for``).

    Raises:
        SamplingError: no step would be left, a row would read a slot that only skipped rows wrote, or the schedule
            starts from several draws of noise and does not say which of them the latents have there.
    """
    if not skipped:
        return schedule
    check_skipped(skipped, schedule.steps)
    if len(schedule.start) > 1:
        raise SamplingError(
            f"sampler table {schedule.sampler}: it starts from {len(schedule.start)} draws of noise, expected one to "
            f"start after step {skipped}: it does not say which draws belong there; use strength 1 or a named sampler"
        )
    first = int(np.flatnonzero(schedule.completes_step)[skipped - 1]) + 1
    if unwritten := _find_unwritten_read(schedule.coefficients[first:]):
        raise SamplingError(
            f"sampler table {schedule.sampler}: after step {skipped}, row {first + unwritten[0]} reads slot "
            f"{unwritten[1]}, which only skipped rows write; expected rows that read only slots written after the "
            "start: use strength 1, or a named sampler, which makes new rows for its start"
        )
    used, rows = np.unique(schedule.rows[first:], return_inverse=True)
    return replace(
        schedule,
        timesteps=schedule.timesteps[used],
        rows=rows.reshape(-1).astype(np.int32),
        coefficients=schedule.coefficients[first:],
        initial=schedule.initial[first:],
        draws_noise=schedule.draws_noise[first:],
        completes_step=schedule.completes_step[first:],
        skipped=schedule.skipped + skipped,
    )


def check_skipped(skipped: int, steps: int) -> None:
    """Raises SamplingError for a number of skipped steps that is negative, or leaves no step to run."""
    if not 0 <= skipped < steps:
        raise SamplingError(f"{skipped} of {steps} steps skipped: expected 0 to {steps - 1}, so that one is left")


def write_table(schedule: Schedule, path: Path) -> None:
    """Write a schedule as a sampler table: JSON with every field by its name. ``read_table`` gives it back exactly."""
    values = {item.name: getattr(schedule, item.name) for item in fields(Schedule)}
    fitted = values.pop("fitted")
    if fitted is not None:
        values["fitted"] = asdict(fitted)
    plain = {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in values.items()}
    with replace_file(path) as file:
        file.write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")


def read_table(path: Path) -> Schedule:
    """The schedule of a sampler table: a JSON file that ``write_table`` or the user wrote.

    ``timesteps [U]`` (``[U, 2]`` of a model of two times) and ``coefficients [T, 17]``, or ``[T, 19]`` with a clip, are
    required. The other fields have defaults: ``rows`` is 0 … T−1, ``start`` [1], ``draws_noise`` true where k is not 0,
    ``completes_step`` true, ``initial`` [0, 1] in every row (no image-to-image), ``skipped`` 0. ``fitted`` says what a
    table of ``dit-tune`` was fitted for.

    Raises:
        SamplingError: the file cannot be read, or the step graph cannot run its rows.
    """
    try:
        raw = read_json(path, TABLE_BYTES)
        if type(raw) is dict:
            _check_lengths(raw)
            raw = {**{name: None for name in OPTIONAL if name not in raw}, **raw}
        with np.errstate(over="ignore"):  # what float32 cannot hold is refused by its name
            schedule = _schedule_from_record(decode(_kind_of_record(raw), raw), replace_controls(path.stem))
        _check(schedule)
    except (ValueError, OverflowError) as error:
        if isinstance(error.__cause__, OSError):
            raise SamplingError(
                f"{path}: cannot read this sampler table ({error.__cause__.strerror}); expected a JSON file"
            ) from error
        raise SamplingError(
            f"{path}: not a sampler table ({error}); expected JSON with timesteps [U] and coefficients [T, 17], or "
            "[T, 19] with a clip, as dit-sample --write-table writes it"
        ) from error
    return schedule


def _check_lengths(raw: dict[str, object]) -> None:
    """Raises ValueError for lists that no sampler needs: their numbers would take long to look at, and to sample with.

    Each start is a draw of noise as large as the latents.
    """
    for name, value in raw.items():
        most = MOST_STARTS if name == "start" else MOST_ROWS
        if type(value) is list and len(value) > most:
            raise ValueError(f"{name} has {len(value)} values, expected at most {most}")


@dataclass(frozen=True)
class _TableRecord:
    """The content of a sampler table; None is a field that the file leaves out."""

    timesteps: tuple[float, ...] | tuple[tuple[float, float], ...]
    coefficients: tuple[tuple[float, ...], ...]
    sampler: str | None
    spacing: str | None
    rows: tuple[int, ...] | None
    initial: tuple[tuple[float, ...], ...] | None
    start: tuple[float, ...] | None
    draws_noise: tuple[bool, ...] | None
    completes_step: tuple[bool, ...] | None
    skipped: Annotated[int, Range(0, LARGEST)] | None
    fitted: FittedFor | None


@dataclass(frozen=True)
class _OneTime(_TableRecord):
    timesteps: tuple[float, ...]


@dataclass(frozen=True)
class _TwoTimes(_TableRecord):
    timesteps: tuple[tuple[float, float], ...]


def _kind_of_record(raw: object) -> type[_TableRecord]:
    """What to read a sampler table as, by its first timestep, so that a message says where the first wrong one is."""
    timesteps = raw.get("timesteps") if isinstance(raw, dict) else None
    paired = isinstance(timesteps, list) and timesteps and isinstance(timesteps[0], list)
    return _TwoTimes if paired else _OneTime


def _schedule_from_record(record: _TableRecord, name: str) -> Schedule:
    """Raises ValueError or OverflowError for numbers that make no array."""
    rows = np.asarray(range(len(record.coefficients)) if record.rows is None else record.rows, np.int64)
    if not np.array_equal(rows, rows.astype(np.int32)):
        raise OverflowError("rows beyond int32")  # NumPy 1.26 would let them wrap around
    for text in (record.sampler, record.spacing):
        if text is not None and len(text) > LONGEST_NAME:
            raise ValueError(f"sampler or spacing {show(text)} has {len(text)} characters")
    coefficients = np.asarray(record.coefficients, np.float32)
    count = len(coefficients)
    if coefficients.shape[1:] not in ((COEFFICIENTS,), (CLIPPED,)):
        raise ValueError(
            f"coefficients has shape {list(coefficients.shape)}, expected [{count}, {COEFFICIENTS}], or "
            f"[{count}, {CLIPPED}] with a clip"
        )
    draws = coefficients[:, NOISE] != 0 if record.draws_noise is None else record.draws_noise
    completes = [True] * count if record.completes_step is None else record.completes_step
    return Schedule(
        sampler=name if record.sampler is None else record.sampler,
        spacing="custom" if record.spacing is None else record.spacing,
        timesteps=np.asarray(record.timesteps, np.float32),
        rows=rows.astype(np.int32),
        coefficients=coefficients,
        initial=np.asarray([[0, 1]] * count if record.initial is None else record.initial, np.float32),
        start=np.asarray([1.0] if record.start is None else record.start, np.float32),
        draws_noise=np.asarray(draws, np.bool_),
        completes_step=np.asarray(completes, np.bool_),
        skipped=record.skipped or 0,
        fitted=record.fitted,
    )


def _check(schedule: Schedule) -> None:
    """Raises ValueError for a schedule that the loop or the step graph cannot run."""
    count = len(schedule.rows)
    shapes = {
        "timesteps": (len(schedule.timesteps), *schedule.timesteps.shape[1:2]),
        "rows": (count,),
        "coefficients": (count, CLIPPED if schedule.clips else COEFFICIENTS),
        "initial": (count, 2),
        "start": (len(schedule.start),),
        "draws_noise": (count,),
        "completes_step": (count,),
    }
    for name, shape in shapes.items():
        value = getattr(schedule, name)
        if value.shape != shape:
            raise ValueError(f"{name} has shape {list(value.shape)}, expected {list(shape)}")
        if not (np.abs(value) <= LARGEST).all():
            raise ValueError(f"{name} holds a number that is not finite or above {LARGEST:.0e}")
    if not count or not len(schedule.start) or not schedule.completes_step[-1]:
        raise ValueError("expected at least one row and one start, and a last row that completes a step")
    if schedule.rows.min() < 0 or schedule.rows.max() >= len(schedule.timesteps):
        raise ValueError(f"rows leave 0 to {len(schedule.timesteps) - 1}, the timesteps")
    g, h, k = schedule.coefficients[:, LOG_SIGMA:BOUND].T
    if (g[k == 0] != 0).any() or (h[k == 0] != 0).any():
        raise ValueError("g and h must be 0 where k is 0: 0·exp(g + h·v) could be no number")
    if (k[~schedule.draws_noise] != 0).any():
        raise ValueError("a row with k other than 0 must draw noise")
    if schedule.clips and not (schedule.coefficients[:, BOUND] > 0).all():
        raise ValueError("a bound r must be above 0")
    if unwritten := _find_unwritten_read(schedule.coefficients):
        raise ValueError(f"row {unwritten[0]} reads slot {unwritten[1]} before any row wrote it")


def _find_unwritten_read(rows: NDArray[np.float32]) -> tuple[int, int] | None:
    """The first row of ``[T, 17 or 19]`` that reads a slot before a row wrote it, and the slot; None if none does."""
    written = {0}
    for index, coefficients in enumerate(rows):
        matrix = coefficients[MATRIX:INPUT].reshape(3, 3)
        read = {slot for slot in range(3) if matrix[:, slot].any()}
        if not read <= written:
            return index, max(read - written)
        written |= {slot for slot in range(3) if matrix[slot].any() or coefficients[INPUT + slot]}
    return None
