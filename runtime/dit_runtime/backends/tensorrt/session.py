"""The session of a TensorRT engine: single calls of one graph, arrays in and arrays out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from dit_runtime.backends.base import Array
from dit_runtime.backends.profiles import PADDED, Fit, Shape
from dit_runtime.backends.tensorrt.buffers import DeviceBuffer, Layout, PinnedBuffer, put
from dit_runtime.backends.tensorrt.context import Context
from dit_runtime.backends.tensorrt.device import Device, LoadedPlan
from dit_runtime.backends.tensorrt.graphs import Graphs
from dit_runtime.bundle.manifest import GraphSpec
from dit_runtime.core.errors import EngineError

Key = tuple[int, tuple[Shape, ...]]  # a profile, and the shapes of the inputs in it


class TensorRtSession:
    """Single calls of one graph. Several threads may call it; one call runs at a time.

    Args:
        device: that runs the graph.
        graph: its name in the manifest.
        captured: whether calls from the second of a shape on are CUDA graphs.
    """

    def __init__(self, device: Device, graph: str, captured: bool = False) -> None:
        self._device, self._graph, self._captures = device, graph, captured
        self._inputs = DeviceBuffer(device.cuda, device.stream, device.make_room)
        self._outputs = DeviceBuffer(device.cuda, device.stream, device.make_room)
        self._host = PinnedBuffer(device.cuda, device.stream)
        self._graphs: Graphs[Key] = Graphs(device, graph, self._count_moves)
        self._made: dict[Key, Layout] = {}

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
        taken = {name: array for name, array in arrays.items() if name in loaded.tensors}
        for name, array in taken.items():
            if array.dtype != loaded.tensors[name].dtype:
                raise EngineError(
                    f"{device.name}: input {name} is {array.dtype}, expected {loaded.tensors[name].dtype}"
                )
        given = Layout({name: (fit.shapes[name], loaded.tensors[name].dtype) for name in taken})
        self._inputs.reserve(given.size)
        key = (fit.profile, tuple(fit.shapes[name] for name in taken))
        if (made := self._made.get(key)) is None:
            context = device.context_for(loaded, fit.profile)
            made = self._bind(context, loaded, fit, given)
        host = self._host.reserve(given.size + made.size)
        for name, array in taken.items():
            view = given[name].view(host)
            put(view, array)
            cuda.upload(self._inputs.address + given[name].offset, view, stream)
        if key in self._made:
            self._launch(key, fit, given, made)
        else:
            device.start(context)
        results = [made[name].view(host[given.size :]) for name in outputs]
        for name, result in zip(outputs, results, strict=True):
            cuda.download(result, self._outputs.address + made[name].offset, stream)
        cuda.synchronize(stream)
        if self._captures:
            self._made[key] = made
        sizes = _padded_sizes_of(spec, arrays)
        return [self._cut(spec, name, result, sizes) for name, result in zip(outputs, results, strict=True)]

    def _bind(self, context: Context, loaded: LoadedPlan, fit: Fit, given: Layout) -> Layout:
        """Bind a context that is not captured; returns the outputs' layout, which the library knows then."""
        self._device.give_activations(context, loaded, fit.profile)
        for name, region in given.regions.items():
            context.bind(name, self._inputs.address + region.offset, region.shape)
        outputs = {name: tensor for name, tensor in loaded.tensors.items() if not tensor.is_input}
        made = Layout({name: (context.output_shape_of(name), tensor.dtype) for name, tensor in outputs.items()})
        self._outputs.reserve(made.size)
        for name, region in made.regions.items():
            context.bind(name, self._outputs.address + region.offset)
        return made

    def _launch(self, key: Key, fit: Fit, given: Layout, made: Layout) -> None:
        """Queue the CUDA graph of a shape that was run before."""
        stored = self._device.find_stored_graph(self._graph)
        self._outputs.reserve(made.size)
        places = ((self._inputs, given), (self._outputs, made))
        addresses = {name: at.address + part.offset for at, layout in places for name, part in layout.regions.items()}
        self._graphs.launch(key, fit, lambda: addresses, lambda: max(stored.activation_bytes[fit.profile], 1))

    def _count_moves(self) -> tuple[int, int, int]:
        return self._device.activations.moves, self._inputs.moves, self._outputs.moves

    @staticmethod
    def _cut(spec: GraphSpec, name: str, value: Array, sizes: Mapping[str, int]) -> Array:
        """Copy an output without its padding."""
        (tensor,) = (tensor for tensor in spec.outputs if tensor.name == name)
        return value[tuple(slice(sizes.get(str(axis))) for axis in tensor.shape)].copy()

    def free(self) -> None:
        """Free the memory that the calls used, and the CUDA graphs."""
        self._graphs.free()
        self._made.clear()
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
