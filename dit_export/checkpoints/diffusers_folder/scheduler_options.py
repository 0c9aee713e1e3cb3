"""The options in a diffusers scheduler's configuration file: their kinds, and what is done with each.

``USES`` of ``dit_runtime.samplers.options`` has the classes that a sampler here is. ``OTHERS`` has those that none is:
they describe the same forward process, and what they say about steps is for the samplers whose classes have the option
too, as diffusers hands a configuration from one class to another.
"""

from __future__ import annotations

import difflib
import inspect
import json
import math
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal

import diffusers
from diffusers import DPMSolverMultistepScheduler

from dit_runtime.bundle.consistency import MOST_BETAS
from dit_runtime.bundle.manifest import SchedulerOptions
from dit_runtime.core.decode import DecodeError, Natural, Range, decode
from dit_runtime.core.errors import CheckpointError
from dit_runtime.samplers.options import (
    DDIM,
    DDPM,
    DPM,
    EULER_ANCESTRAL,
    INERT,
    LEVELS,
    PROCESS,
    THRESHOLDS,
    UNIPC,
    USES,
    Only,
    Use,
)

HANDED_ON = "handed on"  # to the samplers whose class has the option too
OWN = "own"  # says how this class alone steps, and no sampler here is this class

_BETAS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type")
_PROCESS: dict[str, Use] = dict.fromkeys(_BETAS, PROCESS)
_SPACED: dict[str, Use] = {**_PROCESS, **dict.fromkeys(("timestep_spacing", "steps_offset"), PROCESS)}
_SIGMAS: dict[str, Use] = dict.fromkeys(("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"), HANDED_ON)
_SOLVER: dict[str, Use] = {
    **_SIGMAS,
    **dict.fromkeys(("solver_order", "algorithm_type", "solver_type", "lower_order_final"), HANDED_ON),
    **dict.fromkeys(("use_flow_sigmas", "flow_shift", "use_dynamic_shifting", "time_shift_type"), HANDED_ON),
    "thresholding": THRESHOLDS,
    **dict.fromkeys(("dynamic_thresholding_ratio", "sample_max_value"), INERT),
}
OTHERS: dict[str, dict[str, Use]] = {
    "PNDMScheduler": {**_SPACED, "set_alpha_to_one": PROCESS, "skip_prk_steps": OWN},
    "EulerDiscreteScheduler": {
        **_SPACED,
        **_SIGMAS,
        "rescale_betas_zero_snr": PROCESS,
        **dict.fromkeys(("sigma_min", "sigma_max", "final_sigmas_type"), HANDED_ON),
        "interpolation_type": Only(("linear",), "no sampler here interpolates noise levels otherwise"),
        "timestep_type": Only(("discrete",), "the network would get log σ/4 for timesteps"),
    },
    "DPMSolverSinglestepScheduler": {
        **_PROCESS,
        **_SOLVER,
        **dict.fromkeys(("final_sigmas_type", "lambda_min_clipped", "variance_type"), HANDED_ON),
    },
    "DEISMultistepScheduler": {
        **_SPACED,
        **_SOLVER,
        "algorithm_type": Only(("deis", "dpmsolver++", "dpmsolver"), "DEIS is no other algorithm"),
    },
    "HeunDiscreteScheduler": {**_SPACED, **_SIGMAS, "clip_sample": HANDED_ON, "clip_sample_range": HANDED_ON},
    "LMSDiscreteScheduler": {**_SPACED, **_SIGMAS},
}
# Schedulers of diffusion models: the configuration describes the same forward process, whichever of them samples.
TABLE = {**USES, **OTHERS}

# What a class has of options whose values are those of several classes; it takes its default for another class's value.
OWN_VALUES: dict[str, dict[str, tuple[str, ...]]] = {
    DPM: {"solver_type": ("midpoint", "heun")},
    UNIPC: {"solver_type": ("bh1", "bh2")},
    "DPMSolverSinglestepScheduler": {"solver_type": ("midpoint", "heun")},
    "DEISMultistepScheduler": {"solver_type": ("logrho",), "algorithm_type": ("deis",)},
}

