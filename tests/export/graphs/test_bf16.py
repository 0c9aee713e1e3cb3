"""BF16 graphs: which numbers are BF16, that ONNX allows them, and what they are judged by."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from dit_export.bundle import bundle_from_checkpoint
from dit_export.checkpoints.sources import Source, load_checkpoint
from dit_export.graphs.precision import BF16, FP32, make_bf16_policy
from dit_export.reference.record_settings import Measurements
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import save_file
from support.bundles import step_inputs
from support.oracle import random_weights

from dit_runtime.backends.onnxruntime.engine import OnnxRuntimeEngine
from dit_runtime.backends.onnxruntime.widening import widen_graph
from dit_runtime.bundle.manifest import PrecisionSpec
from dit_runtime.bundle.precision import Precision
from dit_runtime.bundle.quantization import linears_of
from dit_runtime.bundle.reader import Bundle, open_bundle
from dit_runtime.verify.budget import budget_for
from dit_runtime.verify.limits import THRESHOLDS, TOLERANCES
from dit_runtime.verify.metrics import relative_error


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Callable[[str], Path]) -> Bundle:
    return open_bundle(tiny_bundle("bf16"))


def types_of(model: onnx.ModelProto) -> dict[str, int]:
    """The datatype of each tensor of a graph, as ONNX infers it."""
    graph = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True).graph
    types = {value.name: value.type.tensor_type.elem_type for value in (*graph.input, *graph.value_info, *graph.output)}
    return {**types, **{tensor.name: tensor.data_type for tensor in graph.initializer}}


def test_bf16_where_fp16_has_fp16(bundle: Bundle, bundles: dict[str, Path]) -> None:
    """The same nodes and types as in FP16 but for its 16 bits; ONNX's checker allows them at this opset."""
    fp16 = open_bundle(bundles["fp16"])
    for name in ("conditioner", "step", "probe", "decoder"):
        onnx.checker.check_model(str(bundle.graph(name)), full_check=True)
        ours, theirs = (onnx.load(each.structure(name), load_external_data=False) for each in (bundle, fp16))
        assert [node.name for node in ours.graph.node] == [node.name for node in theirs.graph.node]
        wanted = TensorProto.FLOAT16 if name == "decoder" else TensorProto.BFLOAT16
        swap = {TensorProto.FLOAT16: wanted}
        assert types_of(ours) == {key: swap.get(kind, kind) for key, kind in types_of(theirs).items()}
        assert wanted in types_of(ours).values()


def test_weights_are_the_checkpoints_rounded_once(checkpoint: Path, bundle: Bundle) -> None:
    """Fails if weights pass through FP16 on their way to BF16."""
    weights = load_checkpoint(Source(str(checkpoint))).weights
    stored = {tensor.name: tensor for tensor in onnx.load(bundle.graph("step")).graph.initializer}
    for node in onnx.load(bundle.structure("step"), load_external_data=False).graph.node:
        layer = node.name.removesuffix("/MatMul")
        if layer in linears_of("adaln-zero", 2):
            found = torch.from_numpy(numpy_helper.to_array(stored[node.input[1]]).astype(np.float32).T.copy())
            assert torch.equal(found, weights[f"{layer}.weight"].bfloat16().float()), layer


