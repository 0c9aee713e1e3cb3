"""Checkpoints that predict v, and noise schedules that end in pure noise, against diffusers end to end."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from support.commands import run_command
from support.optional import diffusers, torch

from dit_runtime import Pipeline, open_bundle
from dit_runtime.core.errors import CheckpointError
from dit_runtime.verify.metrics import psnr

ZERO_SNR = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


def with_scheduler(checkpoint: Path, folder: Path, **changes: object) -> Path:
    """A copy of a checkpoint with other scheduler settings."""
    shutil.copytree(checkpoint, folder)
    config = folder / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **changes}))
    return folder


@pytest.fixture(scope="module")
def zero_snr(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint with v prediction and zero terminal SNR, and its bundle."""
    folder = tmp_path_factory.mktemp("prediction")
    source = with_scheduler(checkpoint, folder / "source", **ZERO_SNR)
    done = run_command("dit-export", source, "-o", folder / "bundle")
    assert done.returncode == 0, done.stderr + done.stdout
    return source, folder / "bundle"


@pytest.mark.slow  # an export
def test_betas_end_in_pure_noise(zero_snr: tuple[Path, Path]) -> None:
    """The manifest's betas are diffusers' rescaled ones; the last leaves nothing of the image."""
    source, bundle = zero_snr
    found = np.array(open_bundle(bundle).manifest.diffusion.betas)
    expected = diffusers.DDIMScheduler.from_pretrained(source / "scheduler").betas.double().numpy()
    assert found[-1] == 1
    # measured: 1.3e-6; diffusers rescales in float32
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)


@pytest.mark.slow  # an export
def test_images_are_pytorchs(zero_snr: tuple[Path, Path]) -> None:
    """v prediction from pure noise, guided, gives diffusers' images."""
    source, bundle = zero_snr
    pipeline = diffusers.DiTPipeline.from_pretrained(source, dtype=torch.float32)
    scheduler = diffusers.DDIMScheduler.from_pretrained(source / "scheduler")
    scheduler.set_timesteps(20)
    assert scheduler.timesteps[0] == 999
    z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    with torch.inference_mode():
        for t in scheduler.timesteps:
            cond, null = (
                pipeline.transformer(z, timestep=t[None], class_labels=torch.tensor([label])).sample[:, :4]
                for label in (7, 10)
            )
            z = scheduler.step(null + 1.5 * (cond - null), t, z).prev_sample
        image = pipeline.vae.decode(z / pipeline.vae.config.scaling_factor).sample
    expected = ((image / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    found = Pipeline(bundle, "onnxruntime")([7], [5], steps=20, guidance=1.5, sampler="ddim")
    assert psnr(found, expected) >= 60


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr with epsilon prediction"),
        (
            {"prediction_type": "flow"},
            "prediction_type: got 'flow', expected one of 'epsilon', 'v_prediction', 'sample'",
        ),
        ({"clip_sample": True, "clip_sample_range": 0}, "clip_sample_range 0; expected a number from 1e-06"),
        ({"thresholding": True}, "thresholding true is not supported"),
    ],
)
def test_schedulers_that_are_refused(
    checkpoint: Path, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    """What is not linear in the network's output, or says nothing, is refused by name before any work."""
    from dit_export.checkpoints.sources import Source, load_checkpoint

    source = with_scheduler(checkpoint, tmp_path / "source", **changes)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(Source(str(source)))
