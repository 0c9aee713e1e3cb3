"""The device memory of DiT-XL/2 with the Stable Diffusion VAE at batch 1, in FP16, by the builder's figures.

    python benchmarks/device_memory.py

TensorRT-RTX compiles ahead of time for SM 8.9, without a GPU: the step with profiles for G=1 and G=2, and the decoder
for whole images and for a tile. While an image is sampled, the device holds the weights of step and decoder, and one
block of activations for both, because they never run together. The conditioning table comes on top, and is stated
apart. The conditioner is freed before the loop.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from dit_export.checkpoints.sources import Source, load_checkpoint
from dit_export.graphs.autoencoder import Decoder
from dit_export.graphs.precision import FP16
from dit_export.graphs.tracing import step_axes, write_decoder

from dit_runtime.backends.tensorrt.api import Shapes, import_library, plan_from_onnx
from dit_runtime.bundle.manifest import ModelSpec
from kernels import BRANCHES, ROWS, XL, Ablation, dtype_of_table, export_step

TILE = 32  # latent pixels: dit-build --decode-tile 32
SIZES = {"256x256": 32, "512x512": 64}  # images, and the side of their latents
STEPS = 50


def measure(onnx: Path, profiles: list[Shapes]) -> dict[str, Any]:
    """Compile a graph; return the bytes of its weights, and of the activations in each profile."""
    lines: list[str] = []
    plan_from_onnx(
        import_library("tensorrt_rtx"),
        onnx,
        profiles,
        log=lambda severity, message: lines.extend(message.splitlines()),
        report=lambda phase, done, steps: True,
        workspace_bytes=1 << 30,
        compute_capability="8.9",
    )

    def found(what: str) -> list[int]:
        return [int(match[1]) for line in lines if (match := re.match(rf"Total {what} Memory: (\d+)", line))]

    return {"weights": found("Weights")[0], "activations": found("Activation")[: len(profiles)]}


def profiles_of_step(spec: ModelSpec) -> list[Shapes]:
    axes = step_axes(spec, dtype_of_table(spec)).inputs

    def shape(name: str, branches: int, rows: int) -> tuple[int, ...]:
        free = {"batch": 1, "branches": branches, "rows": rows}
        return tuple(free[axis] if isinstance(axis, str) else axis for axis in axes[name][1])

    return [
        {name: tuple(shape(name, branches, rows) for rows in (1, STEPS * branches, ROWS)) for name in axes}
        for branches in BRANCHES
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    report: dict[str, Any] = {}
    decoder = Decoder(load_checkpoint(Source("DiT-S/2-256", 0)).autoencoder, FP16).eval().requires_grad_(False)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        onnx = folder / write_decoder(folder, decoder).file
        decoders = {
            side: measure(onnx, [{"latents": ((1, XL.latent_channels, side, side),) * 3}])
            for side in sorted({TILE, *SIZES.values()})
        }
    for size, side in SIZES.items():
        with tempfile.TemporaryDirectory() as name:
            spec = replace(XL, latent_size=(side, side))
            step = measure(Path(name) / export_step(Ablation("", size), spec, Path(name)).file, profiles_of_step(spec))
        for decoded in sorted({TILE, side}):
            shared = max(*step["activations"], *decoders[decoded]["activations"])
            report[f"{size}, decoded {'whole' if decoded == side else f'in tiles of {TILE}'}"] = {
                "step_weights_mb": round(step["weights"] / 1e6, 1),
                "decoder_weights_mb": round(decoders[decoded]["weights"] / 1e6, 1),
                "step_activations_mb": [round(size / 1e6, 1) for size in step["activations"]],
                "decoder_activations_mb": round(decoders[decoded]["activations"][0] / 1e6, 1),
                "total_gb": round((step["weights"] + decoders[decoded]["weights"] + shared) / 1e9, 3),
            }
    table = 2 * STEPS * (6 * XL.depth + 2) * XL.width * 4
    report[f"conditioning table of {STEPS} guided steps"] = {"mb": round(table / 1e6, 1)}
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
