"""An FP16 bundle tried with some of its units in FP32, on ONNX Runtime, and what its numbers are like in FP32."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import onnx_ir as ir

from dit_export.bisect.altered_engine import AlteredEngine, AlteredSession
from dit_export.bisect.islands import (
    Array,
    add_magnitudes,
    cut_block,
    exact_weights,
    find_crossing,
    make_emulated,
    make_fp32,
)
from dit_export.bisect.operations import (
    Operation,
    fp16_operations,
    operation_name,
    unit_name,
    unit_of,
)
from dit_export.checkpoints.sources import Checkpoint
from dit_export.graphs.autoencoder import Decoder, Encoder
from dit_export.graphs.model import conditioner_from_weights, step_from_weights
from dit_export.graphs.precision import FP32, is_kept
from dit_runtime.backends.base import EngineInfo
from dit_runtime.backends.onnxruntime.engine import import_onnxruntime
from dit_runtime.bundle.manifest import ENCODER
from dit_runtime.bundle.precision import Precision
from dit_runtime.bundle.reader import Bundle
from dit_runtime.core.errors import CheckpointError
from dit_runtime.samplers.schedule import COEFFICIENTS
from dit_runtime.verify import image_rungs
from dit_runtime.verify.budget import FP16_MAX, budget_for
from dit_runtime.verify.metrics import relative_error
from dit_runtime.verify.replay import RecordedInputs, Replay
from dit_runtime.verify.rung import Rung
from dit_runtime.verify.verification import verify

FP16_NORMAL = 2.0**-14  # below, FP16 loses a bit with every halving
NETWORK = ("conditioner", "probe")  # the probe is the step with more outputs
CODERS = {"decoder": image_rungs.decoder, ENCODER: image_rungs.encoder}  # judged by themselves


@dataclass(frozen=True)
class Reason:
    """Why a unit should not be FP16: the operation in words, and what is the matter."""

    operation: str
    detail: str

    def __str__(self) -> str:
        return f"{self.operation}: {self.detail}"


class Trials:
    """A bundle's graphs with FP32 islands. ``count``: evaluations of the network so far.

    Args:
        bundle: at the size in use; its files are checked here.
        weights: FP32 weights by graph and module; where there are none, islands have the bundle's, rounded to FP16.
        advance: called after each evaluation.
        threads: of the CPU, 0 lets ONNX Runtime choose.
    """

    def __init__(
        self,
        bundle: Bundle,
        weights: Mapping[str, Mapping[str, Array]],
        advance: Callable[[], None] = lambda: None,
        threads: int = 0,
    ) -> None:
        self.bundle, self.weights, self.advance, self.threads = bundle, weights, advance, threads
        self.count = 0
        manifest = bundle.manifest
        self._paths = {name: bundle.graph(name) for name in (*NETWORK, *CODERS) if name in manifest.graphs}
        self.operations = {name: fp16_operations(name, ir.load(path)) for name, path in self._paths.items()}
        self.units = tuple(dict.fromkeys(one.unit for each in self.operations.values() for one in each))
        self.largest: dict[Operation, float] = {}  # max |x| of its result in FP32

    @property
    def name(self) -> str:
        return f"onnxruntime {import_onnxruntime().__version__} CPU"

    def network(self, kept: Collection[str]) -> tuple[Rung, ...]:
        """The verification's rungs up to the forward, with some units in FP32."""
        self.count += 1
        rungs = verify(self._with_policy(kept), self.engine(kept))
        found = tuple(itertools.takewhile(lambda rung: not rung.name.endswith("noise"), rungs))
        self.advance()
        return found

    def coder(self, graph: str, kept: bool) -> Rung:
        """The verification's rung of the decoder or the encoder, as it is or in FP32."""
        replay = Replay(self._with_policy([graph] if kept else []), self._engine(lambda _: kept))
        rung = CODERS[graph](replay)
        self.advance()
        return rung

    def engine(self, kept: Collection[str] = ()) -> AlteredEngine:
        """An engine that emulates the bundle's FP16, with some units in FP32."""
        return self._engine(kept.__contains__)

    def _with_policy(self, kept: Iterable[str]) -> Bundle:
        manifest = self.bundle.manifest
        policy = replace(manifest.precision, keep_fp32=(*manifest.precision.keep_fp32, *kept))
        return replace(self.bundle, manifest=replace(manifest, precision=policy))

    def _engine(self, in_fp32: Callable[[str], bool]) -> AlteredEngine:
        manifest = self.bundle.manifest
        return AlteredEngine(
            EngineInfo(
                name=self.name,
                identity=self.name,
                library="onnxruntime",
                version=import_onnxruntime().__version__,
                device="CPU",
                precision=Precision.FP32,
                graphs=tuple(manifest.graphs),
                threads=self.threads,
            ),
            manifest,
            lambda graph: self._session(graph, in_fp32),
        )

    def model(
        self, graph: str, in_fp32: Callable[[str], bool], of: Callable[[ir.Node], bool] | None = None
    ) -> ir.Model:
        """A graph with some units in FP32, and of the others the nodes for which ``of`` is true; FP16 is emulated."""
        model = ir.load(self._paths[graph])

        def kept(node: ir.Node) -> bool:
            unit = unit_of(graph, node)
            return unit is None or in_fp32(unit) or (of is not None and of(node))

        make_emulated(graph, model, kept, self._exact(graph))
        return model

    def island_model(self, graph: str, kept: Collection[str]) -> ir.Model:
        """A strongly typed graph as an export with these units kept in FP32 would write it, or nearly so."""
        model = ir.load(self.bundle.graph(graph))
        table = [self.bundle.manifest.table.name] if "conditioner" in kept else []
        make_fp32(model, lambda node: unit_of(graph, node) in kept, self._exact("probe"), table)
        return model

    def _exact(self, graph: str) -> Callable[[ir.Node, ir.Value], Array]:
        spec = self.bundle.manifest.model
        head = spec.width / spec.heads  # attention's scale is its root's inverse, or that's root on both sides
        return exact_weights(self.weights.get(graph, {}), (head**-0.5, head**-0.25))

    def _session(self, graph: str, in_fp32: Callable[[str], bool]) -> AlteredSession:
        """Measures the results of operations where all of a graph is FP32."""
        model, operations = self.model(graph, in_fp32), self.operations[graph]
        if not all(in_fp32(one.unit) for one in operations):
            return AlteredSession(model, threads=self.threads)
        names = add_magnitudes(model, [one.tensor for one in operations])
        return AlteredSession(model, dict(zip(names, operations, strict=True)), self.largest, self.threads)

    def beyond(self, units: Collection[str]) -> bool:
        """Whether an operation of these units has a result that FP16 cannot hold."""
        return any(one.unit in units and value > FP16_MAX for one, value in self.largest.items())

    def error_alone(self, unit: str) -> float:
        """How far a unit's block (or the conditioner's table) is from FP32 with this unit alone in FP16.

        The largest difference over the largest value, on FP32's own activations, at the record of the blocks.
        """
        if self.beyond([unit]) or self._near_range(unit):
            return math.inf
        if unit == "conditioner":
            tables = [self._activations[0], self._table(lambda _: False)]
            return relative_error(tables[1], tables[0])
        block = _block(unit)
        if block is None:
            return 0.0
        return self._block_error(block, self.model("probe", lambda other: other != unit))

    def _block_error(self, block: int, model: ir.Model) -> float:
        cut_block(model, block)
        activations = self._activations[1]
        inputs = {value.name or "": activations[(value.name or "").removesuffix(":in")] for value in model.graph.inputs}
        (found,) = AlteredSession(model, threads=self.threads).run(inputs, [f"blocks.{block}"])
        return relative_error(found, activations[f"blocks.{block}"])

    def _table(self, in_fp32: Callable[[str], bool]) -> Array:
        record = self.bundle.records("blocks")
        inputs = Replay(self.bundle, self._engine(in_fp32)).inputs(RecordedInputs.of(record), _no_coefficients(record))
        return inputs[self.bundle.manifest.table.name]

    @cached_property
    def _activations(self) -> tuple[Array, dict[str, Array]]:
        """The conditioning table, and what enters and leaves each block: in FP32, at the record of the blocks."""
        record = self.bundle.records("blocks")
        model = self.model("probe", lambda _: True)
        names = {value.name or "" for value in model.graph.inputs} | {value.name or "" for value in model.graph.outputs}
        more: dict[str, ir.Value] = {}
        for block in range(self.bundle.manifest.model.depth):
            more |= {value.name or "": value for value in find_crossing(model, block) if value.name not in names}
        model.graph.outputs.extend(more.values())
        inputs = Replay(self.bundle, self._engine(lambda _: True)).inputs(
            RecordedInputs.of(record), _no_coefficients(record)
        )
        outputs = [value.name or "" for value in model.graph.outputs]
        found = AlteredSession(model, threads=self.threads).run(inputs, outputs)
        return inputs[self.bundle.manifest.table.name], {**inputs, **dict(zip(outputs, found, strict=True))}

    def reasons(self, unit: str) -> tuple[Reason, ...]:
        """Why a unit should not be FP16: what overflows, what its weights lose, or else which operation's rounding."""
        over = [(one, value) for one, value in self.largest.items() if one.unit == unit and value > FP16_MAX]
        found = [Reason(one.name, f"up to {value:.3g}, FP16 ends at {FP16_MAX:g}") for one, value in over[:1]]
        if not found and (near := self._near_range(unit)):
            found = [
                Reason(unit_name(unit), f"up to {near:.3g} on the reference's trajectory, FP16 ends at {FP16_MAX:g}")
            ]
        return tuple(found + self.lost(unit)) or (self._rounding(unit),)

    def _rounding(self, unit: str) -> Reason:
        """The operation without whose rounding a unit is nearest to FP32."""
        block = _block(unit)
        if block is None:
            return Reason(unit_name(unit), "rounds too much, none of its operations overflows")

        def without(name: str) -> float:
            def spared(node: ir.Node) -> bool:
                return unit_of("probe", node) == unit and operation_name(unit, node) == name

            return self._block_error(block, self.model("probe", lambda other: other != unit, spared))

        errors = {one.name: without(one.name) for one in self.operations["probe"] if one.unit == unit}
        name = min(errors, key=lambda name: errors[name])
        alone = self.error_alone(unit)
        return Reason(
            name, f"rounds most, alone in FP16 the unit is off by {alone:.1e}, without this {errors[name]:.1e}"
        )

    def _near_range(self, unit: str) -> float:
        """The most that the reference's trajectory reaches in a unit, if it is too near to FP16's range, else 0."""
        limit = budget_for(self.bundle, Precision.FP16).tolerance("fp16_range")
        reached = [value for name, value in self.bundle.manifest.magnitudes.items() if is_kept(name, [unit])]
        largest = max(reached, default=0.0)
        return largest if largest * limit > FP16_MAX else 0.0

    def lost(self, unit: str) -> list[Reason]:
        """Weights of a unit that FP16 cannot hold."""
        found: dict[str, str] = {}
        for node, tensor in self._weights(unit):
            held = tensor.astype(np.float32)
            size = float(np.sqrt(np.mean(np.square(held, dtype=np.float64))))
            if not np.isfinite(held).all():
                found.setdefault(operation_name(unit, node), f"weights beyond {FP16_MAX:g}")
            elif held.ndim > 1 and 0 < size < FP16_NORMAL:
                found.setdefault(
                    operation_name(unit, node),
                    f"weights of {size:.1e}, below FP16's normal numbers ({FP16_NORMAL:.1e})",
                )
        return [Reason(name, detail) for name, detail in found.items()]

    def weights_bytes(self, unit: str) -> int:
        """What a unit's weights grow by in FP32."""
        return sum(tensor.nbytes for _, tensor in self._weights(unit))

    def _weights(self, unit: str) -> list[tuple[ir.Node, Array]]:
        """Weights and biases of a unit, each with the node that uses it."""
        found: dict[str, tuple[ir.Node, Array]] = {}
        for graph in self._paths:
            for node in ir.load(self._paths[graph]).graph:
                for value in node.inputs if unit_of(graph, node) == unit else ():
                    tensor = value.const_value if value is not None and value.is_initializer() else None
                    if (
                        value is not None
                        and tensor is not None
                        and tensor.dtype == ir.DataType.FLOAT16
                        and tensor.size > 1
                    ):
                        found[f"{graph} {value.name}"] = (node, tensor.numpy())
        return list(found.values())