@pytest.mark.slow  # another export
def test_units_stay_fp32(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``--keep-fp32`` with BF16; a table of keys and values is FP32, since numpy has no BF16; close to FP32's step."""
    options = {"width": 64, "depth": 2, "patch": 2, "channels": 4, "grid": (4, 4), "classes": 10, "out_channels": 8}
    save_file(random_weights(3, conditioning="cross-attention", **options), tmp_path / "w.safetensors")  # type: ignore[arg-type]
    monkeypatch.setattr("dit_export.bundle.records_in_process", lambda *_: Measurements())
    source = Source(str(tmp_path / "w.safetensors"), heads=4, autoencoder=str(checkpoint / "vae"))
    policy = make_bf16_policy(["blocks.1.attn", "decoder"])
    bf16, fp32 = (bundle_from_checkpoint(source, tmp_path / each.name, each, True) for each in (policy, FP32))
    assert bf16.manifest.table.dtype == "float32"
    types = {name: types_of(onnx.load(bf16.structure(name), load_external_data=False)) for name in bf16.manifest.graphs}
    assert {kind for name in ("blocks.0.attn.qkv", "blocks.1.mlp.fc1") for kind in kinds_of(types["step"], name)} == {
        TensorProto.BFLOAT16
    }
    assert kinds_of(types["step"], "blocks.1.attn.qkv") == {TensorProto.FLOAT}
    assert not {TensorProto.BFLOAT16, TensorProto.FLOAT16} & set(types["decoder"].values())
    assert TensorProto.FLOAT16 in types["encoder"].values()
    z = np.random.default_rng(0).standard_normal((2, 4, 8, 8)).astype(np.float32)
    found, expected = (computed(each, z) for each in (bf16, fp32))
    assert 1e-4 < relative_error(found, expected) < 2e-2  # measured 2.8e-3


def kinds_of(types: dict[str, int], layer: str) -> set[int]:
    return {types[f"{layer}.bias"]}


def computed(bundle: Bundle, z: np.ndarray) -> np.ndarray:
    engine, name = OnnxRuntimeEngine(bundle, threads=1), bundle.manifest.table.name
    asked = {"timesteps": np.float32([500, 20, 500, 20]), "labels": np.int32([1, 2, 10, 10])}
    (table,) = engine.session("conditioner").run(asked, [name])
    (e,) = engine.session("step").run({**inputs_of(z), name: table}, ["denoised"])
    return e


def inputs_of(z: np.ndarray) -> dict[str, np.ndarray]:
    return {**step_inputs(z, 2), "rows": np.arange(4, dtype=np.int32).reshape(2, 2)}


def test_onnx_runtime_gets_the_same_graph_in_fp32(bundle: Bundle) -> None:
    """Every BF16 tensor but the stored ones is FP32; the numbers are those of a graph that ONNX's library changed."""
    for name in ("conditioner", "step", "decoder"):
        before = onnx.load(bundle.structure(name), load_external_data=False)
        widened = onnx.load_from_string(widen_graph(bundle.structure(name).read_bytes()))
        stored = {tensor.name for tensor in widened.graph.initializer}
        kinds = types_of(widened)
        assert {key for key, kind in kinds.items() if kind == TensorProto.BFLOAT16} <= stored
        assert [node.name for node in widened.graph.node if not node.name.endswith("/widen")] == [
            node.name for node in before.graph.node if not casts_to_bf16(node)
        ]
    z = np.random.default_rng(0).standard_normal((2, 4, 8, 8)).astype(np.float32)
    inputs = {**inputs_of(z), bundle.manifest.table.name: random_table(bundle)}
    (found,) = OnnxRuntimeEngine(bundle, threads=1).session("step").run(inputs, ["denoised"])
    session = onnxruntime.InferenceSession(fp32_of(onnx.load(bundle.graph("step"))).SerializeToString())
    assert np.array_equal(found, session.run(["denoised"], inputs)[0])


def random_table(bundle: Bundle) -> np.ndarray:
    axes = bundle.manifest.table.shape[1:]
    return np.random.default_rng(1).standard_normal((4, *map(int, axes))).astype(np.float32)


def casts_to_bf16(node: onnx.NodeProto) -> bool:
    return node.op_type == "Cast" and node.attribute[0].i == TensorProto.BFLOAT16


def fp32_of(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with FP32 in place of BF16, made by ONNX's library."""
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.BFLOAT16:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name))
    for node in filter(casts_to_bf16, model.graph.node):
        node.attribute[0].CopyFrom(helper.make_attribute("to", TensorProto.FLOAT))
    del model.graph.value_info[:]
    return model


def test_the_autoencoder_is_judged_as_fp16(bundle: Bundle, bundles: dict[str, Path]) -> None:
    """Limits and PyTorch's own errors of the decoder are FP16's, whatever laxer ones the manifest claims."""
    budget, fp16 = budget_for(bundle, Precision.BF16), budget_for(open_bundle(bundles["fp16"]), Precision.FP16)
    assert budget.floors["decoder"] == fp16.floors["decoder"]
    assert budget.floors["forward_2"][0] > 3 * fp16.floors["forward_2"][0]  # measured: 8
    limits = {"decoder": TOLERANCES["fp16"]["decoder"], "forward": TOLERANCES["bf16"]["forward"]}
    assert {kind: budget.tolerance_of(kind) for kind in limits} == limits
    wide = {"bf16": {**TOLERANCES["fp16"], **TOLERANCES["bf16"]}}
    claimed = replace(bundle.manifest, tolerances=wide, thresholds={"bf16": THRESHOLDS["bf16"]})
    lax = budget_for(replace(bundle, manifest=claimed), Precision.BF16)
    assert (lax.tolerances, lax.thresholds) == (budget.tolerances, budget.thresholds)


def test_precision_of_the_units() -> None:
    """Decoder and encoder are FP16 unless they are kept in FP32; all else that is not kept is BF16."""
    asked = ("conditioner", "blocks.3.mlp", "patch_embed", "decoder", "encoder")
    assert [BF16.precision_of(unit).value for unit in asked] == ["bf16", "bf16", "fp32", "fp16", "fp16"]
    assert PrecisionSpec(Precision.BF16, ("decoder",)).precision_of("decoder") == Precision.FP32
    assert json.loads(json.dumps(BF16.name)) == "bf16"
