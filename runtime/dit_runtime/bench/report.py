"""A benchmark's report as text, Markdown and plots."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dit_runtime.core.errors import OutputError
from dit_runtime.core.replace import replace_file
from dit_runtime.core.text import join_lines

PLOTS = (".png", ".svg", ".pdf")


def tables_of(report: dict[str, Any]) -> dict[str, list[Sequence[str]]]:
    """The report's tables by title, each a header and rows of text."""
    tables: dict[str, list[Sequence[str]]] = {}
    columns = {"first_ms": "first", "p50_ms": "p50", "p95_ms": "p95", "p99_ms": "p99", "worst_ms": "worst"}
    head = ("", *columns.values())
    for batch, timings in report["parts"].items():
        rows = [(name, *(f"{row[key]:.2f}" for key in columns)) for name, row in timings.items()]
        tables[f"parts, batch {batch}, ms"] = [head, *rows]
    if "calls" in report:
        tables[f"whole calls of {report['steps']} steps, ms"] = _table_of_calls(report["calls"])
    if "pictures" in report:
        tables["whole images"] = _table_of_images(report["pictures"], "batch")
    if "step_counts" in report:
        title = f"step counts, batch {next(iter(report['parts']))}"
        tables[title] = _table_of_images(report["step_counts"], "steps")
    if "sizes" in report:
        tables["sizes, p50 in ms"] = _table_of_sizes(report["sizes"])
    if report.get("gemm"):
        title = _title_of_gemm(report["gemm"])
        tables[title] = [("batch", "GFLOP/s", "share")]
        tables[title] += [
            (str(batch), f"{found['step_gflops']:.0f}", f"{found['share']:.1%}")
            for batch, found in report["gemm"]["guided_step"].items()
        ]
    return tables


def _title_of_gemm(gemm: dict[str, Any]) -> str:
    """What the guided step is compared with: a rate, or in an INT8 bundle the mix of two."""
    shown = " and ".join(
        f"{rate['library']} {rate['precision']}, {rate['m']}x{rate['k']}x{rate['n']}: {rate['gflops']:.0f} GFLOP/s"
        for rate in (gemm[name] for name in ("int8", "best") if name in gemm)
    )
    if "int8" not in gemm:
        return f"guided step against the fastest matrix product here ({shown})"
    return (
        f"guided step against the fastest matrix products here ({shown}; with {gemm['int8_share']:.1%} in INT8 "
        f"{gemm['limit_gflops']:.0f} GFLOP/s)"
    )


def _table_of_calls(timings: dict[Any, dict[str, Any]]) -> list[Sequence[str]]:
    """A policy's whole calls by batch: the usual one, the rare ones, and how far apart they are."""
    names = {"p50_ms": "p50", "p99_ms": "p99", "worst_ms": "worst", "jitter_ms": "jitter (p99 - p50)"}
    rows = [(str(batch), *(f"{row[key]:.2f}" for key in names), str(row["calls"])) for batch, row in timings.items()]
    return [("batch", *names.values(), "calls"), *rows]


def _table_of_images(timings: dict[Any, dict[str, Any]], unit: str) -> list[Sequence[str]]:
    """Whole images by batch or by step count (``unit``): seconds, rate, and where the seconds go."""
    rows = [
        (
            str(number),
            f"{found['seconds_a_picture']:.3f}",
            f"{found['pictures_a_second']:.3f}",
            *(f"{value:.3f} s" for value in found["split_s"].values()),
        )
        for number, found in timings.items()
    ]
    return [(unit, "s an image", "images a s", *_split_names(timings)), *rows]


def _table_of_sizes(timings: dict[str, dict[str, Any]]) -> list[Sequence[str]]:
    names = [name for name in next(iter(timings.values())) if name != "tokens"]
    rows = [
        (size, str(found["tokens"]), *(f"{found[name]['p50_ms']:.2f}" for name in names))
        for size, found in timings.items()
    ]
    return [("size", "tokens", *names), *rows]


def _split_names(timings: dict[Any, dict[str, Any]]) -> list[str]:
    return list(next(iter(timings.values()))["split_s"])


