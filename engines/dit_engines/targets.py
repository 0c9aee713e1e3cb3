"""The devices that engines are built for: what bounds their speed, and how to build for them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from dit_runtime.bundle.precision import Precision
from dit_runtime.core.errors import BuildError


@dataclass(frozen=True)
class Device:
    """A GPU's peak figures: no kernel exceeds them, and few come near.

    ``memory_gb`` is the data sheet's figure, shared with the system on a Jetson. ``bandwidth_gb_s`` is in 10⁹ bytes a
    second; ``fp16_tflops`` in 10¹² operations a second on the tensor cores, dense, where a multiply-add is two.
    """

    name: str
    compute_capability: str
    memory_gb: float
    bandwidth_gb_s: float
    fp16_tflops: float


# Compute capabilities: NVIDIA's table at developer.nvidia.com/cuda-gpus. Data sheets that give tensor figures with
# sparsity only are halved. Those of Orin and Thor give INT8 and FP4 only, so FP16 is multiprocessors × operations per
# clock × the highest GPU clock: 2048 operations on Orin (a quarter of its sparse INT8 rate), 8192 on Thor (an eighth of
# its sparse FP4 rate).

# Orin Nano Super data sheet: 8 GB, 102 GB/s, 1024 cores in 8 multiprocessors, 1.02 GHz (67 sparse INT8 TOPS).
ORIN_NANO = Device("Jetson Orin Nano Super", "8.7", 8, 102, 8 * 2048 * 1.02e9 / 1e12)  # 16.7
# Orin NX 16 GB data sheet: 102.4 GB/s, 1024 cores in 8 multiprocessors, 918 MHz.
ORIN_NX = Device("Jetson Orin NX", "8.7", 16, 102.4, 8 * 2048 * 0.918e9 / 1e12)  # 15.0
# AGX Orin 64 GB data sheet: 204.8 GB/s, 2048 cores in 16 multiprocessors, 1.3 GHz (170 sparse INT8 TOPS).
AGX_ORIN = Device("Jetson AGX Orin", "8.7", 64, 204.8, 16 * 2048 * 1.301e9 / 1e12)  # 42.6
# Jetson T5000 data sheet: 128 GB, 273 GB/s, 2560 cores in 20 multiprocessors, 1.57 GHz (2070 sparse FP4 TFLOPS).
THOR = Device("Jetson Thor", "11.0", 128, 273, 20 * 8192 * 1.57e9 / 1e12)  # 257
# L4 data sheet: 24 GB, 300 GB/s, 242 TFLOPS with sparsity.
L4 = Device("L4", "8.9", 24, 300, 121)
# A100 80 GB SXM data sheet: 2039 GB/s, 312 TFLOPS.
A100 = Device("A100", "8.0", 80, 2039, 312)
# H100 SXM data sheet: 80 GB, 3.35 TB/s, 1979 TFLOPS with sparsity.
H100 = Device("H100", "9.0", 80, 3350, 989.5)
# DGX B200 data sheet, an eighth of its 1440 GB, 64 TB/s and 36 PFLOPS of FP16 with sparsity.
B200 = Device("B200", "10.0", 180, 8000, 2250)
# Ampere GA102 white paper, table of the RTX 3090: 24 GB, 936 GB/s, 71 TFLOPS with FP32 accumulation.
RTX_3090 = Device("RTX 3090", "8.6", 24, 936, 71)
# Ada GPU architecture white paper, table of the RTX 4090: 24 GB, 1008 GB/s, 165.2 TFLOPS with FP32 accumulation.
RTX_4090 = Device("RTX 4090", "8.9", 24, 1008, 165.2)
# RTX Blackwell white paper, table of the RTX 5090: 32 GB, 1792 GB/s, 209.5 TFLOPS with FP32 accumulation.
RTX_5090 = Device("RTX 5090", "12.0", 32, 1792, 209.5)

# The devices that dit-export --dry-run gives a roofline for.
DEVICES = (ORIN_NANO, AGX_ORIN, THOR, L4, A100, H100, RTX_4090)

# TensorRT-RTX 1.7 builds ahead of time for these, on any machine. For Turing (7.5) it has no FP32 matrix products, and
# the last layer is one.
RTX_COMPUTE_CAPABILITIES = ("8.0", "8.6", "8.9", "12.0", "12.1")
# Before this release, optimization profiles beyond the first gave wrong results (its notes list the fix).
SEVERAL_PROFILES = (10, 8)
# The oldest TensorRT whose bindings the tests look into.
LEAST = (10, 3)
# Builds of TensorRT without kernels for a GPU that other builds of the version have: library, version, capability.
MISSING_KERNELS: dict[tuple[str, tuple[int, ...], str], str] = {
    ("tensorrt", (10, 13, 3), "8.7"): "this build of TensorRT is for Arm servers (SBSA) and has no kernels for Orin; "
    "install JetPack's own (10.3 with JetPack 6, 10.16 or later with JetPack 7.2)"
}
# The least compute capability with tensor cores for a precision (CUDA C++ programming guide, table of arithmetic), and
# the nearest precision that older GPUs have. All GPUs here multiply FP32, FP16 and INT8.
LEAST_CAPABILITY = {
    Precision.BF16: ((8, 0), Precision.FP16),
    Precision.FP8: ((8, 9), Precision.INT8),
}
GIB = 1 << 30


@dataclass(frozen=True)
class Target:
    """How engines are built for a kind of device.

    Attributes:
        name: as ``--target`` takes it.
        library: ``tensorrt``, which builds on the device itself, or ``tensorrt_rtx``, which builds anywhere.
        compute_capability: None when it is that of the GPU here, or when the caller names it.
        device: the figures of the largest model of the device's name; None when the target is no certain device.
        gpu: a word of CUDA's name for the device.
        least: the first TensorRT that has kernels for it.
        releases: the TensorRT that comes with its platform, in words.
        workspace_bytes: the most that the builder may give a kernel besides its tensors.
        optimization_level: the builder's; None is the library's own.
        shared_memory: whether GPU and system share one memory.
    """

    name: str
    library: str
    compute_capability: str | None
    device: Device | None
    gpu: str
    least: tuple[int, ...]
    releases: str
    workspace_bytes: int
    optimization_level: int | None = 3
    shared_memory: bool = False

    def profile_limit(self, version: tuple[int, ...]) -> int | None:
        """The most optimization profiles that a version of the target's library allows; None is any number."""
        return 1 if self.library == "tensorrt" and version < SEVERAL_PROFILES else None

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "profiles": self.describe_profiles()}

    def describe_profiles(self) -> str:
        """``any``, or the number before the version that allows any."""
        return "1 before 10.8" if self.profile_limit(self.least) else "any"


