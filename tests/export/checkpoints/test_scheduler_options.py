"""Every option of diffusers' schedulers is applied as the unpatched scheduler applies it, or refused by its name."""

from __future__ import annotations

import inspect
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_lms_discrete import LMSDiscreteScheduler
from dit_export.checkpoints.diffusers_folder.scheduler import diffusion_from_config, load_scheduler
from dit_export.checkpoints.diffusers_folder.scheduler_options import HANDED_ON, KINDS, OWN, TABLE
from dit_export.reference.loops import diffusers_ddpm
from support.diffusers_schedulers import follow
from support.grids import grid
from support.schedules import LEARNED, SHAPE, network, normal, run_table

from dit_runtime.bundle.manifest import DiffusionSpec, SchedulerOptions
from dit_runtime.core.errors import CheckpointError, SamplingError
from dit_runtime.samplers.by_name import schedule_for
from dit_runtime.samplers.options import CLASSES, DDIM, DDPM, DPM, EULER_ANCESTRAL, INERT, PROCESS, STEPS, UNIPC, Only
from dit_runtime.samplers.schedule import Schedule

# diffusers itself gives LMSDiscreteScheduler only beside SciPy, which its defaults do not need.
KINDS_OF_SCHEDULERS: dict[str, Any] = {
    name: LMSDiscreteScheduler if name == "LMSDiscreteScheduler" else getattr(diffusers, name) for name in TABLE
}
BASE = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02, "clip_sample": False}
COSINE = {"beta_schedule": "squaredcos_cap_v2"}
STEPS_TAKEN = 10
LIMIT = 1e-5  # measured: 6.7e-6, DPM-Solver with the cosine's betas; others 2e-6
# The lowest noise level decides these, of which float32's 1 − ᾱ keeps 4 digits.
LEVELS_LIMIT = 2.5e-4  # measured: 1.7e-4, Lu with the cosine's betas; others 7.1e-5
OF_LEVELS = ("use_karras_sigmas", "use_exponential_sigmas", "use_lu_lambdas")


def options_of(kind: str) -> dict[str, Any]:
    """Options and their defaults, as diffusers' own signature has them."""
    parameters = list(inspect.signature(KINDS_OF_SCHEDULERS[kind].__init__).parameters.values())[1:]
    return {item.name: item.default for item in parameters}


def diffusion_of(folder: Path, config: dict[str, Any]) -> DiffusionSpec:
    path = folder / "scheduler_config.json"
    path.write_text(json.dumps(config))
    return diffusion_from_config(load_scheduler(path, config["_class_name"]).config, 4)


def own_run(scheduler: Any, noise: Any, steps: int) -> tuple[list[float], Any, Any, list[bool]]:
    """A free run of the unpatched scheduler: timesteps, latents, the noise that it drew, and where."""
    scheduler.set_timesteps(steps)
    generator, twin = torch.Generator().manual_seed(5), torch.Generator().manual_seed(5)
    takes = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
    x = torch.from_numpy(noise) * scheduler.init_noise_sigma
    # DPM-Solver draws in float32 whatever the latents are.
    dtype = torch.float32 if "Solver" in type(scheduler).__name__ else torch.float64
    drawn, drew = np.zeros((len(scheduler.timesteps), *noise.shape)), []
    for index, t in enumerate(scheduler.timesteps):
        e, v = network(scheduler.scale_model_input(x, t).numpy(), float(t))
        learned = scheduler.config.get("variance_type") == "learned_range" and type(scheduler).__name__ == DDPM
        output = np.concatenate([e, v], axis=1) if learned else e
        before = generator.get_state()
        x = scheduler.step(torch.from_numpy(output), t, x, **takes).prev_sample
        drew.append(not torch.equal(before, generator.get_state()))
        if drew[-1]:
            drawn[index] = torch.randn(noise.shape, generator=twin, dtype=dtype).numpy()
    return scheduler.timesteps.tolist(), x.numpy(), drawn, drew


def scheduler_for(sampler: str, config: dict[str, Any]) -> Any:
    """The unpatched scheduler that users would sample with: made from the folder's own, as diffusers' manual says."""
    own = KINDS_OF_SCHEDULERS[config["_class_name"]].from_config(config)
    named = {"dpmpp-2m-sde": {"algorithm_type": "sde-dpmsolver++"}, "dpmpp-3m": {"solver_order": 3}}.get(sampler, {})
    clipping = {"clip_sample": config["clip_sample"]} if CLASSES[sampler] in (DDIM, DDPM) else {}
    return KINDS_OF_SCHEDULERS[CLASSES[sampler]].from_config(own.config, **named, **clipping)