def heading_of(report: dict[str, Any]) -> list[str]:
    """Lines that say which model and engine were timed, and on which machine."""
    here = report["environment"]
    made = "x".join(map(str, report["image_size"]))
    if "actions" in report:
        made = f"{report['actions'][0]} actions of {report['actions'][1]} numbers"
    lines = [
        f"{report['model']}, {made}, {report['precision']} on {report['engine']} (verified)",
        f"{here.get('board', here['processor'])}, {here['cores']} cores, threads "
        f"{here['threads'] or 'chosen by the engine'}, {', '.join(f'{k} {v}' for k, v in here['libraries'].items())}",
    ]
    if "jetson" in here:
        clocks = ", ".join(
            f"{name} {clock['now']:g} MHz" for name, clock in here["jetson"].get("clocks_mhz", {}).items()
        )
        lines.append(f"power mode {here['jetson'].get('power_mode', 'unknown')}; {clocks}")
    lines += [f"{gpu['name']}: {gpu['power.limit']}, {gpu['clocks.sm']}" for gpu in here.get("gpus", [])]
    if memory := report["memory_bytes"]:
        lines.append("memory: " + ", ".join(f"{name} {size / 1e6:.0f} MB" for name, size in memory.items()))
    return lines


def text_from_report(report: dict[str, Any]) -> str:
    """The heading and the tables for a terminal."""
    lines = heading_of(report)
    for title, table in tables_of(report).items():
        widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
        lines += ["", title]
        for row in table:
            others = [text.rjust(width) for text, width in zip(row[1:], widths[1:], strict=True)]
            lines.append("  ".join([row[0].ljust(widths[0]), *others]).rstrip())
    return join_lines(lines)


def markdown_from_report(report: dict[str, Any]) -> str:
    """The heading and the tables as a page."""
    lines = [f"# {report['model']} on {report['engine']}", "", *(f"- {line}" for line in heading_of(report))]
    for title, (head, *rows) in tables_of(report).items():
        lines += ["", f"## {title}", "", f"| {' | '.join(head)} |", "|---" + "|---:" * (len(head) - 1) + "|"]
        lines += [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join(lines) + "\n"


def check_plot(path: Path) -> None:
    """Say before the timing that a plot cannot be drawn.

    Raises:
        OutputError: matplotlib is not installed, or the file is of another kind than ``PLOTS``.
    """
    if path.suffix not in PLOTS:
        raise OutputError(f"{path}: plots are {', '.join(PLOTS)}; name such a file")
    try:
        import matplotlib  # noqa: F401  # only to know whether it is installed
    except ImportError as error:
        raise OutputError(
            f"{path}: plots need matplotlib; pip install 'dit-export[report]', or leave out --plot"
        ) from error


def draw_plot(report: dict[str, Any], path: Path) -> None:
    """Draw milliseconds of each part for one image against the batch, and where a whole image's seconds go."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import style

    with style.context("default"):  # not a matplotlibrc of the current folder, which can start LaTeX
        _draw(report, path)


def _draw(report: dict[str, Any], path: Path) -> None:
    from matplotlib import pyplot

    batches = list(report["parts"])
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for name in (name for name in report["parts"][batches[0]] if not name.startswith("conditioner")):
        axes[0].plot(batches, [report["parts"][batch][name]["p50_ms"] / batch for batch in batches], "o-", label=name)
    axes[0].set(xlabel="batch", ylabel="ms an image and call (p50)", ylim=(0, None))
    axes[0].legend()
    if "pictures" in report:
        bottom = [0.0] * len(batches)
        for name in _split_names(report["pictures"]):
            values = [report["pictures"][batch]["split_s"][name] / batch for batch in batches]
            axes[1].bar([str(batch) for batch in batches], values, bottom=bottom, label=name)
            bottom = [low + value for low, value in zip(bottom, values, strict=True)]
        axes[1].set(xlabel="batch", ylabel=f"s an image, {report['steps']} steps")
        axes[1].legend()
    figure.suptitle(f"{report['model']} on {report['engine']}")
    with replace_file(path) as file:
        figure.savefig(file, dpi=150)
    pyplot.close(figure)
