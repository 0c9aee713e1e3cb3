"""Multiply-accumulates of a transformer's forward, in 10⁹ (GMAC): the count that the paper calls Gflops."""

from __future__ import annotations

from dit_runtime.bundle.manifest import ModelSpec

FREQUENCIES = 256  # size of the sinusoidal timestep features, in the paper and in every implementation
MODULATIONS = {"adaln-zero": 6, "adaln": 4}  # vectors per block: shift, scale (and gate), before attention and MLP
CONDITION_TOKENS = 2  # timestep and label, in-context and in cross-attention


def count_gmac(model: ModelSpec) -> float:
    """GMAC of one forward of one image without guidance, conditioner included: the paper's count.

    The paper's figures are 118.64 for XL/2 at 256², 80.71 for L/2, 23.01 for B/2, 6.06 for S/2 and 524.60 for XL/2 at
    512²; of XL/2's conditionings 119.37 in-context, 137.62 cross-attention and 118.56 adaLN. Here they come
    out 0.01 to 0.07 % lower.
    """
    return count_conditioner_gmac(model) + count_step_gmac(model)


def count_conditioner_gmac(model: ModelSpec, embedders: int = 1) -> float:
    """GMAC of one row of the conditioning table: what leaves the sampling loop.

    The timestep MLP (``embedders`` of them, where a checkpoint's copies differ), and adaLN's modulations or
    cross-attention's keys and values of the two tokens.
    """
    d = model.width
    count = embedders * (FREQUENCIES * d + d * d)
    if model.conditioning in MODULATIONS:
        count += (MODULATIONS[model.conditioning] * model.depth + 2) * d * d
    elif model.conditioning == "cross-attention":
        count += model.depth * CONDITION_TOKENS * 2 * d * d
    return count / 1e9


def count_step_gmac(model: ModelSpec) -> float:
    """GMAC of one branch of one image in the step graph: what every sampling step repeats."""
    d, patch = model.width, model.patch_size**2
    tokens = model.tokens + (CONDITION_TOKENS if model.conditioning == "in-context" else 0)
    # Queries, keys, values and output are 4·D² a token, the MLP's two layers 2·D·hidden, the attention's two products
    # D for each pair of tokens.
    block = tokens * (4 * d * d + 2 * d * model.mlp_width) + 2 * tokens**2 * d
    if model.conditioning == "cross-attention":
        block += tokens * 2 * d * d + 2 * tokens * CONDITION_TOKENS * d  # queries and output; the two products
    ends = model.tokens * patch * (model.latent_channels + model.output_channels) * d
    return (model.depth * block + ends) / 1e9
