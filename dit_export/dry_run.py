"""Estimates what an export will make, by arithmetic on shapes: it reads no weight and traces nothing.

GMAC are 10⁹ multiply-adds of the linear layers, convolutions and attention products, as Peebles & Xie 2022 (arXiv
2212.09748, table 1, where they are called Gflops) count them; MB are 10⁶ bytes. Parameters and bytes are those of the
modules that are exported, built on the meta device.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from dit_engines.targets import DEVICES, Device
from dit_export.bundle import check_parts_of_export
from dit_export.checkpoints.autoencoders import Autoencoder, parts_of_decoder, parts_of_encoder, spec_of_autoencoder
from dit_export.checkpoints.families import FAMILIES
from dit_export.checkpoints.layouts import EMBEDDERS, Numerics, official_shapes
from dit_export.checkpoints.policy_folder import own_shapes
from dit_export.checkpoints.presets import preset_from_name
from dit_export.checkpoints.sources import Checkpoint, load_checkpoint
from dit_export.graphs.model import Conditioner, PolicyConditioner, Step, table_axes, table_dtype
from dit_export.graphs.precision import FP16, FP32, check_units, dtype_of
from dit_export.graphs.tracing import INLINE_BYTES
from dit_export.reference.calibration import spec_for_checkpoint
from dit_export.request import ExportRequest
from dit_runtime.bundle.macs import count_conditioner_gmac, count_gmac, count_step_gmac
from dit_runtime.bundle.manifest import ENCODER, ModelSpec, PrecisionSpec
from dit_runtime.bundle.precision import QUANTIZED
from dit_runtime.bundle.quantization import MULTIPLIED, CalibrationSpec, stores_factors

STEPS = (10, 50, 250, 1000)
FEW_STEPS = (1, 2, 4)  # of a model that predicts a whole step
# A guided step has two: the image's label and null; where guidance is in the weights, or of a policy, one is enough.
BRANCHES = 2


@dataclass(frozen=True)
class GraphEstimate:
    """A graph's parameters, the bytes of its weights file in each precision, and its work.

    ``quantized_bytes`` is that file of a quantized export as it is stored; None of others. ``gmac`` is the work of one
    row of the conditioning table (conditioner), one branch of one image (step) or one image (decoder, encoder), at the
    first size.
    """

    name: str
    parameters: int
    fp32_bytes: int
    fp16_bytes: int
    gmac: float
    quantized_bytes: int | None = None


@dataclass(frozen=True)
class Roofline:
    """The least time that one step of one image in FP16 takes on a device, guided unless guidance is in the weights.

    Times are in milliseconds.

    Attributes:
        device: the device.
        compute_ms: the time of the step's operations at the peak rate of the tensor cores.
        memory_inside_ms: the time to read the weights once at the peak bandwidth, if the conditioner were in the step.
        memory_hoisted_ms: the same time as exported: the step reads a row of the conditioning table for each branch in
            place of the conditioner.
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
class CalibrationEstimate:
    """What a quantized export will run to find its scales, at each of its sizes.

    Attributes:
        spec: the trajectories.
        evaluations: forwards of one branch of one image, by PyTorch in FP32.
        gmac: their work, with the conditioner.
    """

    spec: CalibrationSpec
    evaluations: int
    gmac: float


