"""``make gpu-test`` without a GPU: its tests run on the double, and what it finds is kept however it ends."""

from __future__ import annotations

import importlib.util
import inspect
import json
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from support import first_run
from support.cuda_double import Machine, stored_on
from support.first_run import Run, main, pack, scrub

from dit_engines.recipe import Recipe
from dit_runtime import open_bundle
from dit_runtime.backends.tensorrt import cuda
from dit_runtime.core.errors import EngineError

ELSEWHERE = {"test_the_bundles_own_records"}  # test_device runs the same on the double


@pytest.fixture
def gpu_tests(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_tests", Path(__file__).with_name("test_gpu.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_tests", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "TIMED_STEPS", 3)
    return module


def test_the_tests_of_a_gpu(
    gpu_tests: ModuleType, bundles: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All pass on the double, where nothing but the device is missing; the times of a step are written down."""
    monkeypatch.setenv("DIT_GPU_REPORT", str(tmp_path))
    machine, bundle = Machine(), open_bundle(bundles["fp32"])
    stored = stored_on(machine, bundle, tmp_path / "plans", Recipe("this", "8.7", (1, 4), (1, 2, 3), 128))
    device, ran = gpu_tests.Device(machine.library, bundle, stored, machine.cuda), 0
    for name, test in vars(gpu_tests).items():
        if name.startswith("test_") and name not in ELSEWHERE:
            wanted = inspect.signature(test).parameters
            for settings in gpu_tests.SETTINGS if "settings" in wanted else (None,):
                with device.engine() as engine:
                    (folder := tmp_path / f"{name} {settings}").mkdir()
                    have = {"device": device, "engine": engine, "settings": settings, "tmp_path": folder}
                    test(**{key: have[key] for key in wanted})
                ran += 1
    assert ran >= 10
    machine.check_closed()
    times = json.loads((tmp_path / "speed-fp32.json").read_text())
    assert times["batch 1, guided"].keys() >= {"step_p50_ms", "step_p95_ms", "host_us", "launch_gap_us"}
    assert "graph_ms" not in times["batch 1, guided, without CUDA graphs"]
    assert np.all([value["step_p95_ms"] >= value["step_p50_ms"] for value in times.values()])
    assert "launch gap" in "".join(first_run.speed_lines(tmp_path))


def test_a_machine_without_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It fails, never green without an engine, and the environment is there."""

    def missing() -> None:
        raise EngineError("no NVIDIA driver that works here")

    monkeypatch.setattr(cuda, "read_device", missing)
    assert main(["--output", str(tmp_path / "report")]) == 1
    assert "FAIL" in capsys.readouterr().out
    environment = json.loads((tmp_path / "report" / "environment.json").read_text())
    assert environment["gpu"] == "no NVIDIA driver that works here"
    assert environment["packages"]["numpy"] == np.__version__
    (stage,) = json.loads((tmp_path / "report" / "summary.json").read_text())
    assert "no NVIDIA driver" in stage["failure"]
    assert main(["--output", str(tmp_path / "report"), "--pack"]) == 0
    assert main(["--output", str(tmp_path / "none"), "--pack"]) == 1


def test_stages(tmp_path: Path) -> None:
    """What a child prints and its engine's texts are kept, whether it passes, fails, or has to be ended."""
    run, store = Run(tmp_path / "report", 60), tmp_path / "store"
    (store / "engine").mkdir(parents=True)
    for name in ("step.plan", "step.log", "step.layers.json"):
        (store / "engine" / name).write_text("{}")
    assert run.call("one", ["-c", "import sys; print('{}'); print('told', file=sys.stderr)", "--json"], store)
    assert not run.call("two", ["-c", "print('first'); raise SystemExit('the reason')"])
    run._end = time.monotonic() + 1
    assert not run.call("three", ["-c", "import time; print('begun'); time.sleep(60)"])
    assert not run.call("four", ["-c", "print()"])  # no time is left
    folder = tmp_path / "report"
    assert (folder / "one.json").read_text() == "{}\n"
    assert (folder / "one.log").read_text() == "told\n"
    assert sorted(path.name for path in (folder / "one" / "engine").iterdir()) == ["step.layers.json", "step.log"]
    assert (folder / "three.log").is_file()
    failures = [stage["failure"] for stage in json.loads((folder / "summary.json").read_text())]
    assert failures[0] is None
    assert failures[1] == "ended with 1: the reason"
    assert failures[2].startswith("not done after")
    assert failures[3] == "no time left"


def test_a_packed_report_names_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders, user and host are left out of the texts, and owners of the entries; plans are not packed."""
    monkeypatch.setattr(first_run.platform, "node", lambda: "ada-orin.example.org")
    monkeypatch.setattr(first_run.getpass, "getuser", lambda: "ada")
    monkeypatch.setenv("DIT_BUNDLE", "/mnt/ada/secret/my.bundle")
    text = (
        "/home/ada/plans/secret/step.plan: error; ada@ada-orin ada-orin.example.org\n"
        '{"folder": "/mnt/ada/secret/my.bundle", "name": "blocks.0/attn/Gemm", "lib": "/usr/lib/python3/x.so", '
        '"gpu": "Orin, 8 SMs"}'
    )
    report = tmp_path / "report"
    (report / "engine").mkdir(parents=True)
    (report / "engine" / "step.layers.json").write_text(text)
    (report / "step.plan").write_text("large")
    with tarfile.open(pack(report)) as archive:
        (entry,) = archive.getmembers()
        content = archive.extractfile(entry)
        assert content is not None
        packed = content.read().decode()
    assert entry.name == "report/engine/step.layers.json"
    assert (entry.uname, entry.gname, entry.uid, entry.mtime) == ("", "", 0, 0)
    for secret in ("ada", "secret", "example.org", "/home", "/mnt"):
        assert secret not in packed, secret
    for kept in ("step.plan: error", "BUNDLE", "blocks.0/attn/Gemm", "…/x.so", "Orin, 8 SMs"):
        assert kept in packed, kept
    assert str(Path.home()) == "/" or str(Path.home()) not in scrub(f"{Path.home()}/a/b/c.log")


@pytest.fixture
def hook(request: pytest.FixtureRequest) -> ModuleType:
    """tests/conftest.py."""
    plugins = request.config.pluginmanager.get_plugins()
    (found,) = (plugin for plugin in plugins if getattr(plugin, "GIVEN", "") == "DIT_TEST_BUNDLES")
    return found


@pytest.mark.parametrize(
    ("value", "marked", "outcome"), [("1", True, "failed"), ("", True, "skipped"), ("1", False, "skipped")]
)
def test_skips_are_failures(
    hook: ModuleType, monkeypatch: pytest.MonkeyPatch, value: str, marked: bool, outcome: str
) -> None:
    """``DIT_GPU=1``: a test that needs a GPU is not skipped without notice; others may be."""
    monkeypatch.setenv("DIT_GPU", value)
    report = SimpleNamespace(skipped=True, outcome="skipped", longrepr=("file", 1, "Skipped: no GPU"))
    item = SimpleNamespace(get_closest_marker=lambda name: marked and name == "gpu")
    making: Iterator[Any] = hook.pytest_runtest_makereport(item)
    next(making)
    with pytest.raises(StopIteration) as done:
        making.send(report)  # type: ignore[attr-defined]
    assert done.value.value.outcome == outcome
    assert outcome == "skipped" or "no GPU" in report.longrepr
