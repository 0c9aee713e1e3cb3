"""A verification as one HTML page that needs nothing else: verdict, ladder, errors, images, environment, hashes."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dit_runtime.verify import svg
from dit_runtime.verify.budget import FP16_MAX
from dit_runtime.verify.rung import Rung, Verification

MOST_IMAGES = 8
ENLARGED = 192  # pixels of a small image's side on the page
NAMES = {"error": "this engine", "floor": "PyTorch in this precision"}
# Of difference maps: black, red, yellow, white, as heat.
HEAT = np.array([[0, 0, 0], [170, 0, 0], [255, 200, 0], [255, 255, 255]], np.float64)

STYLE = """
:root{color-scheme:light dark;--ink:#1a1c1f;--quiet:#666c74;--paper:#fff;--panel:#f3f4f6;--good:#1a7f4b;--bad:#c0322b;
--line0:#1f6feb;--line1:#c2570c;--line2:#7a3ff2;--line3:#0f8a8a}
@media(prefers-color-scheme:dark){:root{--ink:#e8eaed;--quiet:#9aa1ab;--paper:#14161a;--panel:#1f2329;--good:#3fb97a;
--bad:#ff6b62;--line0:#6ea8ff;--line1:#ffa05c;--line2:#b493ff;--line3:#4fd0d0}}
*{box-sizing:border-box}body{margin:0 auto;max-width:60rem;padding:1rem;font:16px/1.5 system-ui,sans-serif;
color:var(--ink);background:var(--paper)}h1{font-size:1.4rem;margin:.2rem 0}h2{font-size:1.1rem;margin:2rem 0 .5rem}
.verdict{padding:1rem;border-radius:.6rem;color:#fff;font-size:1.2rem;font-weight:600}.verdict.pass{background:#1a7f4b}
.verdict.fail{background:#b3261e}.verdict small{display:block;font-weight:400;font-size:.95rem}
p,.quiet{color:var(--quiet)}.scroll{overflow-x:auto}table{border-collapse:collapse;width:100%;font-size:.9rem}
th,td{text-align:left;padding:.3rem .6rem;border-bottom:1px solid var(--panel);white-space:nowrap}td.number{
text-align:right;font-variant-numeric:tabular-nums}td.wrap{white-space:normal;overflow-wrap:anywhere;min-width:12rem}
td.pass{color:var(--good)}td.fail{color:var(--bad);font-weight:600}svg{width:100%;height:auto;font-size:12px;display:block}
svg text{fill:var(--ink)}svg text.quiet{fill:var(--quiet)}svg .good{fill:var(--good)}svg .bad{fill:var(--bad)}
svg .limit{stroke:var(--bad);stroke-dasharray:5 4;stroke-width:1.5}svg .grid{stroke:var(--panel)}
svg .line{fill:none;stroke-width:2}svg polyline.line0{stroke:var(--line0)}svg polyline.line1{stroke:var(--line1)}
svg polyline.line2{stroke:var(--line2)}svg polyline.line3{stroke:var(--line3)}svg .line0{fill:var(--line0)}
svg .line1{fill:var(--line1)}svg .line2{fill:var(--line2)}svg .line3{fill:var(--line3)}svg polyline{fill:none!important}
.pictures{display:grid;grid-template-columns:repeat(auto-fill,minmax(17rem,1fr));gap:1rem}figure{margin:0;
background:var(--panel);border-radius:.5rem;padding:.6rem}figure div{display:flex;gap:.3rem}figure img{width:33%;
image-rendering:pixelated;border-radius:.2rem}figcaption{font-size:.85rem;color:var(--quiet)}
details summary{cursor:pointer}code{font-size:.85rem;overflow-wrap:anywhere}
"""


def page(
    verification: Verification,
    environment: Mapping[str, Any],
    files: Mapping[str, str],
    others: Sequence[Verification] = (),
) -> str:
    """The page of a verification.

    Args:
        verification: what to show.
        environment: where it ran.
        files: SHA-256 of each of the bundle's files.
        others: of the bundle's further sizes, which count for the verdict and are not shown.
    """
    rungs = verification.rungs
    failed = [rung.name for rung in rungs if not rung.passed]
    wrong = failed + [
        f"{rung.name} at {other.image_size[0]}×{other.image_size[1]}"
        for other in others
        for rung in other.rungs
        if not rung.passed
    ]
    made = "makes the reference's images" if verification.images else "computes what the reference does, unguided,"
    verdict = f"FAIL: {', '.join(wrong)}" if wrong else f"This engine {made} here"
    quick = "Quick verification, without the conditioner alone and single steps. " if verification.quick else ""
    title = f"{verification.model}, {verification.precision}, on {verification.engine}"
    height, width = verification.image_size
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
        "<meta name='viewport' content='width=device-width,initial-scale=1'>",
        f"<link rel='icon' href='data:,'><title>{escape(title)}</title><style>{STYLE}</style></head><body>",
        f"<h1>{escape(title)}</h1>",
        f"<div class='verdict {'fail' if wrong else 'pass'}'>{escape(verdict)}",
        f"<small>{quick}{len(rungs) - len(failed)} of {len(rungs)} rungs pass, images of {height}×{width}. "
        f"Reference: {escape(verification.reference)}</small></div>",
        "<h2>The ladder: how much of its limit each rung uses</h2>",
        svg.bars([(rung.name, rung.used, rung.passed) for rung in rungs], "limit"),
        _table(
            ("rung", "measured", "limit", "× PyTorch", "limit", "", "where"),
            [
                (
                    rung.name,
                    rung.text(rung.value),
                    rung.text(rung.limit),
                    "" if rung.ratio is None else f"{rung.ratio:.2f}",
                    "" if rung.ratio is None or rung.threshold is None else f"{rung.threshold:.1f}",
                    rung.passed,
                    rung.detail if rung.first_over is None else f"beyond the budget from {rung.first_over}",
                )
                for rung in rungs
            ],
        ),
        "<p>× PyTorch: the engine's error over PyTorch's own in the same precision.</p>",
        *_series(rungs),
        *_magnitudes(verification.magnitudes),
        *_images(verification.images),
        *_facts(verification, environment, files),
        "</body></html>",
    ]
    return "".join(parts)


def _series(rungs: Sequence[Rung]) -> list[str]:
    """Errors along blocks and steps: the engine's beside PyTorch's own."""
    parts: list[str] = []
    for rung in rungs:
        drawn = {name: values for name, values in rung.series.items() if name in NAMES and len(values) > 1}
        if drawn:
            named = {NAMES[name]: values for name, values in drawn.items()}
            parts.append(f"<h2>{escape(rung.name)}: relative L2 error by {escape(rung.axis)}</h2>")
            parts.append(svg.lines(named, rung.axis, "relative L2 error"))
        if len(rung.series.get("magnitude", ())) > 1:
            parts.append(
                f"<h2>{escape(rung.name)}: largest |x| by {escape(rung.axis)}, with FP16's largest number</h2>"
            )
            parts.append(svg.lines({"max |x|": rung.series["magnitude"]}, rung.axis, "max |x|", limit=FP16_MAX))
    return parts


def _magnitudes(magnitudes: Mapping[str, float]) -> list[str]:
    """The reference's largest values, unit by unit."""
    if not magnitudes:
        return []
    rows = [(unit, f"{value:.3g}", f"{FP16_MAX / max(value, 1e-30):.3g}×") for unit, value in magnitudes.items()]
    return [
        "<h2>Largest |x| of the reference, against FP16's range</h2>",
        svg.lines({"max |x|": list(magnitudes.values())}, "unit", "max |x|", limit=FP16_MAX),
        f"<details><summary>{len(rows)} units</summary>{_table(('unit', 'max |x|', 'room'), rows)}</details>",
    ]


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table; True and False are verdicts, the last column may wrap."""

    def cell(value: Any, last: bool) -> str:
        if isinstance(value, bool):
            return f"<td class='{'pass' if value else 'fail'}'>{'pass' if value else 'FAIL'}</td>"
        return f"<td{' class=wrap' if last else ''}>{escape(str(value))}</td>"

    body = "".join(
        f"<tr>{''.join(cell(value, index == len(row) - 1) for index, value in enumerate(row))}</tr>" for row in rows
    )
    return (
        f"<div class='scroll'><table><thead><tr>{''.join(f'<th>{escape(text)}</th>' for text in head)}</tr></thead>"
        f"<tbody>{body}</tbody></table></div>"
    )


def _images(images: tuple[NDArray[np.uint8], NDArray[np.uint8]] | None) -> list[str]:
    """The reference's, the engine's, and where they differ."""
    if images is None or images[0].shape != images[1].shape:
        return []
    figures = []
    for index, (found, expected) in enumerate(zip(*images, strict=True)):
        if index == MOST_IMAGES:
            break
        difference = np.abs(found.astype(int) - expected.astype(int)).max(axis=-1)
        views = {
            "reference": expected,
            "engine": found,
            "difference": heat_map(difference / max(int(difference.max()), 1)),
        }
        tags = "".join(f"<img alt='{name} {index + 1}' src='{_data_url(image)}'>" for name, image in views.items())
        apart = f"{float((difference > 0).mean()):.1%} of pixels differ, by at most {int(difference.max())} of 255"
        figures.append(f"<figure><div>{tags}</div><figcaption>{apart}</figcaption></figure>")
    return [
        "<h2>Images: the reference's, this engine's, their difference</h2>",
        "<p>The brightest point of each difference map is that image's largest difference.</p>",
        f"<div class='pictures'>{''.join(figures)}</div>",
    ]


def heat_map(values: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Values ``[H, W]`` from 0 to 1 as colours ``[H, W, 3]``: black, red, yellow, white."""
    stops = np.linspace(0, 1, len(HEAT))
    channels = [np.interp(values, stops, HEAT[:, channel]) for channel in range(3)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


def _data_url(pixels: NDArray[np.uint8]) -> str:
    image = Image.fromarray(pixels)
    scale = max(1, ENLARGED // max(image.size))
    image = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def _facts(verification: Verification, environment: Mapping[str, Any], files: Mapping[str, str]) -> list[str]:
    """Environment and hashes."""
    hashes = [("bundle", verification.bundle), *files.items()]
    return [
        f"<h2>Where</h2>{_table(('', ''), [(key, _plain(value)) for key, value in environment.items()])}",
        f"<h2>Hashes (SHA-256)</h2><details><summary>{len(hashes)} files</summary>{_table(('', ''), hashes)}</details>",
    ]


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_plain(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_plain(item) for item in value)
    return str(value)