@dataclass(frozen=True)
class SizeEstimate:
    """The estimates for one of the sizes that graphs are made for.

    Attributes:
        latent_size: height and width in latent pixels.
        image_size: height and width in pixels; None without an autoencoder.
        tokens: tokens of an image.
        gmac: the work of one forward of one image, with the conditioner.
        step_gmac: the work of one branch of one image in the step.
        decoder_gmac: the work of decoding one image; None without an autoencoder.
        position_bytes: bytes of the positional tables, which are always FP32.
        rooflines: one for each device.
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
    """The estimates of what an export will make of a model.

    Attributes:
        model, family: the source's shape and family.
        precision, keep_fp32, keep_fp16: the precision policy of the export.
        source_parameters: the parameters that the source stores, with copies and unused output channels.
        embedder_copies: copies of the timestep and label embedders in the source.
        embedders: copies of the timestep and label embedders in the conditioner.
        deduplicated_parameters, deduplicated_bytes: the parameters of copies that the conditioner leaves out, and their
            bytes in this precision.
        hoisted_share: the share of conditioner in the parameters of conditioner and step: it leaves the loop.
        graphs: conditioner, step and, with an autoencoder, decoder (and encoder).
        table: the name of the conditioning table.
        table_shape, table_dtype, table_row_bytes: shape, dtype and bytes of a row of it.
        branches: guidance branches of a step, each of which needs a row a timestep.
        table_bytes: its bytes for each step count.
        sizes: the estimates for each size; the first is the model's.
        calibration: of a quantized export of a checkpoint; None of others.
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
    branches: int
    table_bytes: dict[int, int]
    sizes: tuple[SizeEstimate, ...]
    keep_fp16: tuple[str, ...] = ()
    calibration: CalibrationEstimate | None = None

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
    precision: PrecisionSpec,
    autoencoder: Autoencoder | None = None,
    *,
    family: str = "diffusers",
    channels: int | None = None,
    trained_size: tuple[int, int] | None = None,
    copies_differ: bool = False,
    sizes: Sequence[tuple[int, int]] = (),
    encoder: bool = False,
    calibration: CalibrationSpec | None = None,
    steps: Sequence[int] = STEPS,
    devices: Sequence[Device] = DEVICES,
    branches: int = BRANCHES,
) -> DryRun:
    """The estimates of an export.

    Args:
        model: the transformer's shape at the first size.
        precision: the policy of the graphs. Bytes are given for FP32 and FP16, and for a quantized policy as it stores
            them; rooflines are always FP16's.
        autoencoder: diffusers' module on any device, also on the meta device; its weights are not read.
        family: the source's family, one of ``FAMILIES``; it says which parameters the source stores.
        channels: output channels that the source stores; None means those that the model uses.
        trained_size: latent size of the source's own positional table; None means the model's.
        copies_differ: whether the copies of the embedders in the source differ; then each copy is exported.
        sizes: latent sizes to make graphs for, the first is the model's; empty means the model's alone.
        encoder: whether the encoder is exported too.
        calibration: how a quantized export is calibrated.
        steps: step counts for which the conditioning table's size is given.
        devices: devices for which a roofline is given.
        branches: guidance branches of a step.
    """
    copies = model.depth if FAMILIES[family].copies_embedders else 1
    embedders = copies if copies_differ else 1
    fp16 = FP16 if precision.name == FP32.name else precision
    sides = tuple(sizes) or (model.latent_size,)
    decoding = {} if autoencoder is None else _count_decoder_gmac(model, autoencoder, sides)
    graphs = _estimate_graphs(model, fp16, embedders, autoencoder, sides[0], decoding, encoder)
    stored, copied = _count_source_parameters(model, family, channels, trained_size)
    inside, hoisted = _count_step_bytes(model, fp16, graphs, embedders, branches)
    factor = None if autoencoder is None else spec_of_autoencoder(autoencoder).factor

    def estimate_size(side: tuple[int, int]) -> SizeEstimate:
        at = replace(model, latent_size=side)
        position = _position_bytes(at)
        reads = inside + position, hoisted + position
        return SizeEstimate(
            latent_size=side,
            image_size=None if factor is None else (factor * side[0], factor * side[1]),
            tokens=at.tokens,
            gmac=count_gmac(at),
            step_gmac=count_step_gmac(at),
            decoder_gmac=decoding.get(side),
            position_bytes=position,
            rooflines=tuple(roofline(device, branches * count_step_gmac(at), *reads) for device in devices),
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
        deduplicated_bytes=(copies - embedders) * copied * dtype_of(precision, "conditioner").itemsize,
        hoisted_share=graphs["conditioner"].parameters / (graphs["conditioner"].parameters + graphs["step"].parameters),
        graphs=tuple(graphs.values()),
        table=table,
        table_shape=row,
        table_dtype=str(_table_dtype(model, precision)).removeprefix("torch."),
        table_row_bytes=_row_bytes(model, precision),
        branches=branches,
        table_bytes={count: count * branches * _row_bytes(model, precision) for count in steps},
        sizes=tuple(estimate_size(side) for side in sides),
        keep_fp16=precision.keep_fp16,
        calibration=None if calibration is None else _estimate_calibration(model, calibration, sides),
    )


def _estimate_calibration(
    model: ModelSpec, spec: CalibrationSpec, sides: Sequence[tuple[int, int]]
) -> CalibrationEstimate:
    evaluations = len(spec.labels) * spec.steps * (1 if spec.guidance == 1 else BRANCHES)
    works = [evaluations * count_gmac(replace(model, latent_size=side)) for side in sides]
    return CalibrationEstimate(spec, evaluations * len(sides), sum(works))


