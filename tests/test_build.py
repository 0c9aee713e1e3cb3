"""``dit-build`` compiles with the real TensorRT-RTX builder, on a machine without a GPU, and audits what it got."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import onnx
import pytest
from conftest import run_command
from test_verify import edit_graph, signed

from dit_engines.audit import Audit, audit_from_log, problems
from dit_engines.build import engine_from_bundle
from dit_engines.external_data import check_external_data
from dit_engines.recipe import profiles_of, recipe_for
from dit_runtime.bundle import PrecisionSpec, open_bundle
from dit_runtime.errors import BuildError, BundleError

pytest.importorskip("tensorrt_rtx")

FP16 = PrecisionSpec("fp16", ("patch_embed", "final"))


def test_the_command_builds_audits_and_reuses(bundles: dict[str, Path], tmp_path: Path) -> None:
    """All graphs compile; every attention is fused in both guidance profiles; weights are stored once; no rebuild."""
    store = tmp_path / "store"
    done = run_command("dit-build", bundles["fp16"], "--target", "rtx", "--store", store, "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    graphs = {graph["graph"]: graph for graph in report["graphs"]}
    assert set(graphs) == {"conditioner", "step", "decoder"}
    step = graphs["step"]["audit"]
    assert [profile["fused_attention"] for profile in step["profiles"]] == [2, 2]
    assert all(10 < profile["kernels"] < 40 for profile in step["profiles"])  # measured: 26 and 25
    assert all(profile["activation_bytes"] > 0 for profile in step["profiles"])
    onnx_bytes = open_bundle(bundles["fp16"]).manifest.files["graphs/step.weights"].bytes
    assert 0.9 * onnx_bytes < step["weights_bytes"] < 1.1 * onnx_bytes
    folder = Path(report["folder"])
    assert {path.name for path in folder.iterdir()} == {*(f"{name}.plan" for name in graphs), "engine.json"}
    again = run_command("dit-build", bundles["fp16"], "--store", store)
    assert "already built" in again.stdout
    assert "2 of 2" in again.stdout
    plan = folder / "step.plan"
    plan.write_bytes(plan.read_bytes()[:-1])
    assert run_command("dit-build", bundles["fp16"], "--store", store).stdout.count("already built") == 0


def test_fp32_declared_fp16_fails(bundles: dict[str, Path], tmp_path: Path) -> None:
    """An FP32 graph whose manifest says FP16 is caught by the audit and not stored."""
    path = Path(shutil.copytree(bundles["fp32"], tmp_path / "liar", ignore=shutil.ignore_patterns("engines")))
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["precision"] = {"name": "fp16", "keep_fp32": ["patch_embed", "final"]}
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BuildError, match=r"step, profile 0: 0\.0% of the multiplied weights are FP16"):
        engine_from_bundle(open_bundle(path), recipe_for("rtx", "8.9", 2, (1, 2), 64), tmp_path / "store")
    assert not list((tmp_path / "store").glob("*"))


def test_fp32_queries_fail(bundles: dict[str, Path], tmp_path: Path) -> None:
    """Attention products in FP32 inside an FP16 graph are not fused, and the audit counts them."""
    path = Path(shutil.copytree(bundles["fp16"], tmp_path / "fp32-qkv", ignore=shutil.ignore_patterns("engines")))

    def change(graph: onnx.GraphProto) -> None:
        nodes = list(graph.node)
        for node in nodes:
            if node.name == "blocks.1.attn/MatMul":
                casts = []
                for index, name in enumerate(list(node.input)):
                    casts.append(onnx.helper.make_node("Cast", [name], [f"{name}_fp32"], to=onnx.TensorProto.FLOAT))
                    node.input[index] = f"{name}_fp32"
                position = list(graph.node).index(node)
                for cast in casts:
                    graph.node.insert(position, cast)
            if node.name == "blocks.1.attn/Cast":  # scores are FP32 already
                node.op_type = "Identity"
                del node.attribute[:]
        del graph.value_info[:]

    edit_graph(path, "step", change)
    with pytest.raises(BuildError, match="1 of 2 attentions fused"):
        engine_from_bundle(signed(path), recipe_for("rtx", "8.9", 2, (1, 2), 64), tmp_path / "store")


def test_the_audit_reads_the_builders_log(bundles: dict[str, Path]) -> None:
    """Host shape arithmetic and stream synchronization are not kernels; profiles are told apart by their suffix."""
    weight = "Constants: [ { Name: w, Dimensions: [64,64], Strides: [64,1], Datatype: Half, Format: f }], Outputs: []"
    layers = "\n".join(
        [
            "Layers:",
            "Name: __mye1_0_myl0_0, LayerType: shape_call, Inputs: [], Constants: [], Outputs: [], Metadata: ",
            f"Name: a_myl0_1, LayerType: gemm, Inputs: [], {weight}, Metadata: [ONNX Layer: blocks.0.attn.qkv/MatMul]",
            "Name: _gemm_mha_v2_myl0_2, LayerType: kgen, Inputs: [], Constants: [], Outputs: [], Metadata: ",
            "Name: _gemm_mha_v2_myl1_2, LayerType: kgen, Inputs: [], Constants: [], Outputs: [], Metadata: ",
            "Name: w_myl1_3, LayerType: wait, Inputs: [], Constants: [], Outputs: [], Metadata: ",
        ]
    )
    memory = [
        "Total Activation Memory: 10 bytes",
        "Total Activation Memory: 20 bytes",
        "Total Weights Memory: 99 bytes",
    ]
    audit = audit_from_log(layers, memory, 2)
    assert audit.weights_bytes == 99
    assert [(p.kernels, p.fused_attention, p.synchronizations, p.activation_bytes) for p in audit.profiles] == [
        (2, 1, 0, 10),
        (1, 1, 1, 20),
    ]
    assert audit.profiles[0].multiplied == {"Half": 4096}
    model = open_bundle(bundles["fp16"]).manifest.model
    assert "1 of 2 attentions fused" in " ".join(problems(audit, "step", model, FP16))
    assert problems(Audit(0, []), "step", model, PrecisionSpec("fp32", ())) == []


def test_recipes_and_profiles(bundles: dict[str, Path]) -> None:
    """A profile for each branch count; impossible recipes are refused with what is possible."""
    manifest = open_bundle(bundles["fp16"]).manifest
    graphs = manifest.graphs
    recipe = recipe_for("rtx", "12.0", 8, (2, 1), 500, decode_tile=4)
    first, second = profiles_of(graphs["step"], recipe, manifest)
    assert first["rows"] == ((1, 1), (1, 1), (1, 8))
    assert second["guidance"] == ((2, 1, 4), (2, 1, 4), (2, 8, 4))
    assert second["modulation"] == ((1, 14, 64), (100, 14, 64), (500, 14, 64))
    (decoder,) = profiles_of(graphs["decoder"], recipe, manifest)
    assert decoder["latents"] == ((1, 4, 4, 4), (1, 4, 4, 4), (8, 4, 4, 4))  # a tile, not the 8×8 latents
    for arguments, message in [
        (("orin", "8.7", 1, (1,), 2), "target 'orin' is not supported; choose one of rtx"),
        (("rtx", "9.0", 1, (1,), 2), "compute capability '9.0'"),
        (("rtx", "8.9", 1, (0,), 2), "branches"),
        (("rtx", "8.9", 1, (1, 1), 2), "branches"),
    ]:
        with pytest.raises(BuildError, match=message):
            recipe_for(*arguments)


@pytest.mark.parametrize("location", ["../../../etc/passwd", "/etc/passwd", "sub/x", ""])
def test_external_data_stays_in_its_folder(bundles: dict[str, Path], tmp_path: Path, location: str) -> None:
    """A graph whose weights lie elsewhere, behind a link, or past its end is refused before it is parsed."""
    path = Path(shutil.copytree(bundles["fp16"], tmp_path / "b", ignore=shutil.ignore_patterns("engines")))
    file = path / "graphs" / "step.onnx"
    check_external_data(file)

    def change(graph: onnx.GraphProto) -> None:
        tensor = next(item for item in graph.initializer if item.external_data)
        next(entry for entry in tensor.external_data if entry.key == "location").value = location

    edit_graph(path, "step", change)
    with pytest.raises(BundleError, match="expected a file beside it"):
        check_external_data(file)


def test_external_data_of_a_constant(bundles: dict[str, Path], tmp_path: Path) -> None:
    """A tensor in a node's attribute is looked at like a weight."""
    path = Path(shutil.copytree(bundles["fp16"], tmp_path / "b", ignore=shutil.ignore_patterns("engines")))

    def change(graph: onnx.GraphProto) -> None:
        tensor = onnx.TensorProto(name="secret", dims=[4], data_type=onnx.TensorProto.FLOAT)
        tensor.data_location = onnx.TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value="../secret.bin")
        graph.node.insert(0, onnx.helper.make_node("Constant", [], ["secret"], value=tensor))

    edit_graph(path, "step", change)
    with pytest.raises(BundleError, match=r"weights at '\.\./secret.bin', expected a file beside it"):
        check_external_data(path / "graphs" / "step.onnx")


def test_external_data_that_ends_early(bundles: dict[str, Path], tmp_path: Path) -> None:
    """Weights shorter than the graph says, or linked, are refused."""
    path = Path(shutil.copytree(bundles["fp16"], tmp_path / "b", ignore=shutil.ignore_patterns("engines")))
    weights = path / "graphs" / "step.weights"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(BundleError, match="ends at byte"):
        check_external_data(path / "graphs" / "step.onnx")
    weights.rename(tmp_path / "elsewhere")
    weights.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BundleError, match="not a plain file of its own"):
        check_external_data(path / "graphs" / "step.onnx")
