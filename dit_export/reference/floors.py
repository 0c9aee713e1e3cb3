"""PyTorch's own errors: the unpatched reference in FP32, FP16 and BF16, and how large its numbers become.

They are the denominators of ``dit_runtime.verify.budget``: an engine is judged by how much worse than
PyTorch it is. FP32's error is against FP64, the others' against the FP32 records. Modules compute in the precision that
is measured; guidance and sampler around them stay FP32 (with FP64, FP64), as they do in the graphs.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from dit_export.reference.pipeline import Reference
from dit_runtime.bundle.reader import TILE, UNGUIDED
from dit_runtime.verify.metrics import relative_l2

PRECISIONS = {"fp32": torch.float64, "fp16": torch.float16, "bf16": torch.bfloat16}  # name → what is run to measure it
CHUNK = 64  # images in an evaluation

Record = Mapping[str, Any]


def floors_of(
    reference: Reference,
    records: Mapping[str, Record],
    samplers: Sequence[str],
    measured: int,
    steps: int,
    precisions: Sequence[str],
    advance: Callable[[], None],
) -> dict[str, dict[str, list[float]]]:
    """Relative L2 errors by precision and record; see ``Manifest.floors``.

    A series that is not finite, where PyTorch in FP16 overflows, is left out: it is no yardstick.

    Args:
        reference: the modules.
        records: what they computed in FP32.
        samplers: of the recorded trajectories, that which draws noise last.
        measured: of how many of them single steps are measured, too.
        steps: over how many; of the first trajectory's own way all are.
        precisions: of ``PRECISIONS``, those to measure.
        advance: called after each measurement, ``measurements`` times.
    """
    floors = {}
    for name in precisions:
        with reference.at_precision(PRECISIONS[name]):
            found = dict(_floors(reference, records, samplers, measured, steps, advance))
        floors[name] = {key: [_rounded(value) for value in series] for key, series in found.items() if _finite(series)}
    return floors


def measurements(whole: int, steps: int, measured: int, precisions: Sequence[str]) -> int:
    """How many times ``floors_of`` advances for trajectories of ``whole`` steps, for the progress bar."""
    return len(precisions) * (4 + whole + 2 * steps + measured)


def _floors(
    reference: Reference,
    records: Mapping[str, Record],
    samplers: Sequence[str],
    measured: int,
    steps: int,
    advance: Callable[[], None],
) -> Iterator[tuple[str, list[float]]]:
    record = records["blocks"]
    with reference.observe() as seen:
        _predicted(reference, record)
    stride, tokens = int(record["token_stride"]), reference.spec.tokens
    yield "embedding", [_apart(seen.tokens[0][:1, :tokens:stride], record["tokens"])]
    yield (
        "blocks",
        [_apart(found[:, ::stride], wanted) for found, wanted in zip(seen.blocks, record["outputs"], strict=True)],
    )
    advance()
    for name in ("forward_1", "forward_2"):
        record = records[name]
        with reference.observe() as seen:
            e, v = _predicted(reference, record)
        yield name, _each(e, record["e"])
        if reference.spec.learned_variance:
            yield f"{name} variance", _each(v, record["v"])
        advance()
    table = reference.conditioning_table(seen)
    wanted = records["conditioner"]["table"]
    yield "conditioner", [_apart(table[:, index], wanted[:, index]) for index in range(wanted.shape[1])]
    ends = []  # of trajectories
    for name in samplers:
        record = records[name]
        if name in samplers[:measured]:
            latents, denoised = _teacher_forced(reference, name, record, steps)
            yield f"{name} step", latents
            yield f"{name} denoised", denoised
            advance()
        own = None if name == samplers[0] else steps
        trajectory = list(islice(_free_running(reference, name, record, advance), own))
        yield name, _along(trajectory, record)
        ends.append(trajectory[-1])
    record = records[UNGUIDED]
    unguided = islice(_free_running(reference, samplers[-1], record, advance), steps)
    yield UNGUIDED, _along(list(unguided), record)
    images = records["images"]
    yield "decoder", _each(reference.decoded(_tensor(reference, images["latents"])), images["decoded"])
    yield "image", _each(reference.decoded(ends[0]), images["decoded"])
    for name in (name for name in records if name.startswith(TILE)):
        record = records[name]
        yield f"{name} decoder", _each(reference.decoded(_tensor(reference, record["latents"])), record["decoded"])
        count, _, height, width = record["latents"].shape
        yield f"{name} image", _each(reference.decoded(ends[0][:count, :, :height, :width]), record["decoded"])
    if "encoder" in records:
        record = records["encoder"]
        found = reference.encoded(record["images"])
        yield "encoder", [_apart(value, record[key]) for key, value in found.items()]
    advance()


def _predicted(reference: Reference, record: Record) -> tuple[Tensor, Tensor]:
    times, labels = torch.from_numpy(record["timesteps"]), torch.from_numpy(record["labels"])
    return reference.predicted(_tensor(reference, record["latents"]), times, labels, float(record["guidance"]))


def _teacher_forced(reference: Reference, name: str, record: Record, steps: int) -> tuple[list[float], list[float]]:
    """The error that each of the first ``steps`` adds, starting from the record's latents: next latents, denoised."""
    generators = _generators(reference, record)
    loop = list(reference.loop(name, int(record["steps"]), generators))[:steps]
    batch = len(record["labels"])
    z = _tensor(reference, np.concatenate(record["latents"][: len(loop)]))  # (steps·B, C, H, W)
    times = torch.tensor([step.t for step in loop], dtype=torch.float32).repeat_interleave(batch)
    labels = torch.from_numpy(record["labels"]).repeat(len(loop))
    parts = zip(z.split(CHUNK), times.split(CHUNK), labels.split(CHUNK), strict=True)
    evaluated = [reference.predicted(*part, float(record["guidance"])) for part in parts]
    e, v = (torch.cat(outputs).split(batch) for outputs in zip(*evaluated, strict=True))
    following, denoised = [], []
    for index, step in enumerate(loop):
        after, clean = step.advance(e[index], v[index], z[index * batch : (index + 1) * batch])
        following.append(_apart(after, record["latents"][index + 1]))
        denoised.append(_apart(clean, record["denoised"][index]))
    return following, denoised


