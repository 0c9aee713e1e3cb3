"""The limits a bundle carries for its own verification, per precision.

Values are max |Δ| over the largest reference magnitude unless the name says otherwise. Beside each limit stands the
largest value measured on the committed Fashion-MNIST model (``make demo`` prints it) and, for FP16, on DiT-XL/2 with
random weights (``dit-verify``), with ONNX Runtime on a CPU.
"""

TOLERANCES: dict[str, dict[str, float]] = {
    "fp32": {
        "conditioner": 2e-5,
        "embedding": 2e-5,
        "noise": 1e-6,  # 1.2e-7
        "blocks": 2e-5,  # 1.5e-6
        "variance": 2e-5,
        "forward": 2e-5,  # 2.4e-6
        "teacher_forced": 2e-5,  # 3.4e-6
        "free_running": 5e-5,  # 4.3e-6
        "decoder": 2e-5,  # 5.8e-6
        "encoder": 2e-5,  # 1.2e-6
        "image_psnr": 60.0,  # 89 dB
        "image_one_level": 0.999,  # all
        "image_ssim": 0.9999,
        "image_bias": 0.02,
        "fp16_range": 2.0,
    },
    "fp16": {
        "conditioner": 3e-3,
        "embedding": 2e-3,
        "noise": 1e-6,  # 1.2e-7
        "blocks": 2e-3,  # 5.0e-4
        "variance": 5e-3,
        "forward": 5e-3,  # 1.6e-3, at guidance 4
        "teacher_forced": 3e-3,  # 5.2e-4
        "free_running": 5e-3,  # 3.9e-4
        "decoder": 3e-3,  # 7.1e-4
        "encoder": 3e-3,  # 9.7e-4, of tests/test_checkpoints.py
        "image_psnr": 35.0,  # 62 dB
        "image_one_level": 0.99,  # all
        "image_ssim": 0.99,
        "image_bias": 0.05,
        "fp16_range": 2.0,
    },
    "bf16": {
        "noise": 1e-6,
        "conditioner": 3e-2,
        "embedding": 3e-2,
        "blocks": 3e-2,
        "variance": 5e-2,
        "forward": 5e-2,
        "teacher_forced": 5e-2,
        "free_running": 5e-2,
        "decoder": 5e-2,
        "encoder": 5e-2,
        "image_psnr": 25.0,
        "image_one_level": 0.5,
        "image_ssim": 0.95,
        "image_bias": 0.2,
        "fp16_range": 2.0,
    },
}

KINDS = (
    "conditioner",
    "embedding",
    "blocks",
    "forward",
    "variance",
    "teacher_forced",
    "free_running",
    "decoder",
    "image",
    "encoder",
)
THRESHOLDS: dict[str, dict[str, float]] = {name: dict.fromkeys(KINDS, 3.0) for name in ("fp32", "fp16", "bf16")}
