"""Images that say how they were made: records, ``--from-image``, folders that are completed, and wrong arguments."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from PIL import Image
from support.commands import run_command, run_process
from support.sample_command import ENGINE, dit_sample, made, pixels, record, refused, shapes, with_record

from dit_runtime import Pipeline, __version__
from dit_runtime.backends.base import most_threads

PER_IMAGE = ("label", "seed", "noise", "guidance", "init", "batch")  # lists in a grid's record


def noise_of(seeds: Sequence[int]) -> np.ndarray:
    return np.stack([np.random.default_rng(seed).standard_normal((4, 8, 8), np.float32) for seed in seeds])


def first_hash(noise: np.ndarray) -> str:
    return hashlib.sha256(noise.astype("<f4").tobytes()).hexdigest()[:16]


@pytest.fixture
def bundle(bundles: dict[str, Path]) -> Path:
    return bundles["fp32"]


def test_the_record_of_an_image(checkpoint: Path, bundle: Path, tmp_path: Path) -> None:
    """Fails if a text chunk that says how an image was made is missing, named otherwise, or not true."""
    path = tmp_path / "one.png"
    arguments = ["--labels", "class 3:0.75+5:0.25", "--seed", "7", "--steps", "6", "--sampler", "ddim", "--eta", "0.5"]
    arguments += ["--guidance", "2.5", "--guidance-interval", "0.1", "0.9", "--guidance-schedule", "cosine"]
    done = run_process("dit-sample", bundle, *ENGINE, *arguments, "--negative-label", "kind 2", "-o", path)
    assert done.returncode == 0, done.stderr
    found = record(path)
    assert isinstance(found.pop("dit.cpus"), int)
    assert found.pop("dit.pixels") == hashlib.sha256(b"(32, 32, 3)" + pixels(path).tobytes()).hexdigest()
    assert len(found.pop("dit.noise")) == len(found.pop("dit.table")) == 16
    assert found == {
        "dit.version": __version__,
        "dit.model": checkpoint.name,
        "dit.bundle": hashlib.sha256((bundle / "manifest.json").read_bytes()).hexdigest(),
        "dit.precision": "fp32",
        "dit.engine": f"onnxruntime {onnxruntime.__version__} CPU",
        "dit.threads": 1,
        "dit.label": {"3": 0.75, "5": 0.25},
        "dit.negative_label": 2,
        "dit.seed": 7,
        "dit.noise_device": "cpu",
        "dit.noise_dtype": "float32",
        "dit.cuda_threads": None,
        "dit.noise_given": False,
        "dit.sampler": "ddim",
        "dit.spacing": "leading",
        "dit.steps": 6,
        "dit.eta": 0.5,
        "dit.guidance": 2.5,
        "dit.guidance_interval": [0.1, 0.9],
        "dit.guidance_schedule": "cosine",
        "dit.init": None,
        "dit.strength": None,
        "dit.size": [32, 32],
        "dit.decode_tile": None,
        "dit.decode_batch": None,
        "dit.batch": [1, 0, [[3, 5], [2, 1]]],  # three branches in five rows; the last is outside the interval
    }


def test_the_record_of_a_grid(bundle: Path, tmp_path: Path) -> None:
    """Fails if a grid's record does not have label, seed, noise and guidance of each position, in order."""
    path, noise = tmp_path / "grid.png", noise_of([4, 9, 1])
    np.save(tmp_path / "noise.npy", noise)
    arguments = ["--labels", 3, 0, 5, "--seeds", 4, 9, 1, "--guidance", 1, 2, 3.5, "--steps", 2, "--batch-size", 2]
    made(bundle, *arguments, "--noise", tmp_path / "noise.npy", "-o", path)
    found = record(path)
    assert pixels(path).shape == (64, 64, 3)
    assert found["dit.label"] == [{"3": 1.0}, {"0": 1.0}, {"5": 1.0}]
    assert found["dit.seed"] == [4, 9, 1]
    assert found["dit.guidance"] == [1, 2, 3.5]
    assert found["dit.batch"] == [[2, 0, [[2, 2]]], [2, 1, [[2, 2]]], [1, 0, [[2, 2]]]]
    assert found["dit.noise"] == [first_hash(one) for one in noise]
    assert found["dit.noise_given"] is True
    assert (found["dit.steps"], found["dit.eta"], found["dit.negative_label"]) == (2, 0, None)


def assert_made_again(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *arguments: object, needs: Sequence[object] = ()
) -> None:
    """The third of five images of one batch is made again from its file: same pixels, record and engine calls."""
    with shapes(monkeypatch) as before:
        made(bundle, *arguments, *needs, "--seed", 90, "-o", tmp_path / "five")
    files = sorted((tmp_path / "five").iterdir())
    assert len(files) == 5
    again = tmp_path / "again.png"
    with shapes(monkeypatch) as after:
        out = made(bundle, "--from-image", files[2], *needs, "-o", again)
    assert np.array_equal(pixels(again), pixels(files[2]))
    assert record(again) == record(files[2])
    assert f"the same as {files[2]}" in out
    assert after == before
    assert not np.array_equal(pixels(files[1]), pixels(files[2]))


FIVE = ("--labels", 1, 2, 3, 4, 5)


