"""Count the kernels that each choice in the step's graph costs: the ablation behind ``dit_export/graphs/model.py``.

    python benchmarks/kernels.py -o benchmarks/kernels.json     build every ablation
    python benchmarks/kernels.py --table benchmarks/kernels.json     print its Markdown table

An ablation is a step as wide as DiT-XL/2-256, with random weights, in FP16, with one thing changed. TensorRT-RTX
compiles it ahead of time for SM 8.9, without a GPU, with 2 and with 4 blocks. The difference of the two is the cost of
two blocks. The last part compiles all 28 blocks; there the gather of the 170 vectors is a kernel of its own. The counts
are those of this builder; TensorRT on a device may make other choices.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from dit_export.checkpoints.layouts import Numerics, official_shapes
from dit_export.checkpoints.positions import Positions, official_table
from dit_export.checkpoints.random_weights import random_tensors
from dit_export.graphs import model
from dit_export.graphs.from_weights import step_from_weights
from dit_export.graphs.precision import FP16
from dit_export.graphs.tracing import save_model, step_axes, trace
from torch import Tensor

from dit_runtime.bundle.manifest import GraphSpec, ModelSpec

XL = ModelSpec("adaln-zero", 4, (32, 32), 2, 1152, 28, 16, 4608, 1000, True)
DEPTHS = (2, 4)
BRANCHES = (1, 2)  # one profile for each
ROWS = 500
AS_EXPORTED = "as exported: product as [N, 3, h, T, d], slices of its second axis"
OUTERMOST = "product as [3, N, h, T, d], slices of its first axis"
PLAIN_SUM = "branches added with no zero first"
WHOLE = (AS_EXPORTED, OUTERMOST, PLAIN_SUM)  # compiled with all 28 blocks
LABEL = "TensorRT-RTX ahead of time, SM 8.9"

Attention = Callable[[model.Attention, Tensor], Tensor]


@dataclass(frozen=True)
class Ablation:
    """A step with one thing changed.

    Attributes:
        group, name: of the row in the table.
        replaced: replacements for functions of the model, by (owner, name).
        config: attributes of the builder's configuration.
        conditioning: of the model.
        exact: whether the changed step computes the same function; False for a change that finds a kernel's cause.
    """

    group: str
    name: str
    replaced: Mapping[tuple[Any, str], Callable[..., Any]] = field(default_factory=dict)
    config: Mapping[str, int] = field(default_factory=dict)
    conditioning: str = "adaln-zero"
    exact: bool = True


# Attention: each function takes x [N, T, D] and returns the mixed values [N, T, D] before the output projection.


def split_heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(2, (heads, -1)).transpose(1, 2)  # (N, h, T, d)


def attend_outermost(self: model.Attention, x: Tensor) -> Tensor:
    q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    return model.attend(q, k, v)


def attend_sliced(self: model.Attention, x: Tensor) -> Tensor:
    q, k, v = (split_heads(part, self.heads) for part in self.qkv(x).chunk(3, dim=2))
    return model.attend(q, k, v)


def attend_columns_by_head(self: model.Attention, x: Tensor) -> Tensor:
    weight, bias = (
        tensor.unflatten(0, (3, self.heads, -1)).transpose(0, 1).flatten(0, 2)
        for tensor in (self.qkv.weight, self.qkv.bias)
    )
    q, k, v = F.linear(x, weight, bias).unflatten(2, (self.heads, 3, -1)).permute(0, 2, 1, 3, 4).unbind(3)
    return model.attend(q, k, v)


def attend_without_transpose(self: model.Attention, x: Tensor) -> Tensor:
    q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).unbind(2)  # (N, T, h, d)
    scores = torch.einsum("bthd,bshd->bhts", q * q.shape[-1] ** -0.5, k)
    return torch.einsum("bhts,bshd->bthd", torch.softmax(scores.float(), dim=-1).to(v.dtype), v).flatten(2)


def attend_three_products(self: model.Attention, x: Tensor) -> Tensor:
    parts = zip(self.qkv.weight.chunk(3), self.qkv.bias.chunk(3), strict=True)
    q, k, v = (split_heads(F.linear(x, weight, bias), self.heads) for weight, bias in parts)
    return model.attend(q, k, v)


def attend_batched_product(self: model.Attention, x: Tensor) -> Tensor:
    weight = self.qkv.weight.unflatten(0, (3, 1, -1)).transpose(2, 3)  # (3, 1, D, D)
    product = x[None] @ weight + self.qkv.bias.unflatten(0, (3, 1, 1, -1))
    q, k, v = (split_heads(part, self.heads) for part in product.unbind(0))
    return model.attend(q, k, v)


def attend_without_bias(self: model.Attention, x: Tensor) -> Tensor:
    q, k, v = (split_heads(F.linear(x, weight), self.heads) for weight in self.qkv.weight.chunk(3))
    return model.attend(q, k, v)


def attend_column_of_ones(self: model.Attention, x: Tensor) -> Tensor:
    # Eight columns, of which one has the biases, because FP16 products are fastest at multiples of 8.
    zeros = torch.zeros(self.qkv.out_features, 7, dtype=x.dtype)
    weight = torch.cat([self.qkv.weight, self.qkv.bias[:, None], zeros], dim=1)
    ones = torch.cat([x, torch.ones_like(x[..., :8])], dim=2)
    q, k, v = (split_heads(F.linear(ones, part), self.heads) for part in weight.chunk(3))
    return model.attend(q, k, v)


def attend_query_bias_alone(self: model.Attention, x: Tensor) -> Tensor:
    # The keys' bias does not change the softmax, and the values' bias can be folded into the output projection's bias.
    q, k, v = F.linear(x, self.qkv.weight).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    return model.attend(q + self.qkv.bias.chunk(3)[0].unflatten(0, (self.heads, 1, -1)), k, v)


def replace_attention(attention: Attention) -> dict[tuple[Any, str], Callable[..., Any]]:
    return {(model.Attention, "forward"): lambda self, x, rotary=None: self.proj(attention(self, x))}


# The scale of the scores: each function takes queries, keys and values [N, h, T, d].


def replace_scores(scores: Callable[[Tensor, Tensor], Tensor]) -> dict[tuple[Any, str], Callable[..., Any]]:
    def attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mixed = torch.softmax(scores(q, k).float(), dim=-1).to(v.dtype) @ v
        return mixed.transpose(1, 2).flatten(2)

    return {(model, "attend"): attended}


# Norm, modulation, products.


def normalize_written_out(self: torch.nn.LayerNorm, x: Tensor) -> Tensor:
    centred = x - x.mean(dim=-1, keepdim=True)
    return centred * torch.rsqrt((centred * centred).mean(dim=-1, keepdim=True) + self.eps)


def gather_for_block(self: model.Step, condition: Tensor, index: int) -> Tensor:
    return condition.unflatten(1, (-1, 2)).index_select(1, torch.arange(3 * index, 3 * index + 3)).flatten(1, 2)


def multiply_flat(self: torch.nn.Linear, x: Tensor) -> Tensor:
    flat = torch.addmm(self.bias, x.flatten(0, -2), self.weight.T)  # one Gemm
    return flat.unflatten(0, x.shape[:-1])


# Ends of the step.


def embed_by_product(self: torch.nn.Conv2d, z: Tensor) -> Tensor:
    side = self.kernel_size[0]
    h, w = z.shape[2] // side, z.shape[3] // side
    patches = z.unflatten(2, (h, side)).unflatten(4, (w, side)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
    return F.linear(patches, self.weight.flatten(1), self.bias).transpose(1, 2).unflatten(2, (h, w))


def sum_plainly(x: Tensor, guidance: Tensor) -> Tensor:
    return (guidance[..., None, None] * x).sum(0)


def sum_by_product(x: Tensor, guidance: Tensor) -> Tensor:
    return torch.einsum("gbc,gbchw->bchw", guidance, x)


def update_slot_by_slot(
    state: Tensor, noise: Tensor, coefficients: Tensor, e: Tensor, v: Tensor | None
) -> tuple[Tensor, Tensor]:
    assert v is not None
    s, c = state.unbind(1), coefficients[:, :, None, None, None].unbind(1)
    rows = [sum((c[2 + 3 * i + j] * s[j] for j in range(3)), c[11 + i] * e) for i in range(3)]
    rows[0] = rows[0] + torch.exp(c[14] + c[15] * v) * c[16] * noise
    return torch.stack(rows, dim=1), c[0] * s[0] + c[1] * e


# Tokens before images in the residual stream, [T, N, D], so that the heads of all images have one stride.


def put_tokens_first(attention: Attention) -> dict[tuple[Any, str], Callable[..., Any]]:
    def block(self: model.Block, x: Tensor, condition: Tensor) -> Tensor:
        half = self.attn.qkv.weight.dtype
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = condition.unbind(1)  # each (N, D)
        x = x + gate_1 * self.attn(model.modulate(self.norm1(x), shift_1, scale_1).to(half)).float()
        return x + gate_2 * self.mlp(model.modulate(self.norm2(x), shift_2, scale_2).to(half)).float()

    def forward(
        self: model.Step,
        state: Tensor,
        noise: Tensor,
        coefficients: Tensor,
        guidance: Tensor,
        rows: Tensor,
        table: Tensor,
    ) -> tuple[Tensor, ...]:
        x = self.patch_embed(state[:, 0]).flatten(2).permute(2, 0, 1) + self.position[0][:, None]  # (T, B, D)
        x = x[:, None].expand(-1, rows.shape[0], -1, -1).flatten(1, 2)  # (T, G·B, D)
        condition = table.index_select(0, rows.flatten())
        for index, one in enumerate(self.blocks):
            x = one(x, self.condition_for_block(condition, index))
        x = self.final(model.modulate(self.final_norm(x), condition[:, -2], condition[:, -1])).transpose(0, 1)
        x = model.unpatchify(x, self.spec).unflatten(0, (rows.shape[0], -1))
        e = model.guide(x[:, :, : self.spec.latent_channels], guidance)
        return model.sampler_update(state, noise, coefficients, e, x[0, :, self.spec.latent_channels :])

    return {(model.Block, "forward"): block, (model.Step, "forward"): forward, **replace_attention(attention)}


def attend_tokens_first(bias: bool) -> Attention:
    def attention(self: model.Attention, x: Tensor) -> Tensor:
        product = F.linear(x, self.qkv.weight, self.qkv.bias if bias else None)
        q, k, v = (part.unflatten(2, (self.heads, -1)).permute(1, 2, 0, 3) for part in product.chunk(3, dim=2))
        return model.attend(q, k, v).transpose(0, 1)

    return attention


def iterate_ablations() -> Iterator[Ablation]:
    yield Ablation("", AS_EXPORTED)
    group = "queries, keys, values"
    yield Ablation(group, OUTERMOST, replace_attention(attend_outermost))
    yield Ablation(group, "slices of the product, each transposed", replace_attention(attend_sliced))
    yield Ablation(group, "columns in the order [h, 3, d]", replace_attention(attend_columns_by_head))
    yield Ablation(group, "no transpose: einsum on [N, T, h, d]", replace_attention(attend_without_transpose))
    yield Ablation(group, "three products", replace_attention(attend_three_products))
    yield Ablation(group, "one batched product, weights [3, D, D]", replace_attention(attend_batched_product))
    group = "their bias"
    yield Ablation(group, "left out", replace_attention(attend_without_bias), exact=False)
    yield Ablation(group, "of the queries alone", replace_attention(attend_query_bias_alone), exact=False)
    yield Ablation(group, "as a row of the weights, beside a column of ones", replace_attention(attend_column_of_ones))
    group = "tokens before images"
    yield Ablation(group, "slices of the product", put_tokens_first(attend_tokens_first(True)))
    yield Ablation(group, "the same, bias left out", put_tokens_first(attend_tokens_first(False)), exact=False)
    group = "scale of the scores"
    yield Ablation(group, "none, as if in the weights", replace_scores(lambda q, k: q @ k.transpose(2, 3)), exact=False)
    yield Ablation(
        group, "after the product", replace_scores(lambda q, k: (q @ k.transpose(2, 3)) * q.shape[-1] ** -0.5)
    )
    root = XL.width // XL.heads
    yield Ablation(
        group, "on queries and keys", replace_scores(lambda q, k: (q * root**-0.25) @ (k * root**-0.25).transpose(2, 3))
    )
    group = "norm, modulation, products"
    yield Ablation(group, "LayerNorm written out", {(torch.nn.LayerNorm, "forward"): normalize_written_out})
    yield Ablation(group, "a gather for each block", {(model.Step, "condition_for_block"): gather_for_block})
    yield Ablation(group, "Gemm of flat tokens", {(torch.nn.Linear, "forward"): multiply_flat})
    group = "ends"
    yield Ablation(group, "patch embedding as a matrix product", {(torch.nn.Conv2d, "forward"): embed_by_product})
    yield Ablation(group, PLAIN_SUM, {(model, "guide"): sum_plainly})
    yield Ablation(group, "branches added by a matrix product", {(model, "guide"): sum_by_product})
    yield Ablation(group, "sampler update slot by slot", {(model, "sampler_update"): update_slot_by_slot})
    group = "builder"
    for level in (0, 5):
        yield Ablation(group, f"optimization level {level}", config={"builder_optimization_level": level})
    yield Ablation(group, "no auxiliary streams", config={"max_aux_streams": 0})
    yield Ablation(
        group, "no auxiliary streams, product as [3, …]", replace_attention(attend_outermost), {"max_aux_streams": 0}
    )
    for conditioning in ("adaln", "cross-attention", "in-context"):
        yield Ablation(conditioning, "as exported", conditioning=conditioning)
        yield Ablation(
            conditioning, "product as [3, …]", replace_attention(attend_outermost), conditioning=conditioning
        )


def export_step(ablation: Ablation, spec: ModelSpec, folder: Path) -> GraphSpec:
    """Export the step's graph of an ablation to ``folder``."""
    shapes = {
        name: shape
        for name, shape in official_shapes(spec, spec.output_channels).items()
        if not re.search("adaLN|t_embedder|y_embedder", name)  # these belong to the conditioner
    }
    weights = {name: stored.read() for name, stored in random_tensors(shapes, 0).items()}
    positions = Positions(official_table(spec.width, spec.grid))
    axes = step_axes(spec, dtype_of_table(spec))
    with ExitStack() as stack:
        for (owner, name), function in ablation.replaced.items():
            stack.enter_context(patch.object(owner, name, function))
        graph = trace(step_from_weights(spec, Numerics(), FP16, weights, positions), axes)
    del graph.graph.outputs[2:]  # these belong to the probe
    return save_model(graph, folder, "step", axes)


