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
from dit_runtime.core.errors import BuildError, EngineError

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
# Ahead of time for other devices, and when kernels are compiled: RTX alone, and tensorrt_api asks for it there alone.
RTX_ALONE = {
    "DynamicShapesKernelSpecializationStrategy",
    "DynamicShapesKernelSpecializationStrategy.EAGER",
    "ICudaEngine.create_runtime_config",
    "IRuntimeConfig.dynamic_shapes_kernel_specialization_strategy",
    "IRuntimeConfig.set_execution_context_allocation_strategy",
    "IRuntimeConfig.create_runtime_cache",
    "IRuntimeConfig.set_runtime_cache",
    "IRuntimeCache.deserialize",
    "IRuntimeCache.serialize",
    "IExecutionContext.is_stream_capturable",
    "BuilderFlag.REQUIRE_USER_ALLOCATION",
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


# What an expression of tensorrt_api is, besides an object of one of the library's classes.
MODULE, LIBRARY, PLAIN = "the library's module", "an object of the library without a declared class", "nothing of it"
CONVERSIONS = ("bool", "bytes", "int", "len", "range", "str", "tuple")  # their results are Python's own
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.GeneratorExp, ast.DictComp)


class Touched(ast.NodeVisitor):
    """Dotted names below the library's module, with the keywords they are called with.

    Which class an object is of is read from its annotation, or from the call that makes it. An attribute of an object
    of the library without either is an error: the collection would miss it.
    """

    def __init__(self, tree: ast.Module) -> None:
        self.names: dict[str, set[str]] = {}
        aliases = [node for node in tree.body if isinstance(node, ast.AnnAssign)]
        self._classes = {ast.unparse(node.target) for node in aliases if ast.unparse(node.annotation) == "TypeAlias"}
        functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
        self._returns = {node.name: self._declared(node.returns) for node in functions}
        self._scope: dict[str, str] = {}
        self.visit(tree)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        outer, arguments = self._scope, (*node.args.args, *node.args.kwonlyargs)
        self._scope = {**outer, **{each.arg: self._declared(each.annotation) for each in arguments}}
        for statement in node.body:
            self.visit(statement)
        self._scope = outer

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        outer, self._scope = self._scope, dict(self._scope)
        self.generic_visit(node)
        self._scope = outer

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        self._scope[ast.unparse(node.target)] = self._declared(node.annotation)
        if node.value is not None:
            self.visit(node.value)

    def visit_Assign(self, node: ast.Assign) -> None:
        self.generic_visit(node)
        for target in node.targets:
            self._bind(target, self._kind(node.value))

    def visit_For(self, node: ast.For) -> None:
        self._bind(node.target, self._kind(node.iter).removesuffix("[]"))
        self.generic_visit(node)

    def generic_visit(self, node: ast.AST) -> None:
        if isinstance(node, COMPREHENSIONS):
            for each in node.generators:
                self._bind(each.target, self._kind(each.iter).removesuffix("[]"))
        super().generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if (name := self._name(node)) is not None:
            self.names.setdefault(name, set())
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        if isinstance(node.func, ast.Attribute) and (name := self._name(node.func)) is not None:
            self.names.setdefault(name, set()).update(item.arg for item in node.keywords if item.arg)
        self.generic_visit(node)

    def _name(self, node: ast.Attribute) -> str | None:
        """An attribute as the bindings have it; None for what is not the library's."""
        owner = self._kind(node.value)
        assert owner != LIBRARY, f"line {node.lineno}: declare what {ast.unparse(node.value)} is"
        return None if owner == PLAIN else node.attr if owner == MODULE else f"{owner}.{node.attr}"

    def _kind(self, node: ast.expr) -> str:
        """A class of the library (``[]`` for a list of its objects), or one of the constants."""
        if isinstance(node, ast.Name):
            return self._scope.get(node.id, PLAIN)
        if isinstance(node, ast.Attribute):
            if node.attr == "module" and self._kind(node.value) == PLAIN:
                return MODULE
            owner = self._kind(node.value)
            if owner == MODULE or owner.split(".")[0] not in {*self._classes, LIBRARY, PLAIN}:
                return node.attr if owner == MODULE else f"{owner}.{node.attr}"  # a class or a value of an enum
            return PLAIN if owner == PLAIN else LIBRARY
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if not isinstance(node.func, ast.Name):
                made = self._kind(node.func)
                return made if made in {*self._classes, PLAIN} else LIBRARY
            if name in self._returns or name in CONVERSIONS:
                return self._returns.get(name, PLAIN)
        parts = [self._kind(each) for each in ast.iter_child_nodes(node) if isinstance(each, ast.expr)]
        return LIBRARY if set(parts) & {*self._classes, LIBRARY} else PLAIN

    def _declared(self, annotation: ast.expr | None) -> str:
        text = "" if annotation is None else ast.unparse(annotation)
        if text.startswith("list[") and text[5:-1] in self._classes:
            return f"{text[5:-1]}[]"
        return text if text in self._classes else LIBRARY if text == "Any" else PLAIN

    def _bind(self, target: ast.expr, kind: str) -> None:
        names = target.elts if isinstance(target, ast.Tuple) else [target]
        for each in names:
            if isinstance(each, ast.Name) and self._scope.get(each.id) not in self._classes:
                self._scope[each.id] = kind


