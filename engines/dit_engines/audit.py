"""What the builder really made, read from its own output and not from the ONNX.

The log's figures are those of the ahead-of-time RTX builder; TensorRT on a device may choose otherwise, and is asked
through the engine's inspector.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dit_engines.kernels import Kernel, split_by_profile
from dit_engines.recipe import can_fuse_attention
from dit_runtime.backends.tensorrt.memory import describe_bytes
from dit_runtime.bundle.manifest import ModelSpec, PrecisionSpec
from dit_runtime.bundle.precision import TENSORRT_DATATYPES, Precision, is_kept
from dit_runtime.core.decode import decode

# Of the work outside the units that a policy keeps in FP32, the least in the graph's own precision. Measured: 100 % in
# every graph of every variant.
LEAST_SHARE = 0.99
# Precisions that this audit can judge.
JUDGED = (Precision.FP32, Precision.FP16)
# Where datatypes are not told: an engine's weights over the bundle's, which FP32 would double (RTX's are within
# 10 %), and what a plan may have besides, in bytes, where its weights alone are not told either.
WEIGHTS_MOST, CODE_BYTES = 1.5, 24_000_000
# Of convolutions it is asked only where most are not told: a builder may hold their filters transformed, and larger.
CODERS, TOLD_SHARE = ("decoder", "encoder"), 0.5
LARGEST = 5  # kernels listed


@dataclass(frozen=True)
class LargeKernel:
    """One of the largest kernels: its part of the profile's multiply-adds, and the datatype it multiplies in."""

    name: str
    share: float
    dtype: str


