"""``dit-export --bisect`` names the block and the operation that break FP16, and its list mends the bundle."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from dit_export.bisect.altered_engine import AlteredSession
from dit_export.bisect.bisection import bisection_of, find_shortest
from dit_export.bisect.fp16_operations import unit_of
from dit_export.bisect.fp32_weights import weights_from_checkpoint
from dit_export.bisect.graph_edits import emulate_fp16, move_to_fp32
from dit_export.bisect.precision_trials import PrecisionTrials
from dit_export.bisect.report import format_bisection
from dit_export.checkpoints.sources import Source, load_checkpoint
from dit_export.graphs.precision import (
    FP16,
    check_units,
    make_fp16_policy,
    read_keep_list,
)
from hypothesis import given
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator
from safetensors.torch import load_file, save_file
from support.checkpoints import make_checkpoint
from support.commands import run_command
from torch import Tensor

from dit_runtime.bundle.reader import Bundle, open_bundle
from dit_runtime.core.errors import BundleError, CheckpointError, ParityError

Weights = dict[str, Tensor]


def scores(weights: Weights) -> None:
    """Block 0: queries and keys of 150 throughout, whose products pass FP16's range; their softmax is uniform."""
    for name in ("to_q", "to_k"):
        weights[f"transformer_blocks.0.attn1.{name}.weight"].zero_()
        weights[f"transformer_blocks.0.attn1.{name}.bias"].fill_(150)


def first_product(weights: Weights) -> None:
    """Block 1: one hidden unit of the MLP scaled up, and as much down behind the GELU."""
    prefix = "transformer_blocks.1.ff.net."
    weights[f"{prefix}0.proj.weight"][5] *= 2**16
    weights[f"{prefix}0.proj.bias"][5] *= 2**16
    weights[f"{prefix}2.weight"][:, 5] /= 2**16


def values(weights: Weights) -> None:
    """Block 1: values scaled up, and as much down behind the attention; in FP32 the same function to the last bit."""
    for kind in ("weight", "bias"):
        weights[f"transformer_blocks.1.attn1.to_v.{kind}"] *= 2**18
    weights["transformer_blocks.1.attn1.to_out.0.weight"] /= 2**18


FOUND = {
    scores: ("blocks.0.attn", "block 0, attention scores"),
    first_product: ("blocks.1.mlp", "block 1, MLP first product"),
    values: ("blocks.1.attn", "block 1, attention query, key and value product"),
}


def faulty(folder: Path, *faults: Callable[[Weights], None]) -> Path:
    """The tiny checkpoint with faults of range: in FP32 it is sound."""
    path = make_checkpoint(folder)
    (file,) = (path / "transformer").glob("*.safetensors")
    weights = load_file(file)
    for fault in faults:
        fault(weights)
    save_file(weights, file, metadata={"format": "pt"})
    return path


def exported(checkpoint: Path, output: Path, *flags: str | Path) -> Bundle:
    done = run_command("dit-export", checkpoint, "--fp16", *flags, "-o", output)
    assert done.returncode == 0, done.stderr + done.stdout
    return open_bundle(output)


@pytest.fixture(scope="module")
def overflowing(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Bundle]:
    """A checkpoint with a fault in either block, and its FP16 bundle."""
    folder = tmp_path_factory.mktemp("overflowing")
    checkpoint = faulty(folder / "checkpoint", scores, first_product)
    return checkpoint, exported(checkpoint, folder / "fp16.bundle", "--no-verify")


def test_a_sound_bundle_needs_nothing(bundles: dict[str, Path]) -> None:
    """Nothing is named where nothing breaks, in either precision."""
    for path in (bundles["fp32"], bundles["fp16"]):
        found = bisection_of(open_bundle(path))
        assert found.findings == ()
        assert found.keep_fp32 == ()
        assert all(rung.passed for rung in found.rungs)
    assert found.closest  # the FP16 bundle's
    table = format_bisection(found, open_bundle(path), Path("keep.txt"))
    print(table)
    assert "nothing breaks the budget" in table
    assert "keep.txt" not in table


@pytest.fixture(scope="module")
def bisected(overflowing: tuple[Path, Bundle]) -> tuple[Path, dict[str, Any]]:
    """The list that the command writes for both faults, and what it says of them."""
    checkpoint, bundle = overflowing
    keep = bundle.path.with_name("keep.txt")
    done = run_command("dit-export", checkpoint, "--bisect", bundle.path, "-o", keep, "--json")
    assert done.returncode == 0, done.stderr
    return keep, json.loads(done.stdout)


