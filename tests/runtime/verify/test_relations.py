"""Faults at inputs that no golden record has are caught, each by the rung that names its kind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.faulty_engine import Alter, Arrays, FaultyEngine, Spoil

from dit_runtime import Pipeline
from dit_runtime.backends.onnxruntime.engine import OnnxRuntimeEngine
from dit_runtime.bundle.reader import Bundle, open_bundle
from dit_runtime.core.errors import ParityError
from dit_runtime.samplers.schedule import LOG_SIGMA, NOISE
from dit_runtime.verify.auto import Choice, Trust
from dit_runtime.verify.coverage import coverage_of, covers
from dit_runtime.verify.effort import FULL, QUICK, Effort
from dit_runtime.verify.replay import Replay
from dit_runtime.verify.verification import relations, verification_of
from dit_runtime.verify.visits import Visits


@dataclass(frozen=True)
class Fault:
    """A mistake, and the first relation that does not hold with it.

    Attributes:
        name: the mistake in words.
        rung: the first rung that fails.
        where: a part of its detail.
        inputs, outputs: changes of a graph's inputs and outputs.
        effort: of the verification that catches it.
    """

    name: str
    rung: str
    where: str = ""
    inputs: dict[str, Alter] = field(default_factory=dict)
    outputs: dict[str, Spoil] = field(default_factory=dict)
    effort: Effort = QUICK


def spoil(values: Arrays, place: int | slice = slice(None)) -> None:
    """Mix a little of the image's own mirror image in."""
    for value in values.values():
        value[place] = 0.9 * value[place] + 0.1 * value[place][..., ::-1]


def at_batch(wrong: Callable[[int], bool], place: int | slice = slice(None)) -> Spoil:
    def change(inputs: Arrays, outputs: Arrays) -> None:
        if wrong(len(next(iter(inputs.values())))):
            spoil(outputs, place)

    return change


def step_at(wrong: Callable[[int, int], bool]) -> Spoil:
    def change(inputs: Arrays, outputs: Arrays) -> None:
        if wrong(*inputs["rows"].shape[::-1]):
            spoil(outputs)

    return change


def wrap_rows(most: int) -> Alter:
    def change(inputs: Arrays) -> None:
        inputs["rows"] %= most

    return change


def use_neighbour(inputs: Arrays) -> None:
    inputs["labels"][inputs["labels"] == 5] = 4


def spoil_rows_from(first: int) -> Spoil:
    def change(inputs: Arrays, outputs: Arrays) -> None:
        (table,) = outputs.values()
        table[first:] = table[:1]

    return change


def drop_third_branch(inputs: Arrays) -> None:
    inputs["guidance"][2:] = 0


def use_first_of(name: str, axis: int) -> Alter:
    def change(inputs: Arrays) -> None:
        inputs[name][:] = np.take(inputs[name], [0], axis=axis)

    return change


def keep_slot(inputs: Arrays, outputs: Arrays) -> None:
    if len(inputs["state"]) > 1 and "next_state" in outputs:
        outputs["next_state"][:, 2] = inputs["state"][:, 2]


def add_noise(inputs: Arrays, outputs: Arrays) -> None:
    silent = inputs["coefficients"][:, NOISE] == 0
    outputs["next_state"][silent, 0] += 0.01 * inputs["noise"][silent]


def flip_images(inputs: Arrays, outputs: Arrays) -> None:
    if len(inputs["latents"]) == 1 and "images" in outputs:
        outputs["images"][:] = outputs["images"][:, ::-1].copy()


def whole_timesteps(inputs: Arrays) -> None:
    inputs["timesteps"][:] = np.floor(inputs["timesteps"])


def leaking() -> Spoil:
    calls: list[int] = []

    def change(inputs: Arrays, outputs: Arrays) -> None:
        calls.append(1)
        if len(calls) > 400 and inputs["rows"].shape == (1, 2):
            spoil(outputs)

    return change


def fall_back_in_sum(inputs: Arrays) -> None:
    """A branch without weight counts after all."""
    inputs["guidance"][1:][inputs["guidance"][1:] == 0] = 0.02


def forget_variance(inputs: Arrays) -> None:
    inputs["coefficients"][1:, LOG_SIGMA + 1] = 0


