"""What a scheduler's configuration leaves out has the default of the diffusers class that would run."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
from diffusers.schedulers.scheduling_lms_discrete import LMSDiscreteScheduler
from dit_export.checkpoints.diffusers_folder.scheduler import SCHEDULERS, diffusion_from_config, load_scheduler
from support.schedules import FIXED, timesteps_of

from dit_runtime.bundle.manifest import DiffusionSpec
from dit_runtime.samplers.by_name import schedule_for

# diffusers itself gives LMSDiscreteScheduler only beside SciPy, which its defaults do not need.
CLASSES: dict[str, Any] = {
    name: LMSDiscreteScheduler if name == "LMSDiscreteScheduler" else getattr(diffusers, name) for name in SCHEDULERS
}
RUNS: dict[str, tuple[Any, dict[str, Any]]] = {
    "ddim": (diffusers.DDIMScheduler, {}),
    "dpmpp-2m": (diffusers.DPMSolverMultistepScheduler, {}),
    "dpmpp-2m-sde": (diffusers.DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
    "dpmpp-3m": (diffusers.DPMSolverMultistepScheduler, {"solver_order": 3}),
    "unipc": (diffusers.UniPCMultistepScheduler, {}),
    "euler-ancestral": (diffusers.EulerAncestralDiscreteScheduler, {}),
}
# No value but None and False is a default of the class that states it.
STATED: dict[str, Any] = {
    "num_train_timesteps": 500,
    "beta_start": 0.0003,
    "beta_end": 0.015,
    "beta_schedule": "scaled_linear",
    "trained_betas": None,
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
    "steps_offset": 1,
    "rescale_betas_zero_snr": True,
    "clip_sample": False,
    "thresholding": False,
}
EVERYTHING = "everything"  # apart from clip_sample, without which some classes clip
STEPS = 10
BETAS_LIMIT = 5e-6  # measured: 3.2e-6, diffusers' float32 rescaling to zero terminal SNR
LIMIT = 1e-6  # measured: 3.6e-7, diffusers' float32 products of up to a thousand factors


def keys_of(kind: str) -> list[str]:
    return list(inspect.signature(CLASSES[kind].__init__).parameters)[1:]


def stated_by(kind: str) -> dict[str, Any]:
    """A configuration of a class, which states all of the class's settings that have to do with a bundle."""
    config = {key: value for key, value in STATED.items() if key in keys_of(kind)}
    if "set_alpha_to_one" in keys_of(kind):
        default = inspect.signature(CLASSES[kind].__init__).parameters["set_alpha_to_one"].default
        config["set_alpha_to_one"] = not default
    return {"_class_name": kind, **config}


def leave_out(kind: str, key: str, spacing: str) -> dict[str, Any]:
    config = stated_by(kind)
    if "timestep_spacing" in config:
        config["timestep_spacing"] = spacing
    if key == EVERYTHING:
        return {name: value for name, value in config.items() if name in ("_class_name", "clip_sample")}
    if key == "prediction_type":  # its default, ε, is refused with zero terminal SNR
        config.pop("rescale_betas_zero_snr", None)
    config.pop(key, None)
    return config


def diffusion_of(folder: Path, config: dict[str, Any]) -> DiffusionSpec:
    path = folder / "scheduler_config.json"
    path.write_text(json.dumps(config))
    return diffusion_from_config(load_scheduler(path, config["_class_name"]).config, 4)


def assert_defaults_are_diffusers(diffusion: DiffusionSpec, config: dict[str, Any]) -> None:
    """The process is that of the class in the file; each sampler has the settings that its own class gets from it."""
    own = CLASSES[config["_class_name"]].from_config(config)
    assert len(diffusion.betas) == own.config.num_train_timesteps
    assert np.allclose(diffusion.betas, own.betas.numpy(), rtol=0, atol=BETAS_LIMIT)
    assert diffusion.prediction_type == own.config.prediction_type
    # One bundle has one process: the betas of Heun's class go with it, although diffusers forgets unstated ones.
    process = {"beta_start": own.config.beta_start, "beta_end": own.config.beta_end}
    for sampler, (kind, settings) in RUNS.items():
        expected = kind.from_config(own.config, **settings, **process)
        expected.set_timesteps(STEPS)
        schedule = schedule_for(sampler, FIXED, diffusion, STEPS)
        assert timesteps_of(schedule) == pytest.approx(expected.timesteps.tolist(), rel=1e-6), sampler
        if sampler == "ddim":
            assert diffusion.set_alpha_to_one == expected.config.set_alpha_to_one
            continue
        signal = 1 / np.sqrt(1 + expected.sigmas.numpy().astype(np.float64)[:-1] ** 2)
        assert np.allclose(schedule.initial[:, 0], signal, rtol=0, atol=LIMIT), sampler
        if sampler == "euler-ancestral":
            start = float(expected.init_noise_sigma) * signal[0]
            assert float(schedule.start[0]) == pytest.approx(start, rel=LIMIT)


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize(
    ("kind", "key"),
    [(kind, key) for kind in SCHEDULERS for key in (*stated_by(kind), EVERYTHING) if key != "_class_name"],
)
def test_what_is_left_out_is_the_default_of_the_class_that_runs(
    kind: str, key: str, spacing: str, tmp_path: Path
) -> None:
    config = leave_out(kind, key, spacing)
    diffusion = diffusion_of(tmp_path, config)
    assert (diffusion.options.clip_bound is not None) == bool(
        CLASSES[kind].from_config(config).config.get("clip_sample")
    )
    assert_defaults_are_diffusers(diffusion, config)


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_what_is_stated_is_kept(kind: str, tmp_path: Path) -> None:
    config = stated_by(kind)
    assert_defaults_are_diffusers(diffusion_of(tmp_path, config), config)


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_values_that_are_noted_as_defaults_are_not_stated(kind: str, tmp_path: Path) -> None:
    """diffusers lists in ``_use_default_values`` what nobody stated; another class does not get these values."""
    unstated = [key for key in stated_by(kind) if key not in ("_class_name", "clip_sample", "num_train_timesteps")]
    config = {**stated_by(kind), "_use_default_values": unstated}
    assert_defaults_are_diffusers(diffusion_of(tmp_path, config), config)


@pytest.mark.parametrize("stated", [False, True])
def test_a_bundle_says_whether_the_spacing_was_stated(stated: bool, tmp_path: Path) -> None:
    config = {"_class_name": "DDIMScheduler", "clip_sample": False}
    if stated:
        config["timestep_spacing"] = "leading"
    diffusion = diffusion_of(tmp_path, config)
    assert diffusion.timestep_spacing == ("leading" if stated else "default")
    # The record of a schedule names the spacing that it has.
    found = {name: schedule_for(name, FIXED, diffusion, STEPS).spacing for name in RUNS}
    solvers = "leading" if stated else "linspace"
    assert found == {name: "leading" if name == "ddim" else solvers for name in RUNS}


def test_the_settings_compared_are_all_that_a_bundle_takes() -> None:
    """A key that load_scheduler hands on and this table does not leave out would be compared with nothing."""
    taken = set(inspect.signature(diffusers.DDIMScheduler.__init__).parameters) - {"self"}
    thresholding_only = {"dynamic_thresholding_ratio", "clip_sample_range", "sample_max_value"}
    assert taken - thresholding_only == {*STATED, "set_alpha_to_one"}
