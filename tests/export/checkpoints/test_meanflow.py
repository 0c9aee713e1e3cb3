"""MeanFlow's files: what their parameters and arguments prove, what is asked for, and how latents are scaled."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from dit_export.checkpoints.random_weights import randomize
from dit_export.checkpoints.sources import Checkpoint
from support.official_files import Weights, loaded, same, weights_of

from dit_runtime.core.errors import CheckpointError

# Of zhuyu-cs/MeanFlow's train.py, as its checkpoints hold them.
ARGUMENTS: dict[str, Any] = {
    **{"path_type": "linear", "cfg_prob": 0.1, "num_classes": 10, "weighting": "adaptive", "resolution": 32},
    **{"ratio_r_not_equal_t": 0.25, "cfg_omega": 0.2, "cfg_kappa": 0.92, "cfg_min_t": 0.0, "cfg_max_t": 0.8},
}
SAID = {"family": "meanflow", "path": "linear", "second_time": "t-r"}


def mean_flow_weights(**changes: object) -> Weights:
    """A SiT with a second timestep embedder, and as many output channels as latents have."""
    return weights_of(out_channels=4, second_time=True, **changes)


@pytest.fixture(scope="module")
def vae(checkpoint: Path) -> str:
    return str(checkpoint / "vae")


def saved(folder: Path, weights: Weights, **content: object) -> Path:
    torch.save({"model": weights, "ema": weights, "steps": 7, **content}, folder / "w.pt")
    return folder / "w.pt"


def assert_mean_flow(found: Checkpoint, path: str = "linear", second: str = "t-r", inside: bool = True) -> None:
    """All of MeanFlow's conventions."""
    diffusion, defaults = found.diffusion, found.defaults
    assert (found.family, found.model.times) == ("meanflow", 2)
    assert (diffusion.time, diffusion.path, diffusion.second_time) == ("noise-at-1", path, second)
    assert (diffusion.guidance_inside, diffusion.guidance_channels, found.channels) == (inside, 4, 4)
    assert (defaults.sampler, defaults.steps, defaults.guidance) == ("meanflow", 1, 1.0)
    assert found.reference.startswith(f"zhuyu-cs/MeanFlow's SiT and sampler, {path} path")


def test_training_arguments_prove_it(tmp_path: Path, vae: str) -> None:
    """A training checkpoint needs no option; what contradicts it is refused."""
    file = saved(tmp_path, mean_flow_weights(), args=argparse.Namespace(**ARGUMENTS))
    found = loaded(file, vae)
    assert_mean_flow(found)
    assert same(found, mean_flow_weights())
    assert (found.model.classes, found.model.has_null) == (10, True)
    with pytest.raises(CheckpointError, match=r"\(r_embedder.*\) say meanflow, --family says sit; leave --family out$"):
        loaded(file, vae, family="sit")
    with pytest.raises(
        CheckpointError, match=r"\(ratio.* say a model of zhuyu-cs/MeanFlow, which embeds t-r, --second.* says r;"
    ):
        loaded(file, vae, second_time="r")
    with pytest.raises(CheckpointError, match=r"--time noise-at-0, while its parameters .* whose time is noise-at-1"):
        loaded(file, vae, time="noise-at-0")
    cosine = saved(tmp_path, mean_flow_weights(), args={**ARGUMENTS, "path_type": "cosine"})
    assert_mean_flow(loaded(cosine, vae), "gvp")


def test_guidance_is_read_from_the_arguments(tmp_path: Path, vae: str) -> None:
    """ω = 1 and κ = 0 are a training without guidance; whatever a file does not say is taken as guided."""
    plain = {**ARGUMENTS, "cfg_omega": 1.0, "cfg_kappa": 0.0}
    assert_mean_flow(loaded(saved(tmp_path, mean_flow_weights(), args=plain), vae), inside=False)
    del plain["cfg_kappa"]
    assert_mean_flow(loaded(saved(tmp_path, mean_flow_weights(), args=plain), vae))


def test_a_stripped_file_is_never_assumed(tmp_path: Path, vae: str) -> None:
    """Direction, second time and path are asked for, one after the other."""
    file = saved(tmp_path, mean_flow_weights())
    with pytest.raises(
        CheckpointError, match=r"second timestep embedder \(r_.*say --family meanflow --path linear --second-time t-r"
    ):
        loaded(file, vae)
    with pytest.raises(CheckpointError, match=r"say --path linear or gvp \(the published MeanFlow: linear\)"):
        loaded(file, vae, family="meanflow")
    with pytest.raises(CheckpointError, match=r"what its second timestep embedder embeds.* say --second-time t-r for"):
        loaded(file, vae, family="meanflow", path="linear")
    assert_mean_flow(loaded(file, vae, **SAID))
    assert_mean_flow(loaded(file, vae, **{**SAID, "second_time": "r"}), second="r")
    assert_mean_flow(loaded(file, vae, time="noise-at-1", path="linear", second_time="t-r"))
    with pytest.raises(CheckpointError, match="--family meanflow with --time noise-at-0, and the time of that family"):
        loaded(file, vae, **SAID, time="noise-at-0")
    with pytest.raises(CheckpointError, match="second time 'late' is unknown; expected one of t-r, r"):
        loaded(file, vae, **{**SAID, "second_time": "late"})
    with pytest.raises(
        CheckpointError, match="second timestep embedder with in-context conditioning; expected a MeanF"
    ):
        loaded(saved(tmp_path, mean_flow_weights(conditioning="in-context")), vae, **SAID)


