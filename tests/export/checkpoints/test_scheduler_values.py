"""What a scheduler's configuration file may hold: unknown names and values of a wrong kind are refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from dit_export.checkpoints.diffusers_folder.scheduler import diffusion_from_config, load_scheduler
from dit_export.checkpoints.diffusers_folder.scheduler_options import KINDS, TABLE

from dit_runtime.core.errors import CheckpointError

DDIM = {"_class_name": "DDIMScheduler", "clip_sample": False}
FLAT = [0.01] * 1000
# As published folders have them, and one as people mix them.
PUBLISHED: dict[str, dict[str, Any]] = {
    "DiT-XL-2-256": {
        **{"_class_name": "DDIMScheduler", "_diffusers_version": "0.12.0.dev0", "beta_end": 0.02, "beta_start": 0.0001},
        **{"beta_schedule": "linear", "clip_sample": False, "num_train_timesteps": 1000, "steps_offset": 0},
        **{"prediction_type": "epsilon", "set_alpha_to_one": True, "trained_betas": None},
    },
    "PixArt-XL-2-512x512": {
        **{"_class_name": "DPMSolverMultistepScheduler", "_diffusers_version": "0.22.0.dev0", "solver_order": 2},
        **{"algorithm_type": "dpmsolver++", "beta_end": 0.02, "beta_schedule": "linear", "beta_start": 0.0001},
        **{"dynamic_thresholding_ratio": 0.995, "euler_at_final": False, "lambda_min_clipped": -float("inf")},
        **{"lower_order_final": True, "num_train_timesteps": 1000, "prediction_type": "epsilon", "steps_offset": 0},
        **{"sample_max_value": 1.0, "solver_type": "midpoint", "thresholding": False, "timestep_spacing": "linspace"},
        **{"trained_betas": None, "use_karras_sigmas": False, "use_lu_lambdas": False, "variance_type": None},
    },
    "a PNDM of Stable Diffusion": {
        **{"_class_name": "PNDMScheduler", "beta_end": 0.012, "beta_schedule": "scaled_linear", "beta_start": 0.00085},
        **{"num_train_timesteps": 1000, "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1},
        **{"clip_sample": False, "trained_betas": None},
    },
    "with other classes' options": {**DDIM, "shift": 3.0, "skip_prk_steps": True, "_anything": [1]},
}


def load(folder: Path, config: dict[str, Any]) -> Any:
    path = folder / "scheduler_config.json"
    path.write_text(json.dumps(config))
    return load_scheduler(path, config["_class_name"]).config


def refusal_of(folder: Path, config: dict[str, Any]) -> str | None:
    try:
        load(folder, config)
    except CheckpointError as error:
        return str(error)
    return None


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_is_common_is_read(name: str, tmp_path: Path) -> None:
    config = load(tmp_path, PUBLISHED[name])
    assert diffusion_from_config(config, 4).options.stated() == {}


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        *(("steps_offset", value, "expected a whole number") for value in (None, "1", 1.0, True, -1)),
        *(("num_train_timesteps", value, "from 2 to 10000") for value in (1, 0, -1, 1000.0, "1000", True, 10**9)),
        ("trained_betas", [], "0 trained_betas with num_train_timesteps 1000"),
        ("trained_betas", [0.01], "1 trained_betas with num_train_timesteps 1000"),
        ("trained_betas", FLAT[:500], "500 trained_betas with num_train_timesteps 1000"),
        ("trained_betas", [*FLAT[:-1], 1.0], "trained_betas holds 1; expected numbers between 0 and 1"),
        ("trained_betas", [*FLAT[:-1], "0.1"], r"trained_betas\[999\]|expected a list or null"),
        ("trained_betas", "linear", "expected a list or null"),
        *(("beta_start", value, "expected a finite number") for value in (None, "0.1", True, float("nan"), [0.1])),
        ("beta_start", 0.03, "beta_start 0.03 and beta_end 0.02; expected 0 < beta_start <= beta_end < 1"),
        ("beta_start", 0, "beta_start 0 and"),
        *(("beta_end", value, f"beta_end {value}; expected") for value in (1, -1)),
        ("beta_end", float("inf"), "expected a finite number"),
        *(("beta_schedule", value, "expected one of 'linear'") for value in ("sigmoid", "laplace", "exp", None, 1)),
        *(("prediction_type", value, "expected one of 'epsilon'") for value in ("x0", None, "flow_prediction")),
        *(("timestep_spacing", value, "expected one of 'leading'") for value in ("odd", None, 1)),
        *(("clip_sample", value, "expected true or false") for value in (None, 0, "false")),
        *(("set_alpha_to_one", value, "expected true or false") for value in (None, 1, "true")),
        *(("rescale_betas_zero_snr", value, "expected true or false") for value in (None, 0, "false")),
        *(("solver_order", value, "from 1 to 3") for value in (0, 4, 2.0, None, "2")),
        *(("use_karras_sigmas", value, "expected true or false") for value in (None, 1, "true")),
        *(("lambda_min_clipped", value, "expected a finite number") for value in (None, float("nan"), "-inf")),
        *(("disable_corrector", value, "disable_corrector") for value in (None, [-1], ["0"], 3)),
        *(("sigma_min", value, "sigma_min") for value in (0, -1.0, "0.1")),
        ("solver_p", {"_class_name": "DDIMScheduler"}, "expected null"),
        ("use_karas_sigmas", True, "did you mean use_karras_sigmas"),
        ("clip_sampel", False, "did you mean clip_sample"),
        ("entirely_novel", None, "is not an option of diffusers' schedulers"),
    ],
)
def test_wrong_values_and_names_are_refused(key: str, value: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        load(tmp_path, {**DDIM, key: value})
    assert key in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", TABLE)
def test_no_value_of_a_wrong_kind_gets_to_diffusers(kind: str, tmp_path: Path) -> None:
    """Every option of every class, with values of every kind that JSON has: read, or refused in one line by name."""
    for key in TABLE[kind]:
        for value in (None, True, -1, 2**62, 0.5, "", "1", [], [0.1], {}, float("nan")):
            config = {"_class_name": kind, "clip_sample": False, key: value}
            refusal = refusal_of(tmp_path, config)
            assert refusal is None or key in refusal or "trained_betas" in refusal, refusal
            assert "diffusers can build" not in (refusal or "")


@pytest.mark.parametrize("kind", TABLE)
def test_thresholding_is_refused_whichever_class_states_it(kind: str, tmp_path: Path) -> None:
    """A class without the option hands it on to DDIM, which thresholds."""
    with pytest.raises(CheckpointError, match=r"thresholding .*another for each image and step"):
        load(tmp_path, {"_class_name": kind, "clip_sample": False, "thresholding": True})


@pytest.mark.parametrize("kind", TABLE)
def test_a_clip_is_kept_whichever_class_states_it(kind: str, tmp_path: Path) -> None:
    """A class without the option hands it on to DDIM, which clips; a range without a clip says nothing."""
    for stated, bound in (({"clip_sample": True}, 1.0), ({"clip_sample": True, "clip_sample_range": 3}, 3.0)):
        options = diffusion_from_config(load(tmp_path, {"_class_name": kind, **stated}), 4).options
        assert options.clip_bound == bound
    without = diffusion_from_config(
        load(tmp_path, {"_class_name": kind, "clip_sample": False, "clip_sample_range": 3}), 4
    )
    assert (
        without.options == diffusion_from_config(load(tmp_path, {"_class_name": kind, "clip_sample": False}), 4).options
    )


def test_few_betas_need_few_timesteps(tmp_path: Path) -> None:
    config = load(tmp_path, {**DDIM, "trained_betas": FLAT[:500], "num_train_timesteps": 500})
    assert len(diffusion_from_config(config, 4).betas) == 500
    assert set(KINDS) >= set(TABLE["DDIMScheduler"])