# Workspace: an eighth of the device's memory, at most 8 GiB: no kernel of these graphs asks for more.
_JETPACK_ORIN = "10.3 (JetPack 6.1, 6.2), 10.16, 11.4.1+ (JetPack 7.2)"
_DATACENTER = "10.3 to 11.x"
TARGETS = {
    target.name: target
    for target in (
        # TensorRT of each JetPack: its release notes. Kernels for Orin, L4, A100 and H100 are older than 10.3.
        Target("orin-nano", "tensorrt", "8.7", ORIN_NANO, "Orin", LEAST, _JETPACK_ORIN, GIB, 3, True),
        Target("orin-nx", "tensorrt", "8.7", ORIN_NX, "Orin", LEAST, _JETPACK_ORIN, 2 * GIB, 3, True),
        Target("agx-orin", "tensorrt", "8.7", AGX_ORIN, "Orin", LEAST, _JETPACK_ORIN, 8 * GIB, 3, True),
        Target(
            *("thor", "tensorrt", "11.0", THOR, "Thor", (10, 13)),
            *("10.13 (JetPack 7.0, 7.1), 10.16, 11.4.1+ (JetPack 7.2)", 8 * GIB, 3, True),
        ),
        Target("l4", "tensorrt", "8.9", L4, "L4", LEAST, _DATACENTER, 3 * GIB),
        Target("a100", "tensorrt", "8.0", A100, "A100", LEAST, _DATACENTER, 8 * GIB),
        Target("h100", "tensorrt", "9.0", H100, "H100", LEAST, _DATACENTER, 8 * GIB),
        # Release notes of 10.8: the first for Blackwell, B200 included.
        Target("b200", "tensorrt", "10.0", B200, "B200", (10, 8), "10.8 to 11.x", 8 * GIB),
        Target("rtx-30", "tensorrt_rtx", "8.6", RTX_3090, "RTX", (1, 0), "RTX 1.x", 4 * GIB, None),
        Target("rtx-40", "tensorrt_rtx", "8.9", RTX_4090, "RTX", (1, 0), "RTX 1.x", 4 * GIB, None),
        Target("rtx-50", "tensorrt_rtx", "12.0", RTX_5090, "RTX", (1, 0), "RTX 1.x", 4 * GIB, None),
        Target("rtx", "tensorrt_rtx", None, None, "", (1, 0), "RTX 1.x", 4 * GIB, None),
        Target("this", "tensorrt", None, None, "", LEAST, "the one installed", 4 * GIB),
    )
}


