"""The samplers by name: one table, from a name to the function that makes its schedule.

A new sampler is a function in ``diffusion.py`` or ``flow.py`` and a line in ``DIFFUSION``, ``FLOW`` or ``AVERAGE``
here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from dit_runtime.bundle.manifest import NOISE_AT_0, DiffusionSpec, ModelSpec
from dit_runtime.core.errors import SamplingError
from dit_runtime.samplers.diffusion import ddim, ddpm, dpm_solver_pp, euler_ancestral, unipc
from dit_runtime.samplers.flow import flow_ode, flow_sde, mean_flow
from dit_runtime.samplers.options import SolverSettings, check_options, settings_for
from dit_runtime.samplers.schedule import Schedule, skip_steps


@dataclass(frozen=True)
class SamplerArguments:
    """The arguments of ``schedule_for`` that a sampler's function can use."""

    diffusion: DiffusionSpec
    learned_variance: bool
    steps: int
    eta: float
    spacing: str | None
    skipped: int

    @property
    def path(self) -> str:
        """The path of a velocity model."""
        return self.diffusion.path or ""

    @property
    def time(self) -> str:
        """Which way the time of a velocity model runs."""
        return self.diffusion.time

    @property
    def shift(self) -> float:
        """The shift of an ODE solver's times of a velocity model."""
        return self.diffusion.time_shift

    @property
    def second_time(self) -> str:
        """What a model of two times gets beside t."""
        return self.diffusion.second_time or ""

    @property
    def form(self) -> str:
        """The diffusion form of a velocity model's SDE: SiT's default, or REPA's on every path."""
        return "sigma" if self.time == NOISE_AT_0 else "linear"

    def settings(self, sampler: str, order: int = 2) -> SolverSettings:
        """The settings of a multistep solver."""
        return settings_for(sampler, order, self.diffusion)


Make = Callable[[SamplerArguments], Schedule]

# Samplers for ε and v prediction. Those with memory skip steps themselves, since their memory then begins empty.
DIFFUSION: dict[str, Make] = {
    "ddim": lambda a: skip_steps(ddim(a.diffusion, a.steps, a.eta, a.spacing), a.skipped),
    "ddpm": lambda a: skip_steps(ddpm(a.diffusion, a.steps, a.learned_variance, a.spacing), a.skipped),
    "dpmpp-2m": lambda a: dpm_solver_pp(a.diffusion, a.steps, a.settings("dpmpp-2m"), False, a.spacing, a.skipped),
    "dpmpp-2m-sde": lambda a: dpm_solver_pp(
        a.diffusion, a.steps, a.settings("dpmpp-2m-sde"), True, a.spacing, a.skipped
    ),
    "dpmpp-3m": lambda a: dpm_solver_pp(a.diffusion, a.steps, a.settings("dpmpp-3m", 3), False, a.spacing, a.skipped),
    "unipc": lambda a: unipc(a.diffusion, a.steps, a.settings("unipc"), a.spacing, a.skipped),
    "euler-ancestral": lambda a: skip_steps(euler_ancestral(a.diffusion, a.steps, a.spacing), a.skipped),
}
# Samplers for velocity models; their steps are uniform, without a spacing.
FLOW: dict[str, Make] = {
    "euler": lambda a: skip_steps(flow_ode(a.path, a.steps, "euler", a.time, a.shift), a.skipped),
    "heun": lambda a: skip_steps(flow_ode(a.path, a.steps, "heun", a.time, a.shift), a.skipped),
    "sde-euler": lambda a: flow_sde(a.path, a.steps, "euler", a.form, skipped=a.skipped, time=a.time),
    "sde-heun": lambda a: flow_sde(a.path, a.steps, "heun", a.form, skipped=a.skipped, time=a.time),
}
# Samplers for models of two times, which predict an average velocity.
AVERAGE: dict[str, Make] = {
    "meanflow": lambda a: skip_steps(mean_flow(a.path, a.steps, a.second_time), a.skipped),
}
TAKES_ETA = ("ddim",)

DIFFUSION_SAMPLERS = tuple(DIFFUSION)
FLOW_SAMPLERS = tuple(FLOW)
AVERAGE_SAMPLERS = tuple(AVERAGE)
SAMPLERS = DIFFUSION_SAMPLERS + FLOW_SAMPLERS + AVERAGE_SAMPLERS

MOST_STEPS = 10_000  # of a velocity model, whose time is continuous

# torchdiffeq's solvers that choose their own steps: no table can hold their steps.
ADAPTIVE = ("dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun", "scipy_solver")


def samplers_for(diffusion: DiffusionSpec) -> tuple[str, ...]:
    """The samplers of a kind of model; the first draws no noise and has no memory."""
    if diffusion.second_time is not None:
        return AVERAGE_SAMPLERS
    return FLOW_SAMPLERS if diffusion.prediction_type == "velocity" else DIFFUSION_SAMPLERS


