"""Reads a diffusers scheduler's configuration as a forward process: which betas, and what the network predicts."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler

from dit_export.checkpoints.diffusers_modules import explain_config_errors, read_json_object
from dit_runtime.bundle.manifest import DiffusionSpec
from dit_runtime.core.errors import CheckpointError
from dit_runtime.samplers.spacing import UNSTATED

# Schedulers of diffusion models: the configuration describes the same forward process, whichever of them samples.
SCHEDULERS = (
    *("DDIMScheduler", "DDPMScheduler", "PNDMScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler"),
    *("DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "UniPCMultistepScheduler"),
    *("DEISMultistepScheduler", "HeunDiscreteScheduler", "LMSDiscreteScheduler"),
)
# Defaults of the forward process, of the classes whose defaults are not DDIMScheduler's.
OWN_DEFAULTS = {"HeunDiscreteScheduler": {"beta_start": 0.00085, "beta_end": 0.012}}
# The forward process of the published DiT.
LINEAR_BETAS = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02, "clip_sample": False}
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")


def load_scheduler(path: Path) -> DDIMScheduler:
    """A ``DDIMScheduler`` with the forward process that a scheduler's configuration file describes.

    What the file does not state of the forward process has the default of the file's class. Timestep spacing, offset
    and final alpha say how to sample: unstated, they stay defaults, which diffusers does not hand to another class.

    Raises:
        CheckpointError: another kind of scheduler, clipping, thresholding, or a setting that is not supported.
    """
    config = read_json_object(path)
    if (kind := config.get("_class_name")) not in SCHEDULERS:
        raise CheckpointError(
            f"{path}: is a {kind}; expected the scheduler of a diffusion model, such as DDIMScheduler (for velocity "
            "models see --family sit)"
        )
    with explain_config_errors(path):
        # diffusers' note of which values are defaults and not stated; like diffusers, forget these.
        unstated = config.get("_use_default_values", ())
        config = {key: value for key, value in config.items() if key not in unstated}
    config = {**OWN_DEFAULTS.get(kind, {}), **config}
    for key in ("clip_sample", "thresholding"):
        # DDIMScheduler and DDPMScheduler clip by default: without the key in the file, they clip.
        clips = key == "clip_sample" and kind in ("DDIMScheduler", "DDPMScheduler")
        if config.get(key, clips):
            raise CheckpointError(
                f"{path}: {key} is not supported (it is not linear in the network's output); set it to false"
            )
    prediction = config.get("prediction_type", "epsilon")
    for setting, value, known in (
        ("prediction type", prediction, ("epsilon", "v_prediction")),
        ("beta schedule", config.get("beta_schedule", "linear"), BETA_SCHEDULES),
        ("timestep spacing", config.get("timestep_spacing", "leading"), ("leading", "trailing", "linspace")),
    ):
        if value not in known:
            raise CheckpointError(
                f"{path}: {setting} {value!r} is not supported; expected {' or '.join(map(repr, known))}"
            )
    if config.get("rescale_betas_zero_snr") and prediction == "epsilon":
        raise CheckpointError(
            f"{path}: rescale_betas_zero_snr with epsilon prediction: at the first timestep the noise says nothing "
            "about the image; expected prediction_type 'v_prediction', or rescale_betas_zero_snr false"
        )
    names = DDIMScheduler().config.keys()
    settings = {key: value for key, value in config.items() if key in names and not key.startswith("_")}
    with explain_config_errors(path):
        scheduler = DDIMScheduler(**{**settings, "clip_sample": False, "thresholding": False})
        betas = betas_of(scheduler.config)
    if not all(0 < beta <= 1 for beta in betas):
        raise CheckpointError(f"{path}: betas are not between 0 and 1; download or copy it again")
    return scheduler


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
    )
