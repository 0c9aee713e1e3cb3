"""A file that may not be read is one line that names it, whatever reads it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file
from support.commands import run_command
from support.permissions import unreadable

PARTS_OF_A_CHECKPOINT = (
    "model_index.json",
    "transformer/config.json",
    "transformer/diffusion_pytorch_model.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
    "scheduler/scheduler_config.json",
    "transformer",
    ".",
)
PARTS_OF_A_BUNDLE = ("manifest.json", "graphs/step.onnx", "graphs/step.weights", "golden/ddim.npz", "graphs", ".")


def refused(name: str, *argv: str | Path) -> None:
    """The command ends with 1 and one line, which names the file and says why."""
    done = run_command(*argv)
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 1, done.stderr
    assert len(lines) == 1, done.stderr
    assert name in lines[0], lines
    assert "ermission denied" in lines[0], lines


@pytest.mark.parametrize("part", PARTS_OF_A_CHECKPOINT)
def test_a_part_of_a_checkpoint(checkpoint: Path, tmp_path: Path, part: str) -> None:
    copied = Path(shutil.copytree(checkpoint, tmp_path / "checkpoint"))
    with unreadable(copied / part):
        refused(Path(part).name or "checkpoint", "dit-export", copied, "-o", tmp_path / "out.bundle")
    assert not (tmp_path / "out.bundle").exists()


def test_files_given_to_an_export(checkpoint: Path, tmp_path: Path) -> None:
    """Weights and an autoencoder that are files, and a keep-list."""
    weights, keep = tmp_path / "w.safetensors", tmp_path / "keep.txt"
    save_file(load_file(checkpoint / "transformer/diffusion_pytorch_model.safetensors"), weights)
    keep.write_text("decoder\n")
    output = ("-o", tmp_path / "out.bundle")
    with unreadable(weights):
        refused("w.safetensors", "dit-export", weights, *output)
        refused("w.safetensors", "dit-export", checkpoint, "--vae", weights, *output)
    with unreadable(keep):
        refused("keep.txt", "dit-export", checkpoint, "--fp16", "--keep-fp32", keep, *output)


@pytest.mark.parametrize("part", PARTS_OF_A_BUNDLE)
def test_a_part_of_a_bundle(bundles: dict[str, Path], tmp_path: Path, part: str) -> None:
    copied = Path(shutil.copytree(bundles["fp32"], tmp_path / "my.bundle", ignore=shutil.ignore_patterns("engines")))
    with unreadable(copied / part):
        if not part.startswith("golden"):
            refused(
                Path(part).name,
                "dit-sample",
                copied,
                "--engine",
                "onnxruntime",
                "--labels",
                "1",
                "-o",
                tmp_path / "a.png",
            )
        refused(Path(part).name, "dit-verify", copied, "--engine", "onnxruntime", "--quick")


def test_files_given_to_sampling(bundles: dict[str, Path], tmp_path: Path) -> None:
    """Noise, a sampler table, and an image to remake."""
    noise, table, image = tmp_path / "noise.npy", tmp_path / "table.json", tmp_path / "image.png"
    np.save(noise, np.zeros((1, 4, 8, 8), np.float32))
    table.write_text(json.dumps({"timesteps": [1.0], "coefficients": [[0.0] * 17]}))
    Image.new("RGB", (32, 32)).save(image)
    sample = ("dit-sample", bundles["fp32"], "--engine", "onnxruntime", "-o", tmp_path / "a.png")
    with unreadable(noise):
        refused("noise.npy", *sample, "--labels", "1", "--noise", noise)
    with unreadable(table):
        refused("table.json", *sample, "--labels", "1", "--sampler", table)
    with unreadable(image):
        refused("image.png", *sample, "--labels", "1", "--init", image)
        refused("image.png", *sample, "--from-image", image)
    results = tmp_path / "results.json"
    results.write_text("{}")
    with unreadable(results):
        refused("results.json", "dit-verify", "--report", tmp_path / "page.html", "--from", results)
