"""ONNX Runtime's CUDA graphs on the CPU: real sessions and values, and the contract of the capture around them.

As ONNX Runtime's CUDA provider does, the double replays the binding that was captured under a number, at the addresses
and shapes it had then, whatever is bound when the number comes again. A call that would replay anything but what it
binds is an error here; on a GPU it gives wrong numbers in silence.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnxruntime

from dit_runtime.backends.onnxruntime.steps import GRAPH_ID, UNCAPTURED

WARM_UPS = 2  # runs of ONNX Runtime before and while it captures


class Misuse(BaseException):
    """A call that a GPU would answer with wrong numbers. No code under test handles it as an error of the library."""


class Binding:
    """A real binding that says which addresses and shapes are bound."""

    def __init__(self, real: Any) -> None:
        self.real = real
        self.bound: dict[tuple[str, str], tuple[int, tuple[int, ...]]] = {}
        self.values: list[Any] = []

    def bind_ortvalue_input(self, name: str, value: Any) -> None:
        self._note("input", name, value)
        self.real.bind_ortvalue_input(name, value)

    def bind_ortvalue_output(self, name: str, value: Any) -> None:
        self._note("output", name, value)
        self.real.bind_ortvalue_output(name, value)

    def _note(self, kind: str, name: str, value: Any) -> None:
        self.bound[kind, name] = value.data_ptr(), tuple(value.shape())
        self.values.append(value)

    def __getattr__(self, name: str) -> Any:  # of single calls, which are not captured
        return getattr(self.real, name)


class GraphSession:
    """A session with ``enable_cuda_graph``.

    Attributes:
        captured: the binding of each number.
        replays: calls that replayed a graph.
        refuses: an error that each capture raises, or None.
    """

    def __init__(self, path: Path) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.real = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.captured: dict[str, Binding] = {}
        self.replays = 0
        self.refuses: Exception | None = None

    def io_binding(self) -> Binding:
        return Binding(self.real.io_binding())

    def run_with_iobinding(self, binding: Binding, options: Any = None) -> None:
        number = "0" if options is None else options.get_run_config_entry(GRAPH_ID)
        if number == UNCAPTURED:
            self.real.run_with_iobinding(binding.real)
        elif number in self.captured:
            graph = self.captured[number]
            if binding.bound != graph.bound:
                raise Misuse(f"graph {number} was captured with other addresses or shapes")
            self.replays += 1
            self.real.run_with_iobinding(graph.real)
        else:
            if not binding.bound:
                raise Misuse("a call that is captured binds values at fixed addresses")
            if self.refuses is not None:
                raise self.refuses
            for _ in range(WARM_UPS):  # each time from the same inputs: none of them may be an output too
                self.real.run_with_iobinding(binding.real)
            written = [place for (kind, _), place in binding.bound.items() if kind == "output"]
            read = [place for (kind, _), place in binding.bound.items() if kind == "input"]
            if set(written) & set(read):
                raise Misuse("a step that overwrites its input is not the same when it is captured")
            self.captured[number] = binding
