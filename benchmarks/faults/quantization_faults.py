"""Faults of an INT8 bundle's quantization: in its files, in the record of its calibration, and in an engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from fault import PASSES, REFUSED, Fault
from faulty_engine import Array, Edit
from graph_edits import Graph
from graph_faults import edit_network
from onnx import helper, numpy_helper

from dit_runtime.bundle.quantization import LARGEST, linears_of
from dit_runtime.bundle.reader import CALIBRATION, open_bundle

LAYER = "blocks.1.mlp.fc2"
FIRST = "blocks.0.attn.qkv"
Numbers = dict[str, Array]  # of a layer: its scale, weight_scale, weight and factor
Files = Callable[[Path], None]


def edit_layer(change: Callable[[Numbers], object]) -> Files:
    """Change the numbers of a layer that step and probe store, in place by name."""

    def edit(path: Path) -> None:
        for graph in ("step", "probe"):
            file = path / "graphs" / f"{graph}.onnx"
            model = onnx.load(file, load_external_data=False)
            stored = {tensor.name: tensor for tensor in model.graph.initializer}
            parts = {
                part: stored[f"{LAYER}.{part}"]
                for part in ("scale", "weight_scale", "weight", "factor")
                if f"{LAYER}.{part}" in stored
            }
            numbers = {part: numpy_helper.to_array(tensor, str(file.parent)).copy() for part, tensor in parts.items()}
            change(numbers)
            for part, tensor in parts.items():
                array = numbers[part].astype(numpy_helper.to_array(tensor, str(file.parent)).dtype)
                tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
            onnx.save(model, file)

    return edit


def edit_calibration(change: Callable[[Numbers, int], object]) -> Files:
    """Change the arrays of the record in place; ``change`` is given the layer's place in them too."""

    def edit(path: Path) -> None:
        model = open_bundle(path).manifest.model
        file = path / "golden" / f"{CALIBRATION}.npz"
        with np.load(file) as record:
            arrays = dict(record)
        change(arrays, linears_of(model.conditioning, model.depth).index(LAYER))
        np.savez(file, **arrays)

    return edit


def scale_from(range_of: Callable[[Array], Any], keep: bool = True) -> Files:
    """Give a layer the scale of a range ``[S]`` other than its largest, in graphs and record.

    ``keep``: whether the record keeps the ranges that were found; else each is what the scale is of.
    """

    def edit(path: Path) -> None:
        found: list[float] = []

        def change(record: Numbers, layer: int) -> None:
            wanted = float(range_of(record["ranges"][layer]))
            found.append(float(np.float16(wanted / LARGEST)))
            record["scales"][layer] = found[0]
            if not keep:
                record["ranges"][layer] = wanted

        edit_calibration(change)(path)
        edit_layer(lambda numbers: numbers.update(scale=np.array(found[0])))(path)

    return edit


def store_weight(numbers: Numbers, weight: Array, scales: Array) -> None:
    """Store a weight ``[in, out]`` in INT8 by scales ``[out]``."""
    numbers["weight"] = np.clip(np.round(weight / scales), -LARGEST, LARGEST)
    numbers["weight_scale"] = scales


def weight_of(numbers: Numbers) -> Array:
    return numbers["weight"] * numbers["weight_scale"].astype(np.float32)


def round_together(numbers: Numbers) -> None:
    """One scale for all output channels."""
    weight = weight_of(numbers)
    store_weight(numbers, weight, np.full_like(numbers["weight_scale"], np.abs(weight).max() / LARGEST))


def leave_factors_in(numbers: Numbers) -> None:
    """A weight that is not divided by the factors of its input."""
    weight = weight_of(numbers) * numbers["factor"].astype(np.float32)[:, None]
    scales = (np.abs(weight).max(axis=0) / LARGEST).astype(np.float16)
    store_weight(numbers, weight, scales.astype(np.float32))


def shift_scales(numbers: Numbers) -> None:
    numbers["weight_scale"] = np.roll(numbers["weight_scale"], 1)


def move_integer(numbers: Numbers) -> None:
    numbers["weight"][3, 5] += -1 if numbers["weight"][3, 5] > 0 else 1


