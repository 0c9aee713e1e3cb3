"""Two kinds of plot as inline SVG: colours come from the page's CSS, so that they follow its light or dark theme."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

WIDTH = 640
ROW = 22
LEFT, RIGHT = 210, 70
PLOT_HEIGHT = 240
MARGIN = 56


def bars(rows: Sequence[tuple[str, float, bool]], limit_label: str) -> str:
    """A horizontal bar per (label, share of its limit, passed), on a logarithmic axis with a line at 1.

    A share of 0 has no bar, an infinite or missing one fills the row.
    """
    finite = [value for _, value, _ in rows if math.isfinite(value) and value > 0]
    low = min(-2.0, math.floor(math.log10(min(finite)))) if finite else -2.0
    high = max(0.5, math.log10(max(finite))) if finite else 0.5
    inner = WIDTH - LEFT - RIGHT

    def across(value: float) -> float:
        if not math.isfinite(value):
            return float(inner)
        return inner * (math.log10(value) - low) / (high - low) if value > 0 else 0.0

    height = ROW * len(rows) + 30
    parts = [_opened(height, "each rung's measured value as a share of its limit")]
    for index, (label, value, passed) in enumerate(rows):
        y, width = 4 + ROW * index, max(0.0, min(across(value), inner))
        share = f"{value:.2%}" if math.isfinite(value) else "not finite"
        parts.append(
            f'<text x="{LEFT - 8}" y="{y + 14}" text-anchor="end">{escape(label)}</text>'
            f'<rect x="{LEFT}" y="{y + 3}" width="{width:.1f}" height="{ROW - 8}" rx="3" '
            f'class="{"good" if passed else "bad"}"><title>{escape(label)}: {share} of its limit</title></rect>'
            f'<text x="{LEFT + width + 6:.1f}" y="{y + 14}" class="quiet">{share}</text>'
        )
    line, bottom = LEFT + across(1.0), ROW * len(rows) + 6
    parts.append(
        f'<line x1="{line:.1f}" y1="0" x2="{line:.1f}" y2="{bottom}" class="limit"/>'
        f'<text x="{line:.1f}" y="{bottom + 16}" text-anchor="middle" class="quiet">{escape(limit_label)}</text>'
    )
    return "".join([*parts, "</svg>"])


def lines(series: Mapping[str, Sequence[float]], x_label: str, y_label: str, limit: float | None = None) -> str:
    """A line per series over 1, 2, …, on a logarithmic axis, with a dashed one at ``limit``.

    Values that are not finite or not above 0 leave a gap.
    """
    values = [value for one in series.values() for value in one if math.isfinite(value) and value > 0]
    values += [limit] if limit else []
    count = max((len(one) for one in series.values()), default=0)
    if not values or not count:
        return f"<p>{escape(y_label)}: nothing to draw</p>"
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    high = max(high, low + 1)
    inner, tall = WIDTH - MARGIN - 16, PLOT_HEIGHT - 64

    def x_of(index: int) -> float:
        return MARGIN + inner * (index / (count - 1) if count > 1 else 0.5)

    def y_of(value: float) -> float:
        return 10 + tall * (high - math.log10(value)) / (high - low)

    parts = [_opened(PLOT_HEIGHT, f"{y_label} against {x_label}")]
    every = max(1, (high - low) // 6)
    for power in range(low, high + 1, every):
        y = y_of(10.0**power)
        parts.append(
            f'<line x1="{MARGIN}" y1="{y:.1f}" x2="{MARGIN + inner}" y2="{y:.1f}" class="grid"/>'
            f'<text x="{MARGIN - 6}" y="{y + 4:.1f}" text-anchor="end" class="quiet">1e{power}</text>'
        )
    for index in sorted({0, count // 2, count - 1}):
        parts.append(
            f'<text x="{x_of(index):.1f}" y="{tall + 28}" text-anchor="middle" class="quiet">{index + 1}</text>'
        )
    parts.append(f'<text x="{MARGIN + inner}" y="{tall + 28}" dy="16" text-anchor="end">{escape(x_label)}</text>')
    if limit:
        y = y_of(limit)
        parts.append(f'<line x1="{MARGIN}" y1="{y:.1f}" x2="{MARGIN + inner}" y2="{y:.1f}" class="limit"/>')
    for number, (name, one) in enumerate(series.items()):
        for run in _runs(one):
            points = " ".join(f"{x_of(index):.1f},{y_of(value):.1f}" for index, value in run)
            parts.append(f'<polyline points="{points}" class="line line{number % 4}"/>')
            parts += [
                f'<circle cx="{x_of(index):.1f}" cy="{y_of(value):.1f}" r="3" class="dot line{number % 4}">'
                f"<title>{escape(name)} {index + 1}: {value:.2e}</title></circle>"
                for index, value in run
            ]
        at = f'x="{MARGIN + 150 * number}" y="{PLOT_HEIGHT - 6}"'
        parts.append(f'<text {at} class="name line{number % 4}">{escape(name)}</text>')
    return "".join([*parts, "</svg>"])


def _runs(values: Sequence[float]) -> list[list[tuple[int, float]]]:
    """Neighbouring drawable values with their positions."""
    runs: list[list[tuple[int, float]]] = [[]]
    for index, value in enumerate(values):
        if math.isfinite(value) and value > 0:
            runs[-1].append((index, value))
        else:
            runs.append([])
    return [run for run in runs if run]


def _opened(height: int, label: str) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(label)}">'
