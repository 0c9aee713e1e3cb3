"""Tries an INT8 bundle with some of its linear layers unquantized, on ONNX Runtime.

One graph serves all trials: each quantized layer gets a switch, which says whether its input is rounded to INT8, and
its weight becomes an input of the graph. The graph computes in FP32, so that only INT8 rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from dit_export.bisect.altered_engine import AlteredEngine, AlteredSession, open_altered_engine
from dit_export.bisect.graph_edits import Array, move_to_fp32
from dit_runtime.backends.base import Session
from dit_runtime.backends.onnxruntime.engine import import_onnxruntime
from dit_runtime.bundle.manifest import ENCODER
from dit_runtime.bundle.quantization import factors_by_layer, linears_of
from dit_runtime.bundle.reader import CALIBRATION, UNQUANTIZED, Bundle
from dit_runtime.core.errors import CheckpointError
from dit_runtime.samplers.schedule import B_E, COEFFICIENTS
from dit_runtime.verify.image_rungs import free_running, worst_psnr
from dit_runtime.verify.metrics import relative_l2
from dit_runtime.verify.replay import RecordedInputs, Replay
from dit_runtime.verify.verification import recorded_trajectory, trajectories_of

HALF_LEVEL = 0.51  # as far as a weight may be from its integer, in levels; FP16's rounding of the scale is in it


@dataclass(frozen=True)
class QuantizedLayer:
    """A linear layer as an INT8 graph stores it.

    Attributes:
        name: as ``blocks.17.mlp.fc2``.
        numbers: the weight's integers, int8 ``[in, out]``.
        scales: of the output channels, float32 ``[out]``.
        exact: the weight in FP16 that stands in the same place when the layer is not quantized, float16 ``[in, out]``;
            None if no checkpoint was given.
    """

    name: str
    numbers: Array
    scales: Array
    exact: Array | None

    @property
    def rounded(self) -> Array:
        """What the integers stand for, float32 ``[in, out]``."""
        return self.numbers.astype(np.float32) * self.scales

    @property
    def added_bytes(self) -> int:
        """How many bytes the weight takes more in FP16: a second byte for each number, without the scales."""
        return int(self.numbers.size) - 2 * int(self.scales.size)


class QuantizationTrials:
    """Trials of a bundle in which some layers are not quantized.

    Attributes:
        layers: the quantized layers by name, in the network's order.
        evaluations: how often the network was evaluated on all recorded inputs.
        exact: whether layers that are not quantized have the checkpoint's weights.

    Args:
        bundle: an INT8 bundle at the size in use; its files are checked here.
        weights: the checkpoint's FP32 weights by module (``blocks.0.mlp.fc1.weight``, ``[out, in]``). None leaves each
            weight as INT8 rounded it, so that only the rounding of inputs is undone.
        threads: CPU threads; 0 lets ONNX Runtime choose.

    Raises:
        CheckpointError: a weight does not round to the integers that the bundle stores.
    """

    def __init__(self, bundle: Bundle, weights: Mapping[str, Array] | None, threads: int = 0) -> None:
        self.bundle, self.threads, self.evaluations, self.exact = bundle, threads, 0, weights is not None
        manifest = bundle.manifest
        model = ir.load(bundle.graph("step"))
        names = linears_of(manifest.model.conditioning, manifest.model.depth)
        spec, record = manifest.model, bundle.records(CALIBRATION)
        factors = factors_by_layer(record["factors"], spec.conditioning, spec.width, spec.mlp_width)
        self.layers = {
            name: _take_layer(model, name, weights, factors.get(name, np.ones(1, np.float32)))
            for name in names
            if manifest.precision.quantizes(name)
        }
        move_to_fp32(model, lambda _: True, _in_fp32, [value.name or "" for value in model.graph.inputs])
        for name in self.layers:
            _add_switch(model, name)
        self._quantized: frozenset[str] = frozenset(self.layers)
        self._step = _SwitchedSession(AlteredSession(model, threads=threads), self._make_feeds)
        self._replay = Replay(bundle, self._make_engine())
        self._inputs = RecordedInputs.from_record(bundle.records("forward_2"))

    @property
    def engine_name(self) -> str:
        return f"onnxruntime {import_onnxruntime().__version__} CPU"

    def predict(self, quantized: Collection[str]) -> Array:
        """The guided ε or velocity ``[B, C, H, W]`` at the record ``forward_2``, with these layers quantized."""
        self._quantized, self.evaluations = frozenset(quantized), self.evaluations + 1
        coefficients = np.zeros((len(self._inputs.latents), COEFFICIENTS), np.float32)
        coefficients[:, B_E] = 1  # the denoised estimate is the prediction
        return self._replay.run_step(self._inputs, coefficients)[1]

    def measure_error(self, kept: Collection[str]) -> float:
        """The relative L2 error of the prediction against the FP32 model's, without the quantization of ``kept``."""
        found = self.predict([name for name in self.layers if name not in kept])
        return relative_l2(found, self.bundle.records(UNQUANTIZED)["e"])

    def measure_psnr(self, kept: Collection[str]) -> float:
        """The worst image of the first recorded trajectory in dB against the FP32 model's."""
        self._quantized = frozenset(self.layers) - frozenset(kept)
        sampler, *_ = trajectories_of(self.bundle.manifest.diffusion)
        latents, _ = free_running(self._replay, sampler, *recorded_trajectory(self._replay, sampler, sampler))
        images = self._replay.run_decoder(latents, "images")
        return worst_psnr(images, self.bundle.records(UNQUANTIZED)["images"])[0]

    def _make_feeds(self) -> dict[str, Array]:
        feeds: dict[str, Array] = {}
        for name, layer in self.layers.items():
            on = name in self._quantized
            feeds[_switch_of(name)] = np.array(on)
            feeds[_weight_of(name)] = layer.rounded if on or layer.exact is None else layer.exact.astype(np.float32)
        return feeds

    def _make_engine(self) -> AlteredEngine:
        return open_altered_engine(
            self.engine_name, self.bundle.manifest, self._open_session, self.threads, without=ENCODER
        )

    def _open_session(self, graph: str) -> Session:
        if graph == "probe":
            return self._step
        model = ir.load(self.bundle.graph(graph))
        move_to_fp32(model, lambda _: True, _in_fp32, [value.name or "" for value in model.graph.inputs])
        return AlteredSession(model, threads=self.threads)