def cut_timesteps(record: Numbers, _: int) -> None:
    record["timesteps"], record["ranges"] = record["timesteps"][:1], record["ranges"][:, :1]


def set_zero_point(path: Path) -> None:
    """A zero point of 3 in all layers."""
    for graph in ("step", "probe"):
        file = path / "graphs" / f"{graph}.onnx"
        model = onnx.load(file, load_external_data=False)
        (tensor,) = (each for each in model.graph.initializer if each.name == "zero_point")
        tensor.CopyFrom(numpy_helper.from_array(np.array(3, np.int8), tensor.name))
        onnx.save(model, file)


def move_zero_point(graph: Graph) -> None:
    """Round to levels that are counted from 16, and read them as counted from 0."""
    graph.put("odd", np.array(16, np.int8))
    graph.node(f"{FIRST}/QuantizeLinear").input[2] = "odd"


def change_scale(factor: float, *nodes: str) -> Edit:
    """Multiply a layer's scale in some of its nodes."""

    def change(graph: Graph) -> None:
        scale = graph.array(f"{FIRST}.scale")
        graph.put("odd", (scale * factor).astype(scale.dtype))
        for node in nodes:
            graph.node(f"{FIRST}/{node}").input[1] = "odd"

    return change


def round_down(graph: Graph) -> None:
    """Round the first layer's input down, not to the nearest level."""
    node = graph.node(f"{FIRST}/QuantizeLinear")
    scale = graph.array(f"{FIRST}.scale")
    graph.put("half", (scale * 0.499).astype(scale.dtype))
    less = helper.make_node("Sub", [node.input[0], "half"], ["less"], name="less")
    graph.graph.node.insert(list(graph.graph.node).index(node), less)
    node.input[0] = "less"


def double_scale(numbers: Numbers) -> None:
    numbers["scale"] = 2 * numbers["scale"]


def leave_factors_out(numbers: Numbers) -> None:
    """An input that is not multiplied by the factors that its weight is divided by."""
    numbers["factor"] = np.ones_like(numbers["factor"])


def in_files(name: str, rung: str, files: Files, where: str = LAYER) -> Fault:
    return Fault(name, rung, where, files=files, int8=True)


def in_engine(name: str, rung: str, edit: Edit, where: str = "", why: str = "") -> Fault:
    return Fault(f"{name}, in an engine", rung, where, edits=edit_network(edit), int8=True, why=why)


BOTH = ("QuantizeLinear", "DequantizeLinear")
QUANTIZATION_FAULTS = (
    in_files("a layer's scale doubled", "INT8 weights", edit_layer(double_scale)),
    in_files("a scale doubled in graph and record", "INT8 ranges", scale_from(lambda each: 2 * each.max())),
    in_files("a layer's scale is that of one timestep", "INT8 ranges", scale_from(np.min)),
    in_files(
        "a layer calibrated on one timestep", "INT8 ranges", scale_from(np.min, keep=False), f"{LAYER} has one range"
    ),
    in_files("all layers calibrated on one timestep", REFUSED, edit_calibration(cut_timesteps), "1 timesteps"),
    in_files("a weight quantized per tensor", "INT8 weights", edit_layer(round_together)),
    in_files("a weight's scales of the next channel", "INT8 weights", edit_layer(shift_scales)),
    in_files("one of a weight's integers", "INT8 weights", edit_layer(move_integer)),
    in_files("factors in the weight alone", "INT8 weights", edit_layer(leave_factors_out)),
    in_files("factors in the input alone", "INT8 weights", edit_layer(leave_factors_in)),
    in_files("a zero point other than 0", REFUSED, set_zero_point, "zero_point"),
    in_engine("a zero point on one side", "blocks", move_zero_point, "first: block 0"),
    in_engine("a scale doubled on one side", "blocks", change_scale(2, "DequantizeLinear"), "first: block 0"),
    in_engine("a scale halved", "blocks", change_scale(0.5, *BOTH), "first: block 0"),
    in_engine(
        "a scale doubled",
        PASSES,
        change_scale(2, *BOTH),
        why="one layer has half its levels, and blocks keep the limit that INT8's roundings by chance need; in the "
        "files it is caught",
    ),
    in_engine("inputs rounded down", "blocks", round_down, "first: block 0"),
)
