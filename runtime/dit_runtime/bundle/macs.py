"""Count the multiply-accumulates of a transformer's forward, in 10⁹ (GMAC). The paper calls this count Gflops."""

from __future__ import annotations

from dit_runtime.bundle.manifest import ModelSpec

FREQUENCIES = 256  # size of the sinusoidal timestep features, in the paper and in every implementation
MODULATIONS = {"adaln-zero": 6, "adaln": 4}  # vectors for each block: shift, scale (and gate) of attention and MLP
CONDITION_TOKENS = 2  # timestep and label, of in-context conditioning and of cross-attention


def count_gmac(model: ModelSpec) -> float:
    """Count the GMAC of one forward of one image without guidance, with the conditioner: the paper's count.

    The paper's figures are 118.64 for XL/2 at 256², 80.71 for L/2, 23.01 for B/2, 6.06 for S/2, and 524.60 for XL/2 at
    512². For XL/2's other conditionings they are 119.37 (in-context), 137.62 (cross-attention) and 118.56 (adaLN). The
    counts of this function are 0.01 to 0.07 % lower.
    """
    return count_conditioner_gmac(model) + count_step_gmac(model)


def count_conditioner_gmac(model: ModelSpec, embedders: int = 1) -> float:
    """Count the GMAC of one row of the conditioning table: the work outside the sampling loop.

    It is the work of the timestep MLPs, and of adaLN's modulations or cross-attention's keys and values.

    Args:
        model: the transformer.
        embedders: the number of timestep embedders, for a checkpoint whose copies differ.
    """
    d = model.width
    if model.observation:
        time = model.time_width
        return (4 * time * time + 6 * model.depth * d * (time + model.observation)) / 1e9
    count = embedders * model.times * (FREQUENCIES * d + d * d)
    if model.conditioning in MODULATIONS:
        count += (MODULATIONS[model.conditioning] * model.depth + 2) * d * d
    elif model.conditioning == "cross-attention":
        count += model.depth * CONDITION_TOKENS * 2 * d * d
    return count / 1e9


def count_tokens(model: ModelSpec) -> int:
    """How many tokens a block sees of one branch of one image."""
    return model.tokens + (CONDITION_TOKENS if model.conditioning == "in-context" else 0)


def count_linear_gmac(model: ModelSpec, name: str) -> float:
    """Count the GMAC of a block's linear layer, such as ``blocks.17.mlp.fc1``, for one branch of one image."""
    d, hidden = model.width, model.mlp_width
    sizes = {"attn.qkv": 3 * d * d, "mlp.fc1": (2 if model.mlp == "swiglu" else 1) * d * hidden, "mlp.fc2": hidden * d}
    return count_tokens(model) * sizes.get(name.split(".", 2)[2], d * d) / 1e9


def count_step_gmac(model: ModelSpec) -> float:
    """Count the GMAC of one branch of one image in the step graph: the work that every sampling step repeats."""
    d, patch, tokens = model.width, model.patch_size**2, count_tokens(model)
    # For each token, queries, keys, values and output take 4·D², and the MLP's two layers 2·D·hidden, with SwiGLU
    # 3·D·hidden. For each pair of tokens, the attention's two products take D each.
    block = tokens * (4 * d * d + (3 if model.mlp == "swiglu" else 2) * d * model.mlp_width) + 2 * tokens**2 * d
    if model.conditioning == "cross-attention":
        block += tokens * 2 * d * d + 2 * tokens * CONDITION_TOKENS * d  # queries and output, then the two products
    ends = model.tokens * patch * (model.latent_channels + model.output_channels) * d
    return (model.depth * block + ends) / 1e9
