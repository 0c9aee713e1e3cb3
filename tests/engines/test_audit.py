"""The audit counts what the builder made, from RTX's log and from TensorRT's inspector.

The inspector's JSON here is **not from a device**: its fields are those of NVIDIA's documentation of
``IEngineInspector`` (the developer guide's example of 10.x, and the migration guide to 11.x), its layers those of a log
of TensorRT-RTX.
"""

from __future__ import annotations

import copy
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from dit_engines.audit import (
    CODE_BYTES,
    Audit,
    ProfileAudit,
    audit_from_json,
    audit_of,
    find_problems,
    find_unknowns,
)
from dit_engines.compile import judge_audit
from dit_engines.engine_store import BuiltGraph
from dit_engines.graph_work import work_of_graph
from dit_engines.kernels import Kernel, kernel_from_layer, kernels_from_log, split_by_profile
from dit_runtime.bundle.macs import count_conditioner_gmac, count_step_gmac
from dit_runtime.bundle.manifest import ModelSpec, PrecisionSpec
from dit_runtime.bundle.precision import Precision
from dit_runtime.bundle.reader import open_bundle
from dit_runtime.core.errors import BuildError

FP16 = PrecisionSpec(Precision.FP16, ("patch_embed", "final"))
FP32 = PrecisionSpec(Precision.FP32, ())
MODEL = ModelSpec("adaln-zero", 4, (8, 8), 2, 64, 2, 2, 256, 10, True)
# A line of TensorRT-RTX 1.7's log has these fields.
TENSOR = "{{ Name: x, Dimensions: [{}], Strides: [1], StrideOrder: [0], Datatype: {}, Format: (Linear) Row major }}"
END = "TacticName: t, StreamId: 0, Metadata: "


def tensor(sizes: str, dtype: str) -> str:
    return TENSOR.format(sizes, dtype)


LOG = "\n".join(
    [
        "Layers:",
        f"Name: __mye1_0_myl0_0, LayerType: shape_call, Inputs: [], Constants: [], Outputs: [], {END}",
        f"Name: patch_myl0_1, LayerType: correlation, Inputs: [ {tensor('-1,4,8,8', 'Float')}], Constants: [ "
        f"{tensor('64,4,2,2', 'Float')}, {tensor('1', 'Float')}], Outputs: [], {END}[ONNX Layer: patch_embed/Conv]",
        f"Name: qkv_myl0_2, LayerType: gemm, Inputs: [ {tensor('-1,64', 'Half')}], Constants: [ "
        f"{tensor('1,64,192', 'Half')}, {tensor('1', 'Float')}], Outputs: [], {END}"
        "[ONNX Layer: blocks.0.attn.qkv/MatMul]",
        f"Name: __myl_ReshTranCast_myl0_3, LayerType: kgen, Inputs: [ {tensor('-1,192', 'Half')}], Constants: [], "
        f"Outputs: [], {END}",
        f"Name: _gemm_mha_v2_myl0_4, LayerType: kgen, Inputs: [ {tensor('-1,16,32', 'Half')}], Constants: [], Outputs: "
        f"[], {END}[ONNX Layer: blocks.0.attn/MatMul][ONNX Layer: blocks.0.attn/Softmax]"
        "[ONNX Layer: blocks.0.attn/MatMul.1]",
        f"Name: w_myl0_5, LayerType: wait, Inputs: [], Constants: [], Outputs: [], {END}",
        f"Name: __myl_AddMulMove_myl0_6, LayerType: kgen, Inputs: [ {tensor('-1,64', 'Float')}], Constants: [], "
        f"Outputs: [], {END}[ONNX Layer: blocks.0/Add]",
    ]
)
WORK = {
    "patch_embed/Conv": 1_000,
    "blocks.0.attn.qkv/MatMul": 60_000,
    "blocks.0.attn/MatMul": 20_000,
    "blocks.0.attn/MatMul.1": 20_000,
}


