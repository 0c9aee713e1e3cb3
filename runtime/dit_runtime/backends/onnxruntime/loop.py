"""The loop of ONNX Runtime's CUDA provider: latents, noise and conditioning table stay on the GPU between the steps.

Only a step's small inputs, and its noise where it draws some, are copied to the GPU. Latents come back when they are
read, and when images join or leave the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from dit_runtime.backends.base import Array, Engine, Int32, RunInputs, StepResult
from dit_runtime.backends.conditioning import TableLimits
from dit_runtime.backends.host_loop import HostLoop
from dit_runtime.bundle.manifest import Manifest
from dit_runtime.samplers.noise import Float32

# Runs the step: values on the GPU, the other inputs, names of outputs → values on the GPU.
RunResident = Callable[[Mapping[str, Any], Mapping[str, Array], Sequence[str]], list[Any]]


class ResidentStepResult:
    """``StepResult`` of values on a GPU. Reading one copies it to the host."""

    at_hand = False

    def __init__(self, state: Any, denoised: Any) -> None:
        self._state, self._denoised = state, denoised

    @cached_property
    def state(self) -> Float32:
        values: Float32 = self._state.numpy()
        return values

    @cached_property
    def denoised(self) -> Float32:
        values: Float32 = self._denoised.numpy()
        return values


class ResidentLoop(HostLoop):
    """``base.Loop`` on a session of the CUDA provider.

    Args:
        engine: whose conditioner runs.
        manifest: of the bundle.
        limits: of the conditioning table's memory.
        send: copies an array to the GPU, and returns ONNX Runtime's value of it.
        run: runs the step.
    """

    looks_ahead = True  # else the table would be copied to the GPU again for each step that adds to it

    def __init__(
        self,
        engine: Engine,
        manifest: Manifest,
        limits: TableLimits,
        send: Callable[[Array], Any],
        run: RunResident,
    ) -> None:
        super().__init__(engine, manifest, limits)
        self._send, self._run_resident = send, run
        self._last: ResidentStepResult | None = None
        self._values: dict[str, Any] = {}  # on the GPU
        self._table_fills = 0

    def add(self, latents: Float32) -> None:
        """As ``Loop.add``."""
        self._fetch()
        super().add(latents)

    def keep(self, positions: Sequence[int]) -> None:
        """As ``Loop.keep``."""
        self._fetch()
        super().keep(positions)

    def run_row(self, inputs: RunInputs, row: int, noise: Float32 | None) -> StepResult:
        """As ``Loop.run_row``."""
        self._forget_noise(noise)
        return super().run_row(inputs, row, noise)

    def run_step(
        self, coefficients: Float32, guidance: Float32, rows: Int32, noise: Float32 | None, drawing: Sequence[int]
    ) -> StepResult:
        """As ``Loop.run_step``."""
        self._forget_noise(noise)
        return super().run_step(coefficients, guidance, rows, noise, drawing)

    def close(self) -> None:
        """As ``Loop.close``. The memory on the GPU is given back."""
        self._values.clear()
        self._last = None

    def _run(self, coefficients: Float32, guidance: Float32, rows: Int32) -> ResidentStepResult:
        table = self._manifest.table.name
        if self._table_fills != self._memory.fills:
            self._values.pop(table, None)
            self._table_fills = self._memory.fills
        held = {"state": self._state, "noise": self._noise, table: self._memory.array[: len(self.table)]}
        for name, array in held.items():
            if name not in self._values:
                self._values[name] = self._send(array)
        small: dict[str, Array] = {"coefficients": coefficients, "guidance": guidance, "rows": rows}
        state, denoised = self._run_resident(self._values, small, ("next_state", "denoised"))
        self._values["state"] = state
        self._last = ResidentStepResult(state, denoised)
        return self._last

    def _fetch(self) -> None:
        """Take the latents back to the host, where images join and leave."""
        if self._last is not None:
            self._state, self._last = np.array(self._last.state), None
        for name in ("state", "noise"):
            self._values.pop(name, None)

    def _forget_noise(self, noise: Float32 | None) -> None:
        if noise is not None:
            self._values.pop("noise", None)
