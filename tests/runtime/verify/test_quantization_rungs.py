"""The verification of an INT8 bundle: sound engines pass, and a wrong quantization is caught and named."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.bundles import edit_graph, signed
from support.optional import onnx

from dit_runtime.backends.onnxruntime.engine import OnnxRuntimeEngine
from dit_runtime.backends.open import open_engine
from dit_runtime.bundle import quantization
from dit_runtime.bundle.precision import Precision
from dit_runtime.bundle.reader import Bundle, open_bundle
from dit_runtime.core.errors import BundleError, EngineError
from dit_runtime.verify import conditions, network_rungs, quantization_rungs
from dit_runtime.verify.budget import budget_for
from dit_runtime.verify.effort import QUICK
from dit_runtime.verify.limits import THRESHOLDS, TOLERANCES
from dit_runtime.verify.replay import Replay
from dit_runtime.verify.rung import Rung
from dit_runtime.verify.verification import verification_of

LAYER = "blocks.1.mlp.fc2"
MODULATED = "blocks.1.attn.qkv"  # adaLN makes its input, and one of its channels has a factor


@pytest.fixture
def copied(int8_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(int8_bundle, tmp_path / "copied"))


def replay_of(bundle: Bundle) -> Replay:
    return Replay(bundle, OnnxRuntimeEngine(bundle, threads=1))


def test_a_sound_engine_passes(int8_bundle: Path) -> None:
    """Every rung keeps its limits on ONNX Runtime; what INT8 costs is one of them."""
    bundle = open_bundle(int8_bundle)
    found = verification_of(bundle, OnnxRuntimeEngine(bundle, threads=1), quick=True)
    assert [rung.name for rung in found.rungs if not rung.passed] == []
    assert found.precision == "int8"
    (cost,) = (rung for rung in found.rungs if rung.name == "image PSNR against FP32")
    assert 50 < cost.value < 65  # measured: 57.4 dB
    assert "in PyTorch's own INT8 58.3 dB" in cost.detail


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_openvino_multiplies_int8(int8_bundle: Path, precision: str) -> None:
    """OpenVINO runs all the layers in INT8, beside BF16 too, and keeps the limits of the network's rungs."""
    bundle = open_bundle(int8_bundle)
    try:
        engine = open_engine(bundle, "openvino", threads=1, precision=precision)
    except EngineError as error:
        pytest.skip(str(error))
    replay = Replay(bundle, engine)
    rungs = [network_rungs.blocks(replay), *network_rungs.forward(replay, 1), network_rungs.update(replay)]
    assert [rung.name for rung in rungs if not rung.passed] == []
    shapes = {
        tensor.name: [
            {"batch": 1, "branches": 2}.get(axis, -1) if isinstance(axis, str) else axis for axis in tensor.shape
        ]
        for tensor in bundle.manifest.graphs["step"].inputs
    }
    kinds = [node.get_rt_info() for node in engine.compile("step", shapes).get_runtime_model().get_ops()]
    told = [(kind["layerType"].astype(str), kind["runtimePrecision"].astype(str)) for kind in kinds]
    assert told.count(("FullyConnected", "i8")) == 8
    assert {kind for layer, kind in told if layer == "FullyConnected"} == {"i8", "f32"}  # the final layer


def numbers_of(path: Path, part: str, layer: str = LAYER) -> Any:
    whole = {tensor.name: tensor for tensor in onnx.load(path / "graphs" / "step.onnx").graph.initializer}
    return onnx.numpy_helper.to_array(whole[f"{layer}.{part}"]).copy()


def store(graph: Any, part: str, array: Any, layer: str = LAYER) -> None:
    tensor = next(each for each in graph.initializer if each.name == f"{layer}.{part}")
    tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))


def scalar(part: str, factor: float) -> Callable[[Any], None]:
    """Multiplies scales that a graph stores."""

    def change(graph: Any) -> None:
        tensor = next(each for each in graph.initializer if each.name == f"{LAYER}.{part}")
        array = onnx.numpy_helper.to_array(tensor)
        store(graph, part, (array * factor).astype(array.dtype))

    return change