def test_it_names_block_and_operation(bisected: tuple[Path, dict[str, Any]]) -> None:
    """Two faults in two blocks: exactly those units, the operations that overflow, and the cost."""
    keep, found = bisected
    names = {item["unit"]: item["reasons"][0]["operation"] for item in found["findings"]}
    assert names == dict(FOUND[fault] for fault in (scores, first_product))
    assert all(rung["passed"] for rung in found["kept"])
    assert not all(rung["passed"] for rung in found["rungs"])
    # Weights and biases: 64×192 + 192 + 64×64 + 64 of the attention, 2·64×256 + 256 + 64 of the MLP, 2 bytes more each.
    assert [item["weights_bytes"] for item in found["findings"]] == [2 * 16640, 2 * 33088]
    if found["cost"] is not None:
        before, after = found["cost"]["fused_attention"]
        assert (before, after) == (2, 1)  # FP32 queries, keys and values are never fused
        assert found["cost"]["weights_bytes"][1] > found["cost"]["weights_bytes"][0]
    assert read_keep_list([str(keep)]) == ("blocks.0.attn", "blocks.1.mlp")


@pytest.mark.slow  # an export
def test_the_list_mends_the_bundle(
    overflowing: tuple[Path, Bundle], bisected: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    """Exported with the list, the checkpoint verifies in FP16."""
    checkpoint, keep = overflowing[0], bisected[0]
    mended = exported(checkpoint, tmp_path / "mended.bundle", "--keep-fp32", keep)  # verifies
    assert mended.manifest.precision.keep_fp32 == (*FP16.keep_fp32, "blocks.0.attn", "blocks.1.mlp")
    assert bisection_of(mended).findings == ()


@pytest.mark.slow  # an export for each; the default run has two of them in one bundle
@pytest.mark.parametrize("fault", FOUND, ids=lambda fault: fault.__name__)
def test_one_fault_one_name(fault: Callable[[Weights], None], tmp_path: Path) -> None:
    """Each fault alone is found alone, at its operation."""
    checkpoint = faulty(tmp_path / "checkpoint", fault)
    bundle = exported(checkpoint, tmp_path / "fp16.bundle", "--no-verify")
    weights = weights_from_checkpoint(load_checkpoint(Source(str(checkpoint))), bundle)
    (finding,) = bisection_of(bundle, weights).findings
    assert (finding.unit, finding.reasons[0].operation) == FOUND[fault]


def test_without_the_checkpoint_the_bundles_weights_do(overflowing: tuple[Path, Bundle]) -> None:
    """Weights that FP16 holds are enough to find what overflows."""
    found = bisection_of(overflowing[1]).findings
    assert [(finding.unit, finding.reasons[0].operation) for finding in found] == [FOUND[scores], FOUND[first_product]]
    assert all("FP16 ends at 65504" in str(finding) for finding in found)


def test_another_checkpoint_is_refused(overflowing: tuple[Path, Bundle], checkpoint: Path) -> None:
    """FP32 weights of another model would make islands of nonsense."""
    with pytest.raises(CheckpointError, match="its weights are not those of"):
        weights_from_checkpoint(load_checkpoint(Source(str(checkpoint))), overflowing[1])


def with_limits(bundle: Bundle, **limits: float) -> Bundle:
    """The bundle with other absolute limits in FP16, and no others: without floors there is no budget."""
    manifest = bundle.manifest
    tolerances = {**manifest.tolerances, "fp16": {**manifest.tolerances["fp16"], **limits}}
    return replace(bundle, manifest=replace(manifest, tolerances=tolerances, thresholds={}, floors={}))


def test_rounding_that_adds_up(bundles: dict[str, Path]) -> None:
    """A budget that a sound bundle misses by rounding alone: a list that keeps it, of which no unit can be spared."""
    bundle = with_limits(open_bundle(bundles["fp16"]), forward=9e-4)  # 1.4e-3 as it is, 2.8e-4 in FP32
    found = bisection_of(bundle)
    assert all(rung.passed for rung in found.kept)
    assert found.findings
    trials = PrecisionTrials(bundle, {})
    for spared in found.keep_fp32:
        rungs = trials.verify_network([unit for unit in found.keep_fp32 if unit != spared])
        assert not all(rung.passed for rung in rungs)
    assert all("rounds" in finding.reasons[0].detail for finding in found.findings)


def test_a_fault_that_is_none_of_precision(bundles: dict[str, Path]) -> None:
    """What FP32 does not mend is not put on a list: with the checkpoint's weights it is the graphs' or the records'."""
    bundle = with_limits(open_bundle(bundles["fp16"]), blocks=1e-9)
    with pytest.raises(ParityError, match="name the checkpoint too"):
        bisection_of(bundle)
    with pytest.raises(ParityError, match="not a matter of precision"):
        bisection_of(bundle, {})


def test_a_unit_alone_in_fp16_is_near_fp32_and_not_it(bundles: dict[str, Path]) -> None:
    """The order of the search measures something: every unit's rounding shows in its own block."""
    trials = PrecisionTrials(open_bundle(bundles["fp16"]), {})
    errors = {unit: trials.measure_error(unit) for unit in trials.units if unit != "decoder"}
    print(errors)
    assert len(errors) == 5
    assert all(1e-5 < error < 2e-3 for error in errors.values())  # 7.0e-5 to 6.0e-4


@given(st.sets(st.integers(0, 30)).filter(bool), st.integers(1, 31))
def test_the_shortest_list_is_the_needed_one(needed: set[int], more: int) -> None:
    """Where units are needed together, all of them and no other are found, wherever they are in the order."""
    order = [f"unit {index}" for index in range(max(needed) + more)]
    wanted = {f"unit {index}" for index in needed}
    assert set(find_shortest(order, lambda units: wanted <= set(units))) == wanted


def small_graph() -> ir.Model:
    """``blocks.0.attn``: FP32 → FP16 → ×3 → −0.5 → FP32, as the exporter writes it."""
    half = ir.tensor(np.array([3.0], np.float16), name="three"), ir.tensor(np.array([0.5], np.float16), name="less")
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([2]))
    initializers = [ir.Value(name=tensor.name, const_value=tensor) for tensor in half]
    for value, tensor in zip(initializers, half, strict=True):
        value.dtype, value.shape = tensor.dtype, ir.Shape(tensor.shape)
    down = ir.node("Cast", [x], {"to": int(ir.DataType.FLOAT16)}, name="blocks.0/Cast")
    times = ir.node("Mul", [down.outputs[0], initializers[0]], name="blocks.0.attn/Mul")
    less = ir.node("Sub", [times.outputs[0], initializers[1]], name="blocks.0.attn/Sub")
    up = ir.node("Cast", [less.outputs[0]], {"to": int(ir.DataType.FLOAT)}, name="blocks.0/Cast.1")
    for node in (down, times, less, up):
        node.outputs[0].name = node.name.replace("/", " ")
        node.outputs[0].dtype = ir.DataType.FLOAT if node is up else ir.DataType.FLOAT16
        node.outputs[0].shape = ir.Shape([2])
    graph = ir.Graph(
        [x], [up.outputs[0]], nodes=[down, times, less, up], initializers=initializers, opset_imports={"": 20}, name="g"
    )
    return ir.Model(graph, ir_version=10)


