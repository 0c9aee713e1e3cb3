"""Measure the time from the process's start to the first step and to the image, the memory, and the installed size.

    python benchmarks/cpu/start.py --model xl --work build/cpu
    python benchmarks/cpu/start.py --installed

Each way runs in its own process, one after the other. The figures are those of the second of two runs: the caches are
then warm, as on a device that has sampled before. The script uses the folder that ``run.py`` prepared. It writes
start.json, from which ``report.py`` makes the table.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
STEPS = 10
WAYS = ("ours, BF16", "ours, FP32", "diffusers, BF16 weights", "diffusers, FP32")
REQUIREMENTS = {
    "dit-export[openvino]": ["{root}[openvino]"],
    "dit-export[cpu] (ONNX Runtime)": ["{root}[cpu]"],
    "diffusers, transformers and torch (CPU)": ["torch==2.13.0", "diffusers", "transformers", "accelerate"],
}


def run_ours(work: Path, precision: str, started: float) -> dict[str, Any]:
    """Sample one image as dit-sample does, with DDIM and guidance."""
    from dit_runtime.core.machine import memory_use
    from dit_runtime.pipeline import Pipeline

    bundle = work / ("fp16.bundle" if precision == "bf16" else "fp32.bundle")
    pipe = Pipeline(bundle, "openvino", precision=precision, once=True)
    first, loop = 0.0, {}
    for index, latents, _ in pipe.trajectory([0], 0, steps=STEPS, guidance=4.0, sampler="ddim"):
        first = first or time.time() - started
        final = latents
        if index == STEPS // 2:
            loop = memory_use()
    pipe.decode(final)
    return {"first_step_s": first, "loop": loop, "end": memory_use()}


def run_diffusers(work: Path, mode: str, started: float) -> dict[str, Any]:
    """Sample one image with the peer's modules, in the same loop."""
    import numpy as np
    from contenders import Diffusers

    from dit_runtime.core.machine import memory_use

    contender = Diffusers(work, mode, 0)
    inputs = np.load(work / "inputs.npz")
    latents, labels = inputs["latents"][:1], inputs["labels"][:1]
    first, loop = 0.0, {}
    for index in range(STEPS):
        latents = contender.step(latents, labels, index)
        first = first or time.time() - started
        if index == STEPS // 2:
            loop = memory_use()
    contender.decode(latents)
    return {"first_step_s": first, "loop": loop, "end": memory_use()}


def run_way(way: str, work: Path, started: float) -> None:
    who, _, precision = way.partition(", ")
    mode = "bf16" if "BF16" in precision else "fp32"
    if who == "ours":
        found = run_ours(work, {"bf16": "bf16", "fp32": "f32"}[mode], started)
        assert "torch" not in sys.modules
    else:
        found = run_diffusers(work, mode, started)
    print(json.dumps({**found, "total_s": time.time() - started}))


def measure_installed() -> dict[str, Any]:
    """Measure the megabytes that each set of packages takes beyond pip itself, in a fresh environment."""
    found = {}
    for name, requirements in REQUIREMENTS.items():
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run([sys.executable, "-m", "venv", folder], check=True, cwd=folder)
            pip = [f"{folder}/bin/python", "-m", "pip", "--disable-pip-version-check"]
            before = size_of(Path(folder))
            asked = [requirement.format(root=HERE.parents[1]) for requirement in requirements]
            constraints = str(HERE.parents[1] / "constraints.txt")
            subprocess.run(
                [*pip, "install", "--quiet", "--no-compile", "-c", constraints, *asked], check=True, cwd=folder
            )
            listed = json.loads(
                subprocess.run([*pip, "list", "--format=json"], stdout=subprocess.PIPE, check=True, cwd=folder).stdout
            )
            names = {package["name"] for package in listed} - {"pip", "setuptools"}
            found[name] = {"mb": round((size_of(Path(folder)) - before) / 1e6, 1), "packages": len(names)}
    return found  # fmt: skip


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file() and not file.is_symlink())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="xl")
    parser.add_argument("--work", type=Path, default=Path("build/cpu"))
    parser.add_argument("--installed", action="store_true", help="measure the installed sizes alone, and keep the rest")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--started", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    work = args.work / args.model
    if args.way:
        run_way(args.way, work, args.started)
        return
    from dit_runtime.core.environment import describe_environment
    from dit_runtime.core.replace import replace_file

    target = HERE / "start.json"
    report: dict[str, Any] = {
        "model": args.model,
        "environment": describe_environment(0),
        "processes": {},
        "installed": {},
    }
    if target.exists():
        report = json.loads(target.read_text(encoding="utf-8"))
    for way in () if args.installed else WAYS:
        for _ in range(2):
            argv = [sys.executable, __file__, "--model", args.model, "--work", str(args.work), "--way", way]
            done = subprocess.run(
                [*argv, "--started", repr(time.time())], stdout=subprocess.PIPE, text=True, check=True
            )
            report["processes"][way] = json.loads(done.stdout.splitlines()[-1])
        print(way, report["processes"][way], file=sys.stderr)
    if args.installed:
        report["installed"] = measure_installed()
    with replace_file(target) as file:
        file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(target)


if __name__ == "__main__":
    main()