def touched(more: str = "") -> dict[str, set[str]]:
    """Every attribute of the library in tensorrt_api, and in ``more`` code at its end."""
    return Touched(ast.parse(SOURCE.read_text(encoding="utf-8") + more)).names


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
    more = """
def use_what_is_gone(library: TensorRT, engine: ICudaEngine, made: Builder) -> None:
    engine.device_memory_size
    settings: IBuilderConfig = made.create_builder_config()
    settings.reset(nothing=library.module.BuilderFlag.FP16)
    parsers: list[OnnxParser] = []
    [parser.gone for parser in parsers]
"""
    added = {name: keywords for name, keywords in touched(more).items() if names.get(name) != keywords}
    assert added == {
        "ICudaEngine.device_memory_size": set(),
        "IBuilderConfig.reset": {"nothing"},
        "BuilderFlag.FP16": set(),
        "OnnxParser.gone": set(),
    }
    found = missing_in("tensorrt-11.4", touched(more), tmp_path)
    assert {name for name, _ in found["missing"]} - RTX_ALONE == added.keys()


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("made = builder.create_builder_config(); made.reset()", "made"),
        ("builder.create_builder_config().reset()", r"builder.create_builder_config\(\)"),
        ("[each.name for each in builder.parts()]", "each"),
        ("for index, each in enumerate([builder.part]): each.name", "each"),
        ("first, second = builder.parts(); second.name", "second"),
        ("unknown.name", "unknown"),
    ],
)
def test_an_object_without_a_class_is_seen(line: str, what: str) -> None:
    """An attribute of an object of the library that nothing says the class of would escape the collection."""
    with pytest.raises(AssertionError, match=f"declare what {what} is"):
        touched(f"\ndef use(builder: Builder, unknown: Any) -> None:\n    {line}\n")


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
        tensorrt_api.import_library("tensorflow")
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(EngineError, match=r"tensorrt is not installed for this Python; on a Jetson .*JetPack"):
        tensorrt_api.import_library("tensorrt")
    monkeypatch.delitem(sys.modules, "tensorrt")
    (tmp_path / "tensorrt.py").write_text("raise ImportError('libnvinfer.so.10: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        EngineError, match=r"tensorrt cannot be loaded \(libnvinfer.so.10: cannot open.*install tensorrt again"
    ):
        tensorrt_api.import_library("tensorrt")


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
        ProfilingVerbosity=SimpleNamespace(NONE="none"),
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

    tensorrt_api.make_context(tensorrt_api.TensorRT(module, name, "1.0"), Engine(), 0, 7)
    if name == "tensorrt":
        assert given == ["user managed"]
    else:
        (config,) = given
        assert (config.strategy, config.dynamic_shapes_kernel_specialization_strategy) == ("user managed", "eager")


def test_a_builder_that_cannot_start(tmp_path: Path) -> None:
    """Where CUDA cannot start the bindings raise TypeError: one line with the logger's reason."""

    class Logger:
        INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

    class Builder:
        def __init__(self, logger: Any) -> None:
            logger.log(Logger.ERROR, "CUDA initialization failure with error: 35")
            raise TypeError("pybind11::init(): factory function returned nullptr")

    module = SimpleNamespace(ILogger=Logger, IProgressMonitor=object, Builder=Builder)
    library = tensorrt_api.TensorRT(module, "tensorrt", "10.3.0")
    with pytest.raises(BuildError, match=r"builder of tensorrt 10.3.0 cannot start \(CUDA init.* error: 35\)"):
        tensorrt_api.plan_from_onnx(
            library, tmp_path / "x.onnx", [], log=print, report=lambda *_: True, workspace_bytes=1
        )