@pytest.mark.parametrize(
    "arguments",
    [
        (*FIVE, "--sampler", "ddim", "--steps", 4, "--guidance", 2.5),
        (*FIVE, "--sampler", "ddim", "--steps", 4, "--eta", 0.7, "--guidance", 0.5),
        (*FIVE, "--sampler", "ddpm", "--steps", 4, "--guidance", 1, "--spacing", "official"),
        (*FIVE, "--sampler", "ddim", "--steps", 5, "--guidance-interval", 0.3, 0.8, "--guidance-schedule", "linear"),
        ("--labels", 1, "2:0.5+7:0.3+8:0.2", 3, 4, 5, "--sampler", "ddpm", "--steps", 4, "--guidance", 2),
        ("--labels", 1, 2, "3:0.7+5:0.3", 4, 5, "--sampler", "unipc", "--steps", 4, "--guidance", 2),
        (*FIVE, "--sampler", "dpmpp-2m-sde", "--steps", 4, "--noise-device", "cuda", "--noise-dtype", "float16"),
        (*FIVE, "--sampler", "dpmpp-3m", "--spacing", "karras", "--steps", 4, "--negative-label", 9),
    ],
    ids=["ddim", "eta", "ddpm", "interval", "beside a mixture", "a mixture", "noise of cuda", "karras"],
)
def test_an_image_is_made_again(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[object, ...]
) -> None:
    """Fails if an image from the middle of a batch cannot be made again from its file alone, bit for bit."""
    assert_made_again(bundle, tmp_path, monkeypatch, *arguments)


@pytest.mark.parametrize(
    "arguments",
    [(*FIVE, "--guidance", 1, 2.5, 1, 3, 0.5), ("--labels", "1+2", 2, 3, 4, 5, "--guidance", 1, 2.5, 2.5, 3, 0.5)],
    ids=["unguided beside guided", "guided beside an unguided mixture"],
)
def test_an_image_among_other_scales_is_made_again(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[object, ...]
) -> None:
    """Fails if scales per image change how many branches the engine runs when one of them is made again."""
    assert_made_again(bundle, tmp_path, monkeypatch, *arguments, "--sampler", "ddim", "--steps", 3)


