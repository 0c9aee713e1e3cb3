"""Triton's module ``triton_python_backend_utils`` as far as the model uses it, and requests that note their answers."""

from __future__ import annotations

import enum
import queue
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np

TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1


class TritonModelException(Exception):
    pass


class TritonError:
    class Code(enum.Enum):
        INTERNAL = 1
        INVALID_ARG = 2
        UNAVAILABLE = 3

    INTERNAL, INVALID_ARG, UNAVAILABLE = Code

    def __init__(self, message: str, code: Code) -> None:
        assert isinstance(code, TritonError.Code)
        self.text, self.code = message, code


class Tensor:
    def __init__(self, name: str, value: Any) -> None:
        assert isinstance(value, np.ndarray)
        self._name, self._value = name, value

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> Any:
        return self._value


class InferenceResponse:
    def __init__(self, output_tensors: Sequence[Tensor] = (), error: TritonError | None = None) -> None:
        self.tensors, self.error = {tensor.name(): tensor.as_numpy() for tensor in output_tensors}, error


class MetricFamily:
    COUNTER, GAUGE = "counter", "gauge"
    values: dict[tuple[str, str], float] = {}  # of the whole server, whatever becomes of a model  # noqa: RUF012

    def __init__(self, name: str, description: str, kind: str) -> None:
        self._name = name

    def Metric(self, labels: dict[str, str]) -> Any:  # Triton's name
        key, values = (self._name, labels["instance"]), self.values
        values.setdefault(key, 0)

        class Metric:
            def set(self, value: float) -> None:
                values[key] = value

            def increment(self, value: float) -> None:
                assert value >= 0
                values[key] += value

        return Metric()


class Request:
    """A request with tensors by name, and its answers: ``(response, final)``."""

    def __init__(self, **tensors: Any) -> None:
        self._tensors = [Tensor(name, _as_tensor(value)) for name, value in tensors.items()]
        self.answers: queue.Queue[tuple[Any, bool]] = queue.Queue()
        self.cancelled = self.ended = False

    def inputs(self) -> list[Tensor]:
        return self._tensors

    def get_response_sender(self) -> Request:
        return self

    def is_cancelled(self) -> bool:
        return self.cancelled

    def send(self, response: Any = None, flags: int = 0) -> None:
        assert not self.ended, "an answer after the last one"
        self.ended = flags == TRITONSERVER_RESPONSE_COMPLETE_FINAL
        self.answers.put((response, self.ended))


def _as_tensor(value: Any) -> Any:
    values = value if isinstance(value, list) else [value]
    if isinstance(values[0], str):
        return np.array([text.encode() for text in values], np.object_)
    return np.array(values, np.float64 if isinstance(values[0], float) else np.int64)


def as_module() -> ModuleType:
    module = ModuleType("triton_python_backend_utils")
    for item in (TritonModelException, TritonError, Tensor, InferenceResponse, MetricFamily):
        setattr(module, item.__name__, item)
    module.TRITONSERVER_RESPONSE_COMPLETE_FINAL = TRITONSERVER_RESPONSE_COMPLETE_FINAL  # type: ignore[attr-defined]
    return module
