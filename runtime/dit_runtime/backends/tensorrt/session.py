"""The session of a TensorRT engine: single calls of one graph, arrays in and arrays out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from dit_runtime.backends.base import Array
from dit_runtime.backends.profiles import PADDED
from dit_runtime.backends.tensorrt import api as tensorrt_api
from dit_runtime.backends.tensorrt.buffers import DeviceBuffer, Layout, PinnedBuffer, put
from dit_runtime.backends.tensorrt.device import Device
from dit_runtime.bundle.manifest import GraphSpec
from dit_runtime.core.errors import EngineError


class TensorRtSession:
    """Single calls of one graph. Several threads may call it; one call runs at a time."""

    def __init__(self, device: Device, graph: str) -> None:
        self._device, self._graph = device, graph
        self._inputs = DeviceBuffer(device.cuda, device.stream, device.make_room)
        self._outputs = DeviceBuffer(device.cuda, device.stream, device.make_room)
        self._host = PinnedBuffer(device.cuda, device.stream)

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> list[Array]:
        """As ``Session.run``.

        Raises:
            EngineError: no profile takes the shapes, an input has another dtype, or the device failed.
        """
        with self._device.lock:
            return self._run(inputs, outputs)

    def _run(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> list[Array]:
        device, cuda, stream = self._device, self._device.cuda, self._device.stream
        spec = device.manifest.graphs[self._graph]
        arrays = {tensor.name: np.asarray(inputs[tensor.name]) for tensor in spec.inputs}
        fit = device.find_fit(self._graph, {name: array.shape for name, array in arrays.items()})
        loaded = device.load(self._graph)
        cuda.synchronize(stream)  # an interrupted call may have left queued work of this context
        context = device.context_for(loaded, fit.profile)
        device.give_activations(context, loaded, fit.profile)
        taken = {name: array for name, array in arrays.items() if name in loaded.tensors}
        for name, array in taken.items():
            if array.dtype != loaded.tensors[name].dtype:
                raise EngineError(
                    f"{device.name}: input {name} is {array.dtype}, expected {loaded.tensors[name].dtype}"
                )
        given = Layout({name: (fit.shapes[name], loaded.tensors[name].dtype) for name in taken})
        self._inputs.reserve(given.size)
        for name, region in given.regions.items():
            tensorrt_api.bind(context, name, self._inputs.address + region.offset, region.shape)
        found = {
            name: (tensorrt_api.output_shape_of(context, name), tensor.dtype)
            for name, tensor in loaded.tensors.items()
            if not tensor.is_input
        }
        made = Layout(found)
        self._outputs.reserve(made.size)
        for name, region in made.regions.items():
            tensorrt_api.bind(context, name, self._outputs.address + region.offset)
        host = self._host.reserve(given.size + made.size)
        for name, array in taken.items():
            view = given[name].view(host)
            put(view, array)
            cuda.upload(self._inputs.address + given[name].offset, view, stream)
        device.start(context)
        results = [made[name].view(host[given.size :]) for name in outputs]
        for name, result in zip(outputs, results, strict=True):
            cuda.download(result, self._outputs.address + made[name].offset, stream)
        cuda.synchronize(stream)
        sizes = _padded_sizes_of(spec, arrays)
        return [self._cut(spec, name, result, sizes) for name, result in zip(outputs, results, strict=True)]

    @staticmethod
    def _cut(spec: GraphSpec, name: str, value: Array, sizes: Mapping[str, int]) -> Array:
        """Copy an output without its padding."""
        (tensor,) = (tensor for tensor in spec.outputs if tensor.name == name)
        return value[tuple(slice(sizes.get(str(axis))) for axis in tensor.shape)].copy()

    def free(self) -> None:
        """Free the memory that the calls used."""
        for memory in (self._inputs, self._outputs, self._host):
            memory.free()


def _padded_sizes_of(spec: GraphSpec, arrays: Mapping[str, Array]) -> dict[str, int]:
    """The size of each axis of ``PADDED`` that the inputs have."""
    return {
        axis: size
        for tensor in spec.inputs
        for axis, size in zip(tensor.shape, arrays[tensor.name].shape, strict=True)
        if isinstance(axis, str) and axis in PADDED
    }