def dtype_of_table(spec: ModelSpec) -> torch.dtype:
    return torch.float16 if spec.conditioning == "cross-attention" else torch.float32


def compile_step(onnx: Path, spec: ModelSpec, config: Mapping[str, int]) -> dict[str, Any]:
    """Compile a step for a batch of 1; return the counts of each profile, and the plan's size in bytes."""
    import tensorrt_rtx as trt

    lines: list[str] = []

    class Logger(trt.ILogger):  # type: ignore[misc]  # untyped module
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            lines.extend(message.splitlines())

    logger = Logger()
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(onnx)):
        raise SystemExit(f"{onnx}: {parser.get_error(0).desc()}")
    settings = builder.create_builder_config()
    settings.clear_flag(trt.BuilderFlag.TF32)
    settings.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    settings.num_compute_capabilities = 1
    settings.set_compute_capability(trt.ComputeCapability.SM89, 0)
    for name, value in config.items():
        setattr(settings, name, value)
    axes = step_axes(spec, dtype_of_table(spec)).inputs
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        free = {"batch": 1, "branches": -1, "rows": -1}
        tensor.shape = [free.get(str(axis), axis) for axis in axes[tensor.name][1]]
    for branches in BRANCHES:
        profile = builder.create_optimization_profile()
        for name, (_, shape) in axes.items():
            low, usual, high = (
                [{"batch": 1, "branches": branches, "rows": rows}.get(str(axis), axis) for axis in shape]
                for rows in (1, 50 * branches, ROWS)
            )
            profile.set_shape(name, low, usual, high)
        settings.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, settings)
    if plan is None:
        raise SystemExit(f"{onnx}: cannot be built")
    activations = [int(found[1]) for line in lines if (found := re.match(r"Total Activation Memory: (\d+)", line))]
    return {
        "profiles": [
            count_kernels(lines, index) | {"activation_bytes": activations[index]} for index in range(len(BRANCHES))
        ],
        "plan_bytes": plan.nbytes,
    }


