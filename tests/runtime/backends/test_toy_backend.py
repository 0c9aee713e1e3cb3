"""A backend that nobody here knows is one module and one line in one table; ``docs/extending.md`` shows this one."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from support import toy_backend
from support.commands import run_command

from dit_runtime import Pipeline, open_bundle
from dit_runtime.backends.base import Engine
from dit_runtime.backends.open import BACKENDS, find_candidates, open_engine

DOCS = Path(__file__).parents[3] / "docs" / "extending.md"


@pytest.fixture(autouse=True)
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one line in the table."""
    monkeypatch.setitem(BACKENDS, "toy", "support.toy_backend")


def test_the_command_verifies_it(bundles: dict[str, Path]) -> None:
    """``dit-verify`` knows the name, runs every rung on the backend and judges it as any other."""
    done = run_command("dit-verify", bundles["fp32"], "--engine", "toy", "--quick", "--json")
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert (results["engine"], results["passed"]) == (f"toy {toy_backend.onnx.__version__} CPU", True)
    names = [rung["name"] for rung in results["rungs"]]
    assert {"blocks", "forward G=2", "ddim free-running", "decoder", "image PSNR"} <= set(names)


def test_a_wrong_one_fails(bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend that confuses guidance's branches does not pass."""
    right = toy_backend.ToySession.run

    def wrong(self: toy_backend.ToySession, inputs: dict[str, np.ndarray], outputs: list[str]) -> list[np.ndarray]:
        swapped = {**inputs, "rows": inputs["rows"][::-1].copy()} if "rows" in inputs else inputs
        return right(self, swapped, outputs)

    monkeypatch.setattr(toy_backend.ToySession, "run", wrong)
    done = run_command("dit-verify", bundles["fp32"], "--engine", "toy", "--quick")
    assert done.returncode == 1
    assert "FAIL: " in done.stdout


def test_it_samples(bundles: dict[str, Path]) -> None:
    """The loop, the samplers and guidance need nothing of it but sessions; ``auto`` does not try it."""
    bundle = open_bundle(bundles["fp32"])
    engine: Engine = open_engine(bundle, "toy")
    settings = {"steps": 2, "guidance": 2.0}
    found = Pipeline(bundle, engine)([3, 4], 5, **settings)
    expected = Pipeline(bundle, "onnxruntime", threads=1)([3, 4], 5, **settings)
    assert np.abs(found.astype(int) - expected.astype(int)).max() <= 1
    assert "toy" not in [candidate.name for candidate in find_candidates(bundle)]


def test_the_documentation_shows_it() -> None:
    """The code in the documentation is the code that is tested."""
    source = Path(toy_backend.__file__).read_text(encoding="utf-8")
    shown = re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    assert source.partition("from __future__")[2].strip() in [
        block.partition("from __future__")[2].strip() for block in shown
    ]
