"""What ``auto`` takes: the fastest engine here that matches the reference, and it says why."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.commands import run_command

from dit_runtime.backends.base import Candidate
from dit_runtime.backends.onnxruntime.engine import OnnxRuntimeEngine
from dit_runtime.backends.open import engine_for
from dit_runtime.backends.openvino.engine import OpenVinoEngine
from dit_runtime.bundle.reader import Bundle, open_bundle
from dit_runtime.core.errors import EngineError, ParityError
from dit_runtime.verify import auto
from dit_runtime.verify import speed as choice
from dit_runtime.verify.auto import check_choice, choose_engine, open_first_engine
from dit_runtime.verify.coverage import Coverage
from dit_runtime.verify.rung import Rung
from dit_runtime.verify.speed import Speed, rank_by_speed, sort_by_speed
from dit_runtime.verify.verdicts import store_verdict

GOOD, BAD = Rung("ddim", 0.0, 1.0, "relative"), Rung("ddim", 2.0, 1.0, "relative")


@pytest.fixture
def bundle(bundles: dict[str, Path], tmp_path: Path) -> Bundle:
    return open_bundle(shutil.copytree(bundles["fp32"], tmp_path / "own", ignore=shutil.ignore_patterns("engines")))


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, float]], list[str]]:
    """Let each engine take so many milliseconds; the list that is returned gets the names of those that are timed."""

    def taking(milliseconds: dict[str, float]) -> list[str]:
        timed: list[str] = []

        def speed(bundle: Bundle, candidate: Candidate, threads: int, best: float | None) -> Speed:
            timed.append(candidate.name)
            if candidate.name not in milliseconds:
                raise EngineError("out of order")
            kind: Any = {"openvino": OpenVinoEngine, "onnxruntime": OnnxRuntimeEngine}[candidate.name]
            return Speed(candidate.name, candidate.precision, kind(bundle).info.name, milliseconds[candidate.name])

        monkeypatch.setattr(choice, "_time_step", speed)
        return timed

    return taking


def speed(name: str, step_ms: float) -> Speed:
    return Speed(name, None, name, step_ms)


def test_order() -> None:
    """By time; of two that are equally fast here, the one expected to be faster, so that noise does not decide."""
    a, b, c = speed("a", 105.0), speed("b", 100.0), speed("c", 50.0)
    assert sort_by_speed([a, b, c]) == [c, a, b]
    assert sort_by_speed([speed("a", 111.0), b]) == [b, speed("a", 111.0)]


def test_a_real_measurement(bundle: Bundle) -> None:
    """Both engines run the step, a record is left that the next call reads, and what it opens is the engine named."""
    found = rank_by_speed(bundle)
    assert {speed.name for speed in found} == {"openvino", "onnxruntime"}
    assert all(0 < speed.step_ms < 10_000 for speed in found)
    assert rank_by_speed(bundle) == found
    for speed in found:
        assert engine_for(bundle, speed.name, 0, speed.precision).info.name == speed.engine


@pytest.mark.parametrize(("openvino", "onnxruntime"), [(1.0, 2.0), (2.0, 1.0)])
def test_the_fastest_is_taken_and_said(
    bundle: Bundle,
    measured: Callable[[dict[str, float]], list[str]],
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    openvino: float,
    onnxruntime: float,
) -> None:
    """Timed once, verified once, then known; the line says the engine, its time and the others'."""
    caplog.set_level(logging.INFO, "dit_runtime")
    times = {"openvino": openvino, "onnxruntime": onnxruntime}
    fastest = min(times, key=lambda name: times[name])
    timed = measured(times)
    choice = choose_engine(bundle)
    assert choice.engine.info.name.startswith(fastest)
    said = choice.found_out
    assert list(caplog.messages) == list(said)
    assert capsys.readouterr() == ("", "")  # the library prints nothing
    assert any("first use of this bundle here, verifying the engine" in line for line in said)
    assert said[-1].startswith(f"engine: {fastest} ")
    assert said[-1].endswith(" 2 ms")
    assert ", 1 ms a guided step; " in said[-1]
    assert choice.why in said[-1]
    again = choose_engine(bundle)
    assert again.engine.info.name.startswith(fastest)
    assert (again.why, again.found_out) == (choice.why, ())
    assert sorted(timed) == ["onnxruntime", "openvino"]
    assert open_first_engine(bundle).info.name.startswith(fastest)


