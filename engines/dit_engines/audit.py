"""Audit an engine: what the builder made, read from the builder's own output and not from the ONNX.

The log's figures are those of TensorRT-RTX's ahead-of-time builder. TensorRT on a device may make other choices, which
are read from the engine's inspector.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dit_engines.kernels import Kernel, split_by_profile
from dit_engines.recipe import can_fuse_attention
from dit_runtime.backends.tensorrt.memory import describe_bytes
from dit_runtime.bundle.manifest import AUTOENCODER, ModelSpec, PrecisionSpec
from dit_runtime.bundle.precision import HALF, QUANTIZED, TENSORRT_DATATYPES, Precision, is_kept
from dit_runtime.core.decode import decode, optional

# The least share of the multiply-adds that must be in the graph's own precision, outside the units that a policy keeps
# in FP32. Measured: 100 % in every graph of every variant.
LEAST_SHARE = 0.99
# The precisions that this audit knows.
JUDGED = (Precision.FP32, Precision.FP16, Precision.BF16, *QUANTIZED)
QUANTIZING = ("QuantizeLinear", "DequantizeLinear")
# For a builder that does not tell datatypes: the largest ratio of an engine's weights to the bundle's weights, which
# would be 2 in FP32 (RTX's is within 10 % of 1); and the bytes that a plan may have besides its weights, for a builder
# that tells only the plan's size.
WEIGHTS_MOST, CODE_BYTES = 1.5, 24_000_000
# Weights of decoder and encoder are compared only where less than this share of the datatypes is known: a builder may
# store the filters of convolutions transformed, which makes them larger.
TOLD_SHARE = 0.5
LARGEST = 5  # kernels that an audit lists


@dataclass(frozen=True)
class LargeKernel:
    """One of the largest kernels: its share of the profile's multiply-adds, and the datatype of its products."""

    name: str
    share: float
    dtype: str


@dataclass
class ProfileAudit:
    """Counts of one optimization profile.

    Attributes:
        kernels: kernel launches, without host arithmetic and synchronization.
        synchronizations: waits and signals between streams.
        fused_attention: attentions that are one kernel each.
        reformats: kernels that only move data or change its datatype.
        casts: the kernels of ``reformats`` that change the datatype.
        activation_bytes: device memory of the activations at the profile's largest shapes.
        multiplied: multiply-adds at the profile's usual shapes by datatype; the empty name is an unknown datatype.
        kept: as ``multiplied``, for the units that the precision policy keeps in FP32; ``multiplied`` is without them.
        quantized: as ``multiplied``, for the layers that the bundle quantizes; ``multiplied`` is without them. None in
            what another version wrote.
        quantizing: kernels that do nothing but quantize or dequantize.
        unread: multiply-adds of ONNX nodes that no kernel names.
        largest: the kernels with the most multiply-adds.
    """

    kernels: int = 0
    synchronizations: int = 0
    fused_attention: int = 0
    reformats: int = 0
    casts: int = 0
    activation_bytes: int = 0
    multiplied: dict[str, int] = field(default_factory=dict)
    kept: dict[str, int] = field(default_factory=dict)
    unread: int = 0
    largest: list[LargeKernel] = field(default_factory=list)
    quantized: dict[str, int] | None = optional(None)
    quantizing: int = optional(0)

    @property
    def _counts(self) -> list[tuple[str, int]]:
        return [*self.multiplied.items(), *self.kept.items(), *(self.quantized or {}).items()]

    def share_of_all(self, precision: Precision) -> float:
        """The share of a precision in all multiply-adds whose datatype is known."""
        total = sum(count for dtype, count in self._counts if dtype)
        wanted = TENSORRT_DATATYPES[precision]
        return sum(count for dtype, count in self._counts if dtype == wanted) / total if total else 0.0

    def share_in(self, precision: Precision) -> float:
        """The share of a precision in the multiply-adds that should be in it.

        These are the quantized layers' for INT8 and FP8, and for others all outside these and the units that the policy
        keeps in FP32. Multiply-adds of unknown datatype are left out; the share is 1 where no datatype is known.
        """
        counts = (self.quantized or {}) if precision in QUANTIZED else self.multiplied
        total = sum(count for dtype, count in counts.items() if dtype)
        return counts.get(TENSORRT_DATATYPES[precision], 0) / total if total else 1.0

    @property
    def known_share(self) -> float:
        """The share of all multiply-adds whose kernel and datatype are known."""
        total = sum(count for _, count in self._counts) + self.unread
        return sum(count for dtype, count in self._counts if dtype) / total if total else 1.0


