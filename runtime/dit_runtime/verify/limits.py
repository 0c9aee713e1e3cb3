"""The limits of a verification, by the precision that an engine computes in.

The exporter copies them into the manifest. A bundle may have stricter limits; it cannot have laxer ones.

``TOLERANCES`` are absolute limits, the net below the error budget: max |Δ| over the largest reference magnitude, if the
name does not say otherwise. Beside each limit stands the largest value measured with ONNX Runtime on a CPU: on the
committed Fashion-MNIST model (``make demo`` prints it) and, for FP16, on DiT-XL/2 with random weights (``dit-verify``).
The values for BF16 were measured with OpenVINO on the Fashion-MNIST model, in an FP16 bundle. Where PyTorch's own error
is so large that the error budget allows more than a limit here, the budget's is the limit: see ``Budget.limits_of``.

``THRESHOLDS`` are the limits of the error budget: how many times PyTorch's own error in the same precision an engine's
error may be. Each is twice the largest ratio over ten draws of seeds, timesteps, labels and guidance scales, on two
models and three engines. ``benchmarks/budget.py`` prints the distribution; ``benchmarks/budget.json`` is its output.

Those of BF16 cover ``benchmarks/budget-bf16.json`` too, of BF16 bundles and three draws.

Those of INT8 are twice the largest ratio of ``benchmarks/budget-int8.json``, of three draws, or of the Fashion-MNIST
model's and the tests' own records. PyTorch's own error is there that of its emulation of INT8 in FP16 against the same
in FP32. They are above FP16's because a number near a boundary of two levels of INT8 goes to either by chance: the
errors of PyTorch and of an engine are two draws of about the same size. Those of FP8 are at least twice the largest
ratio of the Fashion-MNIST model's own records on ONNX Runtime.
"""

from __future__ import annotations

from collections.abc import Mapping

from dit_runtime.bundle.precision import QUANTIZED, Precision

Limits = Mapping[str, Mapping[str, float]]

# The kinds that a BF16 bundle has FP16's limits of: decoder and encoder are FP16, the first layer and the sampler FP32.
FP16_IN_BF16 = ("fp16_range", "embedding", "update", "decoder", "encoder")
# Kinds whose limit is a least value.
LARGER_IS_BETTER = ("fp16_range", "int8_cost", "fp8_cost", "image_psnr", "image_ssim", "image_one_level")

TOLERANCES: dict[str, dict[str, float]] = {
    "fp32": {
        "noise": 1e-6,  # 1.2e-7
        "conditioner": 2e-5,  # 8.4e-7
        "embedding": 2e-5,  # 1.6e-7
        "blocks": 2e-5,  # 1.5e-6
        "forward": 2e-5,  # 2.5e-6
        "variance": 2e-5,  # 3.6e-6
        "update": 1e-5,  # 1.4e-7
        "teacher_forced": 2e-5,  # 3.4e-6
        "free_running": 5e-5,  # 5.0e-6
        "decoder": 2e-5,  # 6.0e-6
        "encoder": 2e-5,  # 1.2e-6
        "image_psnr": 60.0,  # 86 dB
        "image_ssim": 0.9999,  # 1.00000
        "image_one_level": 0.999,  # all
        "image_bias": 0.02,  # levels: 2.4e-4
    },
    "fp16": {
        "fp16_range": 2.0,  # times: 912
        "noise": 1e-6,  # 1.2e-7
        "conditioner": 3e-3,  # 3.7e-4
        "embedding": 2e-3,  # 1.6e-7: FP32
        "blocks": 2e-3,  # 5.0e-4
        "forward": 5e-3,  # 1.6e-3, at guidance 4
        "variance": 5e-3,  # 6.1e-4
        "update": 1e-5,  # 1.6e-7: FP32
        "teacher_forced": 3e-3,  # 5.2e-4
        "free_running": 5e-3,  # 3.9e-4
        "decoder": 3e-3,  # 7.1e-4
        "encoder": 3e-3,  # 9.7e-4, tests/export/checkpoints/test_checkpoints.py
        "image_psnr": 35.0,  # 62 dB
        "image_ssim": 0.99,  # 0.99998
        "image_one_level": 0.99,  # all
        "image_bias": 0.05,  # levels: 1.2e-3
    },
    "bf16": {
        "noise": 1e-6,  # 1.2e-7
        "conditioner": 3e-2,  # 5.5e-3
        "embedding": 3e-2,  # 0
        "blocks": 3e-2,  # 5.4e-3
        "forward": 5e-2,  # 9.3e-3, at guidance 4
        "variance": 5e-2,  # 7.3e-3
        "update": 3e-2,  # 1.0e-7 of an FP16 bundle, whose sampler stays FP32
        "teacher_forced": 2e-2,  # 1.4e-3
        "free_running": 3e-2,  # 3.9e-3
        "decoder": 5e-2,  # 1.8e-2
        "encoder": 5e-2,  # 9.0e-3
        "image_psnr": 30.0,  # 53 dB
        "image_ssim": 0.98,  # 0.9995
        "image_one_level": 0.9,  # 0.988
        "image_bias": 0.2,  # levels: 0.045
    },
    "int8": {
        "fp16_range": 2.0,  # times: 899
        "int8_ranges": 1e-4,  # 0; the next number of FP16 is 4.9e-4 away or more
        "int8_cost": 20.0,  # dB: 44; against FP32, where all others are against PyTorch's own INT8
        "noise": 1e-6,  # 1.2e-7
        "conditioner": 3e-3,  # 4.5e-4
        "embedding": 2e-3,  # 1.6e-7: FP32
        "blocks": 3e-2,  # 2.3e-2
        "forward": 1e-1,  # 5.2e-2, at guidance 4
        "variance": 5e-2,  # 8.2e-3
        "update": 1e-5,  # 1.6e-7: FP32
        "teacher_forced": 2e-2,  # 1.4e-2
        "free_running": 2e-1,  # 2.1e-2; 7.1e-2 at guidance 8
        "decoder": 3e-3,  # 5.4e-4
        "encoder": 3e-3,  # 9.7e-4, as FP16's
        "image_psnr": 25.0,  # 44 dB; 33 dB at guidance 8
        "image_ssim": 0.98,  # 0.99956
        "image_one_level": 0.8,  # 0.88
        "image_bias": 0.05,  # levels: 9.8e-3
    },
    "fp8": {
        "fp16_range": 2.0,  # times: 918
        "fp8_ranges": 1e-4,  # 0; the next number of FP16 is 4.9e-4 away or more
        "fp8_cost": 20.0,  # dB: 38.8; against FP32, where all others are against PyTorch's own FP8
        "noise": 1e-6,  # 1.1e-7
        "conditioner": 3e-3,  # 3.0e-4
        "embedding": 2e-3,  # 1.6e-7: FP32
        "blocks": 1e-1,  # 5.0e-2
        "forward": 1e-1,  # 4.1e-2, at guidance 4
        "variance": 5e-2,  # 1.1e-2
        "update": 1e-5,  # 1.2e-7: FP32
        "teacher_forced": 5e-2,  # 1.8e-2
        "free_running": 2e-1,  # 1.9e-2; 8.4e-2 at guidance 8
        "decoder": 3e-3,  # 1.8e-4
        "encoder": 3e-3,  # 3.6e-5; FP16's limit
        "image_psnr": 25.0,  # 50 dB; 33 dB at guidance 8
        "image_ssim": 0.98,  # 0.99963
        "image_one_level": 0.8,  # 0.953
        "image_bias": 0.05,  # levels: 1.2e-3
    },
}

