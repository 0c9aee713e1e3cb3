"""MeanFlow's sampler and a model of two times at run time: its table, its settings, and what is refused by name.

The formula is ``meanflow_sampler.py`` of zhuyu-cs/MeanFlow, written out again: z_r = z_t − (t − r)·u(z_t, r, t).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from support.schedules import (
    AVERAGE,
    DIFFUSION,
    FIXED,
    MIX,
    PAIRED,
    Float64,
    assert_close,
    normal,
    run_table,
    started,
)
from support.sit import spec_of

from dit_runtime.backends.conditioning import inputs_from_conditions
from dit_runtime.core.errors import SamplingError
from dit_runtime.samplers.by_name import SAMPLERS, count_skipped_steps, samplers_for, schedule_for
from dit_runtime.samplers.guidance import Guidance, branches_from_labels, check_guidance, is_guidable, noise_times_of
from dit_runtime.samplers.schedule import Schedule, read_table, write_table
from dit_runtime.sampling.tables import check_table
from dit_runtime.tuning.request import TuneRequest
from dit_runtime.tuning.tune import fit_table

LIMIT = 1e-6  # measured: 7.1e-8, the rounding of the table's float32 numbers
SHAPE = (2, 4, 5)


def average_velocity(z: Float64, t: float, r: float) -> Float64:
    """u(z_t, r, t): not the same with t and r exchanged, or with t − r in the place of r."""
    mixed = np.einsum("ij,bjk->bik", MIX, z)
    return 0.6 * z + 0.5 * np.tanh(mixed + 2 * t - 0.7 * r) - 0.3 * np.cos(3 * r)


def network_of(second_time: str) -> Any:
    """The same network behind what the schedule gives it."""

    def network(z: Float64, times: list[float]) -> tuple[Float64, Float64]:
        t, second = times
        return average_velocity(z, t, t - second if second_time == "t-r" else second), np.zeros_like(z)

    return network


def walk(z: Float64, steps: int, skipped: int = 0) -> list[tuple[Float64, Float64]]:
    """The latents after each step, and the estimate of the clean ones: where u leads from t to 0."""
    found = []
    for index in range(skipped, steps):
        t, r = 1 - index / steps, 1 - (index + 1) / steps
        u = average_velocity(z, t, r)
        found.append((z - (t - r) * u, z - t * u))
        z = found[-1][0]
    return found


def schedule_of(steps: int, second_time: str = "t-r", skipped: int = 0) -> Schedule:
    return schedule_for("meanflow", PAIRED, replace(AVERAGE, second_time=second_time), steps, skipped=skipped)


@pytest.mark.parametrize("second_time", ["t-r", "r"])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_the_table_is_the_formula(steps: int, second_time: str) -> None:
    """Fails if times, their order or the step's length are others, whichever second time the network gets."""
    schedule, z = schedule_of(steps, second_time), normal(3, *SHAPE)
    found = run_table(schedule, z, np.zeros((steps, *SHAPE)), network_of(second_time))
    assert (len(schedule), schedule.steps, schedule.timesteps.shape) == (steps, steps, (steps, 2))
    assert not schedule.draws_noise.any()
    for step, (latents, clean) in zip(found, walk(z, steps), strict=True):
        assert_close(step.sample, latents, LIMIT)
        assert_close(step.denoised, clean, LIMIT)
    assert_close(found[-1].denoised, found[-1].sample, LIMIT)


def test_one_step_goes_all_the_way() -> None:
    """z_0 = z_1 − u(z_1, 0, 1), in the numbers that the network gets."""
    assert schedule_of(1).timesteps.tolist() == [[1.0, 1.0]]
    assert schedule_of(1, "r").timesteps.tolist() == [[1.0, 0.0]]
    assert schedule_of(2).timesteps.tolist() == [[1.0, 0.5], [0.5, 0.5]]
    assert schedule_of(2, "r").timesteps.tolist() == [[1.0, 0.5], [0.5, 0.0]]


@pytest.mark.parametrize("path", ["linear", "gvp"])
def test_it_starts_from_an_image(path: str) -> None:
    """The steps that are left begin at α·x + σ·noise on the model's path."""
    steps, skipped = 5, count_skipped_steps(5, 0.6)
    schedule = schedule_for("meanflow", PAIRED, replace(AVERAGE, path=path), steps, skipped=skipped)
    x, noise, t = normal(4, *SHAPE), normal(5, *SHAPE), 1 - skipped / steps
    angle = np.pi / 2 * t
    alpha, sigma = (1 - t, t) if path == "linear" else (np.cos(angle), np.sin(angle))
    z = started(schedule, x, noise)
    assert_close(z, alpha * x + sigma * noise, LIMIT)
    found = run_table(schedule, z, np.zeros((len(schedule), *SHAPE)), network_of("t-r"))
    for step, (latents, _) in zip(found, walk(z, steps, skipped), strict=True):
        assert_close(step.sample, latents, LIMIT)


