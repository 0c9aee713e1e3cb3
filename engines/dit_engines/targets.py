"""Devices that bundles are meant for, with the public figures that bound how fast each can be."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """A GPU's peak figures: what no kernel exceeds, not what one reaches.

    ``memory_gb`` is what the data sheet calls it, shared with the system on a Jetson. ``bandwidth_gb_s`` counts 10⁹
    bytes a second; ``fp16_tflops`` 10¹² operations a second on the tensor cores, dense, a multiply-add being two.
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
DEVICES = (
    # Orin Nano Super data sheet: 8 GB, 102 GB/s, 1024 cores in 8 multiprocessors, 1.02 GHz (67 sparse INT8 TOPS).
    Device("Jetson Orin Nano Super", "8.7", 8, 102, 8 * 2048 * 1.02e9 / 1e12),  # 16.7
    # AGX Orin 64 GB data sheet: 204.8 GB/s, 2048 cores in 16 multiprocessors, 1.3 GHz (170 sparse INT8 TOPS).
    Device("Jetson AGX Orin", "8.7", 64, 204.8, 16 * 2048 * 1.301e9 / 1e12),  # 42.6
    # Jetson T5000 data sheet: 128 GB, 273 GB/s, 2560 cores in 20 multiprocessors, 1.57 GHz (2070 sparse FP4 TFLOPS).
    Device("Jetson Thor", "11.0", 128, 273, 20 * 8192 * 1.57e9 / 1e12),  # 257
    # L4 data sheet: 24 GB, 300 GB/s, 242 TFLOPS with sparsity.
    Device("L4", "8.9", 24, 300, 121),
    # A100 80 GB SXM data sheet: 2039 GB/s, 312 TFLOPS.
    Device("A100", "8.0", 80, 2039, 312),
    # H100 SXM data sheet: 80 GB, 3.35 TB/s, 1979 TFLOPS with sparsity.
    Device("H100", "9.0", 80, 3350, 989.5),
    # Ada GPU architecture white paper, table of the RTX 4090: 24 GB, 1008 GB/s, 165.2 TFLOPS with FP32 accumulation.
    Device("RTX 4090", "8.9", 24, 1008, 165.2),
)