def layers_of_10() -> list[dict[str, Any]]:
    """The log's kernels in the JSON of TensorRT 10: one text for format and datatype, metadata apart by \\x1f."""
    half = [{"Name": "x", "Dimensions": [-1, 64], "Format/Datatype": "Half"}]
    single = [{"Name": "x", "Dimensions": [-1, 4, 8, 8], "Format/Datatype": "Float"}]
    unknown = [{"Name": "x", "Dimensions": [-1, 64], "Format/Datatype": "N/A due to dynamic shapes"}]
    return [
        {"Name": "shapes_myl0_0", "LayerType": "shape_call", "Inputs": [], "Outputs": [], "Metadata": ""},
        {
            "Name": "patch_embed/Conv",
            "LayerType": "CaskConvolution",
            "Inputs": single,
            "Weights": {"Type": "Float", "Count": 1024},
            "Metadata": "[ONNX Layer: patch_embed/Conv]",
        },
        {
            "Name": "qkv_myl0_2",
            "LayerType": "gemm",
            "Inputs": unknown,
            "TacticName": "sm80_xmma_gemm_f16f16_f16f32_f32_nn_n_tilesize64x64x32",
            "Metadata": "[ONNX Layer: blocks.0.attn.qkv/MatMul]",
        },
        {"Name": "__myl_ReshTranCast_myl0_3", "LayerType": "kgen", "Inputs": half, "Metadata": None},
        {
            "Name": "_gemm_mha_v2_myl0_4",
            "LayerType": "kgen",
            "Inputs": half,
            "Metadata": "\x1f".join(
                f"[ONNX Layer: blocks.0.attn/{node}]" for node in ("MatMul", "Softmax", "MatMul.1")
            ),
        },
        {"Name": "w_myl0_5", "LayerType": "wait"},
        {"Name": "__myl_AddMulMove_myl0_6", "LayerType": "kgen", "Inputs": single, "Metadata": ""},
    ]


def layers_of_11() -> list[dict[str, Any]]:
    """The same in the terms of 11: datatype and format apart, constants listed."""
    layers = copy.deepcopy(layers_of_10())
    for layer in layers:
        for item in layer.get("Inputs", []):
            if (told := item.pop("Format/Datatype", None)) is not None:  # an item that two layers share comes once
                item |= {"Datatype": "Half" if told.startswith("N/A") else told, "Format": "Row major linear format"}
    layers[2]["Constants"] = [{"Name": "w", "Dimensions": [1, 64, 192], "Datatype": "Half"}]
    return layers


@pytest.mark.parametrize("source", ["log", "10", "11"])
def test_kernels_are_counted_alike(source: str) -> None:
    """Host arithmetic and synchronization are no kernels; work is weighed by multiply-adds, whoever tells of it."""
    if source == "log":
        kernels = kernels_from_log(LOG)
    else:
        kernels = [kernel_from_layer(layer) for layer in (layers_of_10() if source == "10" else layers_of_11())]
    audit = audit_of(kernels, [WORK], 99, [10], FP16.keep_fp32)
    (profile,) = audit.profiles
    assert (audit.weights_bytes, profile.activation_bytes) == (99, 10)
    assert (profile.kernels, profile.synchronizations, profile.fused_attention) == (5, 1, 1)
    assert (profile.reformats, profile.casts) == (1, 1)
    assert (profile.multiplied, profile.kept, profile.unread) == ({"Half": 100_000}, {"Float": 1_000}, 0)
    assert (profile.share_in(Precision.FP16), profile.known_share, round(profile.share_of_all(Precision.FP16), 4)) == (
        1.0,
        1.0,
        0.9901,
    )
    assert [(item.name.split(" ")[0], item.share, item.dtype) for item in profile.largest] == [
        ("blocks.0.attn.qkv/MatMul", 0.5941, "Half"),
        ("blocks.0.attn/MatMul", 0.396, "Half"),
        ("patch_embed/Conv", 0.0099, "Float"),
    ]
    assert find_problems(audit, "step", MODEL, FP16) == ["step, profile 0: 1 of 2 attentions fused"]
    assert find_unknowns(audit, "step") == []


