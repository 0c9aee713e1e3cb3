"""A plan on the device, and single calls of it: arrays in, arrays out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dit_runtime.backends.open import Array
from dit_runtime.backends.tensorrt import api as tensorrt_api
from dit_runtime.backends.tensorrt.api import TensorRT
from dit_runtime.backends.tensorrt.buffers import (
    DeviceBuffer,
    Layout,
    PinnedBuffer,
    put,
)
from dit_runtime.backends.tensorrt.cuda import Cuda
from dit_runtime.backends.tensorrt.store import Shape, StoredGraph
from dit_runtime.bundle.manifest import GraphSpec
from dit_runtime.core.errors import EngineError

if TYPE_CHECKING:
    from dit_runtime.backends.tensorrt.engine import TensorRtEngine

# Axes that may be longer than what is asked for: an image, branch or row of zeros changes none of the others.
PADDED = ("batch", "branches", "rows")


class Fit(NamedTuple):
    """An optimization profile for a call, and the inputs' shapes in it: as they are, or up to the profile's least."""

    profile: int
    shapes: dict[str, Shape]


def find_fit(spec: GraphSpec, stored: StoredGraph, shapes: Mapping[str, Shape]) -> Fit | None:
    """The profile that takes inputs of these shapes with the least padding, then memory; None where none does."""
    fits = []
    for index, profile in enumerate(stored.profiles):
        padded = {}
        for tensor in spec.inputs:
            least, _, largest = profile[tensor.name]
            shape = tuple(
                max(size, low) if axis in PADDED else size
                for size, low, axis in zip(shapes[tensor.name], least, tensor.shape, strict=True)
            )
            if not all(low <= size <= high for low, size, high in zip(least, shape, largest, strict=True)):
                break
            padded[tensor.name] = shape
        else:
            fits.append(Fit(index, padded))
    return min(fits, key=lambda fit: (_volume(fit.shapes), stored.activation_bytes[fit.profile]), default=None)


class Loaded:
    """A plan on the device: ``engine`` is the library's, ``tensors`` its inputs and outputs."""

    def __init__(self, library: TensorRT, runtime: Any, plan: memoryview) -> None:
        self._library = library
        self.engine = tensorrt_api.engine_from_plan(runtime, plan)
        self.tensors = tensorrt_api.tensors_of(library, self.engine)
        self._contexts: dict[int, Any] = {}

    def new_context(self, profile: int, cuda: Cuda, stream: int) -> Any:
        """An execution context of its own for a captured graph."""
        context = tensorrt_api.context_of(self._library, self.engine, profile, stream)
        cuda.synchronize(stream)  # the switch to the profile
        return context

    def context(self, profile: int, cuda: Cuda, stream: int) -> Any:
        """The context of a profile for calls that are not captured."""
        if profile not in self._contexts:
            self._contexts[profile] = self.new_context(profile, cuda, stream)
        return self._contexts[profile]

    def activation_bytes(self, profile: int) -> int:
        return tensorrt_api.activation_bytes(self.engine, profile)


class TensorRtSession:
    """A graph for single calls: arrays in, arrays out. Threads take turns."""

    def __init__(self, engine: TensorRtEngine, graph: str) -> None:
        self._engine, self._graph = engine, graph
        self._inputs = DeviceBuffer(engine.cuda, engine.stream, engine.room)
        self._outputs = DeviceBuffer(engine.cuda, engine.stream, engine.room)
        self._host = PinnedBuffer(engine.cuda, engine.stream)

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> list[Array]:
        """The named outputs. Inputs have the dtypes and shapes of the bundle's manifest.

        Raises:
            EngineError: no profile takes the shapes, another dtype, or the device failed.
        """
        with self._engine.lock:
            return self._run(inputs, outputs)

    def _run(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> list[Array]:
        engine, cuda, stream = self._engine, self._engine.cuda, self._engine.stream
        spec = engine.bundle.manifest.graphs[self._graph]
        arrays = {tensor.name: np.asarray(inputs[tensor.name]) for tensor in spec.inputs}
        fit = engine.fit(self._graph, {name: array.shape for name, array in arrays.items()})
        loaded = engine.load(self._graph)
        cuda.synchronize(stream)  # a call that was interrupted may have left work with this context
        context = loaded.context(fit.profile, cuda, stream)
        engine.give_activations(context, loaded, fit.profile)
        taken = {name: array for name, array in arrays.items() if name in loaded.tensors}
        for name, array in taken.items():
            if array.dtype != loaded.tensors[name].dtype:
                raise EngineError(
                    f"{engine.name}: input {name} is {array.dtype}, expected {loaded.tensors[name].dtype}"
                )
        given = Layout({name: (fit.shapes[name], loaded.tensors[name].dtype) for name in taken})
        self._inputs.reserve(given.size)
        for name, place in given.regions.items():
            tensorrt_api.bind(context, name, self._inputs.address + place.offset, place.shape)
        found = {
            name: (tensorrt_api.output_shape(context, name), tensor.dtype)
            for name, tensor in loaded.tensors.items()
            if not tensor.is_input
        }
        made = Layout(found)
        self._outputs.reserve(made.size)
        for name, place in made.regions.items():
            tensorrt_api.bind(context, name, self._outputs.address + place.offset)
        host = self._host.reserve(given.size + made.size)
        for name, array in taken.items():
            view = given[name].view(host)
            put(view, array)
            cuda.upload(self._inputs.address + given[name].offset, view, stream)
        engine.start(context)
        results = [made[name].view(host[given.size :]) for name in outputs]
        for name, result in zip(outputs, results, strict=True):
            cuda.download(result, self._outputs.address + made[name].offset, stream)
        cuda.synchronize(stream)
        sizes = _sizes(spec, arrays)
        return [self._cut(spec, name, result, sizes) for name, result in zip(outputs, results, strict=True)]

    @staticmethod
    def _cut(spec: GraphSpec, name: str, value: Array, sizes: Mapping[str, int]) -> Array:
        """A copy of an output without what was padded."""
        (tensor,) = (tensor for tensor in spec.outputs if tensor.name == name)
        return value[tuple(slice(sizes.get(str(axis))) for axis in tensor.shape)].copy()

    def free(self) -> None:
        """Give back what the calls used."""
        for memory in (self._inputs, self._outputs, self._host):
            memory.free()


def _sizes(spec: GraphSpec, arrays: Mapping[str, Array]) -> dict[str, int]:
    """The size of each axis that may be padded."""
    return {
        axis: size
        for tensor in spec.inputs
        for axis, size in zip(tensor.shape, arrays[tensor.name].shape, strict=True)
        if isinstance(axis, str) and axis in PADDED
    }


def _volume(shapes: Mapping[str, Shape]) -> int:
    return sum(math.prod(shape) for shape in shapes.values())