@dataclass
class Audit:
    """The audit of one plan: bytes of its weights, and a ``ProfileAudit`` for each optimization profile."""

    weights_bytes: int
    profiles: list[ProfileAudit]


def audit_from_json(raw: Mapping[str, Any]) -> Audit:
    """Decode an audit from a sidecar's JSON. Raises DecodeError where a value is missing or invalid."""
    return decode(Audit, raw, "audit")


def audit_of(
    kernels: Sequence[Kernel],
    work: Sequence[Mapping[str, int]],
    weights_bytes: int,
    activation_bytes: Sequence[int],
    keep_fp32: Sequence[str] = (),
    quantized: Sequence[str] = (),
) -> Audit:
    """Count the kernels of a plan and their multiply-adds.

    Args:
        kernels: the kernels of all profiles.
        work: for each profile, the multiply-adds of each ONNX node at the profile's usual shapes (``work_of_graph``).
        weights_bytes: bytes of the plan's weights.
        activation_bytes: bytes of each profile's activations.
        keep_fp32: the units that the precision policy keeps in FP32.
        quantized: the layers that should multiply INT8 or FP8.
    """
    profiles = []
    for own, macs, size in zip(split_by_profile(kernels, len(work)), work, activation_bytes, strict=True):
        profiles.append(_audit_profile(own, macs, size, keep_fp32, frozenset(quantized)))
    return Audit(weights_bytes, profiles)


def _audit_profile(
    kernels: Sequence[Kernel],
    macs: Mapping[str, int],
    size: int,
    keep_fp32: Sequence[str],
    quantized: Collection[str],
) -> ProfileAudit:
    eight: dict[str, int] = {}
    found = ProfileAudit(activation_bytes=size, quantized=eight if quantized else None)
    sizes: list[tuple[int, Kernel]] = []
    makers: dict[str, int] = {}
    # A product may be one kernel, and what follows it (an INT8 sum times its scale) another that names the node too.
    multiplied_apart = {node for kernel in kernels if kernel.is_product for node in kernel.nodes}

    def nodes_of(kernel: Kernel) -> list[str]:
        """The ONNX nodes with work that the kernel multiplies."""
        nodes = set(kernel.nodes) & macs.keys()
        return sorted(nodes if kernel.is_product else nodes - multiplied_apart)

    for kernel in kernels:
        for node in nodes_of(kernel):
            makers[node] = makers.get(node, 0) + 1
    for kernel in kernels:
        if kernel.is_host:
            continue
        if kernel.is_synchronization:
            found.synchronizations += 1
            continue
        found.kernels += 1
        found.fused_attention += kernel.is_fused_attention
        found.reformats += kernel.is_reformat
        found.casts += kernel.is_cast
        found.quantizing += bool(kernel.nodes) and all(_operator_of(node) in QUANTIZING for node in kernel.nodes)
        own = 0
        for node in nodes_of(kernel):
            share = macs[node] // makers[node]  # kernels that share a node are assumed to do equal parts of it
            unit = unit_of_node(node)
            counts = eight if unit in quantized else found.kept if is_kept(unit, keep_fp32) else found.multiplied
            counts[kernel.dtype] = counts.get(kernel.dtype, 0) + share
            own += share
        sizes.append((own, kernel))
    total = sum(macs.values())
    found.unread = sum(count for node, count in macs.items() if node not in makers)
    largest = sorted(sizes, key=lambda item: -item[0])[:LARGEST]
    found.largest = [
        LargeKernel(" ".join(kernel.nodes) or kernel.name, round(own / total, 4), kernel.dtype)
        for own, kernel in largest
        if own
    ]
    return found


def unit_of_node(node: str) -> str:
    """The unit of the precision policy that an ONNX node is in: ``blocks.0.mlp.fc1/MatMul`` → ``blocks.0.mlp.fc1``."""
    return node.partition("/")[0]