def upcast(_: ir.Node, value: ir.Value) -> np.ndarray:
    return value.const_value.numpy().astype(np.float32)


def test_fp16_is_rounded_after_every_operation() -> None:
    """The emulation is numpy's FP16 bit by bit and overflows where it does; what is kept is FP32's."""
    x = np.array([30000.123, 1.2345678], np.float32)
    half = x.astype(np.float16)
    with np.errstate(over="ignore"):
        expected = (half * np.float16(3) - np.float16(0.5)).astype(np.float32)
    assert np.isinf(expected[0])
    for kept, wanted in ((False, expected), (True, x * np.float32(3) - np.float32(0.5))):
        model = small_graph()
        emulate_fp16("step", model, lambda node, kept=kept: kept or unit_of("step", node) is None, upcast)
        (found,) = AlteredSession(model).run({"x": x}, ["blocks.0 Cast.1"])
        np.testing.assert_array_equal(found, wanted)


def test_an_island_takes_its_numbers_before_the_cast() -> None:
    """A strongly typed island is fed by FP32 and not by what a cast to FP16 left of it, and has FP32 throughout.

    On ONNX's own evaluator: ONNX Runtime leaves out roundings.
    """
    model = small_graph()
    move_to_fp32(model, lambda node: unit_of("step", node) == "blocks.0.attn", upcast)
    session = ReferenceEvaluator(ir.to_proto(model))
    x = np.array([30000.123, 1.1754386], np.float32)
    np.testing.assert_array_equal(session.run(None, {"x": x})[0], x * np.float32(3) - np.float32(0.5))
    half = x.astype(np.float16)
    with np.errstate(over="ignore"):
        wanted = {
            "Mul": ((x * np.float32(3)).astype(np.float16) - np.float16(0.5)).astype(np.float32),
            "Sub": (half * np.float16(3)).astype(np.float32) - np.float32(0.5),
        }
        for operation, expected in wanted.items():  # an island of one operation
            model = small_graph()
            move_to_fp32(model, lambda node, name=f"blocks.0.attn/{operation}": node.name == name, upcast)
            (found,) = ReferenceEvaluator(ir.to_proto(model)).run(None, {"x": x})
            np.testing.assert_array_equal(found, expected)


