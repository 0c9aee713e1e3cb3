"""The HTML report: made from the results' JSON anywhere, readable on a phone, light or dark, and sound to a browser."""

from __future__ import annotations

import copy
import functools
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.browser import CHROMIUM

from dit_runtime.commands.verify import main
from dit_runtime.core.decode import DecodeError, decode
from dit_runtime.core.errors import ResultsError
from dit_runtime.verify.results import KEPT_IMAGES, Results
from dit_runtime.verify.results_reader import ResultsRecord, read_results, results_from_record
from dit_runtime.verify.rung import Rung, Verification

pytest.importorskip("jinja2", reason="the extra report is not installed")
pytest.importorskip("matplotlib", reason="the extra report is not installed")

from matplotlib import style
from matplotlib.figure import Figure
from matplotlib.text import Text

from dit_runtime.verify import plots
from dit_runtime.verify.report import heat_map, page

PHONE, DESK = 390, 1100  # CSS pixels
LADDER = [
    ("zero", 0.0, True),
    ("infinite", float("inf"), False),
    ("nan", float("nan"), False),
    ("tiny", 1e-9, True),
    ("half", 0.5, True),
    ("close", 0.97, True),
    ("at", 1.0, True),
    ("beyond", 1.01, False),
    ("far beyond", 3e9, False),
    ("absurd", 1e305, False),
]


def example_results(error: float = 1e-4) -> Results:
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
    verification = Verification(
        "d" * 64, "DiT <tiny>", "fp16", "diffusers & its loop", "an engine", (28, 28), False, rungs, (found, expected),
        magnitudes,
    )  # fmt: skip
    environment = {"processor": "x", "libraries": {"numpy": "2"}, "cpu_flags": ["a", "b"]}
    return Results(verification, ((28, 28),), {"system": "Linux"}, environment, {"graphs/step.onnx": "0" * 64})


def example_json() -> Any:
    return json.loads(json.dumps(example_results().as_json(), allow_nan=False))


def results_from_json(document: Any) -> Results:
    return results_from_record(decode(ResultsRecord, document))


@functools.cache
def example() -> str:
    return page(example_results())


def write_page(folder: Path, text: str) -> Path:
    file = folder / "report.html"
    file.write_text(text, encoding="utf-8")
    return file


def test_the_json_holds_all_that_the_page_shows() -> None:
    """The page of results that were printed and read again is the same page, byte for byte."""
    results = example_results()
    assert page(results_from_json(example_json())) == page(results)
    found = results.verification
    assert found.images is not None
    many = tuple(np.repeat(side, 5, axis=0)[:KEPT_IMAGES] for side in found.images)
    again = replace(results, verification=replace(found, images=(many[0], many[1])))
    images = results_from_json(again.as_json()).verification.images
    assert images is not None
    assert np.array_equal(images[0], many[0])
    assert np.array_equal(images[1], many[1])


def test_each_machine_needs_its_own_packages_only(bundles: dict[str, Path], tmp_path: Path) -> None:
    """A device without jinja2, matplotlib and Polygraphy prints the JSON; a machine without a backend, the bundle and
    the exporter makes the page."""
    results, report = tmp_path / "results.json", tmp_path / "report.html"
    code = "import sys; sys.modules.update(dict.fromkeys({!r})); from dit_runtime.commands.verify import main; main()"
    device = ("torch", "onnx", "jinja2", "markupsafe", "matplotlib", "polygraphy", "dit_export", "dit_engines")
    desk = ("torch", "onnx", "onnxruntime", "openvino", "tensorrt", "cuda", "dit_export", "dit_engines")
    command = [
        sys.executable,
        "-c",
        code.format(device),
        bundles["fp32"],
        "--engine",
        "onnxruntime",
        "--quick",
        "--json",
    ]
    with results.open("wb") as file:
        subprocess.run(command, stdout=file, check=True)
    command = [sys.executable, "-c", code.format(desk), "--report", report, "--from", results]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == done.stderr == ""
    text, raw = report.read_text(encoding="utf-8"), json.loads(results.read_bytes())
    assert raw["passed"] is True
    assert all(rung["name"] in text for rung in raw["rungs"])
    assert len(raw["images"]) == 4
    assert all(image["engine"] in text and image["reference"] in text for image in raw["images"])
    assert all(digest in text for digest in raw["files"].values())
    assert "Quick verification" in text


