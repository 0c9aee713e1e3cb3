"""The samplers by name."""

from __future__ import annotations

from dit_runtime import flow, solvers
from dit_runtime.bundle import DiffusionSpec, ModelSpec
from dit_runtime.errors import SamplingError
from dit_runtime.spacing import spaced_timesteps
from dit_runtime.table import Schedule

__all__ = ["DIFFUSION_SAMPLERS", "FLOW_SAMPLERS", "SAMPLERS", "Schedule", "schedule_for", "spaced_timesteps"]

DIFFUSION_SAMPLERS = ("ddim", "ddpm", "dpmpp-2m", "dpmpp-2m-sde", "dpmpp-3m", "unipc", "euler-ancestral")
FLOW_SAMPLERS = ("euler", "heun", "sde-euler", "sde-heun")
SAMPLERS = DIFFUSION_SAMPLERS + FLOW_SAMPLERS

MOST_STEPS = 10_000  # of a velocity model, whose time is continuous

# torchdiffeq's solvers that choose their own steps: no table can hold those.
ADAPTIVE = ("dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun", "scipy_solver")


def schedule_for(
    sampler: str, model: ModelSpec, diffusion: DiffusionSpec, steps: int, eta: float = 0.0, spacing: str | None = None
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
        return _flow_schedule(sampler, diffusion, steps, spacing)
    total = len(diffusion.betas)
    if not 1 <= steps <= total:
        raise SamplingError(f"{steps} steps: expected 1 to {total}, the number of training timesteps")
    if sampler == "ddim":
        return solvers.ddim(diffusion, steps, eta, spacing)
    if sampler == "ddpm":
        return solvers.ddpm(diffusion, steps, model.learned_variance, spacing)
    if sampler == "unipc":
        return solvers.unipc(diffusion, steps, spacing)
    if sampler == "euler-ancestral":
        return solvers.euler_ancestral(diffusion, steps, spacing)
    order = 3 if sampler == "dpmpp-3m" else 2
    return solvers.dpm_solver_pp(diffusion, steps, order, sampler == "dpmpp-2m-sde", spacing)


def _flow_schedule(sampler: str, diffusion: DiffusionSpec, steps: int, spacing: str | None) -> Schedule:
    if spacing is not None:
        raise SamplingError(f"timestep spacing {spacing!r} with sampler {sampler}: its steps are uniform; leave it out")
    if not 1 <= steps <= MOST_STEPS:
        raise SamplingError(f"{steps} steps: expected 1 to {MOST_STEPS}")
    path = diffusion.path or ""
    if sampler in ("euler", "heun"):
        return flow.flow_ode(path, steps, sampler)
    return flow.flow_sde(path, steps, sampler.removeprefix("sde-"))
