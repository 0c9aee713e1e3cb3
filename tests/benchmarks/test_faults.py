"""The verification's mutation test: every seeded fault is caught, at the rung that points at it.

``python benchmarks/faults/run.py FP32.bundle FP16.bundle`` prints what catches what, and what it does to images.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from damage import NOT_FINITE, damage_of
from engine_faults import ENGINE_FAULTS
from fault import BELOW, NONE, PASSES, Fault
from graph_faults import GRAPH_FAULTS
from quantization_faults import QUANTIZATION_FAULTS
from report import HERE, format_document
from run import FAULTS
from runtime_faults import RUNTIME_FAULTS

from dit_runtime.backends.onnxruntime.engine import OnnxRuntimeEngine
from dit_runtime.bundle.manifest import ENCODER
from dit_runtime.bundle.reader import Bundle, open_bundle
from dit_runtime.verify.rung import Rung

WITH_RECORDS = (*GRAPH_FAULTS, *RUNTIME_FAULTS)  # faults that the rungs of the records catch
IN_ENCODER = [fault for fault in WITH_RECORDS if fault.graph == ENCODER]


@pytest.fixture(scope="module", params=["fp32", "fp16"])
def bundle(request: pytest.FixtureRequest, bundles: dict[str, Path]) -> Bundle:
    return open_bundle(bundles[request.param])


@pytest.mark.parametrize(
    "fault", [fault for fault in WITH_RECORDS if fault not in IN_ENCODER], ids=lambda fault: fault.name
)
def test_a_seeded_fault_fails_at_its_rung(fault: Fault, bundle: Bundle) -> None:
    """The first rung to fail is the one that the fault belongs to, and says which block, step or channel."""
    assert_caught(fault, bundle, fault.first_failure(bundle))


@pytest.mark.slow  # a whole verification each, and an export
@pytest.mark.parametrize("name", ["sized", "fp16-encoder"])
@pytest.mark.parametrize("fault", IN_ENCODER, ids=lambda fault: fault.name)
def test_a_fault_of_the_encoder_fails_at_its_rung(fault: Fault, name: str, tiny_bundle: Callable[[str], Path]) -> None:
    """The same of bundles that have an encoder, in FP32 and in FP16."""
    bundle = open_bundle(tiny_bundle(name))
    assert_caught(fault, bundle, fault.first_failure(bundle))


# Of faults with one rung, the everyday run has the first, which is enough to see the rung act.
FIRST = {fault.rung: fault.name for fault in reversed(ENGINE_FAULTS)}


@pytest.fixture(scope="module")
def sized(sized_bundle: Path) -> tuple[Bundle, OnnxRuntimeEngine]:
    bundle = open_bundle(sized_bundle)
    return bundle, OnnxRuntimeEngine(bundle, threads=1)


@pytest.mark.parametrize(
    "fault",
    [
        # Tens of further faults of the same rungs, each half a second.
        pytest.param(fault, marks=() if FIRST[fault.rung] == fault.name and fault.quick else pytest.mark.slow)
        for fault in ENGINE_FAULTS
    ],
    ids=lambda fault: fault.name,
)
def test_a_fault_where_no_record_is_breaks_its_relation(fault: Fault, sized: tuple[Bundle, OnnxRuntimeEngine]) -> None:
    """The first relation to fail is the one of the fault's kind, and says at which batch, row, branch or slot."""
    assert_caught(fault, sized[0], fault.first_broken_relation(*sized))


@pytest.mark.parametrize("fault", QUANTIZATION_FAULTS, ids=lambda fault: fault.name)
def test_a_fault_of_quantization_fails_at_its_rung(fault: Fault, int8_bundle: Path) -> None:
    """A fault in the files of an INT8 bundle, or in an engine that runs it, is caught, and layer or block are named."""
    bundle = open_bundle(int8_bundle)
    assert_caught(fault, bundle, fault.first_failure(bundle))


def assert_caught(fault: Fault, bundle: Bundle, rung: Rung | None) -> None:
    expected = fault.expected(bundle.manifest.precision.name)
    if expected in NONE:
        assert rung is None, f"{rung.name}: {rung.detail}"
    else:
        assert rung is not None
        assert rung.name == expected, rung.detail
        assert fault.where in rung.detail


def test_what_fp16_hides_fp32_shows() -> None:
    """A fault below FP16's own error is one that the FP32 bundle is there to catch; faults are many, and named once."""
    faults = [fault for fault in FAULTS if not fault.int8]
    hidden = [fault for fault in faults if fault.expected("fp16") == BELOW]
    assert hidden
    assert all(fault.expected("fp32") == fault.rung for fault in hidden)
    assert sum(fault.expected("fp32") not in NONE for fault in faults) >= 114  # measured: 114
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)


def test_without_a_fault_nothing_fails(bundle: Bundle) -> None:
    """The engine that faults are seeded into is sound itself, and its images are not damaged."""
    assert Fault("none", "").first_failure(bundle) is None
    assert damage_of(Fault("none", ""), bundle) == float("inf")


def test_damage_is_that_of_the_worst_image(bundle: Bundle) -> None:
    """A fault that only one of many images has counts in full, and latents that are not finite are said so."""
    named = {fault.name: fault for fault in FAULTS}
    assert 10 < float(damage_of(named["class 0 reads class 1"], bundle)) < 50  # measured: see results.json
    assert damage_of(named["one image of a batch is not a number"], bundle) == NOT_FINITE


def test_the_page_is_what_the_script_measured() -> None:
    """README.md is what report.py writes of results.json, which has every fault, each with the verdict that is held."""
    assert (HERE / "README.md").read_text(encoding="utf-8") == format_document()
    results = json.loads((HERE / "results.json").read_text(encoding="utf-8"))
    assert list(results["faults"]) == [fault.name for fault in FAULTS]
    for fault in FAULTS:
        for title, cell in results["faults"][fault.name].items():
            expected = fault.expected(title.lower())
            assert cell["rung"] == (PASSES if expected in NONE else expected), fault.name
            assert bool(cell["why"]) == (expected in NONE), fault.name
            assert cell["why"] != "unknown"
    page = (HERE.parents[1] / "docs" / "verification.md").read_text(encoding="utf-8")
    assert f"seeds {len(FAULTS)} faults" in page
