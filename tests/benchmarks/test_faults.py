"""The verification's mutation test: every seeded fault is caught, at the rung that points at it.

``python benchmarks/faults.py FP32.bundle FP16.bundle`` prints the table of what catches what.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from dit_runtime.bundle.reader import Bundle, open_bundle

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "faults.py"


def loaded() -> ModuleType:
    spec = importlib.util.spec_from_file_location("faults", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["faults"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


faults = loaded()
NONE = (faults.BELOW, faults.NOT_THERE, faults.IN_FP16_ONLY)


@pytest.fixture(scope="module", params=["fp32", "fp16"])
def bundle(request: pytest.FixtureRequest, bundles: dict[str, Path]) -> Bundle:
    return open_bundle(bundles[request.param])


IN_ENCODER = [fault for fault in faults.FAULTS if fault.graph == faults.ENCODER]


@pytest.mark.parametrize(
    "fault", [fault for fault in faults.FAULTS if fault not in IN_ENCODER], ids=lambda fault: fault.name
)
def test_a_seeded_fault_fails_at_its_rung(fault: Any, bundle: Bundle) -> None:
    """The first rung to fail is the one that the fault belongs to, and says which block, step or channel."""
    assert_caught(fault, bundle)


@pytest.mark.parametrize("name", ["sized", pytest.param("fp16-encoder", marks=pytest.mark.slow)])  # another export
@pytest.mark.parametrize("fault", IN_ENCODER, ids=lambda fault: fault.name)
def test_a_fault_of_the_encoder_fails_at_its_rung(fault: Any, name: str, tiny_bundle: Callable[[str], Path]) -> None:
    """The same of bundles that have an encoder, in FP32 and in FP16."""
    assert_caught(fault, open_bundle(tiny_bundle(name)))


def assert_caught(fault: Any, bundle: Bundle) -> None:
    rung = fault.first_failure(bundle)
    expected = fault.expected(bundle.manifest.precision.name)
    if expected in NONE:
        assert rung is None, f"{rung.name}: {rung.detail}"
    else:
        assert rung is not None
        assert rung.name == expected, rung.detail
        assert fault.where in rung.detail


def test_what_fp16_hides_fp32_shows() -> None:
    """A fault below FP16's own error is one that the FP32 bundle is there to catch; twenty and more are listed."""
    hidden = [fault for fault in faults.FAULTS if fault.expected("fp16") == faults.BELOW]
    assert hidden
    assert all(fault.expected("fp32") == fault.rung for fault in hidden)
    assert sum(fault.expected("fp32") not in NONE for fault in faults.FAULTS) >= 46  # measured: 46
    assert len({fault.name for fault in faults.FAULTS}) == len(faults.FAULTS)


def test_without_a_fault_nothing_fails(bundle: Bundle) -> None:
    """The engine that faults are seeded into is sound itself."""
    assert faults.Fault("none", "").first_failure(bundle) is None