def test_an_image_of_given_noise_is_made_again(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if an image of noise in a file is made again from other noise, or a grid of them from too little."""
    noise = noise_of(range(5))
    for name, values in (("five", noise), ("third", noise[2]), ("fourth", noise[3])):
        np.save(tmp_path / f"{name}.npy", values)
    arguments = (*FIVE, "--sampler", "ddpm", "--steps", 3, "--seed", 90, "--noise", tmp_path / "five.npy")
    made(bundle, *arguments, "-o", tmp_path / "images")
    made(bundle, *arguments, "-o", tmp_path / "grid.png")
    path, again = sorted((tmp_path / "images").iterdir())[2], tmp_path / "again.png"
    assert record(path)["dit.noise"] == first_hash(noise[2])
    refused("name it with --noise", bundle, "--from-image", path, "-o", again, folder=tmp_path)
    other = ("--from-image", path, "--noise", tmp_path / "fourth.npy", "-o", again)
    refused("name its file with --noise", bundle, *other, folder=tmp_path)
    other = ("--from-image", tmp_path / "grid.png", "--noise", tmp_path / "third.npy", "-o", again)
    refused("noise of 1 images, expected 5", bundle, *other, folder=tmp_path)
    made(bundle, "--from-image", path, "--noise", tmp_path / "third.npy", "-o", again)
    assert np.array_equal(pixels(again), pixels(path))
    made(bundle, "--from-image", tmp_path / "grid.png", "--noise", tmp_path / "five.npy", "-o", again)
    assert np.array_equal(pixels(again), pixels(tmp_path / "grid.png"))


def test_an_image_of_a_custom_table_is_made_again(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if an image of a table in a file is made again with another table, or without one."""
    for name, steps in (("mine", 4), ("other", 5)):
        path = tmp_path / f"{name}.json"
        made(bundle, "--sampler", "ddpm", "--steps", steps, "--write-table", path, "-o", tmp_path / "none.png")
        path.write_text(json.dumps({**json.loads(path.read_text()), "sampler": "mine"}))
    table, again = ("--sampler", tmp_path / "mine.json"), tmp_path / "refused.png"
    assert_made_again(bundle, tmp_path, monkeypatch, *FIVE, needs=table)
    path = sorted((tmp_path / "five").iterdir())[2]
    assert (record(path)["dit.sampler"], record(path)["dit.steps"]) == ("mine", 4)
    asked = ("--from-image", path, "-o", again)
    refused("made with the sampler table 'mine'; name its file with --sampler", bundle, *asked, folder=tmp_path)
    refused("sampler table was", bundle, *asked, "--sampler", tmp_path / "other.json", folder=tmp_path)


def test_a_grid_is_made_again(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a grid of several batches, scales and mixtures is not made again in the same batches."""
    labels = ("--labels", 1, "2:0.6+9:0.4", 3, 4, 5, "--batch-size", 3, "--guidance", 1, 2, 3, 4, 1)
    path, again = tmp_path / "grid.png", tmp_path / "again.png"
    with shapes(monkeypatch) as before:
        made(bundle, *labels, "--sampler", "ddpm", "--steps", 3, "-o", path)
    with shapes(monkeypatch) as after:
        assert "the same as" in made(bundle, "--from-image", path, "-o", again)
    assert np.array_equal(pixels(again), pixels(path))
    assert record(again) == record(path)
    assert after == before
    made(bundle, "--from-image", path, "-o", tmp_path / "folder")
    found = [pixels(file) for file in sorted((tmp_path / "folder").iterdir())]
    whole = pixels(path).reshape(2, 32, 3, 32, 3).swapaxes(1, 2).reshape(6, 32, 32, 3)
    assert np.array_equal(np.stack(found), whole[:5])
    assert not whole[5].any()


def test_a_grid_of_other_columns_is_made_again(bundle: Path, tmp_path: Path) -> None:
    """Fails if a grid whose columns were chosen is made again in another arrangement."""
    made(bundle, *FIVE, "--sampler", "ddim", "--steps", 2, "--columns", 5, "-o", tmp_path / "grid.png")
    made(bundle, "--from-image", tmp_path / "grid.png", "-o", tmp_path / "again.png")
    assert np.array_equal(pixels(tmp_path / "again.png"), pixels(tmp_path / "grid.png"))


def test_what_cannot_be_made_again(bundles: dict[str, Path], tmp_path: Path) -> None:
    """Fails if another bundle, another program's PNG, or what is no PNG gives an image that is passed off as same."""
    path, again = tmp_path / "one.png", tmp_path / "again.png"
    made(bundles["fp32"], "--labels", 3, "--steps", 2, "--sampler", "ddim", "-o", path)
    asked = ("--from-image", path, "-o", again)
    refused("name the bundle that made it", bundles["fp16"], *asked, folder=tmp_path)
    jpeg, cut, missing = tmp_path / "photo.png", tmp_path / "cut.png", tmp_path / "missing.png"
    Image.new("RGB", (32, 32)).save(jpeg, format="JPEG")
    cut.write_bytes(path.read_bytes()[:-200])
    for other in (jpeg, cut, missing, tmp_path):
        asked = ("--from-image", other, "-o", again)
        refused(f"{other}: cannot be read as a PNG image", bundles["fp32"], *asked, folder=tmp_path)
    for text in ({}, {"Software": "another", "seed": "7"}):
        asked = ("--from-image", with_record(tmp_path / "other.png", text), "-o", again)
        refused("has no record of how it was made", bundles["fp32"], *asked, folder=tmp_path)


@pytest.fixture
def text(bundle: Path, tmp_path: Path) -> dict[str, str]:
    """The text chunks of an image."""
    made(bundle, "--labels", 3, "--steps", 2, "--sampler", "ddim", "-o", tmp_path / "one.png")
    with Image.open(tmp_path / "one.png") as image:
        return dict(image.text)


def test_damaged_records(bundle: Path, text: dict[str, str], tmp_path: Path) -> None:
    """Fails if a record with a key less, or with a value that cannot be, ends in a traceback or in an image."""
    damage: list[tuple[dict[str, str], str]] = [
        ({"dit.seed": "{"}, "its record is damaged (dit.seed: not JSON: Expecting property name"),
        ({"dit.seed": "[7, 8]"}, "its record is damaged"),
        ({"dit.batch": "7"}, "its record is damaged"),
        ({"dit.batch": "[1, 0]"}, "its record is damaged"),
        ({"dit.batch": "[1, 1, [[2, 2]]]"}, "its record is damaged (batch: got image 1 of 1"),
        ({"dit.batch": "[1, -1, [[2, 2]]]"}, "its record is damaged"),
        ({"dit.batch": "[1e9, 0, [[2, 2]]]"}, "its record is damaged"),
        ({"dit.batch": "[1000000000, 0, [[2, 2]]]"}, "its record is damaged"),
        ({"dit.batch": "[1, 0, [[2, 1000000000]]]"}, "its record is damaged"),
        ({"dit.batch": f"[1, 0, [{', '.join(['[2, 100000]'] * 101)}]]"}, "batch: got 10100000 rows in all images"),
        ({"dit.size": "[32]"}, "its record is damaged (size: got [32], expected a list of 2)"),
        ({"dit.label": '{"3": "1"}'}, "its record is damaged (label['3']: got '1', expected a finite number)"),
        ({"dit.version": '"\\u001b[31m"'}, "text without control characters"),
        ({"dit.batch": "[1, 0, [[2, 3]]]"}, "record is damaged: its batch does not fit"),
        ({"dit.batch": "[1, 0, [[1, 2]]]"}, "record is damaged: its batch does not fit"),
        ({"dit.seed": "9" * 5000}, "its record is damaged"),
        ({"dit.seed": "[" * 100_000}, "its record is damaged"),
        ({"dit.seed": "7.5"}, "its record is damaged (seed: got 7.5, expected a whole number"),
        ({"dit.seed": "true"}, "its record is damaged (seed: got True"),
        ({"dit.seed": str(7 + 2**64)}, "its record is damaged (dit.seed: not JSON: it holds '18446744073709551623'"),
        ({"dit.label": "3"}, "record is damaged"),
        ({"dit.label": "{}"}, "expected distinct classes"),
        ({"dit.label": '{"30": 1.0}'}, "label 30: expected 0 to 9"),
        ({"dit.guidance": '"strong"'}, "record is damaged"),
        ({"dit.guidance": "NaN"}, "its record is damaged (dit.guidance: not JSON: it holds NaN"),
        ({"dit.guidance_interval": "[0.1]"}, "record is damaged"),
        ({"dit.steps": '"two"'}, "record is damaged"),
        ({"dit.steps": "3"}, "the image's sampler table was"),
        ({"dit.seed": "8"}, "the image's noise was"),
        ({"dit.bundle": '"0000"'}, "name the bundle that made it"),
        ({"dit.sampler": '"plms"'}, "made with the sampler table 'plms'"),
    ]
    for change, message in damage:
        path = with_record(tmp_path / "damaged.png", {**text, **change})
        refused(message, bundle, "--from-image", path, "-o", tmp_path / "again.png", folder=tmp_path)
    for key in text.keys() - {"dit.pixels"}:  # which older versions have not
        path = with_record(tmp_path / "damaged.png", {name: value for name, value in text.items() if name != key})
        refused("damaged", bundle, "--from-image", path, "-o", tmp_path / "again.png", folder=tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"dit.batch": "[[1, 0, [[2, 2]]], [2, 1, [[2, 2]]]]"},
        {"dit.batch": "[[2, 0, [[2, 2]]]]"},
        {f"dit.{key}": "[]" for key in PER_IMAGE},
    ],
    ids=["two sizes", "one position", "no positions"],
)
def test_damaged_places(bundle: Path, tmp_path: Path, change: dict[str, str]) -> None:
    """Fails if the positions of a grid that do not fit one batch, or no positions at all, end in a traceback."""
    path = tmp_path / "grid.png"
    made(bundle, "--labels", 3, 4, "--steps", 2, "--sampler", "ddim", "-o", path)
    with Image.open(path) as image:
        damaged = {**image.text, **change}
    asked = ("--from-image", with_record(path, damaged), "-o", tmp_path / "again.png")
    refused("damaged", bundle, *asked, folder=tmp_path)


