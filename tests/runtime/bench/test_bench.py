"""``dit-bench``: what it prints is of a verified engine, adds up, and can be written as JSON, Markdown and plots."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.commands import run_command, run_process

from dit_runtime.backends.base import most_threads
from dit_runtime.backends.onnxruntime.engine import OnnxRuntimeEngine
from dit_runtime.bench import benchmark
from dit_runtime.bench.benchmark import BenchmarkRequest
from dit_runtime.bench.gemm import measure_gemm_rates, shapes_of
from dit_runtime.bench.timing import time_calls, timing_of
from dit_runtime.bundle.reader import open_bundle
from dit_runtime.core.machine import memory_use
from dit_runtime.verify.auto import Choice


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


def test_memory_of_another_system(tmp_path: Path) -> None:
    """Kilobytes become bytes; a system without /proc has no figures."""
    (tmp_path / "status").write_text("Name:\tx\nVmHWM:\t 20 kB\nVmRSS:\t 10 kB\nRssAnon:\t 6 kB\nRssFile:\t 4 kB\n")
    assert memory_use(tmp_path / "status") == {
        "peak": 20480, "resident": 10240, "anonymous": 6144, "file_backed": 4096,
    }  # fmt: skip
    assert memory_use(tmp_path / "none") == {}
