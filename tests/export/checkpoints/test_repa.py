"""REPA's and REPA-E's files: what proves the family, what is left out, and what is asked for."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from dit_export.checkpoints.sources import Checkpoint
from support.official_files import Weights, loaded, same, weights_of

from dit_runtime.core.errors import CheckpointError

MEAN, VARIANCE = torch.tensor([0.5, -1.0, 0.25, 2.0]), torch.tensor([4.0, 0.25, 1.0, 9.0])
BATCH_NORM = {"bn.running_mean": MEAN, "bn.running_var": VARIANCE, "bn.num_batches_tracked": torch.tensor(7)}


def repa_weights(**changes: object) -> Weights:
    """A SiT of REPA: as many output channels as latents have."""
    return weights_of(out_channels=4, **changes)


def projectors(width: int = 32) -> Weights:
    sizes = [(width, 48), (48, 48), (48, 16)]
    names = [f"projectors.0.{index}" for index in (0, 2, 4)]
    found = {f"{name}.weight": torch.ones(b, a) for name, (a, b) in zip(names, sizes, strict=True)}
    return found | {f"{name}.bias": torch.ones(b) for name, (_, b) in zip(names, sizes, strict=True)}


@pytest.fixture(scope="module")
def vae(checkpoint: Path) -> str:
    return str(checkpoint / "vae")


def saved(folder: Path, weights: Weights, **content: object) -> Path:
    torch.save({"model": weights, "ema": weights, **content}, folder / "w.pt")
    return folder / "w.pt"


def assert_repa(found: Checkpoint, path: str = "linear") -> None:
    """All of REPA's conventions: direction, path, channels, defaults."""
    diffusion = found.diffusion
    assert (found.family, diffusion.time, diffusion.path) == ("repa", "noise-at-1", path)
    assert (diffusion.guidance_channels, found.channels) == (4, 4)
    assert (found.defaults.sampler, found.defaults.steps, found.defaults.guidance) == ("euler", 50, 1.5)
    assert found.reference.startswith("sihyun-yu/REPA's SiT and samplers")


def test_projectors_prove_it(tmp_path: Path, vae: str, caplog: pytest.LogCaptureFixture) -> None:
    """A full file needs its path alone; what is left out is named; another family or time contradicts the file."""
    file = saved(tmp_path, {**repa_weights(), **projectors()})
    with caplog.at_level(logging.INFO, "dit_runtime.export"):
        found = loaded(file, vae, path="linear")
    assert_repa(found)
    assert same(found, repa_weights())
    assert "left out the projectors of REPA's training, which sampling does not use: 6 tensors (projectors.0.0" in (
        caplog.text
    )
    with pytest.raises(CheckpointError, match=r"which path it was trained on; say --path linear or gvp .*REPA: linear"):
        loaded(file, vae)
    with pytest.raises(CheckpointError, match=r"its parameters \(projectors.0.0.weight\) say repa, --family says sit"):
        loaded(file, vae, family="sit", path="linear", time="noise-at-0")
    with pytest.raises(
        CheckpointError, match=r"--time noise-at-0, while its parameters .* say repa, whose time is noise"
    ):
        loaded(file, vae, path="linear", time="noise-at-0")
    with pytest.raises(CheckpointError, match="--path vp; models of the family repa have linear or gvp"):
        loaded(file, vae, path="vp")


def test_training_arguments_prove_it(tmp_path: Path, vae: str) -> None:
    """A file with REPA's arguments needs no option; its cosine path is GVP's; a model's name alone proves no time."""
    said = {"model": "SiT-XL/2", "path_type": "cosine", "prediction": "v", "encoder_depth": 8, "qk_norm": False}
    assert_repa(loaded(saved(tmp_path, repa_weights(), args=argparse.Namespace(**said)), vae), "gvp")
    with pytest.raises(CheckpointError, match="was trained on the path 'VP'; expected one of linear, gvp"):
        loaded(saved(tmp_path, repa_weights(), args={**said, "path_type": "VP"}), vae)
    named = saved(tmp_path, repa_weights(), args={"model": "SiT-XL/2", "path_type": "linear"})
    with pytest.raises(CheckpointError, match=r"say --family sit --time noise-at-0 .* or --family repa for one of"):
        loaded(named, vae)
    assert_repa(loaded(named, vae, family="repa"))
    assert_repa(loaded(named, vae, time="noise-at-1"))
    assert loaded(named, vae, time="noise-at-0").family == "sit"


