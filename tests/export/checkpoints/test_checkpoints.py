"""What is read from each kind of checkpoint: the same weights whatever the file, the right model, or one clear line."""

from __future__ import annotations

import argparse
import json
import logging
import os
import pickle
import shutil
from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDIMScheduler,
    DDPMScheduler,
    DiTPipeline,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)
from dit_export.checkpoints.diffusers_folder.transformer import official_from_diffusers
from dit_export.checkpoints.random_weights import randomize
from dit_export.checkpoints.sources import Source, load_checkpoint
from dit_export.checkpoints.weights import stored_from_tensor
from safetensors.torch import load_file, save_file
from support.commands import run_command
from support.grids import grid
from support.official_files import HEADS, Weights, loaded, same, weights_of
from support.oracle import CONDITIONINGS, sincos_positions

from dit_runtime.core.errors import CheckpointError
from dit_runtime.core.files import sha256_of

SCHEDULER_BETAS = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def vae(checkpoint: Path) -> str:
    return str(checkpoint / "vae")


def saved(weights: Weights, file: Path) -> Path:
    if file.suffix == ".safetensors":
        save_file(weights, file)
    else:
        torch.save(weights, file)
    return file


def test_one_model_in_every_kind_of_file(tmp_path: Path, vae: str) -> None:
    """safetensors, a state dict, a training checkpoint with an argparse Namespace, a wrapped module: equal weights."""
    weights = weights_of()
    args = argparse.Namespace(model="DiT-XL/2", lr=1e-4)
    other = {key: value + 1 for key, value in weights.items()}
    files: dict[str, object] = {
        "plain.pt": weights,
        "training.pt": {"model": other, "ema": weights, "opt": {"state": {0: {"step": torch.ones(1)}}}, "args": args},
        "model.ckpt": {"model": weights, "args": args},
        "lightning.bin": {"state_dict": {f"module.{key}": value for key, value in weights.items()}},
        "compiled.pt": {f"_orig_mod.module.{key}": value for key, value in weights.items()},
    }
    for name, content in files.items():
        torch.save(content, tmp_path / name)
        assert same(loaded(tmp_path / name, vae), weights), name
    found = loaded(
        saved({f"_orig_mod.{key}": value for key, value in weights.items()}, tmp_path / "x.safetensors"), vae
    )
    assert same(found, weights)
    assert found.weights_sha256 == sha256_of(tmp_path / "x.safetensors")


def test_half_precision_files_are_read_exactly(tmp_path: Path, vae: str) -> None:
    """Weights stored in FP16 or BF16 are FP32 in memory, of the same value."""
    for dtype in (torch.float16, torch.bfloat16):
        half = {key: value.to(dtype) for key, value in weights_of().items()}
        found = loaded(saved(half, tmp_path / "half.safetensors"), vae)
        assert same(found, {key: value.float() for key, value in half.items()})


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
@pytest.mark.parametrize("out_channels", [4, 8])
def test_the_spec_is_inferred_from_shapes(tmp_path: Path, vae: str, conditioning: str, out_channels: int) -> None:
    """Conditioning, depth, width, patch, classes, MLP width, size and learned variance are all in the shapes."""
    shape = {"width": 48, "depth": 3, "patch": 4, "grid": (3, 3), "classes": 7, "mlp_width": 96}
    weights = weights_of(conditioning, out_channels, **shape)
    model = loaded(saved(weights, tmp_path / "w.safetensors"), vae, family="official").model
    assert (model.conditioning, model.depth, model.width, model.patch_size) == (conditioning, 3, 48, 4)
    assert (model.classes, model.mlp_width, model.latent_size, model.heads) == (7, 96, (12, 12), HEADS)
    assert model.learned_variance == (out_channels == 8)


def test_heads_of_the_papers_sizes_are_known(tmp_path: Path, vae: str) -> None:
    """The paper's S, B, L and XL need no --heads; another size without it is refused."""
    weights = weights_of(width=384, depth=12)
    file = saved(weights, tmp_path / "s.safetensors")
    assert load_checkpoint(Source(str(file), autoencoder=vae)).model.heads == 6
    file = saved(weights_of(), tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match=r"2 blocks of width 32 are none of DiT-S.*say it with --heads"):
        load_checkpoint(Source(str(file), autoencoder=vae))