def _free_running(reference: Reference, name: str, record: Record, advance: Callable[[], None]) -> Iterator[Tensor]:
    """The latents after each step of a trajectory of its own."""
    generators = _generators(reference, record)
    z, labels = _tensor(reference, record["latents"][0]), torch.from_numpy(record["labels"])
    for step in reference.loop(name, int(record["steps"]), generators):
        e, v = reference.predicted(z, torch.full((len(z),), step.t), labels, float(record["guidance"]))
        z, _ = step.advance(e, v, z)
        advance()
        yield z


def _generators(reference: Reference, record: Record) -> list[torch.Generator]:
    """The record's streams of noise, after the first latents were drawn from them."""
    generators = [torch.Generator().manual_seed(int(seed)) for seed in record["seeds"]]
    randn_tensor(record["latents"][0].shape, generator=generators)
    return generators


def _tensor(reference: Reference, array: Any) -> Tensor:
    return torch.from_numpy(array).to(reference.table_dtype)


def _apart(found: Tensor, wanted: Any) -> float:
    return relative_l2(found.double().numpy(), wanted)


def _along(trajectory: Sequence[Tensor], record: Record) -> list[float]:
    return [_apart(found, wanted) for found, wanted in zip(trajectory, record["latents"][1:], strict=False)]


def _each(found: Tensor, wanted: Any) -> list[float]:
    return [_apart(one, other) for one, other in zip(found, wanted, strict=True)]


def _finite(series: list[float]) -> bool:
    return all(math.isfinite(value) for value in series)


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


@contextlib.contextmanager
def magnitudes_of(reference: Reference, encoder: bool) -> Iterator[dict[str, float]]:
    """The largest |x| inside of this block, by unit of the precision policy: what an FP16 graph must hold.

    Counted is what enters and leaves products of matrices and convolutions, attention scores, and what the
    autoencoder's norms are given, which are its residual sums. ``blocks.N`` is the residual stream after a block, which
    graphs keep in FP32.
    """
    largest: dict[str, float] = {}

    def count(unit: str, *tensors: Tensor) -> None:
        for tensor in tensors:
            largest[unit] = max(largest.get(unit, 0.0), float(tensor.abs().max()))

    hooks = []
    for unit, module in _units(reference, encoder):
        for part in module.modules():
            if isinstance(part, nn.Linear | nn.Conv2d | nn.GroupNorm):
                hooks.append(
                    part.register_forward_hook(lambda _, inputs, output, unit=unit: count(unit, inputs[0], output))
                )
    for index, block in enumerate(reference.blocks):
        attention = block.attn1 if reference.checkpoint.transformer is not None else block.attn
        hooks += _scores(attention, reference.spec.heads, partial(count, f"blocks.{index}.attn"))
        hooks.append(block.register_forward_hook(lambda _, __, output, unit=f"blocks.{index}": count(unit, output)))
    try:
        yield largest
    finally:
        for hook in hooks:
            hook.remove()


def _scores(attention: Any, heads: int, count: Callable[[Tensor], None]) -> list[Any]:
    """Hooks that count a self-attention's scores, scaled as the graphs scale them: diffusers' or the official's."""
    queries: list[Tensor] = []

    def counted(q: Tensor, k: Tensor) -> None:
        q, k = (x.unflatten(-1, (heads, -1)).transpose(-3, -2) for x in (q, k))  # (N, h, T, d)
        count((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1))

    if hasattr(attention, "to_q"):
        return [
            attention.to_q.register_forward_hook(lambda _, __, output: queries.append(output)),
            attention.to_k.register_forward_hook(lambda _, __, output: counted(queries.pop(), output)),
        ]
    return [attention.qkv.register_forward_hook(lambda _, __, output: counted(*output.chunk(3, dim=-1)[:2]))]


def _units(reference: Reference, encoder: bool) -> Iterator[tuple[str, nn.Module]]:
    """The reference's modules by the names that the precision policy and the graphs have for them."""
    model, autoencoder = reference.transformer, reference.checkpoint.autoencoder
    diffusers = reference.checkpoint.transformer is not None
    yield "patch_embed", model.pos_embed if diffusers else model.x_embedder
    for index, block in enumerate(reference.blocks):
        yield f"blocks.{index}.attn", block.attn1 if diffusers else block.attn
        yield f"blocks.{index}.mlp", block.ff if diffusers else block.mlp
        if diffusers:
            yield "conditioner", block.norm1
        elif reference.spec.conditioning == "cross-attention":
            yield f"blocks.{index}.cross_attn", block.cross_attn
        elif reference.spec.conditioning != "in-context":
            yield "conditioner", block.adaLN_modulation
    if diffusers:
        yield "conditioner", model.proj_out_1
        yield "final", model.proj_out_2
    else:
        yield "conditioner", model.t_embedder
        yield "final", model.final_layer.linear
        if hasattr(model.final_layer, "adaLN_modulation"):
            yield "conditioner", model.final_layer.adaLN_modulation
    for unit, names in (("decoder", ("post_quant_conv", "decoder")), ("encoder", ("encoder", "quant_conv"))):
        if unit == "decoder" or encoder:
            for name in names:
                part = getattr(autoencoder, name, None)
                if isinstance(part, nn.Module):
                    yield unit, part
