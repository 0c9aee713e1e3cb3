"""Reads a diffusers scheduler's configuration as a forward process: which betas, and what the network predicts."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler

from dit_export.checkpoints.diffusers_folder.scheduler_options import (
    TABLE,
    check_config,
    leave_out_options,
    options_of_config,
    own_sampler,
    take_own_values,
)
from dit_export.checkpoints.diffusers_modules import explain_config_errors, read_json_object
from dit_runtime.bundle.manifest import DiffusionSpec
from dit_runtime.core.errors import CheckpointError, SamplingError
from dit_runtime.samplers.options import DDIM, DDPM, THRESHOLDS, check_options
from dit_runtime.samplers.spacing import UNSTATED

logger = logging.getLogger("dit_runtime.export")  # a command prints what is logged below dit_runtime

# Schedulers of diffusion models: the configuration describes the same forward process, whichever of them samples.
SCHEDULERS = tuple(TABLE)
# Defaults of the forward process, of the classes whose defaults are not DDIMScheduler's.
OWN_DEFAULTS = {"HeunDiscreteScheduler": {"beta_start": 0.00085, "beta_end": 0.012}}
LEAST_BOUND, MOST_BOUND = 1e-6, 1e6  # of a clip
# The forward process of the published DiT.
LINEAR_BETAS = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02, "clip_sample": False}


def class_of_scheduler(path: Path, index: Mapping[str, Any]) -> str:
    """The class that diffusers makes of a scheduler's configuration file: the one that ``model_index.json`` lists.

    Args:
        path: of the configuration file, whose own class counts where ``index`` lists none.
        index: the pipeline's ``model_index.json``.

    Raises:
        CheckpointError: for a class that does not describe the forward process of a diffusion model.
    """
    own = read_json_object(path, constants=True).get("_class_name")
    listed = index.get("scheduler")
    kind = own
    where = f"{path.parents[1] / 'model_index.json'}: lists the scheduler as"
    if isinstance(listed, list) and len(listed) == 2 and listed[0] == "diffusers":
        kind = listed[1]
    elif listed not in (None, [None, None]):
        raise CheckpointError(
            f"{where} {json.dumps(listed)}, and no code but diffusers' is run; expected one of its classes, such as "
            '["diffusers", "DDIMScheduler"]'
        )
    for found, place in ((own, f"{path}: is a"), (kind, where)):
        if found not in SCHEDULERS:
            raise CheckpointError(
                f"{place} {found}; expected the scheduler of a diffusion model, such as DDIMScheduler (for velocity "
                "models see --family sit)"
            )
    if kind != own:
        logger.info("%s %s, and %s says %s; the former was taken, as diffusers does", where, kind, path.name, own)
    return str(kind)


def load_scheduler(path: Path, kind: str) -> DDIMScheduler:
    """A ``DDIMScheduler`` with the forward process that a scheduler's configuration file describes.

    Its ``config`` also has what the file states for other classes, as diffusers keeps it: another class made from this
    config gets these options. What the file does not state of the forward process has the default of the file's class.
    Timestep spacing, offset and final alpha say how to sample: unstated, they stay defaults, which diffusers does not
    hand to another class.

    Args:
        path: of the configuration file.
        kind: the class that is made of it, as ``class_of_scheduler`` tells: what the file does not state has its
            defaults.

    Raises:
        CheckpointError: an unknown key, a value of a wrong kind, or an option that no
            sampler table can hold.
    """
    config = read_json_object(path, constants=True)  # diffusers' DPM-Solver states -Infinity
    with explain_config_errors(path):
        # diffusers' note of which values are defaults and not stated; like diffusers, forget these.
        unstated = config.get("_use_default_values", ())
        config = {key: value for key, value in config.items() if key not in unstated}
    if (own := config["_class_name"]) != kind:
        config = leave_out_options(own, kind, config)
    check_config(path, kind, config)
    config = {**OWN_DEFAULTS.get(kind, {}), **take_own_values(kind, config)}
    if config.get("thresholding"):
        raise CheckpointError(f"{path}: thresholding is not supported ({THRESHOLDS.reason}); set it to false")
    # DDIMScheduler and DDPMScheduler clip by default: without the key in the file, they clip.
    config.setdefault("clip_sample", kind in (DDIM, DDPM))
    check_clip(path, config)
    if kind == DDPM and config.get("variance_type") is None:
        config["variance_type"] = "fixed_small"
    check_betas(path, config)
    names = DDIMScheduler().config.keys()
    settings = {key: value for key, value in config.items() if key in names and not key.startswith("_")}
    others = {key: value for key, value in config.items() if key not in names and not key.startswith("_")}
    with explain_config_errors(path):
        scheduler = DDIMScheduler(**{**settings, "thresholding": False})
        scheduler.register_to_config(**others)
        betas = betas_of(scheduler.config)
        options = options_of_config(scheduler.config)
    if not all(0 < beta < 1 for beta in betas[:-1]) or not 0 < betas[-1] <= 1:
        raise CheckpointError(f"{path}: betas are not between 0 and 1; download or copy it again")
    try:
        for sampler in ("ddpm", own_sampler(kind, options)):  # the golden records have a trajectory of ddpm
            check_options(sampler, options)
    except SamplingError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return scheduler


def check_clip(path: Path, config: Mapping[str, Any]) -> None:
    """Raises CheckpointError where a checked configuration clips to a range that is none."""
    bound = config.get("clip_sample_range", 1.0)
    if config["clip_sample"] and not LEAST_BOUND <= bound <= MOST_BOUND:
        raise CheckpointError(
            f"{path}: clip_sample_range {bound:g}; expected a number from {LEAST_BOUND:g} to {MOST_BOUND:g}"
        )


def check_betas(path: Path, config: Mapping[str, Any]) -> None:
    """Raises CheckpointError where a checked configuration's numbers make no betas, or betas of pure noise for ε."""
    trained, count = config.get("trained_betas"), config.get("num_train_timesteps", 1000)
    start, end = config.get("beta_start", 1e-4), config.get("beta_end", 0.02)
    if trained is not None:
        if len(trained) != count:
            raise CheckpointError(
                f"{path}: {len(trained)} trained_betas with num_train_timesteps {count}; expected one for each timestep"
            )
        if not all(0 < beta < 1 for beta in trained):
            wrong = next(beta for beta in trained if not 0 < beta < 1)
            raise CheckpointError(f"{path}: trained_betas holds {wrong:g}; expected numbers between 0 and 1")
    elif config.get("beta_schedule", "linear") != "squaredcos_cap_v2" and not 0 < start <= end < 1:
        raise CheckpointError(
            f"{path}: beta_start {start:g} and beta_end {end:g}; expected 0 < beta_start <= beta_end < 1"
        )
    if config.get("rescale_betas_zero_snr") and config.get("prediction_type", "epsilon") == "epsilon":
        raise CheckpointError(
            f"{path}: rescale_betas_zero_snr with epsilon prediction: at the first timestep the noise says nothing "
            "about the image; expected prediction_type 'v_prediction', or rescale_betas_zero_snr false"
        )
    low, high = config.get("sigma_min"), config.get("sigma_max")
    if (low is not None and low <= 0) or (high is not None and high <= (low or 0)):
        raise CheckpointError(
            f"{path}: sigma_min {low} and sigma_max {high}; expected numbers above 0, the second larger, or null"
        )


