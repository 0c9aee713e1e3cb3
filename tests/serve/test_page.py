"""The server's page, by what a person does with it in a browser."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.browser import CHROMIUM, Page, browser

pytest.importorskip("uvicorn", reason="pip install 'dit-export[serve]'")
pytest.importorskip("starlette")
pytest.importorskip("prometheus_client")

from support.server import TOKEN, Running, expected, pixels
from support.waiting import await_true

pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine; apt install chromium")
SAYS = "document.getElementById('says').textContent"
IMAGES = "[...document.querySelectorAll('#images img')].map((image) => image.src.split(',')[1])"


@pytest.fixture(scope="module")
def running(bundles: dict[str, Path]) -> Iterator[Running]:
    with Running(bundles["fp32"]) as server:
        yield server


@pytest.fixture(scope="module")
def one_page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browser(tmp_path_factory.mktemp("browser")) as page:
        yield page


@pytest.fixture
def page(one_page: Page, running: Running) -> Iterator[Page]:
    one_page.errors.clear()
    one_page.open("about:blank")
    one_page.open(f"http://127.0.0.1:{running.port}/")
    one_page.await_true("document.getElementById('sampler').value")
    yield one_page
    assert one_page.errors == []


def fill(page: Page, **values: object) -> None:
    for name, value in values.items():
        page.run(f"document.getElementById('{name}').value = '{value}'")


def test_a_grid_of_images_is_made(page: Page, bundles: dict[str, Path], tmp_path: Path) -> None:
    """Fails if what the page shows is not what the settings give, or a download is another file."""
    assert page.run("document.getElementById('steps').value") == "50"
    shown = "['model-label', 'token-label'].filter((id) => document.getElementById(id).offsetParent)"
    assert page.run(shown) == []
    page.run("document.getElementById('labels').focus()")
    page.type("3")
    fill(page, count=3, seed=5, steps=4, guidance=2, sampler="dpmpp-2m")
    page.press("Enter", 13)
    page.await_true(f"{SAYS} === '3 images made.'")
    images = expected(bundles, [3] * 3, 5, steps=4, guidance=2.0, sampler="dpmpp-2m")
    for found, image in zip(page.run(IMAGES), images, strict=True):
        assert (pixels(found) == image).all()
    links = page.run("[...document.querySelectorAll('#images a')].map((link) => [link.download, link.href])")
    assert [name for name, _ in links] == ["3_seed5.png", "3_seed6.png", "3_seed7.png"]
    assert [link.split(",")[1] for _, link in links] == page.run(IMAGES)
    assert "labels=3&count=3&seed=5&steps=4&guidance=2&sampler=dpmpp-2m" in page.run("location.hash")
    page.picture(tmp_path / "made.png")


def test_an_image_with_the_next_seed(page: Page, bundles: dict[str, Path]) -> None:
    fill(page, labels=1, count=2, seed=0, steps=2)
    page.run("document.getElementById('make').click()")
    page.await_true(f"{SAYS} === '2 images made.'")
    page.run("document.querySelectorAll('#images button')[1].click()")
    page.await_true(f"{SAYS} === '1 image made.'")
    guidance = float(page.run("document.getElementById('guidance').value"))
    sampler = page.run("document.getElementById('sampler').value")
    images = expected(bundles, [1, 1], [0, 3], steps=2, guidance=guidance, sampler=sampler)
    for found, image in zip(page.run(IMAGES), images, strict=True):
        assert (pixels(found) == image).all()


@pytest.mark.parametrize("how", ["button", "Escape"])
def test_previews_and_stop(page: Page, running: Running, how: str) -> None:
    """Images appear while they are made; stopping ends the server's work too."""
    fill(page, labels=2, count=2, steps=1000, sampler="ddim")
    page.run("document.getElementById('make').click()")
    page.await_true("/step \\d+ of 1000/.test(document.getElementById('images').innerText)")
    assert all(page.run(IMAGES))
    assert page.run("document.getElementById('make').disabled")
    if how == "button":
        page.run("document.getElementById('stop').click()")
    else:
        page.press("Escape", 27)
    page.await_true(f"{SAYS} === 'Stopped.'")
    assert not page.run("document.getElementById('make').disabled")
    await_true(lambda: not running.model.batcher.load().running)


def test_a_wrong_class_is_said(page: Page) -> None:
    fill(page, labels="no such class")
    page.run("document.getElementById('make').click()")
    page.await_true("document.getElementById('says').classList.contains('wrong')")
    assert "label 'no such class'" in page.run(SAYS)
    assert page.run(IMAGES) == []


def test_a_link_has_the_settings(page: Page, running: Running) -> None:
    page.open("about:blank")
    page.open(f"http://127.0.0.1:{running.port}/#labels=7&count=2&seed=9&steps=3&guidance=1.5&sampler=unipc")
    page.await_true("document.getElementById('labels').value === '7'")
    values = page.run(
        "['count', 'seed', 'steps', 'guidance', 'sampler'].map((id) => document.getElementById(id).value)"
    )
    assert values == ["2", "9", "3", "1.5", "unipc"]


def test_a_screen_reader_finds_its_way(page: Page) -> None:
    """Fails for a field, a button or an image without a name, or a message that is not announced."""
    fill(page, labels=1, count=1, steps=1)
    page.run("document.getElementById('make').click()")
    page.await_true(f"{SAYS} === '1 image made.'")
    names = page.names()
    for role in ("textbox", "combobox", "spinbutton", "button", "link", "image", "list"):
        found = [name for each, name in names if each == role]
        assert all(found), (role, found)
    labels = " ".join(name for _, name in names)
    for name in ("Class, name or number", "Steps", "Guidance scale", "Sampler", "Make images", "1, seed 0", "Download"):
        assert name in labels
    assert page.run("document.getElementById('says').getAttribute('aria-live')") == "polite"


def test_a_token_is_asked_for_on_the_page(one_page: Page, bundles: dict[str, Path]) -> None:
    with Running(bundles["fp32"], token=TOKEN) as server:
        one_page.open("about:blank")
        one_page.open(f"http://127.0.0.1:{server.port}/")
        one_page.await_true(f"{SAYS} === 'Enter the token.'")
        for text, says in (("other", "not the one"), (TOKEN, "")):
            one_page.run(f"document.getElementById('token').value = '{text}'")
            one_page.run("document.getElementById('token').dispatchEvent(new Event('change'))")
            one_page.await_true(f"{SAYS}.includes('{says}') && {SAYS} !== 'Enter the token.'")
        one_page.await_true("document.getElementById('steps').value === '50'")


def test_the_page_loads_nothing_from_elsewhere() -> None:
    text = (Path(__file__).parents[2] / "runtime" / "dit_serve" / "page.html").read_text()
    assert not re.findall(r"https?://|src=|@import|url\(", text)
