"""Measure a real-size model, and print the figures as JSON: ``make bench``.

    python benchmarks/real_size.py --work build/real_size

The script exports DiT-XL/2-256 with random weights in FP16 (time, peak memory). It converts an official checkpoint file
of that shape (peak memory). It builds for TensorRT-RTX (weights, fused attention). It times a guided FP32 step on ONNX
Runtime in turn with a plain export of diffusers' model.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

PRESET = "DiT-XL/2-256"
REPEATS = 7


def time_module(module: str, *argv: str) -> dict[str, Any]:
    """Run a command's module; return its JSON result, wall seconds, and the largest process's peak memory in GB."""
    code = "import sys; sys.path[:] = filter(None, sys.path)\n"  # '' would be the current folder
    code += f"from {module} import main; main(sys.argv[1:])"
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code, *argv], stdout=subprocess.PIPE, text=True, check=True)
    seconds = time.monotonic() - start
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6
    return {"result": json.loads(done.stdout), "seconds": round(seconds, 1), "peak_gb": round(peak, 2)}


def measure_export(work: Path) -> dict[str, Any]:
    """Measure ``dit-export DiT-XL/2-256 --random-weights 0 --fp16``, with golden records."""
    export = time_module(
        "dit_export.command",
        *(PRESET, "--random-weights", "0", "--fp16", "--no-verify", "--json", "-o", str(work / "fp16.bundle")),
    )
    weights = export["result"]["weights_bytes"]
    golden = sum(file.stat().st_size for file in (work / "fp16.bundle" / "golden").iterdir())
    return {
        "seconds": export["seconds"],
        "peak_gb": export["peak_gb"],
        "step_weights_mb": round(weights["step"] / 1e6, 1),
        "conditioner_weights_mb": round(weights["conditioner"] / 1e6, 1),
        "decoder_weights_mb": round(weights["decoder"] / 1e6, 1),
        "golden_mb": round(golden / 1e6, 1),
    }


def measure_conversion(work: Path) -> dict[str, Any]:
    """Measure reading, converting, tracing and writing the graphs of an official XL file: peak memory and seconds."""
    file, vae = work / "official.safetensors", work / "vae"
    if not (file.exists() and vae.exists()):
        run_in_process("--make-official", work)
    figures: dict[str, Any] = {"file_gb": round(file.stat().st_size / 1e9, 2)}
    for precision in ("fp32", "fp16"):
        start = time.monotonic()
        peak = float(run_in_process("--convert", work, precision))
        figures[precision] = {
            "peak_gb": round(peak / 1e9, 2),
            "of_file": round(peak / file.stat().st_size, 2),
            "seconds": round(time.monotonic() - start, 1),
        }
    return figures


def run_in_process(option: str, work: Path, *values: str) -> str:
    """Run one part of this script in its own process; return what it prints."""
    argv = [sys.executable, __file__, "--work", str(work), option, *values]
    return subprocess.run(argv, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()


def make_official(work: Path) -> None:
    """Write DiT-XL/2-256 with random weights as an official file, and a VAE of Stable Diffusion's shape as a folder."""
    from dit_export.checkpoints.sources import Source, load_checkpoint
    from safetensors.torch import save_file

    checkpoint = load_checkpoint(Source(PRESET, 0, family="official"))
    save_file(dict(checkpoint.weights), work / "official.safetensors")
    checkpoint.autoencoder.save_pretrained(work / "vae")


def convert(work: Path, precision: str) -> int:
    """Export without golden records; return the peak memory of this process in bytes, mapped files included."""
    from dit_export.bundle import write_graphs
    from dit_export.checkpoints.sources import Source, load_checkpoint
    from dit_export.graphs.precision import FP16, FP32

    source = Source(str(work / "official.safetensors"), autoencoder=str(work / "vae"))
    with tempfile.TemporaryDirectory(dir=work) as folder:
        for _ in write_graphs(load_checkpoint(source), FP16 if precision == "fp16" else FP32, Path(folder), True):
            pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure_build(work: Path) -> dict[str, Any]:
    """Measure ``dit-build --target rtx``: the builder's figures of the step's two profiles, and of the decoder."""
    build = time_module("dit_engines.command", str(work / "fp16.bundle"), "--target", "rtx", "--json")
    graphs = {graph["graph"]: graph for graph in build["result"]["graphs"]}
    step = graphs["step"]["audit"]
    return {
        "seconds": build["seconds"],
        "step_weights_mb": round(step["weights_bytes"] / 1e6, 1),
        "step_plan_mb": round(graphs["step"]["plan_bytes"] / 1e6, 1),
        "fused_attention": [profile["fused_attention"] for profile in step["profiles"]],
        "kernels": [profile["kernels"] for profile in step["profiles"]],
        "activations_mb": [round(profile["activation_bytes"] / 1e6, 1) for profile in step["profiles"]],
        "decoder_activations_mb": round(graphs["decoder"]["audit"]["profiles"][0]["activation_bytes"] / 1e6, 1),
    }


