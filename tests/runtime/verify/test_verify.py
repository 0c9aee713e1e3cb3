"""``dit-verify`` passes what is right and fails what is wrong, at the rung that says where."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.bundles import edit_graph, signed
from support.commands import run_command, run_process
from support.optional import onnx

from dit_runtime.backends.base import Array
from dit_runtime.backends.onnxruntime.engine import OnnxRuntimeEngine
from dit_runtime.backends.profiles import Profiles, shapes_of_tensors
from dit_runtime.bundle.manifest import GRAPHS, GraphSpec
from dit_runtime.bundle.precision import QUANTIZED, Precision
from dit_runtime.bundle.reader import Bundle, open_bundle
from dit_runtime.core.errors import BundleError, ParityError
from dit_runtime.verify import network_rungs
from dit_runtime.verify.auto import choose_engine
from dit_runtime.verify.budget import (
    Budget,
    Series,
    budget_for,
    compare_series,
    worst_gain_of,
)
from dit_runtime.verify.limits import LARGER_IS_BETTER, THRESHOLDS, TOLERANCES, limits_for_bundle
from dit_runtime.verify.metrics import (
    cosine,
    psnr,
    relative_error,
    relative_l2,
    ssim,
)
from dit_runtime.verify.replay import Replay, choose_shapes
from dit_runtime.verify.rung import Rung
from dit_runtime.verify.verdicts import has_passed, store_verdict
from dit_runtime.verify.verification import verification_of, verify


def failed(bundle: Bundle) -> list[str]:
    return [rung.name for rung in verify(bundle, OnnxRuntimeEngine(bundle, threads=1)) if not rung.passed]


@pytest.fixture
def tampered(bundles: dict[str, Path], tmp_path: Path) -> Path:
    """A copy to damage; ``signed`` makes its manifest vouch for the damage, as a faulty exporter would."""
    return Path(shutil.copytree(bundles["fp32"], tmp_path / "tampered", ignore=shutil.ignore_patterns("engines")))


def test_a_good_bundle_passes(bundle_path: Path) -> None:
    """Both precisions match the reference on every rung."""
    assert failed(open_bundle(bundle_path)) == []


def test_a_wrong_layer_norm_epsilon(tampered: Path) -> None:
    """An eps of 1e-3 instead of 1e-6 in the last block's attention norm fails from the blocks upwards."""

    def change(graph: onnx.GraphProto) -> None:
        node = next(node for node in graph.node if node.name == "blocks.1.norm1/LayerNormalization")
        next(a for a in node.attribute if a.name == "epsilon").f = 1e-3

    for name in ("step", "probe"):
        edit_graph(tampered, name, change)
    assert {"blocks", "forward G=1", "forward G=2"} <= set(failed(signed(tampered)))


