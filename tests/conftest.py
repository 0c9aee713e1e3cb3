"""Small checkpoints and bundles, made once a session; none is trained, all parts of each act."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from diffusers import DiTTransformer2DModel

    from dit_runtime import Pipeline

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test never asks the network
# A shell starts background jobs with SIGINT ignored, and so would the commands be that a test interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)

SCHEDULER = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02, "clip_sample": False}


def make_checkpoint(folder: Path, *, seed: int = 0, learned_variance: bool = True) -> Path:
    """A DiTPipeline folder with a tiny random model: 2 blocks, width 64, 10 classes, 8×8 latents, 32×32 pictures."""
    from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
    from dit_export.random_weights import randomize

    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=32,
        in_channels=4,
        out_channels=8 if learned_variance else 4,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=10,
    )
    autoencoder = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 32, 32),
        latent_channels=4,
        sample_size=32,
        scaling_factor=0.5,
    )
    randomize(transformer, seed)
    randomize(autoencoder, seed + 1)
    DiTPipeline(transformer, autoencoder, DDIMScheduler(**SCHEDULER)).save_pretrained(folder)
    index = folder / "model_index.json"
    names = {str(number): f"class {number}, kind {number}" for number in range(10)}
    index.write_text(json.dumps({**json.loads(index.read_text()), "id2label": names}))
    return folder


def bindings(name: str) -> Path:
    """The folder of a generation's Python bindings, which ``make install`` puts there; skips the test without it."""
    folder = Path(__file__).parent.parent / "build" / "bindings" / name
    if not folder.is_dir():
        pytest.skip(f"{name}'s bindings are not installed: make install, with a Python that they have a wheel for")
    return folder


def run_command(*argv: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
    """A command of this distribution, as ``module:main`` in a process of its own: ``run_command("dit-sample", …)``."""
    modules = {
        "dit-export": "dit_export.command",
        "dit-build": "dit_engines.command",
        "dit-sample": "dit_runtime.sample",
        "dit-verify": "dit_runtime.verify_command",
        "dit-bench": "dit_runtime.bench",
    }
    name, *rest = (str(item) for item in argv)
    code = f"import sys; sys.argv[0] = {name!r}; from {modules[name]} import main; main(sys.argv[1:])"
    return subprocess.run([sys.executable, "-c", code, *rest], capture_output=True, text=True, check=False, **options)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoints") / "tiny")


@pytest.fixture(scope="session")
def bundles(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny checkpoint exported in both precisions by the command itself."""
    folder = tmp_path_factory.mktemp("bundles")
    paths = {}
    for precision, flags in (("fp32", []), ("fp16", ["--fp16"])):
        paths[precision] = folder / f"{precision}.bundle"
        done = run_command("dit-export", checkpoint, *flags, "-o", paths[precision])
        assert done.returncode == 0, done.stderr + done.stdout
        print(done.stdout)
    return paths


@pytest.fixture(params=["fp32", "fp16"])
def bundle_path(request: pytest.FixtureRequest, bundles: dict[str, Path]) -> Path:
    return bundles[request.param]


@pytest.fixture(scope="session")
def transformer(checkpoint: Path) -> DiTTransformer2DModel:
    """The tiny checkpoint's own transformer, unpatched: what guidance and the loop are compared with."""
    from diffusers import DiTTransformer2DModel

    return DiTTransformer2DModel.from_pretrained(checkpoint / "transformer").eval()


@pytest.fixture(scope="module")
def pipe(bundles: dict[str, Path]) -> Pipeline:
    """The tiny FP32 bundle on one thread of ONNX Runtime."""
    from dit_runtime import Pipeline

    return Pipeline(bundles["fp32"], "onnxruntime", threads=1)
