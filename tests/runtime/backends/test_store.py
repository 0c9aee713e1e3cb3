"""The engine store's reader: nothing is handed out that its sidecar does not vouch for, and nothing unfit for a GPU."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dit_runtime.backends.tensorrt.store import SIDECAR, StoredEngine, read_engine, read_engines
from dit_runtime.bundle.manifest import GraphSpec, TensorSpec
from dit_runtime.core.errors import EngineError
from dit_runtime.core.replace import replace_folder

DIGEST = "d" * 64
PLAN = b"a plan"


def sidecar(**changes: Any) -> dict[str, Any]:
    graph = {
        "graph": "step",
        "plan": "step.plan",
        "plan_bytes": len(PLAN),
        "plan_sha256": hashlib.sha256(PLAN).hexdigest(),
        "seconds": 1.5,
        "profiles": [
            {"rows": [[1, 1], [1, 1], [1, 4]]},
            {"rows": [[2, 1], [2, 1], [2, 4]]},
            {"rows": [[2, 1], [2, 1], [2, 1]]},
        ],
        "weights_bytes": 7,
        "activation_bytes": [10, 30, 20],
        "audit": {},
        "doubts": [],
    }
    return {
        "schema": 2,
        "bundle": DIGEST,
        "image_size": [32, 48],
        "library": "tensorrt",
        "version": "10.3.0",
        "target": "orin-nano",
        "compute_capability": "8.7",
        "gpu": "Orin",
        "driver": "540.4.0",
        "recipe": {"batches": [4]},
        "identity": {},
        "timing_cache": {"file": "timing.cache", "sha256": "c" * 64},
        "tf32": False,
        "graphs": [graph],
        **changes,
    }


def written(folder: Path, content: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / SIDECAR).write_text(content if isinstance(content, str) else json.dumps(content))
    (folder / "step.plan").write_bytes(PLAN)
    return folder


def bundle_at(path: Path, digest: str = DIGEST) -> Any:
    manifest = SimpleNamespace(image_size=(32, 48))
    return SimpleNamespace(path=path, digest=digest, engines=path / "engines", manifest=manifest)


@pytest.fixture
def engine(tmp_path: Path) -> StoredEngine:
    return read_engine(written(tmp_path / "b" / "engines" / "one", sidecar()))


def test_a_sound_engine_is_read(tmp_path: Path, engine: StoredEngine) -> None:
    """Every field of the sidecar arrives typed, and the plan's path is given once its hash is checked."""
    assert read_engines(bundle_at(tmp_path / "b")) == [engine]
    with replace_folder(engine.folder) as temporary:  # another process's, being written
        shutil.copytree(engine.folder, temporary, dirs_exist_ok=True)
        assert read_engines(bundle_at(tmp_path / "b")) == [engine]
    assert (engine.library, engine.version, engine.gpu, engine.image_size) == ("tensorrt", "10.3.0", "Orin", (32, 48))
    step = engine.graphs["step"]
    assert step.profiles[0] == {"rows": ((1, 1), (1, 1), (1, 4))}
    assert (step.weights_bytes, step.activation_bytes) == (7, (10, 30, 20))
    assert engine.find_plan("step").read_bytes() == PLAN
    with pytest.raises(EngineError, match="has no plan of the decoder, only of step; run dit-build"):
        engine.find_plan("decoder")


def test_the_profile_with_the_least_memory(engine: StoredEngine) -> None:
    """Of the profiles that take a shape the one that needs least; none outside of all."""
    step = engine.graphs["step"]
    rows = TensorSpec("rows", "int32", ("branches", "batch"))
    profiles = step.profiles_of(GraphSpec("step.onnx", "step.weights", (rows,), ()))
    shapes = [(1, 3), (2, 1), (2, 2), (3, 1), (2, 5), (2,)]
    fits = [profiles.find_fit({"rows": shape}, step.activation_bytes, padded=()) for shape in shapes]
    assert [fit and fit.profile for fit in fits] == [0, 2, 1, None, None, None]


def test_only_this_bundle_at_this_size(tmp_path: Path) -> None:
    """A plan swapped in from another bundle's store, or for another size, is not among a bundle's engines."""
    store = tmp_path / "store"
    written(store / "ours", sidecar())
    written(store / "other-size", sidecar(image_size=[64, 64]))
    written(store / "other-bundle", sidecar(bundle="e" * 64))
    assert [item.folder.name for item in read_engines(bundle_at(tmp_path), store)] == ["ours"]
    assert read_engines(bundle_at(tmp_path), tmp_path / "nothing") == []