def test_swapped_guidance_branches(tampered: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Null and conditional branch exchanged: unguided rungs pass, guided ones fail."""
    from dit_runtime.verify import replay as module

    original = module.branch_rows

    def swapped(labels, null, branches):
        conditions, rows = original(labels, null, branches)
        return conditions, rows[::-1]

    monkeypatch.setattr(module, "branch_rows", swapped)
    names = failed(open_bundle(tampered))
    assert "forward G=2" in names
    assert "forward G=1" not in names


def test_noise_of_another_seed(tampered: Path) -> None:
    """Recorded seeds that do not make the recorded noise fail the noise rung alone."""
    file = tampered / "golden" / "ddpm.npz"
    record = dict(np.load(file))
    np.savez(file, **{**record, "seeds": record["seeds"] + 1})
    assert failed(signed(tampered)) == ["ddpm noise"]


def test_an_off_by_one_timestep(tampered: Path) -> None:
    """Timesteps shifted by one in the sampler, with the network untouched, fail in the steps, not in the forward."""
    manifest = json.loads((tampered / "manifest.json").read_text())
    manifest["diffusion"]["steps_offset"] = 1
    (tampered / "manifest.json").write_text(json.dumps(manifest))
    names = failed(open_bundle(tampered))
    assert "ddim teacher-forced" in names
    assert not [name for name in names if name.startswith(("forward", "blocks", "ddpm"))]


def test_a_wrong_vae_scale(tampered: Path) -> None:
    """A wrong scaling factor fails the decoder and the image, and nothing before them."""

    def change(graph: onnx.GraphProto) -> None:
        scale = next(node for node in graph.node if "latents" in node.input and node.op_type == "Mul")
        name = next(item for item in scale.input if item != "latents")
        tensor = next(item for item in graph.initializer if item.name == name)
        tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor) * np.float32(1.02), name))

    edit_graph(tampered, "decoder", change)
    names = failed(signed(tampered))
    assert "decoder" in names
    assert not [name for name in names if name.startswith(("forward", "blocks", "ddim", "ddpm"))]


def test_the_command_says_so_and_exits_with_1(tampered: Path) -> None:
    """The exit code and the table tell a failure; ``--json`` carries the same verdict."""
    edit = json.loads((tampered / "manifest.json").read_text())
    edit["diffusion"]["steps_offset"] = 1
    (tampered / "manifest.json").write_text(json.dumps(edit))
    done = run_process("dit-verify", tampered, "--engine", "onnxruntime")
    assert done.returncode == 1
    assert "FAIL: ddim" in done.stdout
    last = done.stderr.splitlines()[-1]
    assert re.fullmatch(r"dit-verify: .* \d+ of \d+ rungs fail on onnxruntime .*, the first is 'ddim .*", last)
    done = run_command("dit-verify", tampered, "--engine", "onnxruntime", "--json", "--quick")
    assert done.returncode == 1
    report = json.loads(done.stdout)
    assert report["passed"] is False
    assert any(rung["name"] == "ddim free-running" and not rung["passed"] for rung in report["rungs"])


def test_auto_trusts_only_what_passed_here(tampered: Path, bundles: dict[str, Path]) -> None:
    """``auto`` verifies an engine without a verdict, keeps the verdict, and refuses an engine that failed."""
    bundle = open_bundle(bundles["fp32"])
    assert has_passed(bundle, choose_engine(bundle).engine) is True
    manifest = json.loads((tampered / "manifest.json").read_text())
    manifest["diffusion"]["steps_offset"] = 1
    (tampered / "manifest.json").write_text(json.dumps(manifest))
    bad = open_bundle(tampered)
    for _ in range(2):  # the second time from the stored verdict
        with pytest.raises(ParityError, match="does not match the PyTorch reference"):
            choose_engine(bad)


def test_a_quick_pass_does_not_replace_a_full_failure(tampered: Path) -> None:
    """``auto`` must not trust, after a quick verify, what the full one found wrong."""
    bundle = open_bundle(tampered)
    engine = OnnxRuntimeEngine(bundle)
    good, bad = Rung("blocks", 0.0, 1.0, "relative"), Rung("blocks", 2.0, 1.0, "relative")
    store_verdict(bundle, engine, [bad], quick=False)
    store_verdict(bundle, engine, [good], quick=True)
    assert has_passed(bundle, engine) is False
    store_verdict(bundle, engine, [good], quick=False)
    assert has_passed(bundle, engine) is True
    store_verdict(bundle, engine, [bad], quick=True)
    assert has_passed(bundle, engine) is False


def test_nothing_equals_not_a_number() -> None:
    """NaN, infinity or another shape is an infinite error on either side."""
    good = np.ones((2, 3))
    for bad in (np.full((2, 3), np.nan), np.full((2, 3), np.inf), np.ones((3, 2))):
        assert relative_error(bad, good) == np.inf
        assert relative_error(good, bad) == np.inf


def test_measures_of_vectors() -> None:
    """Relative L2 and cosine are what their names say, and not numbers that pass where a side is not finite."""
    expected, found = np.array([3.0, 4.0]), np.array([3.0, 4.5])
    assert relative_l2(found, expected) == pytest.approx(0.1)
    assert cosine(found, expected) == pytest.approx(27 / (5 * math.hypot(3, 4.5)))
    bad = np.array([3.0, np.nan])
    assert relative_l2(bad, expected) == np.inf
    assert math.isnan(cosine(bad, expected))


def plain_ssim(found: Array, expected: Array) -> float:
    """Wang et al. 2004, formula 13 with a Gaussian window of 11×11 and σ = 1.5, window by window."""
    offsets = np.arange(-5, 6)
    weights = np.exp(-(offsets[:, None] ** 2 + offsets[None] ** 2) / (2 * 1.5**2))
    weights /= weights.sum()
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    values = []
    for n in range(found.shape[0]):
        for row in range(found.shape[1] - 10):
            for column in range(found.shape[2] - 10):
                for channel in range(found.shape[3]):
                    at = (n, slice(row, row + 11), slice(column, column + 11), channel)
                    x, y = found[at].astype(np.float64), expected[at].astype(np.float64)
                    mean_x, mean_y = (weights * x).sum(), (weights * y).sum()
                    variance_x = (weights * (x - mean_x) ** 2).sum()
                    variance_y = (weights * (y - mean_y) ** 2).sum()
                    covariance = (weights * (x - mean_x) * (y - mean_y)).sum()
                    values.append(
                        (2 * mean_x * mean_y + c1)
                        * (2 * covariance + c2)
                        / ((mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2))
                    )
    return float(np.mean(values))


@pytest.mark.parametrize("noise", [0, 1, 20, 80])
def test_ssim_is_the_papers(noise: int) -> None:
    """SSIM agrees with a plain evaluation of the paper's formula, from identical images to unlike ones."""
    random = np.random.default_rng(noise)
    expected = np.clip(random.normal(120, 50, (2, 16, 14, 3)), 0, 255).astype(np.uint8)
    found = np.clip(expected + random.normal(0, noise, expected.shape), 0, 255).astype(np.uint8)
    assert ssim(found, expected) == pytest.approx(plain_ssim(found, expected), abs=1e-10)  # measured: 6e-15
    assert ssim(expected, expected) == pytest.approx(1)
    assert ssim(found[:, :8, :8], expected[:, :8, :8]) <= 1  # smaller than the window


@given(scale=st.floats(1, 20), errors=st.lists(st.floats(-1, 1), min_size=2, max_size=2))
def test_guidance_multiplies_an_error_by_2s_minus_1_at_most(scale: float, errors: list[float]) -> None:
    """The worst case is a bound, it is reached, and a threshold grows with it by √2 at the most."""
    guided = abs(scale * errors[0] + (1 - scale) * errors[1])
    assert guided <= worst_gain_of(scale) * max(map(abs, errors)) + 1e-12
    assert abs(scale * 1 + (1 - scale) * -1) == pytest.approx(worst_gain_of(scale)) == pytest.approx(2 * scale - 1)
    budget = Budget("fp32", {}, {"forward": 3.0}, {})
    threshold = budget.threshold_of("forward", scale)
    assert threshold is not None
    assert 3 <= threshold + 1e-9 <= 3 * math.sqrt(2) + 1e-8
    assert budget.threshold_of("forward") == 3
    assert budget.threshold_of("forward", 1.0, draws_noise=True) == pytest.approx(3 * math.sqrt(2))
    assert budget.threshold_of("forward", scale, draws_noise=True) == pytest.approx(3 * math.sqrt(2))
    assert budget.threshold_of("blocks") is None


def test_the_budget_is_a_gate_beside_the_absolute_one() -> None:
    """A member within the absolute limit fails where PyTorch itself is much better, and is named; one without a floor
    is held to the absolute limit alone."""
    expected = [np.ones(4), np.full(4, 2.0), np.full(4, 3.0)]
    found = [expected[0] + 1e-6, expected[1] + 1e-4, expected[2] + 1e-6]
    budget = Budget("fp32", {"blocks": 1e-3}, {"blocks": 3.0}, {"known": (1e-6, 1e-6, 1e-6), "short": (1e-6,)})
    series = Series("block", ["block 0", "block 1", "block 2"], found, expected)
    rung = compare_series(budget, "blocks", "blocks", "known", series)
    assert rung.within_limit
    assert not rung.within_budget
    assert not rung.passed
    assert rung.first_over == "block 1"
    assert rung.detail == "first: block 1"
    assert rung.ratio == pytest.approx(50)
    assert rung.used == pytest.approx(50 / 3)
    assert compare_series(budget, "blocks", "blocks", "short", series).passed
    unknown = compare_series(budget, "blocks", "blocks", "unknown", series)
    assert unknown.passed
    assert unknown.ratio is None
    wide = compare_series(replace(budget, tolerances={"blocks": 1e-5}), "blocks", "blocks", "unknown", series)
    assert wide.first_over == "block 1"
    found[2] = np.full(4, np.nan)
    lost = compare_series(budget, "blocks", "blocks", "short", series)
    assert not lost.passed
    assert lost.detail == "not finite: block 2"
    with pytest.raises(BundleError, match="no limit of forward for fp32"):
        budget.tolerance_of("forward")


def test_the_absolute_limit_is_not_finer_than_the_reference_itself() -> None:
    """Fails if a step is held to 2e-5 where PyTorch in FP32 is itself 2.3e-5 off, as diffusers' DDPM of 100 training
    timesteps is in its step 49 of 50: the demo's model there is 2.29e-5 off, no worse than PyTorch."""
    expected = [np.ones(4), np.ones(4), np.ones(4)]
    budget = Budget("fp32", {"teacher_forced": 2e-5}, {"teacher_forced": 4.9}, {"ddpm step": (1e-6, 2.3e-5)})

    def rung_of(*errors: float) -> Rung:
        found = [one + error for one, error in zip(expected, errors, strict=True)]
        series = Series("step", ["step 1", "step 2", "step 3"], found, expected)
        return compare_series(budget, "ddpm teacher-forced", "teacher_forced", "ddpm step", series)

    right = rung_of(1e-6, 2.29e-5, 1e-6)
    assert right.passed
    assert (right.value, right.limit) == (pytest.approx(2.29e-5), pytest.approx(11.27e-5))
    assert rung_of(1e-6, 1.2e-4, 1e-6).first_over == "step 2"  # 5.2 times PyTorch's own error
    assert rung_of(2.29e-5, 1e-6, 1e-6).first_over == "step 1"  # 23 times: within neither limit
    excused = replace(budget, floors={"ddpm step": (1e9, 1e9)})  # of a manifest that was written by hand
    assert excused.limits_of("teacher_forced", "ddpm step", 3, 4.9) == [2e-4, 2e-4, 2e-5]
    unmeasured = rung_of(1e-6, 2.29e-5, 2.29e-5)  # PyTorch's own error is not known: the absolute limit alone
    assert unmeasured.first_over == "step 3"
    assert (unmeasured.value, unmeasured.limit) == (pytest.approx(2.29e-5), 2e-5)
    assert not unmeasured.passed


def test_a_bundle_says_what_each_precision_may_be_off(bundles: dict[str, Path]) -> None:
    """Floors of all three precisions are in the bundle, the coarser the larger; an engine that computes in BF16 is
    held to BF16's."""
    bundle = open_bundle(bundles["fp16"])
    for record in ("blocks", "forward_1", "forward_2 variance", "conditioner", "ddim", "ddpm denoised", "decoder"):
        fp32, fp16, bf16 = (bundle.manifest.floors[name][record] for name in ("fp32", "fp16", "bf16"))
        assert len(fp32) == len(fp16) == len(bf16)
        assert max(fp32) < max(fp16) < max(bf16)
    engine = OnnxRuntimeEngine(bundle, threads=1)
    assert Replay(bundle, engine).budget.precision == "fp16"
    engine.info = replace(engine.info, precision=Precision.BF16)
    assert Replay(bundle, engine).budget == budget_for(bundle, Precision.BF16)
    with pytest.raises(BundleError, match="has no limits for int8, only for"):
        budget_for(bundle, Precision.INT8)


def test_a_bundle_cannot_excuse_itself(bundles: dict[str, Path]) -> None:
    """Limits of its manifest that are laxer than ours, or left out, do not count; stricter ones do."""
    bundle = open_bundle(bundles["fp16"])
    sound = budget_for(bundle, Precision.FP16)
    lax = {kind: 0.0 if kind in LARGER_IS_BETTER else 1e9 for kind in sound.tolerances}

    def judged(tolerances: dict[str, float], thresholds: dict[str, float]) -> Budget:
        manifest = replace(bundle.manifest, tolerances={"fp16": tolerances}, thresholds={"fp16": thresholds})
        return budget_for(replace(bundle, manifest=manifest), Precision.FP16)

    assert judged(lax, {}) == judged(lax, dict.fromkeys(THRESHOLDS["fp16"], 1e9)) == sound
    strict = judged({**lax, "forward": 1e-4, "image_psnr": 70.0}, {"forward": 0.5})
    assert (strict.tolerances["forward"], strict.tolerances["image_psnr"]) == (1e-4, 70.0)
    assert (strict.thresholds["forward"], strict.thresholds["blocks"]) == (0.5, THRESHOLDS["fp16"]["blocks"])
    assert all(set(limits) >= set(LARGER_IS_BETTER[3:]) for limits in TOLERANCES.values())


def test_thresholds_are_the_measured_ones() -> None:
    """What bundles carry is what the committed run of ``benchmarks/budget.py`` came to."""
    benchmarks = Path(__file__).parents[3] / "benchmarks"
    run = json.loads((benchmarks / "budget.json").read_text())
    assert run["thresholds"] == {name: limits for name, limits in THRESHOLDS.items() if name not in QUANTIZED}
    least = json.loads((benchmarks / "budget-int8.json").read_text())["thresholds"]["int8"]
    assert {kind for kind, limit in THRESHOLDS["int8"].items() if limit >= least[kind]} == set(least)
    least = json.loads((benchmarks / "budget-bf16.json").read_text())["thresholds"]["bf16"]
    own = limits_for_bundle(THRESHOLDS, Precision.BF16)["bf16"]
    assert {kind for kind, limit in own.items() if limit >= least[kind]} == set(least)


def profiles_of(graph: GraphSpec) -> Profiles:
    """1 to 6 images or rows; the step unguided, and with two to four branches."""
    spans = ((1, 1), (2, 4)) if any("branches" in tensor.shape for tensor in graph.inputs) else ((1, 1),)
    found = []
    for least, most in spans:
        points = [
            shapes_of_tensors(graph.inputs, {"batch": batch, "rows": batch, "branches": count, "height": 8, "width": 8})
            for batch, count in ((1, least), (2, least), (6, most))
        ]
        found.append({tensor.name: tuple(point[tensor.name] for point in points) for tensor in graph.inputs})
    return Profiles(graph.inputs, tuple(found))


class Profiled(OnnxRuntimeEngine):
    """ONNX Runtime with the optimization profiles of a TensorRT engine, wrong at some shapes of the step."""

    wrong: tuple[tuple[int, int], ...] = ()

    def __init__(self, bundle: Bundle, threads: int = 0) -> None:
        super().__init__(bundle, threads)
        graphs = bundle.manifest.graphs
        self.info = replace(self.info, profiles={name: profiles_of(graphs[name]) for name in GRAPHS})

    def session(self, graph: str) -> object:  # type: ignore[override]
        session = super().session(graph)
        return Wrong(session, self.wrong) if graph == "step" else session


class Wrong:
    def __init__(self, session: object, shapes: Sequence[tuple[int, int]]) -> None:
        self.inner, self.shapes = session, shapes

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> list[Array]:
        found = self.inner.run(inputs, outputs)
        branches, batch = inputs["rows"].shape
        return [np.full_like(value, np.nan) for value in found] if (batch, branches) in self.shapes else found


def test_shapes_of_every_profile(bundles: dict[str, Path]) -> None:
    """Least, usual, interior and largest of each profile are run, with branches that have no weight where it takes more
    than two; an engine without profiles takes one image and the records' batch, within its own limit."""
    bundle = open_bundle(bundles["fp32"])
    engine = Profiled(bundle, threads=1)
    unguided, guided = [(1, 1), (2, 1), (3, 1), (6, 1)], [(1, 2), (2, 2), (3, 3), (6, 4)]
    assert choose_shapes(engine.info, "step", 4, (1, 2)) == [*unguided, *guided]
    plain = OnnxRuntimeEngine(bundle, threads=1)
    assert choose_shapes(plain.info, "step", 4, (1, 2)) == [(1, 1), (4, 1), (1, 2), (4, 2)]
    assert all(rung.passed for rung in verify(bundle, engine))
    for shape in (*unguided, *guided):
        engine.wrong = (shape,)
        replay = Replay(bundle, engine)
        first = {branches: next(network_rungs.forward(replay, branches)) for branches in (1, 2)}
        failing = [branches for branches, rung in first.items() if not rung.passed]
        assert failing == [min(shape[1], 2)], shape
        assert f"at batch {shape[0]};" in first[failing[0]].detail
    plain.info = replace(plain.info, max_batch=1)
    assert choose_shapes(plain.info, "step", 4, (1, 2)) == [(1, 1), (1, 2)]
    assert all(rung.passed for rung in verify(bundle, plain))


def test_numbers_too_large_for_fp16(bundles: dict[str, Path]) -> None:
    """A unit in FP16 that comes within a factor of two of 65504 fails; the residual stream and units that are kept in
    FP32 do not, and an FP32 bundle has no such rung."""
    bundle = open_bundle(bundles["fp16"])
    engine = OnnxRuntimeEngine(bundle, threads=1)
    first = next(iter(verify(bundle, engine)))
    assert first.name == "FP16 range"
    assert first.passed
    for unit, passes in (("blocks.1.mlp", False), ("blocks.1", True), ("final", True)):
        manifest = replace(bundle.manifest, magnitudes={**bundle.manifest.magnitudes, unit: 40000.0})
        rung = network_rungs.fp16_range(Replay(replace(bundle, manifest=manifest), engine))
        assert rung.passed is passes
        assert ("blocks.1.mlp reaches 4e+04 of 65504" in rung.detail) is not passes
        assert (
            "--keep-fp32 blocks.1.mlp, or with the list that dit-export --bisect finds" in rung.detail
        ) is not passes
    everywhere = replace(bundle.manifest, magnitudes=dict.fromkeys(bundle.manifest.magnitudes, 1e6))
    rung = network_rungs.fp16_range(Replay(replace(bundle, manifest=everywhere), engine))
    assert rung.detail.endswith("; export again with --keep-fp32, or with the list that dit-export --bisect finds")
    fp32 = open_bundle(bundles["fp32"])
    assert next(iter(verify(fp32, OnnxRuntimeEngine(fp32, threads=1)))).name != "FP16 range"


def test_the_record_of_a_verification(bundles: dict[str, Path]) -> None:
    """What a report needs is there: errors by block and along the trajectory, magnitudes, images; and it is JSON."""
    bundle = open_bundle(bundles["fp32"])
    found = verification_of(bundle, OnnxRuntimeEngine(bundle, threads=1))
    assert found.passed
    rungs = {rung.name: rung for rung in found.rungs}
    blocks, trajectory = rungs["blocks"], rungs["ddim free-running"]
    assert blocks.axis == "block"
    for name in ("error", "floor", "ratio", "magnitude"):
        assert len(blocks.series[name]) == bundle.manifest.model.depth
        assert len(trajectory.series[name]) == 50
    assert set(blocks.metrics) == {"max_abs", "relative_l2", "cosine"}
    assert {"psnr", "ssim"} <= set(rungs["image PSNR"].metrics)
    assert found.images is not None
    assert found.images[0].shape == found.images[1].shape == (4, 32, 32, 3)
    worst = min(psnr(one, wanted) for one, wanted in zip(*found.images, strict=True))
    assert worst == rungs["image PSNR"].value
    assert (found.guidance, rungs["image PSNR, strong"].passed) == (8.0, True)
    assert found.magnitudes["blocks.1.attn"] > 0
    raw = json.loads(json.dumps(found.as_json(), allow_nan=False))
    assert raw["passed"] is True
    assert raw["rungs"][0]["used"] < 1
    assert [rung.name for rung in verification_of(bundle, OnnxRuntimeEngine(bundle, threads=1), quick=True).rungs] == [
        name for name in rungs if name != "conditioner" and "teacher" not in name and "unguided" not in name
    ]


def test_info(bundles: dict[str, Path], tmp_path: Path) -> None:
    """``--info`` says what a bundle is and what was verified, and runs nothing."""
    bundle = open_bundle(bundles["fp32"])
    store_verdict(bundle, OnnxRuntimeEngine(bundle), [Rung("blocks", 2.0, 1.0, "relative")], quick=False)
    done = run_command("dit-verify", bundles["fp32"], "--info", "--json")
    assert done.returncode == 0, done.stderr
    info = json.loads(done.stdout)
    assert info["bundle"] == bundle.digest
    assert info["budgets"] == ["bf16", "fp16", "fp32"]
    verdict = info["verdicts"][0]
    assert verdict["here"] is True
    assert verdict["failed"] == ["blocks"]
    text = run_command("dit-verify", bundles["fp32"], "--info").stdout
    assert "FAILED blocks" in text
    assert "2 blocks of width 64" in text
    store_verdict(bundle, OnnxRuntimeEngine(bundle), [Rung("blocks", 0.0, 1.0, "relative")], quick=False)


def test_polygraphy_judges_alike(bundles: dict[str, Path], tmp_path: Path) -> None:
    """Polygraphy's own comparator, on ONNX Runtime, passes the records it is given and fails an altered graph."""
    pytest.importorskip("polygraphy")
    done = run_command("dit-verify", bundles["fp32"], "--polygraphy", tmp_path / "records", "--json")
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["files"]) == 6
    altered = tmp_path / "altered"
    shutil.copytree(bundles["fp32"] / "graphs", altered / "graphs")

    def exact(graph: onnx.GraphProto) -> None:
        next(node for node in graph.node if node.op_type == "Gelu").attribute[0].s = b"none"

    edit_graph(altered, "step", exact)
    cases = (
        (bundles["fp32"], "conditioner", "1e-5", 0),  # measured: 4.2e-7
        (bundles["fp32"], "step", "1e-5", 0),  # measured: 4.5e-6
        (bundles["fp32"], "decoder", "images:1 decoded:1e-5", 0),  # measured: 1 level, 2.6e-6
        (altered, "step", "1e-5", 1),  # measured: 7.9e-4
    )
    for folder, graph, tolerance, code in cases:
        records = tmp_path / "records"
        finished = subprocess.run(
            [
                *(sys.executable, "-c", "from polygraphy.tools import main; import sys; sys.exit(main())"),
                *("run", folder / "graphs" / f"{graph}.onnx", "--onnxrt"),
                *("--load-inputs", records / f"{graph}-inputs.json"),
                *("--load-outputs", records / f"{graph}-outputs.json"),
                *("--rtol", "1e-5", "--atol", *tolerance.split()),
            ],
            capture_output=True,
            text=True,
            check=False,
        )
        assert finished.returncode == code, finished.stdout[-3000:] + finished.stderr
