"""``dit-bench``: what it prints is of a verified engine, adds up, and can be written as JSON, Markdown and plots."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from support.commands import run_command, run_process

from dit_runtime.backends.base import most_threads
from dit_runtime.backends.onnxruntime.engine import OnnxRuntimeEngine
from dit_runtime.bench import benchmark, gemm, parts
from dit_runtime.bench.benchmark import BenchmarkRequest
from dit_runtime.bench.gemm import GemmRate, measure_gemm_rates, shapes_of
from dit_runtime.bench.report import tables_of
from dit_runtime.bench.timing import time_calls, timing_of
from dit_runtime.bundle.macs import count_linear_gmac, count_step_gmac
from dit_runtime.bundle.precision import Precision
from dit_runtime.bundle.quantization import linears_of
from dit_runtime.bundle.reader import open_bundle
from dit_runtime.bundle.stored_numbers import numbers_of_graph
from dit_runtime.core.machine import memory_use
from dit_runtime.verify.auto import Choice
from dit_runtime.verify.metrics import relative_l2


def test_the_report_adds_up(bundles: dict[str, Path], tmp_path: Path) -> None:
    """Percentiles are in order, a run is its parts and what is outside, and every form has the same figures."""
    pytest.importorskip("matplotlib")
    files = {name: tmp_path / name for name in ("bench.md", "bench.png")}
    done = run_process(
        "dit-bench", bundles["fp16"], "--engine", "onnxruntime", "--batch", "1,2", "--steps", "4", "--repeat", "3",
        "--pictures", "2", "--sweep", "--markdown", files["bench.md"], "--plot", files["bench.png"], "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["verified"] is True
    assert set(report["parts"]) == {"1", "2"}
    for timings in report["parts"].values():
        assert set(timings) == {"conditioner, 4 steps", "step, guided (G=2)", "step, not guided (G=1)", "decoder"}
        for timing in timings.values():
            assert 0 < timing["p50_ms"] <= timing["p95_ms"] <= timing["p99_ms"] <= timing["worst_ms"]
            assert timing["calls"] == 3
    for batch, found in report["pictures"].items():
        whole = found["run"]["p50_ms"] / 1e3
        assert sum(found["split_s"].values()) == pytest.approx(whole, rel=0.25)  # medians of two runs, each part's own
        assert found["seconds_a_picture"] == pytest.approx(whole / int(batch), rel=0.01)
        assert found["step"]["calls"] == 2 * 4
    assert set(report["step_counts"]) == {"10", "25", "50"}
    assert report["sizes"]["32x32"]["tokens"] == 16
    assert 0 < report["gemm"]["guided_step"]["1"]["share"] < 1
    assert report["memory_bytes"]["peak"] >= report["memory_bytes"]["resident"] > 50e6
    assert report["environment"]["libraries"]["numpy"] == np.__version__
    assert files["bench.png"].read_bytes().startswith(b"\x89PNG")
    page = files["bench.md"].read_text()
    assert f"| decoder | {report['parts']['1']['decoder']['first_ms']:.2f} |" in page
    assert "## step counts, batch 1" in page


def test_few_training_timesteps(bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the default steps, or those of the sweep, are more than the model has."""
    bundle = open_bundle(bundles["fp32"])
    few = replace(bundle.manifest.diffusion, betas=bundle.manifest.diffusion.betas[:20])
    bundle = replace(bundle, manifest=replace(bundle.manifest, diffusion=few))
    monkeypatch.setattr(benchmark, "open_bundle", lambda path, store: bundle)
    monkeypatch.setattr(benchmark, "choose_engine", lambda *_: Choice(OnnxRuntimeEngine(bundle, threads=1), "named"))
    report = benchmark.benchmark(BenchmarkRequest(bundle.path, repeat=1, image_runs=1, sweep=True, gemm=False))
    assert report["steps"] == 20
    assert set(report["step_counts"]) == {10, 20}


def test_bad_requests_are_one_line(bundles: dict[str, Path], tmp_path: Path) -> None:
    """Impossible batches, plots of unknown kind, and unknown engines are refused before anything is timed."""
    for arguments, message in [
        (["--batch", "0"], "expected whole numbers from 1"),
        (["--batch", "x"], "expected whole numbers from 1"),
        (["--threads", "100000"], f"got '100000', expected a whole number from 0 to {most_threads()}"),
        (["--threads", "-1"], "got '-1', expected a whole number from 0 to "),
        (["--plot", tmp_path / "plot.txt"], "plots are .png, .svg, .pdf"),
        (["--engine", "abacus"], "engine 'abacus' is unknown"),
    ]:
        done = run_command("dit-bench", bundles["fp16"], *arguments)
        assert (done.returncode, done.stdout) == (1, "")
        assert message in done.stderr
        assert done.stderr.count("\n") == 1


