"""Write this folder's README.md and scaling.svg: ``python benchmarks/cpu/report.py``.

They are made from the JSON files of ``run.py``, ``ablations.py``, ``scaling.py`` and ``start.py``; nothing is measured.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dit_runtime.core.replace import replace_file

HERE = Path(__file__).parent
REFERENCE = "diffusers, eager FP32"
MODELS = ("demo", "b", "xl")
GROUPS = {"bf16": "BF16", "fp32": "FP32"}
OURS = {"bf16": "ours: OpenVINO BF16", "fp32": "ours: OpenVINO FP32"}


def read(name: str) -> dict[str, Any] | None:
    file = HERE / f"{name}.json"
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.exists() else None


def rate_of(group: dict[str, Any], precision: str) -> dict[str, Any] | None:
    """The fastest of the measured matrix products, which have the model's own shapes."""
    rates = [rate for rate in group["gemm"] if rate["precision"] == precision]
    return dict(max(rates, key=lambda rate: float(rate["gflops"]))) if rates else None


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """The lines of a Markdown table; all columns but the first are aligned to the right."""
    lines = [f"| {' | '.join(head)} |", "|---" + "|---:" * (len(head) - 1) + "|"]
    return lines + [f"| {' | '.join(row)} |" for row in rows]


def compare_contenders(group: dict[str, Any], key: str, precision: str, gflop: float) -> list[str]:
    """A row for each contender: seconds, speed in units of the reference's, share of the GEMM rate, and difference."""
    found, step = group[key], key == "step"
    reference, rate = found[REFERENCE]["median_s"], rate_of(group, precision)
    rows = []
    for name, row in found.items():
        cells = [name, f"{row['median_s']:.4g}", f"{row['fastest_s']:.4g} to {row['slowest_s']:.4g}"]
        cells.append(f"{reference / row['median_s']:.2f}")
        if step:
            cells.append(f"{gflop / row['median_s'] / rate['gflops']:.0%}" if rate and name != REFERENCE else "")
        apart = row["difference"]
        if "relative" in apart:
            cells.append(f"{apart['relative']:.1e}")
        else:
            cells.append("the same" if apart["psnr_db"] is None else f"{apart['psnr_db']:.1f} dB")
        rows.append(cells)
    share = ["of the GEMM rate"] if step else []
    return table(["", "median s", "fastest to slowest", "× eager FP32", *share, "apart"], rows)


def describe_lead(group: dict[str, Any], key: str, precision: str) -> str:
    """Describe how many times as fast as each peer dit-export is."""
    found = group[key]
    own = found[OURS[precision]]["median_s"]
    peers = {name: row["median_s"] / own for name, row in found.items() if not name.startswith("ours")}
    return "; ".join(f"{ratio:.2f} × {name}" for name, ratio in peers.items())


def table_of_memory(group: dict[str, Any]) -> list[str]:
    """Memory of each contender during the steps, and the time of loading and the first step."""
    rows = []
    for name, row in group["step"].items():
        sizes = [f"{row['memory'][kind] / 1e6:.0f}" for kind in ("anonymous", "file_backed", "peak")]
        rows.append([name, *sizes, f"{group['loaded'][name]['load_s'] + row['first_s']:.2f}"])
    return table(["", "anonymous MB", "file-backed MB", "peak MB", "load and first step s"], rows)