def _operator_of(node: str) -> str:
    """The operator of an ONNX node: ``blocks.0.mlp.fc1/DequantizeLinear.1`` → ``DequantizeLinear``."""
    return node.rpartition("/")[2].partition(".")[0]


def find_problems(
    audit: Audit, graph: str, model: ModelSpec, precision: PrecisionSpec, bundle_bytes: int | None = None
) -> list[str]:
    """Find where a plan is not as the bundle's precision asks.

    Args:
        audit: of the plan.
        graph: name of the graph.
        model: the transformer.
        precision: the bundle's precision policy.
        bundle_bytes: bytes of the graph's weights in the bundle. They are compared with the plan's weights where the
            builder does not tell datatypes; None skips that.

    Returns:
        A line for each problem; empty for a sound plan.
    """
    if precision.name not in JUDGED:
        return [f"{graph}: the audit does not know the precision {precision.name}, only {' and '.join(JUDGED)}"]
    found = []
    # Other graphs than the autoencoder's may keep some of their units in FP32.
    own = precision.precision_of(graph) if graph in AUTOENCODER else precision.numbers
    told = all(
        profile.known_share >= (TOLD_SHARE if graph in AUTOENCODER else LEAST_SHARE) for profile in audit.profiles
    )
    if (
        own in HALF
        and not told
        and bundle_bytes is not None
        and audit.weights_bytes > WEIGHTS_MOST * bundle_bytes + CODE_BYTES
    ):
        found.append(
            f"{graph}: the plan's weights take {describe_bytes(audit.weights_bytes)}, the bundle's take "
            f"{describe_bytes(bundle_bytes)}, so they are not {own.upper()}; the builder does not tell their datatypes"
        )
    for index, profile in enumerate(audit.profiles):
        where = f"{graph}, profile {index}"
        if profile.quantized is not None:
            found += _find_quantization_problems(profile, where, precision.name)
        share = profile.share_in(own)
        if share < LEAST_SHARE and not is_kept(graph, precision.keep_fp32):
            found.append(
                f"{where}: {share:.1%} of the multiply-adds are {own.upper()}, expected at least {LEAST_SHARE:.0%}"
            )
        expected = count_expected_attentions(model, precision)
        if graph == "step" and profile.fused_attention < expected:
            found.append(f"{where}: {profile.fused_attention} of {expected} attentions fused")
    return found


def _find_quantization_problems(profile: ProfileAudit, where: str, name: Precision) -> list[str]:
    found = []
    if (share := profile.share_in(name)) < LEAST_SHARE:
        found.append(
            f"{where}: {share:.1%} of the quantized layers' multiply-adds are {name.upper()}, expected at least "
            f"{LEAST_SHARE:.0%}"
        )
    if profile.quantizing:
        found.append(f"{where}: {profile.quantizing} kernels only quantize or dequantize, expected none")
    return found


def count_expected_attentions(model: ModelSpec, precision: PrecisionSpec) -> int:
    """Count the attentions of the step that a builder should fuse: of 16 bits, those that the policy does not keep."""
    if precision.numbers not in HALF or not can_fuse_attention(model):
        return 0
    kept = [block for block in range(model.depth) if _keeps_attention(precision, block)]
    return model.attentions // model.depth * (model.depth - len(kept))


def _keeps_attention(precision: PrecisionSpec, block: int) -> bool:
    """Whether the policy keeps an attention of a block, or a part of one, in FP32."""
    units = (f"blocks.{block}.attn", f"blocks.{block}.cross_attn")
    return any(
        is_kept(unit, precision.keep_fp32) or is_kept(kept, [unit]) for unit in units for kept in precision.keep_fp32
    )


def find_unknowns(audit: Audit, graph: str) -> list[str]:
    """Find what the audit could not read. That is not a fault of the engine.

    Returns:
        A line for each profile whose datatypes the builder does not tell.
    """
    return [
        f"{graph}, profile {index}: the builder tells the datatype of {profile.known_share:.0%} of the multiply-adds"
        for index, profile in enumerate(audit.profiles)
        if profile.known_share < LEAST_SHARE
    ]
