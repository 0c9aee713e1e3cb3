"""A VAE that is one file: the same module as from its folder, or one clear line."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from dit_export.checkpoints.autoencoders import Autoencoder, autoencoder_for, load_autoencoder
from dit_export.checkpoints.random_weights import randomize
from dit_export.checkpoints.source import Source
from safetensors.torch import save_file
from support.commands import run_command

from dit_runtime.core.errors import CheckpointError

Tensors = dict[str, torch.Tensor]
WEIGHTS = "diffusion_pytorch_model.safetensors"


def made(**settings: object) -> AutoencoderKL:
    """Two blocks of equal width, so that an order which is turned around is found by values, not by shapes."""
    widths = settings.pop("block_out_channels", (32, 64, 64))
    lowest = "Attn" if settings.pop("attention", False) else ""  # after each residual block of the lowest level
    others = len(widths) - 1  # type: ignore[arg-type]
    module = AutoencoderKL(
        block_out_channels=widths,  # type: ignore[arg-type]
        down_block_types=(*("DownEncoderBlock2D",) * others, f"{lowest}DownEncoderBlock2D"),
        up_block_types=(f"{lowest}UpDecoderBlock2D", *("UpDecoderBlock2D",) * others),
        **settings,  # type: ignore[arg-type]
    )
    randomize(module, 4)
    return module


def latent_diffusion_names(module: AutoencoderKL) -> Tensors:
    """The module's tensors as CompVis/latent-diffusion, ``ldm/modules/diffusionmodules/model.py``, names them."""
    blocks = len(module.config.block_out_channels)
    found = {}
    parts = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out": "proj_out"}
    for name, tensor in module.state_dict().items():
        part, *rest = name.split(".")
        end = rest[-1]
        if "attentions" in rest and tensor.ndim == 2:
            tensor = tensor[:, :, None, None]
        if part not in ("encoder", "decoder"):
            new = name
        elif rest[0] in ("down_blocks", "up_blocks"):
            level = rest[1] if part == "encoder" else str(blocks - 1 - int(rest[1]))
            way = rest[0].removesuffix("_blocks")
            inner = f"block.{rest[3]}" if rest[2] == "resnets" else f"{way}sample"
            leaf = ".".join(rest[4:]).replace("conv_shortcut", "nin_shortcut")
            if rest[2] == "attentions":
                inner, leaf = f"attn.{rest[3]}", f"{parts[rest[4]]}.{end}"
            new = f"{part}.{way}.{level}.{inner}.{leaf}"
        elif rest[0] == "mid_block" and rest[1] == "resnets":
            new = f"{part}.mid.block_{int(rest[2]) + 1}.{'.'.join(rest[3:])}"
        elif rest[0] == "mid_block":
            new = f"{part}.mid.attn_1.{parts[rest[3]]}.{end}"
        else:
            new = f"{part}.{rest[0].replace('conv_norm_out', 'norm_out')}.{end}"
        found[new] = tensor.contiguous()
    return found


def old_names(module: AutoencoderKL) -> Tensors:
    """The names of attention before diffusers 0.17, which stabilityai/sd-vae-ft-ema still has."""
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    found = {}
    for name, tensor in module.state_dict().items():
        for new, old in names.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
        found[name] = tensor
    return found


def read(path: Path, *scaling: float) -> Autoencoder:
    return autoencoder_for(Source("none", autoencoder=str(path), autoencoder_scaling=scaling or None))


def same(found: Autoencoder, expected: Autoencoder) -> bool:
    first, second = found.state_dict(), expected.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def averaged(tensors: Tensors) -> Tensors:
    """A training checkpoint: raw weights, their average under LitEma's names, and a loss with weights of its own."""
    raw = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    ema = {f"model_ema.{name.replace('.', '')}": tensor for name, tensor in tensors.items()}
    return {**raw, **ema, "model_ema.decay": torch.ones(()), "loss.logvar": torch.zeros(())}


def whole(tensors: Tensors) -> Tensors:
    """A Stable Diffusion file, with a U-Net and a text model beside the autoencoder."""
    others = ("model.diffusion_model.out.2.bias", "cond_stage_model.x.weight", "model_ema.diffusion_modelout2bias")
    return {
        **{f"first_stage_model.{name}": tensor for name, tensor in tensors.items()},
        **{name: torch.zeros(1) for name in others},
    }


def test_the_names_of_latent_diffusion_are_those_that_diffusers_converts() -> None:
    """The oracle of this module: diffusers' own conversion gives back what the names were made from."""
    module = made()
    converted = convert_ldm_vae_checkpoint(latent_diffusion_names(module), dict(module.config))
    assert converted.keys() == module.state_dict().keys()
    assert all(torch.equal(tensor, converted[name]) for name, tensor in module.state_dict().items())


