"""What is shipped: layers, imports without extras, wheel and sdist contents, help texts, and the README."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import tomllib
from support.commands import run_command

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "dit_runtime": ROOT / "runtime" / "dit_runtime",
    "dit_engines": ROOT / "engines" / "dit_engines",
    "dit_serve": ROOT / "runtime" / "dit_serve",
    "dit_export": ROOT / "dit_export",
}
COMMANDS = ("dit-export", "dit-build", "dit-sample", "dit-verify", "dit-bench", "dit-tune", "dit-serve", "dit-triton")


def imported(path: Path) -> set[str]:
    """Top-level names of everything a module imports, at any depth."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


def test_a_layer_never_imports_upwards() -> None:
    """dit_export → dit_engines → dit_runtime, and torch in the uppermost alone."""
    forbidden = {
        "dit_runtime": {"dit_serve", "dit_engines", "dit_export", "torch", "diffusers", "onnx"},
        "dit_serve": {"dit_engines", "dit_export", "torch", "diffusers", "onnx"},
        "dit_engines": {"dit_export", "torch", "diffusers"},
        "dit_export": set(),
    }
    for name, folder in PACKAGES.items():
        for path in folder.rglob("*.py"):
            assert not imported(path) & forbidden[name], path


def test_the_runtime_needs_numpy_and_pillow_only(bundles: dict[str, Path], tmp_path: Path) -> None:
    """Sampling runs in a process in which torch, diffusers, onnx and the upper packages cannot be imported."""
    masked = ("torch", "diffusers", "onnx", "onnx_ir", "dit_export", "dit_engines", "tensorrt_rtx")
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({masked!r}))\n"
        "from dit_runtime.commands.sample import main\n"
        f"main([{str(bundles['fp16'])!r}, '--labels', '1', '2', '--steps', '3', '-o', {str(tmp_path / 'x.png')!r}])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "x.png").is_file()


@pytest.mark.slow  # two builds
def test_wheel_and_sdist(tmp_path: Path) -> None:
    """The sdist holds what it should, and the wheel built from it three packages with their type markers."""
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    done = subprocess.run(build, capture_output=True, text=True, check=False)  # sdist, then the wheel from it
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == set(PACKAGES)
    assert {f"{name}/py.typed" for name in PACKAGES} <= set(names)
    assert "dit_serve/page.html" in names
    assert "dit_runtime/verify/report.html.jinja" in names
    assert not [name for name in names if "test" in name or name.endswith((".safetensors", ".npz"))]
    code = "import dit_runtime, dit_engines, dit_export; print(dit_runtime.__version__)"
    done = subprocess.run(
        [sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, {str(wheel)!r}); {code}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_help(name: str) -> None:
    """``--help`` is quick to reach, has two runnable examples and shows defaults; ``--version`` names the command."""
    done = run_command(name, "--help")
    assert done.returncode == 0
    examples = done.stdout.partition("examples:")[2].strip().splitlines()
    assert len(examples) >= 2
    assert all(line.strip().startswith(name) for line in examples)
    assert run_command(name, "--version").stdout.startswith(f"{name} 0.")


def test_parsing_arguments_imports_nothing_heavy() -> None:
    """Heavy imports happen after argument parsing."""
    code = (
        "import sys\nfrom dit_export.command import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "assert not {'torch', 'diffusers', 'onnxruntime'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_readme_links_and_commands() -> None:
    """Files that the README names exist, and every command and option in it is one the commands have."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", text) + re.findall(r'src="([^"]+)"', text):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target
    helps = {name: run_command(name, "--help").stdout for name in COMMANDS}
    lines = re.findall(r"^\s*(?:\$ )?(dit-\w+ .*)$", text, re.MULTILINE)
    assert lines
    for line in lines:
        name = line.split()[0]
        for option in re.findall(r"(?<=\s)--[a-z][\w-]*", line):
            assert option in helps[name], (name, option)


# Extras that a device installs, and the wheels' platforms there: JetPack 6 and 7, datacenter GPUs, PCs.
JETSON, SERVER = "aarch64", "x86_64"
RESOLVED = [
    ("jetson6", JETSON, "3.10", "12.8."),
    ("jetson7", JETSON, "3.12", "13."),
    *(("rtx-cu12", SERVER, python, "12.") for python in ("3.10", "3.12")),
    *(("rtx-cu13", machine, python, "13.") for machine in (JETSON, SERVER) for python in ("3.10", "3.12")),
]


@pytest.mark.slow  # asks the package index
@pytest.mark.parametrize(("extra", "machine", "python", "cuda"), RESOLVED)
def test_an_extra_resolves_on_its_device(extra: str, machine: str, python: str, cuda: str, tmp_path: Path) -> None:
    """pip finds wheels for all that an extra asks for, and CUDA's bindings are of the generation that works there."""
    metadata = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*metadata["dependencies"], *metadata["optional-dependencies"][extra]]
    sources = ("tensorrt-rtx-cu12>", "tensorrt-rtx-cu13>")  # the module alone, without a wheel, for any platform
    wanted = [item for item in wanted if not item.startswith(sources)]
    platforms = [f"--platform=manylinux_2_{minor}_{machine}" for minor in (17, 24, 27, 28, 31, 34, 35)]
    words = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--only-binary=:all:"]
    words += [*platforms, f"--python-version={python}", "--target", str(tmp_path / "x"), *wanted]
    done = subprocess.run([*words, "--report", str(tmp_path / "report.json")], capture_output=True, text=True)
    if done.returncode and not is_index_reachable():
        pytest.skip("no package index is reachable")
    assert done.returncode == 0, done.stderr
    items = json.loads((tmp_path / "report.json").read_text())["install"]
    versions = {item["metadata"]["name"].replace("_", "-"): item["metadata"]["version"] for item in items}
    print(versions)
    assert versions["cuda-bindings"].startswith(cuda)


def is_index_reachable() -> bool:
    """Whether pip gets an answer for a package that every index has."""
    words = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--no-deps", "pip"]
    return subprocess.run(words, capture_output=True).returncode == 0