def audited(**counts: Any) -> Audit:
    return Audit(0, [ProfileAudit(**counts)])


BF16 = PrecisionSpec(Precision.BF16, FP16.keep_fp32)


def test_an_unknown_precision_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the audit cannot judge does not pass it."""
    monkeypatch.setattr("dit_engines.audit.JUDGED", (Precision.FP32, Precision.FP16))
    perfect = audited(multiplied={"Half": 1, "BFloat16": 1, "Int8": 1}, fused_attention=2)
    (problem,) = find_problems(perfect, "step", MODEL, BF16)
    assert "the audit does not know the precision bf16" in problem


def test_bf16_work_is_found() -> None:
    """FP16 products in a BF16 step fail, and so do BF16 ones in its decoder, which is FP16; attentions are fused."""
    sound = audited(multiplied={"BFloat16": 99}, kept={"Float": 1}, fused_attention=2)
    assert find_problems(sound, "step", MODEL, BF16) == []
    half = audited(multiplied={"Half": 50, "BFloat16": 50}, fused_attention=1)
    assert find_problems(half, "step", MODEL, BF16) == [
        "step, profile 0: 50.0% of the multiply-adds are BF16, expected at least 99%",
        "step, profile 0: 1 of 2 attentions fused",
    ]
    assert find_problems(audited(multiplied={"Half": 9}), "decoder", MODEL, BF16) == []
    (problem,) = find_problems(audited(multiplied={"BFloat16": 9}), "decoder", MODEL, BF16)
    assert problem.endswith("0.0% of the multiply-adds are FP16, expected at least 99%")
    kept = PrecisionSpec(Precision.BF16, ("decoder",))
    assert find_problems(audited(multiplied={"Float": 9}), "decoder", MODEL, kept) == []


INT8 = PrecisionSpec(Precision.INT8, FP16.keep_fp32)


def test_int8_work_is_found() -> None:
    """A quantized layer that is not INT8 fails, and so does other work that is not FP16, as in an FP16 bundle."""
    sound = audited(multiplied={"Half": 9}, quantized={"Int8": 90}, kept={"Float": 1}, fused_attention=2)
    assert find_problems(sound, "step", MODEL, INT8) == []
    assert [sound.profiles[0].share_of_all(each) for each in (Precision.INT8, Precision.FP16)] == [0.9, 0.09]
    half = audited(multiplied={"Half": 9}, quantized={"Int8": 88, "Half": 2}, fused_attention=2)
    assert find_problems(half, "step", MODEL, INT8) == [
        "step, profile 0: 97.8% of the quantized layers' multiply-adds are INT8, expected at least 99%"
    ]
    single = audited(multiplied={"Float": 9}, quantized={"Int8": 90}, fused_attention=1)
    assert find_problems(single, "step", MODEL, INT8) == [
        "step, profile 0: 0.0% of the multiply-adds are FP16, expected at least 99%",
        "step, profile 0: 1 of 2 attentions fused",
    ]
    apart = audited(multiplied={"Half": 9}, quantized={"Int8": 90}, fused_attention=2, quantizing=3)
    assert find_problems(apart, "step", MODEL, INT8) == [
        "step, profile 0: 3 kernels only quantize or dequantize, expected none"
    ]
    assert find_problems(audited(multiplied={"Half": 9}), "decoder", MODEL, INT8) == []


def test_an_int8_engine_that_is_none_is_refused(int8_bundle: Path) -> None:
    """RTX's log is believed, so that nothing is stored; TensorRT's inspector leaves a doubt that is told."""
    bundle = open_bundle(int8_bundle)
    wrong = audited(multiplied={"Half": 9}, quantized={"Half": 90}, fused_attention=2, quantizing=8)
    step = BuiltGraph("step", "step.plan", 0, "", 0.0, (), wrong)
    said = [
        "step, profile 0: 0.0% of the quantized layers' multiply-adds are INT8, expected at least 99%",
        "step, profile 0: 8 kernels only quantize or dequantize, expected none",
    ]
    with pytest.raises(BuildError, match=re.escape(f"not the int8 that was asked for: {'; '.join(said)}; nothing was")):
        judge_audit(bundle, step, "tensorrt_rtx")
    assert list(judge_audit(bundle, step, "tensorrt")) == said
    untold = audited(multiplied={"": 9}, quantized={"": 90}, fused_attention=2)
    untold.weights_bytes = 10 * bundle.manifest.files["graphs/step.weights"].bytes + CODE_BYTES
    (doubt,) = judge_audit(bundle, replace(step, audit=untold), "tensorrt")
    assert "the builder does not tell their datatypes" in doubt


def int8_kernel(name: str, kind: str, dtype: str, *nodes: str) -> Kernel:
    return Kernel(name=name, kind=kind, nodes=nodes, weights=0, dtype=dtype, subgraph=0, profile=None)


def test_fp8_work_is_found() -> None:
    """As INT8's: what should be FP8 and is INT8 or FP16 fails, and a kernel that only quantizes does."""
    fp8 = PrecisionSpec(Precision.FP8, FP16.keep_fp32)
    sound = audited(multiplied={"Half": 9}, quantized={"FP8": 90}, kept={"Float": 1}, fused_attention=2)
    assert find_problems(sound, "step", MODEL, fp8) == []
    assert sound.profiles[0].share_of_all(Precision.FP8) == 0.9
    other = audited(multiplied={"Half": 9}, quantized={"FP8": 80, "Int8": 10}, fused_attention=2, quantizing=1)
    assert find_problems(other, "step", MODEL, fp8) == [
        "step, profile 0: 88.9% of the quantized layers' multiply-adds are FP8, expected at least 99%",
        "step, profile 0: 1 kernels only quantize or dequantize, expected none",
    ]