@pytest.mark.parametrize(
    "option",
    [
        ("--steps", 4),
        ("--sampler", "ddim"),
        ("--guidance", 3),
        ("--guidance-interval", 0.1, 0.9),
        ("--seeds", 7),
        ("--seed", 7),
        ("--negative-label", 2),
        ("--noise-device", "cuda"),
        ("--batch-size", 4),
    ],
    ids=lambda option: str(option[0]),
)
def test_options_that_the_record_decides(bundle: Path, tmp_path: Path, option: tuple[object, ...]) -> None:
    """Fails if an option beside --from-image is silently not used."""
    message = f"{option[0]} with --from-image: the image's own record says how it was made"
    refused(message, bundle, "--from-image", tmp_path / "x.png", *option, "-o", tmp_path / "y.png", folder=tmp_path)


def times(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in sorted(folder.iterdir())}


def test_altered_pixels_are_made_again(bundle: Path, tmp_path: Path) -> None:
    """Fails if a file with the right record is kept whatever its pixels, or without a record of them."""
    folder = tmp_path / "many"
    arguments = ["--labels", 1, 2, 3, 4, "--steps", 2, "-o", folder]
    made(bundle, *arguments)
    files = sorted(folder.iterdir())
    good = [pixels(file) for file in files]
    black, one_level, unsaid, _ = files
    texts = [{key: json.dumps(value) for key, value in record(file).items()} for file in files]
    with_record(black, texts[0])
    nearly = good[1].copy()
    nearly[0, 0, 0] ^= 1
    with_record(one_level, texts[1], nearly)
    with_record(unsaid, {key: text for key, text in texts[2].items() if key != "dit.pixels"}, good[2])
    again = dit_sample(bundle, *ENGINE, "--from-image", black, "-o", tmp_path / "again.png")
    assert again.code == 0
    assert "has other pixels than it was written with" in again.err
    assert "other pixels" not in dit_sample(bundle, *ENGINE, "--from-image", unsaid, "-o", tmp_path / "again.png").err
    assert json.loads(made(bundle, *arguments, "--json"))["files"] == [str(file) for file in files[:3]]
    assert all(np.abs(pixels(file).astype(int) - image).max() <= 1 for file, image in zip(files, good, strict=True))
    assert json.loads(made(bundle, *arguments, "--json"))["files"] == []


def test_shards_fill_one_folder(bundle: Path, tmp_path: Path) -> None:
    """Fails if an image is made twice or by none, or is another one than without shards."""
    arguments = ["--labels", "all", "--steps", 2, "--seed", 3, "--batch-size", 3]
    made(bundle, *arguments, "-o", tmp_path / "whole")
    folder = tmp_path / "parts"
    files = []
    for number in (3, 1, 4, 2):
        files.append(json.loads(made(bundle, *arguments, "--shard", f"{number}/4", "-o", folder, "--json"))["files"])
    assert [len(each) for each in files] == [2, 2, 3, 3]
    assert sorted(Path(file).name for each in files for file in each) == list(times(tmp_path / "whole"))
    for name in times(tmp_path / "whole"):
        assert np.array_equal(pixels(folder / name), pixels(tmp_path / "whole" / name))
    assert json.loads(made(bundle, *arguments, "-o", folder, "--json"))["files"] == []


