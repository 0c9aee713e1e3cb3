"""The tables of ``run.py``'s results as Markdown: ``python benchmarks/cpu/report.py > benchmarks/cpu/README.md``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
REFERENCE = "diffusers, eager FP32"
MODELS = ("demo", "b", "xl")


def rate_of(report: dict[str, Any], precision: str) -> dict[str, Any] | None:
    """The fastest product of the model's own shapes in a precision."""
    rates = [rate for rate in report["gemm"] if rate["precision"] == precision]
    return max(rates, key=lambda rate: rate["gflops"]) if rates else None


def table(report: dict[str, Any], key: str) -> list[str]:
    """A row per contender: seconds, ratio to the reference, share of the limit (steps only), and how far apart."""
    found, step = report[key], key == "step"
    reference = found[REFERENCE]["median_s"]
    lines = [
        "| | median s | fastest to slowest | × eager FP32 | " + ("of the GEMM rate | " if step else "") + "apart |",
        "|---|---:|---:|---:|" + ("---:|" if step else "") + "---:|",
    ]
    for name, row in found.items():
        cells = [name, f"{row['median_s']:.3f}", f"{row['fastest_s']:.3f} to {row['slowest_s']:.3f}"]
        cells.append(f"{reference / row['median_s']:.2f}")
        if step:
            rate = rate_of(report, "bf16" if "BF16" in name else "fp32")
            share = report["guided_step_gflop"] / row["median_s"] / rate["gflops"] if rate else float("nan")
            cells.append(f"{share:.0%}")
        apart = row["difference"]
        if "relative" in apart:
            cells.append(f"{apart['relative']:.1e}")
        else:
            cells.append("the same" if apart["psnr_db"] is None else f"{apart['psnr_db']:.1f} dB")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def memory_table(report: dict[str, Any]) -> list[str]:
    """Memory while stepping, and what loading took."""
    lines = ["| | anonymous MB | file-backed MB | peak MB | load s | first step s |", "|---|---:|---:|---:|---:|---:|"]
    for name, row in report["step"].items():
        memory = row["memory"]
        sizes = [f"{memory[kind] / 1e6:.0f}" for kind in ("anonymous", "file_backed", "peak")]
        lines.append(
            f"| {name} | {' | '.join(sizes)} | {report['loaded'][name]['load_s']:.1f} | {row['first_s']:.2f} |"
        )
    return lines


def main() -> None:
    print(
        "# On a CPU, side by side\n\nMade by `benchmarks/cpu/run.py`: every contender does the whole of the same work,"
    )
    print("in turn, in one run. *Apart*: of steps the largest difference from diffusers in eager FP32 over the largest")
    print("value; of pictures their PSNR.")
    for model in MODELS:
        file = HERE / f"{model}.json"
        if not file.exists():
            continue
        report = json.loads(file.read_text(encoding="utf-8"))
        here = report["environment"]
        rates = [rate for rate in (rate_of(report, name) for name in ("fp32", "bf16")) if rate]
        limits = "; ".join(
            f"{rate['precision'].upper()} {rate['gflops']:.0f} GFLOP/s "
            f"({rate['library']}, {rate['m']}×{rate['k']}×{rate['n']})"
            for rate in rates
        )
        print(f"\n## {report['model']}\n\n{here['processor']}, {here['cores']} cores; {report['rounds']} rounds;")
        print(", ".join(f"{name} {version}" for name, version in here["libraries"].items()) + ".")
        print(f"Fastest products of its shapes in the same run: {limits}.")
        print(f"\nOne guided step, batch 1 ({report['guided_step_gflop']:.2f} GFLOP):\n")
        print("\n".join(table(report, "step")))
        print("\nDecoder, batch 1:\n")
        print("\n".join(table(report, "decode")))
        for key in report:
            if key.startswith("pictures_"):
                print(f"\n{report['steps']} DDIM steps and the decoder, batch {key.partition('_')[2]}:\n")
                print("\n".join(table(report, key)))
        print("\nMemory and start:\n")
        print("\n".join(memory_table(report)))


if __name__ == "__main__":
    main()
