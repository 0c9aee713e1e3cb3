"""The step at fixed addresses on the GPU, so that ONNX Runtime's CUDA provider can capture it as a CUDA graph.

A captured graph reads and writes the addresses of the call that was captured, at its shapes (onnxruntime.ai, CUDA
Execution Provider, Using CUDA Graphs). So the state has two places: one graph steps from the first to the second,
another one back, and nothing is copied between steps. ``gpu_graph_id`` names the graph of a call; -1 captures and
replays none.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np

from dit_runtime.backends.base import Array

GRAPH_ID, UNCAPTURED = "gpu_graph_id", "-1"
STATE, NEXT_STATE, DENOISED = "state", "next_state", "denoised"
MOST_GRAPHS = 64  # of a session: graphs stay as long as it does; steps of further shapes run uncaptured
LEAST_ROWS = 16  # of a conditioning table on the GPU
FLOAT32 = np.dtype(np.float32)

logger = logging.getLogger(__name__)

Shape = tuple[int, ...]
Shapes = tuple[tuple[str, Shape], ...]


class FixedSteps:
    """The steps of one loop at a time, on memory of the GPU that stays where it is.

    Args:
        runtime: the imported module ``onnxruntime``.
        session: of the step.
        memory: ONNX Runtime's name of the GPU's memory.
        numbers: the numbers that its graphs may have; empty where the session captures none. Different ``FixedSteps``
            of one session have different numbers.
    """

    def __init__(self, runtime: Any, session: Any, memory: str, numbers: range) -> None:
        self.session = session
        self._runtime, self._memory, self._numbers = runtime, memory, numbers
        self._values: dict[tuple[str, Shape, int], Any] = {}  # by name, shape, and which of the state's two places
        self._bindings: dict[tuple[Shapes, int], tuple[Any, Any]] = {}
        self._shapes: dict[str, Shape] = {}
        self._turns: dict[Shape, int] = {}  # which place holds the state, by its shape

    def put(self, name: str, array: Array) -> None:
        """Copy an input of the next steps to its place on the GPU."""
        self._shapes[name] = array.shape
        turn = self._turns.get(array.shape, 0) if name == STATE else 0
        self._value(name, array.shape, array.dtype, turn).update_inplace(np.ascontiguousarray(array))

    def run(self) -> tuple[Any, Any]:
        """Run the step with the inputs that were put last, and the state of the last step unless it was put since.

        Returns:
            ONNX Runtime's values of ``next_state`` and ``denoised``. The next call overwrites ``denoised``.
        """
        state, shapes = self._shapes[STATE], tuple(sorted(self._shapes.items()))
        turn = self._turns.get(state, 0)
        denoised = self._value(DENOISED, state[:1] + state[2:], FLOAT32)  # [B, C, H, W] of [B, 3, C, H, W]
        following = self._value(STATE, state, FLOAT32, 1 - turn)
        if (shapes, turn) not in self._bindings:
            binding = self.session.io_binding()
            for name, shape in shapes:
                binding.bind_ortvalue_input(name, self._values[name, shape, turn if name == STATE else 0])
            binding.bind_ortvalue_output(NEXT_STATE, following)
            binding.bind_ortvalue_output(DENOISED, denoised)
            self._bindings[shapes, turn] = binding, run_options(self._runtime, self._next_number())
        self._run(shapes, turn)
        self._turns[state] = 1 - turn
        return following, denoised

    def _run(self, shapes: Shapes, turn: int) -> None:
        binding, options = self._bindings[shapes, turn]
        try:
            self.session.run_with_iobinding(binding, options)
        except Exception as error:  # ONNX Runtime's exception types are not public
            if options.get_run_config_entry(GRAPH_ID) == UNCAPTURED:
                raise
            logger.warning("ONNX Runtime cannot capture the step as a CUDA graph (%s); steps run without", error)
            uncaptured = run_options(self._runtime, UNCAPTURED)
            self._numbers = range(0)
            self._bindings = {key: (each, uncaptured) for key, (each, _) in self._bindings.items()}
            self.session.run_with_iobinding(binding, uncaptured)  # its inputs are as they were

    def _next_number(self) -> str:
        used = len(self._bindings)
        return str(self._numbers[used]) if used < len(self._numbers) else UNCAPTURED

    def _value(self, name: str, shape: Shape, dtype: np.dtype[Any], turn: int = 0) -> Any:
        """The memory of a tensor, taken at its first use."""
        if (name, shape, turn) not in self._values:
            make = self._runtime.OrtValue.ortvalue_from_shape_and_type
            self._values[name, shape, turn] = make(list(shape), dtype, self._memory, 0)
        return self._values[name, shape, turn]


def run_options(runtime: Any, graph: str) -> Any:
    """Options of a call with the number of its CUDA graph."""
    options = runtime.RunOptions()
    options.add_run_config_entry(GRAPH_ID, graph)
    return options


def pad_rows(table: Array, most: int) -> Array:
    """A conditioning table with as many rows as the next power of two, at most ``most``.

    So a CUDA graph serves runs of several lengths.
    """
    rows = min(max(LEAST_ROWS, 1 << (len(table) - 1).bit_length()), most)
    padded = np.zeros((rows, *table.shape[1:]), table.dtype)
    padded[: len(table)] = table
    return padded
