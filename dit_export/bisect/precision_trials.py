"""Tries an FP16 bundle with some of its units in FP32, on ONNX Runtime, and measures its numbers in FP32."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import onnx_ir as ir

from dit_export.bisect.altered_engine import AlteredEngine, AlteredSession, open_altered_engine
from dit_export.bisect.fp16_operations import (
    Operation,
    describe_operation,
    describe_unit,
    find_fp16_operations,
    unit_of,
)
from dit_export.bisect.fp32_weights import exact_weight_lookup
from dit_export.bisect.graph_edits import (
    Array,
    add_magnitude_outputs,
    cut_block,
    emulate_fp16,
    find_block_inputs,
    move_to_fp32,
)
from dit_runtime.backends.onnxruntime.engine import import_onnxruntime
from dit_runtime.bundle.manifest import ENCODER
from dit_runtime.bundle.precision import Precision, is_kept
from dit_runtime.bundle.reader import Bundle
from dit_runtime.samplers.schedule import COEFFICIENTS
from dit_runtime.verify import image_rungs
from dit_runtime.verify.budget import FP16_MAX, budget_for
from dit_runtime.verify.metrics import relative_error
from dit_runtime.verify.replay import RecordedInputs, Replay
from dit_runtime.verify.rung import Rung
from dit_runtime.verify.verification import verify

FP16_NORMAL = 2.0**-14  # the least normal number; below it, FP16 loses a bit with every halving
NETWORK = ("conditioner", "probe")  # the probe is the step with more outputs
CODERS = {"decoder": image_rungs.decoder, ENCODER: image_rungs.encoder}  # each has a rung of its own


@dataclass(frozen=True)
class Reason:
    """Why a unit should not be FP16: an operation of it in words, and the fault of that operation."""

    operation: str
    detail: str

    def __str__(self) -> str:
        return f"{self.operation}: {self.detail}"


class PrecisionTrials:
    """Trials of a bundle in which some units compute in FP32.

    Attributes:
        units: the units of the bundle's policy that compute in FP16.
        operations: by graph, its operations in FP16.
        largest: max |x| of each operation's result in FP32, of the runs so far.
        evaluations: how often the network was verified so far.

    Args:
        bundle: the bundle at the size in use; its files are checked here.
        weights: FP32 weights by graph and module. A graph without them uses the bundle's, which are rounded to FP16.
        advance: called after each trial.
        threads: CPU threads; 0 lets ONNX Runtime choose.
    """

    def __init__(
        self,
        bundle: Bundle,
        weights: Mapping[str, Mapping[str, Array]],
        advance: Callable[[], None] = lambda: None,
        threads: int = 0,
    ) -> None:
        self.bundle, self.weights, self.advance, self.threads = bundle, weights, advance, threads
        self.evaluations = 0
        manifest = bundle.manifest
        self._paths = {name: bundle.graph(name) for name in (*NETWORK, *CODERS) if name in manifest.graphs}
        self.operations = {name: find_fp16_operations(name, ir.load(path)) for name, path in self._paths.items()}
        self.units = tuple(dict.fromkeys(one.unit for each in self.operations.values() for one in each))
        self.largest: dict[Operation, float] = {}  # max |x| of its result in FP32

    @property
    def engine_name(self) -> str:
        return f"onnxruntime {import_onnxruntime().__version__} CPU"

    def verify_network(self, kept: Collection[str]) -> tuple[Rung, ...]:
        """The rungs of the verification up to the forward, with the units ``kept`` in FP32."""
        self.evaluations += 1
        rungs = verify(self._bundle_keeping(kept), self.engine_for(kept))
        found = tuple(itertools.takewhile(lambda rung: not rung.name.endswith("noise"), rungs))
        self.advance()
        return found

    def verify_coder(self, graph: str, kept: bool) -> Rung:
        """The rung of the verification for the decoder or the encoder, in the bundle's precision or in FP32."""
        replay = Replay(self._bundle_keeping([graph] if kept else []), self._make_engine(lambda _: kept))
        rung = CODERS[graph](replay)
        self.advance()
        return rung

    def engine_for(self, kept: Collection[str] = ()) -> AlteredEngine:
        """An engine that emulates the bundle's FP16, with the units ``kept`` in FP32."""
        return self._make_engine(kept.__contains__)

    def _bundle_keeping(self, kept: Iterable[str]) -> Bundle:
        manifest = self.bundle.manifest
        policy = replace(manifest.precision, keep_fp32=(*manifest.precision.keep_fp32, *kept))
        return replace(self.bundle, manifest=replace(manifest, precision=policy))

    def _make_engine(self, in_fp32: Callable[[str], bool]) -> AlteredEngine:
        return open_altered_engine(
            self.engine_name, self.bundle.manifest, lambda graph: self._open_session(graph, in_fp32), self.threads
        )

    def emulate_graph(
        self, graph: str, in_fp32: Callable[[str], bool], of: Callable[[ir.Node], bool] | None = None
    ) -> ir.Model:
        """A graph that emulates FP16; in FP32 are some units and, of the others, the nodes for which ``of`` is true."""
        model = ir.load(self._paths[graph])

        def kept(node: ir.Node) -> bool:
            unit = unit_of(graph, node)
            return unit is None or in_fp32(unit) or (of is not None and of(node))

        emulate_fp16(graph, model, kept, self._weight_lookup(graph))
        return model

    def make_mixed_graph(self, graph: str, kept: Collection[str]) -> ir.Model:
        """A strongly typed graph, nearly as an export with these units kept in FP32 would write it."""
        model = ir.load(self.bundle.graph(graph))
        table = [self.bundle.manifest.table.name] if "conditioner" in kept else []
        move_to_fp32(model, lambda node: unit_of(graph, node) in kept, self._weight_lookup("probe"), table)
        return model

    def _weight_lookup(self, graph: str) -> Callable[[ir.Node, ir.Value], Array]:
        spec = self.bundle.manifest.model
        head = spec.width / spec.heads  # attention scales by 1/√head, or by its root on both sides
        return exact_weight_lookup(self.weights.get(graph, {}), (head**-0.5, head**-0.25))

    def _open_session(self, graph: str, in_fp32: Callable[[str], bool]) -> AlteredSession:
        """A session of a graph; if all of the graph is in FP32, it measures the results of the FP16 operations."""
        model, operations = self.emulate_graph(graph, in_fp32), self.operations[graph]
        if not all(in_fp32(one.unit) for one in operations):
            return AlteredSession(model, threads=self.threads)
        names = add_magnitude_outputs(model, [one.tensor for one in operations])
        return AlteredSession(model, dict(zip(names, operations, strict=True)), self.largest, self.threads)

    def overflows(self, units: Collection[str]) -> bool:
        """Whether FP16 cannot hold the result of an operation of these units."""
        return any(one.unit in units and value > FP16_MAX for one, value in self.largest.items())

    def measure_error(self, unit: str) -> float:
        """The error of a unit's block, or of the conditioner's table, with this unit alone in FP16.

        It is the largest difference from FP32 over the largest value, for FP32 activations at the record of the blocks.
        It is infinite if the unit overflows or comes too near to FP16's range.
        """
        if self.overflows([unit]) or self._reach_near_range(unit):
            return math.inf
        if unit == "conditioner":
            tables = [self._activations[0], self._compute_table(lambda _: False)]
            return relative_error(tables[1], tables[0])
        block = _block_of(unit)
        if block is None:
            return 0.0
        return self._measure_block_error(block, self.emulate_graph("probe", lambda other: other != unit))

    def _measure_block_error(self, block: int, model: ir.Model) -> float:
        cut_block(model, block)
        activations = self._activations[1]
        inputs = {value.name or "": activations[(value.name or "").removesuffix(":in")] for value in model.graph.inputs}
        (found,) = AlteredSession(model, threads=self.threads).run(inputs, [f"blocks.{block}"])
        return relative_error(found, activations[f"blocks.{block}"])

    def _compute_table(self, in_fp32: Callable[[str], bool]) -> Array:
        record = self.bundle.records("blocks")
        inputs = Replay(self.bundle, self._make_engine(in_fp32)).make_inputs(
            RecordedInputs.from_record(record), _zero_coefficients(record)
        )
        return inputs[self.bundle.manifest.table.name]

    @cached_property
    def _activations(self) -> tuple[Array, dict[str, Array]]:
        """The conditioning table, and the inputs and outputs of each block: in FP32, at the record of the blocks."""
        record = self.bundle.records("blocks")
        model = self.emulate_graph("probe", lambda _: True)
        names = {value.name or "" for value in model.graph.inputs} | {value.name or "" for value in model.graph.outputs}
        more: dict[str, ir.Value] = {}
        for block in range(self.bundle.manifest.model.depth):
            more |= {value.name or "": value for value in find_block_inputs(model, block) if value.name not in names}
        model.graph.outputs.extend(more.values())
        inputs = Replay(self.bundle, self._make_engine(lambda _: True)).make_inputs(
            RecordedInputs.from_record(record), _zero_coefficients(record)
        )
        outputs = [value.name or "" for value in model.graph.outputs]
        found = AlteredSession(model, threads=self.threads).run(inputs, outputs)
        return inputs[self.bundle.manifest.table.name], {**inputs, **dict(zip(outputs, found, strict=True))}

    def explain(self, unit: str) -> tuple[Reason, ...]:
        """Why a unit should not be FP16: operations that overflow, lost weights, or else the worst rounding."""
        over = [(one, value) for one, value in self.largest.items() if one.unit == unit and value > FP16_MAX]
        found = [Reason(one.name, f"up to {value:.3g}, FP16 ends at {FP16_MAX:g}") for one, value in over[:1]]
        if not found and (near := self._reach_near_range(unit)):
            found = [
                Reason(
                    describe_unit(unit), f"up to {near:.3g} on the reference's trajectory, FP16 ends at {FP16_MAX:g}"
                )
            ]
        return tuple(found + self.find_lost_weights(unit)) or (self._find_worst_rounding(unit),)

    def _find_worst_rounding(self, unit: str) -> Reason:
        """The operation of a unit whose rounding adds most to the unit's error."""
        block = _block_of(unit)
        if block is None:
            return Reason(describe_unit(unit), "rounds too much, none of its operations overflows")

        def measure_without(name: str) -> float:
            def is_named(node: ir.Node) -> bool:
                return unit_of("probe", node) == unit and describe_operation(unit, node) == name

            return self._measure_block_error(block, self.emulate_graph("probe", lambda other: other != unit, is_named))

        errors = {one.name: measure_without(one.name) for one in self.operations["probe"] if one.unit == unit}
        name = min(errors, key=lambda name: errors[name])
        alone = self.measure_error(unit)
        return Reason(
            name, f"rounds most, alone in FP16 the unit is off by {alone:.1e}, without this {errors[name]:.1e}"
        )

    def _reach_near_range(self, unit: str) -> float:
        """The largest |x| of a unit on the reference's trajectory if it is too near to FP16's range, else 0."""
        limit = budget_for(self.bundle, Precision.FP16).tolerance_of("fp16_range")
        reached = [value for name, value in self.bundle.manifest.magnitudes.items() if is_kept(name, [unit])]
        largest = max(reached, default=0.0)
        return largest if largest * limit > FP16_MAX else 0.0

    def find_lost_weights(self, unit: str) -> list[Reason]:
        """Weights of a unit that FP16 cannot hold."""
        found: dict[str, str] = {}
        for node, tensor in self._find_weights(unit):
            held = tensor.astype(np.float32)
            size = float(np.sqrt(np.mean(np.square(held, dtype=np.float64))))
            if not np.isfinite(held).all():
                found.setdefault(describe_operation(unit, node), f"weights beyond {FP16_MAX:g}")
            elif held.ndim > 1 and 0 < size < FP16_NORMAL:
                found.setdefault(
                    describe_operation(unit, node),
                    f"weights of {size:.1e}, below FP16's normal numbers ({FP16_NORMAL:.1e})",
                )
        return [Reason(name, detail) for name, detail in found.items()]

    def count_added_bytes(self, unit: str) -> int:
        """How many bytes a unit's weights take more in FP32."""
        return sum(tensor.nbytes for _, tensor in self._find_weights(unit))

    def _find_weights(self, unit: str) -> list[tuple[ir.Node, Array]]:
        """The weights and biases of a unit in FP16, each with the node that uses it."""
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


def _block_of(unit: str) -> int | None:
    parts = unit.split(".")
    return int(parts[1]) if len(parts) == 3 else None


def _zero_coefficients(record: Mapping[str, Array]) -> Array:
    return np.zeros((len(record["latents"]), COEFFICIENTS), np.float32)
