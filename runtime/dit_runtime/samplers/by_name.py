"""The samplers by name."""

from __future__ import annotations

import math

from dit_runtime.bundle.manifest import DiffusionSpec, ModelSpec
from dit_runtime.core.errors import SamplingError
from dit_runtime.samplers import diffusion as solvers
from dit_runtime.samplers import flow
from dit_runtime.samplers.schedule import Schedule, skip_steps
from dit_runtime.samplers.spacing import spaced_timesteps

__all__ = [
    "DIFFUSION_SAMPLERS",
    "FLOW_SAMPLERS",
    "SAMPLERS",
    "Schedule",
    "schedule_for",
    "spaced_timesteps",
    "steps_skipped",
]

DIFFUSION_SAMPLERS = ("ddim", "ddpm", "dpmpp-2m", "dpmpp-2m-sde", "dpmpp-3m", "unipc", "euler-ancestral")
FLOW_SAMPLERS = ("euler", "heun", "sde-euler", "sde-heun")
SAMPLERS = DIFFUSION_SAMPLERS + FLOW_SAMPLERS

MOST_STEPS = 10_000  # of a velocity model, whose time is continuous

# torchdiffeq's solvers that choose their own steps: no table can hold those.
ADAPTIVE = ("dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun", "scipy_solver")


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
        sampler: one of ``SAMPLERS``: the first seven for ε and v prediction, the others for velocity models.
        model: whether the variance is learned matters to ``ddpm``.
        diffusion: the bundle's forward process.
        steps: sampling steps; ``heun`` and ``sde-heun`` evaluate the network twice in each.
        eta: DDIM's stochasticity, 0 to 1.
        spacing: ``leading``, ``trailing``, ``linspace``, ``karras``, ``official`` or ``official-ddim``, where the
            sampler's reference has it; None takes the bundle's own, and for ``ddpm`` the official respacing.
        skipped: leave out so many of the first steps, for a start from an image (``steps_skipped``). The others stay
            what they are, only that a sampler's memory begins empty.

    Raises:
        SamplingError: an unknown sampler, or settings that it or its reference cannot run.
    """
    if sampler in ADAPTIVE:
        raise SamplingError(f"sampler {sampler!r} is adaptive: it has no table of steps; use euler or heun")
    if sampler not in SAMPLERS:
        raise SamplingError(f"sampler {sampler!r} is unknown; choose one of {', '.join(SAMPLERS)}")
    if sampler != "ddim" and eta != 0:
        raise SamplingError(f"eta {eta:g} with sampler {sampler}: eta is DDIM's; leave it out or use --sampler ddim")
    flows = diffusion.prediction_type == "velocity"
    fitting = FLOW_SAMPLERS if flows else DIFFUSION_SAMPLERS
    if sampler not in fitting:
        raise SamplingError(
            f"sampler {sampler} with a model of prediction type {diffusion.prediction_type!r}: "
            f"expected one of {', '.join(fitting)}"
        )
    if flows:
        return _flow_schedule(sampler, diffusion, steps, spacing, skipped)
    total = len(diffusion.betas)
    if not 1 <= steps <= total:
        raise SamplingError(f"{steps} steps: expected 1 to {total}, the number of training timesteps")
    if sampler == "ddim":
        return skip_steps(solvers.ddim(diffusion, steps, eta, spacing), skipped)
    if sampler == "ddpm":
        return skip_steps(solvers.ddpm(diffusion, steps, model.learned_variance, spacing), skipped)
    if sampler == "unipc":
        return solvers.unipc(diffusion, steps, spacing, skipped)
    if sampler == "euler-ancestral":
        return skip_steps(solvers.euler_ancestral(diffusion, steps, spacing), skipped)
    order = 3 if sampler == "dpmpp-3m" else 2
    return solvers.dpm_solver_pp(diffusion, steps, order, sampler == "dpmpp-2m-sde", spacing, skipped)


def steps_skipped(steps: int, strength: float) -> int:
    """How many of the first steps image-to-image leaves out, as diffusers' pipelines count: of N steps int(N·s) run.

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


def _flow_schedule(sampler: str, diffusion: DiffusionSpec, steps: int, spacing: str | None, skipped: int) -> Schedule:
    if spacing is not None:
        raise SamplingError(f"timestep spacing {spacing!r} with sampler {sampler}: its steps are uniform; leave it out")
    if not 1 <= steps <= MOST_STEPS:
        raise SamplingError(f"{steps} steps: expected 1 to {MOST_STEPS}")
    path = diffusion.path or ""
    if sampler in ("euler", "heun"):
        return skip_steps(flow.flow_ode(path, steps, sampler), skipped)
    return flow.flow_sde(path, steps, sampler.removeprefix("sde-"), skipped=skipped)
