"""The CPU benchmarks: the committed tables are those of the committed results, and the driver runs."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks" / "cpu"


def module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"cpu_benchmark_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def test_the_tables_are_those_of_the_results() -> None:
    """README.md is what report.py writes of the JSON files beside it: no figure was typed."""
    assert (FOLDER / "README.md").read_text(encoding="utf-8") == module("report").format_document()


@pytest.mark.slow
def test_the_driver_compares_what_does_the_same_work(tmp_path: Path) -> None:
    """On the demo model every contender starts, answers, and is as close to diffusers as its precision lets it."""
    target = tmp_path / "demo.json"
    argv = ["--model", "demo", "--rounds", "1", "--pictures", "1", "--work", str(tmp_path), "--output", str(target)]
    subprocess.run([sys.executable, str(FOLDER / "run.py"), *argv], check=True, timeout=900)
    report = json.loads(target.read_text())
    assert len(report["bf16"]["step"]) + len(report["fp32"]["step"]) == 11  # the reference is in both
    for precision, most, least in (("fp32", 2e-5, 60), ("bf16", 0.2, 25)):
        for row in report[precision]["step"].values():
            assert row["difference"]["relative"] <= most  # measured 3e-6 in FP32
            assert row["median_s"] > 0
        for row in report[precision]["pictures_1"].values():
            assert row["difference"]["psnr_db"] is None or row["difference"]["psnr_db"] > least
