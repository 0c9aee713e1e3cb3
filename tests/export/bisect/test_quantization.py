"""``dit-export --bisect`` of an INT8 bundle names the layer whose quantization costs most, and the list mends it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from dit_export.bisect.fp32_weights import weights_from_checkpoint
from dit_export.bisect.keep_list import find_keep_list
from dit_export.bisect.quantization_bisection import (
    LayerCost,
    Wanted,
    choose_for_images,
    choose_within,
    quantization_bisection_of,
)
from dit_export.bisect.quantization_trials import QuantizationTrials
from dit_export.bisect.report import format_quantization_bisection
from dit_export.checkpoints.sources import Source, load_checkpoint
from dit_export.graphs.precision import read_keep_list
from safetensors.torch import load_file, save_file
from support.bundles import edit_graph, signed
from support.checkpoints import make_checkpoint
from support.commands import run_command
from support.optional import onnx

from dit_runtime.backends.onnxruntime.engine import OnnxRuntimeEngine
from dit_runtime.bundle.manifest import PrecisionSpec
from dit_runtime.bundle.precision import Precision
from dit_runtime.bundle.quantization import factors_by_layer
from dit_runtime.bundle.reader import Bundle, open_bundle
from dit_runtime.core.errors import CheckpointError, ParityError
from dit_runtime.samplers.schedule import B_E, COEFFICIENTS
from dit_runtime.verify.metrics import relative_l2
from dit_runtime.verify.replay import RecordedInputs, Replay

WORST = "blocks.1.attn.proj"
EIGHT = [f"blocks.{block}.{name}" for block in (0, 1) for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]


@pytest.fixture(scope="module")
def trials(int8_bundle: Path, checkpoint: Path) -> QuantizationTrials:
    """The tiny bundle with the checkpoint's weights."""
    bundle = open_bundle(int8_bundle)
    found = load_checkpoint(Source(str(checkpoint)))
    return QuantizationTrials(bundle, weights_from_checkpoint(found, bundle, ("probe",))["probe"], threads=1)


def predict(bundle: Bundle, inputs: RecordedInputs) -> Any:
    """The guided prediction of a bundle as it is, on ONNX Runtime."""
    coefficients = np.zeros((len(inputs.latents), COEFFICIENTS), np.float32)
    coefficients[:, B_E] = 1
    return Replay(bundle, OnnxRuntimeEngine(bundle, threads=1)).run_step(inputs, coefficients)[1]


def test_trials_are_the_two_bundles(trials: QuantizationTrials, int8_bundle: Path, bundles: dict[str, Path]) -> None:
    """None quantized is the checkpoint's FP16 bundle, all is PyTorch's own INT8 as near as its rounding by chance."""
    assert list(trials.layers) == EIGHT
    record = open_bundle(int8_bundle).records("forward_2")
    int8, fp16 = record["e"], predict(open_bundle(bundles["fp16"]), RecordedInputs.from_record(record))
    quantized, plain = trials.predict(EIGHT), trials.predict(())
    apart = relative_l2(quantized, plain)
    assert 0.01 < apart < 0.1
    assert relative_l2(plain, fp16) < 2e-3 < apart  # measured: 4.3e-4
    assert relative_l2(quantized, int8) < 0.7 * apart  # measured: 0.52
    one = trials.predict(EIGHT[:1])
    assert 0 < relative_l2(one, plain) < apart


def test_weights_of_another_checkpoint(int8_bundle: Path, trials: QuantizationTrials) -> None:
    """Weights that do not round to the bundle's integers are refused, and the layer is named."""
    bundle = open_bundle(int8_bundle)
    model, one = bundle.manifest.model, np.ones(1, np.float32)
    factors = factors_by_layer(
        bundle.records("calibration")["factors"], model.conditioning, model.width, model.mlp_width
    )
    weights = {
        f"{name}.weight": (layer.rounded * factors.get(name, one)[:, None]).T.copy()
        for name, layer in trials.layers.items()
    }
    QuantizationTrials(bundle, weights, threads=1)
    weights[f"{WORST}.weight"][3, 5] += 0.01
    with pytest.raises(CheckpointError, match=f"{WORST}: the checkpoint's weight does not round"):
        QuantizationTrials(bundle, weights, threads=1)


def spoiled(path: Path) -> Bundle:
    """A copy in which the input of one layer has a scale that is 16 times too large: few levels are left."""

    def change(graph: Any) -> None:
        (tensor,) = (each for each in graph.initializer if each.name == f"{WORST}.scale")
        array = 16 * onnx.numpy_helper.to_array(tensor)
        tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))

    edit_graph(path, "step", change)
    return signed(path)


def test_the_worst_layer_is_named_and_mended(int8_bundle: Path, tmp_path: Path) -> None:
    """One layer with too few levels is found, without the checkpoint; its cost is stated, and the list is read."""
    bundle = spoiled(Path(shutil.copytree(int8_bundle, tmp_path / "spoiled")))
    output = tmp_path / "keep.txt"
    found = cast(Any, find_keep_list(bundle, None, output))
    (worst,) = found.findings
    assert (worst.unit, found.layers[0]) == (WORST, worst)
    assert worst.share > 0.9
    # 64×64 weights have a second byte, and no scales for their 64 channels: 2 bytes each.
    assert (worst.weights_bytes, worst.macs) == (64 * 64 - 128, pytest.approx(1 / 24))
    assert found.error[1] < found.error[0] / 3
    assert found.int8_gmac[1] == pytest.approx(found.int8_gmac[0] * 23 / 24)
    assert not found.exact
    assert read_keep_list([str(output)], "--keep-fp16") == (WORST,)
    page = format_quantization_bisection(found, bundle, output)
    print(page)
    assert f"now dit-export CHECKPOINT --int8 --keep-fp16 {output}" in page
    assert "name the checkpoint too" in page
    json.dumps(found.as_json())
    none = quantization_bisection_of(bundle, None, Wanted(0.01))
    assert none.findings == ()
    assert "stands out and is 4.2% of the INT8 multiply-adds" in format_quantization_bisection(none, bundle, output)


