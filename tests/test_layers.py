"""Folders import only those below them, and no module is in a circle: read from the imports, lazy ones included."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "dit_runtime": ROOT / "runtime",
    "dit_serve": ROOT / "runtime",
    "dit_engines": ROOT / "engines",
    "dit_export": ROOT,
}
# Each package's folders and modules from the bottom up. Those of one group are beside each other: neither imports the
# other.
LAYERS: dict[str, tuple[tuple[str, ...], ...]] = {
    "dit_runtime": (
        ("core",),
        ("bundle",),
        ("samplers",),
        ("backends",),
        ("sampling",),
        ("verify",),
        ("pipeline",),
        ("policy",),
        ("bench", "output", "tuning"),
        ("commands",),
    ),
    "dit_serve": (
        ("bundle_files", "figures", "jobs", "request", "ray_arguments", "triton_files", "warm_up"),
        ("batcher",),
        ("images", "model", "bodies"),
        ("metrics", "remote", "triton_model"),
        ("app",),
        ("serving",),
        ("command", "ray_serve", "triton_command"),
        ("entry",),
    ),
    "dit_export": (
        ("checkpoints",),
        ("graphs",),
        ("reference",),
        ("bisect",),
        ("bundle", "request"),
        ("dry_run",),
        ("api", "dry_run_report"),
        ("command",),
        ("entry",),
    ),
}
ORDER = ("dit_runtime", "dit_serve", "dit_engines", "dit_export")


def modules_of(package: str) -> dict[str, Path]:
    """Every module of a package by its dotted name."""
    top = PACKAGES[package]
    found = {}
    for path in (top / package).rglob("*.py"):
        parts = path.relative_to(top).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = {name: path for package in PACKAGES for name, path in modules_of(package).items()}


def imports_of(path: Path) -> Iterator[str]:
    """The modules of ours that a module imports, at its top, in functions and under TYPE_CHECKING."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                if inner in MODULES:
                    yield inner
                elif node.module in MODULES:
                    yield node.module


GRAPH = {name: sorted(set(imports_of(path)) - {name}) for name, path in MODULES.items()}


def layer_of(module: str) -> int | None:
    """The index of a module's layer, from the bottom up; None for a package's own ``__init__`` and flat packages."""
    package, _, rest = module.partition(".")
    for index, names in enumerate(LAYERS.get(package, ())):
        if rest.split(".")[0] in names:
            return index
    return None


def test_every_folder_has_a_layer() -> None:
    """A folder that nobody put into an order could import anything."""
    for package in LAYERS:
        listed = {name for names in LAYERS[package] for name in names}
        assert {name.split(".")[1] for name in MODULES if name.startswith(f"{package}.")} == listed


@pytest.mark.parametrize("module", sorted(GRAPH))
def test_no_import_leads_upwards(module: str) -> None:
    """A layer imports itself and those below it: packages, and in a package its folders."""
    package = module.split(".")[0]
    for imported in GRAPH[module]:
        other = imported.split(".")[0]
        assert ORDER.index(other) <= ORDER.index(package), f"{module} imports {imported}"
        own, its = layer_of(module), layer_of(imported)
        if other != package or own is None:
            continue
        assert its is not None, f"{module} imports {imported}, which imports what is above"
        names = LAYERS[package][own]
        beside = len(names) > 1 and its == own and module.split(".")[1] != imported.split(".")[1]
        assert not beside, f"{module} imports {imported}, which is beside it"
        assert its <= own, f"{module} imports {imported}, which is not below it"


def test_no_module_is_in_a_circle() -> None:
    """Two modules that import each other are one module; type annotations count."""
    try:
        list(TopologicalSorter(GRAPH).static_order())
    except CycleError as error:
        pytest.fail(" → ".join(error.args[1]))


@pytest.mark.parametrize("module", sorted(name for name in MODULES if name.startswith("dit_runtime.backends")))
def test_a_backend_is_imported_alone(module: str) -> None:
    """No backend needs another, nor the library that it runs, to be imported."""
    others = [f"dit_runtime.backends.{name}" for name in ("onnxruntime", "openvino", "tensorrt")]
    mine = [name for name in others if module.startswith(name)]
    if not mine:
        return
    path = os.pathsep.join(map(str, PACKAGES.values()))
    code = f"import sys, {module}; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}, check=True
    )
    loaded = done.stdout.split()
    assert not [name for name in loaded if name.startswith(tuple(set(others) - set(mine)))]
    assert not {"onnxruntime", "openvino", "tensorrt", "tensorrt_rtx", "torch"} & set(loaded)
