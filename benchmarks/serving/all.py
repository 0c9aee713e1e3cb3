"""All figures of the pages on serving, on a machine that does nothing else; each is kept beside this file.

python benchmarks/serving/all.py tiny.bundle demo.bundle benchmarks/fashion_mnist/checkpoint
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def main() -> None:
    tiny, demo, checkpoint = sys.argv[1:]
    short, long = ("--requests", "40", "--rounds", "3"), ("--requests", "80", "--rounds", "1")
    for script, arguments, result in (
        ("overhead", (tiny,), "overhead"),
        ("latency", (demo, "--gpu-step", "4", "0.7", *long), "latency-gpu"),
        ("latency", (demo, "--diffusers", checkpoint, *short), "latency-cpu"),
        ("latency", (demo, "--threads", "1", "--saturation", *short), "saturation-onnxruntime"),
        (
            "latency",
            (demo, "--threads", "1", "--saturation", "--engine", "openvino-any", *short),
            "saturation-openvino-any",
        ),
        ("simulate", (), "simulate"),
        ("simulate", ("--check", tiny), "simulate-check"),
    ):
        output = HERE / f"{result}.json"
        command = [sys.executable, HERE / f"{script}.py", *arguments, "--output", output]
        print("\n", *map(str, command), flush=True)
        subprocess.run(list(map(str, command)), check=True)
    subprocess.run([sys.executable, str(HERE / "open_batch.py"), demo], check=True)


if __name__ == "__main__":
    main()
