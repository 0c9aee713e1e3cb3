"""What the samplers' tests share: models, a seeded dummy network, and a schedule's rows run in float64.

Nothing here needs torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any, NamedTuple

import numpy as np

from dit_runtime.bundle.manifest import DiffusionSpec, ModelSpec
from dit_runtime.samplers.schedule import Schedule

BETAS = np.linspace(1e-4, 0.02, 1000)
ALPHA_BAR = np.exp(np.cumsum(np.log1p(-BETAS)))
DIFFUSION = DiffusionSpec(
    betas=tuple(BETAS.tolist()),
    prediction_type="epsilon",
    guidance_channels=4,
    timestep_spacing="leading",
    steps_offset=0,
    set_alpha_to_one=True,
)
LEARNED = ModelSpec(
    conditioning="adaln-zero",
    latent_channels=4,
    latent_size=(8, 8),
    patch_size=2,
    width=64,
    depth=2,
    heads=2,
    mlp_width=256,
    classes=10,
    learned_variance=True,
)
FIXED = replace(LEARNED, learned_variance=False)
PAIRED = replace(FIXED, times=2)  # a MeanFlow
AVERAGE = replace(
    DIFFUSION,
    betas=(),
    prediction_type="velocity",
    path="linear",
    time="noise-at-1",
    second_time="t-r",
    guidance_inside=True,
)
SCHEDULER = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02, "clip_sample": False}
SHAPE = (2, 4, 3)  # images, channels, pixels
MIX = np.random.default_rng(2024).standard_normal((4, 4))
Float64 = np.ndarray[Any, np.dtype[np.float64]]
Network = Callable[[Float64, Any], tuple[Float64, Float64]]  # latents and a timestep, or both of a MeanFlow

ETAS = [0.0, 0.5, 1.0]

STRENGTHS = [0.1, 0.3, 0.6, 0.85, 1.0]


class Step(NamedTuple):
    """What a sampler does at one evaluation: ``sample = mean + scale · noise``."""

    denoised: Float64
    mean: Float64
    scale: Float64
    sample: Float64


def network(z: Float64, t: float) -> tuple[Float64, Float64]:
    """(ε, v): smooth, nonlinear, mixing channels, different at every timestep; v slightly leaves [-1, 1]."""
    mixed = np.einsum("ij,bjk->bik", MIX, z)
    return 0.7 * z + 0.4 * np.tanh(0.5 * mixed + t / 400 - 1), 1.1 * np.sin(mixed + t / 100)


def run_table(
    schedule: Schedule, z: Float64, noise: Float64, network: Network, teacher: Sequence[Float64] | None = None
) -> list[Step]:
    """A table's rows as the design defines them, in float64; ``teacher`` replaces the latents before each row."""
    state, steps = np.zeros((3, *z.shape)), []
    state[0] = z
    for index, (row, coefficients) in enumerate(zip(schedule.rows, schedule.coefficients, strict=True)):
        a, b, *rest = coefficients.astype(np.float64)
        A, B, (g, h, k) = np.reshape(rest[:9], (3, 3)), np.array(rest[9:12]), rest[12:15]
        bound, weight = rest[15:] or (np.inf, 0.0)
        if teacher is not None:
            state[0] = teacher[index]
        e, v = network(state[0], schedule.timesteps[row].tolist())
        denoised = np.clip(a * state[0] + b * e, -bound, bound)
        state = np.tensordot(A, state, axes=1) + np.multiply.outer(B, e)
        state[0] += weight * denoised
        mean, scale = state[0].copy(), np.exp(g + h * v) * k
        state[0] += scale * noise[index]
        steps.append(Step(denoised, mean, scale, state[0].copy()))
    return steps


def assert_close(found: Float64, expected: Float64, limit: float) -> None:
    """max|Δ| relative to max|expected|; anything that is not finite fails."""
    error = np.abs(found - expected).max() / max(np.abs(expected).max(), 1e-300)
    assert error <= limit, f"max|Δ|/max|reference| is {error:.2e}, expected at most {limit:.0e}"


def normal(seed: int, *shape: int) -> Float64:
    return np.random.default_rng(seed).standard_normal(shape)


def asked(schedule: Schedule) -> list[int]:
    """The timestep of each evaluation."""
    return [int(t) for t in schedule.timesteps[schedule.rows]]


def official_timesteps(steps: int) -> list[int]:
    """The official respacing of 1000 timesteps into one section, ascending: both ends, a fractional stride between."""
    position, chosen = 0.0, set()
    for _ in range(steps):
        chosen.add(round(position))
        position += 999 / (steps - 1)
    return sorted(chosen)


def timesteps_of(schedule: Schedule) -> list[float]:
    """The timestep of each evaluation; a fraction in linspace spacing of the ancestral sampler."""
    return schedule.timesteps[schedule.rows].astype(np.float64).tolist()


def assert_same(found: Schedule, expected: Schedule) -> None:
    """Every field, to the bit."""
    for name in (item.name for item in fields(Schedule)):
        value, wanted = getattr(found, name), getattr(expected, name)
        if not isinstance(wanted, np.ndarray):
            assert value == wanted, name
        else:
            assert (value.dtype, value.shape, value.tobytes()) == (wanted.dtype, wanted.shape, wanted.tobytes()), name


def assert_sound(schedule: Schedule, sampler: str, steps: int) -> None:
    """What the engine relies on in any table."""
    assert schedule.sampler == sampler
    assert len(schedule) == steps
    expected = {
        "timesteps": (np.float32, (steps,)),
        "rows": (np.int32, (steps,)),
        "coefficients": (np.float32, (steps, 17)),
        "initial": (np.float32, (steps, 2)),
        "draws_noise": (np.bool_, (steps,)),
        "completes_step": (np.bool_, (steps,)),
    }
    for name, (kind, shape) in expected.items():
        array = getattr(schedule, name)
        assert (array.dtype, array.shape) == (kind, shape), name
        assert np.isfinite(array).all(), name
    assert sorted(set(schedule.rows.tolist())) == list(range(steps))
    assert (np.diff(asked(schedule)) < 0).all()
    assert asked(schedule)[0] <= 999
    assert asked(schedule)[-1] >= 0
    assert schedule.completes_step.all()
    g, h, k = schedule.coefficients[:, 14:].T
    assert not g[k == 0].any()  # 0·NaN is NaN
    assert not h[k == 0].any()
    assert not k[~schedule.draws_noise].any()
    assert not schedule.coefficients[0, [3, 4, 6, 7, 9, 10]].any()  # no slot is read before it was written
    np.testing.assert_allclose((schedule.initial.astype(np.float64) ** 2).sum(axis=1), 1, rtol=1e-6)


def steps_left_out(steps: int, strength: float) -> int:
    """``get_timesteps`` of diffusers' image-to-image pipelines."""
    init_timestep = min(int(steps * strength), steps)
    return max(steps - init_timestep, 0)


def started(schedule: Schedule, x_0: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """z before the first row, in float64."""
    signal, spread = schedule.initial[0].astype(np.float64)
    return signal * x_0 + spread * noise