@dataclass(frozen=True)
class _SwitchedSession:
    """The step, whose switches and weights are those of the current trial."""

    session: AlteredSession
    make_feeds: Callable[[], dict[str, Array]]

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> list[Array]:
        return self.session.run({**inputs, **self.make_feeds()}, outputs)


def _switch_of(name: str) -> str:
    return f"{name}:quantized"


def _weight_of(name: str) -> str:
    return f"{name}:weight"


def _in_fp32(_: ir.Node, value: ir.Value) -> Array:
    assert value.const_value is not None
    return value.const_value.numpy().astype(np.float32)


def _find_node(model: ir.Model, name: str) -> ir.Node:
    return next(node for node in model.graph if node.name == name)


def _take_layer(model: ir.Model, name: str, weights: Mapping[str, Array] | None, factors: Array) -> QuantizedLayer:
    """A layer's numbers as a graph stores them, and the weight that they stand for.

    ``factors``: of the layer's input ``[in]``, which the weight is divided by.
    """

    def read(value: str) -> Array:
        tensor = model.graph.initializers[f"{name}.{value}"].const_value
        assert tensor is not None
        return tensor.numpy()

    layer = QuantizedLayer(name, read("weight").copy(), read("weight_scale").astype(np.float32), None)
    if weights is None:
        return layer
    exact = weights[f"{name}.weight"].T / factors[:, None]
    if not (np.abs(exact - layer.rounded) <= HALF_LEVEL * layer.scales).all():
        raise CheckpointError(
            f"{name}: the checkpoint's weight does not round to the bundle's INT8 numbers; export the bundle again"
        )
    return replace(layer, exact=exact.astype(np.float16))


def _add_switch(model: ir.Model, name: str) -> None:
    """Put a switch between a layer's rounded and its own input, and make its weight an input of the graph."""
    product, quantize = _find_node(model, f"{name}/MatMul"), _find_node(model, f"{name}/QuantizeLinear")
    rounded, x = product.inputs[0], quantize.inputs[0]
    assert rounded is not None
    shape = model.graph.initializers[f"{name}.weight"].shape
    switch = ir.Value(name=_switch_of(name), type=ir.TensorType(ir.DataType.BOOL), shape=ir.Shape([]))
    weight = ir.Value(name=_weight_of(name), type=ir.TensorType(ir.DataType.FLOAT), shape=shape)
    model.graph.inputs.extend([switch, weight])
    choice = ir.node("Where", [switch, rounded, x], name=f"{name}/Where")
    result = choice.outputs[0]
    result.name, result.dtype, result.shape = f"{name}/input", ir.DataType.FLOAT, rounded.shape
    model.graph.insert_before(product, choice)
    product.replace_input_with(0, result)
    product.replace_input_with(1, weight)
    dequantize = _find_node(model, f"{name}/DequantizeLinear.1")
    stored = [value for value in dequantize.inputs if value is not None]
    model.graph.remove(dequantize, safe=True)
    for value in stored:
        assert value.name is not None
        del model.graph.initializers[value.name]
