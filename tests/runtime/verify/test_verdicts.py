"""Verdicts and speeds as files: what is written is read back, and a damaged record counts as none."""

from __future__ import annotations

import json
import math
import os
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any

import pytest
from support.engines import info_of

from dit_runtime.core.machine import describe_machine
from dit_runtime.core.replace import hold_lock, replace_file
from dit_runtime.verify import speed
from dit_runtime.verify.rung import Rung
from dit_runtime.verify.verdicts import has_passed, path_of_verdict, read_verdicts, store_verdict

ENGINE: Any = SimpleNamespace(info=info_of("an engine", identity="this very one"))
RUNGS = [
    Rung("blocks", 0.5, 1.0, "relative", "block 1", 1.5, 2.0, None, {"max_abs": 0.25}, "block", {"error": [0.5, 0.25]}),
    Rung("image", math.inf, 30.0, "dB", metrics={"ssim": 1.0}),
    Rung("overflow", math.nan, 1.0, "relative"),
]


@pytest.fixture
def bundle(tmp_path: Path) -> Any:
    manifest = SimpleNamespace(model=SimpleNamespace(latent_size=(8, 8)), image_size=(32, 32))
    return SimpleNamespace(digest="d" * 64, manifest=manifest, engines=tmp_path)


def test_a_verdict_is_read_as_it_was_written(bundle: Any) -> None:
    """Numbers that are not finite are words in the file; the failed rungs are named."""
    store_verdict(bundle, ENGINE, RUNGS, quick=False)
    raw = json.loads(path_of_verdict(bundle, ENGINE).read_text())
    assert list(raw) == ["bundle", "image_size", "engine", "machine", "time", "quick", "passed", "rungs", "shapes"]
    assert raw["rungs"] == [json.loads(json.dumps(rung.as_json())) for rung in RUNGS]
    assert [list(rung) for rung in raw["rungs"]] == [list(rung.as_json()) for rung in RUNGS]
    (verdict,) = read_verdicts(bundle)
    assert (verdict.engine, verdict.image_size, verdict.machine) == ("an engine", (32, 32), describe_machine())
    assert verdict.failed == ("overflow",)
    with replace_file(path_of_verdict(bundle, ENGINE)) as file:  # another process's, being written
        shutil.copyfile(path_of_verdict(bundle, ENGINE), file)
        assert read_verdicts(bundle) == [verdict]
    assert has_passed(bundle, ENGINE) is False
    store_verdict(bundle, ENGINE, RUNGS[:2], quick=False)
    assert has_passed(bundle, ENGINE, full=True) is True


@pytest.mark.parametrize("change", ["cut", "missing", "unknown", "type", "other bundle", "other engine", "nesting"])
def test_a_damaged_verdict_is_none(bundle: Any, change: str) -> None:
    """An engine whose verdict cannot be read whole was never judged."""
    store_verdict(bundle, ENGINE, RUNGS[:2], quick=False)
    path = path_of_verdict(bundle, ENGINE)
    raw = json.loads(path.read_text())
    changed: dict[str, Any] = {
        "cut": path.read_text()[:-10],
        "missing": {name: value for name, value in raw.items() if name != "rungs"},
        "unknown": {**raw, "more": 1},
        "type": {**raw, "passed": "yes"},
        "other bundle": {**raw, "bundle": "e" * 64},
        "other engine": {**raw, "engine": "another"},
        "nesting": "[" * 100_000,
    }
    path.write_text(changed[change] if isinstance(changed[change], str) else json.dumps(changed[change]))
    assert has_passed(bundle, ENGINE) is None
    assert len(read_verdicts(bundle)) == (change == "other engine")


FAILING = [*RUNGS[:2], Rung("update", 2.0, 1.0, "relative")]


def test_the_stronger_verdict_stays(bundle: Any) -> None:
    """A quick verification that passes replaces neither a full one nor one that failed; all others replace any."""
    for quick, rungs, expected in (
        (True, RUNGS[:2], (True, True)),
        (True, FAILING, (True, False)),
        (True, RUNGS[:2], (True, False)),  # kept
        (False, RUNGS[:2], (False, True)),
        (True, RUNGS[:2], (False, True)),  # kept
        (True, FAILING, (True, False)),
        (False, FAILING, (False, False)),
        (True, RUNGS[:2], (False, False)),  # kept
    ):
        store_verdict(bundle, ENGINE, rungs, quick)
        (found,) = read_verdicts(bundle)
        assert (found.quick, found.passed) == expected