def _count_decoder_gmac(
    model: ModelSpec, autoencoder: Autoencoder, sides: Sequence[tuple[int, int]]
) -> dict[tuple[int, int], float]:
    """The work of decoding one image at each latent size."""
    parts = parts_of_decoder(autoencoder)
    return {side: _count_gmac(parts, (model.latent_channels, *side)) for side in sides}


def _estimate_graphs(
    model: ModelSpec,
    fp16: PrecisionSpec,
    embedders: int,
    autoencoder: Autoencoder | None,
    side: tuple[int, int],
    decoding: Mapping[tuple[int, int], float],
    encoder: bool,
) -> dict[str, GraphEstimate]:
    """The estimates of the graphs at the latent size ``side``."""
    with torch.device("meta"):
        modules: dict[str, list[nn.Module]] = {
            "conditioner": [
                PolicyConditioner(model, Numerics(), fp16)
                if model.observation
                else Conditioner(model, Numerics(), fp16, embedders)
            ],
            "step": [Step(model, Numerics())],
        }
    work = {"conditioner": count_conditioner_gmac(model, embedders), "step": count_step_gmac(model)}
    if autoencoder is not None:
        modules["decoder"] = parts_of_decoder(autoencoder)
        work["decoder"] = decoding[side]
        if encoder:
            factor = spec_of_autoencoder(autoencoder).factor
            modules[ENCODER] = parts_of_encoder(autoencoder)
            image = (autoencoder.config.in_channels, factor * side[0], factor * side[1])
            work[ENCODER] = _count_gmac(modules[ENCODER], image)
    return {name: _estimate_graph(name, parts, fp16, work[name], model.conditioning) for name, parts in modules.items()}


def _count_source_parameters(
    model: ModelSpec, family: str, channels: int | None, trained_size: tuple[int, int] | None
) -> tuple[int, int]:
    """The parameters that the source stores, and those of one copy of its embedders."""
    if model.observation:
        return sum(map(math.prod, own_shapes(model, has_positions=False).values())), 0
    trained = replace(model, latent_size=trained_size or model.latent_size)
    shapes = official_shapes(trained, channels or model.output_channels)
    stored = sum(map(math.prod, shapes.values()))
    copied = sum(math.prod(shapes[name]) for name in EMBEDDERS)
    if FAMILIES[family].copies_embedders:
        stored += (model.depth - 1) * copied
    if not FAMILIES[family].stores_positions:
        stored -= math.prod(shapes["pos_embed"])
    return stored, copied


def _count_step_bytes(
    model: ModelSpec, fp16: PrecisionSpec, graphs: Mapping[str, GraphEstimate], embedders: int, branches: int
) -> tuple[int, int]:
    """The bytes of weights that a step would read with the conditioner in it, and those that it reads as exported.

    Neither counts the positional table.
    """
    fixed = graphs["step"].fp16_bytes - _position_bytes(model)
    # A step would read every weight of the conditioner except the label table, of which it would read one row.
    label_tables = embedders * model.label_rows * model.width * dtype_of(fp16, "conditioner").itemsize
    label_tables = 0 if model.observation else label_tables
    inside = fixed + graphs["conditioner"].fp16_bytes - label_tables
    return inside, fixed + branches * _row_bytes(model, fp16)


def dry_run_of_request(request: ExportRequest) -> tuple[Checkpoint, DryRun]:
    """The checkpoint that a request names, and the estimates of its export. A preset needs no ``random_weights``.

    Raises:
        CheckpointError: the checkpoint cannot be read or is not supported, or an argument does not fit it.
    """
    source = request.checkpoint
    if source.random_seed is None and preset_from_name(source.name) is not None:
        source = replace(source, random_seed=0)  # the estimates need shapes alone
    precision = request.read_precision()
    checkpoint = load_checkpoint(source)
    check_units(precision, checkpoint.model)
    check_parts_of_export(checkpoint, precision, request.encoder)
    calibration = request.calibration_of(precision)
    estimate = dry_run_of(
        checkpoint.model,
        precision,
        checkpoint.autoencoder,
        family=checkpoint.family,
        channels=checkpoint.channels,
        trained_size=checkpoint.trained_size,
        copies_differ=checkpoint.copies_differ,
        sizes=checkpoint.sizes,
        encoder=request.encoder,
        steps=STEPS if checkpoint.model.times == 1 else FEW_STEPS,
        branches=1 if checkpoint.diffusion.guidance_inside or checkpoint.model.observation else BRANCHES,
        calibration=None if calibration is None else spec_for_checkpoint(checkpoint, calibration),
    )
    return checkpoint, estimate


