"""DiT-XL/2 at 256 pixels with the Stable Diffusion VAE: the limits of the real thing, through the benchmark script."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "real_size.py"


@pytest.mark.slow
def test_xl_exports_builds_and_matches(tmp_path: Path) -> None:
    """Under 5 minutes and 9 GB, step weights up to 900 MB, all attention fused in both profiles, and parity in FP16."""
    from support.commands import run_command

    figures = {}
    for part in ("export", "build"):
        done = subprocess.run(
            [sys.executable, SCRIPT, "--work", tmp_path, "--only", part], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        figures |= json.loads(done.stdout)
    print(json.dumps(figures))
    assert figures["export"]["seconds"] < 300
    assert figures["export"]["peak_gb"] < 9
    assert figures["export"]["step_weights_mb"] <= 900
    assert figures["build"]["fused_attention"] == [28, 28]
    assert figures["build"]["step_plan_mb"] < 1.1 * figures["export"]["step_weights_mb"]  # weights once for both
    done = run_command("dit-verify", tmp_path / "fp16.bundle")
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