def _block(unit: str) -> int | None:
    parts = unit.split(".")
    return int(parts[1]) if len(parts) == 3 else None


def _no_coefficients(record: Mapping[str, Array]) -> Array:
    return np.zeros((len(record["latents"]), COEFFICIENTS), np.float32)


def fp32_weights(checkpoint: Checkpoint, bundle: Bundle) -> dict[str, dict[str, Array]]:
    """FP32 weights by graph and module, for the units that are moved to FP32.

    Raises:
        CheckpointError: the bundle was made from other weights.
    """
    if checkpoint.weights_sha256 != bundle.manifest.source.weights_sha256:
        raise CheckpointError(
            f"{checkpoint.name}: its weights are not those of {bundle.path}; name the checkpoint that was exported, "
            f"{bundle.manifest.source.name}"
        )
    parts = checkpoint.model, checkpoint.numerics, FP32, checkpoint.weights
    modules = {
        "conditioner": conditioner_from_weights(*parts),
        "probe": step_from_weights(*parts, checkpoint.position(checkpoint.sizes[0])),
        "decoder": Decoder(checkpoint.autoencoder, FP32),
        "encoder": Encoder(checkpoint.autoencoder, FP32),
    }
    return {
        graph: {name: tensor.float().numpy() for name, tensor in module.state_dict().items()}
        for graph, module in modules.items()
    }