def target_named(name: str) -> Target:
    """Raises BuildError for a name that is not in ``TARGETS``."""
    if name not in TARGETS:
        raise BuildError(f"target {name!r} is not supported; choose one of {', '.join(TARGETS)}")
    return TARGETS[name]


def check_kernels(library: str, version: tuple[int, ...], compute_capability: str, least: tuple[int, ...]) -> None:
    """Check before a build that this TensorRT has kernels for the GPU.

    Raises:
        BuildError: the version is too old for the GPU, or its build lacks the GPU's kernels.
    """
    shown = ".".join(map(str, version))
    if version < least:
        needed = ".".join(map(str, least))
        raise BuildError(
            f"TensorRT {shown} is too old for sm_{_digits_of(compute_capability)}; install {needed} or later"
        )
    if (reason := MISSING_KERNELS.get((library, version[:3], compute_capability))) is not None:
        raise BuildError(f"TensorRT {shown} on sm_{_digits_of(compute_capability)}: {reason}")


def check_precision(precision: Precision, compute_capability: str, bundle: str) -> None:
    """Check before a build that the GPU multiplies what a bundle does.

    A builder of TensorRT may make an engine all the same, of other kernels or of a part of the graph.

    Raises:
        BuildError: the GPU does not; the message names the nearest precision that it has.
    """
    least, nearest = LEAST_CAPABILITY.get(precision, ((0, 0), precision))
    if tuple(map(int, compute_capability.split("."))) < least:
        raise BuildError(
            f"{bundle}: sm_{_digits_of(compute_capability)} does not multiply {precision.upper()}, which takes "
            f"sm_{least[0]}{least[1]} or later; export the checkpoint with --{nearest}, or build for another target"
        )


def _digits_of(compute_capability: str) -> str:
    return compute_capability.replace(".", "")


def format_targets() -> str:
    """``TARGETS`` as a table for a terminal."""
    lines = [
        f"{'target':<10} {'device':<22} {'SM':>5} {'memory':>7} {'GB/s':>6} {'profiles':>14} {'workspace':>10} "
        f"{'level':>7}  TensorRT"
    ]
    for target in TARGETS.values():
        device = target.device
        name = device.name if device else {"rtx": "any GeForce or RTX", "this": "the GPU present"}[target.name]
        memory, bandwidth = (f"{device.memory_gb:g} GB", f"{device.bandwidth_gb_s:g}") if device else ("-", "-")
        level = "default" if target.optimization_level is None else str(target.optimization_level)
        lines.append(
            f"{target.name:<10} {name:<22} {target.compute_capability or '-':>5} {memory:>7} {bandwidth:>6} "
            f"{target.describe_profiles():>14} {target.workspace_bytes // GIB:>6} GiB {level:>7}  {target.releases}"
        )
    return "\n".join(lines)