def test_an_int8_product_and_its_epilogue() -> None:
    """The work of a product is that of its own kernel, not of the next one, which scales the sums and names it too."""
    qkv, quantize = "blocks.0.attn.qkv/MatMul", "blocks.0.attn.qkv/QuantizeLinear"
    dequantize = ("blocks.0.attn.qkv/DequantizeLinear", "blocks.0.attn.qkv/DequantizeLinear.1")
    kernels = [
        int8_kernel("quantize", "kgen", "Int8", quantize),
        int8_kernel("qkv", "gemm", "Int8", qkv, *dequantize),
        int8_kernel("__myl_MulAdd_myl0_4", "kgen", "Half", qkv, *dequantize, "blocks.0.attn.qkv/Add"),
    ]
    (profile,) = audit_of(kernels, [WORK], 0, [0], FP16.keep_fp32, ["blocks.0.attn.qkv"]).profiles
    assert (profile.quantized, profile.multiplied, profile.quantizing) == ({"Int8": WORK[qkv]}, {}, 1)
    written = asdict(Audit(0, [profile]))
    assert audit_from_json(written).profiles[0].quantized == {"Int8": WORK[qkv]}
    for field in ("quantized", "quantizing"):  # which the sidecars of engines that were built before do not have
        del written["profiles"][0][field]
    assert audit_from_json(written).profiles[0].quantized is None


