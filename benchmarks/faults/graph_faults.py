"""Faults that engines and exporters have had: edits of graphs, wrong inputs and outputs of graphs, wrong schedules."""

from __future__ import annotations

import graph_edits as edit
import numpy as np
from fault import BELOW, IN_FP16_ONLY, NOT_THERE, Fault
from faulty_engine import Arrays, Edit

from dit_runtime.bundle.manifest import ENCODER


def edit_network(change: Edit) -> dict[str, Edit]:
    """Edit the step and the probe in the same way."""
    return dict.fromkeys(("step", "probe"), change)


def put_nan(inputs: Arrays, outputs: Arrays) -> None:
    for value in outputs.values():
        if len(value) > 1:
            value[1] = np.nan


def roll_images(inputs: Arrays, outputs: Arrays) -> None:
    for value in outputs.values():
        value[:] = np.roll(value, 1, axis=0)


def swap_slots(inputs: Arrays, outputs: Arrays) -> None:
    if "next_state" in outputs:
        outputs["next_state"][:, 1:] = outputs["next_state"][:, :0:-1].copy()


def swap_gates(inputs: Arrays, outputs: Arrays) -> None:
    (table,) = outputs.values()
    table[:, [2, 8]] = table[:, [8, 2]]


def move_label(inputs: Arrays) -> None:
    inputs["labels"][:] = np.maximum(inputs["labels"] - 1, 0)


def use_class_0_for_null(inputs: Arrays) -> None:
    inputs["labels"][inputs["labels"] == 10] = 0


def move_timestep(inputs: Arrays) -> None:
    inputs["timesteps"] += 1


def use_first_rows(inputs: Arrays) -> None:
    """Give every image the first image's rows of the conditioning table."""
    inputs["rows"][:] = inputs["rows"][:, :1].copy()


def round_coefficients(inputs: Arrays) -> None:
    inputs["coefficients"][:] = inputs["coefficients"].astype(np.float16)


def clip_guidance(inputs: Arrays) -> None:
    inputs["guidance"][:] = np.clip(inputs["guidance"], -4, 4)


def reverse_channels(inputs: Arrays, outputs: Arrays) -> None:
    if "images" in outputs:
        outputs["images"][:] = outputs["images"][..., ::-1].copy()


def make_constant(inputs: Arrays, outputs: Arrays) -> None:
    if "images" in outputs:
        outputs["images"][:] = 0


def unscale_mean(inputs: Arrays, outputs: Arrays) -> None:
    outputs["mean"] /= 0.9


def reverse_images(inputs: Arrays) -> None:
    inputs["images"] = np.ascontiguousarray(inputs["images"][..., ::-1])


def take_logarithm(inputs: Arrays, outputs: Arrays) -> None:
    outputs["std"][:] = np.log(outputs["std"])


def swap_branches(inputs: Arrays) -> None:
    if len(inputs["rows"]) == 2:
        inputs["rows"][:] = inputs["rows"][::-1].copy()


