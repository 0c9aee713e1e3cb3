"""The results of ``dit-verify`` as one HTML page that fetches nothing: verdict, ladder, errors, images, hashes.

The page's text is ``report.html.jinja``. jinja2 and matplotlib are the extra ``report``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import jinja2
import numpy as np
from numpy.typing import NDArray

from dit_runtime.verify import plots
from dit_runtime.verify.budget import FP16_MAX
from dit_runtime.verify.coverage import format_coverage
from dit_runtime.verify.results import Results, png_from_pixels
from dit_runtime.verify.rung import Rung

TEMPLATE = "report.html.jinja"
NAMES = {"error": "this engine", "floor": "PyTorch in this precision"}
FIRST = {"block": 0}  # blocks count from 0, as a rung's text does; all else counts from 1
LADDER = "The ladder: how much of its limit each rung uses"
LIMIT = ("FP16's largest number", FP16_MAX)
# The colours of difference maps: black, red, yellow, white, as heat.
HEAT = np.array([[0, 0, 0], [170, 0, 0], [255, 200, 0], [255, 255, 255]], np.float64)


@dataclass(frozen=True)
class Plot:
    """A plot with its numbers.

    Attributes:
        title: what the plot shows.
        svg: the drawing; empty where no number can be drawn.
        head: the columns of the table of numbers.
        rows: the table's rows.
    """

    title: str
    svg: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Figure:
    """One image as the page shows it: the views by name, each a PNG file in base64, and how far they are apart."""

    views: Mapping[str, str]
    caption: str


def page(results: Results) -> str:
    """The HTML page of verification results."""
    found = results.verification
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(files(__package__).joinpath(TEMPLATE).read_text(encoding="utf-8"))
    sizes = [f"{height}×{width}" for height, width in results.image_sizes]
    return template.render(
        found=found,
        sizes=sizes,
        made=f"{results.image_sizes[0][1]} actions at once" if found.actions else f"images of {', '.join(sizes)}",
        failed=[rung.name for rung in found.rungs if not rung.passed],
        coverage=format_coverage(found.coverage),
        ladder_title=LADDER,
        ladder=plots.bars(LADDER, [(rung.name, rung.used, rung.passed) for rung in found.rungs]),
        series=[plot for rung in found.rungs for plot in plots_of_rung(rung)],
        magnitudes=plot_of_magnitudes(found.magnitudes),
        figures=[] if found.images is None else [figure_of(*pair) for pair in zip(*found.images, strict=True)],
        environment={name: text_of(value) for name, value in results.environment.items()},
        hashes={"bundle": found.bundle, **results.files},
    )


def plots_of_rung(rung: Rung) -> Iterator[Plot]:
    """A rung's errors along its axis beside PyTorch's own errors, and its largest values against FP16's range."""
    first = FIRST.get(rung.axis, 1)
    errors = {NAMES[name]: values for name, values in rung.series.items() if name in NAMES and len(values) > 1}
    if errors:
        title = f"{rung.name}: relative L2 error by {rung.axis}"
        svg = plots.lines(title, errors, rung.axis, "relative L2 error", first)
        yield Plot(title, svg, *numbers_of(errors, rung.axis, first))
    if len(rung.series.get("magnitude", ())) > 1:
        title = f"{rung.name}: largest |x| by {rung.axis}, against FP16's range"
        largest = {"max |x|": rung.series["magnitude"]}
        svg = plots.lines(title, largest, rung.axis, "max |x|", first, LIMIT)
        yield Plot(title, svg, *numbers_of(largest, rung.axis, first))


def numbers_of(
    series: Mapping[str, Sequence[float]], axis: str, first: int
) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    """The columns and the rows of a table of series, which may be of different lengths."""
    longest = max(len(values) for values in series.values())
    rows = tuple(
        (str(first + index), *(f"{values[index]:.2e}" if index < len(values) else "" for values in series.values()))
        for index in range(longest)
    )
    return (axis, *series), rows


def plot_of_magnitudes(magnitudes: Mapping[str, float]) -> Plot | None:
    """The reference's largest values, unit by unit; None where the bundle has none."""
    if not magnitudes:
        return None
    title = "Largest |x| of the reference, against FP16's range"
    svg = plots.lines(title, {"max |x|": list(magnitudes.values())}, "unit", "max |x|", limit=LIMIT)
    rows = tuple((unit, f"{value:.3g}", f"{FP16_MAX / max(value, 1e-30):.3g}×") for unit, value in magnitudes.items())
    return Plot(title, svg, ("unit", "max |x|", "room"), rows)


def figure_of(found: NDArray[np.uint8], expected: NDArray[np.uint8]) -> Figure:
    """The engine's image and the reference's, uint8 ``[H, W, 3]``, with the map of their difference."""
    difference = np.abs(found.astype(int) - expected.astype(int)).max(axis=-1)
    largest = int(difference.max())
    views = {"reference": expected, "engine": found, "difference": heat_map(difference / max(largest, 1))}
    return Figure(
        views={name: png_from_pixels(pixels) for name, pixels in views.items()},
        caption=f"{float((difference > 0).mean()):.1%} of pixels differ, by at most {largest} of 255",
    )


def heat_map(values: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Values ``[H, W]`` from 0 to 1 as colours ``[H, W, 3]``: black, red, yellow, white."""
    stops = np.linspace(0, 1, len(HEAT))
    channels = [np.interp(values, stops, HEAT[:, channel]) for channel in range(3)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


def text_of(value: Any) -> str:
    """A JSON value in one line for people."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {text_of(item)}" for name, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(text_of(item) for item in value)
    return str(value)