def test_fp32_work_is_found() -> None:
    """FP32 where FP16 was asked for fails, and FP16 in an FP32 bundle; FP32 in units that the policy keeps passes."""
    half_and_half = audited(multiplied={"Half": 97, "Float": 3}, fused_attention=2)
    assert find_problems(half_and_half, "step", MODEL, FP16) == [
        "step, profile 0: 97.0% of the multiply-adds are FP16, expected at least 99%"
    ]
    assert find_problems(half_and_half, "step", MODEL, FP32) == [
        "step, profile 0: 3.0% of the multiply-adds are FP32, expected at least 99%"
    ]
    assert find_problems(audited(multiplied={"Float": 5}), "step", MODEL, FP32) == []
    assert (
        find_problems(audited(multiplied={"Half": 97}, kept={"Float": 90}, fused_attention=2), "step", MODEL, FP16)
        == []
    )
    everything = audited(multiplied={"Float": 5})
    assert len(find_problems(everything, "decoder", MODEL, FP16)) == 1
    assert find_problems(everything, "decoder", MODEL, PrecisionSpec(Precision.FP16, ("decoder",))) == []


def test_kept_blocks_need_not_fuse() -> None:
    """A block whose attention the policy keeps in FP32 is not expected to be fused, and the others are."""
    one = audited(multiplied={"Half": 1}, fused_attention=1)
    kept = PrecisionSpec(Precision.FP16, ("patch_embed", "final", "blocks.1.attn"))
    assert find_problems(one, "step", MODEL, kept) == []
    assert find_problems(one, "step", MODEL, FP16) == ["step, profile 0: 1 of 2 attentions fused"]
    assert find_problems(audited(multiplied={"Half": 1}), "step", MODEL, kept) == [
        "step, profile 0: 0 of 1 attentions fused"
    ]
    mlp = PrecisionSpec(Precision.FP16, ("blocks.0.mlp",))
    assert find_problems(one, "step", MODEL, mlp) == ["step, profile 0: 1 of 2 attentions fused"]


def test_what_cannot_be_read_is_said() -> None:
    """A kernel whose datatype is not told, or a node that no kernel names, is a note, not a verdict."""
    silent = kernel_from_layer(
        {
            "Name": "qkv",
            "LayerType": "gemm",
            "Inputs": [{"Format/Datatype": "N/A due to dynamic shapes"}],
            "Metadata": "[ONNX Layer: blocks.0.attn.qkv/MatMul]",
        }
    )
    audit = audit_of([silent], [WORK], 0, [0], FP16.keep_fp32)
    assert audit.profiles[0].multiplied == {"": 60_000}
    assert audit.profiles[0].unread == 41_000
    assert find_unknowns(audit, "step") == [
        "step, profile 0: the builder tells the datatype of 0% of the multiply-adds"
    ]
    assert "FP16" not in " ".join(find_problems(audit, "step", MODEL, FP16))


def test_weights_tell_where_datatypes_do_not() -> None:
    """An engine that says nothing of its kernels but is as large as FP32 is refused; as large as FP16 it is not."""
    bundle_bytes = 894_000_000
    for weights, expected in (
        (bundle_bytes * 2, ["weights take 1.79 GB, the bundle's take 894 MB"]),
        (900_000_000, []),
    ):
        audit = Audit(weights, [ProfileAudit(multiplied={"": 100}, fused_attention=2)])
        found = find_problems(audit, "step", MODEL, FP16, bundle_bytes)
        assert len(found) == len(expected)
        assert all(words in line for words, line in zip(expected, found, strict=True))
        audit.profiles[0].multiplied = {"Half": 100}
        assert find_problems(audit, "step", MODEL, FP16, bundle_bytes) == []


def test_weights_are_asked_only_where_little_is_told() -> None:
    """A decoder whose kernels mostly say FP16 may hold more than the bundle: transformed filters. A step may not."""
    audit = Audit(2_000_000_000, [ProfileAudit(multiplied={"Half": 60, "": 40}, fused_attention=2)])
    assert find_problems(audit, "decoder", MODEL, FP16, 894_000_000) == []
    assert len(find_problems(audit, "step", MODEL, FP16, 894_000_000)) == 1
    audit.profiles[0].multiplied = {"Half": 40, "": 60}
    assert len(find_problems(audit, "decoder", MODEL, FP16, 894_000_000)) == 1


