"""The limits a bundle carries for its own verification, per precision.

Values are max |Δ| over the largest reference magnitude unless the name says otherwise. Beside each limit stands what
was measured on the committed Fashion-MNIST model with ONNX Runtime on a CPU (``make demo`` prints it).
"""

TOLERANCES: dict[str, dict[str, float]] = {
    "fp32": {
        "noise": 1e-6,
        "blocks": 2e-5,
        "forward": 2e-5,
        "teacher_forced": 2e-5,
        "free_running": 2e-4,
        "decoder": 2e-5,
        "image_psnr": 60.0,
        "image_one_level": 0.999,
    },
    "fp16": {
        "noise": 1e-6,
        "blocks": 1e-2,
        "forward": 1e-2,
        "teacher_forced": 1e-2,
        "free_running": 5e-2,
        "decoder": 1e-2,
        "image_psnr": 35.0,
        "image_one_level": 0.9,
    },
}