def assert_is_the_unpatched(schedule: Schedule, scheduler: Any) -> None:
    noise = normal(3, *SHAPE)
    timesteps, latents, drawn, drew = own_run(scheduler, noise, schedule.steps)
    assert schedule.timesteps[schedule.rows].tolist() == pytest.approx(timesteps, rel=1e-6)
    assert schedule.draws_noise.tolist() == drew
    found = run_table(schedule, noise * float(schedule.start[0]), drawn, network)[-1].sample
    if not np.isfinite(latents).all():
        # diffusers divides by the length of the last step, which is left out here where it has none.
        assert schedule.sampler == "dpmpp-3m"
        assert scheduler.sigmas[-1] == scheduler.sigmas[-2]
        assert np.isfinite(found).all()
        return
    assert_near(found, latents, scheduler)


def assert_near(found: Any, latents: Any, scheduler: Any) -> None:
    config = scheduler.config
    # A clip may make the last latents smaller than those that the errors are of, which are about 1.
    largest = max(float(np.abs(latents).max()), 1.0 if config.get("clip_sample") else 0.0)
    error = float(np.abs(found - latents).max()) / largest
    low = any(config.get(name) for name in OF_LEVELS) or config.get("final_sigmas_type") == "sigma_min"
    limit = LEVELS_LIMIT if low else LIMIT
    assert error <= limit, f"relative error {error:.2e}, limit {limit:.1e}"


# By option, values that are not the default of the class that a sampler is; booleans are the other one.
VALUES: dict[str, list[Any]] = {
    "num_train_timesteps": [500],
    "beta_start": [2e-4],
    "beta_end": [0.015],
    "beta_schedule": ["scaled_linear", "squaredcos_cap_v2"],
    "trained_betas": [np.linspace(1e-4, 0.03, 1000).tolist()],
    "prediction_type": ["v_prediction", "sample", "flow_prediction"],
    "timestep_spacing": ["leading", "trailing", "linspace"],
    "steps_offset": [1],
    "variance_type": ["fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range"],
    "algorithm_type": ["sde-dpmsolver++", "dpmsolver", "sde-dpmsolver", "deis"],
    "solver_order": [1, 2, 3],
    "solver_type": ["midpoint", "heun", "logrho", "bh1", "bh2"],
    "final_sigmas_type": ["sigma_min"],
    "lambda_min_clipped": [-5.1, -1.0],
    "disable_corrector": [[0, 1, 4]],
    "sigma_min": [0.05],
    "sigma_max": [50.0],
    "solver_p": [{}],
    "shift_terminal": [0.1],
    "flow_shift": [3.0],
    "time_shift_type": ["linear"],
    "dynamic_thresholding_ratio": [0.9],
    "sample_max_value": [2.0],
    "clip_sample_range": [2.0],
}
# diffusers cuts the output to three channels, and fails on latents; DPM-Solver here gets the latent channels. Its
# ancestral sampler has no case for the prediction of x₀.
FAILS_IN_DIFFUSERS = [(DPM, "variance_type", "learned_range"), (EULER_ANCESTRAL, "prediction_type", "sample")]
ALONE = [
    (kind, {option: value})
    for kind in (DDIM, DDPM, EULER_ANCESTRAL, DPM, UNIPC)
    for option, default in options_of(kind).items()
    for value in VALUES.get(option, [not default])
    if (kind, option, value) not in FAILS_IN_DIFFUSERS
]
ZERO_SNR = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
# Options that change each other, and options that another class hands on.
TOGETHER = [
    *((kind, ZERO_SNR | {"timestep_spacing": "trailing"}) for kind in (DDIM, DDPM, DPM, UNIPC)),
    *((kind, {"use_karras_sigmas": True, "prediction_type": "v_prediction"}) for kind in (DPM, UNIPC)),
    *((kind, {"use_karras_sigmas": True, "sigma_min": 0.05, "sigma_max": 50.0}) for kind in (DPM, UNIPC)),
    *((kind, {"use_exponential_sigmas": True, "sigma_min": 0.05, "sigma_max": 50.0}) for kind in (DPM, UNIPC)),
    *((kind, {"use_exponential_sigmas": True, "beta_start": 8.5e-4, "beta_end": 0.012}) for kind in (DPM, UNIPC)),
    *((kind, {"final_sigmas_type": "sigma_min", "use_karras_sigmas": True}) for kind in (DPM, UNIPC)),
    *((kind, {"final_sigmas_type": "sigma_min", "lower_order_final": False}) for kind in (DPM, UNIPC)),
    *((kind, {"beta_schedule": "squaredcos_cap_v2", "use_exponential_sigmas": True}) for kind in (DPM, UNIPC)),
    (DPM, {"beta_schedule": "squaredcos_cap_v2", "use_lu_lambdas": True}),
    (DPM, {"beta_schedule": "squaredcos_cap_v2", "lambda_min_clipped": -5.1}),
    (DPM, {"beta_schedule": "squaredcos_cap_v2", "lambda_min_clipped": -5.1, "timestep_spacing": "leading"}),
    (DPM, {"final_sigmas_type": "sigma_min", "euler_at_final": True, "lower_order_final": False}),
    (DPM, {"final_sigmas_type": "sigma_min", "solver_type": "heun"}),
    (DPM, {"use_karras_sigmas": True, "use_lu_lambdas": True}),
    (DPM, {"algorithm_type": "sde-dpmsolver++", "solver_type": "heun", "final_sigmas_type": "sigma_min"}),
    (DPM, {"solver_order": 3, "lower_order_final": False}),
    (UNIPC, {"final_sigmas_type": "sigma_min", "solver_type": "bh1"}),
    (UNIPC, {"final_sigmas_type": "sigma_min", "solver_type": "bh1", "solver_order": 1}),
    (UNIPC, {"disable_corrector": [0, 1, 2, 3, 4, 5, 6, 7, 8], "use_karras_sigmas": True}),
    (DDPM, {"variance_type": "learned_range", "steps_offset": 1}),
    (DDPM, {"variance_type": "learned_range", "timestep_spacing": "trailing", "prediction_type": "v_prediction"}),
    ("HeunDiscreteScheduler", {"use_karras_sigmas": True}),
    ("EulerDiscreteScheduler", {"use_exponential_sigmas": True, "sigma_min": 0.05, "final_sigmas_type": "sigma_min"}),
    ("LMSDiscreteScheduler", {"use_karras_sigmas": True}),
    ("DEISMultistepScheduler", {"solver_type": "heun", "lower_order_final": False}),
    ("DPMSolverSinglestepScheduler", {"solver_type": "heun", "lambda_min_clipped": -1.0}),
    (UNIPC, {"solver_type": "heun"}),
    *((kind, {"clip_sample": True, "clip_sample_range": bound}) for kind in (DDIM, DDPM) for bound in (1.0, 0.3)),
    *(
        (kind, {"clip_sample": True, "prediction_type": each})
        for kind in (DDIM, DDPM)
        for each in ("sample", "v_prediction")
    ),
    *((kind, {"clip_sample": True, **COSINE}) for kind in (DDIM, DDPM, DPM)),
    (DDPM, {"clip_sample": True, "variance_type": "learned_range"}),
    (DDIM, {"clip_sample": True, "set_alpha_to_one": False}),
    ("HeunDiscreteScheduler", {"clip_sample": True}),
]


