"""Write the tables of this folder's README and the plot from ``results.json``: ``python benchmarks/paper/report.py``.

It takes seconds and measures nothing. ``run.py`` ends with it.
"""

from __future__ import annotations

import argparse
import json
from itertools import combinations
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot as plt
from matplotlib.ticker import FixedLocator, NullLocator

from dit_runtime.core.replace import replace_file

HERE = Path(__file__).parent
RESULTS = HERE / "results.json"
README = HERE / "README.md"
PLOT = HERE / "plot.png"
BEGIN, END = "<!-- written by report.py: begin -->", "<!-- written by report.py: end -->"
STYLES = {  # sizes of adaLN-Zero are shades of one colour, the other conditionings have their own
    "small": ("#7fb3e6", "o", "adaLN-Zero, small"),
    "base": ("#2b76c4", "s", "adaLN-Zero, base"),
    "large": ("#0b2f5c", "D", "adaLN-Zero, large"),
    "base-adaln": ("#e08214", "^", "adaLN, base"),
    "base-cross-attention": ("#8e44ad", "v", "cross-attention, base"),
    "base-in-context": ("#2e9e5b", "P", "in-context, base"),
    "base-again": ("#2b76c4", "$2$", "adaLN-Zero, base, trained again"),
    "base-in-context-again": ("#2e9e5b", "$2$", "in-context, base, trained again"),
}


def select_rows(results: dict[str, Any], name: str, sampler: str = "ddpm") -> list[dict[str, Any]]:
    """Select a model's measurements with one sampler, sorted by steps."""
    rows = [row for row in results["samples"] if row["model"] == name and row["sampler"] == sampler]
    return sorted(rows, key=lambda row: row["steps"])


def format_interval(interval: list[float], digits: int) -> str:
    return f"{interval[0]:.{digits}f} to {interval[1]:.{digits}f}"


def format_tables(results: dict[str, Any]) -> str:
    """Format the models, then every measurement, as Markdown tables."""
    lines = [
        "| model | conditioning | depth × width | parameters | GMAC | training loss | training s |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    names = [name for name in STYLES if name in results["models"]]
    for name in names:
        model = results["models"][name]
        lines.append(
            f"| {name} | {model['conditioning']} | {model['depth']} × {model['width']} | {model['parameters']:,} "
            f"| {model['gmac']:.5f} | {model['loss']:.4f} | {model['seconds']} |"
        )
    lines += [
        "",
        "At equal training compute: the running loss of a larger model (its learning rate not yet decayed) at the step "
        "where its training has cost as much as the whole training of a smaller model:",
        "",
        "| smaller | its loss at the end | larger | after steps | its loss then |",
        "|---|--:|---|--:|--:|",
    ]
    sizes = [(name, results["models"][name]) for name in ("small", "base", "large")]
    for (smaller, less), (larger, more) in combinations(sizes, 2):
        equal = results["training_steps"] * less["gmac"] / more["gmac"]
        steps, loss = min(more["losses"], key=lambda entry: abs(entry[0] - equal))
        lines.append(f"| {smaller} | {less['loss']:.4f} | {larger} | {steps} | {loss:.4f} |")
    samplers = list(dict.fromkeys(row["sampler"] for row in results["samples"]))
    for sampler in samplers:
        lines += [
            "",
            f"{sampler.upper()}, {results['pictures']} images each:",
            "",
            "| model | steps | GMAC × steps | class accuracy | 95 % | Fréchet distance | 95 % |",
            "|---|--:|--:|--:|:-:|--:|:-:|",
        ]
        for name in names:
            for row in select_rows(results, name, sampler):
                lines.append(
                    f"| {name} | {row['steps']} | {row['gmac_steps']:.3f} | {row['accuracy']:.4f} "
                    f"| {format_interval(row['accuracy_interval'], 3)} | {row['distance']:.3f} "
                    f"| {format_interval(row['distance_interval'], 3)} |"
                )
    floor = results["reconstructions"]
    lines += [
        "",
        f"The limit for every model: {results['pictures']} test images through the autoencoder have accuracy "
        f"{floor['accuracy']:.4f} and distance {floor['distance']:.3f} (means of {floor['sets']} sets). "
        f"Machine: {results['machine']}.",
    ]
    return "\n".join(lines)


def plot(results: dict[str, Any]) -> None:
    """Plot both figures against the cost of one forward, at the most steps, and against that of all sampling steps."""
    mpl.rcParams.update({"font.size": 10, "axes.grid": True, "grid.color": "#dddddd", "axes.axisbelow": True})
    figure, axes = plt.subplots(2, 2, figsize=(11, 9), constrained_layout=True)
    most = max(row["steps"] for row in results["samples"])
    for name, (color, marker, label) in STYLES.items():
        rows = select_rows(results, name)
        if not rows:
            continue
        for line, (value, interval) in enumerate(
            (("distance", "distance_interval"), ("accuracy", "accuracy_interval"))
        ):
            for column, (cost, chosen) in enumerate(
                (("gmac", [row for row in rows if row["steps"] == most]), ("gmac_steps", rows))
            ):
                axes[line, column].errorbar(
                    [row[cost] for row in chosen],
                    [row[value] for row in chosen],
                    yerr=[[abs(row[value] - row[interval][end]) for row in chosen] for end in (0, 1)],
                    color=color,
                    marker=marker,
                    markersize=6,
                    linewidth=1.4,
                    capsize=3,
                    label=label,
                )
    floor = results["reconstructions"]
    for line, name in enumerate(("distance", "accuracy")):
        for axis in axes[line]:
            axis.axhline(floor[name], color="#555555", linestyle=":", label="autoencoder's reconstructions")
            axis.set_xscale("log")
            axis.xaxis.set_major_formatter("{x:g}")
        axes[line, 0].xaxis.set_major_locator(FixedLocator([0.001, 0.002, 0.005, 0.01, 0.02, 0.05]))
        axes[line, 0].xaxis.set_minor_locator(NullLocator())
        axes[line, 0].set_xlabel(f"GMAC of one forward, {most} steps")
        axes[line, 1].set_xlabel("GMAC × sampling steps, per image")
    for axis in axes[0]:
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(FixedLocator([2, 5, 10, 20, 50]))
        axis.yaxis.set_minor_locator(NullLocator())
        axis.yaxis.set_major_formatter("{x:g}")
        axis.set_ylabel("Fréchet distance of the demo's evaluator")
    for axis in axes[1]:
        axis.set_ylabel("class accuracy")
    figure.legend(*axes[1, 1].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=9)
    figure.suptitle(
        f"DDPM without guidance, {results['pictures']} images a point, "
        f"{results['training_steps']} training steps each; bars: 95 %"
    )
    figure.savefig(PLOT, dpi=110, facecolor="white")


def write_report() -> None:
    """Write the README's tables and the plot."""
    results = json.loads(RESULTS.read_text())
    before, _, rest = README.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    with replace_file(README) as file:
        file.write_text(f"{before}{BEGIN}\n\n{format_tables(results)}\n\n{END}{after}")
    plot(results)
    print(f"{README.name} and {PLOT.name} written from {RESULTS.name}")


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    write_report()


if __name__ == "__main__":
    main()
