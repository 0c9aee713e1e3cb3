"""Decoding in tiles: where they lie, how they are blended, and how near the image is to the one decoded whole.

Where a decoder looks at single pixels only, tiles must give the whole's image itself. A real one's group
normalization and attention see one tile only: how much that changes is measured on the committed Fashion-MNIST
autoencoder, on the latents of a sheet of images, and on a random one, on noise.
"""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from support.optional import diffusers, torch
from support.sample_command import dit_sample, made, pixels, record, refused, shapes, with_record

from dit_runtime import Pipeline
from dit_runtime.core.errors import SamplingError
from dit_runtime.sampling.tiles import (
    check_tile,
    decode_in_tiles,
    starts_of_tiles,
    weights_of_tiles,
)
from dit_runtime.sampling.tiles import images_from_decoded as rounded
from dit_runtime.verify.metrics import psnr

FASHION = Path(__file__).parents[3] / "benchmarks" / "fashion_mnist"
# Difference to the whole decoding across tile borders over that everywhere else: 1 is a border that nothing shows.
SEAM_LIMIT = 1.35  # measured: 0.70 to 1.21
HARD_SEAM = 1.3  # times as much without blending: the measure sees seams; measured: 1.4 to 10
SUM_LIMIT = 1e-6  # measured: 1.2e-7

Decode = Callable[[np.ndarray], np.ndarray]


