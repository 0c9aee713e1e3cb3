"""Models after DiT that are not supported: each is refused by its own name, with the nearest family that is.

The names of parameters are those that the published code gives its modules, read in the repositories named below.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from dit_export.checkpoints.descendants import DESCENDANTS
from dit_export.checkpoints.families import FAMILIES
from support.official_files import loaded, weights_of

from dit_runtime.core.errors import CheckpointError

# By model: the repository, names that its file has beside a DiT's, parts of a DiT that it has not, and what is said.
PUBLISHED: dict[str, tuple[str, tuple[str, ...], tuple[str, ...], str]] = {
    "MDT": (
        "sail-sg/MDT masked_diffusion/models.py",
        (
            *("en_inblocks.0.attn.qkv.weight", "en_outblocks.0.skip_linear.weight", "de_blocks.0.attn.qkv.weight"),
            *("sideblocks.0.attn.rel_pos_bias.relative_position_bias_table", "decoder_pos_embed", "mask_token"),
        ),
        ("blocks.",),
        r"is MDT, with side blocks and long skips between its halves \(en_inblocks.0.*family that is: official",
    ),
    "MaskDiT": (
        "Anima-Lab/MaskDiT models/maskdit.py",
        ("decoder_layer.linear.weight", "decoder_blocks.0.attn.qkv.weight", "decoder_pos_embed", "mask_token"),
        (),
        r"is MaskDiT, with a decoder of masked tokens \(decoder_blocks.*family that is: official",
    ),
    "MaskDiT, fine-tuned without masks": (
        "Anima-Lab/MaskDiT models/maskdit.py",
        ("decoder_layer.linear.weight", "decoder_blocks.0.attn.qkv.weight", "decoder_pos_embed"),
        (),
        r"is MaskDiT, with a decoder of masked tokens",
    ),
    "U-ViT": (
        "baofff/U-ViT libs/uvit.py",
        (
            *("patch_embed.proj.weight", "label_emb.weight", "in_blocks.0.attn.qkv.weight", "mid_block.norm1.weight"),
            *("out_blocks.0.skip_linear.weight", "decoder_pred.weight", "final_layer.weight"),
        ),
        ("blocks.", "x_embedder.", "t_embedder.", "y_embedder.", "final_layer."),
        r"is U-ViT, with long skips between its halves \((model.)?in_blocks.0.*family that is: official",
    ),
    "DiT-MoE": (
        "feizc/DiT-MoE models.py",
        (
            *("blocks.0.moe.experts.0.gate_proj.weight", "blocks.0.moe.gate.weight"),
            "blocks.0.moe.shared_experts.up_proj.weight",
        ),
        ("blocks.0.mlp.",),
        r"is DiT-MoE, with experts in place of the MLP \(blocks.0.moe.*family that is: official",
    ),
    "REG": (
        "Martinser/REG models/sit.py",
        ("cls_projectors2.weight", "wg_norm.weight", "final_layer.linear_cls.weight", "projectors.0.0.weight"),
        (),
        r"is REG, with a class token as a second state \(cls_projectors2.*family that is: repa",
    ),
    "DDT": (
        "MCG-NJU/DDT src/models/denoiser/decoupled_improved_dit.py",
        ("s_embedder.proj.weight", "blocks.0.mlp.w1.weight", "blocks.0.norm1.weight"),
        ("pos_embed", "blocks.0.mlp."),
        r"is DDT, with an encoder, a decoder and a modulation for each token \(s_emb.*family that is: lightningdit",
    ),
    "RAE's DiT with a DDT head": (
        "bytetriper/RAE src/stage2/models/DDT.py",
        ("s_embedder.proj.weight", "s_projector.weight", "t_embedder.W", "enc_feat_rope.freqs_cos"),
        (),
        r"is RAE's DiT with a DDT head, with a modulation for each token \(s_emb.*family that is: lightningdit",
    ),
    "RAE's LightningDiT": (
        "bytetriper/RAE src/stage2/models/lightningDiT.py",
        ("t_embedder.W", "feat_rope.freqs_cos", "blocks.0.norm1.weight", "blocks.0.mlp.w12.weight"),
        (),
        r"is RAE's LightningDiT, with random Fourier features of time \(t_emb.*family that is: lightningdit",
    ),
    "JiT": (
        "LTH14/JiT model_jit.py",
        (
            *("x_embedder.proj1.weight", "x_embedder.proj2.weight", "in_context_posemb"),
            *("feat_rope_incontext.freqs_cos", "blocks.0.mlp.w12.weight"),
        ),
        ("x_embedder.",),
        r"is JiT, with pixels in place of latents \(x_embedder.proj1.*family that is: lightningdit",
    ),
    "improved MeanFlow": (
        "Lyy-iiis/imeanflow, branch torch",
        ("h_embedder.mlp.0.weight", "omega_embedder.mlp.0.weight", "cfg_t_start_embedder.mlp.0.weight", "omega_tokens"),
        ("t_embedder.",),
        r"is improved MeanFlow, with tokens of guidance and time \(omega.*family that is: meanflow",
    ),
    "MeanFlow with a guidance scale as input": (
        "haidog-yaqub/MeanFlow models/dit.py",
        ("r_embedder.mlp.0.weight", "w_embedder.mlp.0.weight", "y_embedder.embedding.weight"),
        (),
        r"is MeanFlow with a guidance scale as an input, with a third embedder \(w_emb.*family that is: meanflow",
    ),
    "Decoupled MeanFlow": (
        "kyungmnlee/dmf models/dmft.py",
        ("logvar_linear.weight", "logvar_linear.bias"),
        (),
        r"is Decoupled MeanFlow, with the second time in its later blocks alone \(logvar.*family that is: meanflow",
    ),
}


@pytest.mark.parametrize("model", PUBLISHED)
@pytest.mark.parametrize("prefix", ["", "model."])
def test_it_is_refused_by_name(model: str, prefix: str, checkpoint: Path, tmp_path: Path) -> None:
    """One line with its name, what it has, the parameter that shows it, and the nearest family; whatever is asked."""
    _, names, without, message = PUBLISHED[model]
    weights = (
        {name: value for name, value in weights_of(out_channels=4).items() if not name.startswith(without)}
        if (without)
        else weights_of(out_channels=4)
    )
    weights |= {name: torch.ones(2, 2) for name in names}
    torch.save({f"{prefix}{name}": value for name, value in weights.items()}, tmp_path / "w.pt")
    for options in ({}, {"family": "sit", "path": "linear", "time": "noise-at-0"}):
        with pytest.raises(CheckpointError, match=message) as caught:
            loaded(tmp_path / "w.pt", str(checkpoint / "vae"), **options)
        assert "\n" not in str(caught.value)


def test_every_descendant_is_tried() -> None:
    """Each of the table is above; the nearest family is one that can be asked for."""
    tried = [message.removeprefix("is ").partition(",")[0] for *_, message in PUBLISHED.values()]
    assert {each.name for each in DESCENDANTS} == set(tried)
    assert {each.nearest for each in DESCENDANTS} <= set(FAMILIES)


def test_a_decoupled_mean_flow_says_so_in_its_arguments(checkpoint: Path, tmp_path: Path) -> None:
    """Without its log-variance its parameters are a SiT's, to the last name: its arguments alone tell."""
    said = {"model": "DMFT-XL/2", "path_type": "linear", "dmf_depth": 20, "encoder_depth": 8}
    torch.save({"ema": weights_of(out_channels=4), "args": said}, tmp_path / "w.pt")
    for options in ({}, {"family": "repa"}):
        with pytest.raises(CheckpointError, match=r"say dmf_depth = 20, .* a Decoupled MeanFlow, .* not supported"):
            loaded(tmp_path / "w.pt", str(checkpoint / "vae"), **options)