@pytest.mark.parametrize(
    ("shard", "output", "words"),
    [
        ("1/11", "many", "11 shards of 10 images: expected at most one for each image"),
        ("1/2", "grid.png", "shard 1/2 of a grid: expected a folder as --output"),
        ("3/2", "many", "expected I/N, such as 2/8"),
        ("0/2", "many", "expected I/N, such as 2/8"),
        ("half", "many", "expected I/N, such as 2/8"),
    ],
)
def test_shards_that_cannot_be(bundle: Path, tmp_path: Path, shard: str, output: str, words: str) -> None:
    done = dit_sample(bundle, *ENGINE, "--labels", "all", "--shard", shard, "-o", tmp_path / output)
    assert (done.code, words in done.err) == (1, True), done.err
    assert not [*tmp_path.iterdir()]


def test_a_folder_is_completed(bundle: Path, tmp_path: Path) -> None:
    """Fails if an image that is there is made again, or one that is missing, damaged or of other settings is not."""
    folder = tmp_path / "many"
    arguments = ["--labels", "1", "2:0.5+3:0.5", "4", "--count", 2, "--sampler", "ddim", "--seed", 3, "-o", folder]
    short, long = [*arguments, "--steps", 2], [*arguments, "--steps", 3]
    made(bundle, *short)
    first = times(folder)
    names = [f"0000{i}_class{label}_seed{3 + i}.png" for i, label in enumerate(["1", "1", "2+3", "2+3", "4", "4"])]
    assert list(first) == names
    kept = {name: pixels(folder / name) for name in names}

    assert "every image is there already" in made(bundle, *short, "--batch-size", 2)
    assert json.loads(made(bundle, *short, "--json"))["files"] == []
    assert times(folder) == first

    (folder / names[1]).unlink()
    (folder / names[4]).unlink()
    (folder / names[2]).write_bytes((folder / names[2]).read_bytes()[:-100])
    with_record(folder / names[3], {"dit.seed": "7"})
    wanted = [names[index] for index in (1, 2, 3, 4)]
    assert json.loads(made(bundle, *short, "--json"))["files"] == [str(folder / name) for name in wanted]
    second = times(folder)
    assert list(second) == names
    assert {name for name in names if second[name] == first[name]} == {names[0], names[5]}
    assert all(np.abs(pixels(folder / name).astype(int) - kept[name]).max() <= 1 for name in names)

    assert len(json.loads(made(bundle, *long, "--json"))["files"]) == 6
    third = times(folder)
    assert list(third) == names
    assert all(third[name] != second[name] for name in names)
    assert all(record(folder / name)["dit.steps"] == 3 for name in names)

    assert len(json.loads(made(bundle, *long, "--overwrite", "--json"))["files"]) == 6
    assert all(times(folder)[name] != third[name] for name in names)


@pytest.mark.parametrize(
    "change",
    [
        ("--guidance", 3),
        ("--guidance-interval", 0, 0.5),
        ("--guidance-schedule", "linear"),
        ("--negative-label", 7),
        ("--eta", 0.5),
        ("--spacing", "trailing"),
        ("--sampler", "unipc"),
        ("--noise-dtype", "float16"),
        ("--noise", "noise.npy"),
    ],
    ids=lambda change: str(change[0]),
)
def test_every_setting_makes_an_image_again(bundle: Path, tmp_path: Path, change: tuple[object, ...]) -> None:
    """Fails if a folder keeps an image that the settings asked for now would not make."""
    np.save(tmp_path / "noise.npy", noise_of([5]))
    change = tuple(tmp_path / item if item == "noise.npy" else item for item in change)
    arguments = ["--labels", 1, "--steps", 2, "--sampler", "ddim", "--guidance", 2, "--json", "-o", tmp_path / "one"]
    assert len(json.loads(made(bundle, *arguments))["files"]) == 1
    assert len(json.loads(made(bundle, *arguments, *change))["files"]) == 1
    assert json.loads(made(bundle, *arguments, *change))["files"] == []


def test_other_noise_makes_an_image_again(bundle: Path, tmp_path: Path) -> None:
    """Fails if a folder keeps an image of noise that the file no longer holds."""
    path = tmp_path / "noise.npy"
    arguments = ["--labels", 1, "--steps", 2, "--sampler", "ddim", "--noise", path, "--json", "-o", tmp_path / "one"]
    for seed, count in ((5, 1), (5, 0), (6, 1)):
        np.save(path, noise_of([seed]))
        assert len(json.loads(made(bundle, *arguments))["files"]) == count


