"""``dit-build`` compiles with the real TensorRT-RTX builder, on a machine without a GPU, and audits what it got."""

from __future__ import annotations

import ctypes
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
from support.bundles import edit_graph, signed
from support.commands import run_command, run_process

from dit_engines.build import as_json, engine_from_bundle, graphs_of
from dit_engines.build_host import BuildHost, build_host_for
from dit_engines.compile import CANCEL_SECONDS, _run_worker
from dit_engines.engine_store import (
    TIMING_CACHE,
    BuiltEngine,
    digest_of_written,
    explain_rebuild,
    find_engine,
    find_timing_cache,
    identity_of,
    lock_store,
)
from dit_engines.preflight import estimate_graphs, stored_graphs_from_built
from dit_engines.recipe import profiles_of, recipe_for
from dit_engines.repeat import OnDevice, measure_on_gpu
from dit_runtime.backends.tensorrt.store import StoredEngine, read_engines, read_sidecar
from dit_runtime.bench.parts import DECODER, GUIDED, PLAIN
from dit_runtime.bundle.reader import Bundle, open_bundle
from dit_runtime.core.children import command_of_module
from dit_runtime.core.errors import BuildError, OutputError
from dit_runtime.core.progress import Progress

pytest.importorskip("tensorrt_rtx")

CODE = "import sys; sys.argv[0] = 'dit-build'; from dit_engines.command import main; main(sys.argv[1:])"
CAP_DAC_OVERRIDE, PR_CAPBSET_DROP = 1, 24  # linux/capability.h, linux/prctl.h


@pytest.fixture(scope="module")
def bundle(bundles: dict[str, Path]) -> Bundle:
    return open_bundle(bundles["fp16"])


@pytest.fixture(scope="module")
def report(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """An engine that the command built, as it tells of it; its store is for reading."""
    store = tmp_path_factory.mktemp("engines")
    done = run_command("dit-build", bundle.path, "--target", "rtx", "--store", store, "--json")
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    return json.loads(done.stdout)


@pytest.fixture
def engine(report: dict[str, Any]) -> BuiltEngine:
    found = find_engine(Path(report["folder"]), recipe_for("rtx", "8.9", 4, (1, 2), 1024))
    assert found is not None
    return found


@pytest.fixture
def host() -> BuildHost:
    return build_host_for("rtx")


def copied(engine: BuiltEngine, store: Path) -> Path:
    store.mkdir(parents=True, exist_ok=True)
    return Path(shutil.copytree(engine.folder, store / engine.folder.name))


def test_the_command_builds_and_audits(bundle: Bundle, report: dict[str, Any]) -> None:
    """All graphs compile; every attention is fused in both guidance profiles; weights are stored once; TF32 is off."""
    graphs = {graph["graph"]: graph for graph in report["graphs"]}
    assert set(graphs) == {"conditioner", "step", "decoder"}
    step = graphs["step"]["audit"]
    assert [profile["fused_attention"] for profile in step["profiles"]] == [2, 2]
    assert [profile["kernels"] for profile in step["profiles"]] == [21, 21]  # 8 a block, and 5
    assert [profile["synchronizations"] for profile in step["profiles"]] == [0, 0]
    assert all(profile["activation_bytes"] > 0 for profile in step["profiles"])
    assert report["notes"] == []  # the datatype of every product was read
    assert report["doubts"] == []
    for graph in graphs.values():
        for profile in graph["audit"]["profiles"]:
            assert profile["known_share"] == 1
            assert profile["multiplied"].keys() == {"Half"}
            assert profile["largest"][0]["share"] > 0.05
    onnx_bytes = bundle.manifest.files["graphs/step.weights"].bytes
    assert 0.9 * onnx_bytes < step["weights_bytes"] < 1.1 * onnx_bytes
    folder = Path(report["folder"])
    assert {path.name for path in folder.iterdir()} == {
        *(f"{name}.{kind}" for name in graphs for kind in ("plan", "log")),
        "engine.json",
    }
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]  # no lock, nothing temporary
    assert read_sidecar(folder)["tf32"] is False
    assert report["explanation"] == ["no engine in the store"]
    assert report["memory_bytes"] > sum(graphs[name]["weights_bytes"] for name in ("step", "decoder"))