def test_an_engine_that_failed_is_passed_over(
    bundle: Bundle, measured: Callable[[dict[str, float]], list[str]]
) -> None:
    """The fastest that does not match the reference is named and not used; when none matches, there is none."""
    measured({"openvino": 1.0, "onnxruntime": 2.0})
    store_verdict(bundle, OpenVinoEngine(bundle), [BAD], quick=True)
    found = choose_engine(bundle)
    assert found.engine.info.name.startswith("onnxruntime")
    assert "is not used: it does not match the PyTorch reference here" in " ".join(found.found_out)
    assert open_first_engine(bundle).info.name.startswith("openvino")
    store_verdict(bundle, OnnxRuntimeEngine(bundle), [BAD], quick=True)
    with pytest.raises(ParityError, match=r"openvino .*, onnxruntime .* does not match"):
        choose_engine(bundle)


def test_an_engine_that_cannot_run_is_named(bundle: Bundle, measured: Callable[[dict[str, float]], list[str]]) -> None:
    """One that is installed but fails is said once and left out; when all fail, the reasons are the error."""
    measured({"onnxruntime": 2.0})
    store_verdict(bundle, OnnxRuntimeEngine(bundle), [GOOD], quick=True)
    found = choose_engine(bundle)
    assert found.engine.info.name.startswith("onnxruntime")
    said = " ".join(found.found_out)
    assert "openvino is not used: out of order" in said
    assert ", the only one here" in said
    shutil.rmtree(bundle.path / "engines")
    measured({})
    with pytest.raises(EngineError, match="out of order; out of order"):
        choose_engine(bundle)


def test_an_engine_that_cannot_be_verified_is_passed_over(
    bundle: Bundle,
    measured: Callable[[dict[str, float]], list[str]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One that fails in the middle (no memory for a graph, no profile) is named; the next takes its place."""
    measured({"openvino": 1.0, "onnxruntime": 2.0})

    def verification(bundle: Bundle, engine: Any, quick: bool) -> SimpleNamespace:
        if engine.info.name.startswith("openvino"):
            raise EngineError("no memory for the decoder")
        return SimpleNamespace(rungs=(GOOD,), passed=True, coverage=Coverage())

    monkeypatch.setattr(auto, "verification_of", verification)
    found = choose_engine(bundle)
    assert found.engine.info.name.startswith("onnxruntime")
    assert " is not used: no memory for the decoder" in " ".join(found.found_out)


def test_a_store_elsewhere(bundles: dict[str, Path], tmp_path: Path) -> None:
    """With --store, timings, verdicts and prepared graphs are kept there, and nothing is written into the bundle."""
    path = tmp_path / "own"
    shutil.copytree(bundles["fp16"], path, ignore=shutil.ignore_patterns("engines"))
    store, image = tmp_path / "store", tmp_path / "a.png"
    for _ in range(2):
        done = run_command("dit-sample", path, "--labels", "3", "--steps", "2", "--store", store, "-o", image)
        assert done.returncode == 0, done.stderr
    assert "first use" not in done.stderr
    assert {"speeds", "verdicts"} <= {folder.name for folder in store.iterdir()}
    done = run_command("dit-verify", path, "--engine", "onnxruntime", "--quick", "--store", store)
    assert done.returncode == 0, done.stdout
    assert not (path / "engines").exists()


def test_what_others_took_is_not_believed(
    bundle: Bundle, measured: Callable[[dict[str, float]], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another machine, version or number of threads is measured anew, as is a record that cannot be read."""
    timed = measured({"openvino": 1.0, "onnxruntime": 2.0})
    rank_by_speed(bundle)
    rank_by_speed(bundle, threads=1)
    assert len(timed) == 4
    monkeypatch.setattr(choice, "describe_machine", lambda: {"processor": "another"})
    rank_by_speed(bundle)
    assert len(timed) == 6
    for record in (bundle.path / "engines" / "speeds").iterdir():
        record.write_text("[]")
    rank_by_speed(bundle)
    assert len(timed) == 8


def test_a_read_only_bundle(
    bundle: Bundle, measured: Callable[[dict[str, float]], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nothing can be stored the choice is the same, measured each time."""
    timed = measured({"openvino": 2.0, "onnxruntime": 1.0})
    (bundle.path / "engines").write_text("in the way of the folder")
    passing = SimpleNamespace(rungs=(GOOD,), passed=True, coverage=Coverage())
    monkeypatch.setattr(auto, "verification_of", lambda bundle, engine, quick: passing)
    for _ in range(2):
        assert choose_engine(bundle).engine.info.name.startswith("onnxruntime")
    assert len(timed) == 4


def test_a_precision_needs_an_engine() -> None:
    """A precision is one engine's: with ``auto`` it is refused, not ignored."""
    with pytest.raises(EngineError, match=r"precision bf16 with engine auto: name the engine too"):
        check_choice("auto", "bf16")
    check_choice("openvino", "bf16")
    check_choice("auto", None)