def export_plainly(work: Path) -> Path:
    """Export diffusers' transformer with ``torch.onnx.export`` alone, at opset 20. Its caller doubles the batch."""
    import torch
    from dit_export.checkpoints.sources import Source, load_checkpoint
    from dit_export.graphs.tracing import quiet

    target = work / "plain.onnx"
    if target.exists():
        return target
    load = load_checkpoint(Source(PRESET, 0)).transformer
    assert load is not None
    transformer = load()
    batch = torch.export.Dim("batch", min=1, max=64)
    examples = (torch.zeros(2, 4, 32, 32), torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64))

    class Plain(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.transformer = transformer

        def forward(self, sample: torch.Tensor, timestep: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            return self.transformer(sample, timestep=timestep, class_labels=labels).sample

    with quiet(), torch.no_grad():
        program = torch.onnx.export(
            Plain(),
            examples,
            dynamo=True,
            opset_version=20,
            input_names=["sample", "timestep", "labels"],
            output_names=["output"],
            dynamic_shapes=({0: batch}, {0: batch}, {0: batch}),
        )
    assert program is not None
    program.save(target, external_data=True)
    return target


def time_step(work: Path) -> dict[str, Any]:
    """Time a guided step in turn with the plain export: batch 1, FP32, ONNX Runtime's defaults, medians."""
    import onnxruntime

    from dit_runtime import open_bundle
    from dit_runtime.backends.onnxruntime.engine import OnnxRuntimeEngine
    from dit_runtime.samplers.by_name import schedule_for
    from dit_runtime.samplers.guidance import branch_rows, guidance_weights
    from dit_runtime.samplers.schedule import INPUT, MATRIX

    bundle_path = work / "fp32.bundle"
    if not bundle_path.exists():
        time_module(
            "dit_export.command",
            *(PRESET, "--random-weights", "0", "--no-verify", "--json", "-o", str(bundle_path)),
        )
    target = run_in_process("--plain", work)
    bundle = open_bundle(bundle_path)
    engine = OnnxRuntimeEngine(bundle)
    schedule = schedule_for("ddim", bundle.manifest.model, bundle.manifest.diffusion, 50)
    z = np.random.default_rng(0).standard_normal((1, 4, 32, 32)).astype(np.float32)
    labels = np.array([207], np.int32)
    conditions, rows = branch_rows(labels, bundle.manifest.model.null_class, 2)
    (table,) = engine.session("conditioner").run(
        {"timesteps": np.repeat(schedule.timesteps[:1], 2), "labels": conditions}, ["modulation"]
    )
    state = np.zeros((1, 3, 4, 32, 32), np.float32)
    state[:, 0] = z
    inputs = {
        "state": state,
        "noise": np.zeros_like(z),
        "coefficients": schedule.coefficients[:1],
        "guidance": guidance_weights(4.0, 1, 4, 4),
        "rows": rows,
        "modulation": table,
    }
    step = engine.session("step")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    plain = onnxruntime.InferenceSession(target, options, providers=["CPUExecutionProvider"])
    t = int(schedule.timesteps[0])

    def ours() -> np.ndarray:
        return step.run(inputs, ["next_state", "denoised"])[0][:, 0]

    def theirs() -> np.ndarray:
        (output,) = plain.run(
            None, {"sample": np.concatenate([z, z]), "timestep": np.array([t, t]), "labels": np.array([207, 1000])}
        )
        e = output[1:, :4] + 4.0 * (output[:1, :4] - output[1:, :4])
        z_weight, e_weight = schedule.coefficients[0, [MATRIX, INPUT]]
        return z_weight * z + e_weight * e

    difference = float(np.abs(ours() - theirs()).max() / np.abs(theirs()).max())
    times: dict[str, list[float]] = {"ours": [], "plain": []}
    for index in range(REPEATS):
        pair = [("ours", ours), ("plain", theirs)]
        for name, call in pair if index % 2 else pair[::-1]:
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in times.items()}
    ratios = [mine / other for mine, other in zip(times["ours"], times["plain"], strict=True)]
    return {
        "ours_s": round(medians["ours"], 3),
        "plain_export_s": round(medians["plain"], 3),
        "ratio_of_medians": round(medians["ours"] / medians["plain"], 3),
        "ratio_median_of_pairs": round(statistics.median(ratios), 3),
        "repeats": REPEATS,
        "difference_relative": difference,
    }


def describe_machine() -> dict[str, Any]:
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return {"processor": found[1] if found else platform.machine(), "cores": os.cpu_count()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/real_size"))
    parser.add_argument("--plain", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--make-official", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--convert", help=argparse.SUPPRESS)
    parser.add_argument("--only", choices=("export", "conversion", "build", "step"), help="one part")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    if args.plain:  # in its own process, because tracing leaves several GB of memory behind
        print(export_plainly(args.work))
        return
    if args.make_official:
        make_official(args.work)
        return
    if args.convert:
        print(convert(args.work, args.convert))
        return
    figures: dict[str, Any] = {"model": f"{PRESET}, random weights, seed 0", "machine": describe_machine()}
    for name, part in (
        ("export", measure_export),
        ("conversion", measure_conversion),
        ("build", measure_build),
        ("step", time_step),
    ):
        if args.only in (None, name):
            figures[name] = part(args.work)
            print(f"{name}: {figures[name]}", file=sys.stderr, flush=True)
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