@pytest.mark.parametrize(
    ("file", "settings", "arrange"),
    [
        ("vae.safetensors", {"layers_per_block": 2}, AutoencoderKL.state_dict),
        (WEIGHTS, {"use_quant_conv": False, "use_post_quant_conv": False}, AutoencoderKL.state_dict),
        ("vae.pt", {"mid_block_add_attention": False}, AutoencoderKL.state_dict),
        ("vae.bin", {}, old_names),
        ("vae.safetensors", {"layers_per_block": 2, "latent_channels": 8}, latent_diffusion_names),
        (
            "va-vae.pt",
            {"attention": True, "layers_per_block": 2, "latent_channels": 32},
            lambda module: {
                "state_dict": {**latent_diffusion_names(module), "foundation_model.model.x": torch.ones(1)}
            },
        ),
        ("vae.ckpt", {}, lambda module: {"state_dict": latent_diffusion_names(module), "epoch": 3}),
        ("v1-5.safetensors", {}, lambda module: whole(latent_diffusion_names(module))),
        ("last.ckpt", {}, lambda module: {"state_dict": averaged(latent_diffusion_names(module))}),
    ],
    ids=[
        "diffusers",
        "no-quant",
        "no-attention",
        "old-names",
        "latent-diffusion",
        "va-vae",
        "ckpt",
        "pipeline",
        "training",
    ],
)
def test_a_file_gives_the_module_that_it_was_saved_from(
    tmp_path: Path, file: str, settings: dict[str, object], arrange: Callable[[AutoencoderKL], Tensors]
) -> None:
    """Every layout: the configuration follows from the shapes, the weights are bit-equal, the scaling is as given."""
    module, path = made(**settings), tmp_path / file
    save_file(arrange(module), path) if path.suffix == ".safetensors" else torch.save(arrange(module), path)
    found = read(path, 0.5, 0.25)
    assert isinstance(found, AutoencoderKL)
    assert same(found, module)
    assert (found.config.scaling_factor, found.config.shift_factor) == (0.5, 0.25)
    with torch.inference_mode():
        z = torch.randn(1, module.config.latent_channels, 4, 4, generator=torch.Generator().manual_seed(0))
        # Attention's products of weights at other addresses may be summed in another order; measured: 8e-7.
        torch.testing.assert_close(found.decode(z).sample, module.decode(z).sample, rtol=0, atol=1e-5)
        x = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
        assert torch.equal(found.encode(x).latent_dist.mean, module.encode(x).latent_dist.mean)


def test_a_tiny_autoencoder_is_a_file_too(tmp_path: Path) -> None:
    """AutoencoderTiny, whose shapes are those of the published ones."""
    module = AutoencoderTiny()
    randomize(module, 5)
    save_file(module.state_dict(), tmp_path / "taesd.safetensors")
    found = read(tmp_path / "taesd.safetensors", 1.0)
    assert isinstance(found, AutoencoderTiny)
    assert same(found, module)


def test_a_configuration_beside_the_file_is_used(tmp_path: Path) -> None:
    """A file of a diffusers folder has its scaling; to give another beside it would contradict it."""
    module = made(scaling_factor=0.75, norm_num_groups=16)
    module.save_pretrained(tmp_path)
    found = read(tmp_path / WEIGHTS)
    assert same(found, module)
    assert (found.config.scaling_factor, found.config.norm_num_groups) == (0.75, 16)
    for path in (tmp_path, tmp_path / WEIGHTS):
        with pytest.raises(
            CheckpointError, match=r"config.json: states the scaling of latents; leave --vae-scaling out"
        ):
            read(path, 0.5)