def test_a_stripped_file_is_never_assumed(tmp_path: Path, vae: str) -> None:
    """Its names and shapes are a SiT's: the direction is asked for, and ``--family sit`` alone does not say it."""
    file = saved(tmp_path, repa_weights())
    with pytest.raises(
        CheckpointError, match=r"which way the time .* runs.*or --family repa for one of REPA, whose time"
    ):
        loaded(file, vae, family="sit", path="linear")
    for options in ({"family": "repa"}, {"time": "noise-at-1"}, {"family": "repa", "time": "noise-at-1"}):
        assert_repa(loaded(file, vae, path="linear", **options))
    with pytest.raises(
        CheckpointError, match=r"--family repa with --time noise-at-0, .*is noise-at-1; say --family sit"
    ):
        loaded(file, vae, family="repa", path="linear", time="noise-at-0")
    with pytest.raises(CheckpointError, match=r"as many output channels as latents have.*say --family official, --fam"):
        loaded(file, vae)
    assert loaded(file, vae, family="official").family == "official"
    named = file.rename(tmp_path / "SiT-XL-2-repa.pt")
    with pytest.raises(
        CheckpointError, match=r"is named SiT-XL-2-repa, .* say --family repa --path linear for a SiT of REPA"
    ):
        loaded(named, vae)


def test_queries_and_keys_are_normalized(tmp_path: Path, vae: str) -> None:
    """``q_norm`` and ``k_norm`` make the model another; they tell the heads, and the arguments must agree."""
    weights = repa_weights(qk_heads=4)
    found = loaded(saved(tmp_path, weights), vae, family="repa", path="linear", heads=None)
    assert (found.model.qk_norm, found.model.heads) == ("layer", 4)
    assert same(found, weights)
    with pytest.raises(CheckpointError, match="says 2 heads, and the norms of queries are of heads of 8, which are 4"):
        loaded(saved(tmp_path, weights), vae, family="repa", path="linear")
    said = {"encoder_depth": 1, "path_type": "linear", "qk_norm": False}
    with pytest.raises(CheckpointError, match="say qk_norm = False, and the weights have norms of queries and keys"):
        loaded(saved(tmp_path, weights, args=said), vae, heads=None)
    half = {name: tensor for name, tensor in weights.items() if ".k_norm." not in name}
    with pytest.raises(CheckpointError, match=r"4 missing keys \(blocks.0.attn.k_norm.bias"):
        loaded(saved(tmp_path, half), vae, family="repa", path="linear", heads=None)


def test_first_names_of_blocks(tmp_path: Path, vae: str) -> None:
    """``decoder_blocks.N`` follow the blocks before them, as many as encoder_depth; mixed layouts are refused."""
    weights = repa_weights(depth=3)
    legacy = {
        f"decoder_blocks.{int(name[7]) - 1}{name[8:]}" if name.startswith(("blocks.1.", "blocks.2.")) else name: tensor
        for name, tensor in weights.items()
    }
    found = loaded(saved(tmp_path, legacy), vae, path="linear")
    assert_repa(found)
    assert found.model.depth == 3
    assert same(found, weights)
    with pytest.raises(
        CheckpointError, match=r"decoder_blocks follow 1 blocks, and its training arguments say enc.* = 2"
    ):
        loaded(saved(tmp_path, legacy, args={"encoder_depth": 2, "path_type": "linear"}), vae)
    only = {name.replace("blocks.", "decoder_blocks."): tensor for name, tensor in weights.items()}
    with pytest.raises(CheckpointError, match="decoder_blocks follow 0 blocks, expected one or more"):
        loaded(saved(tmp_path, only), vae, path="linear")
    other = {**legacy, "encoder_blocks.0.attn.qkv.weight": torch.ones(2, 2)}
    with pytest.raises(CheckpointError, match="is DDT, with an encoder, a decoder and a modulation"):
        loaded(saved(tmp_path, other), vae, path="linear")


def test_statistics_scale_the_latents(tmp_path: Path, vae: str) -> None:
    """REPA-E's: they prove the family and replace the autoencoder's own scaling, which is then not asked for."""
    file = saved(tmp_path, {**repa_weights(), **BATCH_NORM})
    found = loaded(file, vae, path="linear")
    assert_repa(found)
    assert same(found, repa_weights())
    spec = found.autoencoder_spec
    assert (spec.scaling_factor, spec.shift_factor) == (1.0, 0.0)
    assert (spec.latents_mean, spec.latents_std) == (tuple(MEAN.tolist()), (2.0, 0.5, 1.0, 3.0))
    alone = tmp_path / "alone" / "vae.safetensors"
    alone.parent.mkdir()
    alone.write_bytes((Path(vae) / "diffusion_pytorch_model.safetensors").read_bytes())
    assert loaded(file, str(alone), path="linear").autoencoder_spec == spec
    with pytest.raises(CheckpointError, match="--vae-scaling is there to describe a VAE"):
        loaded(file, str(alone), path="linear", autoencoder_scaling=(0.5,))


