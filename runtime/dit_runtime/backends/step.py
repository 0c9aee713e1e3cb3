"""Make the inputs of the step graph, and the conditioning table that it reads."""

from __future__ import annotations

from typing import NoReturn

import numpy as np

from dit_runtime.backends.base import Array, Engine
from dit_runtime.bundle.manifest import Manifest
from dit_runtime.core.errors import SamplingError
from dit_runtime.samplers.noise import Float32
from dit_runtime.samplers.schedule import widen_rows

STATE_SLOTS = 3  # slot 0 is z_t, slots 1 and 2 are the sampler's memory


def refuse_earlier_step() -> NoReturn:
    """Raise SamplingError: a device keeps the latents of its last step only."""
    raise SamplingError(
        "only the latents of the last step are on the device; read the latents of a step before the next"
    )


def state_from_latents(latents: Float32) -> Float32:
    """Latents ``[B, C, H, W]`` → the state ``[B, 3, C, H, W]`` before the first step; the sampler's memory is zero."""
    state = np.zeros((len(latents), STATE_SLOTS, *latents.shape[1:]), np.float32)
    state[:, 0] = latents
    return state


def step_inputs(
    manifest: Manifest,
    state: Float32,
    coefficients: Float32,
    guidance: Float32,
    rows: Array,
    table: Array,
    noise: Float32 | None = None,
) -> dict[str, Array]:
    """The inputs of the graphs ``step`` and ``probe`` by name.

    Args:
        manifest: of the bundle; it names the conditioning table.
        state: ``[B, 3, C, H, W]`` float32.
        coefficients: ``[B, 17]`` float32, each image's row of its schedule; ``[B, 19]`` with a clip.
        guidance: ``[G, B, C]`` float32, the weight of each branch.
        rows: ``[G, B]`` int32, the row of the conditioning table that each branch of each image reads.
        table: the conditioning table ``[R, …]``, in the manifest's dtype.
        noise: ``[B, C, H, W]`` float32; None is zeros.
    """
    return {
        "state": state,
        "noise": np.zeros_like(state[:, 0]) if noise is None else noise,
        "coefficients": widen_rows(coefficients, manifest.model.clips),
        "guidance": guidance,
        "rows": rows,
        manifest.table.name: table,
    }


def compute_table(
    engine: Engine, manifest: Manifest, timesteps: Array, labels: Array, observations: Array | None = None
) -> Array:
    """Compute the conditioning table ``[R, …]`` for pairs of timestep ``[R]`` or ``[R, 2]`` and label ``[R]``.

    With ``observations`` ``[K, O]``, of a policy, a label is the number of one of them.

    The conditioner is called with as many rows at a time as the engine takes.
    """
    info = engine.info
    profiles = info.profiles.get("conditioner")
    most = len(timesteps) if profiles is None else profiles.largest_batch
    session = engine.session("conditioner")
    parts: list[Array] = []
    for first in range(0, len(timesteps), most):
        part = slice(first, first + most)
        inputs = {"timesteps": timesteps[part].astype(np.float32)}
        if observations is None:
            inputs["labels"] = labels[part].astype(np.int32)
        else:
            inputs["observations"] = observations[labels[part]]
        parts += session.run(inputs, [manifest.table.name])
    return parts[0] if len(parts) == 1 else np.concatenate(parts)