def test_damaged_layers_are_not_told() -> None:
    """Fields that are missing or of another kind count as not told."""
    for layer in ({}, {"Name": None, "Inputs": "x", "Constants": 3, "Weights": [], "Metadata": 7}, {"Inputs": [1]}):
        assert kernel_from_layer(layer).dtype == ""


def test_profiles_are_told_apart() -> None:
    """Subgraphs are numbered through the profiles; TensorRT's own kernels name theirs."""

    def kernel(name: str, node: str = "blocks.0/Add") -> Kernel:
        return kernel_from_layer({"Name": name, "LayerType": "kgen", "Metadata": f"[ONNX Layer: {node}]"})

    two = [kernel(f"k_myl{number}_7") for number in (0, 1, 2, 3)]  # two subgraphs in each of two profiles
    assert [[item.name for item in own] for own in split_by_profile(two, 2)] == [
        ["k_myl0_7", "k_myl1_7"],
        ["k_myl2_7", "k_myl3_7"],
    ]
    (one,) = split_by_profile([kernel("k_myl3_0")], 1)
    assert len(one) == 1
    named = [kernel("conv"), kernel("conv [profile 1]")]
    assert [len(own) for own in split_by_profile(named, 2)] == [1, 1]


def test_kernels_listed_once_are_every_profiles() -> None:
    """One set of kernels without a profile, as TensorRT 10 lists it, is the set of each profile: none looks empty."""
    once = [kernel_from_layer(layer) for layer in layers_of_10()]
    assert split_by_profile(once, 3) == [once] * 3
    halves = [
        kernel_from_layer({"Name": f"k_myl{number}_0", "Metadata": f"[ONNX Layer: blocks.{number}/Add]"})
        for number in range(4)
    ]
    assert split_by_profile(halves, 2) == [halves, halves]
    audit = audit_of(once, [WORK, WORK], 0, [1, 2], FP16.keep_fp32)
    assert [profile.unread for profile in audit.profiles] == [0, 0]
    assert [profile.activation_bytes for profile in audit.profiles] == [1, 2]


def gemm(*inputs: tuple[str, list[int], str], **fields: Any) -> str:
    """The datatype that is read from a GEMM's record; ``inputs`` are name, dimensions and datatype."""
    given = [{"Name": name, "Dimensions": sizes, "Format/Datatype": dtype} for name, sizes, dtype in inputs]
    return kernel_from_layer({"Name": "g", "LayerType": "gemm", "Inputs": given, **fields}).dtype


SCALARS = (("g_alpha", [1], "Float"), ("g_beta", [1], "Float"))


@pytest.mark.parametrize("dtype", ["Half", "Float"])
def test_scalars_biases_and_residuals_are_no_factors(dtype: str) -> None:
    """TensorRT 10 lists them in FP32 beside the factors of any product; the factors, or the tactic, are what counts."""
    x, w = ("x", [-1, 64], dtype), ("w", [64, 192], dtype)
    bias, residual = ("b", [192], "Float"), ("r", [-1, 192], "Float")
    assert gemm(x, w, *SCALARS) == dtype
    assert gemm(x, w, bias, *SCALARS) == dtype
    assert gemm(x, w, residual, *SCALARS) == dtype
    assert gemm(x, *SCALARS) == dtype
    word = {"Half": "f16f16_f16f32", "Float": "f32f32_f32f32"}[dtype]
    assert gemm(x, residual, *SCALARS, TacticName=f"sm80_xmma_gemm_{word}_f32_tn_n_tilesize64x64x32") == dtype
    assert gemm(x, residual, Weights={"Type": dtype, "Count": 12288}) == dtype


def test_what_does_not_tell_is_unknown() -> None:
    """An activation in FP16 beside a residual in FP32, without weights or tactic, is neither FP16 nor FP32."""
    assert gemm(("x", [-1, 64], "Half"), ("r", [-1, 192], "Float"), *SCALARS) == ""
    assert gemm(*SCALARS) == ""
    assert gemm(("x", [-1, 64], "N/A due to dynamic shapes"), *SCALARS, TacticName="Unknown tactic") == ""