@pytest.mark.slow  # a build of RTX, and an export
def test_bf16_is_built_as_bf16(tiny_bundle: Callable[[str], Path], tmp_path: Path) -> None:
    """All products of conditioner and step are BF16 but those of the first and last layer; the decoder's are FP16."""
    done = run_command(
        *("dit-build", tiny_bundle("bf16"), "--target", "rtx-30", "--batch", "1", "--branches", "2", "--json"),
        *("--store", tmp_path),
    )
    assert done.returncode == 0, done.stderr
    for graph in json.loads(done.stdout)["graphs"]:
        (profile,) = graph["audit"]["profiles"]
        assert set(profile["multiplied"]) == {"Half" if graph["graph"] == "decoder" else "BFloat16"}
        assert profile["fused_attention"] == (2 if graph["graph"] == "step" else 0)
        assert profile["known_share"] == 1


@pytest.mark.slow  # a build of RTX, and an export
def test_fp8_is_built_as_fp8(tiny_bundle: Callable[[str], Path], tmp_path: Path) -> None:
    """As INT8; for a GPU without FP8 the bundle is refused before a device is asked for."""
    bundle = tiny_bundle("fp8")
    refused = run_command("dit-build", bundle, "--target", "orin-nano", "--store", tmp_path)
    assert refused.returncode == 1
    assert (
        "sm_87 does not multiply FP8, which takes sm_89 or later; export the checkpoint with --int8" in refused.stderr
    )
    done = run_command(
        "dit-build", bundle, "--target", "rtx-40", "--batch", "1", "--branches", "2", "--store", tmp_path, "--json"
    )
    assert done.returncode == 0, done.stderr
    (step,) = (graph for graph in json.loads(done.stdout)["graphs"] if graph["graph"] == "step")
    (profile,) = step["audit"]["profiles"]
    assert set(profile["quantized"]) == {"FP8"}
    assert (profile["fused_attention"], profile["quantizing"]) == (2, 0)
    assert profile["fp8_share"] > 0.9  # measured on the demo model: 0.980


@pytest.mark.slow  # a build of RTX, and an export
def test_int8_is_built_as_int8(int8_bundle: Path, tmp_path: Path) -> None:
    """The builder multiplies INT8 in every quantized layer, fuses all attentions, and rounds in no other kernel."""
    done = run_command(
        "dit-build", int8_bundle, "--target", "rtx", "--batch", "1", "--branches", "2", "--store", tmp_path, "--json"
    )
    assert done.returncode == 0, done.stderr
    (step,) = (graph for graph in json.loads(done.stdout)["graphs"] if graph["graph"] == "step")
    for profile in step["audit"]["profiles"]:
        assert set(profile["quantized"]) == {"Int8"}
        assert (profile["fused_attention"], profile["quantizing"]) == (2, 0)
        assert profile["int8_share"] > 0.9  # measured: 0.937


def test_the_runtime_reads_what_was_built(bundle: Bundle, report: dict[str, Any], host: BuildHost) -> None:
    """The reader finds the engine, checks its plans, and has the shapes and memory that were built."""
    (found,) = read_engines(bundle, Path(report["folder"]).parent)
    found.check_device("tensorrt_rtx", host.version, "8.9", "NVIDIA GeForce RTX 4090")
    recipe = recipe_for("rtx", "8.9", 4, (1, 2), 1024)
    for name, graph in found.graphs.items():
        assert found.find_plan(name).stat().st_size == graph.plan_bytes
        assert list(graph.profiles) == profiles_of(bundle.manifest.graphs[name], recipe, bundle.manifest)
    assert (found.image_size, found.gpu, found.recipe["batches"]) == ((32, 32), None, [4])


def test_a_whole_engine_is_used_again(bundle: Bundle, report: dict[str, Any]) -> None:
    """The same build is found, and said to be; another batch is not it."""
    store = Path(report["folder"]).parent
    again = run_command("dit-build", bundle.path, "--store", store, "--explain")
    assert again.stdout.startswith("why: nothing differs\n")
    assert "already built" in again.stdout
    assert "2 of 2" in again.stdout


