"""What users get wrong: one clear line, the right exit code, nothing half-written, nothing existing harmed."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.commands import run_command
from support.grids import grid


@pytest.fixture
def copied(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "checkpoint"))


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def refused(*argv: str | Path, message: str) -> None:
    """The command ends with 1 and one line on stderr, which says ``message``."""
    done = run_command(*argv)
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def export_refused(source: Path | str, output: Path, message: str, *flags: str) -> None:
    before = sorted(output.parent.iterdir())
    refused("dit-export", source, *flags, "-o", output, message=message)
    assert sorted(output.parent.iterdir()) == before  # no bundle, and no temporary folder


def test_a_missing_checkpoint(tmp_path: Path) -> None:
    """A path that is not there, a hub id that cannot be had, a preset without weights, an unknown preset."""
    output = tmp_path / "out.bundle"
    export_refused(tmp_path / "none", output, "no such file or folder")
    export_refused("nobody/nothing-of-this-name", output, "not in the hub's cache")
    export_refused("DiT-XL/2-256", output, "add --random-weights SEED")
    export_refused("DiT-Z/2-256", output, "not a preset", "--random-weights", "0")
    seed = str(2**64)
    export_refused("DiT-S/2-256", output, f"seed {seed}: expected a whole number from -2^63", "--random-weights", seed)


def test_a_truncated_checkpoint(copied: Path, tmp_path: Path) -> None:
    """Weights that end early."""
    weights = copied / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    export_refused(copied, tmp_path / "out.bundle", "cannot be read")


def test_missing_and_unexpected_weights(copied: Path, tmp_path: Path) -> None:
    """A weight that is not there is named."""
    weights = copied / "transformer" / "diffusion_pytorch_model.safetensors"
    state = load_file(weights)
    del state["proj_out_2.bias"]
    save_file(state, weights)
    export_refused(copied, tmp_path / "out.bundle", "1 missing keys (proj_out_2.bias)")


def test_weights_that_are_not_numbers(copied: Path, tmp_path: Path) -> None:
    """NaN in a weight is found before anything is exported."""
    weights = copied / "transformer" / "diffusion_pytorch_model.safetensors"
    state = load_file(weights)
    state["proj_out_2.bias"][0] = float("nan")
    save_file(state, weights)
    export_refused(copied, tmp_path / "out.bundle", "proj_out_2.bias holds NaN")


def test_another_architecture(copied: Path, tmp_path: Path) -> None:
    """Another pipeline, another transformer, another scheduler: each is named."""
    output = tmp_path / "out.bundle"
    edit_json(copied / "scheduler" / "scheduler_config.json", thresholding=True)
    export_refused(copied, output, "thresholding true is not supported")
    edit_json(copied / "transformer" / "config.json", activation_fn="geglu")
    export_refused(copied, output, "activation_fn is 'geglu'")
    edit_json(copied / "transformer" / "config.json", _class_name="PixArtTransformer2DModel")
    export_refused(copied, output, "is a PixArtTransformer2DModel; expected a class-conditional")
    edit_json(copied / "model_index.json", _class_name="FluxPipeline")
    export_refused(copied, output, "is a FluxPipeline; expected a class-conditional DiT or SiT")
    (copied / "model_index.json").write_text("{")
    export_refused(copied, output, "not JSON")


class Malicious:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch executed",)


def test_a_pickle_that_needs_code_execution(copied: Path, tmp_path: Path) -> None:
    """A ``.bin`` is read with weights_only: code in it is refused and not run."""
    folder = copied / "transformer"
    state = load_file(folder / "diffusion_pytorch_model.safetensors")
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    torch.save({**state, "extra": Malicious()}, folder / "diffusion_pytorch_model.bin")
    export_refused(copied, tmp_path / "out.bundle", "could execute code")
    (folder / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps(Malicious()))
    export_refused(copied, tmp_path / "out.bundle", "could execute code")
    assert not Path("executed").exists()


def test_a_plain_bin_is_read(copied: Path) -> None:
    """A ``.bin`` of tensors alone loads like safetensors."""
    from dit_export.checkpoints.sources import Source, load_checkpoint

    folder = copied / "transformer"
    state = load_file(folder / "diffusion_pytorch_model.safetensors")
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    torch.save(state, folder / "diffusion_pytorch_model.bin")
    load = load_checkpoint(Source(str(copied))).transformer
    assert load is not None
    loaded = load().state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


def test_an_output_that_cannot_be_written(checkpoint: Path, bundles: dict[str, Path], tmp_path: Path) -> None:
    """An output below a file, or a folder that is something else, is refused before the work."""
    blocked = tmp_path / "file"
    blocked.write_text("precious")
    refused("dit-export", checkpoint, "-o", blocked / "out.bundle", message="cannot be written to")
    refused("dit-sample", bundles["fp32"], "--labels", "1", "-o", blocked / "x.png", message="cannot be written to")
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "thesis.txt").write_text("precious")
    refused("dit-export", checkpoint, "-o", folder, message="exists and is not a bundle")
    assert blocked.read_text() == (folder / "thesis.txt").read_text() == "precious"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--labels", "10"], "label 10: expected 0 to 9"),
        (["--labels", "sneaker"], "label 'sneaker': 0 classes have that name"),
        (["--labels", "1", "--steps", "0"], "0 steps: expected 1 to 1000"),
        (["--labels", "1", "2", "--seeds", "1"], "1 seeds for 2 labels"),
        (["--labels", "1", "--sampler", "euler"], "expected one of ddim, ddpm"),
        (["--labels", "1", "--engine", "cuda"], "engine 'cuda' is unknown"),
        (["--labels", "1", "--batch-size", "0"], "expected a whole number from 1"),
        ([], "expected --labels, or --from-image"),
    ],
)
def test_sampling_arguments(bundles: dict[str, Path], tmp_path: Path, arguments: list[str], message: str) -> None:
    """Every wrong argument of dit-sample is one line, and no image is written."""
    output = tmp_path / "out.png"
    refused("dit-sample", bundles["fp32"], *arguments, "-o", output, message=message)
    assert not list(tmp_path.iterdir())


def test_a_damaged_bundle(bundles: dict[str, Path], tmp_path: Path) -> None:
    """A missing or altered file ends sampling, verifying, timing and building with one line."""
    path = Path(shutil.copytree(bundles["fp32"], tmp_path / "damaged", ignore=shutil.ignore_patterns("engines")))
    weights = path / "graphs" / "step.weights"
    content = bytearray(weights.read_bytes())
    content[100] ^= 255
    weights.write_bytes(content)
    refused("dit-verify", path, message="altered (SHA-256")
    refused("dit-build", path, message="altered (SHA-256")
    weights.unlink()
    refused("dit-verify", path, message="missing, but named in manifest.json")
    refused("dit-verify", tmp_path / "none", message="no such bundle")


def test_no_engine_installed(bundles: dict[str, Path], tmp_path: Path) -> None:
    """Without an inference engine the error is the pip line that installs one."""
    code = (
        "import sys; sys.modules.update(onnxruntime=None, openvino=None); "
        "from dit_runtime.commands.verify import main; "
        f"main([{str(bundles['fp32'])!r}, '--store', {str(tmp_path)!r}])"  # where nothing was measured yet
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "pip install 'dit-export[cpu]'" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_no_torch_installed(checkpoint: Path) -> None:
    """Exporting without its extra names the pip line."""
    code = (
        "import sys, importlib.util as u; find = u.find_spec; "
        "u.find_spec = lambda name, *a: None if name == 'torch' else find(name, *a); "
        f"from dit_export.command import main; main([{str(checkpoint)!r}])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.strip() == "dit-export: torch not installed; pip install 'dit-export[export]'"


@pytest.mark.parametrize(
    ("stop", "moment"),
    grid(
        product((signal.SIGINT, signal.SIGTERM), (0.5, 6.0)),
        fast=lambda stop, moment: (stop, moment) == (signal.SIGTERM, 0.5),
    ),
)
def test_ctrl_c_in_an_export(checkpoint: Path, tmp_path: Path, moment: float, stop: signal.Signals) -> None:
    """Interrupted early (reference) or later (tracing): 130 in silence, no folder left, an older bundle untouched."""
    output = tmp_path / "out.bundle"
    output.mkdir()
    (output / "manifest.json").write_text("the old one")
    code = f"from dit_export.command import main; main([{str(checkpoint)!r}, '-o', {str(output)!r}])"
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while len(list(tmp_path.iterdir())) < 2 and time.monotonic() < deadline:  # the temporary folder is there
        time.sleep(0.05)
    time.sleep(moment)
    if process.poll() is None:
        process.send_signal(stop)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert errors == ""
    assert [path.name for path in tmp_path.iterdir()] == ["out.bundle"]
    assert (output / "manifest.json").read_text() == "the old one"


def test_ctrl_c_in_a_weak_references_callback() -> None:
    """Python drops an exception that is raised there: the interrupt comes again and ends the command all the same."""
    code = """
import os, signal, time, weakref
from dit_runtime.commands.common import run

class Thing: pass

def work():
    thing = Thing()
    reference = weakref.ref(thing, lambda _: os.kill(os.getpid(), signal.SIGINT))
    del thing
    time.sleep(20)
    return 0

run("it", work)
"""
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert time.monotonic() - start < 15  # the work itself takes 20 s
    assert (done.returncode, done.stderr) == (130, "")