def model_section(report: dict[str, Any]) -> Iterator[str]:
    here = report["environment"]
    yield f"\n## {report['model']}\n"
    yield (
        describe_machine(here)
        + f", {report['rounds']} rounds. One guided step is {report['guided_step_gflop']:.4g} GFLOP."
    )
    if report["model"] == "DiT-B/2-256":
        yield "Measured when BF16 products were also cut at this width, which cost 5 %. They are no longer cut here."
    for precision, title in GROUPS.items():
        if precision not in report:
            continue
        group = report[precision]
        rate = rate_of(group, precision)
        yield f"\n### {title}"
        if rate:
            yield (
                f"\nThe fastest matrix product of the model's shapes in the same run: {rate['gflops']:.0f} GFLOP/s "
                f"({rate['library']}, {rate['m']}×{rate['k']}×{rate['n']} and back)."
            )
        titles = {"step": "One guided step, batch 1", "decode": "The decoder, batch 1"}
        for key in group:
            if key in titles or key.startswith("pictures_"):
                images = f"{report['steps']} DDIM steps and the decoder, batch {key.partition('_')[2]}"
                yield f"\n{titles.get(key, images)}:\n"
                yield from compare_contenders(group, key, precision, report["guided_step_gflop"])
                yield f"\n{OURS[precision]} is {describe_lead(group, key, precision)}."
        yield "\nMemory and start:\n"
        yield from table_of_memory(group)


def describe_machine(here: dict[str, Any]) -> str:
    libraries = ", ".join(f"{name} {version}" for name, version in here["libraries"].items())
    return f"{here['processor']}, {here['cores']} cores ({', '.join(here['cpu_flags'])}); {libraries}"


def ablation_section(name: str, report: dict[str, Any]) -> Iterator[str]:
    titles = {"b": "DiT-B/2-256", "xl": "DiT-XL/2-256", "demo": "demo"}
    yield f"\n### {titles[name]}\n\n{describe_machine(report['environment'])}.\n"
    for precision, found in report["openvino"].items():
        yield f"OpenVINO {precision}, a guided step:\n"
        yield from table_of_changes(found)
        yield ""
    if "onnxruntime" in report:
        yield "ONNX Runtime, a guided step:\n"
        yield from table_of_changes(report["onnxruntime"])


def table_of_changes(found: dict[str, Any]) -> list[str]:
    first = next(iter(found.values()))["p50_ms"]
    rows = [[name, f"{row['p50_ms']:.4g}", f"{row['p50_ms'] / first:.3f}"] for name, row in found.items()]
    return table(["", "median ms", "× the first"], rows)


def scaling_section(report: dict[str, Any]) -> Iterator[str]:
    yield f"\n## Scaling\n\n{describe_machine(report['environment'])}; OpenVINO {report['precision']}, a guided step.\n"
    head = ["batch", *[f"{name}: ms, GFLOP/s" for name in report["batch"]]]
    batches = [point["batch"] for point in next(iter(report["batch"].values()))]
    rows = [
        [str(batch), *[f"{p[index]['p50_ms']:.4g}, {p[index]['gflops']:.0f}" for p in report["batch"].values()]]
        for index, batch in enumerate(batches)
    ]
    yield from table(head, rows)
    yield "\nTokens (B/2, batch 1):\n"
    rows = [
        [str(p["tokens"]), f"{p['gflop']:.4g}", f"{p['attention_share']:.0%}", *cells_of_point(p)]
        for p in report["tokens"]["B/2"]
    ]
    yield from table(["tokens", "GFLOP", "attention's share", "ms", "GFLOP/s"], rows)
    yield "\nModels (256 tokens, batch 1):\n"
    rows = [[p["model"], f"{p['gflop']:.4g}", *cells_of_point(p)] for p in report["model"]]
    yield from table(["model", "GFLOP", "ms", "GFLOP/s"], rows)
    if report["cut"]:
        yield "\nProducts cut (`backends/openvino/passes.py`) or whole, BF16, batch 1:\n"
        rows = [[p["model"], str(p["width"]), f"{p['cut_ms']:.4g}", f"{p['whole_ms']:.4g}"] for p in report["cut"]]
        yield from table(["model", "width", "cut: ms", "whole: ms"], rows)
    yield "\nGuided steps a second, in one stream or with a call in each of two:\n"
    names = [f"streams {p['streams']}, batch {p['batch']}" for p in next(iter(report["streams"].values()))]
    rows = [[name, *[f"{p['steps_a_second']:.4g}" for p in points]] for name, points in report["streams"].items()]
    yield from table(["model", *names], rows)
    exponents = "; ".join(f"{name} {value:.2f}" for name, value in report["exponents"].items())
    yield f"\nExponents b of ms = a·xᵇ, fitted over all points: {exponents}."
    yield "\n![time of a guided step against batch, tokens and work](scaling.svg)"


