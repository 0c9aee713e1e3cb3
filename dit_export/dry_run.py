"""What an export will make, by arithmetic on shapes: no weight is read, nothing is traced.

GMAC are 10⁹ multiply-adds of the linear layers, convolutions and attention products, as Peebles & Xie 2022 (arXiv
2212.09748, table 1, where they are called Gflops) count them; MB are 10⁶ bytes. Parameters and bytes are those of the
modules that are exported, built on the meta device.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from textwrap import fill
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from dit_engines.targets import DEVICES, Device
from dit_export.checkpoints.diffusers_folder import Autoencoder, autoencoder_spec
from dit_export.checkpoints.layouts import EMBEDDERS, Numerics, official_shapes
from dit_export.graphs.model import Conditioner, Step, table_axes
from dit_export.graphs.precision import FP16, FP32, Precision
from dit_export.graphs.tracing import INLINE_BYTES
from dit_runtime.bundle.macs import conditioner_gmac, gmac, step_gmac
from dit_runtime.bundle.manifest import ENCODER, ModelSpec

STEPS = (10, 50, 250, 1000)
BRANCHES = 2  # of a guided step: the image's label and null
COLUMNS = 110
GMAC_OF = {"conditioner": "a row of the table", "step": "a branch", "decoder": "an image", ENCODER: "an image"}


@dataclass(frozen=True)
class GraphEstimate:
    """A graph's parameters, the bytes of its weights file in each precision, and its work.

    ``gmac``: of one row of the table (conditioner) or one branch of one image (step) or one image (decoder,
    encoder), at the first size.
    """

    name: str
    parameters: int
    fp32_bytes: int
    fp16_bytes: int
    gmac: float


@dataclass(frozen=True)
class Roofline:
    """The least time on a device of one guided step of one image in FP16, in milliseconds.

    ``compute_ms``: its operations at the peak of the tensor cores. ``memory_inside_ms``: reading the weights once at
    the peak bandwidth, were the conditioner still in the step. ``memory_hoisted_ms``: as exported, with its two rows of
    the table in place of the conditioner.
    """

    device: Device
    compute_ms: float
    memory_inside_ms: float
    memory_hoisted_ms: float

    @property
    def bound_ms(self) -> float:
        return max(self.compute_ms, self.memory_hoisted_ms)

    @property
    def bound_by(self) -> str:
        return "compute" if self.compute_ms >= self.memory_hoisted_ms else "memory"


@dataclass(frozen=True)
class SizeEstimate:
    """One of the sizes that graphs are made for.

    ``image_size``: height and width in pixels, None without an autoencoder. ``gmac``: of one forward of one image,
    conditioner included; ``decoder_gmac``: of one image. ``position_bytes``: the positional table, always FP32.
    """

    latent_size: tuple[int, int]
    image_size: tuple[int, int] | None
    tokens: int
    gmac: float
    step_gmac: float
    decoder_gmac: float | None
    position_bytes: int
    rooflines: tuple[Roofline, ...]


@dataclass(frozen=True)
class DryRun:
    """What an export will make of a model.

    Attributes:
        model, family: of the source.
        precision, keep_fp32: the policy that was asked for.
        source_parameters: as the source stores them, copies and unused output channels included.
        embedder_copies, embedders: of timestep and label, in the source and in the conditioner.
        deduplicated_parameters, deduplicated_bytes: what the conditioner is spared of the copies, in this precision.
        hoisted_share: of the parameters of conditioner and step, those that leave the loop.
        graphs: conditioner, step, and with an autoencoder decoder (and encoder).
        table: name of the conditioning table; ``table_shape`` and ``table_dtype`` are its row's.
        table_bytes: of a row, then for each step count of ``steps`` with guidance, two rows a timestep.
        sizes: the first is the model's.
    """

    model: ModelSpec
    family: str
    precision: str
    keep_fp32: tuple[str, ...]
    source_parameters: int
    embedder_copies: int
    embedders: int
    deduplicated_parameters: int
    deduplicated_bytes: int
    hoisted_share: float
    graphs: tuple[GraphEstimate, ...]
    table: str
    table_shape: tuple[int, ...]
    table_dtype: str
    table_row_bytes: int
    table_bytes: dict[int, int]
    sizes: tuple[SizeEstimate, ...]

    def graph(self, name: str) -> GraphEstimate:
        """A graph by its name."""
        return next(graph for graph in self.graphs if graph.name == name)

    def as_json(self) -> dict[str, Any]:
        """Plain values; times are in milliseconds."""
        values = asdict(self)
        values["table_bytes"] = {str(steps): size for steps, size in self.table_bytes.items()}
        values["sizes"] = [
            {
                **asdict(size),
                "rooflines": [
                    {**asdict(line), "bound_ms": line.bound_ms, "bound_by": line.bound_by} for line in size.rooflines
                ],
            }
            for size in self.sizes
        ]
        return values


def dry_run_of(
    model: ModelSpec,
    precision: Precision,
    autoencoder: Autoencoder | None = None,
    *,
    family: str = "diffusers",
    channels: int | None = None,
    trained_size: tuple[int, int] | None = None,
    copies_differ: bool = False,
    sizes: Sequence[tuple[int, int]] = (),
    encoder: bool = False,
    steps: Sequence[int] = STEPS,
    devices: Sequence[Device] = DEVICES,
) -> DryRun:
    """The plan of an export.

    Args:
        model: the transformer's shape at the first size.
        precision: the policy of the graphs. Bytes are also given for the other one, and rooflines are always FP16's.
        autoencoder: diffusers' module, on any device, the meta device included; its weights are not read.
        family: whose layout the source has. diffusers' keeps a copy of the embedders in each block, and no positional
            table; the others keep one of each.
        channels: output channels that the source stores; None is those that the model uses.
        trained_size: latent size of the source's own positional table; None is the model's.
        copies_differ: diffusers' copies of the embedders are not the same, so each is kept.
        sizes: latent sizes to make graphs for, the first being the model's; none is that one.
        encoder: whether the autoencoder's other half is exported too.
        steps: step counts to give the conditioning table's size for.
        devices: to give a roofline for.
    """
    copies = model.depth if family == "diffusers" else 1
    embedders = copies if copies_differ else 1
    fp16 = FP16 if precision.name == "fp32" else precision
    with torch.device("meta"):
        modules: dict[str, list[nn.Module]] = {
            "conditioner": [Conditioner(model, Numerics(), precision, embedders)],
            "step": [Step(model, Numerics())],
        }
    work = {"conditioner": conditioner_gmac(model, embedders), "step": step_gmac(model)}
    sides = tuple(sizes) or (model.latent_size,)
    factor, decoding = None, {}
    if autoencoder is not None:
        factor = autoencoder_spec(autoencoder).factor
        modules["decoder"] = _parts(autoencoder, "post_quant_conv", "decoder")
        decoding = {side: _measured_gmac(modules["decoder"], (model.latent_channels, *side)) for side in sides}
        work["decoder"] = decoding[sides[0]]
        if encoder:
            modules[ENCODER] = _parts(autoencoder, "encoder", "quant_conv")
            image = (autoencoder.config.in_channels, factor * sides[0][0], factor * sides[0][1])
            work[ENCODER] = _measured_gmac(modules[ENCODER], image)
    graphs = {name: _graph_estimate(name, parts, fp16, work[name]) for name, parts in modules.items()}

    trained = replace(model, latent_size=trained_size or model.latent_size)
    shapes = official_shapes(trained, channels or model.output_channels)
    stored = sum(map(math.prod, shapes.values()))
    copied = sum(math.prod(shapes[name]) for name in EMBEDDERS)  # of one copy
    if family == "diffusers":
        stored += (copies - 1) * copied - math.prod(shapes["pos_embed"])  # the table is computed there
    # A step reads every weight but the label table, of which it would read a row.
    fixed = graphs["step"].fp16_bytes - _position_bytes(model)
    label_tables = embedders * (model.classes + 1) * model.width * fp16.dtype("conditioner").itemsize
    inside = fixed + graphs["conditioner"].fp16_bytes - label_tables
    hoisted = fixed + BRANCHES * _row_bytes(model, fp16)

    def size_plan(side: tuple[int, int]) -> SizeEstimate:
        at = replace(model, latent_size=side)
        position = _position_bytes(at)
        reads = inside + position, hoisted + position
        return SizeEstimate(
            latent_size=side,
            image_size=None if factor is None else (factor * side[0], factor * side[1]),
            tokens=at.tokens,
            gmac=gmac(at),
            step_gmac=step_gmac(at),
            decoder_gmac=decoding.get(side),
            position_bytes=position,
            rooflines=tuple(roofline(device, BRANCHES * step_gmac(at), *reads) for device in devices),
        )

    table, row = table_axes(model)
    return DryRun(
        model=model,
        family=family,
        precision=precision.name,
        keep_fp32=precision.keep_fp32,
        source_parameters=stored,
        embedder_copies=copies,
        embedders=embedders,
        deduplicated_parameters=(copies - embedders) * copied,
        deduplicated_bytes=(copies - embedders) * copied * precision.dtype("conditioner").itemsize,
        hoisted_share=graphs["conditioner"].parameters / (graphs["conditioner"].parameters + graphs["step"].parameters),
        graphs=tuple(graphs.values()),
        table=table,
        table_shape=row,
        table_dtype=str(_table_dtype(model, precision)).removeprefix("torch."),
        table_row_bytes=_row_bytes(model, precision),
        table_bytes={count: count * BRANCHES * _row_bytes(model, precision) for count in steps},
        sizes=tuple(size_plan(side) for side in sides),
    )


def roofline(device: Device, work: float, inside: float, hoisted: float) -> Roofline:
    """The roofline of ``work`` GMAC that read ``inside`` bytes, or ``hoisted`` bytes with the conditioner outside."""
    return Roofline(
        device,
        compute_ms=2 * work / device.fp16_tflops,  # 10⁹ operations by 10¹² a second
        memory_inside_ms=inside / device.bandwidth_gb_s / 1e6,
        memory_hoisted_ms=hoisted / device.bandwidth_gb_s / 1e6,
    )


def _table_dtype(model: ModelSpec, precision: Precision) -> torch.dtype:
    """As ``Conditioner`` gives it: keys and values in their products' dtype, all else FP32."""
    return precision.dtype("conditioner") if model.conditioning == "cross-attention" else torch.float32