@given(size=st.integers(1, 300), tile=st.integers(4, 300))
@settings(max_examples=300, deadline=None)
def test_tiles_cover_a_side_evenly(size: int, tile: int) -> None:
    """Fails if a tile leaves the image, the last ends elsewhere, or two share less than a quarter or differ much."""
    starts = starts_of_tiles(size, tile)
    if tile >= size:
        assert starts == [0]
        return
    assert (starts[0], starts[-1]) == (0, size - tile)
    gaps = np.diff(starts)
    assert gaps.min() >= 1
    assert gaps.max() - gaps.min() <= 1
    assert 4 * (tile - gaps.max()) >= tile
    if len(starts) > 2:  # one tile fewer would share less than a quarter
        assert 4 * (tile - -(-(size - tile) // (len(gaps) - 1))) < tile


@given(size=st.integers(1, 120), tile=st.integers(4, 120), factor=st.sampled_from([1, 4, 8]))
@settings(max_examples=150, deadline=None)
def test_weights_fade_linearly(size: int, tile: int, factor: int) -> None:
    """Fails if weights do not sum to 1, reach beyond their tile, or do not fade evenly from one tile to the next."""
    starts, weights = starts_of_tiles(size, tile), weights_of_tiles(size, tile, factor)
    length = min(tile, size) * factor
    assert weights.shape == (len(starts), size * factor)
    assert weights.dtype == np.float32
    assert np.abs(weights.sum(axis=0) - 1).max() <= SUM_LIMIT
    for start, row in zip(starts, weights, strict=True):
        inside = slice(start * factor, start * factor + length)
        assert (row[inside] > 0).all()
        assert row.sum() == pytest.approx(row[inside].sum())
    if len(starts) == 2 and 2 * (length - starts[1] * factor) <= length:
        fade = weights[1, starts[1] * factor : length]
        assert np.diff(fade) == pytest.approx(1 / len(fade), abs=1e-5)
        assert fade[0] == pytest.approx(0.5 / len(fade), abs=1e-5)


def local(factor: int) -> Decode:
    """A decoder that looks at one latent pixel for each of the image's."""

    def decode(latents: np.ndarray) -> np.ndarray:
        values = np.tanh(latents[:, :3]) * 1.3
        return np.repeat(np.repeat(values, factor, axis=2), factor, axis=3).astype(np.float32)

    return decode


@given(
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    tile=st.integers(4, 44),
    factor=st.sampled_from([1, 2, 8]),
    count=st.integers(1, 3),
)
@settings(max_examples=100, deadline=None)
def test_a_decoder_of_single_pixels(size: tuple[int, int], tile: int, factor: int, count: int) -> None:
    """Fails if any part of an image is missing, moved or weighted wrong, or tiles have more than one shape."""
    latents = np.random.default_rng(sum(size)).standard_normal((count, 4, *size)).astype(np.float32)
    asked = set()

    def decode(part: np.ndarray) -> np.ndarray:
        asked.add(part.shape)
        return local(factor)(part)

    found, expected = decode_in_tiles(decode, latents, tile, factor), local(factor)(latents)
    assert asked == {(count, 4, min(tile, size[0]), min(tile, size[1]))}
    assert found.shape == expected.shape
    assert found.dtype == np.float32
    assert np.abs(found - expected).max() <= 2 * SUM_LIMIT


def test_pixels_are_rounded_as_in_pytorch() -> None:
    """Fails if clamping or rounding, of halves too, is not the decoder graph's."""
    halves = (np.arange(-3, 260, dtype=np.float32) + 0.5) / 255 * 2 - 1
    values = np.concatenate([halves, np.random.default_rng(0).uniform(-1.5, 1.5, 5000)]).astype(np.float32)
    decoded = np.resize(values, (2, 3, 29, 31)).astype(np.float32)
    tensor = torch.from_numpy(decoded)
    expected = ((tensor / 2 + 0.5).clamp(0, 1) * 255).round().permute(0, 2, 3, 1).to(torch.uint8)
    assert np.array_equal(rounded(decoded), expected.numpy())


def test_pixels_are_the_graphs(pipe: Pipeline) -> None:
    """Fails if the graph's uint8 image is not its float one, rounded here."""
    latents = np.random.default_rng(1).standard_normal((2, 4, 8, 12)).astype(np.float32) * 2
    images, decoded = pipe.engine.session("decoder").run({"latents": latents}, ["images", "decoded"])
    assert np.array_equal(rounded(decoded), images)


def test_a_tile_as_large_as_the_image(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if images that fit one tile are decoded in another way, or slices are not of the size asked for."""
    latents = np.random.default_rng(2).standard_normal((5, 4, 8, 8)).astype(np.float32)
    whole = pipe.decode(latents)
    for tile in (8, 9, 1000):
        assert np.array_equal(pipe.decode(latents, tile), whole)
    with shapes(monkeypatch) as calls:
        sliced = pipe.decode(latents, batch=2)
    assert calls == [(2, 4, 8, 8), (2, 4, 8, 8), (1, 4, 8, 8)]
    assert np.abs(sliced.astype(int) - whole).max() <= 1  # measured: 0
    with shapes(monkeypatch) as calls:
        pipe.decode(latents, 6, 3)
    assert calls == [(3, 4, 6, 6)] * 4 + [(2, 4, 6, 6)] * 4


@pytest.mark.parametrize(("tile", "batch"), [(3, None), (0, None), (-8, None), (None, 0), (None, -1)])
def test_decodings_that_cannot_be(pipe: Pipeline, tile: int | None, batch: int | None) -> None:
    """Fails if a tile or a slice of no size is tried, or refused without the smallest that works."""
    with pytest.raises(SamplingError, match=r"expected at least [14]"):
        pipe.decode(np.zeros((1, 4, 8, 8), np.float32), tile, batch)
    check_tile(4)
    check_tile(None)


def test_pixels_that_are_no_numbers(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a tile that overflowed becomes black pixels without a word."""
    session = pipe.engine.session("decoder")
    original = session.run
    monkeypatch.setattr(session, "run", lambda *given: [result * np.nan for result in original(*given)], raising=False)
    with pytest.raises(SamplingError, match=r"decoded pixels are not finite on onnxruntime .*; run dit-verify"):
        pipe.decode(np.zeros((1, 4, 8, 8), np.float32), 4)


def test_memory_is_one_tiles() -> None:
    """Fails if a large image's tiles are in memory together, or anything of its size more than twice."""
    latents = np.zeros((1, 4, 256, 256), np.float32)
    image = 3 * 2048 * 2048 * 4
    tracemalloc.start()
    try:
        rounded(decode_in_tiles(local(8), latents, 64, 8))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak <= 2.4 * image  # measured: 2.25: the image, the same being rounded, and its pixels


def borders(size: int, tile: int, factor: int) -> np.ndarray:
    """Which gaps between neighbouring image pixels are a tile's border: bool ``[size·factor − 1]``."""
    ends = {edge for start in starts_of_tiles(size, tile) for edge in (start, start + min(tile, size))} - {0, size}
    found = np.zeros(size * factor - 1, np.bool_)
    found[[edge * factor - 1 for edge in ends]] = True
    return found


def seams(found: np.ndarray, whole: np.ndarray, tile: int, factor: int) -> float:
    """How much more the difference to the whole image jumps across tile borders than elsewhere; images NHWC."""
    difference, ratios = found.astype(np.float64) - whole, []
    for axis in (1, 2):
        jumps = np.abs(np.diff(difference, axis=axis)).mean(axis=tuple({0, 1, 2, 3} - {axis}))
        border = borders(whole.shape[axis] // factor, tile, factor)
        ratios.append(jumps[border].mean() / jumps[~border].mean())
    return float(max(ratios))


def cut(decode: Decode, latents: np.ndarray, tile: int, factor: int) -> np.ndarray:
    """Tiles laid over one another without blending."""
    count, _, height, width = latents.shape
    image = np.zeros((count, 3, height * factor, width * factor), np.float32)
    for top in starts_of_tiles(height, tile):
        for left in starts_of_tiles(width, tile):
            part = decode(latents[:, :, top : top + tile, left : left + tile])
            image[:, :, top * factor : (top + tile) * factor, left * factor : (left + tile) * factor] = part
    return image


@pytest.fixture(scope="module")
def sheets(checkpoint: Path) -> dict[str, tuple[Decode, np.ndarray]]:
    """A trained autoencoder with the latents of 36 images on one sheet, and a random one with noise."""

    def decoder(autoencoder: diffusers.AutoencoderKL) -> Decode:
        scale = autoencoder.config.scaling_factor

        def decode(part: np.ndarray) -> np.ndarray:
            with torch.inference_mode():
                return autoencoder.decode(torch.from_numpy(np.ascontiguousarray(part)) / scale).sample.numpy()

        return decode

    fashion = diffusers.AutoencoderKL.from_pretrained(FASHION / "checkpoint" / "vae").eval()
    with Image.open(FASHION / "samples.png") as image:
        sheet = torch.from_numpy(np.array(image.convert("RGB"))[:192, :192]).float().permute(2, 0, 1)[None] / 127.5 - 1
    with torch.inference_mode():
        latents = fashion.encode(sheet).latent_dist.mode() * fashion.config.scaling_factor
    noise = np.random.default_rng(0).standard_normal((1, 4, 32, 32)).astype(np.float32)
    random = diffusers.AutoencoderKL.from_pretrained(checkpoint / "vae").eval()
    return {"fashion": (decoder(fashion), latents.numpy()), "random": (decoder(random), noise)}


@pytest.mark.parametrize(
    ("name", "tile", "limit"),
    [  # dB against the image decoded whole
        ("fashion", 16, 26.0),  # measured: 28.6
        ("fashion", 24, 30.5),  # measured: 32.8
        ("fashion", 32, 35.0),  # measured: 37.5
        ("random", 8, 17.5),  # measured: 19.9
        ("random", 16, 28.0),  # measured: 30.4
        ("random", 24, 33.5),  # measured: 36.1
    ],
)
def test_tiles_are_near_the_whole(
    sheets: dict[str, tuple[Decode, np.ndarray]], name: str, tile: int, limit: float
) -> None:
    """Fails if the image is farther from the one decoded whole than a tile's own view makes it, or shows seams."""
    decode, latents = sheets[name]
    whole = rounded(decode(latents))
    found = rounded(decode_in_tiles(decode, latents, tile, 4))
    hard = rounded(cut(decode, latents, tile, 4))
    seam, without = seams(found, whole, tile, 4), seams(hard, whole, tile, 4)
    print(f"{name}, tile {tile}: {psnr(found, whole):.1f} dB, seams {seam:.2f}, unblended {without:.1f}")
    assert psnr(found, whole) >= limit
    assert psnr(found, whole) > psnr(hard, whole)
    assert seam <= SEAM_LIMIT
    assert without >= HARD_SEAM * seam


def test_an_image_of_tiles_is_made_again(bundles: dict[str, Path], tmp_path: Path, monkeypatch: Any) -> None:
    """Fails if tile and slices are not used, not recorded, or not restored from the record."""
    bundle, path, again = bundles["fp32"], tmp_path / "tiles.png", tmp_path / "again.png"
    sampling = ("--labels", 1, 2, 3, "--steps", 2, "--sampler", "ddim")
    with shapes(monkeypatch) as before:
        made(bundle, *sampling, "--decode-tile", 5, "--decode-batch", 2, "-o", path)
    assert before[2:] == [(2, 4, 5, 5)] * 4 + [(1, 4, 5, 5)] * 4
    found = record(path)
    assert (found["dit.decode_tile"], found["dit.decode_batch"]) == (5, 2)
    with shapes(monkeypatch) as after:
        assert "the same as" in made(bundle, "--from-image", path, "-o", again)
    assert after == before
    assert np.array_equal(pixels(again), pixels(path))
    assert record(again) == found
    made(bundle, *sampling, "-o", tmp_path / "whole.png")
    assert not np.array_equal(pixels(tmp_path / "whole.png"), pixels(path))
    refused("--decode-tile with --from-image", bundle, "--from-image", path, "--decode-tile", 5, folder=tmp_path)
    for key, value in (("tile", "-1"), ("tile", '"5"'), ("tile", "3"), ("batch", "1.5"), ("batch", "true")):
        with Image.open(path) as image:
            damaged = {**image.text, f"dit.decode_{key}": value}
        asked = ("--from-image", with_record(tmp_path / "damaged.png", damaged), "-o", tmp_path / "x.png")
        refused("expected at least 4" if value == "3" else "damaged", bundle, *asked, folder=tmp_path)


def test_a_folder_of_other_tiles(bundles: dict[str, Path], tmp_path: Path) -> None:
    """Fails if a folder keeps an image of another tile, or makes one again because of the decoder's slices."""
    arguments = ["--labels", 1, "--steps", 2, "--sampler", "ddim", "--json", "-o", tmp_path / "one"]
    for change, count in (
        ((), 1),
        (("--decode-tile", 4), 1),
        (("--decode-tile", 4), 0),
        (("--decode-tile", 5), 1),
        (("--decode-tile", 5, "--decode-batch", 1), 0),
    ):
        assert len(json.loads(made(bundles["fp32"], *arguments, *change))["files"]) == count, change


def test_wrong_arguments(bundles: dict[str, Path], tmp_path: Path) -> None:
    """Fails if a wrong tile or slice is found after the sampling, or told in more than one line."""
    wrong: list[tuple[list[object], str]] = [
        (["--decode-tile", 0], "got '0', expected a whole number from 1"),
        (["--decode-tile", 3], "decode tile 3: expected at least 4 latent pixels"),
        (["--decode-tile", "large"], "got 'large', expected a whole number"),
        (["--decode-batch", 0], "got '0', expected a whole number from 1"),
    ]
    for arguments, message in wrong:
        refused(message, bundles["fp32"], "--labels", 1, *arguments, "-o", tmp_path / "out.png", folder=tmp_path)
    done = dit_sample(bundles["fp32"], "--help")
    assert "--decode-tile" in done.out