def round_weight_together(path: Path) -> Callable[[Any], None]:
    """Gives a layer's weight one scale for all output channels."""
    scales = numbers_of(path, "weight_scale")
    weight = numbers_of(path, "weight") * scales.astype(np.float32)
    scale = np.abs(weight).max() / 127

    def change(graph: Any) -> None:
        store(graph, "weight", np.round(weight / scale).astype(np.int8))
        store(graph, "weight_scale", np.full_like(scales, scale))

    return change


def move_integer(path: Path) -> Callable[[Any], None]:
    """Moves one integer of a weight by one level."""
    numbers = numbers_of(path, "weight")
    numbers[3, 5] += -1 if numbers[3, 5] > 0 else 1
    return lambda graph: store(graph, "weight", numbers)


def forget_factors_in_weight(path: Path) -> Callable[[Any], None]:
    """Gives a layer the weight that it has without factors, while what makes its input has them."""
    weight, factor = (numbers_of(path, part, MODULATED) for part in ("weight", "factor"))
    weight = weight * numbers_of(path, "weight_scale", MODULATED).astype(np.float32) * factor[:, None]
    scales = (np.abs(weight).max(axis=0) / 127).astype(np.float16)

    def change(graph: Any) -> None:
        store(graph, "weight", np.round(weight / scales).astype(np.int8), MODULATED)
        store(graph, "weight_scale", scales, MODULATED)

    return change


def forget_factors_in_step(path: Path) -> Callable[[Any], None]:
    """Adds 1 to adaLN's scale, while the conditioning table and the weight have factors."""
    ones = np.ones_like(numbers_of(path, "factor", MODULATED))
    return lambda graph: store(graph, "factor", ones, MODULATED)


FAULTS = (
    "scale doubled",
    "scale halved",
    "a factor on one side only",
    "a weight's scales doubled",
    "a weight per tensor",
    "a weight's integer",
    "factors in all but a weight",
    "factors in all but the step",
)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_quantization_is_named(copied: Path, fault: str) -> None:
    """A step that stores another quantization of one layer than PyTorch's own INT8 fails, and the layer is named."""
    assert quantization_rungs.weights(replay_of(open_bundle(copied))).value == 0
    edit_graph(copied, "step", change_for(copied, fault))
    rung = quantization_rungs.weights(replay_of(signed(copied)))
    assert not rung.passed
    assert rung.detail.startswith(f"worst: {MODULATED if fault.startswith('factors') else LAYER}")


def test_factors_in_all_but_the_table(copied: Path) -> None:
    """A conditioner without the factors that the step's weights are divided by fails, and its entry is named."""
    bundle = open_bundle(copied)
    record = bundle.records("calibration")
    factors = quantization.factors_by_layer(record["factors"], "adaln-zero", 64, 256)[MODULATED]
    assert (factors != 1).any()
    whole = np.ones(bundle.manifest.table.shape[1:], np.float32)
    whole[6] = factors  # block 1's shift of attention
    assert network_rungs.conditioner(replay_of(bundle)).passed

    def change(graph: Any) -> None:
        (output,) = graph.output
        last = next(node for node in graph.node if output.name in node.output)
        last.output[0] = "folded"
        graph.initializer.append(onnx.numpy_helper.from_array(1 / whole, "unfold"))
        graph.node.append(onnx.helper.make_node("Mul", ["folded", "unfold"], [output.name]))

    edit_graph(copied, "conditioner", change)
    replay = replay_of(signed(copied))
    rung = network_rungs.conditioner(replay)
    assert not rung.passed
    assert rung.first_over == "block 1 attention shift"
    every = next(conditions.conditions(replay, QUICK))
    assert (every.name, every.passed) == ("classes and timesteps", False)


@pytest.mark.parametrize("fault", ["scale halved", "a weight's scales doubled"])
def test_a_wrong_layer_is_a_wrong_block(copied: Path, fault: str) -> None:
    """What an engine makes of one layer shows in its block, where it is more than INT8's own chance."""
    edit_graph(copied, "probe", change_for(copied, fault))
    rung = network_rungs.blocks(replay_of(signed(copied)))
    assert not rung.passed
    assert rung.first_over == "block 1"