GRAPH_FAULTS = (
    # The inputs of the blocks.
    Fault("sinusoids with exponent i/128 for i/127", "conditioner", edits={"conditioner": edit.shift_frequencies}),
    Fault("sine and cosine exchanged", "conditioner", edits={"conditioner": edit.swap_features}),
    Fault("conditioner: timestep one too large", "conditioner", inputs={"conditioner": move_timestep}),
    Fault("conditioner: label one too small", "conditioner", inputs={"conditioner": move_label}),
    Fault("conditioner: null class is class 0", "conditioner", inputs={"conditioner": use_class_0_for_null}),
    Fault(
        "gates of two blocks exchanged in the table",
        "conditioner",
        "block 0 attention gate",
        outputs={"conditioner": swap_gates},
    ),
    Fault(
        "patches transposed",
        "embedding",
        edits=edit_network(edit.initializer("patch_embed.weight", lambda weight: weight.transpose(0, 1, 3, 2))),
    ),
    Fault(
        "positions transposed",
        "embedding",
        edits=edit_network(edit.initializer("position", edit.transpose_positions)),
    ),
    Fault(
        "positions of another size",
        "embedding",
        edits=edit_network(edit.initializer("position", edit.take_larger_positions)),
    ),
    # The blocks.
    Fault(
        "attention norm's ε 1e-5 for 1e-6",
        "blocks",
        "first: block 1",
        edits=edit_network(edit.set_epsilon("blocks.1.norm1/LayerNormalization", 1e-5)),
        fp16=BELOW,
    ),
    Fault(
        "MLP norm's ε 1e-6 for 1e-5",
        "blocks",
        "first: block 0",
        edits=edit_network(edit.set_epsilon("blocks.0.norm2/LayerNormalization", 1e-6)),
        fp16=BELOW,
    ),
    Fault(
        "weights scaled until FP16 overflows",
        "blocks",
        "not finite: block 1",
        edits=edit_network(edit.make_overflow),
        fp32=IN_FP16_ONLY,
    ),
    Fault(
        "a product's weights rounded to FP16",
        "blocks",
        "first: block 1",
        edits=edit_network(
            lambda graph: graph.weight(
                "blocks.1.mlp.fc1/MatMul", lambda weight: weight.astype(np.float16).astype(weight.dtype)
            )
        ),
        fp16=NOT_THERE,
    ),
    Fault("adaLN: shift for scale", "blocks", "first: block 0", edits=edit_network(edit.swap_shift_and_scale)),
    Fault("gate of another block", "blocks", "first: block 1", edits=edit_network(edit.use_another_gate)),
    Fault("softmax without its scale", "blocks", "first: block 1", edits=edit_network(edit.drop_scale)),
    Fault(
        "a head's values permuted",
        "blocks",
        "first: block 1",
        edits=edit_network(lambda graph: graph.weight("blocks.1.attn.qkv/MatMul", edit.permute_head)),
    ),
    Fault(
        "queries for keys",
        "blocks",
        "first: block 0",
        edits=edit_network(lambda graph: graph.weight("blocks.0.attn.qkv/MatMul", edit.swap_queries_and_keys)),
    ),
    Fault("exact GELU for tanh's", "blocks", "first: block 0", edits=edit_network(edit.use_exact_gelu), fp16=BELOW),
    Fault(
        "a bias dropped",
        "blocks",
        "first: block 1",
        edits=edit_network(edit.initializer("blocks.1.attn.proj.bias", np.zeros_like)),
    ),
    # The network.
    Fault(
        "last norm's ε 1e-5 for 1e-6",
        "forward G=1",
        edits=edit_network(edit.set_epsilon("final_norm/LayerNormalization", 1e-5)),
        fp16=BELOW,
    ),
    Fault("unpatchified transposed", "forward G=1", edits=edit_network(edit.transpose_patches)),
    Fault("one image of a batch is not a number", "forward G=1", "not finite", outputs={"step": put_nan}),
    Fault("images of a batch in another order", "forward G=1", outputs={"step": roll_images}),
    Fault("one condition for the whole batch", "forward G=1", inputs={"step": use_first_rows}),
    Fault("guidance halves exchanged", "forward G=2", inputs={"step": swap_branches}),
    Fault("variance of the null branch", "forward G=2 variance", edits=edit_network(edit.take_null_variance)),
    Fault("the sampler's memory exchanged", "sampler update", "slot", outputs={"step": swap_slots}),
    Fault("coefficients rounded to FP16", "sampler update", inputs={"step": round_coefficients}),
    Fault("guidance weights beyond 4 are clipped", "ddim free-running, strong", inputs={"step": clip_guidance}),
    # The autoencoder and the images.
    Fault("the VAE's scale left out", "decoder", edits={"decoder": edit.drop_vae_scale}),
    Fault(
        "a bias of the VAE dropped",
        "decoder",
        edits={"decoder": edit.initializer("decoder.conv_in.bias", np.zeros_like)},
        fp16=BELOW,
    ),
    Fault("levels truncated", "uint8 images", "-0.4", edits={"decoder": edit.truncate}),
    Fault("red and blue exchanged", "uint8 images", outputs={"decoder": reverse_channels}),
    Fault("constant images", "uint8 images", outputs={"decoder": make_constant}),
    Fault("the encoder's mean not scaled", "encoder", "first: mean", outputs={ENCODER: unscale_mean}, graph=ENCODER),
    Fault("the encoder's channels reversed", "encoder", inputs={ENCODER: reverse_images}, graph=ENCODER),
    Fault(
        "the encoder's deviation is a logarithm",
        "encoder",
        "first: std",
        outputs={ENCODER: take_logarithm},
        graph=ENCODER,
    ),
)