@pytest.mark.parametrize("output", ["folder", "grid.png"])
def test_a_write_that_is_cut_short(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str) -> None:
    """Fails if an interruption in the middle of a write leaves half an image, a temporary file, or no old image."""
    arguments = ["--labels", 1, 2, "--steps", 2, "--sampler", "ddim", "-o", tmp_path / output]
    made(bundle, *arguments)
    (old, *_) = (path for path in sorted(tmp_path.rglob("*.png")))
    before, content = sorted(tmp_path.rglob("*")), old.read_bytes()

    def write(self: Path, content: bytes) -> None:
        with self.open("wb") as file:
            file.write(content[: len(content) // 2])
        raise KeyboardInterrupt

    with old.open("rb") as opened:
        with monkeypatch.context() as patch:
            patch.setattr(Path, "write_bytes", write)
            done = dit_sample(bundle, *arguments, "--overwrite", "--guidance", 1)
        assert (done.code, done.out) == (130, "")
        assert done.err == ""
        assert (sorted(tmp_path.rglob("*")), old.read_bytes()) == (before, content)
        made(bundle, *arguments, "--overwrite", "--guidance", 1)
        assert opened.read() == content  # replaced at once, not written over
    assert old.read_bytes() != content


def test_ctrl_c_in_a_folder(bundle: Path, tmp_path: Path) -> None:
    """Fails if an interruption leaves half a file, or the next run does not make exactly what is missing."""
    folder, whole = tmp_path / "stopped", tmp_path / "whole"
    arguments = ["--labels", "all", "--count", "2", "--sampler", "ddim", "--steps", "40", "--batch-size", "2"]
    # A tenth of a second for each image, so that a busy machine still has some to make when the signal comes.
    code = (
        "import time; from dit_runtime.output import images; from dit_runtime.commands.sample import main; "
        "write = images.write_png; "
        "images.write_png = lambda *written: (write(*written), time.sleep(0.1)); "
        f"main({[str(bundle), *ENGINE, *arguments, '-o', str(folder)]!r})"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while len(list(tmp_path.glob("stopped/0*.png"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert errors == ""
    first = times(folder)
    assert 2 <= len(first) < 20
    assert all(pixels(folder / name).shape == (32, 32, 3) for name in first)
    done = json.loads(made(bundle, *arguments, "-o", folder, "--json"))
    made(bundle, *arguments, "-o", whole)
    names = [path.name for path in sorted(whole.iterdir())]
    assert [path.name for path in sorted(folder.iterdir())] == names
    assert [Path(file).name for file in done["files"]] == [name for name in names if name not in first]
    assert {name: time for name, time in times(folder).items() if name in first} == first
    for name in names:
        assert np.abs(pixels(folder / name).astype(int) - pixels(whole / name)).max() <= 1
        assert record(folder / name)["dit.noise"] == record(whole / name)["dit.noise"]


@pytest.fixture
def noises(tmp_path: Path) -> dict[str, Path]:
    """Files of noise that cannot be used."""
    good = noise_of([0, 1])
    arrays = {
        "wrong shape": good[:, :3],
        "wrong size": good[:, :, :4],
        "one too many": noise_of([0, 1, 2]),
        "float64": good.astype(np.float64),
        "NaN": np.where(good > 2, np.float32("nan"), good),
        "words": np.array(["a", "b"]),
    }
    paths = {name: tmp_path / f"{name}.npy" for name in arrays}
    for name, values in arrays.items():
        np.save(paths[name], values)
    paths["not numpy"] = tmp_path / "not numpy.npy"
    paths["not numpy"].write_text("noise")
    paths["objects"] = tmp_path / "objects.npy"
    np.save(paths["objects"], np.array([{}, {}]), allow_pickle=True)
    paths["several arrays"] = tmp_path / "several.npz"
    np.savez(paths["several arrays"], a=good)
    paths["missing"] = tmp_path / "missing.npy"
    return paths


def test_wrong_arguments(bundle: Path, noises: dict[str, Path], tmp_path: Path) -> None:
    """Fails if a wrong argument of dit-sample is not one line with what was got and expected, or writes anything."""
    wrong: list[tuple[list[object], str]] = [
        ([], "expected --labels, or --from-image"),
        (["--labels", 1, "--from-image", tmp_path / "NaN.npy"], "expected --labels, or --from-image"),
        (["--labels", 1, "--sampler", "plms"], "'plms' is unknown; choose one of ddim, ddpm, dpmpp-2m, dpmpp-2m-sde"),
        (["--labels", 1, "--sampler", "plms"], "dpmpp-3m, unipc, euler-ancestral, euler, heun, sde-euler, sde-heun"),
        (["--labels", 1, "--sampler", "euler"], "prediction type 'epsilon': expected one of ddim, ddpm"),
        (["--labels", 1, "--sampler", "dopri5"], "'dopri5' is adaptive"),
        (["--labels", 1, "--sampler", tmp_path / "missing.json"], "missing.json: cannot read this sampler table"),
        (["--labels", 1, "--steps", 1001], "1001 steps: expected 1 to 1000"),
        (["--labels", 1, "--steps", 0], "0 steps: expected 1 to 1000"),
        (["--labels", 1, "--spacing", "dense"], "'dense' is not supported"),
        (["--labels", 1, "--eta", 2], "eta 2"),
        (["--labels", 1, "--guidance-interval", 0.7, 0.2], "guidance interval 0.7 to 0.2: expected 0 ≤ LO ≤ HI ≤ 1"),
        (["--labels", 1, "--guidance-interval", 0.7], "expected 2 arguments"),
        (["--labels", 1, "--guidance-schedule", "sine"], "'sine' is unknown; choose one of constant, linear, cosine"),
        (["--labels", 1, "--guidance", "nan"], "guidance nan: expected a number"),
        (["--labels", 1, "--guidance", "inf"], "guidance inf"),
        (["--labels", 1, "--guidance", -1], "guidance -1"),
        (["--labels", 1, 2, "--guidance", 1, 2, 3], "3 guidance scales for 2 images"),
        (["--labels", 1, 2, 3, "--guidance", 1, 1, "nan", "--batch-size", 1], "guidance nan"),
        (["--labels", 1, "--guidance", 0, "--sampler", "ddpm"], "guidance 0 with sampler ddpm"),
        (["--labels", 1, 2, "--seeds", 1, 2, 3], "3 seeds for 2 labels"),
        (["--labels", 1, 2, "--count", 2, "--seeds", 1, 2], "2 seeds for 4 labels"),
        (["--labels", 1, "--seed", 2**64], "seed 18446744073709551616: expected a whole number from -2^63 to 2^64-1"),
        (["--labels", 1, "--seed", -(2**63) - 1], "seed -9223372036854775809: expected"),
        (["--labels", 1, "--threads", 100_000], f"got '100000', expected a whole number from 1 to {most_threads()}"),
        (["--labels", 1, "--threads", 0], "expected a whole number from 1 to "),
        (["--labels", 1, "--seed", 1.5], "got '1.5', expected a whole number from -2^63 to 2^64-1"),
        (["--labels", 1, 2, "--seeds", 1, 2**64], "seed 18446744073709551616: expected"),
        (["--labels", 1, 2, "--seed", 2**64 - 1, "--batch-size", 1], "seed 18446744073709551616: expected"),
        (["--labels", 1, "--seed", "9" * 5000], "expected a whole number from -2^63 to 2^64-1"),
        (["--labels", 1, 2, "--seed", 1, "--seeds", 1, 2], "not allowed with argument"),
        (["--labels", 10], "label 10: expected 0 to 9"),
        (["--labels", 1, 2, "cat", "--batch-size", 1], "label 'cat': 0 classes have that name"),
        (["--labels", "3:0.7+5:much"], "expected LABEL:WEIGHT+LABEL:WEIGHT"),
        (["--labels", "3:0.7+3:0.3"], "names a class twice"),
        (["--labels", "3:0.7"], "label '3:0.7': 0 classes have that name"),
        (["--labels", "3*0.7+5*0.3"], "label '3*0.7': 0 classes have that name"),
        (["--labels", 1, "--negative-label", "cat"], "label 'cat': 0 classes"),
        (["--labels", 1, "--noise-device", "tpu"], "expected device cpu or cuda"),
        (["--labels", 1, "--noise-device", "cuda", "--cuda-threads", 100], "expected a positive multiple of 256"),
        (["--labels", 1, 2, "--noise", noises["missing"]], "missing.npy: cannot be read as noise"),
        (["--labels", 1, 2, "--noise", tmp_path], "cannot be read as noise"),
        (["--labels", 1, 2, "--noise", noises["not numpy"]], "cannot be read as noise"),
        (["--labels", 1, 2, "--noise", noises["objects"]], "cannot be read as noise"),
        (["--labels", 1, 2, "--noise", noises["several arrays"]], "cannot be read as noise"),
        (["--labels", 1, 2, "--noise", noises["words"]], "cannot be read as noise (numbers of "),
        (["--labels", 1, 2, "--noise", noises["wrong shape"]], "expected finite float32 [2, 4, 8, 8]"),
        (["--labels", 1, 2, "--noise", noises["wrong size"]], "float32 [2, 4, 4, 8]; expected finite float32"),
        (["--labels", 1, 2, "--noise", noises["float64"]], "noise (float64 [2, 4, 8, 8], expected float32"),
        (["--labels", 1, 2, "--noise", noises["NaN"]], "numbers that are not finite"),
        (["--labels", 1, 2, "--noise", noises["one too many"]], "float32 [3, 4, 8, 8]; expected finite float32 [2,"),
    ]
    for arguments, message in wrong:
        for output in ("out.png", "out"):
            refused(message, bundle, *arguments, "-o", tmp_path / output, folder=tmp_path)
    done = run_command("dit-sample", bundle, *ENGINE, "--labels", "1", "--guidance", "nan", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "dit-sample: guidance nan: expected a number from 0 to 1e+06; 1 is no guidance\n"
    assert not (tmp_path / "samples.png").exists()


@pytest.mark.parametrize("content", ["empty", "zip", "scalar"])
def test_noise_files_of_no_array(bundle: Path, tmp_path: Path, content: str) -> None:
    """Fails if a file that was not written to its end, or holds one number, ends in a traceback."""
    path = tmp_path / "noise.npy"
    if content == "scalar":
        np.save(path, np.float32(1))
    else:
        path.write_bytes(b"" if content == "empty" else b"PK\x03\x04 cut short")
    done = run_command("dit-sample", bundle, *ENGINE, "--labels", "1", "--noise", path, "-o", tmp_path / "out.png")
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert "noise" in done.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["noise.npy"]


def test_a_table_of_no_steps_is_not_written(bundle: Path, tmp_path: Path) -> None:
    """Fails if ``--steps 0`` writes the table of another number of steps."""
    arguments = ("--sampler", "ddim", "--steps", 0, "--write-table", tmp_path / "table.json")
    refused("0 steps: expected 1 to 1000", bundle, *arguments, folder=tmp_path)


def test_noise_is_looked_at_before_the_first_image(bundle: Path, tmp_path: Path) -> None:
    """Fails if NaN in the last image's noise is found when the others have been made and written."""
    noise = noise_of([0, 1, 2])
    noise[2, 0, 0, 0] = np.nan
    np.save(tmp_path / "noise.npy", noise)
    arguments = ["--labels", 1, 2, 3, "--batch-size", 1, "--steps", 2, "--noise", tmp_path / "noise.npy"]
    refused("expected finite float32", bundle, *arguments, "-o", tmp_path / "folder", folder=tmp_path)


def test_an_image_of_the_library_is_the_commands(bundle: Path, tmp_path: Path) -> None:
    """Fails if the command and ``Pipeline`` make different images of the same words."""
    made(bundle, "--labels", 3, "1+2", "--seeds", 5, 6, "--steps", 4, "--guidance", 2, 3, "-o", tmp_path / "two")
    images = Pipeline(bundle, "onnxruntime", threads=1)([3, {1: 0.5, 2: 0.5}], [5, 6], steps=4, guidance=[2, 3])
    assert np.array_equal(images, np.stack([pixels(path) for path in sorted((tmp_path / "two").iterdir())]))


@pytest.mark.parametrize("name", ["picture.jpg", "picture.JPEG", "picture.webp", "picture.tiff"])
def test_an_output_of_another_kind(bundle: Path, text: dict[str, str], tmp_path: Path, name: str) -> None:
    """Fails if a file of a kind that is not written becomes a folder of that name."""
    message = f"{name}: a grid is written as PNG"
    refused(message, bundle, "--labels", 3, "--steps", 1, "-o", tmp_path / name, folder=tmp_path)
    recorded = with_record(tmp_path / "one.png", text)
    refused("choose --output picture.png", bundle, "--from-image", recorded, "-o", tmp_path / name, folder=tmp_path)


def test_a_negative_seed_is_made_again(bundle: Path, tmp_path: Path) -> None:
    """Fails if the seed -1 is not the seed 2⁶⁴ - 1, as in PyTorch, or its image cannot be made again."""
    path = tmp_path / "one.png"
    made(bundle, "--labels", 3, "--seed", -1, "--steps", 2, "-o", path)
    made(bundle, "--labels", 3, "--seed", 2**64 - 1, "--steps", 2, "-o", tmp_path / "same.png")
    assert record(path)["dit.seed"] == -1
    assert record(path)["dit.noise"] == record(tmp_path / "same.png")["dit.noise"]
    assert "the same as" in made(bundle, "--from-image", path, "-o", tmp_path / "again.png")


def test_the_threads_of_an_image_are_used_again(bundle: Path, tmp_path: Path) -> None:
    """Fails if an image is made again with other threads than its own, or the difference goes unsaid."""
    for name, arguments in (
        ("one", ("--labels", 3, "--threads", 2)),
        ("again", ("--from-image", tmp_path / "one.png")),
    ):
        steps = ("--steps", 2) if name == "one" else ()
        done = run_command(
            "dit-sample", bundle, "--engine", "onnxruntime", *arguments, *steps, "-o", tmp_path / f"{name}.png"
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert record(tmp_path / f"{name}.png")["dit.threads"] == 2
    assert np.array_equal(pixels(tmp_path / "one.png"), pixels(tmp_path / "again.png"))
    done = dit_sample(bundle, "--from-image", tmp_path / "one.png", "-o", tmp_path / "other.png")  # with one thread
    assert (done.code, len(done.err.splitlines())) == (0, 1)
    assert "was made with threads 2, this is 1: the last bits may differ" in done.err


@pytest.mark.parametrize("threads", ['"many"', "null", "[]"])
def test_damaged_threads(bundle: Path, text: dict[str, str], tmp_path: Path, threads: str) -> None:
    """Fails if a thread setting that is no number ends in a traceback."""
    path = with_record(tmp_path / "damaged.png", {**text, "dit.threads": threads})
    done = run_command(
        "dit-sample", bundle, "--engine", "onnxruntime", "--from-image", path, "-o", tmp_path / "again.png"
    )
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert "damaged" in done.stderr


def test_an_image_is_not_made_again_over_itself(bundle: Path, text: dict[str, str], tmp_path: Path) -> None:
    """Fails if making an image again replaces the one it is to be compared with."""
    asked = ("--from-image", tmp_path / "one.png", "-o", tmp_path / "one.png")
    refused("is the image to be made again", bundle, *asked, folder=tmp_path)


def test_a_written_table_is_the_samplers(bundle: Path, tmp_path: Path) -> None:
    """Fails if a table from --write-table makes another image than the sampler that it is of."""
    path, sampling = tmp_path / "table.json", ("--sampler", "ddpm", "--steps", 5)
    assert "ddpm, 5 steps, 5 rows" in made(bundle, *sampling, "--write-table", path)
    made(bundle, "--labels", 3, *sampling, "-o", tmp_path / "named.png")
    made(bundle, "--labels", 3, "--sampler", path, "-o", tmp_path / "read.png")
    assert np.array_equal(pixels(tmp_path / "named.png"), pixels(tmp_path / "read.png"))
    assert record(tmp_path / "named.png") == record(tmp_path / "read.png")
    path.write_text(path.read_text().replace('"spacing": "official"', '"spacing": "custom"'))
    made(bundle, "--labels", 3, "--sampler", path, "-o", tmp_path / "edited.png")
    refused("custom", bundle, "--from-image", tmp_path / "edited.png", "-o", tmp_path / "x.png", folder=tmp_path)
    made(bundle, "--from-image", tmp_path / "edited.png", "--sampler", path, "-o", tmp_path / "x.png")
    assert np.array_equal(pixels(tmp_path / "x.png"), pixels(tmp_path / "edited.png"))