def test_an_autoencoder_in_the_file(tmp_path: Path, vae: str) -> None:
    """REPA-E's training checkpoints hold theirs; ``--vae`` names another."""
    tensors = AutoencoderKL.from_pretrained(vae).state_dict()
    file = saved(tmp_path, {**repa_weights(), **BATCH_NORM}, vae={key: 2 * value for key, value in tensors.items()})
    own, other = loaded(file, None, path="linear"), loaded(file, vae, path="linear")
    assert torch.equal(own.autoencoder.decoder.conv_in.weight, 2 * other.autoencoder.decoder.conv_in.weight)
    assert own.autoencoder_spec == other.autoencoder_spec
    with pytest.raises(CheckpointError, match="a file does not tell how latents are scaled; add --vae-scaling"):
        loaded(saved(tmp_path, repa_weights(), vae=tensors), None, family="repa", path="linear")


@pytest.mark.parametrize(
    "stored",
    [
        {"mean": MEAN.view(1, 4, 1, 1), "std": VARIANCE.sqrt().view(1, 4, 1, 1)},
        {"latents_bias": MEAN.view(1, 4, 1, 1), "latents_scale": VARIANCE.rsqrt().view(1, 4, 1, 1)},
    ],
    ids=["LightningDiT", "REPA-E"],
)
def test_statistics_in_a_file_of_their_own(tmp_path: Path, vae: str, stored: Weights) -> None:
    """``--latent-stats``: of models trained on latents of a fixed autoencoder; twice told is refused."""
    torch.save(stored, tmp_path / "stats.pt")
    file, options = saved(tmp_path, repa_weights()), {"path": "linear", "latent_stats": str(tmp_path / "stats.pt")}
    spec = loaded(file, vae, family="repa", **options).autoencoder_spec
    assert (spec.latents_mean, spec.latents_std) == (tuple(MEAN.tolist()), (2.0, 0.5, 1.0, 3.0))
    assert spec.scaling_factor == 1.0
    both = {**repa_weights(), "bn.running_mean": torch.ones(4), "bn.running_var": torch.ones(4)}
    assert loaded(saved(tmp_path, both), vae, **options).autoencoder_spec == spec  # the option decides
    with pytest.raises(
        CheckpointError, match=r"holds statistics of .* the autoencoder in it; leave --latent-stats out"
    ):
        loaded(saved(tmp_path, both, vae={}), vae, **options)
    untouched = {**repa_weights(), "bn.running_mean": torch.zeros(4), "bn.running_var": torch.ones(4)}
    assert loaded(saved(tmp_path, untouched), vae, **options).autoencoder_spec == spec
    with pytest.raises(CheckpointError, match="are 0 and 1, which no training made; name the file that has those of"):
        loaded(saved(tmp_path, untouched), vae, path="linear")


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ({"mean": MEAN}, "holds mean; expected statistics of latents, mean and std or latents_bias and latents_scale"),
        ({"mean": MEAN, "std": torch.ones(3)}, r"mean \[4\] and std \[3\]: expected one number a channel in both"),
        ({"mean": MEAN.view(2, 2), "std": torch.ones(2, 2)}, r"mean \[2, 2\] and std \[2, 2\]: expected one number"),
        ({"mean": MEAN, "std": torch.zeros(4)}, "and std above 0"),
        ({"mean": MEAN[:3], "std": torch.ones(3)}, "statistics of 3 latent channels, the autoencoder has 4"),
        (None, "stats.pt"),
    ],
)
def test_files_of_statistics_that_are_refused(tmp_path: Path, vae: str, stored: Weights | None, message: str) -> None:
    """One line that says what is there; the last is no file at all."""
    if stored is not None:
        torch.save(stored, tmp_path / "stats.pt")
    file = saved(tmp_path, repa_weights())
    with pytest.raises(CheckpointError, match=message) as caught:
        loaded(file, vae, family="repa", path="linear", latent_stats=str(tmp_path / "stats.pt"))
    assert "\n" not in str(caught.value)


BAD_STATISTICS = {
    "another channel count": (
        {"bn.running_mean": torch.ones(16), "bn.running_var": torch.ones(16)},
        "statistics of 16 latent channels, the autoencoder has 4; name the one",
    ),
    "no variance": ({"bn.running_mean": MEAN}, "bn.running_var is missing; expected REPA-E's statistics"),
    "two axes": ({**BATCH_NORM, "bn.running_var": torch.ones(4, 1)}, r"bn.running_var is \[4, 1\]; expected"),
    "other lengths": (
        {**BATCH_NORM, "bn.running_var": torch.ones(3)},
        "expected as many variances as means, all above",
    ),
    "no spread": ({**BATCH_NORM, "bn.running_var": torch.zeros(4)}, "expected as many variances as means, all above 0"),
    "not finite": ({**BATCH_NORM, "bn.running_mean": MEAN / 0}, "bn.running_mean holds NaN or infinity"),
}


@pytest.mark.parametrize("kind", BAD_STATISTICS)
def test_bad_statistics(tmp_path: Path, vae: str, kind: str) -> None:
    """One line that names them."""
    extra, message = BAD_STATISTICS[kind]
    with pytest.raises(CheckpointError, match=message) as caught:
        loaded(saved(tmp_path, {**repa_weights(), **extra}), vae, path="linear")
    assert "\n" not in str(caught.value)