_BOOLEANS = (
    *("set_alpha_to_one", "rescale_betas_zero_snr", "clip_sample", "thresholding", "skip_prk_steps", "predict_x0"),
    *("lower_order_final", "euler_at_final", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"),
    *("use_lu_lambdas", "use_flow_sigmas", "use_dynamic_shifting"),
)
_NUMBERS = (
    *("beta_start", "beta_end", "dynamic_thresholding_ratio", "sample_max_value", "clip_sample_range", "flow_shift"),
    "lambda_min_clipped",
)
KINDS: dict[str, Any] = {
    **dict.fromkeys(_BOOLEANS, bool),
    **dict.fromkeys(_NUMBERS, float),
    "num_train_timesteps": Annotated[int, Range(2, MOST_BETAS)],
    "steps_offset": Natural,
    "solver_order": Annotated[int, Range(1, 3)],
    "trained_betas": list[float] | None,
    "beta_schedule": Literal["linear", "scaled_linear", "squaredcos_cap_v2"],
    "prediction_type": Literal["epsilon", "v_prediction", "sample"],
    "timestep_spacing": Literal["leading", "trailing", "linspace"],
    "variance_type": (
        Literal["fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range"] | None
    ),
    "algorithm_type": Literal["dpmsolver++", "sde-dpmsolver++", "dpmsolver", "sde-dpmsolver", "deis"],
    "solver_type": Literal["midpoint", "heun", "logrho", "bh1", "bh2"],
    "final_sigmas_type": Literal["zero", "sigma_min"],
    "disable_corrector": list[Natural],
    "solver_p": type(None),
    **dict.fromkeys(("sigma_min", "sigma_max", "shift_terminal"), float | None),
    "interpolation_type": Literal["linear", "log_linear"],
    "timestep_type": Literal["discrete", "continuous"],
    "time_shift_type": Literal["exponential", "linear"],
}

# Of options that a bundle has: the values that say no more than the defaults of the classes that samplers are.
_UNTOLD: dict[str, tuple[Any, ...]] = {
    "algorithm_type": ("dpmsolver++", "deis"),
    "solver_order": (2,),
    "solver_type": ("midpoint", "logrho", "bh2"),
    "lower_order_final": (True,),
    "predict_x0": (True,),
    "final_sigmas_type": ("zero",),
    "lambda_min_clipped": (-math.inf,),
    "disable_corrector": ([],),
    "beta_schedule": ("linear", "scaled_linear"),
    "clip_sample_range": (1.0,),
}


def check_config(path: Path, kind: str, config: Mapping[str, Any]) -> None:
    """Check every key of a scheduler's configuration: its name, its value's kind, and that the value can be applied.

    Args:
        path: of the file, for messages.
        kind: the class of the file, a key of ``TABLE``.
        config: what the file states.

    Raises:
        CheckpointError: for the first key that is unknown, has a value of another kind, or cannot be applied.
    """
    for key, value in config.items():
        if key.startswith("_"):
            continue
        if key not in KINDS:
            _check_is_of_another_class(path, key)
            continue
        if key == "lambda_min_clipped" and value == -math.inf:
            continue  # diffusers' default, which JSON in Python can hold
        try:
            decode(KINDS[key], value, key)
        except DecodeError as error:
            raise CheckpointError(f"{path}: {error}; correct it") from error
    for key, use in TABLE[kind].items():
        if isinstance(use, Only) and key in config and config[key] not in use.values:
            found, *wanted = (json.dumps(value) for value in (config[key], *use.values))
            raise CheckpointError(
                f"{path}: {key} {found} is not supported ({use.reason}); set it to {' or '.join(wanted)}"
            )

    exclusive = [key for key in ("use_karras_sigmas", "use_exponential_sigmas") if config.get(key)]
    if len(exclusive) == 2 and exclusive[0] in TABLE[kind]:
        raise CheckpointError(f"{path}: {' and '.join(exclusive)} exclude each other; set one to false")


def leave_out_options(own: str, kind: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration of the class ``own`` without those options that ``kind`` lacks, as diffusers does."""
    of_own, of_kind = (inspect.signature(getattr(diffusers, name).__init__).parameters for name in (own, kind))
    return {key: value for key, value in config.items() if key not in of_own or key in of_kind}


def take_own_values(kind: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without values that its class replaces by a default: no other class then gets them."""
    own = OWN_VALUES.get(kind, {})
    return {key: value for key, value in config.items() if key not in own or value in own[key]}


def _check_is_of_another_class(path: Path, key: str) -> None:
    """Raises CheckpointError for a key that no scheduler of diffusers has, or that a class of ``TABLE`` has anew.

    diffusers ignores options of other classes, such as ``shift`` of flow matching.
    """
    # Some names are stand-ins for classes whose libraries are not installed: they have no options.
    classes = {name: getattr(diffusers, name) for name in dir(diffusers) if name.endswith("Scheduler")}
    options = {name: set(inspect.signature(each.__init__).parameters) for name, each in classes.items()}
    ours = set().union(*(options[name] for name in options.keys() & TABLE.keys()))
    others = set().union(*options.values()) - ours
    if key in others:
        return
    close = difflib.get_close_matches(key, [*KINDS, *others], 1)
    hint = f"; did you mean {close[0]}?" if close else ""
    raise CheckpointError(
        f"{path}: {key} is not an option of diffusers' schedulers that is known here{hint}; correct or remove it"
    )


def options_of_config(config: Mapping[str, Any]) -> SchedulerOptions:
    """The options that a bundle has of a checked configuration, whichever class it is of."""
    values: dict[str, Any] = {}
    for name in (item.name for item in fields(SchedulerOptions)):
        value = config.get(name)
        untold = value is None or (value is False and name not in ("lower_order_final", "predict_x0"))
        untold = untold or (name == "clip_sample_range" and not config.get("clip_sample"))
        if not untold and value not in _UNTOLD.get(name, ()):
            values[name] = tuple(value) if isinstance(value, list) else value
    options = SchedulerOptions(**values)
    levels = [name for name in LEVELS if config.get(name)]
    cuts = levels and (levels[0] == "use_exponential_sigmas" or options.beta_schedule)
    return SchedulerOptions(**values, first_timestep=_first_timestep(config, levels[0])) if cuts else options


def _first_timestep(config: Mapping[str, Any], levels: str) -> int:
    """The timestep of the first noise level, from diffusers itself.

    It cuts off the fraction of a timestep, which is whole here but for float32's last digit.
    """
    names = (*_BETAS, "rescale_betas_zero_snr", "sigma_min", "sigma_max")
    process = {name: config[name] for name in names if name in config}
    scheduler = DPMSolverMultistepScheduler.from_config({**process, levels: True})
    scheduler.set_timesteps(2)
    return int(scheduler.timesteps[0])


def own_sampler(kind: str, options: SchedulerOptions) -> str:
    """The sampler that a class with these options is; DDIM for a class that no sampler here is."""
    multistep = "dpmpp-3m" if options.solver_order == 3 else "dpmpp-2m"
    stochastic = (options.algorithm_type or "").startswith("sde")
    names = {
        DDIM: "ddim",
        DDPM: "ddpm",
        DPM: "dpmpp-2m-sde" if stochastic else multistep,
        UNIPC: "unipc",
        EULER_ANCESTRAL: "euler-ancestral",
    }
    return names.get(kind, "ddim")
