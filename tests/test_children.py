"""No child of a command imports what lies in the current folder, which may be a bundle of somebody else's.

Besides, a build and an export open no socket and start nothing but such children.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.commands import ENTRIES
from support.watch import run_watched

import dit_runtime
from dit_runtime.core.children import command_of_module

# What a child imports first, and what it imports of ours; regular packages hide those behind them on the path.
PLANTED = (
    *("numpy.py", "torch.py", "onnx/__init__.py", "PIL/__init__.py", "tensorrt_rtx/__init__.py", "safetensors.py"),
    *("runpy.py", "json.py", "subprocess.py", "signal.py", "sitecustomize.py", "usercustomize.py", "encodings.py"),
    *("dit_runtime/__init__.py", "dit_engines/__init__.py", "dit_engines/worker.py", "dit_engines/audit.py"),
    *("dit_export/__init__.py", "dit_export/golden.py", "dit_export/reference/process.py", "diffusers/__init__.py"),
)


def plant(folder: Path) -> Path:
    """Modules in ``folder`` that write their name into the file that is returned."""
    marker = folder / "executed.txt"
    for name in PLANTED:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"open({str(marker)!r}, 'a').write({name!r} + '\\n')\n")
    return marker


def run_script(command: str, scripts: Path, folder: Path, *argv: str | Path) -> str:
    """A command in ``folder``, as the script runs it that an installation makes; its output, with exit code 0."""
    script = scripts / command
    script.write_text(f"import sys\n{ENTRIES[command]}\nsys.exit(main())\n")
    done, events = run_watched([sys.executable, script, *argv], scripts / "watch", cwd=folder)
    assert done.returncode == 0, done.stderr + done.stdout
    assert events == []
    return done.stdout


@pytest.fixture
def scripts(tmp_path: Path) -> Path:
    folder = tmp_path / "bin"
    folder.mkdir()
    return folder


def test_a_build_runs_no_code_of_its_bundle(bundles: dict[str, Path], scripts: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    folder = Path(shutil.copytree(bundles["fp32"], tmp_path / "bundle"))
    marker = plant(folder)
    out = run_script("dit-build", scripts, folder, ".", "--batch", "1", "--branches", "1", "--json")
    assert json.loads(out)["graphs"]
    assert not marker.exists(), marker.read_text()


@pytest.mark.slow  # an export in a process of its own
def test_an_export_runs_no_code_of_the_current_folder(checkpoint: Path, scripts: Path, tmp_path: Path) -> None:
    folder = tmp_path / "here"
    folder.mkdir()
    marker = plant(folder)
    run_script("dit-export", scripts, folder, checkpoint, "--no-verify", "-o", "tiny.bundle")
    assert (folder / "tiny.bundle" / "manifest.json").is_file()
    assert not marker.exists(), marker.read_text()


@pytest.mark.parametrize("entry", ["", ".", "{here}", "{link}"])
def test_the_current_folder_is_on_no_childs_path(entry: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However a parent has it on its own path: ``python -c`` and ``python -m`` put it first."""
    folder, link = tmp_path / "here", tmp_path / "link"
    folder.mkdir()
    link.symlink_to(folder)
    marker = plant(folder)
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(tmp_path / "other"))
    monkeypatch.setattr(sys, "path", [entry.format(here=folder, link=link), *sys.path])
    done = subprocess.run(command_of_module("json.tool"), input="[1]", capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.split()) == (0, ["[", "1", "]"]), done.stderr
    assert not marker.exists(), marker.read_text()


def test_a_child_has_its_parents_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With names that no shell would take, in order, and the arguments as they are."""
    odd = tmp_path / "a: 'b' \udcff"
    odd.mkdir()
    (odd / "told.py").write_text("import sys\nprint(ascii([sys.path[0], __name__, sys.argv[1:]]))\n")
    monkeypatch.setattr(sys, "path", [str(odd), *sys.path])
    done = subprocess.run(command_of_module("told", "-x", "two words"), capture_output=True, text=True, check=True)
    assert done.stdout == ascii([str(odd), "__main__", ["-x", "two words"]]) + "\n"


def test_a_checkout_may_be_the_current_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a child does not find the packages that its parent imported from there."""
    home = Path(dit_runtime.__file__).parents[1]
    monkeypatch.chdir(home)
    paths = [path for path in sys.path if path and Path(path).resolve() != home.resolve()]
    monkeypatch.setattr(sys, "path", ["", *paths])
    done = subprocess.run(command_of_module("dit_runtime.core.version"), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