def betas_of(config: Any) -> tuple[float, ...]:
    """The betas of a scheduler's configuration in float64, rescaled to zero terminal SNR if the configuration asks."""
    betas = torch.tensor(_betas_of_schedule(config), dtype=torch.float64)
    if config.rescale_betas_zero_snr:
        # Lin et al. 2023 (arXiv 2305.08891), algorithm 1: √ᾱ is shifted to end at 0 and scaled to begin where it did.
        root = (1 - betas).cumprod(0).sqrt()
        alpha_bar = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
        betas = 1 - alpha_bar / torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
    return tuple(betas.tolist())


def _betas_of_schedule(config: Any) -> tuple[float, ...]:
    if config.trained_betas is not None:
        return tuple(float(beta) for beta in config.trained_betas)
    count = config.num_train_timesteps
    if config.beta_schedule == "linear":
        betas = torch.linspace(config.beta_start, config.beta_end, count, dtype=torch.float64)
    elif config.beta_schedule == "scaled_linear":
        betas = torch.linspace(config.beta_start**0.5, config.beta_end**0.5, count, dtype=torch.float64) ** 2
    else:
        times = torch.arange(count + 1, dtype=torch.float64) / count
        alpha_bar = torch.cos((times + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)
    return tuple(betas.tolist())


def diffusion_from_config(config: Any, guidance_channels: int) -> DiffusionSpec:
    """The forward process and conventions of a diffusers scheduler's ``config``, which notes what is unstated."""
    unstated = config.get("_use_default_values", ())
    return DiffusionSpec(
        betas=betas_of(config),
        prediction_type=config.prediction_type,
        guidance_channels=guidance_channels,
        timestep_spacing=UNSTATED if "timestep_spacing" in unstated else config.timestep_spacing,
        steps_offset=config.steps_offset,
        set_alpha_to_one=config.set_alpha_to_one,
        options=options_of_config(config),
    )