@pytest.mark.parametrize(
    "fault",
    [
        lambda s: s.timesteps[:, ::-1],  # swapped
        lambda s: np.stack([s.timesteps[:, 0], 0 * s.timesteps[:, 0]], axis=1),  # no second time
        lambda s: np.stack([s.timesteps[:, 0], s.timesteps[:, 0] - s.timesteps[:, 1]], axis=1),  # r for t − r
        lambda s: np.stack([1 - s.timesteps[:, 0], s.timesteps[:, 1]], axis=1),  # the other way round
    ],
    ids=["swapped", "left out", "r for t - r", "reversed"],
)
def test_the_test_sees_faults(fault: Any) -> None:
    """The network of these tests tells them apart."""
    schedule, z = schedule_of(3), normal(3, *SHAPE)
    wrong = replace(schedule, timesteps=np.ascontiguousarray(fault(schedule)))
    found = run_table(wrong, z, np.zeros((3, *SHAPE)), network_of("t-r"))[-1].sample
    assert np.abs(found - walk(z, 3)[-1][0]).max() > 0.01


def test_a_model_of_two_times_has_its_own_sampler() -> None:
    """Every other sampler is refused by name, and this one with every other model."""
    assert samplers_for(AVERAGE) == ("meanflow",)
    for name in SAMPLERS:
        if name != "meanflow":
            with pytest.raises(SamplingError, match=rf"{name} with a model of two times.*: expected one of meanflow"):
                schedule_for(name, PAIRED, AVERAGE, 4)
    for spec in (DIFFUSION, spec_of("linear")):
        with pytest.raises(SamplingError, match="sampler meanflow with a model of prediction type"):
            schedule_for("meanflow", FIXED, spec, 4)
    with pytest.raises(SamplingError, match="0 steps: expected 1 to 10000"):
        schedule_of(0)
    with pytest.raises(SamplingError, match="timestep spacing 'karras' with sampler meanflow: its steps are uniform"):
        schedule_for("meanflow", PAIRED, AVERAGE, 4, spacing="karras")


def test_guidance_inside_the_weights() -> None:
    """A scale other than 1, and weights of labels that would bring the null class in, are refused with the reason."""
    schedule = schedule_of(2)
    assert not is_guidable(PAIRED, AVERAGE)
    check_guidance(Guidance(1.0), {1: 0.7, 2: 0.3}, AVERAGE)
    for guidance, labels, what in (
        (Guidance(4.0), {1: 1.0}, "guidance 4"),
        (Guidance(0.0), {1: 1.0}, "guidance 0"),
        (Guidance(1.0), {1: 0.7, 2: 0.7}, "label weights that sum to 1.4"),
    ):
        with pytest.raises(SamplingError, match=f"{what}: guidance was trained into this model's weights"):
            check_guidance(guidance, labels, AVERAGE)
        check_guidance(guidance, labels, replace(AVERAGE, guidance_inside=False))
    assert noise_times_of(schedule, AVERAGE).tolist() == [1.0, 0.5]
    assert branches_from_labels({1: 1.0}, Guidance(), schedule, PAIRED, AVERAGE).weights.shape == (2, 1, 4)


def test_a_table_of_two_times(tmp_path: Path) -> None:
    """It is a file of pairs, for models of two times alone."""
    write_table(schedule_of(2), tmp_path / "mean.json")
    table = read_table(tmp_path / "mean.json")
    assert table.times.tolist() == [[1.0, 0.5], [0.5, 0.5]]
    paired, single = (
        SimpleNamespace(model=model, diffusion=spec) for model, spec in ((PAIRED, AVERAGE), (FIXED, spec_of("linear")))
    )
    check_table(table, paired, "")  # type: ignore[arg-type]
    with pytest.raises(SamplingError, match="a sampler table with 2 times in a row: this model gets one time"):
        check_table(table, single, "")  # type: ignore[arg-type]
    other = schedule_for("euler", FIXED, spec_of("linear"), 2)
    with pytest.raises(SamplingError, match="a sampler table with one time in a row: this model gets 2 times"):
        check_table(other, paired, "")  # type: ignore[arg-type]
    far = replace(table, timesteps=table.timesteps * 3)
    with pytest.raises(SamplingError, match=r"timesteps 1.5 to 3: this model's timesteps are 0 to 1"):
        check_table(far, paired, "")  # type: ignore[arg-type]


def test_the_conditioner_gets_pairs() -> None:
    """A row of the conditioning table is of both times and the label."""
    inputs = inputs_from_conditions([((1.0, 0.5), 3), ((0.5, 0.5), 3)])
    assert inputs["timesteps"].tolist() == [[1.0, 0.5], [0.5, 0.5]]
    assert inputs["labels"].tolist() == [3, 3]


def test_few_step_tables_are_refused() -> None:
    """``dit-tune`` has nothing to fit: one step is the model's own."""
    source = SimpleNamespace(name="mean.pt")
    pipe = SimpleNamespace(manifest=SimpleNamespace(model=PAIRED, source=source))
    with pytest.raises(SamplingError, match=r"mean.pt: gets two times .*; use its own sampler with 1 or 2 steps"):
        fit_table(pipe, TuneRequest(2))  # type: ignore[arg-type]