def test_the_list_is_read_as_it_is_written(tmp_path: Path) -> None:
    """Comments and empty lines are for people; names and files mix; anything else is refused by name."""
    file = tmp_path / "keep.txt"
    file.write_text("# why\n\nblocks.1.attn  # overflows\nblocks.0.mlp\n")
    assert read_keep_list([str(file), "decoder", "blocks.0.mlp"]) == ("blocks.1.attn", "blocks.0.mlp", "decoder")
    file.write_text("blocks.1.attn blocks.0.mlp\n")
    with pytest.raises(CheckpointError, match="one name a line"):
        read_keep_list([str(file)])
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CheckpointError, match="not a list"):
        read_keep_list([str(file)])
    with pytest.raises(CheckpointError, match="no such file"):
        read_keep_list([str(tmp_path / "gone.txt")])


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_list_with_a_byte_order_mark(tmp_path: Path, encoding: str) -> None:
    """Fails if a list that a program of Windows saved names a unit that begins with the mark, or cannot be read."""
    file = tmp_path / "keep.txt"
    file.write_text("blocks.1.attn\nblocks.0.mlp # größer\n", encoding=encoding)
    assert read_keep_list([str(file)]) == read_keep_list(str(file)) == ("blocks.1.attn", "blocks.0.mlp")


def test_a_list_that_is_no_utf_8(tmp_path: Path) -> None:
    """UTF-16 without a byte order mark, and what is no text: one line, not the name of a unit with NULs in it."""
    file = tmp_path / "keep.txt"
    for content in ("decoder\n".encode("utf-16-le"), "decoder\n".encode("utf-32"), b"decoder\0", b"d\xe9coder"):
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"keep.txt: not a list of units' names"):
            read_keep_list([str(file)])
    for content in (b"decoder\r\nblocks.0\r\n", b"decoder\rblocks.0", b"\tdecoder \t# why\n\n  blocks.0"):
        file.write_bytes(content)
        assert read_keep_list([str(file)]) == ("decoder", "blocks.0")


def test_a_name_of_nothing_is_refused(bundles: dict[str, Path], checkpoint: Path, tmp_path: Path) -> None:
    """A unit that the model does not have would keep nothing, silently."""
    model = open_bundle(bundles["fp16"]).manifest.model
    for unit in ("blocks", "blocks.1", "blocks.1.attn", "conditioner", "decoder"):
        check_units(make_fp16_policy([unit]), model)
    for unit in ("blocks.2.attn", "blocks.1.atn", "block.1", "blocks.1.cross_attn"):
        with pytest.raises(CheckpointError, match="no such unit"):
            check_units(make_fp16_policy([unit]), model)
    done = run_command("dit-export", checkpoint, "--fp16", "--keep-fp32", "blocks.7", "-o", tmp_path / "b")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "no such unit" in done.stderr
    assert not list(tmp_path.iterdir())


def test_the_command_says_what_it_lacks(checkpoint: Path, tmp_path: Path) -> None:
    """A list without FP16 graphs, a bisection without a bundle, and no checkpoint at all are errors of one line."""
    for argv, words in (
        ((checkpoint, "--keep-fp32", "blocks.0"), "add --fp16"),
        (("--bisect", tmp_path / "none.bundle"), "no such bundle"),
        ((), "a checkpoint is required"),
    ):
        done = run_command("dit-export", *argv)
        assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
        assert words in done.stderr


def test_an_altered_bundle_is_not_opened(bundles: dict[str, Path], tmp_path: Path) -> None:
    """The graphs are checked against the manifest before anything reads them."""
    path = Path(shutil.copytree(bundles["fp16"], tmp_path / "altered"))
    with (path / "graphs" / "probe.onnx").open("ab") as file:
        file.write(b" ")
    with pytest.raises(BundleError, match="bytes, expected"):
        bisection_of(open_bundle(path))
