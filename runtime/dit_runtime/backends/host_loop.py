"""The loop for an engine that has only sessions: arrays go in and come out, and all memory is on the host."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dit_runtime.backends.base import Array, Engine, Int32, RunInputs, StepResult
from dit_runtime.backends.conditioning import (
    Condition,
    ConditioningTable,
    TableLimits,
    bytes_of_row,
    inputs_from_conditions,
)
from dit_runtime.backends.step import STATE_SLOTS, state_from_latents, step_inputs
from dit_runtime.bundle.manifest import Manifest, TensorSpec
from dit_runtime.samplers.noise import Float32


class HostTable:
    """The rows of a conditioning table in one array. A call of the conditioner computes part of them.

    Attributes:
        array: ``[R, …]``.
        fills: how often rows were computed.
    """

    granule = 1

    def __init__(self, engine: Engine, spec: TensorSpec, limits: TableLimits) -> None:
        self._conditioner, self._name = engine.session("conditioner"), spec.name
        self.capacity = max(1, limits.table_bytes // bytes_of_row(spec))
        self._chunk = max(1, limits.conditioner_bytes // bytes_of_row(spec))
        self.fills = 0
        self.array: Array = np.empty((0, *(int(axis) for axis in spec.shape[1:])), np.dtype(spec.dtype))

    def fill(self, conditions: Sequence[Condition], first: int) -> None:
        """As ``TableMemory.fill``."""
        self.fills += 1
        if not first and len(conditions) <= self._chunk:
            self.array = self._compute(conditions)  # most runs: one call computes all rows, and no row is copied
            return
        if len(self.array) < self.capacity:
            # Memory is taken only for the pages that are written.
            memory = np.empty((self.capacity, *self.array.shape[1:]), self.array.dtype)
            memory[:first] = self.array[:first]
            self.array = memory
        for start in range(0, len(conditions), self._chunk):
            chunk = conditions[start : start + self._chunk]
            self.array[first + start : first + start + len(chunk)] = self._compute(chunk)

    def _compute(self, conditions: Sequence[Condition]) -> Array:
        (rows,) = self._conditioner.run(inputs_from_conditions(conditions), [self._name])
        return rows


class HostStepResult(NamedTuple):
    """``StepResult`` of arrays on the host."""

    state: Float32
    denoised: Float32

    @property
    def at_hand(self) -> bool:
        return True


class HostLoop:
    """``base.Loop`` on an engine's sessions."""

    looks_ahead = False

    def __init__(self, engine: Engine, manifest: Manifest, limits: TableLimits) -> None:
        model = manifest.model
        self._session, self._manifest = engine.session("step"), manifest
        self._memory = HostTable(engine, manifest.table, limits)
        self.table = ConditioningTable(self._memory, limits.table_bytes)
        shape = (model.latent_channels, *model.latent_size)
        self._state: Float32 = np.zeros((0, STATE_SLOTS, *shape), np.float32)
        self._noise: Float32 = np.zeros((0, *shape), np.float32)

    def add(self, latents: Float32) -> None:
        """As ``Loop.add``."""
        self._state = np.concatenate([self._state, state_from_latents(latents)])
        self._noise = np.zeros_like(self._state[:, 0])

    def keep(self, positions: Sequence[int]) -> None:
        """As ``Loop.keep``."""
        kept = list(positions)
        self._state, self._noise = self._state[kept], self._noise[kept]

    def run_row(self, inputs: RunInputs, row: int, noise: Float32 | None) -> StepResult:
        """As ``Loop.run_row``."""
        if noise is not None:
            self._noise[:] = noise
        branches = inputs.needed[row]
        return self._run(inputs.coefficients[row], inputs.guidance[row, :branches], inputs.rows[row, :branches])

    def run_step(
        self, coefficients: Float32, guidance: Float32, rows: Int32, noise: Float32 | None, drawing: Sequence[int]
    ) -> StepResult:
        """As ``Loop.run_step``."""
        # A row that draws no noise has k = 0, so noise left from an earlier step has no effect.
        if noise is not None:
            self._noise[list(drawing)] = noise
        return self._run(coefficients, guidance, rows)

    def _run(self, coefficients: Float32, guidance: Float32, rows: Int32) -> StepResult:
        table = self._memory.array[: len(self.table)]
        inputs = step_inputs(self._manifest, self._state, coefficients, guidance, rows, table, self._noise)
        state, denoised = self._session.run(inputs, ["next_state", "denoised"])
        self._state = state
        return HostStepResult(state, denoised)

    def close(self) -> None:
        """As ``Loop.close``. There is nothing to free."""