def count_kernels(lines: list[str], profile: int) -> dict[str, int]:
    """Count the kernels of a profile in the builder's list of layers, and the waits and signals of its streams."""
    counts = {"kernels": 0, "waits_signals": 0, "fused_attention": 0}
    for line in lines:
        found = re.match(r"Name: (\S*?)(?: \S.*)?_myl(\d+)_\d+, LayerType: (\w+),", line.strip())
        if found is None or int(found[2]) != profile or found[3] == "shape_call":
            continue
        counts["waits_signals" if found[3] in ("wait", "signal") else "kernels"] += 1
        counts["fused_attention"] += found[1].startswith("_gemm_mha")
    return counts


def measure(ablation: Ablation, depths: tuple[int, ...], work: Path) -> dict[str, Any]:
    """Measure an ablation: its row, with the counts at each depth."""
    row: dict[str, Any] = {"group": ablation.group, "name": ablation.name, "exact": ablation.exact}
    for depth in depths:
        with tempfile.TemporaryDirectory(dir=work) as folder:
            spec = replace(XL, depth=depth, conditioning=ablation.conditioning)
            graph = export_step(ablation, spec, Path(folder))
            row[f"blocks_{depth}"] = compile_step(Path(folder) / graph.file, spec, ablation.config)
        profiles = [tuple(profile.values()) for profile in row[f"blocks_{depth}"]["profiles"]]
        print(f"{ablation.group}: {ablation.name}, {depth} blocks: {profiles}", file=sys.stderr, flush=True)
    return row