def test_two_verifications_at_once(bundle: Any) -> None:
    """A quick one that ends while a full one writes waits for it, and then sees that the full one failed."""
    path = path_of_verdict(bundle, ENGINE)
    path.parent.mkdir()
    quick = Thread(target=store_verdict, args=(bundle, ENGINE, RUNGS[:2], True))
    with hold_lock(path.with_name(f".{path.stem}.lock")):
        quick.start()
        quick.join(timeout=0.2)
        assert quick.is_alive()
    quick.join()
    assert has_passed(bundle, ENGINE) is True


def test_a_lock_that_leads_elsewhere(bundle: Any, tmp_path: Path) -> None:
    """Nothing is made outside the store, and a pipe is not waited for: the verdict is written without a lock."""
    path, outside = path_of_verdict(bundle, ENGINE), tmp_path.parent / f"{tmp_path.name}-lock"
    lock = path.with_name(f".{path.stem}.lock")
    path.parent.mkdir()
    for make in (lambda: lock.symlink_to(outside), lambda: os.mkfifo(lock), lock.mkdir):
        make()
        store_verdict(bundle, ENGINE, RUNGS[:2], quick=False)
        assert has_passed(bundle, ENGINE) is True
        lock.rmdir() if lock.is_dir() else lock.unlink()
        path.unlink()
    assert not outside.exists()


def giant(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(20 << 30)  # sparse: it takes no space


@pytest.mark.parametrize(
    "replace",
    [lambda path: path.symlink_to("/dev/zero"), giant, os.mkfifo, Path.mkdir],
    ids=["endless", "giant", "pipe", "folder"],
)
def test_a_verdict_that_is_not_read(bundle: Any, replace: Callable[[Path], None]) -> None:
    """Fails by reading without end, by waiting for ever, or by the memory that 20 GB take."""
    path = path_of_verdict(bundle, ENGINE)
    path.parent.mkdir()
    replace(path)
    tracemalloc.start()
    assert has_passed(bundle, ENGINE) is None
    assert read_verdicts(bundle) == []
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_links_in_the_store_lead_nowhere(bundle: Any, tmp_path: Path) -> None:
    """A verdict from outside the store is not believed, and none is written outside it."""
    store_verdict(bundle, ENGINE, RUNGS[:2], quick=False)
    path = path_of_verdict(bundle, ENGINE)
    outside = tmp_path.parent / f"{tmp_path.name}-outside"
    path.parent.rename(outside)
    path.parent.symlink_to(outside)
    (before,) = outside.glob("*.json")
    content = before.read_text()
    assert has_passed(bundle, ENGINE) is None
    assert read_verdicts(bundle) == []
    store_verdict(bundle, ENGINE, RUNGS, quick=False)
    assert [item.read_text() for item in outside.glob("*.json")] == [content]


@pytest.mark.parametrize(
    "content",
    ["[]", "{}", "[1]", '[{"name": "openvino"}]', "[" * 100_000]
    + [
        json.dumps([{"name": "openvino", "precision": None, "engine": "a b", "step_ms": wrong}])
        for wrong in (-1, "1", 1e999)
    ]
    + ['[{"name": "another", "precision": null, "engine": "a b", "step_ms": 2}]'],
)
def test_a_damaged_record_of_speeds_is_none(tmp_path: Path, content: str) -> None:
    """Times that cannot be read whole are measured anew."""
    path = tmp_path / "speeds.json"
    assert speed._read(path, tmp_path) is None
    path.write_text('[{"name": "openvino", "precision": null, "engine": "a b", "step_ms": 2}]')
    assert speed._read(path, tmp_path) == [speed.Speed("openvino", None, "a b", 2.0)]
    path.write_text(content)
    assert speed._read(path, tmp_path) is None