def schedule_for(
    sampler: str,
    model: ModelSpec,
    diffusion: DiffusionSpec,
    steps: int,
    eta: float = 0.0,
    spacing: str | None = None,
    skipped: int = 0,
) -> Schedule:
    """The schedule of a named sampler.

    Args:
        sampler: one of ``SAMPLERS``: of ``DIFFUSION_SAMPLERS`` for ε and v prediction, of ``FLOW_SAMPLERS`` for
            velocity models, of ``AVERAGE_SAMPLERS`` for those of two times.
        model: ``ddpm`` asks whether the model learned the variance.
        diffusion: the bundle's forward process.
        steps: sampling steps; ``heun`` and ``sde-heun`` evaluate the network twice in each.
        eta: DDIM's stochasticity, 0 to 1.
        spacing: ``leading``, ``trailing``, ``linspace``, ``karras``, ``lu``, ``exponential``, ``official`` or
            ``official-ddim``, where the sampler's reference has it; None takes the bundle's own, and for ``ddpm`` the
            official respacing, unless the checkpoint states a ``variance_type``.
        skipped: leave out so many of the first steps, to start from an image (``count_skipped_steps``). The other
            steps stay as they are, except that a sampler's memory begins empty.

    Raises:
        SamplingError: an unknown sampler, or settings that the sampler or its reference cannot run.
    """
    _check_name(sampler, eta, diffusion)
    arguments = SamplerArguments(diffusion, model.learned_variance, steps, eta, spacing, skipped)
    if (uniform := FLOW | AVERAGE).get(sampler):
        _check_uniform_steps(sampler, steps, spacing)
        return uniform[sampler](arguments)
    check_options(sampler, diffusion.options)
    total = len(diffusion.betas)
    if not 1 <= steps <= total:
        raise SamplingError(f"{steps} steps: expected 1 to {total}, the number of training timesteps")
    return DIFFUSION[sampler](arguments)


def count_default_steps(
    sampler: str, model: ModelSpec, diffusion: DiffusionSpec, steps: int, spacing: str | None = None
) -> int:
    """How many steps a sampler takes where the caller names no number.

    Args:
        sampler, model, diffusion, spacing: as ``schedule_for``.
        steps: the usual number.

    Returns:
        ``steps``, or for a model of few training timesteps the largest number below it that the sampler can run. Where
        it can run none, ``steps``, so that ``schedule_for`` says why.
    """
    total = len(diffusion.betas)
    if not total or 2 * steps <= total:
        return steps
    for count in range(min(steps, total), 0, -1):
        try:
            schedule_for(sampler, model, diffusion, count, spacing=spacing)
        except SamplingError:
            continue
        return count
    return steps


def _check_name(sampler: str, eta: float, diffusion: DiffusionSpec) -> None:
    """Raises SamplingError for a sampler that does not exist, takes no eta, or is for other models."""
    if sampler in ADAPTIVE:
        raise SamplingError(f"sampler {sampler!r} is adaptive: it has no schedule; use euler or heun")
    if sampler not in SAMPLERS:
        raise SamplingError(f"sampler {sampler!r} is unknown; choose one of {', '.join(SAMPLERS)}")
    if sampler not in TAKES_ETA and eta != 0:
        raise SamplingError(f"eta {eta:g} with sampler {sampler}: eta is DDIM's; leave it out or use --sampler ddim")
    fitting = samplers_for(diffusion)
    if sampler not in fitting:
        kind = f"prediction type {diffusion.prediction_type!r}"
        if diffusion.second_time is not None:
            kind = "two times, which predicts the average velocity of a whole step (MeanFlow)"
        raise SamplingError(f"sampler {sampler} with a model of {kind}: expected one of {', '.join(fitting)}")


def _check_uniform_steps(sampler: str, steps: int, spacing: str | None) -> None:
    if spacing is not None:
        raise SamplingError(f"timestep spacing {spacing!r} with sampler {sampler}: its steps are uniform; leave it out")
    if not 1 <= steps <= MOST_STEPS:
        raise SamplingError(f"{steps} steps: expected 1 to {MOST_STEPS}")


def count_skipped_steps(steps: int, strength: float) -> int:
    """How many of the first steps image-to-image leaves out: of N steps int(N·strength) run, as in diffusers.

    Raises:
        SamplingError: a strength outside (0, 1], or so small that no step would run.
    """
    if not 0 < strength <= 1:
        raise SamplingError(
            f"strength {strength:g}: expected above 0 to 1; the larger, the less is kept of the image it starts from"
        )
    if steps < 1:
        return 0  # for schedule_for to refuse
    run = min(int(steps * strength), steps)
    if run < 1:
        # Rounded up at the sixth decimal: 1/49 itself, times 49, is below 1.
        smallest = math.ceil(1e6 / steps) / 1e6
        raise SamplingError(
            f"strength {strength:g} of {steps} steps leaves none to run; the smallest that leaves one is {smallest:g}"
        )
    return steps - run