def test_a_damaged_engine_is_built_again(bundle: Bundle, engine: BuiltEngine, tmp_path: Path) -> None:
    """A plan cut short, or swapped for another engine's, is not used: the engine is built again in its place."""
    folder = copied(engine, tmp_path)
    plan = folder / "step.plan"
    shutil.copyfile(folder / "decoder.plan", plan)
    assert find_engine(folder, engine.recipe) is None
    done = run_command("dit-build", bundle.path, "--store", tmp_path, "--explain", "--json")
    found = json.loads(done.stdout)
    assert (found["reused"], found["folder"]) == (False, str(folder))
    assert "its plans or its sidecar are damaged" in found["explanation"][0]
    assert find_engine(folder, engine.recipe) is not None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"host": {"version": "1.8.0"}}, "TensorRT: {version} → 1.8.0"),
        ({"host": {"gpu": "NVIDIA L4", "driver": "580"}}, "GPU: none → NVIDIA L4; driver: none → 580"),
        ({"recipe": {"auxiliary_streams": 0}}, "auxiliary streams: none → 0"),
        ({"recipe": {"workspace_bytes": 1 << 30}}, "workspace bytes: 4294967296 → 1073741824"),
        ({"timing_cache": "a" * 64}, "timing cache: none → aaaaaaaaaaaa…"),
    ],
)
def test_explain_names_the_field(
    bundle: Bundle, engine: BuiltEngine, host: BuildHost, change: dict[str, Any], reason: str
) -> None:
    """Whatever differs from the nearest engine is named, with both values."""
    identity = identity_of(
        bundle,
        replace(engine.recipe, **change.get("recipe", {})),
        replace(host, **change.get("host", {})),
        graphs_of(bundle),
        change.get("timing_cache"),
    )
    assert "; ".join(explain_rebuild(engine.folder.parent, identity)) == reason.format(version=host.version)


def test_explain_names_the_file(bundle: Bundle, bundles: dict[str, Path], engine: BuiltEngine, host: BuildHost) -> None:
    """Other weights are told apart from other graphs, by the content of the files."""
    other = open_bundle(bundles["fp32"])
    reasons = explain_rebuild(engine.folder.parent, identity_of(other, engine.recipe, host, graphs_of(other), None))
    assert {reason.partition(":")[0] for reason in reasons} == {
        f"{graph} {what}" for graph in ("conditioner", "step", "decoder") for what in ("ONNX", "weights")
    }
    assert reasons != explain_rebuild(engine.folder.parent, identity_of(bundle, engine.recipe, host, ["step"], None))


def test_the_same_graphs_in_another_export(bundle: Bundle, engine: BuiltEngine, tmp_path: Path) -> None:
    """A bundle that differs in its golden records alone takes the plans over, without a build, and both stay usable."""
    path = Path(shutil.copytree(bundle.path, tmp_path / "b", ignore=shutil.ignore_patterns("engines")))
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["producer"]["note"] = "another day"
    (path / "manifest.json").write_text(json.dumps(manifest))
    other = open_bundle(path)
    store = tmp_path / "store"
    copied(engine, store)
    start = time.monotonic()
    found = engine_from_bundle(other, engine.recipe, store)
    assert time.monotonic() - start < 1  # measured: 0.05 s
    assert found.reused
    assert found.folder.name != engine.folder.name
    assert "the same plans" in found.explanation[0]
    assert [len(read_engines(item, store)) for item in (bundle, other)] == [1, 1]
    assert read_engines(other, store)[0].find_plan("step").is_file()


def test_fp32_declared_fp16_fails(bundles: dict[str, Path], tmp_path: Path) -> None:
    """An FP32 graph whose manifest says FP16 is caught by the audit and not stored."""
    path = Path(shutil.copytree(bundles["fp32"], tmp_path / "liar", ignore=shutil.ignore_patterns("engines")))
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["precision"] = {"name": "fp16", "keep_fp32": ["patch_embed", "final"]}
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(
        BuildError, match=r"conditioner, profile 0: 0\.0% of the multiply-adds are FP16, expected at least 99%"
    ):
        engine_from_bundle(open_bundle(path), recipe_for("rtx", "8.9", 2, (1, 2), 64), tmp_path / "store")
    assert not list((tmp_path / "store").glob("*/engine.json"))


