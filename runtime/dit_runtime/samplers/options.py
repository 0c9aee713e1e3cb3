"""The options of diffusers' schedulers: what the samplers do with each, as data, and what a bundle's options mean.

A sampler is one of diffusers' classes. It takes from a bundle's options what that class would take from the
checkpoint's configuration (``Class.from_config``): the options that the class has, and for the others its defaults.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

from dit_runtime.bundle.manifest import DiffusionSpec, SchedulerOptions
from dit_runtime.core.errors import SamplingError

PROCESS = "process"  # says which betas, prediction or timesteps: fields of the bundle's own
STEPS = "steps"  # changes the numbers in the sampler's rows
INERT = "inert"  # changes nothing, except beside an option that is refused


@dataclass(frozen=True)
class Only:
    """An option of which only some values can be applied: the ``values``, and why no others."""

    values: tuple[Any, ...]
    reason: str


Use = str | Only

THRESHOLDS = Only((False,), "its bound is another for each image and step")
BETA_SIGMAS = Only((False,), "its noise levels are SciPy's beta distribution, which is not here")
FLOW_SIGMAS = Only((False,), "its steps are those of a flow, and the model's betas are not")
SHIFTING = Only((False,), "a configuration does not say by how much it shifts")

_PROCESS = dict.fromkeys(
    ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type"), PROCESS
)
_SPACING = dict.fromkeys(("timestep_spacing", "steps_offset"), PROCESS)
_RESCALING = {"rescale_betas_zero_snr": PROCESS}
_THRESHOLDING: dict[str, Use] = {
    "thresholding": THRESHOLDS,
    **dict.fromkeys(("dynamic_thresholding_ratio", "sample_max_value"), INERT),
}
_CLIPPING: dict[str, Use] = dict.fromkeys(("clip_sample", "clip_sample_range"), STEPS)
_LEVELS: dict[str, Use] = {
    **dict.fromkeys(("use_karras_sigmas", "use_exponential_sigmas", "final_sigmas_type"), STEPS),
    "use_beta_sigmas": BETA_SIGMAS,
    "use_flow_sigmas": FLOW_SIGMAS,
    "flow_shift": INERT,
    "use_dynamic_shifting": SHIFTING,
    "time_shift_type": INERT,
}

DDIM, DDPM, EULER_ANCESTRAL = "DDIMScheduler", "DDPMScheduler", "EulerAncestralDiscreteScheduler"
DPM, UNIPC = "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"

# Every option of the classes that a sampler is. A test compares the names with diffusers' own signatures.
USES: dict[str, dict[str, Use]] = {
    DDIM: {**_PROCESS, **_SPACING, **_RESCALING, **_THRESHOLDING, **_CLIPPING, "set_alpha_to_one": PROCESS},
    DDPM: {
        **_PROCESS,
        **_SPACING,
        **_RESCALING,
        **_THRESHOLDING,
        **_CLIPPING,
        "variance_type": Only(
            ("fixed_small", "fixed_small_log", "fixed_large", "learned_range", None),
            "diffusers takes the root of a number below 0",
        ),
    },
    EULER_ANCESTRAL: {**_PROCESS, **_SPACING, **_RESCALING},
    DPM: {
        **_PROCESS,
        **_SPACING,
        **_RESCALING,
        **_THRESHOLDING,
        **_LEVELS,
        **dict.fromkeys(("solver_order", "solver_type", "lower_order_final", "euler_at_final"), STEPS),
        **dict.fromkeys(("use_lu_lambdas", "lambda_min_clipped"), STEPS),
        "algorithm_type": Only(("dpmsolver++", "sde-dpmsolver++"), "only solvers that predict x₀ are here"),
        # It cuts the output to three channels, which suits no latents: here the solver gets the latent channels.
        "variance_type": INERT,
    },
    UNIPC: {
        **_PROCESS,
        **_SPACING,
        **_RESCALING,
        **_THRESHOLDING,
        **_LEVELS,
        **dict.fromkeys(("solver_type", "lower_order_final", "disable_corrector", "sigma_min", "sigma_max"), STEPS),
        "solver_order": Only((1, 2), "order 3 with its corrector needs more memory than a sampler table has"),
        "predict_x0": Only((True,), "only solvers that predict x₀ are here"),
        "solver_p": Only((None,), "a solver inside the solver has no table"),
        "shift_terminal": Only((None,), "it belongs to use_flow_sigmas"),
    },
}

CLASSES = {
    "ddim": DDIM,
    "ddpm": DDPM,
    "dpmpp-2m": DPM,
    "dpmpp-2m-sde": DPM,
    "dpmpp-3m": DPM,
    "unipc": UNIPC,
    "euler-ancestral": EULER_ANCESTRAL,
}

# Of the ways to choose noise levels, the first that is on decides, as in diffusers; by option, its spacing.
LEVELS = {"use_karras_sigmas": "karras", "use_lu_lambdas": "lu", "use_exponential_sigmas": "exponential"}


@dataclass(frozen=True)
class SolverSettings:
    """A multistep solver's settings, from a bundle's options.

    Attributes:
        order: 1 to 3.
        solver_type: diffusers' ``midpoint`` or ``heun``, or UniPC's ``bh1`` or ``bh2``.
        lower_order_final: whether the order falls at the end.
        euler_at_final: whether the last step is of order 1 in any case.
        ends_at_zero: whether the last step leads to x₀; otherwise it leads to the least noise level.
        levels: ``karras``, ``lu`` or ``exponential`` noise levels; None takes the timesteps' own.
        sigma_min, sigma_max: the ends of these levels; None takes the training's.
        lambda_min: timesteps begin where log(α/σ) is at least this.
        uncorrected: the steps after which UniPC does not correct.
        rounded: the levels of which timesteps are rounded; of others diffusers cuts the fraction off.
    """

    order: int
    solver_type: str
    lower_order_final: bool = True
    euler_at_final: bool = False
    ends_at_zero: bool = True
    levels: str | None = None
    sigma_min: float | None = None
    sigma_max: float | None = None
    lambda_min: float = -math.inf
    uncorrected: tuple[int, ...] = ()
    rounded: tuple[str, ...] = ("karras", "lu")


def explain_refusal(kind: str, name: str, value: object) -> str | None:
    """Why a class's sampler cannot have an option at a value; None where it can, or where the class has no such option.

    Args:
        kind: a key of ``USES``.
        name, value: of an option, as diffusers' configuration has it.
    """
    use = USES[kind].get(name)
    return use.reason if isinstance(use, Only) and value not in use.values else None


def check_options(sampler: str, options: SchedulerOptions) -> None:
    """Check that a sampler can have the options of a bundle.

    Raises:
        SamplingError: it cannot, or an option says that it is another sampler's.
    """
    kind = CLASSES[sampler]
    for name, value in options.stated().items():
        if reason := explain_refusal(kind, name, value):
            raise _refused(sampler, name, value, f"is not supported ({reason})", "choose another sampler")
    if kind == DPM:
        _check_solver_of_name(sampler, options)
    if kind in (DPM, UNIPC) and options.use_karras_sigmas and options.use_exponential_sigmas:
        problem = "excludes use_karras_sigmas, in diffusers too"
        raise _refused(sampler, "use_exponential_sigmas", True, problem, "choose another sampler")
    if kind == UNIPC and options.final_sigmas_type is None:
        problem = "has no value in the last step, to a noise level of 0, in diffusers too"
        if options.solver_type == "bh1":
            raise _refused(sampler, "solver_type", "bh1", problem, "choose another sampler")
        if options.lower_order_final is False and options.solver_order != 1:
            raise _refused(sampler, "lower_order_final", False, problem, "choose another sampler")


def _check_solver_of_name(sampler: str, options: SchedulerOptions) -> None:
    """Raises SamplingError where a stated algorithm or order is not that of the sampler's name."""
    stochastic, order = sampler.endswith("-sde"), options.solver_order
    if options.algorithm_type == "sde-dpmsolver++" and not stochastic:
        raise _refused(sampler, "algorithm_type", options.algorithm_type, "is not this sampler", "choose dpmpp-2m-sde")
    if order is not None and order != (3 if sampler == "dpmpp-3m" else 2):
        step = "choose dpmpp-3m" if order == 3 and not stochastic else "choose another sampler"
        raise _refused(sampler, "solver_order", order, "is not this sampler's order", step)