def change_for(path: Path, fault: str) -> Callable[[Any], None]:
    return {
        "scale doubled": scalar("scale", 2),
        "scale halved": scalar("scale", 0.5),
        "a weight's scales doubled": scalar("weight_scale", 2),
        "a weight per tensor": round_weight_together(path),
        "a factor on one side only": scalar("factor", 2),
        "a weight's integer": move_integer(path),
        "factors in all but a weight": forget_factors_in_weight(path),
        "factors in all but the step": forget_factors_in_step(path),
    }[fault]


def edit_record(path: Path, name: str, change: Callable[[dict[str, Any]], object]) -> Bundle:
    file = path / "golden" / f"{name}.npz"
    with np.load(file) as record:
        arrays = dict(record)
    change(arrays)
    np.savez(file, **arrays)
    return signed(path)


@pytest.mark.parametrize("fault", ["scale doubled", "one timestep only"])
def test_a_wrong_scale_is_named(copied: Path, fault: str) -> None:
    """A scale that is not that of its range fails, also where graph and reference have the same: the layer is named."""

    def change(record: dict[str, Any]) -> None:
        at = 7  # of blocks.1.mlp.fc2
        wrong = 2 * record["scales"][at] if fault == "scale doubled" else record["ranges"][at].min() / 127
        record["scales"][at] = np.float16(wrong)

    assert quantization_rungs.ranges(replay_of(open_bundle(copied))).passed
    rung = quantization_rungs.ranges(replay_of(edit_record(copied, "calibration", change)))
    assert not rung.passed
    assert rung.detail.startswith(LAYER)


def test_a_size_beyond_a_scale_is_named(copied: Path) -> None:
    """A size at which a layer reads more than its scale holds fails there, however right the scale is elsewhere."""

    def change(record: dict[str, Any]) -> None:
        record["ranges"][7] *= 1.1  # of blocks.1.mlp.fc2

    rung = quantization_rungs.ranges(replay_of(edit_record(copied, "calibration", change)))
    assert not rung.passed
    assert rung.detail.startswith(f"{LAYER} reaches 1.1 of")


def test_ranges_of_too_few_timesteps(copied: Path) -> None:
    """A calibration of one timestep, where the manifest says 50, is no calibration."""

    def change(record: dict[str, Any]) -> None:
        record["timesteps"], record["ranges"] = record["timesteps"][:1], record["ranges"][:, :1]

    with pytest.raises(BundleError, match="has ranges of 1 timesteps, expected 50"):
        quantization_rungs.ranges(replay_of(edit_record(copied, "calibration", change)))


def test_what_int8_costs_has_a_limit(copied: Path) -> None:
    """Images that are far from the FP32 model's fail, however near an engine is to PyTorch's own INT8."""
    images = open_bundle(copied).records("images")["images"]
    assert cost_of(open_bundle(copied), images).passed
    far = edit_record(copied, "unquantized", lambda record: record.update(images=255 - record["images"]))
    assert not cost_of(far, images).passed


def cost_of(bundle: Bundle, images: Any) -> Rung:
    return quantization_rungs.cost(replay_of(bundle), images)


def test_limits_of_int8_with_bf16(int8_bundle: Path, bundles: dict[str, Path]) -> None:
    """Where the rest of an INT8 bundle is BF16, the laxer limit of the two holds; no other bundle has INT8's."""
    bundle = open_bundle(int8_bundle)
    own, mixed = budget_for(bundle, Precision.INT8), budget_for(bundle, Precision.BF16)
    assert own.tolerances == TOLERANCES["int8"]
    assert (own.thresholds, own.floors) == (THRESHOLDS["int8"], bundle.manifest.floors["int8"])
    assert (mixed.tolerances["decoder"], mixed.tolerances["image_psnr"]) == (5e-2, 25.0)
    assert (mixed.thresholds["blocks"], mixed.thresholds["conditioner"]) == (2.2, 2.4)
    assert mixed.floors == bundle.manifest.floors["bf16"]
    plain = open_bundle(bundles["fp16"])
    assert "int8" not in plain.manifest.tolerances
    assert budget_for(plain, Precision.BF16).thresholds == THRESHOLDS["bf16"]