def costs(*worths: tuple[float, float]) -> list[LayerCost]:
    """Layers of these shares of the squared error and of the multiply-adds, most worth keeping first."""
    found = [LayerCost(f"layer {n}", 0.0, share, 1, macs) for n, (share, macs) in enumerate(worths)]
    return sorted(found, key=lambda each: -each.worth)


def names(layers: Collection[LayerCost]) -> list[str]:
    return [each.unit for each in layers]


def test_what_fits_is_chosen() -> None:
    """Layers that stand out, in the order of what they are worth, as far as they fit; a smaller one may still fit."""
    order = costs((0.3, 0.04), (0.4, 0.08), (0.1, 0.04), (0.02, 0.02), (0.18, 0.82))
    assert names(choose_within(order, 0.1)) == ["layer 0", "layer 2"]
    assert names(choose_within(order, 1)) == ["layer 0", "layer 1", "layer 2"]
    assert choose_within(order, 0.03) == ()
    assert choose_within(costs((0.5, 0.5), (0.5, 0.5)), 1) == ()


@pytest.mark.parametrize(("wanted", "count"), [(40, 0), (40.5, 1), (43, 3), (50, 10)])
def test_images_decide(wanted: float, count: int) -> None:
    """The shortest beginning of the order that gives the level; a level beyond all of them is an error that says so."""
    order = costs(*((0.1, 0.1),) * 10)
    path = SimpleNamespace(path="x.bundle")
    trials: Any = SimpleNamespace(bundle=path, exact=True, measure_psnr=lambda kept: 40.0 + len(kept))
    assert len(choose_for_images(trials, order, wanted)) == count
    with pytest.raises(ParityError, match=r"with all 10 layers in FP16 the worst image is at 50.0 dB"):
        choose_for_images(trials, order, 50.1)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--most-fp16", "0"), "expected a share above 0"),
        (("--most-fp16", "nan"), "expected a share above 0"),
        (("--least-psnr", "-3"), "expected decibels above 0"),
        (("--least-psnr", "40", "--most-fp16", "0.1"), "not allowed with"),
    ],
)
def test_numbers_out_of_range(int8_bundle: Path, flags: tuple[str, ...], said: str) -> None:
    done = run_command("dit-export", "--bisect", int8_bundle, *flags)
    assert done.returncode != 0
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_a_precision_that_is_not_searched(bundles: dict[str, Path], tmp_path: Path) -> None:
    """A bundle of another precision is refused, not searched as if it were FP16."""
    bundle = open_bundle(bundles["fp16"])
    other = replace(bundle, manifest=replace(bundle.manifest, precision=PrecisionSpec(Precision.BF16, ())))
    with pytest.raises(CheckpointError, match="is bf16; --bisect is for FP16 and INT8 bundles"):
        find_keep_list(other, None, tmp_path / "keep.txt")


def test_options_of_int8_alone(bundles: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is fp16; --most-fp16 and --least-psnr are for INT8 bundles"):
        find_keep_list(open_bundle(bundles["fp16"]), None, tmp_path / "keep.txt", Wanted())


def scale_hidden_unit(path: Path) -> None:
    """Block 1: one hidden unit of the MLP scaled up beyond the largest factor, and as much down behind the GELU."""
    (file,) = (path / "transformer").glob("*.safetensors")
    weights = load_file(file)
    for name in ("0.proj.weight", "0.proj.bias"):
        weights[f"transformer_blocks.1.ff.net.{name}"][5] *= 2**10
    weights["transformer_blocks.1.ff.net.2.weight"][:, 5] /= 2**10
    save_file(weights, file, metadata={"format": "pt"})


@pytest.mark.slow  # two exports
def test_an_outlier_channel(tmp_path: Path) -> None:
    """A channel that leaves the others no levels: its layer is named, and an export with the list is nearer to FP32."""
    checkpoint, keep = make_checkpoint(tmp_path / "checkpoint"), tmp_path / "keep.txt"
    scale_hidden_unit(checkpoint)
    export: Callable[..., Any] = lambda *flags: run_command("dit-export", checkpoint, *flags)  # noqa: E731
    assert export("--int8", "--no-verify", "-o", tmp_path / "first.bundle").returncode == 0
    done = export("--bisect", tmp_path / "first.bundle", "--most-fp16", "0.2", "-o", keep, "--json")
    found = json.loads(done.stdout)
    assert [each["unit"] for each in found["findings"]] == ["blocks.1.mlp.fc2"]
    assert found["exact"]
    assert export("--int8", "--keep-fp16", keep, "--no-verify", "-o", tmp_path / "second.bundle").returncode == 0
    mended = quantization_bisection_of(open_bundle(tmp_path / "second.bundle"), None)
    assert mended.error[0] == pytest.approx(found["error"][1], rel=0.1)
    assert mended.keep_fp16[0] == "blocks.1.mlp.fc2"