@pytest.mark.parametrize(
    ("case", "steps"),
    grid(
        [(case, steps) for case in range(len(ALONE + TOGETHER)) for steps in (STEPS_TAKEN, 3, 20)],
        fast=lambda case, steps: steps == STEPS_TAKEN,
    ),
)
def test_an_option_is_that_of_the_unpatched_scheduler_or_refused_by_name(case: int, steps: int, tmp_path: Path) -> None:
    kind, options = (ALONE + TOGETHER)[case]
    config = {"_class_name": kind, **BASE, **options}
    diffusion = refusal = None
    try:
        diffusion = diffusion_of(tmp_path, config)
    except CheckpointError as error:
        refusal = str(error)
    if diffusion is None:
        assert refusal is not None
        assert any(option in refusal for option in options), refusal
        return
    own = [sampler for sampler, runs in CLASSES.items() if kind == runs or kind not in CLASSES.values()]
    for sampler in (sampler for sampler in own if sampler != "ddpm" or kind == DDPM):
        assert_is_run_or_refused(sampler, diffusion, config, options, steps)


@pytest.mark.parametrize("skipped", [1, 3, 9])
@pytest.mark.parametrize(
    ("sampler", "options"),
    [
        ("unipc", {"disable_corrector": [0, 4]}),
        ("unipc", {"final_sigmas_type": "sigma_min", "solver_type": "bh1"}),
        ("dpmpp-2m", {"use_karras_sigmas": True, "solver_type": "heun"}),
        ("dpmpp-2m-sde", {"algorithm_type": "sde-dpmsolver++", "final_sigmas_type": "sigma_min"}),
        ("dpmpp-3m", {"solver_order": 3, "lower_order_final": False, "lambda_min_clipped": -1.0}),
    ],
)
def test_options_hold_from_an_image_on(sampler: str, options: dict[str, Any], skipped: int, tmp_path: Path) -> None:
    """Fails if an option counts its steps from the start of image-to-image, or is lost there."""
    config = {"_class_name": CLASSES[sampler], **BASE, **options}
    schedule = schedule_for(sampler, LEARNED, diffusion_of(tmp_path, config), STEPS_TAKEN, skipped=skipped)
    scheduler, z = scheduler_for(sampler, config), normal(4, *SHAPE)
    scheduler.set_timesteps(STEPS_TAKEN)
    timesteps = schedule.timesteps[schedule.rows].tolist()
    assert timesteps == scheduler.timesteps[skipped:].tolist()
    expected = follow(sampler, scheduler, z, timesteps, skipped=skipped)
    assert_near(run_table(schedule, z, expected.noise, network)[-1].sample, expected.samples[-1], scheduler)