def roofline(device: Device, work: float, inside: float, hoisted: float) -> Roofline:
    """The roofline of ``work`` GMAC that read ``inside`` bytes, or ``hoisted`` bytes without the conditioner."""
    return Roofline(
        device,
        compute_ms=2 * work / device.fp16_tflops,  # 10⁹ operations by 10¹² a second
        memory_inside_ms=inside / device.bandwidth_gb_s / 1e6,
        memory_hoisted_ms=hoisted / device.bandwidth_gb_s / 1e6,
    )


def _table_dtype(model: ModelSpec, precision: PrecisionSpec) -> torch.dtype:
    return table_dtype(model, dtype_of(precision, "conditioner"))


def _row_bytes(model: ModelSpec, precision: PrecisionSpec) -> int:
    return math.prod(table_axes(model)[1]) * _table_dtype(model, precision).itemsize


def _position_bytes(model: ModelSpec) -> int:
    rotary = 2 * (model.width // model.heads) if model.rotary else 0
    return 4 * model.tokens * (model.width + rotary)


def _estimate_graph(
    name: str, modules: Iterable[nn.Module], fp16: PrecisionSpec, work: float, conditioning: str
) -> GraphEstimate:
    """The estimate of a graph from its modules: it counts the tensors of the weights file, each in its unit's dtype."""
    parameters, quantized, sizes = 0, 0, {FP32: 0, fp16: 0}
    for path, part in itertools.chain.from_iterable(module.named_modules() for module in modules):
        tables = [buffer for key, buffer in part.named_buffers(recurse=False) if key == "rotary"]
        counts = [tensor.numel() for tensor in (*part.parameters(recurse=False), *tables)]
        parameters += sum(counts)
        if isinstance(part, nn.LayerNorm) and not part.elementwise_affine:
            counts.append(math.prod(part.normalized_shape))  # ONNX's must have a scale: a vector of ones
        # Normalizations are FP32, and so are the tensors of the step itself, its positional tables.
        always = isinstance(part, (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)) or (name == "step" and not path)
        unit = ".".join(path.split(".")[:3]) if name == "step" else name  # blocks.17.attn of blocks.17.attn.qkv
        for policy in sizes:
            itemsize = 4 if always else dtype_of(policy, unit).itemsize
            found = _sum_stored(count * itemsize for count in counts)
            sizes[policy] += found
        own = name == "step" and fp16.quantizes(path)
        quantized += _quantized_bytes(path, part, conditioning) if own else found
    stored = quantized if fp16.name in QUANTIZED else None
    return GraphEstimate(name, parameters, sizes[FP32], sizes[fp16], work, stored)


def _sum_stored(sizes: Iterable[int]) -> int:
    """The bytes of the tensors that are in the weights file."""
    return sum(size for size in sizes if size > INLINE_BYTES)


def _quantized_bytes(path: str, part: nn.Module, conditioning: str) -> int:
    """The bytes of a quantized linear layer: a byte a weight; scales, bias and factors in FP16.

    Factors in adaLN's place are FP32, as its arithmetic is.
    """
    assert isinstance(part, nn.Linear)
    sizes = [part.weight.numel(), 2 * part.out_features, 0 if part.bias is None else 2 * part.bias.numel()]
    if stores_factors(conditioning, path):
        sizes.append((2 if path.endswith(MULTIPLIED) else 4) * part.in_features)
    return _sum_stored(sizes)


def _count_gmac(modules: Iterable[nn.Module], shape: tuple[int, ...]) -> float:
    """GMAC of modules that run in turn on an input ``[1, *shape]``, by torch's counter on the meta device."""
    x = torch.empty(1, *shape, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        for module in modules:
            tensors = itertools.chain(module.named_parameters(), module.named_buffers())
            shadows = {name: tensor.to("meta", torch.float32) for name, tensor in tensors}
            x = functional_call(module, shadows, (x,))
    return float(counter.get_total_flops()) / 2 / 1e9