def test_fp32_queries_fail(bundles: dict[str, Path], tmp_path: Path) -> None:
    """Attention products in FP32 inside an FP16 graph are not fused, and the audit counts them."""
    path = Path(shutil.copytree(bundles["fp16"], tmp_path / "fp32-qkv", ignore=shutil.ignore_patterns("engines")))

    def change(graph: onnx.GraphProto) -> None:
        nodes = list(graph.node)
        for node in nodes:
            if node.name == "blocks.1.attn/MatMul":
                casts = []
                for index, name in enumerate(list(node.input)):
                    casts.append(onnx.helper.make_node("Cast", [name], [f"{name}_fp32"], to=onnx.TensorProto.FLOAT))
                    node.input[index] = f"{name}_fp32"
                position = list(graph.node).index(node)
                for cast in casts:
                    graph.node.insert(position, cast)
            if node.name == "blocks.1.attn/Cast":  # scores are FP32 already
                node.op_type = "Identity"
                del node.attribute[:]
        del graph.value_info[:]

    edit_graph(path, "step", change)
    with pytest.raises(BuildError, match=r"1 of 2 attentions fused.* what the builder said is in .*\.refused"):
        engine_from_bundle(signed(path), recipe_for("rtx", "8.9", 2, (1, 2), 64), tmp_path / "store")
    (kept,) = (tmp_path / "store").iterdir()
    assert {path.name for path in kept.iterdir()} == {"conditioner.log", "step.log"}
    assert "_gemm_mha" in (kept / "step.log").read_text()


def pretend_tensorrt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put ``fake_tensorrt`` in TensorRT's place, for this process and the builders that it starts."""
    library = tmp_path / "library"
    library.mkdir()
    shutil.copyfile(Path(__file__).parents[1] / "support" / "fake_tensorrt.py", library / "tensorrt.py")
    monkeypatch.setattr(sys, "path", [os.fspath(library), *sys.path])  # a builder has its parent's