def test_the_trained_size_is_read_off_the_tables_values(tmp_path: Path, vae: str) -> None:
    """Whatever sizes are asked for, a table is taken for the grid whose values it has, square or not, FP16 or not."""
    for sides in ((4, 4), (3, 5), (2, 8), (5, 3)):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            weights = {key: value.to(dtype) for key, value in weights_of(grid=sides).items()}
            file = saved(weights, tmp_path / "w.safetensors")
            asked = ((16, 64), (24, 40), (32, 32))
            found = loaded(file, vae, image_sizes=asked)
            assert found.trained_size == (2 * sides[0], 2 * sides[1])
            for size in found.sizes:
                expected = sincos_positions(size[0] // 2, size[1] // 2, 32)
                exact = size == found.trained_size
                expected = expected.to(dtype).float() if exact else expected
                assert torch.allclose(found.positions(size).table, expected, atol=1e-6)  # measured: 0


def test_a_learned_table_that_is_not_square_is_told(tmp_path: Path, vae: str) -> None:
    """15 learned positions have no square: --size says the trained one, whichever place it has, and no other goes."""
    weights = weights_of(grid=(3, 5))
    weights["pos_embed"] += 0.01
    file = saved(weights, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match="15 tokens is not square; say what it was trained at with --size"):
        loaded(file, vae)
    found = loaded(file, vae, image_sizes=((24, 40),))
    assert torch.equal(found.positions((6, 10)).table, weights["pos_embed"])
    with pytest.raises(CheckpointError, match="not the sines and cosines of the official code"):
        loaded(file, vae, image_sizes=((16, 16), (24, 40)))


def test_sit_is_told_by_its_family(tmp_path: Path, vae: str) -> None:
    """A SiT's keys are a DiT's: --family decides what the output is, and the manifest's reference says so."""
    file = saved(weights_of(), tmp_path / "w.safetensors")
    dit, sit = loaded(file, vae), loaded(file, vae, family="sit", path="vp", time="noise-at-0")
    assert (dit.diffusion.prediction_type, sit.diffusion.prediction_type) == ("epsilon", "velocity")
    assert (dit.model.learned_variance, sit.model.learned_variance) == (True, False)
    assert (dit.channels, sit.channels) == (8, 8)
    assert (dit.defaults.sampler, sit.defaults.sampler) == ("ddpm", "heun")
    assert "facebookresearch/DiT" in dit.reference
    assert sit.reference.startswith("willisma/SiT's model and fixed-step samplers, vp path")


def diffusers_files(folder: Path, kind: str) -> dict[str, object]:
    """The transformer's weights stored another way; what to say of it."""
    state = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    if kind == "bin":
        torch.save(state, folder / "diffusion_pytorch_model.bin")
    elif kind == "variant":
        save_file(
            {key: value.half() for key, value in state.items()}, folder / "diffusion_pytorch_model.fp16.safetensors"
        )
        return {"variant": "fp16"}
    else:
        names = sorted(state)
        shards = {"a": names[::2], "b": names[1::2]}
        pieces = {key: f"diffusion_pytorch_model-{key}.safetensors" for key in shards}
        for key, part in shards.items():
            save_file({name: state[name] for name in part}, folder / pieces[key])
        weight_map = {name: pieces[key] for key, part in shards.items() for name in part}
        (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return {}


@pytest.fixture
def copied(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "checkpoint"))


@pytest.mark.parametrize("kind", ["bin", "sharded", "variant"])
def test_diffusers_folders(checkpoint: Path, copied: Path, kind: str) -> None:
    """``.bin``, shards and variants give the weights of the plain folder, to the exporter and to diffusers' module."""
    expected = load_checkpoint(Source(str(checkpoint))).weights
    options = diffusers_files(copied / "transformer", kind)
    found = load_checkpoint(Source(str(copied), **options))  # type: ignore[arg-type]
    assert set(found.weights) == set(expected)
    for key in expected:
        wanted = expected[key].half().float() if kind == "variant" else expected[key]
        assert torch.equal(found.weights[key], wanted), key
    assert found.transformer is not None
    module = found.transformer().state_dict()
    assert torch.equal(module["proj_out_2.weight"], found.weights["final_layer.linear.weight"])


def test_official_names_of_diffusers_weights(checkpoint: Path, vae: str) -> None:
    """The translation is the converter's: queries, keys and values one below the other, one embedder of many copies."""
    found = load_checkpoint(Source(str(checkpoint)))
    state = load_file(checkpoint / "transformer" / WEIGHTS)
    block = "transformer_blocks.1"
    qkv = torch.cat([state[f"{block}.attn1.to_{name}.weight"] for name in "qkv"])
    assert torch.equal(found.weights["blocks.1.attn.qkv.weight"], qkv)
    assert torch.equal(found.weights["blocks.1.adaLN_modulation.1.bias"], state[f"{block}.norm1.linear.bias"])
    assert len(found.weights) == 2 * (2 * 5 + 2 + 3) + 1
    assert not any(key.startswith("blocks.0.t_embedder") for key in found.weights)


def test_presets(vae: str) -> None:
    """A preset is its table's model in any family; a seed gives diffusers' module the exporter's weights."""
    found = load_checkpoint(Source("DiT-S/8-256", 4, autoencoder=vae, classes=12))
    model = found.model
    assert (model.depth, model.width, model.heads, model.patch_size, model.classes) == (12, 384, 6, 8, 12)
    assert (model.latent_size, model.learned_variance, found.family) == ((64, 64), True, "diffusers")  # this VAE has 4
    assert found.transformer is not None
    state = {name: stored_from_tensor(value) for name, value in found.transformer().state_dict().items()}
    again = official_from_diffusers("module", state, 12)
    assert set(again) == set(found.weights) - {"pos_embed"}
    assert all(torch.equal(again[name], found.weights[name]) for name in again)
    sit = load_checkpoint(Source("SiT-B/4-512", 4, autoencoder=vae))
    assert (sit.family, sit.model.width, sit.model.latent_size, sit.channels) == ("sit", 768, (128, 128), 8)
    other = load_checkpoint(
        Source("DiT-S/2-256", 4, autoencoder=vae, conditioning="in-context", learned_variance=False)
    )
    assert (other.family, other.model.conditioning, other.channels) == ("official", "in-context", 4)
    repa = load_checkpoint(Source("SiT-B/4-512", 4, autoencoder=vae, family="repa"))
    assert (repa.family, repa.diffusion.time, repa.channels) == ("repa", "noise-at-1", 4)
    lightning = load_checkpoint(Source("LightningDiT-B/1-256", 4))
    model = lightning.model
    assert (model.width, model.mlp_width, model.latent_channels, model.latent_size) == (768, 2048, 32, (16, 16))
    assert (model.norm, model.mlp, model.rotary, model.qk_norm) == ("rms", "swiglu", True, "none")
    assert lightning.positions((24, 16)).rotary is not None  # the random file's tables are the code's
    with pytest.raises(CheckpointError, match="diffusers has none such; use --family official"):
        load_checkpoint(Source("DiT-S/2-256", 4, autoencoder=vae, conditioning="adaln", family="diffusers"))
    with pytest.raises(CheckpointError, match="LightningDiT has none such; leave --conditioning out"):
        load_checkpoint(Source("LightningDiT-B/1-256", 4, conditioning="adaln"))
    with pytest.raises(CheckpointError, match=r"LightningDiT-L/1-256: not a preset; .* or LightningDiT-B/1"):
        load_checkpoint(Source("LightningDiT-L/1-256", 4))
    with pytest.raises(
        CheckpointError,
        match=r"SiT-S/2-256 with --family official: expected .* --family sit or repa or meanflow",
    ):
        load_checkpoint(Source("SiT-S/2-256", 4, autoencoder=vae, family="official"))


def test_a_dry_run_makes_nothing(tmp_path: Path, vae: str) -> None:
    """``--dry-run`` describes the export of a file, or of a preset without weights, and leaves the folder as it was."""
    file = saved(weights_of("cross-attention"), tmp_path / "w.safetensors")
    own = ["--heads", "2", "--size", "32x32", "32x48", "--vae", vae]
    for source, options in ((file, own), ("DiT-XL/2-256", ["--fp16"])):
        done = run_command("dit-export", source, *options, "--dry-run", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "roofline" in done.stdout
    assert "894.1 MB" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


# Bad input.


class Malicious:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch executed",)


def changed(change: Callable[[Weights], object]) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        weights = weights_of()
        change(weights)
        return saved(weights, folder / "w.safetensors")

    return make


def truncated(folder: Path) -> Path:
    file = saved(weights_of(), folder / "w.safetensors")
    file.write_bytes(file.read_bytes()[:-1000])
    return file


def malicious(folder: Path) -> Path:
    torch.save({**weights_of(), "extra": Malicious()}, folder / "w.pt")
    return folder / "w.pt"


def plain_pickle(folder: Path) -> Path:
    (folder / "w.pt").write_bytes(pickle.dumps(Malicious()))
    return folder / "w.pt"


def half_a_zip(folder: Path) -> Path:
    file = saved(weights_of(), folder / "w.pt")
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    return file


def with_names(*names: str) -> Callable[[Path], Path]:
    return lambda folder: saved({name: torch.ones(2, 2) for name in names}, folder / "w.safetensors")


def renamed_block(weights: Weights) -> None:
    for key in [key for key in weights if key.startswith("blocks.1.")]:
        weights[key.replace("blocks.1.", "layers.1.")] = weights.pop(key)


BAD_FILES = {
    "a missing key": (
        changed(lambda w: w.pop("blocks.1.mlp.fc2.bias")),
        r"1 missing keys \(blocks.1.mlp.fc2.bias\); most like the official DiT",
    ),
    "mixed layouts": (
        changed(lambda w: w.update({"transformer_blocks.1.ff.net.2.bias": w.pop("blocks.1.mlp.fc2.bias")})),
        r"1 missing keys \(blocks.1.mlp.fc2.bias\) and 1 unexpected keys \(transformer_blocks.1.ff.net.2.bias\)",
    ),
    "many left over": (
        changed(renamed_block),
        r"10 unexpected keys \(layers.1.adaLN_modulation.1.bias,.*\); most like",
    ),
    "another shape": (
        changed(lambda w: w.update({"blocks.0.attn.proj.weight": torch.ones(32, 16)})),
        r"1 weights of another shape \(blocks.0.attn.proj.weight \[32, 16\], expected \[32, 32\]\)",
    ),
    "keys without which nothing is known": (
        changed(lambda w: [w.pop(key) for key in ("x_embedder.proj.weight", "pos_embed", "blocks.0.mlp.fc1.weight")]),
        r"3 missing keys \(blocks.0.mlp.fc1.weight, pos_embed, x_embedder.proj.weight\)",
    ),
    "a scalar": (
        changed(lambda w: w.update({"final_layer.linear.weight": torch.tensor(1.0)})),
        r"final_layer.linear.weight \[\]; expected 2 axes, none of them empty",
    ),
    "no tokens": (
        changed(lambda w: w.update({"pos_embed": torch.ones(1, 0, 32)})),
        r"pos_embed \[1, 0, 32\]; expected 3 axes, none of them empty",
    ),
    "no null row": (
        changed(lambda w: w.update({"y_embedder.embedding_table.weight": torch.ones(1, 32)})),
        "a label table of 1 row; expected a row per class and one for null",
    ),
    "a gap in the blocks": (
        changed(lambda w: w.update({"blocks.400000.attn.qkv.bias": torch.ones(1)})),
        "3 blocks, and none has the number 2",
    ),
    "odd output": (
        changed(lambda w: w.update({"final_layer.linear.weight": torch.ones(17, 32)})),
        "final_layer.linear.weight has 17 rows for patches of 2x2 and 4 latent channels; expected 16 or twice as many",
    ),
    "text-conditioned": (
        with_names("transformer_blocks.0.attn2.to_k.weight", "caption_projection.linear_1.weight", "proj_out.weight"),
        "most like a text-conditioned transformer.*expected a class-conditional DiT or SiT",
    ),
    "a U-Net": (with_names("down_blocks.0.resnets.0.conv1.weight", "time_embedding.linear_1.weight"), "like a U-Net"),
    "nothing known": (with_names("encoder.layer.0.weight"), "like no layout that is known"),
    "truncated": (truncated, "cannot be read.*download or copy it again"),
    "half a zip": (half_a_zip, "a torch.save file that is damaged or was cut off; download or copy it again"),
    "code": (malicious, "reading it could execute code: posix.system; save its tensors by name"),
    "a plain pickle": (plain_pickle, "reading it could execute code: posix.system"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_bad_files(tmp_path: Path, vae: str, kind: str) -> None:
    """Each is one line that says which keys or what is wrong, and what was expected."""
    make, message = BAD_FILES[kind]
    with pytest.raises(CheckpointError, match=message):
        loaded(make(tmp_path), vae)
    assert not Path("executed").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_numbers(tmp_path: Path, vae: str, value: float) -> None:
    """Found when the weight is read, and named."""
    weights = weights_of()
    weights["blocks.1.mlp.fc1.bias"][3] = value
    found = loaded(saved(weights, tmp_path / "w.safetensors"), vae)
    with pytest.raises(CheckpointError, match=r"blocks.1.mlp.fc1.bias holds NaN or infinity"):
        found.weights["blocks.1.mlp.fc1.bias"]


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64])
def test_weights_that_are_not_floating_point(tmp_path: Path, vae: str, dtype: torch.dtype) -> None:
    """Quantized and other tensors are refused by name, not converted."""
    weights = weights_of()
    weights["blocks.0.attn.qkv.weight"] = weights["blocks.0.attn.qkv.weight"].to(dtype)
    found = loaded(saved(weights, tmp_path / "w.pt"), vae)
    with pytest.raises(CheckpointError, match=r"blocks.0.attn.qkv.weight is .*expected floating-point weights"):
        found.weights["blocks.0.attn.qkv.weight"]


def test_nothing_is_written_for_a_bad_file(tmp_path: Path, vae: str) -> None:
    """The command ends with one line and exit 1, with no folder left, NaN in the middle of the work included."""
    weights = weights_of()
    weights["final_layer.linear.bias"][0] = float("nan")
    file = saved(weights, tmp_path / "w.safetensors")
    for options, message in (
        ([], "holds NaN or infinity"),
        (["--sha256", "0" * 64], "it is not the file that was pinned"),
    ):
        done = run_command("dit-export", file, "--heads", "2", "--vae", vae, *options, "-o", tmp_path / "out.bundle")
        assert done.returncode == 1
        assert len(done.stderr.strip().splitlines()) == 1, done.stderr
        assert message in done.stderr
        assert [path.name for path in tmp_path.iterdir()] == [file.name]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"family": "flux"}, "family 'flux' is unknown; expected one of diffusers, official, sit"),
        ({"family": "diffusers"}, "expected a DiTPipeline folder"),
        ({"path": "cubic"}, "path 'cubic' is unknown; expected one of linear, gvp, vp"),
        ({"heads": 5}, "5 heads for width 32; expected a divisor"),
        ({"variant": "fp16"}, "--variant is there to choose among a diffusers folder's files; leave it out"),
        ({"path": "gvp"}, "--path is there to describe a velocity model"),
        ({"conditioning": "adaln"}, "--conditioning is there to describe a preset"),
        ({"classes": 3}, "--classes 3, and a label table of 11 rows.*--classes 10 or --classes 11"),
        ({"time": "noise-at-0"}, "does not say which path it was trained on"),
        (
            {"time": "noise-at-0", "family": "sit"},
            "does not say which path it was trained on; say --path linear, gvp or vp",
        ),
        ({"time": "late"}, "time 'late' is unknown; expected one of noise-at-0, noise-at-1"),
        ({"weights": "ema"}, r"--weights ema: no weights there; there is \. \(32 tensors\)"),
        ({"learned_variance": False}, "--fixed-variance is there to describe a preset"),
        ({"image_sizes": ((1 << 24, 32),)}, "expected multiples of 8.*up to 16384"),
        ({"image_sizes": ((30, 32),)}, "size 30x32: expected multiples of 8"),
        ({"image_sizes": ((32, 32), (32, 32))}, "one is there twice"),
        ({"guidance_channels": 5}, "guidance on 5 channels: expected at most 4"),
        ({"sha256": "ab" * 32}, "SHA-256 .*, expected abab.*it is not the file that was pinned"),
        ({"autoencoder": "/nowhere"}, "no such file or folder"),
    ],
)
def test_options_that_do_not_fit(tmp_path: Path, vae: str, options: dict[str, object], message: str) -> None:
    """Each option that does not fit the file is refused, with what was expected."""
    file = saved(weights_of(), tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(Source(**{"name": str(file), "heads": HEADS, "autoencoder": vae, **options}))  # type: ignore[arg-type]


def test_a_learned_positional_table_has_no_other_size(tmp_path: Path, vae: str) -> None:
    """A table that is not the official formula's cannot be computed elsewhere."""
    weights = weights_of()
    weights["pos_embed"] += 0.01
    with pytest.raises(CheckpointError, match="not the sines and cosines of the official code"):
        loaded(saved(weights, tmp_path / "w.safetensors"), vae, image_sizes=((48, 48),))


def test_damaged_diffusers_folders(copied: Path) -> None:
    """A missing shard, a shard's name that leads outside, a variant that is not there, a text-conditioned model."""
    folder = copied / "transformer"
    with pytest.raises(
        CheckpointError, match=r"no weights of variant 'fp16'; there is diffusion_pytorch_model.safetensors"
    ):
        load_checkpoint(Source(str(copied), variant="fp16"))
    diffusers_files(folder, "sharded")
    index = folder / f"{WEIGHTS}.index.json"
    (folder / "diffusion_pytorch_model-b.safetensors").rename(copied / "moved.safetensors")
    with pytest.raises(CheckpointError, match=r"names the shard 'diffusion_pytorch_model-b.safetensors', which is not"):
        load_checkpoint(Source(str(copied)))
    content = index.read_text()
    index.write_text(content.replace("diffusion_pytorch_model-b", "../moved"))
    with pytest.raises(CheckpointError, match=r"names the shard '\.\./moved.safetensors'"):
        load_checkpoint(Source(str(copied)))
    (copied / "moved.safetensors").rename(folder / "diffusion_pytorch_model-b.safetensors")
    index.write_text(content)
    shard = folder / "diffusion_pytorch_model-a.safetensors"
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=r"diffusion_pytorch_model-a.safetensors: cannot be read"):
        load_checkpoint(Source(str(copied)))
    shutil.copy(folder / "diffusion_pytorch_model-b.safetensors", shard)
    with pytest.raises(CheckpointError, match="is in another shard too"):
        load_checkpoint(Source(str(copied)))
    index.write_text(json.dumps({"weight_map": {}}))
    with pytest.raises(CheckpointError, match="names no shards"):
        load_checkpoint(Source(str(copied)))
    shutil.copy(shard, folder / WEIGHTS)
    with pytest.raises(CheckpointError, match=r"holds both diffusion_pytorch_model.safetensors and"):
        load_checkpoint(Source(str(copied)))
    (copied / "model_index.json").write_text(json.dumps({"_class_name": "PixArtAlphaPipeline"}))
    with pytest.raises(CheckpointError, match="is a PixArtAlphaPipeline; expected a class-conditional DiT or SiT"):
        load_checkpoint(Source(str(copied)))


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("transformer/config.json", {"sample_size": [8, 12]}, r"sample_size is \[8, 12\]|cannot|not a configuration"),
        ("transformer/config.json", {"sample_size": 9}, "sample_size 9 is no multiple of patches of 2"),
        ("transformer/config.json", {"num_embeds_ada_norm": None}, "not a configuration that diffusers can build"),
        ("transformer/config.json", {"num_layers": "2"}, "not a configuration that diffusers can build"),
        ("transformer/config.json", {"patch_size": 0}, "not a configuration that diffusers can build"),
        ("transformer/config.json", {"norm_eps": 7.0}, "norm_eps is 7.0; expected a small number"),
        ("scheduler/scheduler_config.json", {"_class_name": "FlowMatchEulerDiscreteScheduler"}, "is a FlowMatchEuler"),
        ("scheduler/scheduler_config.json", {"beta_schedule": "sigmoid"}, "beta_schedule: got 'sigmoid'"),
        ("scheduler/scheduler_config.json", {"timestep_spacing": "odd"}, "timestep_spacing: got 'odd'"),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": "1000"}, "num_train_timesteps: got '1000'"),
        ("scheduler/scheduler_config.json", {"beta_end": 2.0}, "beta_end 2; expected"),
        ("model_index.json", {"id2label": ["a"]}, "id2label is no object"),
    ],
)
def test_configurations_that_make_no_sense(copied: Path, part: str, changes: dict[str, object], message: str) -> None:
    """A setting of the wrong kind or range is one line, not whatever diffusers raises for it."""
    path = copied / part
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(Source(str(copied)))


