"""The parameter names of a ``DiTTransformer2DModel``, by official name."""

from __future__ import annotations

from dit_export.checkpoints.layouts import EMBEDDERS


def diffusers_names(depth: int) -> dict[str, tuple[str, ...]]:
    """For each official name, the diffusers parameters that hold it, one below the other.

    The embedders are named where block 0 has its copy of them; see ``embedder_names`` for the other blocks.
    """
    pairs: dict[str, tuple[str, ...]] = {
        "x_embedder.proj": ("pos_embed.proj",),
        "final_layer.adaLN_modulation.1": ("proj_out_1",),
        "final_layer.linear": ("proj_out_2",),
    }
    for index in range(depth):
        block, theirs = f"blocks.{index}", f"transformer_blocks.{index}"
        pairs[f"{block}.attn.qkv"] = tuple(f"{theirs}.attn1.to_{name}" for name in "qkv")
        pairs[f"{block}.attn.proj"] = (f"{theirs}.attn1.to_out.0",)
        pairs[f"{block}.mlp.fc1"] = (f"{theirs}.ff.net.0.proj",)
        pairs[f"{block}.mlp.fc2"] = (f"{theirs}.ff.net.2",)
        pairs[f"{block}.adaLN_modulation.1"] = (f"{theirs}.norm1.linear",)
    names = {
        f"{name}.{kind}": tuple(f"{item}.{kind}" for item in theirs)
        for name, theirs in pairs.items()
        for kind in ("weight", "bias")
    }
    return names | {name: (theirs,) for name, theirs in embedder_names(0).items()}


def embedder_names(block: int) -> dict[str, str]:
    """The official name and diffusers' name of each parameter of a block's copy of the embedders."""
    prefix = f"transformer_blocks.{block}.norm1.emb."
    theirs = (
        *(f"timestep_embedder.linear_{layer}.{kind}" for layer in (1, 2) for kind in ("weight", "bias")),
        "class_embedder.embedding_table.weight",
    )
    return {name: prefix + other for name, other in zip(EMBEDDERS, theirs, strict=True)}
