"""The loop of ONNX Runtime's CUDA provider: latents, noise and conditioning table stay on the GPU between the steps.

Only a step's small inputs, and its noise where it draws some, are copied to the GPU. Latents come back when they are
read, and when images join or leave the batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from dit_runtime.backends.base import Array, Engine, Int32, RunInputs, StepResult
from dit_runtime.backends.conditioning import TableLimits
from dit_runtime.backends.host_loop import HostLoop
from dit_runtime.backends.onnxruntime.steps import FixedSteps, pad_rows
from dit_runtime.backends.step import refuse_earlier_step
from dit_runtime.bundle.manifest import Manifest
from dit_runtime.samplers.noise import Float32


class StepSession(Protocol):
    """The session of the step: it lends memory on the GPU to a loop, and runs the step on it."""

    def take_steps(self, runtime: Any) -> FixedSteps: ...
    def run_steps(self, steps: FixedSteps, inputs: Mapping[str, Array]) -> tuple[Any, Any]: ...
    def give_back(self, steps: FixedSteps) -> None: ...


class ResidentStepResult:
    """``StepResult`` of values on the GPU. Reading them copies them to the host; only the last step's can be read."""

    at_hand = False

    def __init__(self, values: tuple[Any, Any]) -> None:
        self._values: tuple[Any, Any] | None = values
        self._read: tuple[Float32, Float32] | None = None

    def end(self) -> None:
        """Forget the values, before the next step overwrites them."""
        self._values = None

    @property
    def state(self) -> Float32:
        return self._arrays()[0]

    @property
    def denoised(self) -> Float32:
        return self._arrays()[1]

    def _arrays(self) -> tuple[Float32, Float32]:
        if self._read is None:
            if self._values is None:
                refuse_earlier_step()
            else:
                state, denoised = self._values
                self._read = np.array(state.numpy()), np.array(denoised.numpy())
        assert self._read is not None
        return self._read


class ResidentLoop(HostLoop):
    """``base.Loop`` on a session of the CUDA provider.

    Args:
        engine: whose conditioner runs.
        manifest: of the bundle.
        limits: of the conditioning table's memory.
        session: of the step.
        runtime: the imported module ``onnxruntime``.
    """

    looks_ahead = True  # else the table would be copied to the GPU again for each step that adds to it

    def __init__(
        self, engine: Engine, manifest: Manifest, limits: TableLimits, session: StepSession, runtime: Any
    ) -> None:
        super().__init__(engine, manifest, limits)
        self._step_session, self._steps = session, session.take_steps(runtime)
        self._last: ResidentStepResult | None = None
        self._sent: set[str] = set()  # inputs that are on the GPU
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
        """As ``Loop.close``. The memory on the GPU, and its CUDA graphs, serve the next loop."""
        self._step_session.give_back(self._steps)

    def _run(self, coefficients: Float32, guidance: Float32, rows: Int32) -> ResidentStepResult:
        if self._last is not None:
            self._last.end()
        table = self._manifest.table.name
        if self._table_fills != self._memory.fills:
            self._sent.discard(table)
            self._table_fills = self._memory.fills
        inputs: dict[str, Array] = {"coefficients": coefficients, "guidance": guidance, "rows": rows}
        held = {"state": self._state, "noise": self._noise, table: self._memory.array[: len(self.table)]}
        for name in held.keys() - self._sent:
            inputs[name] = pad_rows(held[name], self._memory.capacity) if name == table else held[name]
        result = ResidentStepResult(self._step_session.run_steps(self._steps, inputs))
        self._sent.update(held)
        self._last = result
        return result

    def _fetch(self) -> None:
        """Take the latents back to the host, where images join and leave."""
        if self._last is not None:
            self._state, self._last = self._last.state, None
        self._sent -= {"state", "noise"}

    def _forget_noise(self, noise: Float32 | None) -> None:
        if noise is not None:
            self._sent.discard("noise")