FAULTS = (
    Fault("one class reads its neighbour's row", "classes and timesteps", "label 5", {"conditioner": use_neighbour}),
    Fault("timesteps are whole numbers", "classes and timesteps", "timestep", {"conditioner": whole_timesteps}),
    Fault(
        "the conditioner is wrong after row 64",
        "conditioner calls",
        "of a call of",
        outputs={"conditioner": spoil_rows_from(64)},
    ),
    Fault("wrong at batch 2 only", "batch invariance", "at batch 2", outputs={"step": step_at(lambda n, _: n == 2)}),
    Fault("wrong at batch 3 only", "batch invariance", "at batch 3", outputs={"step": step_at(lambda n, _: n == 3)}),
    Fault("wrong from batch 5", "batch invariance", "at batch 5", outputs={"step": step_at(lambda n, _: n >= 5)}),
    Fault(
        "the last image of three",
        "batch invariance",
        "image 3 at batch 3",
        outputs={"step": at_batch(lambda n: n == 3, 2)},
    ),
    Fault(
        "wrong at batch 7 only",
        "batch invariance",
        "at batch 7",
        outputs={"step": step_at(lambda n, _: n == 7)},
        effort=FULL,
    ),
    Fault(
        "wrong with guidance at batch 2",
        "batch invariance, guided",
        "at batch 2",
        outputs={"step": step_at(lambda n, g: (n, g) == (2, 2))},
    ),
    Fault("rows above 32 wrap", "rows of the table", "rows", {"step": wrap_rows(32)}),
    Fault("rows above 128 wrap", "rows of the table", "rows", {"step": wrap_rows(128)}),
    Fault("rows above 4096 wrap", "rows of the table", "rows", {"step": wrap_rows(4096)}),
    Fault("the third branch is ignored", "branches", "G=3", {"step": drop_third_branch}),
    Fault("branches without weight count", "branches", "", {"step": fall_back_in_sum}),
    Fault(
        "guidance of the first image for all",
        "guidance of each image",
        "image 2",
        {"step": use_first_of("guidance", 1)},
    ),
    Fault("guidance of the first channel for all", "guidance of each image", "", {"step": use_first_of("guidance", 2)}),
    Fault(
        "coefficients of the first image for all",
        "sampler of each image",
        "image 2",
        {"step": use_first_of("coefficients", 0)},
    ),
    Fault("variance of later images is ignored", "batch invariance", "variance", {"step": forget_variance}),
    Fault("slot 2 is stale from batch 2", "sampler of each image", "slot 2", outputs={"step": keep_slot}),
    Fault(
        "noise where its scale is 0", "sampler of each image", "slot 0, noise of scale 0", outputs={"step": add_noise}
    ),
    Fault("a later call is another's", "repeated call", "later", outputs={"step": leaking()}, effort=FULL),
    Fault(
        "the decoder is wrong at batch 2 only",
        "decoder batches",
        "at batch 2",
        outputs={"decoder": at_batch(lambda n: n == 2)},
    ),
    Fault("images are flipped at batch 1", "uint8 batches", "at batch 1", outputs={"decoder": flip_images}),
)


@pytest.fixture(scope="module")
def bundle(bundles: dict[str, Path]) -> Bundle:
    return open_bundle(bundles["fp16"])


@pytest.fixture(scope="module")
def engine(bundle: Bundle) -> OnnxRuntimeEngine:
    return OnnxRuntimeEngine(bundle, threads=1)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_breaks_its_relation(fault: Fault, bundle: Bundle, engine: OnnxRuntimeEngine) -> None:
    """The first relation to fail is the one of the fault's kind, and says at which batch, row, branch or slot."""
    faulty: Any = FaultyEngine(engine, bundle.manifest, fault.inputs, fault.outputs)
    with np.errstate(all="ignore"):
        rung = next((rung for rung in relations(Replay(bundle, faulty), fault.effort) if not rung.passed), None)
    assert rung is not None
    assert (rung.name, rung.passed) == (fault.rung, False), rung.detail
    assert fault.where in rung.detail


def test_a_shape_that_nothing_visited_is_verified_first(bundle: Bundle, engine: OnnxRuntimeEngine) -> None:
    """``auto`` trusts an engine up to the largest batch of as many branches, and asks it before it goes beyond."""
    spoiled = {"step": step_at(lambda batch, branches: batch == 9 or branches == 4)}
    faulty: Any = FaultyEngine(engine, bundle.manifest, {}, spoiled)
    trust = Trust(bundle, faulty, {"step": [(1, 1), (10, 2)]})
    trust.check(9, 2)  # between two that were visited
    trust.check(4, 1)
    assert trust.shapes["step"][2:] == [(4, 1)]
    for shape in ((9, 1), (2, 4)):
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
        list(pipe.stream(pipe.prepare([1, 2, {3: 0.5, 4: 0.5}], steps=2, guidance=2.0), batch_size=2))
        assert asked[1:] == [(2, 2), (1, 3)]
        Pipeline(bundle, engine)([1], steps=2)
        assert len(asked) == 3


def test_coverage_is_what_was_called(bundle: Bundle) -> None:
    """The figures come from the calls; what no call visited is named, by profile where the engine has profiles."""
    full = verification_of(bundle, OnnxRuntimeEngine(bundle, threads=1), quick=True).coverage
    assert full.shapes["decoder"] == ((1, 1), (2, 1), (3, 1), (4, 1))
    assert full.counts["classes and null"] == (11, 11)
    assert full.counts["training timesteps"] == (1000, 1000)
    assert full.counts["slots of the state"] == (3, 3)
    assert "step: batches above 5" in full.left
    assert covers(full.shapes, "step", 5, 2)
    assert not covers(full.shapes, "step", 6, 2)
    assert not covers(full.shapes, "step", 1, 4)
    visits = Visits()
    visits.note_shape("decoder", (3, 1))
    few = coverage_of(visits, replace(OnnxRuntimeEngine(bundle).info, max_batch=3), bundle.manifest, compared=False)
    assert "decoder: batches 1 to 2" in few.left
    assert not [line for line in few.left if line.startswith("decoder: batches above")]
    assert any("export the bundle again" in line for line in few.left)


@pytest.mark.parametrize("effort", [QUICK, FULL], ids=["quick", "full"])
def test_a_sound_engine_keeps_them(bundle_path: Path, effort: Effort) -> None:
    """Nothing fails without a fault, and the same arithmetic at another batch is the same to the last bit."""
    bundle = open_bundle(bundle_path)
    rungs = {rung.name: rung for rung in relations(Replay(bundle, OnnxRuntimeEngine(bundle, threads=1)), effort)}
    assert [rung.detail for rung in rungs.values() if not rung.passed] == []
    assert rungs["batch invariance"].detail.startswith("bit-equal; batches 1 2 3")
    assert rungs["batch invariance"].value == 0