def test_another_diffusion_scheduler(checkpoint: Path, copied: Path) -> None:
    """A folder with a DPM-Solver has the same forward process, and nothing is clipped by a default of another class."""
    DPMSolverMultistepScheduler(**SCHEDULER_BETAS).save_pretrained(copied / "scheduler")
    list_scheduler(copied, ["diffusers", "DPMSolverMultistepScheduler"])
    found, plain = load_checkpoint(Source(str(copied))), load_checkpoint(Source(str(checkpoint)))
    assert found.diffusion.betas == plain.diffusion.betas
    assert found.scheduler is not None
    assert not found.scheduler.config.clip_sample


@pytest.mark.parametrize(
    ("scheduler", "options", "sampler"),
    [
        (DPMSolverMultistepScheduler, {}, "dpmpp-2m"),
        (DPMSolverMultistepScheduler, {"solver_order": 3}, "dpmpp-3m"),
        (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}, "dpmpp-2m-sde"),
        (UniPCMultistepScheduler, {}, "unipc"),
        (EulerAncestralDiscreteScheduler, {}, "euler-ancestral"),
        (DDIMScheduler, {"clip_sample": False}, "ddim"),
        (DDPMScheduler, {"clip_sample": False}, "ddpm"),
        (EulerDiscreteScheduler, {}, "ddim"),
    ],
)
def test_a_folders_own_scheduler_is_the_default_sampler(
    copied: Path, scheduler: type[SchedulerMixin], options: dict[str, object], sampler: str
) -> None:
    """Without ``--sampler``, ``dit-sample`` samples as the folder's scheduler does; DDIM where no sampler does."""
    scheduler(**SCHEDULER_BETAS, **options).save_pretrained(copied / "scheduler")
    list_scheduler(copied, ["diffusers", scheduler.__name__])
    assert load_checkpoint(Source(str(copied))).defaults.sampler == sampler