def test_on_a_device(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT on its GPU (a double of both): one profile, audited through the inspector, tied to GPU and driver."""
    pretend_tensorrt(tmp_path, monkeypatch)
    host = BuildHost("tensorrt", "10.3.0", "8.9", "NVIDIA L4", "580.1", 24 * 10**9)
    recipe = recipe_for("l4", None, 1, (1, 2), 64, version=host.numbers)
    monkeypatch.setenv("DUMMY_ATTENTIONS", "2")
    built = engine_from_bundle(bundle, recipe, tmp_path / "store", host)
    assert [graph.audit.profiles[0].activation_bytes for graph in built.graphs] == [4096] * 3  # the engine's own answer
    assert all(graph.audit.profiles[0].known_share == 1 for graph in built.graphs)
    (stored,) = read_engines(bundle, tmp_path / "store")
    assert (stored.gpu, stored.driver, stored.version) == ("NVIDIA L4", "580.1", "10.3.0")
    later = replace(host, driver="590.2")
    assert explain_rebuild(tmp_path / "store", identity_of(bundle, recipe, later, graphs_of(bundle), None)) == (
        "driver: 580.1 → 590.2",
    )
    assert find_timing_cache(tmp_path / "store", host) == built.folder / TIMING_CACHE
    assert find_timing_cache(tmp_path / "store", later) is None
    assert [graph.doubts for graph in built.graphs] == [()] * 3
    layers = json.loads((built.folder / "step.layers.json").read_text())
    assert layers["Layers"][0]["Name"] == "all"


def test_a_doubt_on_a_device_is_stored(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT may leave an attention unfused: the engine is stored, the doubt is told, also when it is used again."""
    pretend_tensorrt(tmp_path, monkeypatch)
    host = BuildHost("tensorrt", "10.3.0", "8.9", "NVIDIA L4", "580.1", 24 * 10**9)
    recipe = recipe_for("l4", None, 1, (1, 2), 64, version=host.numbers)
    monkeypatch.setenv("DUMMY_ATTENTIONS", "1")
    for reused in (False, True):
        built = engine_from_bundle(bundle, recipe, tmp_path / "store", host)
        assert built.reused == reused
        assert as_json(built)["doubts"] == ["step, profile 0: 1 of 2 attentions fused"]


def test_a_gpu_without_int8(int8_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An INT8 bundle on a GPU that does not multiply INT8 is refused in one line, which names FP16."""
    pretend_tensorrt(tmp_path, monkeypatch)
    host = BuildHost("tensorrt", "10.3.0", "8.9", "NVIDIA L4", "580.1", 24 * 10**9)
    recipe = recipe_for("l4", None, 1, (1,), 64, version=host.numbers)
    monkeypatch.setenv("DUMMY_WITHOUT_INT8", "1")
    with pytest.raises(BuildError) as raised:
        engine_from_bundle(open_bundle(int8_bundle), recipe, tmp_path / "store", host)
    said, _, _ = str(raised.value).partition("; what the builder said")
    assert said == (
        f"{int8_bundle}: tensorrt 10.3.0: the GPU here does not multiply INT8; build the checkpoint's export with "
        "--fp16"
    )


@pytest.mark.slow  # a build of RTX
def test_int8_on_a_device_that_chose_fp16(int8_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The network is strongly typed, or the double would not build it; products that are not INT8 are told."""
    pretend_tensorrt(tmp_path, monkeypatch)
    monkeypatch.setenv("DUMMY_ATTENTIONS", "2")
    host = BuildHost("tensorrt", "10.3.0", "8.9", "NVIDIA L4", "580.1", 24 * 10**9)
    recipe = recipe_for("l4", None, 1, (1,), 64, version=host.numbers)
    built = engine_from_bundle(open_bundle(int8_bundle), recipe, tmp_path / "store", host)
    (step,) = (graph for graph in built.graphs if graph.graph == "step")
    assert step.doubts == (
        "step, profile 0: 0.0% of the quantized layers' multiply-adds are INT8, expected at least 99%",
    )


def test_the_timing_cache_is_pinned(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next build begins with the last one's cache while it has its digest; one that cannot be read is an error."""
    pretend_tensorrt(tmp_path, monkeypatch)
    monkeypatch.setenv("DUMMY_ATTENTIONS", "2")
    host = BuildHost("tensorrt", "10.3.0", "8.9", "NVIDIA L4", "580.1", 24 * 10**9)
    recipe = recipe_for("l4", None, 1, (1,), 64, version=host.numbers)
    store = tmp_path / "store"
    folder = engine_from_bundle(bundle, recipe, store, host).folder
    assert find_timing_cache(store, host) == folder / TIMING_CACHE
    (folder / TIMING_CACHE).write_bytes(b"altered")
    assert find_timing_cache(store, host) is None
    with pytest.raises(BuildError, match=r"not a timing cache \(cannot be read \(No such file"):
        engine_from_bundle(bundle, recipe, store, host, tmp_path / "none")


def test_rtx_takes_no_timing_cache(bundle: Bundle, engine: BuiltEngine, host: BuildHost, tmp_path: Path) -> None:
    """TensorRT-RTX times no kernels: it leaves no cache, and one that is named is refused."""
    assert engine.timing_cache is None
    assert not (engine.folder / TIMING_CACHE).exists()
    assert find_timing_cache(engine.folder.parent, host) is None
    with pytest.raises(BuildError, match="a timing cache with tensorrt_rtx, which times no kernels; leave --timing"):
        engine_from_bundle(bundle, engine.recipe, tmp_path, host, engine.folder / "step.log")


def test_rtx_plans_need_no_memory_of_their_own(bundle: Bundle, engine: BuiltEngine, host: BuildHost) -> None:
    """The flag that lets a CUDA graph capture a plan of TensorRT-RTX is set, and decides which engine it is."""
    fields = identity_of(bundle, engine.recipe, host, graphs_of(bundle), None)
    assert fields["builder flags"] == ["REQUIRE_USER_ALLOCATION"]
    assert read_sidecar(engine.folder)["identity"]["builder flags"] == ["REQUIRE_USER_ALLOCATION"]


def test_repeated_builds_are_compared(bundle: Bundle) -> None:
    """``--repeat`` builds each time anew, keeps nothing, and has a figure of each build."""
    before = sorted(bundle.path.rglob("*"))
    done = run_command("dit-build", bundle.path, "--repeat", "2", "--batch", "1", "--branches", "2", "--json")
    assert done.returncode == 0, done.stderr
    spread = json.loads(done.stdout)
    print(spread)
    assert (spread["builds"], spread["on_device"]) == (2, None)
    step = next(graph for graph in spread["graphs"] if graph["graph"] == "step")
    assert [len(step[name]) for name in ("seconds", "plan_bytes", "kernels", "fused_attention")] == [2] * 4
    assert step["fused_attention"] == [[2], [2]]
    assert 1 <= step["distinct_plans"] <= 2
    assert sorted(bundle.path.rglob("*")) == before


def test_repeated_builds_are_measured_on_a_gpu(
    bundle: Bundle, engine: BuiltEngine, host: BuildHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a GPU built the plans it runs them: an engine is opened, its forwards and times count, it is closed."""
    seen: list[Any] = []

    class Opened:
        def __init__(self, bundle: Bundle, stored: StoredEngine, *_: Any) -> None:
            seen.append((stored.gpu, stored.find_plan("step").name))

        def close(self) -> None:
            seen.append("closed")

    rungs = [
        SimpleNamespace(name=name, value=value)
        for name, value in (("forward G=1", 1), ("forward G=2", 3), ("image", 9))
    ]
    monkeypatch.setattr("dit_engines.repeat.TensorRtEngine", Opened)
    monkeypatch.setattr("dit_engines.repeat.CudaRuntime", lambda: None)
    monkeypatch.setattr("dit_engines.repeat.verification_of", lambda *_, **__: SimpleNamespace(rungs=rungs))
    times = {GUIDED: 2.5, PLAIN: 1.5, DECODER: 4.0}
    parts = {name: SimpleNamespace(p50_ms=value) for name, value in times.items()}
    monkeypatch.setattr("dit_engines.repeat.time_parts", lambda *_: parts)
    assert measure_on_gpu(bundle, engine.recipe, host) is None
    measured = measure_on_gpu(bundle, engine.recipe, replace(host, gpu="NVIDIA L4", driver="580"))
    assert measured is not None
    folder = copied(engine, tmp_path)
    assert measured(folder, engine.graphs) == OnDevice(3, 2.5, 4.0)
    assert seen == [("NVIDIA L4", "step.plan"), "closed"]
    del parts[GUIDED]  # an engine without guidance
    assert measured(folder, engine.graphs).step_ms == 1.5


def test_the_estimate_before_the_build(bundle: Bundle, engine: BuiltEngine) -> None:
    """The preflight's estimate from the ONNX is about what the builder then says, for each profile."""
    built = stored_graphs_from_built(engine.graphs)
    for name, guess in estimate_graphs(bundle, engine.recipe, graphs_of(bundle)).items():
        for index, (estimated, taken) in enumerate(
            zip(guess.activation_bytes, built[name].activation_bytes, strict=True)
        ):
            print(f"{name}, profile {index}: estimated {estimated}, taken {taken}")
            assert 0.9 < estimated / taken < 1.1  # measured: 0.97 (decoder) to 1.02; of DiT-XL/2-256 0.99 to 1.40


def command(*argv: str | Path, **options: Any) -> subprocess.Popen[str]:
    words = [sys.executable, "-c", CODE, *map(str, argv)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def builder_of(process: subprocess.Popen[str]) -> int:
    """The process that compiles for ``process``, once it is there."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        if children:
            return int(children[0])
        time.sleep(0.02)
    raise AssertionError("no builder process")


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except OSError:
        return False


def test_two_builds_at_once(bundle: Bundle, tmp_path: Path) -> None:
    """Of two real processes one builds; the other says that it waits, and uses what the first one built."""
    argv = (bundle.path, "--store", tmp_path, "--batch", "1", "--branches", "2")
    processes = [command(*argv), command(*argv)]
    results = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], results
    (waiting,) = [errors for _, errors in results if errors]
    assert waiting.startswith("dit-build: another process builds rtx-sm89-")
    assert len(waiting.splitlines()) == 1
    assert sorted("already built" in output for output, _ in results) == [False, True]
    assert len(list(tmp_path.iterdir())) == 1  # one engine, no lock


def test_the_lock(tmp_path: Path) -> None:
    """One at a time, however often the lock's file comes and goes; an interrupt ends the waiting; nothing stays."""
    code = """
import sys, time
from pathlib import Path
from dit_engines.engine_store import lock_store

folder, inside = Path(sys.argv[1]) / "engine", Path(sys.argv[1]) / "inside"
for _ in range(20):
    with lock_store(folder, lambda line: None):
        inside.touch(exist_ok=False)
        time.sleep(0.001)
        inside.unlink()
"""
    words = [sys.executable, "-c", code, str(tmp_path)]
    processes = [subprocess.Popen(words, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    results = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * 4, results
    assert list(tmp_path.iterdir()) == []
    said: list[str] = []
    with lock_store(tmp_path / "engine", said.append):
        waiting = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
        time.sleep(1)
        waiting.send_signal(signal.SIGINT)
        _, errors = waiting.communicate(timeout=10)
        assert "KeyboardInterrupt" in errors
        assert [path.name for path in tmp_path.iterdir()] == [".engine.lock"]
    assert said == []


@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir], ids=["pipe", "folder"])
def test_no_plain_file_in_the_place_of_the_lock(tmp_path: Path, make: Callable[[Path], None]) -> None:
    """A lock that is no file is refused at once, and left as it is."""
    make(tmp_path / ".engine.lock")
    with pytest.raises(OutputError, match="link or no plain file"), lock_store(tmp_path / "engine", print):
        pass
    assert [path.name for path in tmp_path.iterdir()] == [".engine.lock"]


def test_a_link_in_the_place_of_the_lock(tmp_path: Path) -> None:
    """Who may write to the store cannot have the lock empty a file elsewhere."""
    precious = tmp_path / "precious"
    precious.write_text("precious")
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / ".engine.lock").symlink_to(precious)
    with (
        pytest.raises(OutputError, match=r"store: cannot be written \(.*; choose another --store"),
        lock_store(tmp_path / "store" / "engine", print),
    ):
        pass
    assert precious.read_text() == "precious"


def test_ctrl_c_leaves_nothing(bundle: Bundle, engine: BuiltEngine, tmp_path: Path) -> None:
    """Interrupted while it compiles: exit 130, the compiler is gone, the store has the old engine and nothing else."""
    copied(engine, tmp_path)
    process = command(bundle.path, "--store", tmp_path, "--batch", "8")
    builder = builder_of(process)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    start = time.monotonic()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert time.monotonic() - start < CANCEL_SECONDS  # measured: 0.3 s; it was not killed
    assert errors == ""
    assert not alive(builder)
    assert [path.name for path in tmp_path.iterdir()] == [engine.folder.name]
    assert find_engine(tmp_path / engine.folder.name, engine.recipe) is not None


def test_the_builder_sees_the_cancellation(bundle: Bundle, tmp_path: Path) -> None:
    """The end of its stdin reaches the builder through the progress monitor: it ends by itself, without a plan."""
    recipe = recipe_for("rtx", "8.9", 4, (1, 2), 64)
    request = {
        "library": "tensorrt_rtx",
        "onnx": os.fspath(bundle.graph("step")),
        "plan": os.fspath(tmp_path / "step.plan"),
        "profiles": profiles_of(bundle.manifest.graphs["step"], recipe, bundle.manifest),
        "compute_capability": "8.9",
        "workspace_bytes": 1 << 30,
        "optimization_level": None,
        "auxiliary_streams": None,
        "tactic_bytes": None,
        "timing_cache": None,
        "timing_cache_out": os.fspath(tmp_path / "timing.cache"),
        "log": os.fspath(tmp_path / "step.log"),
        "layers": os.fspath(tmp_path / "step.layers.json"),
        "keep_fp32": [],
        "quantized": [],
    }
    done = subprocess.run(
        command_of_module("dit_engines.worker"),
        input=json.dumps(request) + "\n",
        capture_output=True,
        text=True,
        timeout=60,
    )
    *progress, last = map(json.loads, done.stdout.splitlines())
    assert done.returncode == 1
    assert "cannot be built (cancelled)" in last["error"]
    assert len(progress) <= 1
    assert [path.name for path in tmp_path.iterdir()] == ["step.log"]


def test_a_builder_that_dies(bundle: Bundle, tmp_path: Path) -> None:
    """A compiler that the kernel ends, for want of memory most often, is one line and leaves nothing."""
    process = command(bundle.path, "--store", tmp_path)
    os.kill(builder_of(process), signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert (
        "the builder process ended with -9, most likely for want of memory; end other programs, or build with a"
        in errors
    )
    assert len(errors.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_builder_that_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that does not even read its request is an exit code, not a broken pipe."""
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert _run_worker({"more than a pipe holds": "x" * 200_000}, Progress("building", 1)) == ({}, 1, "")


def test_a_full_disk(bundle: Bundle, engine: BuiltEngine, tmp_path: Path) -> None:
    """No room for a plan (here by a limit on file sizes) is one line with the reason; the old engine stays usable."""
    copied(engine, tmp_path)
    limit = 100_000

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    done = run_process("dit-build", bundle.path, "--store", tmp_path, "--batch", "8", preexec_fn=limited)
    assert done.returncode == 1
    assert done.stderr == (
        f"dit-build: {tmp_path}: the conditioner's plan cannot be written (File too large); free some space, or choose "
        "another --store\n"
    )
    assert [path.name for path in tmp_path.iterdir()] == [engine.folder.name]
    assert find_engine(tmp_path / engine.folder.name, engine.recipe) is not None


def test_a_read_only_store(bundle: Bundle, engine: BuiltEngine, tmp_path: Path) -> None:
    """A store that cannot be written is one line before the build; what is built there already can be used."""
    store = tmp_path / "store"
    copied(engine, store)
    store.chmod(0o555)

    def unprivileged() -> None:  # even root obeys permissions without this capability
        ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, 0, 0, 0)

    try:
        done = run_process("dit-build", bundle.path, "--store", store, "--batch", "8", preexec_fn=unprivileged)
        assert done.returncode == 1
        assert done.stderr.strip().endswith(f"{store} cannot be written to; choose another --store")
        assert len(done.stderr.strip().splitlines()) == 1
        again = run_process("dit-build", bundle.path, "--store", store, preexec_fn=unprivileged)
        assert again.returncode == 0, again.stderr
        assert "already built" in again.stdout
    finally:
        store.chmod(0o755)


def test_no_library(bundle: Bundle) -> None:
    """Without TensorRT-RTX the error is the pip line; a device's target says where to go."""
    code = f"import sys; sys.modules['tensorrt_rtx'] = None; {CODE}"
    done = subprocess.run([sys.executable, "-c", code, bundle.path], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == ("dit-build: tensorrt_rtx is not installed for this Python; pip install 'dit-export[rtx]'\n")


def test_tf32_is_refused(bundle: Bundle, host: BuildHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A builder that kept TF32 on, against its orders, is not trusted with FP32."""
    answer = {"result": {"tf32": True, "plan_bytes": 1, "audit": {"weights_bytes": 1, "profiles": []}}}
    monkeypatch.setattr("dit_engines.compile._run_worker", lambda *_: (answer, 0, ""))
    with pytest.raises(BuildError, match="the builder left TF32 on, which FP32 parity does not allow"):
        engine_from_bundle(bundle, recipe_for("rtx", "8.9", 1, (1,), 64), tmp_path, host)
    assert list(tmp_path.iterdir()) == []


def test_a_store_that_is_removed_while_an_engine_is_built(tmp_path: Path) -> None:
    """One line that says so; it is no fault of ours."""
    with pytest.raises(OutputError, match=r"step\.plan: .*removed or replaced meanwhile; run dit-build again"):
        digest_of_written(tmp_path / "step.plan")