def cells_of_point(point: dict[str, Any]) -> list[str]:
    return [f"{point['p50_ms']:.4g}", f"{point['gflops']:.0f}"]


def plot(report: dict[str, Any], target: Path) -> None:
    """Plot milliseconds against batch, tokens and work, on logarithmic axes, each with a line of slope 1."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "scaling"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(10, 3.2), layout="constrained")
    lines = [
        (axes[0], "batch", report["batch"]),
        (axes[1], "tokens", report["tokens"]),
        (axes[2], "gflop", {"S/2 to XL/2": report["model"]}),
    ]
    for axis, key, found in lines:
        for name, points in found.items():
            x, y = ([point[value] for point in points] for value in (key, "p50_ms"))
            (line,) = axis.plot(x, y, "o-", label=name)
            axis.plot(x, [y[0] * value / x[0] for value in x], ":", color=line.get_color())
        axis.set(xscale="log", yscale="log", xlabel={"gflop": "GFLOP"}.get(key, key), ylabel="ms")
        axis.set_xticks(x, [f"{value:.0f}" for value in x])
        axis.minorticks_off()
        axis.legend()
    with replace_file(target) as file:
        figure.savefig(file, format="svg", metadata={"Date": None})
    pyplot.close(figure)


def start_section(report: dict[str, Any]) -> Iterator[str]:
    yield f"\n## Start, memory and size\n\n{describe_machine(report['environment'])}.\n"
    rows = [
        [
            name,
            f"{row['first_step_s']:.2f}",
            f"{row['total_s']:.1f}",
            *[f"{row[when][kind] / 1e6:.0f}" for when, kind in MEMORY],
        ]
        for name, row in report["processes"].items()
    ]
    head = ["", "start to first step s", "10 steps and image s", *[f"{when}: {kind} MB" for when, kind in MEMORY]]
    yield from table([cell.replace("_", " ") for cell in head], rows)
    if not report["installed"]:
        return
    yield "\nInstalled size:\n"
    rows = [[name, f"{row['mb']:.0f}", str(row["packages"])] for name, row in report["installed"].items()]
    yield from table(["environment", "MB", "packages"], rows)


MEMORY = (("loop", "anonymous"), ("loop", "file_backed"), ("end", "anonymous"), ("end", "peak"))


def format_document() -> str:
    """The text of README.md."""
    lines = [
        "# On a CPU, side by side",
        "",
        "In `run.py` every contender does the same whole work. The contenders take turns in one run for each",
        "precision, because all of them together do not fit in memory. A turn is one call that is not timed and one",
        "that is. Whole images are made once, after a run of one step. *Apart* is the difference from diffusers in",
        "eager FP32: of a step the largest difference divided by the largest value, of images their PSNR. The *GEMM",
        "rate* is that of the fastest matrix product of the model's own shapes in the same run.",
    ]
    for name in MODELS:
        if (report := read(name)) is not None:
            lines += model_section(report)
    ablations = {name: report for name in MODELS if (report := read(f"{name}-ablations")) is not None}
    if ablations:
        lines += ["\n## What each choice is worth", "\nFrom `ablations.py`, which times all variants in turn."]
        for name, report in ablations.items():
            lines += ablation_section(name, report)
    if (report := read("scaling")) is not None:
        lines += scaling_section(report)
    if (report := read("start")) is not None:
        lines += start_section(report)
    return "\n".join(lines) + "\n"


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    if (report := read("scaling")) is not None:
        plot(report, HERE / "scaling.svg")
    with replace_file(HERE / "README.md") as file:
        file.write_text(format_document(), encoding="utf-8")
    print(HERE / "README.md")


if __name__ == "__main__":
    main()