def test_other_files_are_no_mean_flows(tmp_path: Path, vae: str) -> None:
    """A SiT given as a MeanFlow, whatever it says of itself, and a second time for a model of one."""
    sit = saved(tmp_path, weights_of(out_channels=4)).rename(tmp_path / "sit.pt")
    with pytest.raises(CheckpointError, match=r"has no second timestep embedder .*, which every MeanFlow has; say --f"):
        loaded(sit, vae, **SAID)
    said = saved(tmp_path, weights_of(out_channels=4), args=ARGUMENTS)
    with pytest.raises(CheckpointError, match=r"has no second timestep embedder"):
        loaded(said, vae)
    with pytest.raises(CheckpointError, match="--second-time is there to describe a MeanFlow, which gets two times"):
        loaded(sit, vae, family="repa", path="linear", second_time="t-r")


@pytest.mark.parametrize(
    ("extra", "arguments", "message"),
    [
        ({"projectors.0.0.weight": torch.ones(8, 32)}, {}, r"parts of a training of REPA \(proj.*\) and of a MeanFlow"),
        ({"feat_rope.freqs_cos": torch.ones(16, 16)}, {}, r"parts of a LightningDiT \(feat.*\) and of a MeanFlow \(r_"),
        ({"bn.running_mean": torch.ones(4), "bn.running_var": torch.ones(4)}, {}, r"parts of a training of REPA \(bn"),
        ({}, {"encoder_depth": 8}, r"has a MeanFlow's second.*its training arguments \(enc.* say repa; not supported"),
        ({}, {"train_eps": 0.1}, r"has a MeanFlow's second timestep embedder .* say sit; not supported"),
        ({}, {"learn_sigma": True, **ARGUMENTS}, "say learn_sigma = True, and there are 4 output channels for 4"),
    ],
)
def test_mixed_layouts(tmp_path: Path, vae: str, extra: Weights, arguments: dict[str, object], message: str) -> None:
    """Parts and arguments of two trainings are neither's; one line says which."""
    file = saved(tmp_path, {**mean_flow_weights(), **extra}, args=arguments)
    with pytest.raises(CheckpointError, match=message) as caught:
        loaded(file, vae, **({} if "cfg_omega" in arguments else SAID))
    assert "\n" not in str(caught.value)


def test_halves_of_the_second_embedder(tmp_path: Path, vae: str) -> None:
    """One that is incomplete, or of another width, is named."""
    half = {name: value for name, value in mean_flow_weights().items() if name != "r_embedder.mlp.2.bias"}
    with pytest.raises(CheckpointError, match=r"1 missing keys \(r_embedder.mlp.2.bias\)"):
        loaded(saved(tmp_path, half), vae, **SAID)
    wide = {**mean_flow_weights(), "r_embedder.mlp.0.weight": torch.ones(32, 128)}
    with pytest.raises(CheckpointError, match=r"r_embedder.mlp.0.weight \[32, 128\], expected \[32, 256\]"):
        loaded(saved(tmp_path, wide), vae, **SAID)
    without = {name: value for name, value in mean_flow_weights().items() if name != "r_embedder.mlp.0.weight"}
    with pytest.raises(CheckpointError, match=r"r_embedder.mlp.0.weight"):
        loaded(saved(tmp_path, without), vae, **SAID)


def test_latents_are_scaled_as_its_code_does(tmp_path: Path, vae: str) -> None:
    """By 0.18125 where the autoencoder is Stable Diffusion's, whose own is 0.18215; statistics and others go before."""
    usual = AutoencoderKL(down_block_types=("DownEncoderBlock2D",), block_out_channels=(32,), latent_channels=4)
    randomize(usual, 1)
    usual.save_pretrained(tmp_path / "usual")
    file = saved(tmp_path, mean_flow_weights())
    assert loaded(file, str(tmp_path / "usual"), **SAID).autoencoder_spec.scaling_factor == 0.18125
    assert loaded(file, vae, **SAID).autoencoder_spec.scaling_factor == 0.5
    sit = saved(tmp_path, weights_of(out_channels=4))
    options = {"family": "repa", "path": "linear"}
    assert loaded(sit, str(tmp_path / "usual"), **options).autoencoder_spec.scaling_factor == 0.18215
    torch.save({"mean": torch.zeros(4), "std": torch.full((4,), 2.0)}, tmp_path / "stats.pt")
    spec = loaded(saved(tmp_path, mean_flow_weights()), vae, **SAID, latent_stats=str(tmp_path / "stats.pt"))
    assert (spec.autoencoder_spec.scaling_factor, spec.autoencoder_spec.latents_std) == (1.0, (2.0,) * 4)