@pytest.mark.parametrize(
    ("tactic", "dtype"),
    [
        ("sm80_xmma_gemm_f16f16_f16f32_f32_tn_n_tilesize64x64x32_stage6", "Half"),
        ("sm90_xmma_gemm_f16f16_f32f32_f32_tn_n_tilesize128x128x64", "Half"),  # the sum and the result are FP32
        ("sm80_xmma_gemm_f32f32_tf32f32_f32_tn_n", "Float"),
        ("cutlass_80_tensorop_f16_s16816gemm_f16_128x64_32x6_tn_align8", "Half"),
        ("cutlass_80_simt_sgemm_128x64_8x5_tn_align1", "Float"),
        ("ampere_h16816gemm_128x64_ldg8_stages_64x3_tn", "Half"),
        ("sm80_xmma_gemm_bf16bf16_bf16f32_f32_tn_n", "BFloat16"),
        ("sm80_xmma_gemm_i8i8_i8i32_f32_tn_n", "Int8"),
        ("__myl_MulAddCast_myl0_3", ""),
    ],
)
def test_tactics_name_the_factors_first(tactic: str, dtype: str) -> None:
    assert kernel_from_layer({"Name": "g", "TacticName": tactic}).dtype == dtype


def test_work_is_the_models(bundles: dict[str, Path]) -> None:
    """Multiply-adds counted in the ONNX are those of the formula, for every node of every graph and any shape."""
    bundle = open_bundle(bundles["fp16"])
    model, graphs = bundle.manifest.model, bundle.manifest.graphs
    batch, branches, rows = 3, 2, 5
    sizes = {"batch": batch, "branches": branches, "rows": rows, "height": 8, "width": 8}

    def work(graph: str) -> tuple[int, int]:
        shapes = {
            item.name: tuple(sizes[axis] if isinstance(axis, str) else axis for axis in item.shape)
            for item in graphs[graph].inputs
        }
        found = work_of_graph(bundle.path / graphs[graph].file, shapes)
        return sum(found.macs.values()), found.live_bytes

    step, live = work("step")
    # The patch embedding is before the branches part, so it is done for each image and not for each branch.
    shared = model.tokens * model.patch_size**2 * model.latent_channels * model.width
    assert step == round(1e9 * count_step_gmac(model)) * batch * branches - shared * batch * (branches - 1)
    assert work("conditioner")[0] == round(1e9 * count_conditioner_gmac(model)) * rows
    # At least the residual stream and an MLP's hidden layer: FP32 and FP16.
    assert live >= batch * branches * model.tokens * (4 * model.width + 2 * model.mlp_width)
    assert work("decoder")[0] > 0


def test_bf16_is_not_fp32() -> None:
    """A datatype's name inside another's is not that datatype: BF16 products do not pass for FP32."""
    for told, expected in (
        ("BFloat16", "BFloat16"),
        ("Half", "Half"),
        ("Int8", "Int8"),
        ("Float", "Float"),
        ("FP8", "FP8"),
    ):
        inputs = [{"Name": "x", "Dimensions": [-1, 64], "Datatype": told}]
        kernel = kernel_from_layer({"Name": "qkv", "LayerType": "gemm", "Inputs": inputs, "Metadata": ""})
        assert kernel.dtype == expected
    for tactic, expected in (("sm80_xmma_gemm_bf16bf16_bf16f32_f32_tn_n", "BFloat16"), ("gemm_f16f16_f16", "Half")):
        assert kernel_from_layer({"Name": "qkv", "TacticName": tactic}).dtype == expected
    lowered = audited(multiplied={"BFloat16": 100})
    assert len(find_problems(lowered, "step", MODEL, FP32)) == 1
