"""What the builder really made, read from its own output and not from the ONNX.

TensorRT-RTX engines cannot be loaded on a machine without a GPU, so there is no inspector: the builder's verbose log
lists every kernel (``Layers:``) with its datatypes and the ONNX nodes it came from. These are figures of the
ahead-of-time RTX builder; TensorRT on a device may choose otherwise.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

from dit_engines.recipe import can_fuse_attention
from dit_runtime.bundle import ModelSpec, PrecisionSpec

_LAYER = re.compile(r"^Name: (?P<name>.*?), LayerType: (?P<kind>\w+), (?P<rest>.*)$")
_PROFILE = re.compile(r"_myl(\d+)_\d+$")
_CONSTANT = re.compile(r"Dimensions: \[([\d,\-]*)\][^}]*?Datatype: (\w+)")
_MEMORY = re.compile(r"Total (Weights|Activation) Memory: (\d+) bytes")
# Not kernels: shape arithmetic on the host, and synchronization of streams.
_HOST = ("shape_call",)
_SYNCHRONIZATION = ("wait", "signal")
_FUSED_ATTENTION = "_gemm_mha"
# FP16 graphs keep first and last layer in FP32: 0.4 % of the demo's weights, less in larger models.
FP16_SHARE = 0.95


@dataclass
class ProfileAudit:
    """Counts of one optimization profile. ``multiplied_bytes``: GEMM and convolution weights by datatype."""

    kernels: int = 0
    synchronizations: int = 0
    fused_attention: int = 0
    activation_bytes: int = 0
    multiplied: dict[str, int] = field(default_factory=dict)

    @property
    def fp16_share(self) -> float:
        """Share of the multiplied weights that are FP16."""
        total = sum(self.multiplied.values())
        return self.multiplied.get("Half", 0) / total if total else 0.0


@dataclass
class Audit:
    """One engine: weights and a ``ProfileAudit`` per optimization profile."""

    weights_bytes: int
    profiles: list[ProfileAudit]


def audit_from_log(layers: str, memory_lines: list[str], profile_count: int) -> Audit:
    """Read the builder's ``Layers:`` message and its lines on memory, in the order of the log."""
    profiles = [ProfileAudit() for _ in range(profile_count)]
    for line in layers.splitlines():
        match = _LAYER.match(line.strip())
        if match is None:
            continue
        number = _PROFILE.search(match["name"])
        profile = profiles[min(int(number[1]), profile_count - 1) if number else 0]
        kind, name = match["kind"].lower(), match["name"]
        if kind in _HOST:
            continue
        if kind in _SYNCHRONIZATION:
            profile.synchronizations += 1
            continue
        profile.kernels += 1
        if name.startswith(_FUSED_ATTENTION):
            profile.fused_attention += 1
        for elements, dtype in _multiplied(match["rest"]):
            profile.multiplied[dtype] = profile.multiplied.get(dtype, 0) + elements
    activations, weights = [], 0
    for line in memory_lines:
        if found := _MEMORY.search(line):
            if found[1] == "Weights":
                weights = max(weights, int(found[2]))
            else:
                activations.append(int(found[2]))
    for profile, size in zip(profiles, activations, strict=False):
        profile.activation_bytes = size
    return Audit(weights, profiles)


def _multiplied(rest: str) -> list[tuple[int, str]]:
    """Weights of a kernel that come from a MatMul, Gemm or Conv of the ONNX: (elements, datatype)."""
    if not re.search(r"\[ONNX Layer: [^\]]*/(MatMul|Gemm|Conv)", rest):
        return []
    constants = rest.partition("Constants: [")[2].partition("], Outputs: [")[0]
    found = []
    for dimensions, dtype in _CONSTANT.findall(constants):
        sizes = [int(size) for size in dimensions.split(",") if size]
        if sum(size > 1 for size in sizes) >= 2:  # a matrix or a filter, not a bias or a scale
            found.append((math.prod(sizes), dtype))
    return found


def problems(audit: Audit, graph: str, model: ModelSpec, precision: PrecisionSpec) -> list[str]:
    """What was asked for and not had: empty when the engine is as the bundle's precision says."""
    if precision.name != "fp16":
        return []
    found = []
    for index, profile in enumerate(audit.profiles):
        where = f"{graph}, profile {index}"
        if profile.fp16_share < FP16_SHARE:
            found.append(
                f"{where}: {profile.fp16_share:.1%} of the multiplied weights are FP16, expected {FP16_SHARE:.0%}"
            )
        kept = [unit for unit in precision.keep_fp32 if unit.startswith("blocks")]
        if graph == "step" and can_fuse_attention(model) and not kept and profile.fused_attention != model.attentions:
            found.append(f"{where}: {profile.fused_attention} of {model.attentions} attentions fused")
    return found