def _row_bytes(model: ModelSpec, precision: Precision) -> int:
    return math.prod(table_axes(model)[1]) * _table_dtype(model, precision).itemsize


def _position_bytes(model: ModelSpec) -> int:
    return 4 * model.tokens * model.width


def _parts(autoencoder: Autoencoder, *names: str) -> list[nn.Module]:
    """Submodules in the order they act; an ``AutoencoderTiny`` has no convolutions for quantization."""
    found = (getattr(autoencoder, name, None) for name in names)
    return [module for module in found if module is not None]


def _graph_estimate(name: str, modules: Iterable[nn.Module], fp16: Precision, work: float) -> GraphEstimate:
    """A graph from its modules: every tensor that does not stay in the ``.onnx`` file, in its unit's dtype."""
    parameters, sizes = 0, {FP32: 0, fp16: 0}
    for path, part in itertools.chain.from_iterable(module.named_modules() for module in modules):
        counts = [parameter.numel() for parameter in part.parameters(recurse=False)]
        parameters += sum(counts)
        if isinstance(part, nn.LayerNorm) and not part.elementwise_affine:
            counts.append(math.prod(part.normalized_shape))  # ONNX's must have a scale: a vector of ones
        # Normalizations are FP32, and so is the one parameter of the step itself, its positional table.
        always = isinstance(part, (nn.LayerNorm, nn.GroupNorm)) or (name == "step" and not path)
        unit = ".".join(path.split(".")[:3]) if name == "step" else name  # blocks.17.attn of blocks.17.attn.qkv
        for policy in sizes:
            itemsize = 4 if always else policy.dtype(unit).itemsize
            sizes[policy] += sum(count * itemsize for count in counts if count * itemsize > INLINE_BYTES)
    return GraphEstimate(name, parameters, sizes[FP32], sizes[fp16], work)