def test_percentiles_and_warm_up() -> None:
    """The first call stands apart, warm-up ends when calls agree, and work is done in turn."""
    assert timing_of([1.0, 2.0, 3.0, 4.0, 5.0], 9.0).p50_ms == 3.0
    assert timing_of([float(value) for value in range(101)], 0.0).p95_ms == 95.0
    order: list[str] = []
    found = time_calls({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, repeat=4)
    assert order[:2] == ["a", "b"]
    assert order[-8:] == ["a", "b"] * 4
    assert found["a"].calls == 4
    assert len(order) == 2 * (1 + found["a"].warmup + 4)


def test_the_rate_of_products(bundles: dict[str, Path]) -> None:
    """Shapes are the model's own, rates are operations over time, and BF16 without OpenVINO gives none."""
    model = open_bundle(bundles["fp32"]).manifest.model
    assert shapes_of(model, 2) == [(32, 64, 192), (32, 64, 64), (32, 64, 256)]
    rates = measure_gemm_rates([(256, 256, 512)])
    assert {(rate.library, rate.m, rate.k, rate.n) for rate in rates} >= {("numpy", 256, 256, 512)}
    assert all(0.1 < rate.gflops < 1e5 for rate in rates)


def test_the_rate_of_int8_products() -> None:
    """OpenVINO multiplies INT8 and gets the same product; where it would multiply something else there is no rate."""
    pytest.importorskip("openvino")
    for rate in measure_gemm_rates([(256, 256, 512)], Precision.INT8, threads=1):
        assert (rate.library, rate.precision) == ("openvino", "int8")
        assert 0.1 < rate.gflops < 1e5
    random = np.random.default_rng(0)
    left, forth, back = (random.standard_normal(shape, np.float32) for shape in ((64, 128), (128, 256), (256, 128)))
    forth, back = forth / np.float32(np.sqrt(128)), back / np.float32(np.sqrt(256))
    multiply = gemm._product_by_openvino(left, forth, back, Precision.INT8, 1)
    assert multiply is not None
    found, wanted = np.asarray(multiply()[0]), (left @ forth) @ back
    assert 1e-3 < relative_l2(found, wanted) < 0.05  # measured: 2.2e-2


def test_the_mixed_limit_of_int8(int8_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The quantized layers' share at INT8's rate and the rest at the engine's own; without INT8 here, the latter."""
    bundle = open_bundle(int8_bundle)
    model = bundle.manifest.model
    # The blocks' four products, by the integers that the step stores, for each of 16 tokens; with attention's two
    # products and the two ends it is the whole step.
    stored = numbers_of_graph(bundle, "step")
    names = linears_of("adaln-zero", 2)
    quantized = sum(16 * stored[f"{name}.weight"].size for name in names) / 1e9
    assert sum(count_linear_gmac(model, name) for name in names) == pytest.approx(quantized)
    whole = quantized + (2 * 2 * 16 * 16 * 64 + 16 * 4 * (4 + 8) * 64) / 1e9
    assert count_step_gmac(model) == pytest.approx(whole)
    rates = {Precision.INT8: 400.0, Precision.FP32: 100.0}
    monkeypatch.setattr(
        parts,
        "measure_gemm_rates",
        lambda shapes, precision, threads: [GemmRate("x", precision, 1, 2, 3, rates[precision])],
    )
    engine: Any = SimpleNamespace(info=SimpleNamespace(device="CPU", precision=Precision.FP32, threads=1))
    timings: Any = {1: {parts.GUIDED: SimpleNamespace(p50_ms=1.0)}}
    found = parts.compare_with_gemm(bundle, engine, timings)
    limit = whole / (quantized / 400 + (whole - quantized) / 100)
    assert found["limit_gflops"] == pytest.approx(limit, rel=1e-3)
    assert found["guided_step"][1]["share"] == pytest.approx(4 * whole / 1e-3 / limit, rel=1e-2)
    assert f"x int8, 1x2x3: 400 GFLOP/s and x fp32, 1x2x3: 100 GFLOP/s; with {quantized / whole:.1%}" in str(
        tables_of({"parts": {}, "gemm": found})
    )
    manifest = replace(bundle.manifest, precision=replace(bundle.manifest.precision, name=Precision.FP8))
    eight = parts.compare_with_gemm(replace(bundle, manifest=manifest), engine, timings)
    assert "int8" not in eight  # no rate of FP8 is measured, and INT8's is not its own
    monkeypatch.setattr(
        parts,
        "measure_gemm_rates",
        lambda shapes, precision, threads: (
            [] if precision == Precision.INT8 else [GemmRate("x", precision, 1, 2, 3, 100.0)]
        ),
    )
    plain = parts.compare_with_gemm(bundle, engine, timings)
    assert "int8" not in plain
    assert plain["guided_step"][1]["share"] == pytest.approx(4 * whole / 1e-3 / 100, rel=1e-2)
    assert "fastest matrix product here (x fp32" in str(tables_of({"parts": {}, "gemm": plain}))


def test_memory_of_another_system(tmp_path: Path) -> None:
    """Kilobytes become bytes; a system without /proc has no figures."""
    (tmp_path / "status").write_text("Name:\tx\nVmHWM:\t 20 kB\nVmRSS:\t 10 kB\nRssAnon:\t 6 kB\nRssFile:\t 4 kB\n")
    assert memory_use(tmp_path / "status") == {
        "peak": 20480, "resident": 10240, "anonymous": 6144, "file_backed": 4096,
    }  # fmt: skip
    assert memory_use(tmp_path / "none") == {}
