"""The stand-in for TensorRT that runs on a GPU with torch: here on the double's memory, against ONNX Runtime."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="the stand-in computes with torch")
pytest.importorskip("onnx", reason="the stand-in reads graphs with onnx")

import onnxruntime
import torch
from support import cuda_check, hollow
from support.grids import grid
from support.onnx_on_torch import Network

from dit_runtime import Pipeline, open_bundle
from dit_runtime.backends.profiles import shapes_of_tensors
from dit_runtime.backends.tensorrt.loop import DeviceLoop
from dit_runtime.bundle.manifest import GraphSpec

# Largest difference over the largest value, and what was measured: FP32 1.4e-6; FP16 against arithmetic in FP32 1.6e-3.
LIMITS = {"fp32": 5e-6, "fp16-encoder": 5e-3}
FAST = ("cuda", "look-ahead", "collection", "memory")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Threads take longer to meet than these tensors to be computed."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def inputs_of(graph: GraphSpec) -> dict[str, np.ndarray]:
    """Random inputs: three images, two branches, five rows."""
    rng = np.random.default_rng(0)
    sizes = {"batch": 3, "branches": 2, "rows": 5, "height": 8, "width": 8, "image_height": 32, "image_width": 32}
    shapes = shapes_of_tensors(graph.inputs, sizes)
    inputs = {}
    for tensor in graph.inputs:
        if tensor.dtype.startswith("float"):
            inputs[tensor.name] = (rng.standard_normal(shapes[tensor.name]) / 2).astype(tensor.dtype)
        else:
            most = 256 if tensor.dtype == "uint8" else 5
            inputs[tensor.name] = rng.integers(0, most, shapes[tensor.name]).astype(tensor.dtype)
    return inputs


@pytest.mark.parametrize("name", grid(LIMITS, fast=lambda name: name != "fp16-encoder"))  # which is another export
def test_the_interpreter_is_onnxruntime(tiny_bundle: Callable[[str], Path], name: str) -> None:
    """Every graph that a device runs gives ONNX Runtime's outputs."""
    bundle = open_bundle(tiny_bundle(name))
    graphs = {graph: spec for graph, spec in bundle.manifest.graphs.items() if graph != "probe"}
    assert ("encoder" in graphs) == (name == "fp16-encoder")
    for graph, spec in graphs.items():
        inputs, path = inputs_of(spec), bundle.graph(graph)
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        expected = session.run([output.name for output in spec.outputs], inputs)
        with torch.inference_mode():
            found = Network(path, "cpu").run({name: torch.from_numpy(value) for name, value in inputs.items()})
        for output, reference in zip(spec.outputs, expected, strict=True):
            value = found[output.name].numpy()
            assert (value.dtype, value.shape) == (reference.dtype, reference.shape)
            if value.dtype == np.uint8:
                assert np.abs(value.astype(int) - reference).max() <= 1, graph
            else:
                scale = np.abs(reference.astype(float)).max()
                assert np.abs(value.astype(float) - reference).max() <= LIMITS[name] * scale, graph


def run(bundle: Path, folder: Path, names: tuple[str, ...], patch: pytest.MonkeyPatch) -> dict[str, str]:
    """What each check says on the double."""
    patch.setattr(cuda_check, "CHECKS", {name: (cuda_check.CHECKS[name][0], 1.0) for name in names})
    file = folder / "check.json"
    cuda_check.run_checks([bundle], 300, True, lambda results: cuda_check.show(results, file))
    checks = json.loads(file.read_text())["checks"]
    assert all(entry.keys() >= {"check", "result", "seconds"} for entry in checks)
    return {entry["check"]: entry["result"] for entry in checks}


def test_the_checks_of_a_device(bundles: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fast ones pass on the double, and fail where the loop is wrong; those before and after go on."""
    passed = dict.fromkeys(("environment", "opening", *FAST), "PASS")
    assert run(bundles["fp32"], tmp_path, FAST, monkeypatch) == passed
    read = DeviceLoop.read

    def wrong(self: DeviceLoop, count: int, number: int) -> Any:
        self._device.cuda.clear(self._at["state"], 4, self._device.stream)
        return read(self, count, number)

    monkeypatch.setattr(DeviceLoop, "read", wrong)
    found = run(bundles["fp32"], tmp_path, ("cuda", "look-ahead", "memory"), monkeypatch)
    assert {name for name, result in found.items() if result == "FAIL"} == {"look-ahead"}


def test_a_hollow_bundle_is_filled_and_timed(
    bundles: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without weights, and with others of the same shapes, which the runtime opens; only its speed is asked for."""
    hollow.empty(bundles["fp16"], tmp_path / "hollow")
    assert not list((tmp_path / "hollow").rglob("*.weights"))
    entries: list[dict[str, Any]] = []
    monkeypatch.setattr(cuda_check, "CHECKS", {name: cuda_check.CHECKS[name] for name in ("cuda", "speed")})
    cuda_check.run_checks(
        [bundles["fp16"]], 300, True, lambda results: entries.append(results["checks"][-1]), tmp_path / "hollow"
    )
    of_it = {entry["check"]: entry["result"] for entry in entries if entry["bundle"] == "hollow"}
    assert of_it == {"filling": "PASS", "speed": "PASS"}
    filled = hollow.fill(tmp_path / "hollow", tmp_path / "filled")
    assert (filled / "graphs/step.weights").stat().st_size == (bundles["fp16"] / "graphs/step.weights").stat().st_size
    pipe = Pipeline(filled, "onnxruntime", threads=1)
    assert np.isfinite(pipe.sample_latents(pipe.prepare([1], 0, steps=2))).all()


@pytest.mark.slow  # 84 comparisons and a whole verification, on one core
def test_all_checks_of_a_device(bundles: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All pass on the double; there is no CUDA here."""
    names = tuple(name for name in cuda_check.CHECKS if name not in FAST)
    found = run(bundles["fp32"], tmp_path, names, monkeypatch)
    assert (found.pop("onnxruntime-cuda"), found.pop("sanitizer")) == ("SKIP", "SKIP")
    assert set(found.values()) == {"PASS"}