def list_scheduler(folder: Path, listed: object) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"] = listed
    (folder / "model_index.json").write_text(json.dumps(index))


PLAIN = {"num_train_timesteps": 1000, "clip_sample": False}


@pytest.mark.parametrize("listed", ["DDIMScheduler", "DPMSolverMultistepScheduler", "HeunDiscreteScheduler"])
@pytest.mark.parametrize(
    "config",
    [
        {"_class_name": "DDIMScheduler", **PLAIN},
        {"_class_name": "HeunDiscreteScheduler", **PLAIN},
        {"_class_name": "DPMSolverMultistepScheduler", **PLAIN, "solver_order": 3, "algorithm_type": "dpmsolver++"},
        {"_class_name": "DDPMScheduler", **PLAIN, "variance_type": "fixed_large", "timestep_spacing": "trailing"},
    ],
)
def test_model_index_says_which_scheduler_it_is(
    copied: Path, listed: str, config: dict[str, object], caplog: pytest.LogCaptureFixture
) -> None:
    """Fails if defaults or the sampler come from the class of the file where diffusers makes that of the index."""
    (copied / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    list_scheduler(copied, ["diffusers", listed])
    with caplog.at_level(logging.INFO, "dit_runtime"):
        found = load_checkpoint(Source(str(copied)))
    pipeline = DiTPipeline.from_pretrained(copied)
    assert type(pipeline.scheduler).__name__ == listed
    np.testing.assert_allclose(found.diffusion.betas, pipeline.scheduler.betas.double(), rtol=1e-6)  # float32: 6e-8
    third = pipeline.scheduler.config.get("solver_order") == 3
    solver = "dpmpp-3m" if third else "dpmpp-2m"
    assert found.defaults.sampler == (solver if listed.startswith("DPM") else "ddim")
    told = f"lists the scheduler as {listed}, and scheduler_config.json says {config['_class_name']}"
    assert (told in caplog.text) == (listed != config["_class_name"])


@pytest.mark.parametrize(
    "listed", [["their_scheduler", "DDIMScheduler"], ["diffusers", "FlowMatchEulerDiscreteScheduler"], ["diffusers"], 1]
)
def test_another_listed_scheduler_is_refused(copied: Path, listed: object) -> None:
    list_scheduler(copied, listed)
    with pytest.raises(CheckpointError, match=r"model_index\.json: lists the scheduler as .*expected"):
        load_checkpoint(Source(str(copied)))


def test_a_partial_cache_is_completed(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A snapshot that holds the VAE alone is not the pipeline: it is asked for again, online."""
    partial, asked = tmp_path / "abc123", []
    shutil.copytree(checkpoint / "vae", partial / "vae")

    def snapshot(name: str, local_files_only: bool = False, **_: object) -> str:
        asked.append(local_files_only)
        return str(partial if local_files_only else shutil.copytree(checkpoint, tmp_path / "def456"))

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    found = load_checkpoint(Source("owner/name"))
    assert (found.name, found.revision, asked) == ("owner/name", "def456", [True, False])


# Autoencoders.

KL = {
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "block_out_channels": (32, 32, 32),
    "latent_channels": 4,
    "sample_size": 32,
}
TINY = {
    "encoder_block_out_channels": (16, 16, 16),
    "decoder_block_out_channels": (16, 16, 16),
    "num_encoder_blocks": (1, 1, 1),
    "num_decoder_blocks": (1, 1, 1),
}
AUTOENCODERS = {
    "kl": lambda: AutoencoderKL(**KL, scaling_factor=0.3, shift_factor=0.1),
    "kl-without-quant": lambda: AutoencoderKL(**KL, use_quant_conv=False, use_post_quant_conv=False),
    "kl-without-attention": lambda: AutoencoderKL(**KL, mid_block_add_attention=False),
    "kl-of-statistics": lambda: AutoencoderKL(
        **KL, scaling_factor=0.3, latents_mean=[0.5, -1.0, 0.0, 2.0], latents_std=[2.0, 0.5, 1.0, 3.0]
    ),
    "tiny": lambda: AutoencoderTiny(**TINY, scaling_factor=0.7),
}


@pytest.mark.parametrize(
    ("kind", "precision"),
    grid(
        product(AUTOENCODERS, ("fp32", "fp16")),
        fast=lambda *case: case == ("tiny", "fp32"),  # the tiny bundles have a "kl"
    ),
)
def test_any_autoencoder(tmp_path: Path, kind: str, precision: str) -> None:
    """Decoder and encoder of each kind are diffusers' own, with its factors, at any size from one graph."""
    from dit_export.checkpoints.autoencoders import load_autoencoder
    from dit_export.graphs.autoencoder import Decoder, Encoder
    from dit_export.graphs.precision import FP16, FP32
    from dit_export.graphs.tracing import write_decoder, write_encoder

    from dit_runtime.verify.metrics import relative_error

    module = AUTOENCODERS[kind]()
    randomize(module, 3)
    module.save_pretrained(tmp_path / "vae")
    original = load_autoencoder(tmp_path / "vae", None)
    policy, limit = (FP32, 5e-6) if precision == "fp32" else (FP16, 3e-3)
    write_decoder(tmp_path, Decoder(original, policy).eval())
    write_encoder(tmp_path, Encoder(original, policy).eval())
    scale, shift = original.config.scaling_factor, original.config.shift_factor or 0.0
    if kind == "kl-of-statistics":  # as diffusers' pipelines of SDXL apply them
        mean, deviation = (torch.tensor(original.config[key])[:, None, None] for key in ("latents_mean", "latents_std"))
        scale, shift = scale / deviation, mean
    random = np.random.default_rng(1)
    for height, width in ((8, 8), (5, 12)):
        z = random.standard_normal((2, 4, height, width)).astype(np.float32)
        images, decoded = run_graph(tmp_path / "graphs" / "decoder.onnx", latents=z)
        given = random.integers(0, 256, (2, 4 * height, 4 * width, 3), np.uint8)
        encoded = run_graph(tmp_path / "graphs" / "encoder.onnx", images=given)
        with torch.inference_mode():
            expected = original.decode(torch.from_numpy(z) / scale + shift).sample
            x = torch.from_numpy(given).permute(0, 3, 1, 2).float() / 127.5 - 1
            posterior = original.encode(x)
        assert relative_error(decoded, expected.numpy()) <= limit  # measured: 1.0e-6 and 8.0e-4
        exact = ((expected / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy() * 255).round()
        assert np.abs(images - exact).max() <= (1 if precision == "fp32" else 2)
        if kind == "tiny":
            wanted = [(posterior.latents - shift) * scale]
        else:
            wanted = [(posterior.latent_dist.mean - shift) * scale, posterior.latent_dist.std * scale]
        for found, value in zip(encoded, wanted, strict=True):
            assert relative_error(found, value.numpy()) <= limit  # measured: 1.4e-6 and 9.7e-4


def run_graph(path: Path, **inputs: np.ndarray) -> list[np.ndarray]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"]).run(None, inputs)


def test_autoencoders_that_are_refused(tmp_path: Path) -> None:
    """Another class, other latent channels than the model's, and per-channel statistics, each by name."""
    file = saved(weights_of(), tmp_path / "w.safetensors")
    folder = tmp_path / "vae"
    AutoencoderKL(**{**KL, "latent_channels": 16}).save_pretrained(folder)
    with pytest.raises(CheckpointError, match=r"4 latent channels, the autoencoder has 16; name the one.*--vae"):
        loaded(file, str(folder))
    for statistics, message in (
        ({"latents_mean": [0.0] * 4}, r"latents_std is None; expected 4 finite numbers above 0, one for each latent"),
        (
            {"latents_mean": [0.0] * 3, "latents_std": [1.0] * 4},
            "latents_mean is 3 numbers; expected 4 finite numbers,",
        ),
        ({"latents_mean": [0.0] * 4, "latents_std": [1.0, 1.0, 0.0, 1.0]}, "latents_std is 4 numbers; .* above 0"),
        ({"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4, "shift_factor": 0.1}, "a shift_factor and latents_mean"),
    ):
        AutoencoderKL(**KL, **statistics).save_pretrained(folder)
        with pytest.raises(CheckpointError, match=message):
            loaded(file, str(folder))
    AutoencoderKL(**KL, in_channels=1, out_channels=1).save_pretrained(folder)
    with pytest.raises(CheckpointError, match="1 to 1 channels; expected RGB images"):
        loaded(file, str(folder))
    config = json.loads((folder / "config.json").read_text())
    AutoencoderKL(**KL).save_pretrained(folder)
    runs = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**runs, "norm_num_groups": -runs["norm_num_groups"]}))
    with pytest.raises(CheckpointError, match=r"an autoencoder that cannot run .*greater than 0"):
        loaded(file, str(folder))
    for name in ("AutoencoderDC", {"a": 1}, ["AutoencoderKL"], None):
        (folder / "config.json").write_text(json.dumps({**config, "_class_name": name}))
        with pytest.raises(CheckpointError, match=r"is a .*; expected an AutoencoderKL or an AutoencoderTiny"):
            loaded(file, str(folder))