def _refused(sampler: str, name: str, value: object, problem: str, step: str) -> SamplingError:
    return SamplingError(
        f"sampler {sampler}: {name} {json.dumps(value)} of the checkpoint's scheduler {problem}; {step}, or change "
        f"{name} in scheduler_config.json and export again"
    )


def settings_for(sampler: str, order: int, diffusion: DiffusionSpec) -> SolverSettings:
    """The settings of a multistep solver, as its class takes them from the checkpoint's configuration."""
    options, kind = diffusion.options, CLASSES[sampler]
    stated = {name: value for name, value in options.stated().items() if name in USES[kind]}
    levels = [spacing for name, spacing in LEVELS.items() if stated.get(name)]
    return SolverSettings(
        order=options.solver_order or order,
        solver_type=_solver_type(kind, options.solver_type),
        lower_order_final=stated.get("lower_order_final", True),
        euler_at_final=stated.get("euler_at_final", False),
        ends_at_zero="final_sigmas_type" not in stated,
        levels=levels[0] if levels else None,
        # diffusers' DPM-Solver takes these two although they are not in its signature.
        sigma_min=options.sigma_min,
        sigma_max=options.sigma_max,
        lambda_min=stated.get("lambda_min_clipped", -math.inf),
        uncorrected=stated.get("disable_corrector", ()),
        # DPM-Solver does not round where the betas are the cosine's.
        rounded=() if kind == DPM and options.beta_schedule else ("karras", "lu"),
    )


def _solver_type(kind: str, stated: str | None) -> str:
    """Each class takes its own types, and its default for the other class's."""
    if kind == UNIPC:
        return "bh1" if stated == "bh1" else "bh2"
    return "heun" if stated == "heun" else "midpoint"
