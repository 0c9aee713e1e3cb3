"""The committed Fashion-MNIST model: small, loadable by diffusers, and as good as the README says."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiTPipeline

FOLDER = Path(__file__).parents[2] / "benchmarks" / "fashion_mnist"
CHECKPOINT = FOLDER / "checkpoint"


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch):
    """The demo's modules, which are scripts in a folder of their own."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import demo
    import evaluator

    yield demo, evaluator
    for name in ("demo", "evaluator"):
        sys.modules.pop(name, None)


def test_it_is_small_and_half_precision() -> None:
    """Under 12 MB in all, with its notice beside it."""
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) < 12e6
    assert "MIT License" in (FOLDER / "NOTICE").read_text()
    assert not list(CHECKPOINT.rglob("*.bin"))


def test_diffusers_loads_it() -> None:
    """The same checkpoint is every peer's input: DiTPipeline reads it and samples, with its class names."""
    pipeline = DiTPipeline.from_pretrained(CHECKPOINT, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.labels["Ankle boot"] == 9
    config = pipeline.transformer.config
    assert config.out_channels == 2 * config.in_channels  # learned variance
    images = pipeline([3], guidance_scale=1.0, num_inference_steps=2, generator=torch.Generator().manual_seed(0))
    assert images.images[0].size == (32, 32)


def test_the_trained_gates_are_open() -> None:
    """A trained adaLN-Zero block acts: its gates are not the zeros they start from."""
    state = DiTPipeline.from_pretrained(CHECKPOINT, dtype=torch.float32).transformer.state_dict()
    for index in range(6):
        assert state[f"transformer_blocks.{index}.norm1.linear.weight"].abs().mean() > 1e-3


@pytest.mark.slow
def test_fp16_keeps_the_class_accuracy(demo, tmp_path: Path) -> None:
    """Over 1000 images FP16's class accuracy is within 0.01 of PyTorch FP32's, and FP32's images are PyTorch's."""
    from support.commands import run_command

    script, judge = demo
    labels = [index % 10 for index in range(1000)]
    seeds = list(range(1000))
    evaluator = judge.load_evaluator()
    reference = judge.reference_statistics()
    assert reference["real_accuracy"] >= 0.90
    assert reference["reconstruction_psnr"] >= 26.0
    expected = script.sample_with_pytorch(labels, seeds, 50)
    accuracies = {"PyTorch": float((judge.judge(evaluator, expected)[0] == np.array(labels)).mean())}
    for name, flags in (("fp32", []), ("fp16", ["--fp16"])):
        path = tmp_path / f"{name}.bundle"
        done = run_command("dit-export", CHECKPOINT, *flags, "-o", path)
        assert done.returncode == 0, done.stderr + done.stdout
        found = script.sample(path, labels, seeds, 50)
        accuracies[name] = float((judge.judge(evaluator, found)[0] == np.array(labels)).mean())
        close = np.abs(found.astype(int) - expected.astype(int)) <= 1
        level = script.psnr(found, expected)
        print(f"{name}: accuracy {accuracies[name]:.3f}, PSNR {level:.1f} dB, within one level {close.mean():.4%}")
        assert level >= (60 if name == "fp32" else 35)
        if name == "fp32":
            assert close.mean() >= 0.999
    print(f"PyTorch: accuracy {accuracies['PyTorch']:.3f}, evaluator {reference['real_accuracy']:.4f}")
    assert abs(accuracies["fp16"] - accuracies["PyTorch"]) <= 0.01
