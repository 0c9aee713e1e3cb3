"""Which stored engine is opened: the last that was built for this GPU, after its memory was asked, never another."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from support.cuda_double import FACTS, Machine, stored_on

from dit_engines.recipe import Recipe
from dit_runtime.backends.open import BACKENDS, open_engine
from dit_runtime.backends.tensorrt import open as tensorrt_engine
from dit_runtime.backends.tensorrt.open import engine_from_store
from dit_runtime.backends.tensorrt.store import SIDECAR, StoredEngine
from dit_runtime.bundle.reader import Bundle, open_bundle
from dit_runtime.commands.common import ENGINE_HELP
from dit_runtime.core.errors import EngineError
from dit_runtime.verify.auto import choose_engine

RECIPE = Recipe("this", "8.7", (1, 4), (1, 2), 64)


@pytest.fixture
def bundle(bundles: dict[str, Path]) -> Bundle:
    return open_bundle(bundles["fp32"])


def stored(machine: Machine, bundle: Bundle, folder: Path, age: int, monkeypatch: pytest.MonkeyPatch) -> StoredEngine:
    """An engine of the double in ``folder``, built ``age`` seconds ago, and the only one there is."""
    engine = stored_on(machine, bundle, folder, RECIPE)
    (folder / SIDECAR).write_text("{}")
    os.utime(folder / SIDECAR, (1e9 - age, 1e9 - age))
    monkeypatch.setattr(tensorrt_engine, "read_engines", lambda bundle, store, skipped: [engine])
    return engine


def test_the_last_that_runs_here_is_taken(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several engines the one built last, past those for another GPU or version."""
    machine = Machine()
    engines = [stored(machine, bundle, tmp_path / str(age), age, monkeypatch) for age in (30, 10, 20)]
    other = [replace(engines[0], version="10.9.0"), replace(engines[1], compute_capability="8.9")]
    monkeypatch.setattr(tensorrt_engine, "read_engines", lambda bundle, store, skipped: [*engines, *other])
    engine = engine_from_store(bundle, "tensorrt", cuda=machine.cuda, import_library=lambda name: machine.library)
    assert engine.stored.folder == tmp_path / "10"
    engine.close()
    machine.check_closed()


def test_a_whole_engine_is_found_behind_a_partial_one(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever asks for one that does everything gets the last such, past a later one without guidance or for tiles."""
    machine = Machine()
    whole = stored(machine, bundle, tmp_path / "whole", 20, monkeypatch)
    opened = partial(
        engine_from_store, bundle, "tensorrt", cuda=machine.cuda, import_library=lambda name: machine.library
    )
    for name, recipe, words in (
        ("unguided", replace(RECIPE, branches=(1,)), "was built without guidance; choose it"),
        ("tiles", replace(RECIPE, decode_tile=4), r"was built for tiles \(--decode-tile 4\); choose it"),
    ):
        part = stored_on(machine, bundle, tmp_path / name, recipe)
        (part.folder / SIDECAR).write_text("{}")
        for engines, asked, expected in (([whole, part], False, part), ([whole, part], True, whole)):
            monkeypatch.setattr(tensorrt_engine, "read_engines", lambda *_, engines=engines: engines)
            engine = opened(whole=asked)
            assert engine.stored is expected
            engine.close()
        monkeypatch.setattr(tensorrt_engine, "read_engines", lambda *_, part=part: [part])
        with pytest.raises(EngineError, match=words):
            opened(whole=True)
    machine.check_closed()


def test_an_engine_for_another_gpu_is_not_loaded(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both GPUs and the command are in the error, and nothing was deserialized."""
    machine = Machine()
    engine = replace(stored(machine, bundle, tmp_path, 0, monkeypatch), compute_capability="8.9", gpu="NVIDIA L4")
    monkeypatch.setattr(tensorrt_engine, "read_engines", lambda bundle, store, skipped: [engine])
    with pytest.raises(EngineError, match=r"built for sm_89 \(NVIDIA L4\).* this is sm_87.*run dit-build"):
        engine_from_store(bundle, "tensorrt", cuda=machine.cuda, import_library=lambda name: machine.library)
    assert not machine.calls["deserialize"]
    machine.check_closed()


def test_nothing_built_says_what_to_build(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command for this device, for TensorRT and for RTX, which must be told what it builds for."""
    machine = Machine()
    monkeypatch.setattr(tensorrt_engine, "read_engines", lambda bundle, store, skipped: [])
    for name, command in [("tensorrt", "--target this"), ("tensorrt-rtx", "--target rtx --compute-capability 8.7")]:
        library = replace(machine.library, name=tensorrt_engine.TENSORRT[name])
        with pytest.raises(EngineError, match=f"no engine of .* for images of 32x32; run dit-build .* {command}"):
            engine_from_store(bundle, name, cuda=machine.cuda, import_library=lambda name, library=library: library)


def test_too_little_memory_is_said_before_loading(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The need by the builder's figures and what is free, and no byte was taken."""
    machine = Machine(facts=replace(FACTS, memory_bytes=100_000))
    stored(machine, bundle, tmp_path, 0, monkeypatch)
    with pytest.raises(EngineError, match=r"batch 1 needs .* of the GPU's memory, and 0 MB are available"):
        engine_from_store(bundle, "tensorrt", cuda=machine.cuda, import_library=lambda name: machine.library)
    assert machine.used == 0


def test_the_help_names_every_engine() -> None:
    """What commands show without importing an engine is what there is."""
    assert {name.strip(",;") for name in ENGINE_HELP.split()} >= {"auto", *BACKENDS}


def test_auto_says_why_an_engine_is_not_used(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that was built but cannot run here is named with its reason; one on the CPU takes its place."""
    engine = stored(Machine(), bundle, tmp_path, 0, monkeypatch)
    monkeypatch.setattr(tensorrt_engine, "read_engines", lambda *_: [engine])
    found = choose_engine(bundle)
    assert found.engine.info.name.startswith(("onnxruntime", "openvino"))
    assert "tensorrt is not used: tensorrt is not installed" in " ".join(found.found_out)
    with pytest.raises(EngineError, match="tensorrt is not installed"):
        open_engine(bundle, "tensorrt")
