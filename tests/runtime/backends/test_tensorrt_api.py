"""Every attribute of TensorRT that the product touches exists in each generation of the real bindings.

The bindings are real; the libraries behind them are dummies (``dummy_library``), since TensorRT's own come with a GPU.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.commands import bindings
from support.dummy_library import write_dummy_library

import dit_runtime
from dit_runtime.backends.tensorrt import api as tensorrt_api
from dit_runtime.core.errors import EngineError

SOURCE = Path(tensorrt_api.__file__)
GENERATIONS = ["tensorrt-10.3", "tensorrt-10.16", "tensorrt-11.4", "tensorrt_rtx"]
# What the bindings import from TensorRT's libraries.
FUNCTIONS = [
    "createInferBuilder_INTERNAL",
    "createInferRefitter_INTERNAL",
    "createInferRuntime_INTERNAL",
    "createNvOnnxParser_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL",
    "getBuilderPluginRegistry",
    "getNvOnnxParserVersion",
    "getPluginRegistry",
    "initLibNvInferPlugins",
]
# Variables of tensorrt_api and what they hold.
HOLDS = {
    "builder": "Builder",
    "config": "IBuilderConfig",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "profile": "IOptimizationProfile",
    "runtime": "Runtime",
    "engine": "ICudaEngine",
    "context": "IExecutionContext",
    "inspector": "EngineInspector",
    "cache": "ITimingCache",
    "problem": "ParserError",
    "tensor": "ITensor",
    "runtime_config": "IRuntimeConfig",
}
# Ahead of time for other devices, and when kernels are compiled: RTX alone, and tensorrt_api asks for it there alone.
RTX_ALONE = {
    "DynamicShapesKernelSpecializationStrategy",
    "DynamicShapesKernelSpecializationStrategy.EAGER",
    "ICudaEngine.create_runtime_config",
    "IRuntimeConfig.dynamic_shapes_kernel_specialization_strategy",
    "IRuntimeConfig.set_execution_context_allocation_strategy",
    "ComputeCapability",
    "IBuilderConfig.num_compute_capabilities",
    "IBuilderConfig.set_compute_capability",
}
LOOKED_UP = """
import importlib, json, sys
module = importlib.import_module(sys.argv[1])
missing = []
for name, keywords in json.load(sys.stdin):
    value = module
    for part in name.split("."):
        value = getattr(value, part, None)
    if value is None or any(f"{keyword}:" not in (value.__doc__ or "") for keyword in keywords):
        missing.append([name, keywords])
print(json.dumps({"version": module.__version__, "missing": missing}))
"""


class _Touched(ast.NodeVisitor):
    """Dotted names below the library's module, with the keywords they are called with."""

    def __init__(self) -> None:
        self.names: dict[str, set[str]] = {}

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if (name := self._dotted(node)) is not None:
            self.names.setdefault(name, set())
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        if isinstance(node.func, ast.Attribute) and (name := self._dotted(node.func)) is not None:
            self.names.setdefault(name, set()).update(item.arg for item in node.keywords if item.arg)
        if isinstance(node.func, ast.Name) and node.func.id == "getattr" and isinstance(node.args[0], ast.Attribute):
            self.visit(node.args[0])
        self.generic_visit(node)

    @staticmethod
    def _dotted(node: ast.expr) -> str | None:
        parts: list[str] = []
        while isinstance(node, ast.Attribute):
            parts.insert(0, node.attr)
            node = node.value
        if not isinstance(node, ast.Name):
            return None
        if node.id == "library" and parts[:1] == ["module"]:
            return ".".join(parts[1:]) or None
        if node.id == "trt":
            return ".".join(parts)
        return ".".join([HOLDS[node.id], parts[0]]) if node.id in HOLDS else None


def touched() -> dict[str, set[str]]:
    """Every attribute of the library in tensorrt_api."""
    visitor = _Touched()
    visitor.visit(ast.parse(SOURCE.read_text(encoding="utf-8")))
    # A tensor of the product's own (``Tensor``) has fields that a network's has not.
    own = {f"ITensor.{field}" for field in tensorrt_api.Tensor._fields if field not in ("name", "shape")}
    return {name: keywords for name, keywords in visitor.names.items() if name not in own}


