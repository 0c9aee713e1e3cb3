"""Relations of sound engines, what they cover, and what ``auto`` makes of it.

Faults that break them are in ``benchmarks/faults``, and ``tests/benchmarks/test_faults.py`` holds each to its rung.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from engine_mistakes import step_at
from faulty_engine import FaultyEngine

from dit_runtime import Pipeline
from dit_runtime.backends.onnxruntime.engine import OnnxRuntimeEngine
from dit_runtime.bundle.reader import Bundle, open_bundle
from dit_runtime.core.errors import ParityError
from dit_runtime.verify.auto import Choice, Trust
from dit_runtime.verify.coverage import coverage_of, covers
from dit_runtime.verify.effort import EXACT, FULL, QUICK, Effort, sample_batches
from dit_runtime.verify.replay import Replay
from dit_runtime.verify.verification import relations, verification_of
from dit_runtime.verify.visits import Visits


@pytest.fixture(scope="module")
def bundle(bundles: dict[str, Path]) -> Bundle:
    return open_bundle(bundles["fp16"])


@pytest.fixture(scope="module")
def engine(bundle: Bundle) -> OnnxRuntimeEngine:
    return OnnxRuntimeEngine(bundle, threads=1)


def test_a_shape_that_nothing_visited_is_verified_first(bundle: Bundle, engine: OnnxRuntimeEngine) -> None:
    """``auto`` asks an engine at each batch and number of branches that was not visited, once; larger batches may lie
    between two that were."""
    spoiled = {"step": step_at(lambda batch, branches: batch in (9, 20) or branches == 4)}
    faulty: Any = FaultyEngine(engine, bundle, {}, spoiled)
    trust = Trust(bundle, faulty, {"step": [(8, 1), (10, 1), (1, 2), (16, 2), (24, 2)]})
    trust.check(20, 2)  # between two that were visited
    trust.check(4, 1)
    trust.check(4, 1)
    trust.check(6, 3)
    assert trust.shapes["step"][5:] == [(4, 1), (6, 3)]
    for shape in ((9, 1), (9, 2), (20, 1), (2, 4), (6, 4)):
        with pytest.raises(ParityError, match=f"wrong at a batch of {shape[0]} with {shape[1]} branches"):
            trust.check(*shape)


def test_the_pipeline_asks(bundle: Bundle, engine: OnnxRuntimeEngine, tmp_path: Path) -> None:
    """Sampling and streaming on an engine that ``auto`` chose ask for their batches and branches; a named one does not;
    and the decoder gets no more images in a call than were verified."""
    pipe, asked = Pipeline(bundle), list[tuple[int, int]]()
    trust = Trust(bundle, engine, {"decoder": [(2, 1)]})
    pipe.__dict__["choice"] = Choice(engine, "tested", (), trust)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trust, "check", lambda self, *shape: asked.append(shape))
        decoded: list[int] = []
        decode = Pipeline._decode

        def note(self: Pipeline, part: Any, tile: int | None) -> Any:
            decoded.append(len(part))
            return decode(self, part, tile)

        patch.setattr(Pipeline, "_decode", note)
        pipe([1, 2, 3], steps=2, guidance=2.0)
        assert (asked, decoded) == ([(3, 2)], [2, 1])
        asked.clear()
        pipe([1, 2], steps=4, guidance=2.0, guidance_interval=(0.0, 0.5))  # the first steps have no guidance
        assert asked == [(2, 1), (2, 2)]
        asked.clear()
        images = pipe.prepare([1, 2], steps=2, guidance=2.0) + pipe.prepare([{3: 0.5, 4: 0.5}], steps=3, guidance=2.0)
        list(pipe.stream(images, batch_size=3))
        assert asked == [(3, 3), (3, 3), (1, 3)]  # a batch that images left is another one
        asked.clear()
        Pipeline(bundle, engine)([1], steps=2)
        assert not asked


def test_coverage_is_what_was_called(bundle: Bundle) -> None:
    """The figures come from the calls; what no call visited is named, by profile where the engine has profiles."""
    full = verification_of(bundle, OnnxRuntimeEngine(bundle, threads=1), quick=True).coverage
    assert full.shapes["decoder"] == ((1, 1), (2, 1), (3, 1), (4, 1))
    assert full.counts["classes and null"] == (11, 11)
    assert full.counts["training timesteps"] == (1000, 1000)
    assert full.counts["slots of the state"] == (3, 3)
    assert "step: batches above 5" in full.left
    assert "step G=2: batches 3" in full.left
    assert covers(full.shapes, "step", 5, 2)
    assert not covers(full.shapes, "step", 3, 2)
    assert not covers(full.shapes, "step", 6, 2)
    assert not covers(full.shapes, "step", 1, 4)
    visits = Visits()
    visits.note_shape("decoder", (3, 1))
    few = coverage_of(visits, replace(OnnxRuntimeEngine(bundle).info, max_batch=3), bundle.manifest, compared=False)
    assert "decoder: batches 1 to 2" in few.left
    assert not [line for line in few.left if line.startswith("decoder: batches above")]
    assert any("export the bundle again" in line for line in few.left)


def test_larger_batches_are_sampled() -> None:
    """Every batch up to 16 is visited, and so many above that what lies between two of them is trusted; of an engine
    with profiles to the end of each."""
    assert sample_batches(1, 40) == [*range(1, 17), 24, 36, 40]
    assert sample_batches(20, 70) == [20, 30, 45, 67, 70]
    assert sample_batches(4, 4) == [4]
    for least, largest in ((1, 40), (4, 17), (20, 70), (64, 128)):
        shapes = {"step": [(batch, 1) for batch in sample_batches(least, largest)]}
        assert all(covers(shapes, "step", batch) for batch in range(least, largest + 1))
        assert not covers(shapes, "step", largest + 1)
        assert not covers(shapes, "step", least - 1)
    assert not covers({"step": [(8, 1), (10, 1)]}, "step", 9)
    assert not covers({"step": [(16, 1), (25, 1)]}, "step", 20)
    for branches in (1, 2, 3, 4):
        assert set(range(1, EXACT + 1)) <= set(FULL.batches[branches])


@pytest.mark.parametrize("effort", [QUICK, FULL], ids=["quick", "full"])
def test_a_sound_engine_keeps_them(bundle_path: Path, effort: Effort) -> None:
    """Nothing fails without a fault, and the same arithmetic at another batch is the same to the last bit."""
    bundle = open_bundle(bundle_path)
    rungs = {rung.name: rung for rung in relations(Replay(bundle, OnnxRuntimeEngine(bundle, threads=1)), effort)}
    assert [rung.detail for rung in rungs.values() if not rung.passed] == []
    assert rungs["batch invariance"].detail.startswith("bit-equal; batches 1 2 3")
    assert rungs["batch invariance"].value == 0
