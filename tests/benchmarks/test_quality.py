"""A precision judged by its images: the intervals are right, and the script makes them from start to end."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks" / "fashion_mnist"


@pytest.fixture
def quality(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The script, which finds its neighbours in its own folder."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import quality

    yield quality
    for name in ("quality", "demo", "evaluator"):
        sys.modules.pop(name, None)


def test_wilson_is_the_published_interval(quality: ModuleType) -> None:
    """Newcombe 1998, Statistics in Medicine 17:857, table I, method 3: to its four digits, and inside [0, 1]."""
    for hits, count, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611)):
        found = quality.wilson(hits, count)
        assert np.round(found, 4).tolist() == [low, high]
    assert quality.wilson(29, 29) == pytest.approx((0.8830, 1.0), abs=5e-5)


def test_mcnemar_is_a_fair_coin(quality: ModuleType) -> None:
    """Two-sided binomial tails: 5 of 5 is 2/32, 1 of 6 is 2·7/64, an even split or no pair at all is 1."""
    assert quality.mcnemar(5, 0) == quality.mcnemar(0, 5) == 2 / 32
    assert quality.mcnemar(1, 5) == 2 * 7 / 64
    assert quality.mcnemar(4, 4) == quality.mcnemar(0, 0) == 1


def test_pairs_tell_what_figures_cannot(quality: ModuleType) -> None:
    """A shift of all images is lost in the distances' own intervals and certain in that of their difference."""
    random = np.random.default_rng(1)
    reference = quality.reference_statistics()
    root = np.linalg.cholesky(reference["covariance"] + 1e-6 * np.eye(64))
    features = reference["mean"] + random.normal(size=(400, 64)) @ root.T
    worse = features + 0.05 * np.sqrt(np.diag(reference["covariance"]))
    labels = np.arange(400) % 10
    classes = np.where(np.arange(400) < 6, (labels + 1) % 10, labels)
    first, second = quality.compare({"a": (labels, features), "b": (classes, worse)}, labels, 50)
    low, high = second["frechet_interval"]
    assert low < first["frechet_distance"] < high
    against = second["against"]
    least, most = against["frechet_difference_interval"]
    print(first["frechet_distance"], second, sep="\n")
    assert most - least < (high - low) / 2
    assert 0 < least < against["frechet_difference"] < most  # 0.10, 0.29, 0.47
    assert (against["only_it_right"], against["only_this_right"]) == (6, 0)
    assert against["mcnemar_p"] == 2 / 64
    assert first["accuracy"] == 1.0
    assert "against" not in first


def test_intervals_cover(quality: ModuleType) -> None:
    """Over many draws of a known distribution the interval of a difference covers the truth about 95 times of 100.

    The difference of two means stands for that of two distances: same resampling, same interval, and a known truth.
    """
    random = np.random.default_rng(2)
    covered = 0
    for _ in range(300):
        pairs = random.normal(size=(100, 1)) + np.array([[0.0, 0.3]]) + 0.2 * random.normal(size=(100, 2))
        drawn = random.integers(100, size=(200, 100))
        draws = pairs[drawn].mean(axis=1)
        difference = float(np.diff(pairs.mean(axis=0))[0])
        low, high = quality.interval_around(difference, draws[:, 1] - draws[:, 0])
        covered += low <= 0.3 <= high
    print(covered / 300)
    assert 0.91 <= covered / 300 <= 0.98  # 0.94; three deviations are 0.038


def test_the_committed_figures(quality: ModuleType) -> None:
    """``quality.json`` is of the committed evaluator's size, and says that no precision costs class accuracy."""
    result = json.loads((FOLDER / "quality.json").read_text())
    assert result["samples"] >= 1000
    assert result["guidance"] == 1.5
    first, *others = result["precisions"]
    assert first["name"] == quality.PYTORCH
    assert {"ONNX Runtime FP32", "ONNX Runtime FP16", "FP16 emulated"} <= {row["name"] for row in others}
    for row in others:
        assert row["against"]["mcnemar_p"] > 0.01
    assert (FOLDER / "quality.md").read_text() == quality.format_markdown(result)


@pytest.mark.slow  # two exports
def test_the_script_runs_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    """Few images of every precision; run again it reads them and gives the same figures."""
    argv = [sys.executable, str(FOLDER / "quality.py"), "--samples", "20", "--steps", "4", "--batch", "10"]
    argv += ["--resamples", "20", "--work", str(tmp_path / "work"), "--output", str(tmp_path / "quality.json")]
    results, times = [], []
    for _ in range(2):
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        results.append(json.loads((tmp_path / "quality.json").read_text()))
        times.append({path: path.stat().st_mtime_ns for path in (tmp_path / "work").rglob("*.npy")})
    assert len(times[0]) == 2 * len(results[0]["precisions"])
    assert times[0] == times[1]
    assert results[0] == results[1]
    fp32 = results[0]["precisions"][1]
    assert fp32["name"] == "ONNX Runtime FP32"
    assert abs(fp32["against"]["frechet_difference"]) < 0.01  # 3e-4
    assert "| PyTorch FP32 |" in (tmp_path / "quality.md").read_text()