def test_a_folder_with_one_file_alone(tmp_path: Path) -> None:
    """A folder without config.json is the file in it; of several the user names one."""
    module = made()
    save_file(latent_diffusion_names(module), tmp_path / "vae-ft-mse-840000-ema-pruned.safetensors")
    assert same(read(tmp_path, 0.5), module)
    assert same(load_autoencoder(tmp_path, "fp16", (0.5,)), module)
    shutil.copy(tmp_path / "vae-ft-mse-840000-ema-pruned.safetensors", tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"name one of its files: other.safetensors, vae-ft-mse"):
        read(tmp_path, 0.5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("decoder.norm_out.bias"), r"1 missing parameters of an AutoencoderKL \(decoder.conv_norm_out"),
        (
            lambda t: t.update({"decoder.up.2.block.0.other.weight": torch.zeros(1)}),
            "1 spare parameters of an AutoencoderKL",
        ),
        (
            lambda t: t.update({"quantize.embedding.weight": torch.zeros(4, 4)}),
            r"spare .*\(quantize.embedding.weight\)",
        ),
        (
            lambda t: t.update({"encoder.norm_out.bias": torch.zeros(3)}),
            r"conv_norm_out.bias is \[3\], expected \[64\]",
        ),
        (lambda t: t.update({"encoder.mid.attn_1.q.weight": torch.zeros(64, 64, 3, 3)}), r"expected \[64, 64\]"),
        (lambda t: t.update({"encoder.conv_in.bias": torch.full((32,), torch.nan)}), "conv_in.bias holds NaN"),
        (lambda t: t.pop("decoder.conv_in.weight"), "not an autoencoder that is known"),
        (lambda t: t.pop("encoder.conv_in.weight"), "holds no autoencoder with an encoder"),
        (lambda t: t.clear(), r"holds no autoencoder with an encoder \(it holds nothing"),
        (lambda t: t.update({"vae.encoder.conv_in.weight": torch.zeros(1)}), "holds 2 autoencoders"),
        (
            lambda t: t.update({"encoder.down.0.block.0.conv1.weight": torch.zeros(33, 32, 3, 3)}),
            r"\(33\) must be divisible by num_groups",
        ),
    ],
)
def test_a_file_that_is_no_autoencoder(tmp_path: Path, change: Callable[[Tensors], object], message: str) -> None:
    """Missing, spare, misshapen and broken parameters: one line that names them."""
    tensors, path = latent_diffusion_names(made()), tmp_path / "vae.safetensors"
    change(tensors)
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=message) as caught:
        read(path, 0.5)
    assert "\n" not in str(caught.value)


def test_other_files_in_place_of_an_autoencoder(tmp_path: Path, checkpoint: Path) -> None:
    """A transformer, a file that is no weights file, grey images."""
    with pytest.raises(CheckpointError, match="holds no autoencoder with an encoder"):
        read(checkpoint / "transformer" / WEIGHTS, 0.5)
    for name, content in (("notes.txt", b"notes"), ("vae.safetensors", b"<html>"), ("vae.pt", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=name):
            read(tmp_path / name, 0.5)
    save_file(made(in_channels=1).state_dict(), tmp_path / "grey.safetensors")
    with pytest.raises(CheckpointError, match="1 to 3 channels; expected RGB"):
        read(tmp_path / "grey.safetensors", 0.5)


def test_the_scaling_is_asked_for(tmp_path: Path) -> None:
    """No file tells the scaling: Stable Diffusion's and SDXL's have the same shapes and another factor each."""
    save_file(made().state_dict(), tmp_path / "vae.safetensors")
    with pytest.raises(CheckpointError, match=r"add --vae-scaling FACTOR \[SHIFT\] \(0.18215 for Stable Diffusion"):
        read(tmp_path / "vae.safetensors")


def test_the_reference_reads_the_same_file(tmp_path: Path) -> None:
    """The reference has a process of its own, which gets the source as JSON."""
    for scaling in (None, (0.5,), (0.5, 0.25)):
        source = Source("none", autoencoder="vae.pt", autoencoder_scaling=scaling)
        assert Source.from_json(source.to_json()) == source


def test_the_command_takes_a_file(tmp_path: Path, checkpoint: Path) -> None:
    """The options of the command, and what is wrong with them, in one line."""
    file = shutil.copy(checkpoint / "vae" / WEIGHTS, tmp_path / "vae.safetensors")

    def run(*options: str | Path) -> tuple[int, str]:
        done = run_command("dit-export", checkpoint, *options, "--dry-run")
        assert done.stderr.count("\n") == done.returncode
        return done.returncode, done.stderr

    assert run("--vae", file, "--vae-scaling", "0.5") == (0, "")
    for scaling in (("0",), ("nan",), ("0.5", "inf"), ("1", "2", "3")):
        code, text = run("--vae", file, "--vae-scaling", *scaling)
        assert code == 1
        assert "expected a factor above 0, such as 0.18215, and maybe a shift" in text
    assert "states the scaling of latents; leave --vae-scaling out" in run("--vae-scaling", "0.5")[1]
    random = ("--random-weights", "0", "--vae-scaling", "1", "--dry-run")
    done = run_command("dit-export", "DiT-S/8-256", *random)
    assert "--vae-scaling is there to describe a VAE that is a file; leave it out" in done.stderr