@dataclass
class ProfileAudit:
    """Counts of one optimization profile.

    Attributes:
        kernels: launches, without host arithmetic and synchronization.
        synchronizations: waits and signals between streams.
        fused_attention: attentions in one kernel each.
        reformats: kernels that only move or cast data.
        casts: those of ``reformats`` that change the datatype.
        activation_bytes: device memory at the profile's largest shapes.
        multiplied: multiply-adds at the profile's usual shapes by datatype, an empty one where it is not told.
        kept: as ``multiplied``, of the units that the precision policy keeps in FP32; not in ``multiplied``.
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

    @property
    def fp16_share(self) -> float:
        """Share of all multiply-adds with a known datatype that are in FP16."""
        known = [*self.multiplied.items(), *self.kept.items()]
        total = sum(count for dtype, count in known if dtype)
        half = TENSORRT_DATATYPES[Precision.FP16]
        return sum(count for dtype, count in known if dtype == half) / total if total else 0.0

    def share_in(self, precision: Precision) -> float:
        """Share of the multiply-adds in a precision, outside the units that the policy keeps in FP32.

        Of those with a known datatype; 1 where none is known.
        """
        total = sum(count for dtype, count in self.multiplied.items() if dtype)
        return self.multiplied.get(TENSORRT_DATATYPES[precision], 0) / total if total else 1.0

    @property
    def known_share(self) -> float:
        """Share of the multiply-adds whose kernel and datatype could be read."""
        counts = [*self.multiplied.items(), *self.kept.items()]
        total = sum(count for _, count in counts) + self.unread
        return sum(count for dtype, count in counts if dtype) / total if total else 1.0


@dataclass
class Audit:
    """One engine: weights and a ``ProfileAudit`` per optimization profile."""

    weights_bytes: int
    profiles: list[ProfileAudit]


def audit_from_json(raw: Mapping[str, Any]) -> Audit:
    """An audit as a sidecar holds it. Raises DecodeError for anything else."""
    return decode(Audit, raw, "audit")


def audit_of(
    kernels: Sequence[Kernel],
    work: Sequence[Mapping[str, int]],
    weights_bytes: int,
    activation_bytes: Sequence[int],
    keep_fp32: Sequence[str] = (),
) -> Audit:
    """Count an engine's kernels.

    Args:
        kernels: of all profiles.
        work: for each profile the multiply-adds of each ONNX node at its usual shapes (``work_of_graph``).
        weights_bytes: of the engine.
        activation_bytes: of each profile.
        keep_fp32: units of the graph, by their names' prefixes, that stay FP32.
    """
    profiles = []
    for own, macs, size in zip(split_by_profile(kernels, len(work)), work, activation_bytes, strict=True):
        profiles.append(_audit_profile(own, macs, size, keep_fp32))
    return Audit(weights_bytes, profiles)


def _audit_profile(
    kernels: Sequence[Kernel], macs: Mapping[str, int], size: int, keep_fp32: Sequence[str]
) -> ProfileAudit:
    found = ProfileAudit(activation_bytes=size)
    sizes: list[tuple[int, Kernel]] = []
    makers: dict[str, int] = {}
    for kernel in kernels:
        for node in set(kernel.nodes) & macs.keys():
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
        own = 0
        for node in sorted(set(kernel.nodes) & macs.keys()):
            share = macs[node] // makers[node]  # of a node that several kernels do, each is taken to do as much
            counts = found.kept if is_kept(unit_of_node(node), keep_fp32) else found.multiplied
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
    """``blocks.0.mlp.fc1/MatMul`` → ``blocks.0.mlp.fc1``: the unit of the precision policy that an ONNX node is in."""
    return node.partition("/")[0]


def find_problems(
    audit: Audit, graph: str, model: ModelSpec, precision: PrecisionSpec, bundle_bytes: int | None = None
) -> list[str]:
    """What was asked for and not had: empty when the engine is as the bundle's precision says.

    Where the builder does not tell datatypes, the size of the weights does: ``bundle_bytes`` are the graph's own.
    """
    if precision.name not in JUDGED:
        return [f"{graph}: precision {precision.name} is unknown to the audit, which knows {' and '.join(JUDGED)}"]
    found = []
    half, word = precision.name == Precision.FP16, precision.name.upper()
    told = all(profile.known_share >= (TOLD_SHARE if graph in CODERS else LEAST_SHARE) for profile in audit.profiles)
    if (
        half
        and not told
        and bundle_bytes is not None
        and audit.weights_bytes > WEIGHTS_MOST * bundle_bytes + CODE_BYTES
    ):
        found.append(
            f"{graph}: its weights take {describe_bytes(audit.weights_bytes)}, the bundle's {describe_bytes(bundle_bytes)}, so "
            "that they are not FP16, and the builder does not tell"
        )
    for index, profile in enumerate(audit.profiles):
        where = f"{graph}, profile {index}"
        share = profile.share_in(precision.name)
        if share < LEAST_SHARE and not is_kept(graph, precision.keep_fp32):
            found.append(f"{where}: {share:.1%} of the multiply-adds are {word} where {LEAST_SHARE:.0%} should be")
        expected = count_expected_attentions(model, precision)
        if graph == "step" and profile.fused_attention < expected:
            found.append(f"{where}: {profile.fused_attention} of {expected} attentions fused")
    return found


def count_expected_attentions(model: ModelSpec, precision: PrecisionSpec) -> int:
    """How many attentions of the step a FP16 builder should fuse: those of blocks that the policy does not keep."""
    if precision.name != Precision.FP16 or not can_fuse_attention(model):
        return 0
    kept = [block for block in range(model.depth) if _keeps_attention(precision, block)]
    return model.attentions // model.depth * (model.depth - len(kept))


def _keeps_attention(precision: PrecisionSpec, block: int) -> bool:
    """Whether the policy keeps an attention of a block in FP32, or a part of one."""
    units = (f"blocks.{block}.attn", f"blocks.{block}.cross_attn")
    return any(
        is_kept(unit, precision.keep_fp32) or is_kept(kept, [unit]) for unit in units for kept in precision.keep_fp32
    )


def find_unknowns(audit: Audit, graph: str) -> list[str]:
    """What the audit could not see, which is no fault of the engine."""
    return [
        f"{graph}, profile {index}: the builder tells the datatype of {profile.known_share:.0%} of the multiply-adds"
        for index, profile in enumerate(audit.profiles)
        if profile.known_share < LEAST_SHARE
    ]