def one_line_of(argv: list[str | Path], capsys: pytest.CaptureFixture[str]) -> str:
    """What a refused command says: one line on stderr, exit code 1."""
    with pytest.raises(SystemExit) as exit_info:
        main([str(item) for item in argv])
    out, err = capsys.readouterr()
    assert exit_info.value.code == 1
    assert out == ""
    assert err.count("\n") == 1
    return err


@pytest.mark.parametrize(
    ("argv", "missing", "message"),
    [
        (["B", "--report", "x.html"], "jinja2", "--report needs jinja2; pip install 'dit-export[report]'"),
        (["--from", "R", "--report", "x.html"], "matplotlib", "--report needs matplotlib; pip install"),
        (
            ["B", "--polygraphy", "x"],
            "polygraphy",
            "--polygraphy needs polygraphy; pip install 'dit-export[polygraphy]'",
        ),
    ],
)
def test_a_missing_extra_is_one_line(
    argv: list[str],
    missing: str,
    message: str,
    bundles: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Without the extra the command names the pip command before it verifies, and writes nothing."""
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "R").write_text(json.dumps(example_json()))
    paths = {"B": str(bundles["fp32"])}
    assert message in one_line_of([paths.get(item, item) for item in argv], capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["R"]


def test_arguments_that_do_not_fit_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The page comes from a bundle or from results: one of the two is named, and nothing that would have no effect."""
    file = tmp_path / "results.json"
    alone = "--from takes --report FILE and nothing else"
    assert alone in one_line_of(["--from", file], capsys)
    assert alone in one_line_of(["my.bundle", "--from", file, "--report", "x.html"], capsys)
    assert alone in one_line_of(["--json", "--from", file, "--report", "x.html"], capsys)
    assert "the following arguments are required: bundle" in one_line_of(["--report", "x.html"], capsys)


def altered(value: Any, path: tuple[str | int, ...], change: Any) -> Any:
    """A copy of a JSON document in which the value at a path is changed; without it where ``change`` is ``...``."""
    document = copy.deepcopy(value)
    inner = document
    for step in path[:-1]:
        inner = inner[step]
    if change is ...:
        del inner[path[-1]]
    else:
        inner[path[-1]] = change
    return document


def paths_of(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """The path of every value in a JSON document."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from paths_of(item, (*path, key))


@pytest.mark.parametrize(
    ("path", "change", "message"),
    [
        (("rungs", 0, "limit"), ..., "rungs[0].limit: missing, expected a finite number or"),
        (("images",), ..., "images: missing, expected a list"),
        (("rungs", 0, "limit"), "small", "rungs[0].limit: got 'small', expected a finite number or"),
        (("rungs", 2, "value"), True, "rungs[2].value: got True, expected a finite number or"),
        (("rungs", 0, "series", "error", 3), None, "rungs[0].series.error[3]: got None, expected a finite number or"),
        (("quick",), 0, "quick: got 0, expected true or false"),
        (("image_size",), [28], "image_size: got [28], expected a list of 2"),
        (("rungs",), [], "rungs: got an empty list, expected a rung at least"),
        (("images", 0, "engine"), "AAAA", "images[0].engine: got a damaged image, expected a PNG file in base64"),
        (("rungs", 0, "passed"), True, "rungs[0].passed: got True, expected False, which the numbers come to"),
        (("passed",), True, "passed: got True, expected False, which the numbers come to"),
        (("torch",), "2.13", "torch: unknown, expected only bundle, model,"),
    ],
)
def test_damaged_results_are_one_line(
    path: tuple[str | int, ...], change: Any, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file that was cut, edited or made by something else says what is wrong in it and what to do, and no page is
    written that might say "pass" for it."""
    file, report = tmp_path / "results.json", tmp_path / "x.html"
    file.write_text(json.dumps(altered(example_json(), path, change)))
    line = one_line_of(["--report", report, "--from", file], capsys)
    assert line.startswith(f"dit-verify: {file}: {message}")
    assert line.endswith("; make the file with dit-verify BUNDLE --json > FILE\n")
    assert not report.exists()


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n", b"[1, 2", b"[" * 100_000, b"[1]", b"1" * 5000])
def test_a_file_of_something_else(content: bytes, tmp_path: Path) -> None:
    """Whatever the bytes are, the error is the tool's own."""
    file = tmp_path / "results.json"
    file.write_bytes(content)
    with pytest.raises(
        ResultsError, match=r"(not JSON: |got \[1\], expected an object).*; make the file with dit-verify"
    ):
        read_results(file)
    with pytest.raises(ResultsError, match="cannot be read"):
        read_results(tmp_path / "none.json")


def test_no_change_of_the_results_is_a_crash() -> None:
    """Every value of the document, in turn missing or replaced, is read or refused in one line; of the documents that
    are read, every hundredth makes a page."""
    document = example_json()
    document["images"], document["magnitudes"] = document["images"][:1], {"a": 1.0, "b": 2.0}
    document["rungs"][0]["series"] = {"error": [1.0, 2.0], "floor": [1.0, 2.0], "magnitude": [1.0, 2.0]}
    changes: tuple[Any, ...] = (..., None, True, -1, 1e308, -1e308, 5e-324, "x", "nan", "inf", [], {}, [None], {"a": 1})
    refused: list[str] = []
    accepted = 0
    for path in paths_of(document):
        for change in changes:
            try:
                results = results_from_json(altered(document, path, change))
            except DecodeError as error:
                refused.append(str(error))
            else:
                accepted += 1
                if accepted % 100 == 0:
                    page(results)
    assert accepted > 100
    assert len(refused) > 100
    assert not [message for message in refused if "\n" in message]


def open_page(file: Path, *options: str) -> tuple[str, str]:
    """The page's DOM after it was loaded, and what the browser's console says."""
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


@pytest.mark.slow
def test_a_browser_has_nothing_to_complain_of(tmp_path: Path) -> None:
    """Headless Chromium logs nothing to its console, and fits the page to a phone and to a desk."""
    for width in (PHONE, DESK):
        (tmp_path / "inner.html").write_text(example(), encoding="utf-8")
        # A frame of that width (a headless window cannot be as narrow); the title carries its content's width.
        measured = "document.title=this.contentDocument.documentElement.scrollWidth"
        frame = (
            f'<html><iframe src="inner.html" width="{width}" height="900" frameborder="0" onload="{measured}"></iframe>'
        )
        dom, console = open_page(write_page(tmp_path, frame), "--allow-file-access-from-files", "--dump-dom")
        assert console == ""
        taken = re.search(r"<title>(\d+)</title>", dom)
        assert taken is not None
        assert int(taken[1]) <= width


@pytest.mark.slow
def test_a_console_error_is_seen(tmp_path: Path) -> None:
    """The check above can fail: a script's error and a missing file both show."""
    broken = example().replace("</body>", "<img src='gone.png'><script>nothing()</script></body>")
    _, console = open_page(write_page(tmp_path, broken), "--dump-dom")
    assert "nothing is not defined" in console


@pytest.mark.slow
def test_light_and_dark(tmp_path: Path) -> None:
    """The page's paper follows the reader's theme, and so does the plots' text."""
    brightness, ink = {}, {}
    for theme, option in (("light", "1"), ("dark", "0")):
        shot = tmp_path / f"{theme}.png"
        scheme = f"--blink-settings=preferredColorScheme={option}"
        script = "<script>document.title=getComputedStyle(document.querySelector('svg text')).fill</script></body>"
        file = write_page(tmp_path, example().replace("</body>", script))
        open_page(file, f"--screenshot={shot}", "--window-size=800,600", scheme)
        brightness[theme] = np.asarray(Image.open(shot).convert("L"))[-5:, :5].mean()
        dom, _ = open_page(file, "--dump-dom", scheme)
        found = re.search(r"<title>rgb\((\d+), (\d+), (\d+)\)</title>", dom)
        assert found is not None
        ink[theme] = np.mean([int(channel) for channel in found.groups()])
    assert brightness["light"] > 240
    assert brightness["dark"] < 40
    assert ink["light"] < 60
    assert ink["dark"] > 200


@pytest.mark.slow
def test_no_label_lies_on_the_limit_in_a_browser(tmp_path: Path) -> None:
    """The browser's fonts are not those that matplotlib measured: no text of a plot touches the line of its limit."""
    script = """<script>
    let over = [], seen = 0;
    for (const svg of document.querySelectorAll('svg')) for (const line of svg.querySelectorAll('.limit')) {
      const limit = line.getBoundingClientRect(); seen += 1;
      for (const text of svg.querySelectorAll('text')) {
        const box = text.getBoundingClientRect();
        if (box.left < limit.right && limit.left < box.right && box.top < limit.bottom && limit.top < box.bottom)
          over.push(text.textContent);
      }
    }
    document.title = seen + ' lines: ' + over.join(', ');
    </script></body>"""
    ladder = (
        f"<html><head><title></title></head><body style='font-family:serif'>{plots.bars('x', LADDER)}</body></html>"
    )
    for text, lines in ((example(), 2), (ladder, 1)):
        dom, _ = open_page(write_page(tmp_path, text.replace("</body>", script)), "--dump-dom")
        assert f"<title>{lines} lines: </title>" in dom


def texts_on_the_limit(figure: Figure) -> list[str]:
    """The texts of a figure that touch the line of its limit, as matplotlib lays them out."""
    figure.draw_without_rendering()
    (axes,) = figure.axes
    (line,) = (line for line in axes.lines if line.get_gid() == plots.LIMIT)
    limit = line.get_window_extent()
    texts = [text for text in figure.findobj(Text) if isinstance(text, Text) and text.get_text()]
    assert len(texts) > 5
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts]
    return [
        text
        for text, box in boxes
        if box.x0 < limit.x1 + 1 and limit.x0 - 1 < box.x1 and box.y0 < limit.y1 and limit.y0 < box.y1
    ]


def test_no_label_lies_on_the_limit() -> None:
    """Whatever the shares are, above all those just below and at the limit, no text touches the limit's line; and this
    check can fail."""
    for rows in (LADDER, LADDER[4:8], [("a rung with a very long name at 256x384", 0.9, True)]):
        with style.context(plots.STYLE):
            figure = plots.bars_figure(rows)
            assert texts_on_the_limit(figure) == []
            figure.axes[0].text(0.8, 0, "97.00%")
            assert texts_on_the_limit(figure) == ["97.00%"]
    with style.context(plots.STYLE):
        assert (
            texts_on_the_limit(plots.lines_figure({"max |x|": [1.0, 65000.0]}, "unit", "max |x|", 1, ("most", 65504)))
            == []
        )


def test_axes_say_what_they_are() -> None:
    """Every plot of the page names its axes, and says that an axis is logarithmic."""
    text = example()
    plots_of_page = re.findall(r"<svg .*?</svg>", text, re.DOTALL)
    assert len(plots_of_page) == 3
    assert "share of its limit that a rung uses (logarithmic axis)" in plots_of_page[0]
    assert all("logarithmic axis" in svg for svg in plots_of_page)
    for svg, labels in ((plots_of_page[1], ("block", "relative L2 error")), (plots_of_page[2], ("unit", "max |x|"))):
        assert all(f">{label}<" in svg for label in labels)
    assert re.findall(r">(\d+)<", plots_of_page[1])[0] == "0"  # the first block is block 0, as in "block 7"


class _Resources(HTMLParser):
    """What a page would fetch, and its text."""

    def __init__(self) -> None:
        super().__init__()
        self.wanted: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.wanted += [value or "" for name, value in attrs if name.rpartition(":")[2] in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_needs_nothing_else() -> None:
    """Every image is inside, names from a bundle are text and not markup, and the hidden numbers are there."""
    parser = _Resources()
    parser.feed(example())
    assert any(value.startswith("data:image/png") for value in parser.wanted)
    assert all(value.startswith(("data:", "#")) for value in parser.wanted)
    assert "@import" not in example()
    assert set(re.findall(r"url\((.)", example())) <= {"#"}
    assert "DiT <tiny>" in parser.text
    assert "not finite <b>" in parser.text
    assert "beyond the budget from block 7" in parser.text
    assert "FAIL: blocks, ddim free-running" in parser.text
    assert "2.0% of pixels differ, by at most 3 of 255" in parser.text
    assert "0" * 64 in parser.text
    assert "1.20e-03" in parser.text  # the last block's error


def test_without_images_the_verdict_claims_none() -> None:
    """An engine without guidance makes none of the recorded images, which are guided."""
    results = example_results()
    passing = tuple(rung for rung in results.verification.rungs if rung.passed)
    text = page(replace(results, verification=replace(results.verification, rungs=passing, images=None)))
    assert "computes what the reference does, unguided, here" in text
    assert "makes the reference's images" not in text


@pytest.mark.parametrize(("guidance", "words"), [(1.0, "unguided"), (1.5, "up to guidance 1.5")])
def test_a_policys_page_is_of_actions(guidance: float, words: str) -> None:
    """The verdict says what was compared, as the command's line does."""
    results = example_results()
    rungs = tuple(rung for rung in results.verification.rungs if rung.passed)
    verification = replace(results.verification, images=None, rungs=rungs, guidance=guidance, actions=True)
    document = replace(results, verification=verification, image_sizes=((1, 8),)).as_json()
    text = page(results_from_json(json.loads(json.dumps(document))))
    assert f"This engine computes the reference's actions, {words}, here" in unescape(text)
    assert "rungs pass, 8 actions at once." in text
    assert "images of" not in text


def test_plots_survive_any_numbers() -> None:
    """Zeros, infinities and empty series make a plot with gaps, never an error or a NaN in a coordinate."""
    drawings = [
        plots.bars("a", LADDER),
        plots.bars("b", []),
        plots.lines("c", {"a": [1e-3, 0.0, float("nan"), 2e-3], "b": []}, "step", "error", 1, ("most", 1e-2)),
        plots.lines("d", {"a": [3.0]}, "step", "error"),
        plots.lines("e", {"a": [5e-324, 1e-99, 1e99, 1.7e308]}, "step", "error"),
        plots.lines("$\\frac", {"$x": [1.0, 2.0]}, "$", "<b>"),
    ]
    for drawing in drawings:
        assert drawing.startswith("<svg role=")
        assert not re.search(r"[\" ]-?(nan|inf)\b", re.sub(r">[^<]*<", "><", drawing).lower())
    assert len(re.findall("<use[^>]*--line0", drawings[2])) == 3  # two points and the legend's
    assert "<b>" not in drawings[5]
    assert plots.lines("f", {"a": [float("inf")]}, "step", "error") == ""


def test_a_matplotlibrc_of_the_current_folder_has_no_part_in_plots() -> None:
    """Fails by starting LaTeX: a bundle that is the current folder may hold such a file."""
    before = plots.bars("a", LADDER)
    with style.context({"text.usetex": True, "axes.linewidth": 40}):
        assert plots.bars("a", LADDER) == before


def test_heat_runs_from_black_to_white() -> None:
    """0 is black, 1 white, and more difference is brighter."""
    colours = heat_map(np.linspace(0, 1, 7)[None])[0].astype(int)
    assert colours[0].tolist() == [0, 0, 0]
    assert colours[-1].tolist() == [255, 255, 255]
    assert (np.diff(colours.sum(axis=1)) > 0).all()


@pytest.mark.slow
def test_chromium_is_there_in_ci() -> None:
    """CI installs a browser, so that the checks above are not skipped where they count."""
    assert CHROMIUM or os.environ.get("CI") != "true"