THRESHOLDS: dict[str, dict[str, float]] = {
    "fp32": {
        "conditioner": 9.7,
        "embedding": 2.6,
        "blocks": 3.7,
        "forward": 7.5,
        "variance": 22.0,  # the largest ratio, 10.8, is ONNX Runtime's; OpenVINO's is 2.7
        "teacher_forced": 3.9,
        "free_running": 5.0,
        "decoder": 2.3,
        "image": 8.1,
        "encoder": 2.4,
    },
    "fp16": {
        "conditioner": 1.9,
        "embedding": 1.0,
        "blocks": 1.0,
        "forward": 1.0,
        "variance": 5.0,
        "teacher_forced": 2.2,
        "free_running": 1.0,  # times √2 where noise is drawn: random SiTs have up to 0.98 there
        "decoder": 1.2,
        "image": 1.0,
        "encoder": 1.3,
    },
    "bf16": {
        "conditioner": 2.4,
        "embedding": 1.0,
        "blocks": 1.0,
        "forward": 1.1,
        "variance": 5.8,
        "teacher_forced": 1.0,
        "free_running": 1.3,  # times √2 where noise is drawn: 0.99
        "decoder": 2.1,
        "image": 1.9,
        "encoder": 2.1,
    },
    "int8": {
        "conditioner": 1.9,
        "embedding": 1.0,
        "blocks": 2.2,
        "forward": 2.7,
        "variance": 3.2,
        "teacher_forced": 2.9,
        "free_running": 1.8,
        "decoder": 1.2,
        "image": 3.0,
        "encoder": 1.3,
    },
    "fp8": {
        "conditioner": 1.9,
        "embedding": 1.0,
        "blocks": 2.2,
        "forward": 2.7,
        "variance": 3.2,
        "teacher_forced": 2.9,
        "free_running": 1.8,
        "decoder": 1.2,
        "image": 3.0,
        "encoder": 1.3,
    },
}


def limits_for_bundle(limits: Limits, bundle: Precision) -> Limits:
    """``TOLERANCES`` or ``THRESHOLDS`` for a bundle of a precision, by the precisions that its engines compute in."""
    if bundle == Precision.BF16:
        fp16 = {kind: limit for kind, limit in limits["fp16"].items() if kind in FP16_IN_BF16}
        return {"bf16": {**limits["bf16"], **fp16}}
    return {name: own for name, own in limits.items() if name == bundle or name not in QUANTIZED}