@pytest.mark.parametrize("kind", [DDIM, "PNDMScheduler", "DEISMultistepScheduler"])
def test_options_go_to_the_samplers_whose_class_has_them(kind: str, tmp_path: Path) -> None:
    """As diffusers hands a configuration on, also what the folder's own class does not have."""
    stray = {"use_karras_sigmas": True, "variance_type": "fixed_small", "euler_at_final": True}
    config = {"_class_name": kind, **BASE, **stray, "disable_corrector": [2], "timestep_spacing": "trailing"}
    diffusion = diffusion_of(tmp_path, config)
    found = {sampler: schedule_for(sampler, LEARNED, diffusion, STEPS_TAKEN) for sampler in CLASSES}
    for sampler, schedule in found.items():
        assert_is_the_unpatched(schedule, scheduler_for(sampler, config))
    solvers = {"dpmpp-2m", "dpmpp-2m-sde", "dpmpp-3m", "unipc"}
    assert {name: schedule.spacing for name, schedule in found.items()} == {
        name: "karras" if name in solvers else "trailing" for name in CLASSES
    }


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"variance_type": "learned_range", "steps_offset": 1},
        {"variance_type": "fixed_large", "timestep_spacing": "trailing", "prediction_type": "v_prediction"},
    ],
)
def test_the_golden_records_are_made_with_the_same_scheduler(options: dict[str, Any], tmp_path: Path) -> None:
    """Fails if the reference's trajectory is another variance or spacing than that of the folder's DDPM."""
    config = {"_class_name": DDPM, **BASE, **options}
    (tmp_path / "scheduler_config.json").write_text(json.dumps(config))
    scheduler = load_scheduler(tmp_path / "scheduler_config.json", DDPM)
    noise, taken = normal(3, 1, *SHAPE[1:]), []
    z = torch.from_numpy(noise)
    for step in diffusers_ddpm(scheduler.config, STEPS_TAKEN, True, [torch.Generator().manual_seed(5)]):
        e, v = network(z.numpy(), step.t)
        z, _ = step.advance(torch.from_numpy(e), torch.from_numpy(v), z)
        taken.append(step.t)
    timesteps, latents, _, _ = own_run(scheduler_for("ddpm", config), noise, STEPS_TAKEN)
    assert taken == timesteps
    assert np.array_equal(z.numpy(), latents)


def assert_is_run_or_refused(
    sampler: str, diffusion: DiffusionSpec, config: dict[str, Any], options: dict[str, Any], steps: int
) -> None:
    refusal = None
    try:
        schedule = schedule_for(sampler, LEARNED, diffusion, steps)
    except SamplingError as error:
        refusal = str(error)
    if refusal is None:
        assert_is_the_unpatched(schedule, scheduler_for(sampler, config))
        return
    # diffusers cannot begin at a timestep that comes twice either.
    assert any(option in refusal for option in options) or "visit their first timestep twice" in refusal, refusal


def test_every_option_of_diffusers_is_in_the_table() -> None:
    """An option that the installed diffusers has and the table lacks would be ignored."""
    for kind in TABLE:
        assert set(TABLE[kind]) == set(options_of(kind)), kind
        assert set(TABLE[kind]) <= set(KINDS)
    uses = {use for kind in TABLE for use in TABLE[kind].values() if not isinstance(use, Only)}
    assert uses == {PROCESS, STEPS, INERT, HANDED_ON, OWN}
    # A bundle has every option that the steps follow from.
    carried = {name for kind in CLASSES.values() for name, use in TABLE[kind].items() if use == STEPS}
    assert carried <= {item.name for item in fields(SchedulerOptions)}


def test_every_option_has_a_value_to_compare() -> None:
    compared = {(kind, option) for kind, options in ALONE for option in options}
    assert compared == {(kind, option) for kind in {*CLASSES.values()} for option in options_of(kind)}
