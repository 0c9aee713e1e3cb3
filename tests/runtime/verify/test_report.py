"""The HTML report: one page that needs nothing else, readable on a phone, light or dark, and sound to a browser."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dit_runtime.verify import svg
from dit_runtime.verify.report import heat_map, page
from dit_runtime.verify.rung import Rung, Verification

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), ""
)
PHONE, DESK = 390, 1100  # CSS pixels


def verification(error: float = 1e-4) -> Verification:
    random = np.random.default_rng(0)
    expected = random.integers(0, 256, (3, 28, 28, 3)).astype(np.uint8)
    found = expected.copy()
    found[1, 5:9, 5:9] ^= 3
    series = {"error": [error * (1 + index) for index in range(12)], "floor": [1e-4] * 12}
    rungs = (
        Rung("blocks", error, 1e-3, "relative", "worst: block 11", 3.0, 2.0, "block 7", {}, "block", series),
        Rung("ddim free-running", float("inf"), 1e-3, "relative", "not finite <b>", None, None, None, {}, "step", {}),
        Rung("image PSNR", 60.0, 40.0, "dB"),
        Rung("image is not constant", 1.0, 1.0, "share"),
    )
    magnitudes = {f"blocks.{index}.mlp": 10.0 ** (index / 3) for index in range(12)}
    return Verification(
        "d" * 64, "DiT <tiny>", "fp16", "diffusers & its loop", "an engine", (28, 28), False, rungs, (found, expected),
        magnitudes,
    )  # fmt: skip


def written(folder: Path, text: str) -> Path:
    file = folder / "report.html"
    file.write_text(text, encoding="utf-8")
    return file


def example() -> str:
    environment = {"processor": "x", "libraries": {"numpy": "2"}, "cpu_flags": ["a", "b"]}
    return page(verification(), environment, {"graphs/step.onnx": "0" * 64})


def opened(file: Path, *options: str) -> tuple[str, str]:
    """The page's DOM after its load, and what the browser's console said."""
    if not CHROMIUM:
        pytest.skip("no Chromium on this machine; apt install chromium")
    profile = file.parent / "profile"
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--enable-logging=stderr",
    ]
    command += [f"--user-data-dir={profile}", *options, file.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    console = "\n".join(line for line in done.stderr.splitlines() if ":CONSOLE" in line)
    return done.stdout, console


def test_a_browser_has_nothing_to_complain_of(tmp_path: Path) -> None:
    """Headless Chromium logs nothing to its console, and fits the page to a phone and to a desk."""
    for width in (PHONE, DESK):
        (tmp_path / "inner.html").write_text(example(), encoding="utf-8")
        # A frame of that width (a headless window cannot be as narrow), which tells its content's width by the title.
        told = "document.title=this.contentDocument.documentElement.scrollWidth"
        frame = f'<html><iframe src="inner.html" width="{width}" height="900" frameborder="0" onload="{told}"></iframe>'
        dom, console = opened(written(tmp_path, frame), "--allow-file-access-from-files", "--dump-dom")
        assert console == ""
        taken = re.search(r"<title>(\d+)</title>", dom)
        assert taken is not None
        assert int(taken[1]) <= width


def test_a_console_error_is_seen(tmp_path: Path) -> None:
    """The check above can fail: a script's error and a missing file both show."""
    broken = example().replace("</body>", "<img src='gone.png'><script>nothing()</script></body>")
    _, console = opened(written(tmp_path, broken), "--dump-dom")
    assert "nothing is not defined" in console


def test_light_and_dark(tmp_path: Path) -> None:
    """The page's paper follows the reader's theme."""
    brightness = {}
    for theme, option in (("light", "1"), ("dark", "0")):
        shot = tmp_path / f"{theme}.png"
        opened(
            written(tmp_path, example()),
            f"--screenshot={shot}", "--window-size=800,600", f"--blink-settings=preferredColorScheme={option}",
        )  # fmt: skip
        brightness[theme] = np.asarray(Image.open(shot).convert("L"))[-5:, :5].mean()
    assert brightness["light"] > 240
    assert brightness["dark"] < 40


class _Resources(HTMLParser):
    """What a page would fetch, and its text."""

    def __init__(self) -> None:
        super().__init__()
        self.wanted: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.wanted += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_needs_nothing_else() -> None:
    """Every image is inside, names from a bundle are text and not markup, and the hidden numbers are there."""
    parser = _Resources()
    parser.feed(example())
    assert parser.wanted
    assert all(value.startswith("data:") for value in parser.wanted)
    assert "@import" not in example()
    assert "url(" not in example()
    assert "DiT <tiny>" in parser.text
    assert "not finite <b>" in parser.text
    assert "beyond the budget from block 7" in parser.text
    assert "FAIL: blocks, ddim free-running" in parser.text
    assert "2.0% of pixels differ, by at most 3 of 255" in parser.text
    assert "0" * 64 in parser.text


def test_without_images_the_verdict_claims_none() -> None:
    """An engine without guidance makes none of the recorded images, which are guided."""
    passing = tuple(rung for rung in verification().rungs if rung.passed)
    text = page(replace(verification(), rungs=passing, images=None), {}, {})
    assert "computes what the reference does, unguided, here" in text
    assert "makes the reference's images" not in text


def test_plots_survive_any_numbers() -> None:
    """Zeros, infinities and empty series make a plot with gaps, never an error or a NaN in a coordinate."""
    rows = [("zero", 0.0, True), ("infinite", float("inf"), False), ("nan", float("nan"), False), ("half", 0.5, True)]
    drawings = [
        svg.bars(rows, "limit"),
        svg.bars([], "limit"),
        svg.lines({"a": [1e-3, 0.0, float("nan"), 2e-3], "b": []}, "step", "error", 1e-2),
        svg.lines({"a": [float("inf")]}, "step", "error"),
        svg.lines({"a": [3.0]}, "step", "error"),
    ]
    for drawing in drawings:
        assert "nan" not in re.sub(r">[^<]*<", "><", drawing).lower()
        assert not re.search(r'="-?inf"', drawing)
    assert drawings[2].count("<circle") == 2


def test_heat_runs_from_black_to_white() -> None:
    """0 is black, 1 white, and more difference is brighter."""
    colours = heat_map(np.linspace(0, 1, 7)[None])[0].astype(int)
    assert colours[0].tolist() == [0, 0, 0]
    assert colours[-1].tolist() == [255, 255, 255]
    assert (np.diff(colours.sum(axis=1)) > 0).all()


def test_chromium_is_there_in_ci() -> None:
    """CI installs a browser, so that the checks above are not skipped where they count."""
    assert CHROMIUM or os.environ.get("CI") != "true"