def _measured_gmac(modules: Iterable[nn.Module], shape: tuple[int, ...]) -> float:
    """GMAC of modules one after the other on a ``[1, *shape]``, counted by torch on the meta device."""
    x = torch.empty(1, *shape, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        for module in modules:
            tensors = itertools.chain(module.named_parameters(), module.named_buffers())
            shadows = {name: tensor.to("meta", torch.float32) for name, tensor in tensors}
            x = functional_call(module, shadows, (x,))
    return float(counter.get_total_flops()) / 2 / 1e9


def format_dry_run(plan: DryRun) -> str:
    """The plan as text for a terminal, at most 110 columns wide."""
    model = plan.model
    kept = f"; in FP32 {', '.join(plan.keep_fp32)}" if plan.keep_fp32 else ""
    if plan.embedder_copies == 1:
        copies = "nothing: the source has one timestep and one label embedder"
    elif plan.embedders > 1:
        copies = f"nothing: the {plan.embedder_copies} copies of the embedders differ, so each is kept"
    else:
        copies = (
            f"{plan.embedder_copies} copies of the embedders → 1: {_count(plan.deduplicated_parameters)} parameters, "
            f"{_size(plan.deduplicated_bytes)}"
        )
    row = "×".join(str(axis) for axis in plan.table_shape)
    steps = ", ".join(f"{count} steps {_size(size)}" for count, size in plan.table_bytes.items())
    facts = {
        "model": f"{model.conditioning}, {model.depth} blocks of width {model.width}, {model.heads} heads, patches of "
        f"{model.patch_size}, {model.classes} classes",
        "source": f"{plan.family}, {_count(plan.source_parameters)} parameters as stored",
        "precision": plan.precision + kept,
        "deduplicated": copies,
        "hoisted": f"{plan.hoisted_share:.1%} of the transformer's parameters: run once, not in every step",
        "table": f"{plan.table}, a row {row} {plan.table_dtype}, {_size(plan.table_row_bytes)}; with guidance, two "
        f"rows a step: {steps}",
    }
    lines = [fill(f"{name:<14}{text}", COLUMNS, subsequent_indent=" " * 14) for name, text in facts.items()]
    lines += ["", f"{'graph':<12} {'parameters':>10} {'FP32':>10} {'FP16':>10} {'GMAC':>9}"]
    lines += [
        f"{graph.name:<12} {_count(graph.parameters):>10} {_size(graph.fp32_bytes):>10} {_size(graph.fp16_bytes):>10} "
        f"{_number(graph.gmac):>9} {GMAC_OF[graph.name]}"
        for graph in plan.graphs
    ]
    for size in plan.sizes:
        height, width = size.image_size or size.latent_size
        decoder = "" if size.decoder_gmac is None else f", decoder {_number(size.decoder_gmac)} an image"
        lines += [
            "",
            f"{height}x{width}{' latents' if size.image_size is None else ''}: {size.tokens} tokens; GMAC: forward "
            f"{_number(size.gmac)} a branch{decoder}; positional table {_size(size.position_bytes)}",
            "roofline of a guided step of one image in FP16, ms; memory with the conditioner inside, and hoisted",
            f"{'device':<24} {'SM':>5} {'memory':>8} {'GB/s':>7} {'TFLOPS':>7} {'compute':>8} {'inside':>8} "
            f"{'hoisted':>8} {'bound':>8}",
        ]
        lines += [
            f"{line.device.name:<24} {line.device.compute_capability:>5} {line.device.memory_gb:>5g} GB "
            f"{line.device.bandwidth_gb_s:>7g} {_number(line.device.fp16_tflops):>7} {_number(line.compute_ms):>8} "
            f"{_number(line.memory_inside_ms):>8} {_number(line.memory_hoisted_ms):>8} {_number(line.bound_ms):>8} "
            f"{line.bound_by}"
            for line in size.rooflines
        ]
    return "\n".join(lines)


def _count(number: int) -> str:
    return f"{number / 1e6:.1f} M" if number >= 1e6 else f"{number / 1e3:.1f} k"


def _size(number: int) -> str:
    return f"{number / 1e6:.1f} MB" if number >= 1e6 else f"{number / 1e3:.1f} kB"


def _number(value: float) -> str:
    return f"{value:.2f}" if value >= 1 else f"{value:.3g}"