def missing_in(generation: str, names: dict[str, set[str]], tmp_path: Path) -> dict[str, object]:
    """The attributes that a generation's bindings lack, and its version."""
    environment = dict(os.environ)
    module = generation
    if generation != "tensorrt_rtx":
        folder = bindings(generation)
        major = generation.partition("-")[2].partition(".")[0]
        for name in ("nvinfer", "nvinfer_plugin", "nvonnxparser"):
            file = f"lib{name}.so.{major}"
            write_dummy_library(tmp_path / file, file, FUNCTIONS)
        environment.update(LD_LIBRARY_PATH=os.fspath(tmp_path), PYTHONPATH=os.fspath(folder))
        module = "tensorrt_bindings"
    else:
        pytest.importorskip("tensorrt_rtx")
    done = subprocess.run(
        [sys.executable, "-c", LOOKED_UP, module],
        input=json.dumps([[name, sorted(keywords)] for name, keywords in names.items()]),
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("generation", GENERATIONS)
def test_every_attribute_exists(generation: str, tmp_path: Path) -> None:
    """TensorRT 10.3, 10.16, 11.4 and RTX have each class, method, enum value and keyword that is used."""
    names = touched()
    if generation != "tensorrt_rtx":
        names = {name: keywords for name, keywords in names.items() if name not in RTX_ALONE}
    found = missing_in(generation, names, tmp_path)
    assert found["missing"] == []
    assert generation == "tensorrt_rtx" or str(found["version"]).startswith(generation.partition("-")[2] + ".")


def test_the_collection_is_whole_and_a_gap_is_seen(tmp_path: Path) -> None:
    """The collection holds what the product relies on most, and what TensorRT 11 dropped is reported as missing."""
    names = touched()
    assert {
        "BuilderFlag.TF32",
        "IBuilderConfig.set_timing_cache",
        "ExecutionContextAllocationStrategy.USER_MANAGED",
        "IExecutionContext.execute_async_v3",
        "ICudaEngine.get_device_memory_size_for_profile_v2",
        "ComputeCapability",
        "OnnxParser.parse_from_file",
        "ILogger",
    } <= names.keys()
    assert names["IBuilderConfig.set_timing_cache"] == {"ignore_mismatch"}
    dropped = {"BuilderFlag.FP16": set(), "ICudaEngine.device_memory_size": set(), "IBuilderConfig.reset": {"nothing"}}
    found = missing_in("tensorrt-11.4", dropped, tmp_path)
    assert [name for name, _ in found["missing"]] == list(dropped)


def test_nothing_else_touches_the_libraries() -> None:
    """No other file of the three packages imports TensorRT: what the contract does not see cannot break."""
    packages = [SOURCE.parent, Path(dit_runtime.__file__).parents[2] / "engines" / "dit_engines"]
    for package in packages:
        for file in package.rglob("*.py"):
            if file == SOURCE:
                continue
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                imported = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                imported += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                assert not [name for name in imported if name.split(".")[0] in tensorrt_api.LIBRARIES], file


def test_a_missing_library_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unknown, absent and unloadable libraries are one line each, with the next step."""
    with pytest.raises(EngineError, match="'tensorflow' is unknown; choose one of tensorrt, tensorrt_rtx"):
        tensorrt_api.library("tensorflow")
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(EngineError, match=r"tensorrt is not installed for this Python; on a Jetson .*JetPack"):
        tensorrt_api.library("tensorrt")
    monkeypatch.delitem(sys.modules, "tensorrt")
    (tmp_path / "tensorrt.py").write_text("raise ImportError('libnvinfer.so.10: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(EngineError, match=r"tensorrt cannot be loaded \(libnvinfer.so.10: cannot open.*install it"):
        tensorrt_api.library("tensorrt")


def test_versions_compare_as_numbers() -> None:
    """10.16 is later than 10.3."""
    assert tensorrt_api.TensorRT(None, "tensorrt", "10.16.1.11").numbers == (10, 16, 1)
    assert tensorrt_api.TensorRT(None, "tensorrt", "10.3.0").numbers < (10, 8)


def test_layers_of_an_inspector() -> None:
    """Kernels are read from the inspector's JSON; layers without detail are refused."""
    text = json.dumps({"Layers": [{"Name": "_gemm_mha_v2_myl0_3", "LayerType": "kgen"}], "I/O Tensors": []})
    assert [(layer.name, layer.kind) for layer in tensorrt_api.layers_from_json(text)] == [
        ("_gemm_mha_v2_myl0_3", "kgen")
    ]
    for damaged in ['{"Layers": ["name alone"]}', "{}", "no JSON", "[]"]:
        with pytest.raises(EngineError, match="does not describe"):
            tensorrt_api.layers_from_json(damaged)


@pytest.mark.parametrize("name", ["tensorrt", "tensorrt_rtx"])
def test_a_context_has_no_memory_of_its_own_and_no_kernels_to_come(name: str) -> None:
    """User-managed memory in both; RTX compiles for a shape before it runs, since a CUDA graph keeps its kernels."""
    module = SimpleNamespace(
        ExecutionContextAllocationStrategy=SimpleNamespace(USER_MANAGED="user managed"),
        DynamicShapesKernelSpecializationStrategy=SimpleNamespace(EAGER="eager"),
    )
    given: list[Any] = []

    class Config(SimpleNamespace):
        def set_execution_context_allocation_strategy(self, strategy: str) -> None:
            self.strategy = strategy

    class Engine(SimpleNamespace):
        def create_runtime_config(self) -> Config:
            return Config()

        def create_execution_context(self, how: Any) -> SimpleNamespace:
            given.append(how)
            return SimpleNamespace(set_optimization_profile_async=lambda index, stream: True)

    tensorrt_api.context_of(tensorrt_api.TensorRT(module, name, "1.0"), Engine(), 0, 7)
    if name == "tensorrt":
        assert given == ["user managed"]
    else:
        (config,) = given
        assert (config.strategy, config.dynamic_shapes_kernel_specialization_strategy) == ("user managed", "eager")