def format_table(figures: Mapping[str, Any]) -> str:
    """Format the figures as Markdown: the cost of a block, and of the step's ends."""
    lines = [
        f"{figures['label']}; {figures['builder']}; DiT-XL/2-256's width, FP16, batch 1; G = 1 / G = 2.",
        "",
        "| changed | | kernels a block | kernels at the ends | waits and signals a block | attentions of 4 fused "
        "| activations of 4 blocks, MB | plan of 4 blocks, MB |",
        "|---|---|---|---|---|---|---|---|",
    ]

    def both(values: list[float], digits: int = 0) -> str:
        return " / ".join(f"{value:.{digits}f}" for value in values)

    for row in figures["ablations"]:
        two, four = (row[f"blocks_{depth}"]["profiles"] for depth in DEPTHS)
        block = [(b["kernels"] - a["kernels"]) / 2 for a, b in zip(two, four, strict=True)]
        ends = [a["kernels"] - 2 * each for a, each in zip(two, block, strict=True)]
        waits = [(b["waits_signals"] - a["waits_signals"]) / 2 for a, b in zip(two, four, strict=True)]
        cells = [
            row["group"],
            row["name"] + ("" if row["exact"] else " (another function)"),
            both(block, 0 if all(each.is_integer() for each in block) else 1),
            both(ends),
            both(waits),
            both([b["fused_attention"] for b in four]),
            both([b["activation_bytes"] / 1e6 for b in four], 1),
            f"{row[f'blocks_{DEPTHS[1]}']['plan_bytes'] / 1e6:.1f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "All 28 blocks, compiled:", ""]
    for row in figures["whole"]:
        profiles = row[f"blocks_{XL.depth}"]["profiles"]
        kernels, waits, fused = (
            both([p[key] for p in profiles]) for key in ("kernels", "waits_signals", "fused_attention")
        )
        activations = both([p["activation_bytes"] / 1e6 for p in profiles], 1)
        lines.append(
            f"- {row['name']}: {kernels} kernels, {waits} waits and signals, {fused} attentions fused, activations "
            f"{activations} MB, plan {row[f'blocks_{XL.depth}']['plan_bytes'] / 1e6:.1f} MB"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=Path("build/kernels.json"), help="default: %(default)s")
    parser.add_argument("--table", type=Path, metavar="JSON", help="print the table of a file that was made before")
    parser.add_argument("--only", help="ablations whose group or name contains this; none of 28 blocks")
    parser.add_argument("--resume", action="store_true", help="keep the rows that the output has already")
    args = parser.parse_args()
    if args.table:
        print(format_table(json.loads(args.table.read_text(encoding="utf-8"))))
        return
    import tensorrt_rtx

    args.output.parent.mkdir(parents=True, exist_ok=True)
    figures: dict[str, Any] = {"label": LABEL, "builder": f"tensorrt_rtx {tensorrt_rtx.__version__}"}
    rows = [
        ("ablations", DEPTHS, a) for a in iterate_ablations() if args.only is None or args.only in f"{a.group} {a.name}"
    ]
    rows += [("whole", (XL.depth,), a) for a in iterate_ablations() if args.only is None and a.name in WHOLE]
    figures |= {"ablations": [], "whole": []}
    if args.resume and args.output.exists():
        figures |= json.loads(args.output.read_text(encoding="utf-8"))
    for part, depths, ablation in rows:
        if (ablation.group, ablation.name) in [(row["group"], row["name"]) for row in figures[part]]:
            continue
        figures[part].append(measure(ablation, depths, args.output.parent))
        args.output.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    print(format_table(figures))


if __name__ == "__main__":
    main()