def changed_graph(**changes: Any) -> dict[str, Any]:
    content = sidecar()
    content["graphs"][0].update(changes)
    return content


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "not a sidecar"),
        ("[]", "not a sidecar"),
        ("[" * 100_000, "not a sidecar"),
        (sidecar(schema=1), "schema 1, this version reads 2"),
        (sidecar(graphs=[]), "graphs: got none"),
        (sidecar(library="onnx"), "library: got 'onnx', expected one of 'tensorrt', 'tensorrt_rtx'"),
        (sidecar(version=10.3), "version: got 10.3, expected text"),
        (sidecar(image_size=[32]), "image_size: got [32], expected a list of 2"),
        (sidecar(image_size=[32, 0]), "image_size[1]: got 0, expected a whole number from 1"),
        (sidecar(more=1), "more: unknown, expected only schema, bundle"),
        ('{"schema": 2, "schema": 2}', "key 'schema' is there twice"),
        ('{"schema": NaN}', "it holds NaN"),
        ({key: value for key, value in sidecar().items() if key != "gpu"}, "gpu: missing, expected text or null"),
        (changed_graph(plan="../step.plan"), "is outside its engine's folder"),
        (changed_graph(plan="/etc/passwd"), "is outside its engine's folder"),
        (changed_graph(plan=".."), "is outside its engine's folder"),
        (changed_graph(plan_bytes=-1), "graphs[0].plan_bytes: got -1, expected a whole number from 0"),
        (changed_graph(plan_bytes=True), "graphs[0].plan_bytes: got True, expected a whole number"),
        (changed_graph(activation_bytes=[1]), "1 activation sizes for 3 profiles"),
        (changed_graph(profiles=[{"rows": [[2], [1], [3]]}], activation_bytes=[1]), "does not rise"),
        (changed_graph(profiles=[{"rows": [[1], [1]]}], activation_bytes=[1]), "profiles[0].rows: got [[...], [...]]"),
        (changed_graph(profiles=[{"rows": [[1], [1], [1, 1]]}], activation_bytes=[1]), "does not rise"),
    ],
)
def test_a_damaged_sidecar_is_skipped_with_its_reason(tmp_path: Path, content: Any, reason: str) -> None:
    """A sidecar that does not hold together costs its own engine, in a line, and no other."""
    store = tmp_path / "store"
    written(store / "damaged", content)
    written(store / "sound", sidecar())
    said: list[str] = []
    assert [item.folder.name for item in read_engines(bundle_at(tmp_path), store, said.append)] == ["sound"]
    (line,) = said
    assert reason in line
    assert "\n" not in line
    assert "run dit-build again" in line


def test_links_are_not_followed(tmp_path: Path) -> None:
    """A sidecar or an engine's folder that is a link is not one of the store's."""
    written(tmp_path / "elsewhere", sidecar())
    store = tmp_path / "store"
    store.mkdir()
    (store / "link").symlink_to(tmp_path / "elsewhere")
    (store / "inside").mkdir()
    (store / "inside" / SIDECAR).symlink_to(tmp_path / "elsewhere" / SIDECAR)
    said: list[str] = []
    assert read_engines(bundle_at(tmp_path), store, said.append) == []
    assert len(said) == 2


def test_a_plan_that_is_not_the_one_built(engine: StoredEngine, tmp_path: Path) -> None:
    """Cut short, altered, replaced by a link, gone: each is refused with the command that builds it again."""
    path = engine.folder / "step.plan"
    command = f"run dit-build BUNDLE --store {engine.folder.parent} --target orin-nano --size 32x48"
    path.write_bytes(PLAN[:-1])
    with pytest.raises(EngineError, match=rf"5 bytes, expected 6; {command}"):
        engine.find_plan("step")
    path.write_bytes(PLAN[:-1] + b"m")
    with pytest.raises(EngineError, match=rf"altered \(SHA-256 .*; {command}"):
        engine.find_plan("step")
    path.rename(tmp_path / "moved")
    path.symlink_to(tmp_path / "moved")
    with pytest.raises(EngineError, match="not a plain file"):
        engine.find_plan("step")
    path.unlink()
    with pytest.raises(EngineError, match="missing"):
        engine.find_plan("step")


@pytest.mark.parametrize(
    ("here", "words"),
    [
        (("tensorrt", "10.16.1", "8.7", "Orin"), "this is sm_87 (Orin) with TensorRT 10.16.1; run dit-build"),
        (("tensorrt", "10.3.0", "8.9", "NVIDIA L4"), "this is sm_89 (NVIDIA L4) with TensorRT 10.3.0; run dit-build"),
        (("tensorrt", "10.3.0", "8.7", "Orin NX"), "this is sm_87 (Orin NX) with"),
        (("tensorrt_rtx", "1.7.1", "8.9", "RTX 4090"), "with TensorRT-RTX 1.7.1; run dit-build"),
    ],
)
def test_another_device_is_refused_first(
    engine: StoredEngine, here: tuple[str, str, str, str | None], words: str
) -> None:
    """Another version, GPU or library is refused with what the plan is for, what is here, and the command."""
    engine.check_device("tensorrt", "10.3.0", "8.7", "Orin")
    engine.check_device("tensorrt", "10.3.0", "8.7", None)
    with pytest.raises(EngineError) as raised:
        engine.check_device(*here)
    assert "built for sm_87 (Orin) with TensorRT 10.3.0" in str(raised.value)
    assert words in str(raised.value)


def test_an_engine_built_ahead_of_time(tmp_path: Path) -> None:
    """TensorRT-RTX's runs on any GPU of a compute capability it was built for, by the version that built it."""
    content = sidecar(
        library="tensorrt_rtx", version="1.7.1", target="rtx", compute_capability="8.6,8.9", gpu=None, driver=None
    )
    engine = read_engine(written(tmp_path / "my bundle" / "engines" / "one", content))
    (tmp_path / "my bundle" / "manifest.json").write_text("{}")
    engine.check_device("tensorrt_rtx", "1.7.1", "8.6", "NVIDIA GeForce RTX 3090")
    engine.check_device("tensorrt_rtx", "1.7.1", "8.9", "NVIDIA GeForce RTX 4090")
    for version, capability in (("1.8.0", "8.9"), ("1.7.1", "12.0")):
        with pytest.raises(EngineError) as raised:
            engine.check_device("tensorrt_rtx", version, capability, None)
        assert f"run dit-build '{tmp_path}/my bundle' --target rtx --compute-capability {capability}" in str(
            raised.value
        )
