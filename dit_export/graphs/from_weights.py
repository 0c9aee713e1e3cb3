"""The exported modules with a checkpoint's weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from dit_export.checkpoints.layouts import EMBEDDERS, NORM_PARTS, SECOND_EMBEDDER, Numerics
from dit_export.checkpoints.positions import Positions
from dit_export.graphs.model import Conditioner, PolicyConditioner, Step
from dit_export.graphs.precision import dtype_of
from dit_runtime.bundle.macs import MODULATIONS
from dit_runtime.bundle.manifest import ModelSpec, PrecisionSpec


def conditioner_from_weights(
    spec: ModelSpec, numerics: Numerics, precision: PrecisionSpec, weights: Mapping[str, Tensor]
) -> Conditioner | PolicyConditioner:
    """The conditioner with weights by official name; it shares their storage where the dtype allows it."""
    if spec.observation:
        return _policy_conditioner(spec, numerics, precision, weights)
    own = f"blocks.0.{EMBEDDERS[0]}" in weights  # each block has embedders of its own
    with torch.device("meta"):
        module = Conditioner(spec, numerics, precision, embedders=spec.depth if own else 1)
    names: dict[str, str] = {}
    for index in range(len(module.embedders)):
        prefix = f"blocks.{index}." if own else ""
        for target, source in zip(
            ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias", "labels.weight"), EMBEDDERS, strict=True
        ):
            names[f"embedders.{index}.{target}"] = prefix + source
    second = ("second_fc1.weight", "second_fc1.bias", "second_fc2.weight", "second_fc2.bias")
    if spec.times == 2:
        names |= {f"embedders.0.{target}": source for target, source in zip(second, SECOND_EMBEDDER, strict=True)}
    for kind in ("weight", "bias"):
        if spec.conditioning in MODULATIONS:
            names |= {f"blocks.{i}.{kind}": f"blocks.{i}.adaLN_modulation.1.{kind}" for i in range(spec.depth)}
            names[f"final.{kind}"] = f"final_layer.adaLN_modulation.1.{kind}"
        elif spec.conditioning == "cross-attention":
            names |= {f"blocks.{i}.{kind}": f"blocks.{i}.cross_attn.kv.{kind}" for i in range(spec.depth)}
    dtype = dtype_of(precision, "conditioner")
    module.load_state_dict({name: weights[source].to(dtype) for name, source in names.items()}, assign=True)
    return module.eval().requires_grad_(False)


def _policy_conditioner(
    spec: ModelSpec, numerics: Numerics, precision: PrecisionSpec, weights: Mapping[str, Tensor]
) -> PolicyConditioner:
    with torch.device("meta"):
        module = PolicyConditioner(spec, numerics, precision)
    names = {"fc1": "t_embedder.mlp.0", "fc2": "t_embedder.mlp.2"}
    names |= {f"blocks.{index}": f"blocks.{index}.adaLN_modulation.1" for index in range(spec.depth)}
    dtype = dtype_of(precision, "conditioner")
    parts = {f"{own}.{kind}": f"{name}.{kind}" for own, name in names.items() for kind in ("weight", "bias")}
    module.load_state_dict({own: weights[name].to(dtype) for own, name in parts.items()}, assign=True)
    return module.eval().requires_grad_(False)


def step_from_weights(
    spec: ModelSpec, numerics: Numerics, precision: PrecisionSpec, weights: Mapping[str, Tensor], positions: Positions
) -> Step:
    """The step with weights by official name, each unit in the dtype that the precision policy gives it.

    Output channels that the model does not use are left out.
    """
    with torch.device("meta"):
        module = Step(spec, numerics)
    state = {"position": positions.table}
    if positions.rotary is not None:
        state["rotary"] = positions.rotary
    for target, source, unit, kinds in _step_names(spec):
        for kind in kinds:
            state[f"{target}.{kind}"] = weights[f"{source}.{kind}"].to(
                torch.float32 if unit is None else dtype_of(precision, unit)
            )
    for kind in ("weight", "bias"):
        tensor = state[f"final.{kind}"].unflatten(0, (spec.patch_size**2, -1))  # (p·p, channels, …)
        state[f"final.{kind}"] = tensor[:, : spec.output_channels].flatten(0, 1)
    module.load_state_dict(state, assign=True)
    return module.eval().requires_grad_(False)


def official_linear(spec: ModelSpec, name: str) -> str:
    """The official name of a block's linear layer; LightningDiT has names of its own for SwiGLU's."""
    if spec.mlp == "swiglu":
        return name.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3")
    return name


def _step_names(spec: ModelSpec) -> Iterator[tuple[str, str, str | None, tuple[str, ...]]]:
    """The name in ``Step``, the official name, the unit of the precision policy and the parts of a parameter.

    The unit None is always FP32.
    """
    both = NORM_PARTS["layer"]
    yield "patch_embed", "x_embedder.proj", "patch_embed", both
    yield "final", "final_layer.linear", "final", both
    norms, affine = ["norm1", "norm2"], spec.norm == "rms" or spec.conditioning not in MODULATIONS
    parts = [("attn", "qkv"), ("attn", "proj"), ("mlp", "fc1"), ("mlp", "fc2")]
    if spec.conditioning == "cross-attention":
        norms.append("norm3")
        parts += [("cross_attn", "q"), ("cross_attn", "proj")]
    for index in range(spec.depth):
        block = f"blocks.{index}"
        for unit, name in parts:
            linear = f"{block}.{unit}.{name}"
            yield linear, official_linear(spec, linear), f"{block}.{unit}", both
        for norm in norms if affine else ():
            yield f"{block}.{norm}", f"{block}.{norm}", None, NORM_PARTS[spec.norm]
        for norm in ("attn.q_norm", "attn.k_norm") if spec.qk_norm != "none" else ():
            yield f"{block}.{norm}", f"{block}.{norm}", None, NORM_PARTS[spec.qk_norm]
    if affine:
        yield "final_norm", "final_layer.norm_final", None, NORM_PARTS[spec.norm]
