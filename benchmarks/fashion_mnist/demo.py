"""``make demo``: run every command on the committed Fashion-MNIST model, and judge the images.

The demo exports the checkpoint in FP32 and FP16, builds a TensorRT-RTX engine, samples a grid without PyTorch, and
verifies both bundles. Then the evaluator judges images of PyTorch FP32, ONNX FP32 and ONNX FP16 from the same seeds.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from evaluator import CLASS_NAMES, frechet_distance, judge, load_evaluator, reference_statistics, statistics_of

from dit_runtime import Pipeline
from dit_runtime.core.replace import replace_file
from dit_runtime.verify.metrics import psnr

HERE = Path(__file__).parent
CHECKPOINT = HERE / "checkpoint"
GUIDANCE = 1.5
STEPS = 50
PER_ROW = 10  # images of each class in the grid


def run_command(*argv: str | Path) -> None:
    """Print one of the installed commands, and run it."""
    name, *rest = [str(item) for item in argv]
    print(f"\n$ {' '.join([name, *rest])}", flush=True)
    executable = shutil.which(name, path=str(Path(sys.executable).parent)) or name
    subprocess.run([executable, *rest], check=True)


def sample_with_pytorch(
    labels: list[int], seeds: list[int], batch: int, steps: int = STEPS, guidance: float = GUIDANCE
) -> np.ndarray:
    """Sample with the unpatched diffusers modules in FP32, in ``DiTPipeline``'s loop with null = number of classes."""
    import torch
    from dit_export.checkpoints.sources import Source, load_checkpoint
    from dit_export.reference.pipeline import Reference

    checkpoint = load_checkpoint(Source(str(CHECKPOINT)))
    reference, scheduler = Reference(checkpoint), checkpoint.scheduler
    assert scheduler is not None
    scheduler.set_timesteps(steps)
    images = []
    with torch.inference_mode():
        for first in range(0, len(labels), batch):
            y = torch.tensor(labels[first : first + batch])
            z = torch.stack(
                [torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(s)) for s in seeds[first : first + batch]]
            )
            for t in scheduler.timesteps:
                e, _ = reference.predict(z, t.expand(len(z)), y, guidance)
                z = scheduler.step(e, t, z).prev_sample
            images.append(reference.images_from_decoded(reference.decode(z)))
    return np.concatenate(images)


def sample(bundle: Path, labels: list[int], seeds: list[int], batch: int) -> np.ndarray:
    """Sample the same images from a bundle on ONNX Runtime."""
    pipe = Pipeline(bundle, "onnxruntime")
    chunks = [slice(first, first + batch) for first in range(0, len(labels), batch)]
    return np.concatenate([pipe(labels[c], seeds[c], steps=STEPS, guidance=GUIDANCE, sampler="ddim") for c in chunks])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("build/demo"))
    parser.add_argument("--samples", type=int, default=200, help="images that the evaluator judges")
    parser.add_argument("--batch", type=int, default=50)
    args = parser.parse_args()
    start = time.monotonic()
    bundles = {"ONNX FP32": args.output / "fp32.bundle", "ONNX FP16": args.output / "fp16.bundle"}
    run_command("dit-export", CHECKPOINT, "-o", bundles["ONNX FP32"])
    run_command("dit-export", CHECKPOINT, "--fp16", "-o", bundles["ONNX FP16"])
    run_command("dit-build", bundles["ONNX FP16"], "--target", "rtx")
    grid = [str(number) for number in range(len(CLASS_NAMES)) for _ in range(PER_ROW)]
    run_command(
        *("dit-sample", bundles["ONNX FP16"], "--labels", *grid, "--seed", "0", "--steps", str(STEPS)),
        *("--guidance", str(GUIDANCE), "--sampler", "ddim", "--columns", str(PER_ROW), "--batch-size", "50"),
        *("-o", args.output / "samples.png"),
    )
    run_command("dit-verify", bundles["ONNX FP16"], "--engine", "onnxruntime")

    reference, evaluator = reference_statistics(), load_evaluator()
    labels = [index % len(CLASS_NAMES) for index in range(args.samples)]
    seeds = list(range(args.samples))
    print(
        f"\n{args.samples} images, DDIM {STEPS} steps, guidance {GUIDANCE}, judged by a CNN that sees "
        f"{reference['real_accuracy']:.4f} of the real test images right"
    )
    print(f"{'':<14} {'class accuracy':>15} {'Fréchet distance':>17} {'against PyTorch':>16}", flush=True)
    figures: dict[str, dict[str, float]] = {}
    expected: np.ndarray | None = None
    for name in ("PyTorch FP32", *bundles):
        if name in bundles:
            images = sample(bundles[name], labels, seeds, args.batch)
        else:
            images = sample_with_pytorch(labels, seeds, args.batch)
            expected = images
        assert expected is not None
        classes, features = judge(evaluator, images)
        accuracy = float((classes == np.array(labels)).mean())
        distance = frechet_distance(statistics_of(features), (reference["mean"], reference["covariance"]))
        level = psnr(images, expected)
        figures[name] = {"accuracy": accuracy, "frechet_distance": distance}
        against = "-" if name == "PyTorch FP32" else f"{level:.1f} dB"
        print(f"{name:<14} {accuracy:>15.3f} {distance:>17.3f} {against:>16}", flush=True)
        if np.isfinite(level):
            figures[name]["psnr_db"] = level
    print(
        f"autoencoder: reconstructions of the test images have PSNR {reference['reconstruction_psnr']:.2f} dB and "
        f"Fréchet distance {reference['reconstruction_distance']:.3f}"
    )
    figures["evaluator"] = {"real_accuracy": float(reference["real_accuracy"]), "samples": args.samples}
    with replace_file(args.output / "figures.json") as file:
        file.write_text(json.dumps(figures, indent=1) + "\n")
    print(f"\n{args.output}: samples.png, figures.json and the bundles, in {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
