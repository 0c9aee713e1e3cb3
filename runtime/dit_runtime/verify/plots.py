"""The report's two kinds of plot, drawn by matplotlib as inline SVG. Their axes are logarithmic and say so.

Colours become the variables of the page's style sheet, so that the plots follow the reader's light or dark theme.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from html import escape

from matplotlib import style
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

# The colours that matplotlib draws with, and the style sheet's variable for each.
INK, GRID, GOOD, BAD = "#1a1c1f", "#d9dce0", "#1a7f4b", "#c0322b"
LINES = ("#1f6feb", "#c2570c")
VARIABLES = {INK: "ink", GRID: "grid", GOOD: "good", BAD: "bad", LINES[0]: "line0", LINES[1]: "line1"}

LEAST, MOST = 1e-100, 1e100  # what an axis can hold; float32's numbers end far inside
WIDTH = 6  # inches; the page scales a plot to its own width
LIMIT = "limit"  # the class of the limit's line in the SVG
STYLE = {
    "svg.fonttype": "none",  # text stays text: a reader can search for it, and a screen reader can read it
    "text.parse_math": False,  # a name with a $ is not a formula
    "text.color": INK,
    "font.size": 9,
    "axes.labelcolor": INK,
    "axes.edgecolor": GRID,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
}


def bars(title: str, rows: Sequence[tuple[str, float, bool]]) -> str:
    """The SVG of ``bars_figure``; screen readers read the title."""
    with style.context(["default", STYLE]):  # not a matplotlibrc of the current folder, which can start LaTeX
        return svg_from_figure(bars_figure(rows), title)


def bars_figure(rows: Sequence[tuple[str, float, bool]]) -> Figure:
    """A horizontal bar for each (name, share of its limit, passed), on a logarithmic axis with a line at the limit.

    A share of 0 has no bar; a share that cannot be drawn fills the row. The shares stand to the right of the axes, so
    that no share lies on the limit's line.
    """
    drawn = [share for _, share, _ in rows if _drawable(share)]
    low, high = 10.0 ** math.floor(math.log10(min([1e-2, *drawn]))), max([10**0.5, *drawn])
    figure = Figure(figsize=(WIDTH, 0.24 * len(rows) + 0.9), layout="constrained")
    axes = figure.add_subplot()
    for row, (_, share, passed) in enumerate(rows):
        end = share if _drawable(share) else low if share <= 0 else high
        axes.barh(row, end - low, left=low, height=0.62, color=GOOD if passed else BAD)
        text = share_text(share) if passed else f"{share_text(share)}  FAIL"
        axes.text(1.02, row, text, transform=axes.get_yaxis_transform(), va="center_baseline")
    axes.axvline(1, color=INK, linestyle="--", linewidth=1.2, gid=LIMIT)
    axes.text(1, 1.01, "limit", transform=axes.get_xaxis_transform(), ha="center", va="bottom")
    axes.set(xscale="log", xlim=(low, high), xlabel="share of its limit that a rung uses (logarithmic axis)")
    axes.set_ylim(len(rows) - 0.4, -0.6)  # the first rung on top
    axes.set_yticks(range(len(rows)), [name for name, _, _ in rows])
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_locator(LogLocator(numticks=7))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g} %"))
    axes.xaxis.set_minor_locator(NullLocator())
    return figure


def share_text(share: float) -> str:
    """A share in percent, from 10000 % on as a multiple."""
    if not math.isfinite(share):
        return "not finite"
    return f"{share:.2%}" if share < 100 else f"{share:.3g}×"


def lines(
    title: str,
    series: Mapping[str, Sequence[float]],
    x_label: str,
    y_label: str,
    first: int = 1,
    limit: tuple[str, float] | None = None,
) -> str:
    """The SVG of ``lines_figure``, or an empty text where no value can be drawn; screen readers read the title."""
    if not any(_drawable(value) for values in series.values() for value in values):
        return ""
    with style.context(["default", STYLE]):  # not a matplotlibrc of the current folder, which can start LaTeX
        return svg_from_figure(lines_figure(series, x_label, y_label, first, limit), title)


def lines_figure(
    series: Mapping[str, Sequence[float]],
    x_label: str,
    y_label: str,
    first: int = 1,
    limit: tuple[str, float] | None = None,
) -> Figure:
    """A line for each series by name, on a logarithmic axis, and a dashed one at the limit.

    Values that are not finite or not above 0 leave a gap.

    Args:
        series: the values of each line by its name; at least one value can be drawn.
        x_label: what the values are numbered by.
        y_label: what the values are.
        first: the number of the first value.
        limit: the name and the value of a limit.
    """
    drawn = [value for values in series.values() for value in values if _drawable(value)]
    drawn += [limit[1]] if limit else []
    low, high = math.floor(math.log10(min(drawn))), math.ceil(math.log10(max(drawn)))
    figure = Figure(figsize=(WIDTH, 2.8), layout="constrained")
    axes = figure.add_subplot()
    for (name, values), color in zip(series.items(), LINES, strict=False):
        gaps = [value if _drawable(value) else math.nan for value in values]
        axes.plot(
            range(first, first + len(values)),
            gaps,
            "o-",
            color=color,
            markersize=3,
            linewidth=1.4,
            clip_on=False,
            label=name,
        )
    if limit:
        name, value = limit
        axes.axhline(value, color=INK, linestyle="--", linewidth=1.2, gid=LIMIT, label=f"{name}, {value:g}")
    axes.set(yscale="log", ylim=(10.0**low, 10.0 ** max(high, low + 1)))
    axes.set(xlabel=x_label, ylabel=f"{y_label}\n(logarithmic axis)")
    axes.grid(axis="y")
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high - low < 3 else (1,), numticks=8))
    axes.yaxis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e"))
    )
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False)
    return figure


def svg_from_figure(figure: Figure, title: str) -> str:
    """A figure as an ``<svg>`` element for a page that holds other figures too, each with a title of its own."""
    file = io.StringIO()
    with style.context({"svg.hashsalt": title}):  # shapes of different plots have different names
        figure.savefig(
            file, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
        )
    text = file.getvalue()
    text = text[text.index("<svg") :].replace("<svg ", f'<svg role="img" aria-label="{escape(title)}" ', 1)
    # One page holds many plots: names of groups would not be unique. The limit's line keeps its name as a class.
    text = re.sub(r' id="(figure|axes|patch|line2d|text|legend|matplotlib|[xy]tick|grid)[^"]*"', "", text)
    text = text.replace(f' id="{LIMIT}"', f' class="{LIMIT}"')
    text = re.sub(r" font-family: [^;]*;", "", text)  # the page has a font
    text = re.sub(r">\s+<", "><", text)
    for color, variable in VARIABLES.items():
        text = text.replace(color, f"var(--{variable})")
    return text


def _drawable(value: float) -> bool:
    return LEAST < value < MOST
