"""Starting from an image: schedules that start inside, the whole way against diffusers, the command and its records.

diffusers' image-to-image pipelines leave out the first steps (``get_timesteps``), tell the scheduler
(``set_begin_index``), add noise to the encoded image (``add_noise``) and run the rest. That is done here with its
schedulers and a seeded dummy network, and with its modules. The float64 oracles are those of ``test_solvers`` and
``test_flow``, started inside.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.optional import diffusers, torch
from support.sample_command import dit_sample, made, pixels, record, refused, shapes, with_record
from support.schedules import (
    DIFFUSION,
    LEARNED,
    assert_same,
    steps_left_out,
    timesteps_of,
)

from dit_runtime import Pipeline, Schedule, open_bundle, read_table, schedule_for, write_table
from dit_runtime.core.errors import BundleError, SamplingError
from dit_runtime.samplers.flow import flow_sde
from dit_runtime.samplers.schedule import skip_steps
from dit_runtime.verify.metrics import psnr

LATENT_LIMIT = 6e-6  # measured: 1.6e-6, and 2.9e-6 of the encoder

SIZES = ((32, 32), (32, 48))  # of three


@pytest.fixture(scope="module")
def folder(sized_bundle: Path) -> Path:
    return sized_bundle


@pytest.fixture(scope="module")
def pipe(folder: Path) -> Pipeline:
    return Pipeline(folder, "onnxruntime", threads=1)


@pytest.fixture(scope="module")
def autoencoder(checkpoint: Path) -> diffusers.AutoencoderKL:
    return diffusers.AutoencoderKL.from_pretrained(checkpoint / "vae").eval()


def photo(seed: int, height: int = 32, width: int = 32) -> np.ndarray:
    """An image: gradients and discs."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    image = np.stack([x * 255 / width, y * 255 / height, (x + y) * 127 / 32], axis=-1)
    for _ in range(3):
        center, color = random.uniform(0, 32, 2), random.uniform(0, 255, 3)
        image[np.hypot(y - center[0], x - center[1]) < 8] = color
    return image.clip(0, 255).astype(np.uint8)


def save(path: Path, image: np.ndarray) -> Path:
    Image.fromarray(image).save(path)
    return path


def encoded(autoencoder: diffusers.AutoencoderKL, images: np.ndarray) -> torch.Tensor:
    """The mean of the posterior, scaled, as diffusers' pipelines encode with ``sample_mode="argmax"``."""
    x = torch.from_numpy(images).float().permute(0, 3, 1, 2) / 127.5 - 1
    with torch.inference_mode():
        return autoencoder.encode(x).latent_dist.mode() * autoencoder.config.scaling_factor


def reference_latents(
    transformer: Any, scheduler: Any, x_0: torch.Tensor, labels: list[int], seeds: list[int], **how: Any
) -> np.ndarray:
    """diffusers' modules and scheduler as its image-to-image pipelines run them; one generator per image."""
    steps, guidance = how["steps"], how["guidance"]
    scheduler.set_timesteps(steps)
    skipped = steps_left_out(steps, how["strength"])
    timesteps = scheduler.timesteps[skipped:]
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(skipped)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    noise = torch.cat([torch.randn(1, *x_0.shape[1:], generator=generator) for generator in generators])
    z = scheduler.add_noise(x_0.expand_as(noise), noise, timesteps[:1])
    y = torch.tensor(labels)
    options = {"eta": how["eta"], "generator": generators} if "eta" in how else {}
    if getattr(scheduler.config, "algorithm_type", "").startswith("sde"):
        options = {"generator": generators}
    with torch.inference_mode():
        for t in timesteps:
            cond, null = (
                transformer(z, timestep=t.expand(len(z)), class_labels=classes).sample[:, :4]
                for classes in (y, torch.full_like(y, 10))
            )
            z = scheduler.step(null + guidance * (cond - null), t, z, **options).prev_sample
    return z.numpy()


BETAS = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
# sampler → diffusers' scheduler by name, its settings, and the pipeline's
REFERENCES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {"clip_sample": False}, {"eta": 0.0}),
    "ddim, eta": ("DDIMScheduler", {"clip_sample": False}, {"eta": 0.7}),
    "dpmpp-2m": ("DPMSolverMultistepScheduler", {}, {"spacing": "linspace"}),
    "dpmpp-3m": ("DPMSolverMultistepScheduler", {"solver_order": 3}, {"spacing": "linspace"}),
    "dpmpp-2m-sde": (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "sde-dpmsolver++"},
        {"spacing": "linspace"},
    ),
    "unipc": ("UniPCMultistepScheduler", {}, {"spacing": "linspace"}),
}


@pytest.mark.parametrize("case", REFERENCES)
@pytest.mark.parametrize("strength", [0.3, 0.6, 1.0])
def test_images_from_an_image_are_pytorchs(
    pipe: Pipeline, transformer: Any, autoencoder: diffusers.AutoencoderKL, case: str, strength: float
) -> None:
    """Fails if encoding, noise, start, draws or rows of image-to-image are not diffusers', from pixels to pixels."""
    kind, settings, options = REFERENCES[case]
    scheduler = getattr(diffusers, kind)(**BETAS, **settings)
    images, labels, seeds = np.stack([photo(1), photo(2)]), [3, 7], [21, 2**40 + 5]
    how = {"steps": 10, "guidance": 2.0, "strength": strength}
    expected = reference_latents(transformer, scheduler, encoded(autoencoder, images), labels, seeds, **how, **options)
    sampling: dict[str, Any] = {"sampler": case.partition(",")[0], "init": images, **how, **options}
    *_, (_, found, _) = pipe.trajectory(labels, seeds, **sampling)
    assert np.abs(found - expected).max() <= LATENT_LIMIT * np.abs(expected).max()
    with torch.inference_mode():
        decoded = autoencoder.decode(torch.from_numpy(expected) / autoencoder.config.scaling_factor).sample
    finished = ((decoded / 2 + 0.5).clamp(0, 1) * 255).round().permute(0, 2, 3, 1).numpy().astype(np.uint8)
    assert psnr(pipe(labels, seeds, **sampling), finished) >= 75  # measured: 86 dB, or no difference


def test_the_encoder_is_diffusers(folder: Path, autoencoder: diffusers.AutoencoderKL) -> None:
    """Fails if an image's latents are not the scaled mean, at another size too, or depend on the others beside it."""
    for size in SIZES:
        pipe = Pipeline(folder, "onnxruntime", 1, size)
        images = np.stack([photo(seed, *size) for seed in range(3)])
        found, expected = pipe.encode(images), encoded(autoencoder, images).numpy()
        assert found.dtype == np.float32
        assert found.shape == (3, *pipe.latent_shape)
        assert np.abs(found - expected).max() <= LATENT_LIMIT * np.abs(expected).max()
        assert np.array_equal(found[1:2], pipe.encode(images[1:2]))


def test_encoded_latents_that_are_no_numbers(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if an encoder that overflows is not named, or is named only after the first step as the step's fault."""
    session = pipe.engine.session("encoder")
    latents = np.full((1, *pipe.latent_shape), np.inf, np.float32)
    monkeypatch.setattr(session, "run", lambda inputs, outputs: [latents])
    with pytest.raises(SamplingError, match="encoded latents are not finite on onnxruntime"):
        pipe([3], init=np.zeros((32, 32, 3), np.uint8), steps=2)


def test_one_image_for_all_or_one_each(pipe: Pipeline) -> None:
    """Fails if images, their latents, and what ``inits`` makes of either do not start the same way."""
    first, second = photo(1), photo(2)
    how: dict[str, Any] = {"steps": 5, "sampler": "dpmpp-2m", "guidance": 1.0}

    def made(init: Any) -> np.ndarray:
        *_, (_, latents, _) = pipe.trajectory([3, 4], 7, init=init, **how)
        return latents

    one = made(first)
    assert one.shape == (2, 4, 8, 8)
    latents = pipe.encode(np.stack([first, second]))
    for same in (first[None], np.stack([first, first]), latents[0], latents[:1], pipe.inits(first, 2)):
        assert np.array_equal(made(same), one)
    each = made(np.stack([first, second]))
    for same in (latents, pipe.inits(latents, 2), pipe.inits(np.stack([first, second]), 2)):
        assert np.array_equal(made(same), each)
    assert np.array_equal(each[0], one[0])
    assert np.abs(each[1] - one[1]).max() > 0.1
    default, named = made(first), pipe.trajectory([3, 4], 7, init=first, strength=0.6, **how)
    *_, (index, found, _) = named
    assert index == 2  # three of five steps
    assert np.array_equal(found, default)


def test_noise_of_a_file_is_the_noise_on_the_image(pipe: Pipeline) -> None:
    """Fails if given noise is not what is added to the image, or the seed's first draw is lost to it."""
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5)).numpy()
    how: dict[str, Any] = {"steps": 4, "sampler": "ddim", "guidance": 1.0, "init": photo(3)}
    drawn = list(pipe.trajectory([3], 5, **how))[-1][1]
    given = list(pipe.trajectory([3], 99, noise=noise, **how))[-1][1]
    assert np.abs(given - drawn).max() <= 5e-6  # measured: 9.5e-7
    (image,) = pipe.prepare([3], 5, **how)
    z, stream = image.make_initial_latents((4, 8, 8))
    signal, spread = image.schedule.initial[0]
    expected = signal * pipe.encode(photo(3)[None])[0] + spread * noise[0]
    assert np.abs(z - expected).max() <= 1e-6
    again = torch.Generator().manual_seed(5)
    torch.randn(1, 4, 8, 8, generator=again)
    second = torch.randn(1, 4, 8, 8, generator=again).numpy()[0]
    assert np.abs(stream.normal((4, 8, 8), "float32") - second).max() <= 1e-6


def test_a_small_strength_stays_near_the_image(pipe: Pipeline) -> None:
    """Fails if strength goes the wrong way: the less of it, the nearer the latents stay to the image's."""
    latents = pipe.encode(photo(1)[None])
    distances = []
    for strength in (0.1, 0.3, 0.6, 1.0):
        (image,) = pipe.prepare([3], 7, steps=10, sampler="ddim", init=latents, strength=strength)
        z, _ = image.make_initial_latents((4, 8, 8))
        distances.append(np.abs(z - latents[0]).mean())
    assert distances == sorted(distances)
    assert distances[0] < 0.5 * distances[-1]


def custom(tmp_path: Path, **changes: Any) -> Schedule:
    """A table of four rows and three steps; slot 1 is written in row 0 and read in row 1 only."""
    coefficients = np.zeros((4, 17))
    coefficients[:, [0, 2]] = 1, 0.9
    coefficients[:, 1] = -0.1
    coefficients[0, 14 - 1] = 0.0
    coefficients[0, 5] = 0.5  # slot 1 from slot 0
    coefficients[1, 3] = 0.1  # slot 0 from slot 1
    table = {
        "timesteps": [900.0, 600.0, 300.0],
        "rows": [0, 1, 2, 1],
        "coefficients": coefficients.tolist(),
        "initial": [[0.1, 0.99], [0.4, 0.9], [0.8, 0.6], [0.9, 0.4]],
        "completes_step": [False, True, True, True],
        **changes,
    }
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(table))
    return read_table(path)


def test_a_table_of_ones_own_from_inside(pipe: Pipeline, tmp_path: Path) -> None:
    """Fails if a custom table is not cut at the boundary of its steps, with the scales that it has there."""
    table, latents = custom(tmp_path), pipe.encode(photo(1)[None])
    for strength, first in ((1.0, 0), (0.7, 2), (0.4, 3)):
        (image,) = pipe.prepare([3], 7, sampler=table, init=latents, strength=strength)
        schedule = image.schedule
        assert np.array_equal(schedule.coefficients, table.coefficients[first:])
        assert timesteps_of(schedule) == timesteps_of(table)[first:]
        assert schedule.initial.tolist() == table.initial[first:].tolist()
        assert schedule.steps + schedule.skipped == 3
        assert len(list(pipe.iterate_steps([image]))) == schedule.steps
    assert sorted(set(schedule.rows.tolist())) == list(range(len(schedule.timesteps)))


def test_a_table_that_cannot_start_inside(pipe: Pipeline, tmp_path: Path) -> None:
    """Fails if memory that was never written is read, or scales that nobody gave are used, without a word."""
    latents = pipe.encode(photo(1)[None])
    wrong: list[tuple[Schedule, float, str]] = [
        (
            custom(tmp_path, completes_step=[True] * 4),
            0.8,
            r"after step 1, row 1 reads slot 1, which only skipped rows write",
        ),
        (custom(tmp_path, initial=[[0, 1]] * 4), 0.7, r"its initial is \[0, 1\] in every row"),
        (custom(tmp_path, initial=[[0, 1]] * 4), 1.0, r"its initial is \[0, 1\] in every row"),
        (custom(tmp_path, start=[0.8, 0.6]), 0.7, "it starts from 2 draws of noise, expected one"),
        (custom(tmp_path), 0.3, "strength 0.3 of 3 steps leaves none to run; the smallest that leaves one is 0.333334"),
        (schedule_for("dpmpp-2m", LEARNED, DIFFUSION, 10), 0.6, r"after step 4, row 4 reads slot 1"),
    ]
    for table, strength, message in wrong:
        with pytest.raises(SamplingError, match=message) as refusal:
            pipe.prepare([3], sampler=table, init=latents, strength=strength)
        assert "\n" not in str(refusal.value)
    for table in (custom(tmp_path, start=[0.8, 0.6]), schedule_for("dpmpp-2m", LEARNED, DIFFUSION, 10)):
        (image,) = pipe.prepare([3], sampler=table, init=latents, strength=1.0)
        assert image.schedule is table


def test_a_table_that_starts_inside_needs_an_image(pipe: Pipeline, tmp_path: Path) -> None:
    """Fails if rows whose first ones are left out start from pure noise, or have more of them left out."""
    path, partial = tmp_path / "partial.json", schedule_for("unipc", LEARNED, DIFFUSION, 10, skipped=4)
    write_table(partial, path)
    assert_same(read_table(path), partial)
    with pytest.raises(SamplingError, match=r"it starts after step 4, from an image; give the image"):
        pipe.prepare([3], sampler=partial)
    with pytest.raises(
        SamplingError, match=r"it starts after step 4 already, and strength 0.6 is for sampler tables of all steps"
    ):
        pipe.prepare([3], sampler=partial, init=photo(1), strength=0.6)
    (image,) = pipe.prepare([3], sampler=partial, init=photo(1))
    (named,) = pipe.prepare([3], sampler="unipc", steps=10, init=photo(1), strength=0.6)
    assert_same(image.schedule, named.schedule)
    heun = flow_sde("linear", 10, "heun", form="constant", skipped=4)
    assert (len(heun), heun.steps, heun.skipped) == (11, 6, 4)  # five steps of two rows, and the last
    whole = flow_sde("linear", 10, "heun", form="constant")
    assert heun.start[1] == whole.coefficients[7, 16]  # the noise that the step before would have added
    with pytest.raises(SamplingError, match="2 draws of noise"):
        skip_steps(whole, 4)
    for value in (-1, 0.5, "4", 1e9):
        path.write_text(json.dumps({**json.loads(path.read_text()), "skipped": value}))
        with pytest.raises(SamplingError, match="skipped"):
            read_table(path)


def test_inits_that_do_not_fit(pipe: Pipeline, bundles: dict[str, Path]) -> None:
    """Fails if an image of another size, number or kind is used, or refused without what was got and expected."""
    good, latents = photo(1), pipe.encode(photo(1)[None])
    wrong: list[tuple[Any, str]] = [
        (photo(1, 32, 48), r"an image of 32x48 pixels, expected 32x32; resize the image"),
        (np.stack([good] * 3), r"uint8 \[3, 32, 32, 3\]; expected images, uint8 \[2, 32, 32, 3\]"),
        (good[..., :1], r"uint8 \[1, 32, 32, 1\]; expected"),
        (good[0], r"uint8 \[32, 3\]; expected"),
        (good / 255, r"float64 \[1, 32, 32, 3\]; expected"),
        (latents.astype(np.float64), r"float64 \[1, 4, 8, 8\]; expected"),
        (latents[:, :3], r"float32 \[1, 3, 8, 8\]; expected images, .* latents, float32 \[2, 4, 8, 8\]"),
        (np.full_like(latents, np.nan), "the latents are not finite"),
        (pipe.inits(good, 3), "3 inits for 2 images"),
        ([good, good], "2 inits for 2 images: expected one array, or a list from Pipeline.inits"),
        (np.zeros((0, 32, 32, 3), np.uint8), r"uint8 \[0, 32, 32, 3\]; expected"),
    ]
    for init, message in wrong:
        with pytest.raises(SamplingError, match=message):
            pipe.prepare([1, 2], init=init)
    with pytest.raises(SamplingError, match=r"strength 0.5 without an image"):
        pipe.prepare([1, 2], strength=0.5)
    without = Pipeline(bundles["fp32"], "onnxruntime", threads=1)
    with pytest.raises(SamplingError, match=r"has no encoder.*dit-export --encoder"):
        without.prepare([1, 2], init=good)
    assert len(without.prepare([1, 2], init=latents)) == 2


def test_a_pipeline_at_another_size(folder: Path) -> None:
    """Fails if ``size`` does not choose the graphs of that size, or one that is not there is not refused."""
    pipe = Pipeline(folder, "onnxruntime", 1, (32, 48))
    assert pipe.latent_shape == (4, 8, 12)
    assert pipe([3], 7, steps=2).shape == (1, 32, 48, 3)
    assert Pipeline(open_bundle(folder).at((32, 48)), "onnxruntime", 1).latent_shape == (4, 8, 12)
    with pytest.raises(BundleError, match=r"no graphs for images of 64x64, only for 32x32, 32x48, 48x48"):
        Pipeline(folder, "onnxruntime", 1, (64, 64))


FROM = ("--steps", 10, "--sampler", "dpmpp-2m", "--guidance", 2)


def test_the_command_starts_from_an_image(pipe: Pipeline, folder: Path, tmp_path: Path) -> None:
    """Fails if the command's image is not the pipeline's, or its record does not say what it started from."""
    init, path = save(tmp_path / "init.png", photo(1)), tmp_path / "out.png"
    out = made(folder, "--labels", 3, "--seed", 7, *FROM, "--init", init, "--strength", 0.5, "-o", path)
    assert "dpmpp-2m 10 steps at strength 0.5" in out
    how: dict[str, Any] = {"steps": 10, "sampler": "dpmpp-2m", "guidance": 2.0}
    assert np.array_equal(pixels(path), pipe([3], 7, init=photo(1), strength=0.5, **how)[0])
    found = record(path)
    assert (found["dit.steps"], found["dit.strength"], found["dit.size"]) == (10, 0.5, [32, 32])
    assert re.fullmatch("[0-9a-f]{16}", found["dit.init"])
    made(folder, "--labels", 3, "--seed", 7, *FROM, "--init", init, "-o", tmp_path / "default.png")
    assert record(tmp_path / "default.png")["dit.strength"] == 0.6
    assert np.array_equal(pixels(tmp_path / "default.png"), pipe([3], 7, init=photo(1), **how)[0])


def test_an_image_from_an_image_is_made_again(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if it is not made again bit for bit from its file and the image it started from, or from another too."""
    init, other = save(tmp_path / "init.png", photo(1)), save(tmp_path / "other.png", photo(2))
    sampling = ("--labels", 1, 2, 3, *FROM, "--seed", 90, "--init", init, "--strength", 0.7)
    with shapes(monkeypatch) as before:
        made(folder, *sampling, "-o", tmp_path / "three")
    path, again = sorted((tmp_path / "three").iterdir())[1], tmp_path / "again.png"
    asked = ("--from-image", path, "-o", again)
    refused("and none is named; name its file with --init", folder, *asked, folder=tmp_path)
    refused("name its file with --init", folder, *asked, "--init", other, folder=tmp_path)
    refused("--strength with --from-image", folder, *asked, "--init", init, "--strength", 0.7, folder=tmp_path)
    with shapes(monkeypatch) as after:
        assert f"the same as {path}" in made(folder, *asked, "--init", init)
    assert after == before
    assert np.array_equal(pixels(again), pixels(path))
    assert record(again) == record(path)
    made(folder, "--labels", 1, *FROM, "-o", tmp_path / "plain.png")
    asked = ("--from-image", tmp_path / "plain.png", "--init", init, "-o", tmp_path / "x.png")
    refused("made from noise alone, not from an image: leave --init out", folder, *asked, folder=tmp_path)


def test_a_grid_of_latents_is_made_again(folder: Path, pipe: Pipeline, tmp_path: Path) -> None:
    """Fails if a grid that started from one latent each, in several batches, is not made again from their file."""
    latents = pipe.encode(np.stack([photo(seed) for seed in range(3)]))
    np.save(tmp_path / "latents.npy", latents)
    np.save(tmp_path / "second.npy", latents[1])
    init, path = ("--init", tmp_path / "latents.npy"), tmp_path / "grid.png"
    made(folder, "--labels", 1, 2, 3, *FROM, *init, "--batch-size", 2, "-o", path)
    assert len(set(record(path)["dit.init"])) == 3
    made(folder, "--from-image", path, *init, "-o", tmp_path / "again.png")
    assert np.array_equal(pixels(tmp_path / "again.png"), pixels(path))
    made(folder, "--labels", 1, 2, 3, *FROM, *init, "-o", tmp_path / "three")
    second = sorted((tmp_path / "three").iterdir())[1]
    for name in ("latents", "second"):
        out = made(folder, "--from-image", second, "--init", tmp_path / f"{name}.npy", "-o", tmp_path / f"{name}.png")
        assert f"the same as {second}" in out


def test_an_image_of_another_size_is_made_again(folder: Path, tmp_path: Path) -> None:
    """Fails if ``--size`` is not what is made, or not restored from the record."""
    init, path = save(tmp_path / "init.png", photo(1, 32, 48)), tmp_path / "wide.png"
    made(folder, "--labels", 3, 4, *FROM, "--size", "32x48", "--init", init, "-o", path)
    assert pixels(path).shape == (32, 96, 3)
    assert record(path)["dit.size"] == [32, 48]
    made(folder, "--from-image", path, "--init", init, "-o", tmp_path / "again.png")
    assert np.array_equal(pixels(tmp_path / "again.png"), pixels(path))
    for size in ("[32]", '"ab"', "[64, 64]", "[32, 0]", "7", "null"):
        with Image.open(path) as image:
            damaged = {**image.text, "dit.size": size}
        asked = ("--from-image", with_record(tmp_path / "damaged.png", damaged), "-o", tmp_path / "x.png")
        refused("no graphs for" if size == "[64, 64]" else "damaged", folder, *asked, folder=tmp_path)


def test_other_starts_make_an_image_again(folder: Path, tmp_path: Path) -> None:
    """Fails if a folder keeps an image that another init, strength or size would not make."""
    first, second = save(tmp_path / "first.png", photo(1)), save(tmp_path / "second.png", photo(2))
    wide = save(tmp_path / "wide.png", photo(1, 32, 48))
    arguments = ["--labels", 1, *FROM, "--json", "-o", tmp_path / "one"]
    for change, count in (
        ((), 1),
        (("--init", first), 1),
        (("--init", first), 0),
        (("--init", first, "--strength", 0.6), 0),
        (("--init", first, "--strength", 0.5), 1),
        (("--init", second, "--strength", 0.5), 1),
        (("--size", "32x48"), 1),
        (("--size", "32x48"), 0),
        (("--size", "32x48", "--init", wide), 1),
        ((), 1),
        (("--size", "32x32"), 0),
    ):
        assert len(json.loads(made(folder, *arguments, *change))["files"]) == count, change


def test_images_of_other_files(folder: Path, tmp_path: Path) -> None:
    """Fails if an image of another format, with transparency, gray or turned by its camera starts as other pixels."""
    image = Image.fromarray(photo(1))
    image.save(tmp_path / "plain.png")
    image.save(tmp_path / "photo.bmp")
    image.convert("RGBA").save(tmp_path / "alpha.png")
    turned, exif = image.transpose(Image.Transpose.ROTATE_90), Image.Exif()
    exif[0x0112] = 6  # to be shown turned by a quarter clockwise
    turned.save(tmp_path / "turned.png", exif=exif)
    hashes = set()
    for name in ("plain.png", "photo.bmp", "alpha.png", "turned.png"):
        made(folder, "--labels", 3, *FROM, "--init", tmp_path / name, "-o", tmp_path / "out.png")
        hashes.add(record(tmp_path / "out.png")["dit.init"])
    assert len(hashes) == 1
    image.convert("L").save(tmp_path / "gray.png")
    made(folder, "--labels", 3, *FROM, "--init", tmp_path / "gray.png", "-o", tmp_path / "out.png")


def test_wrong_arguments(folder: Path, bundles: dict[str, Path], tmp_path: Path) -> None:
    """Fails if a wrong argument of image-to-image or size is not one line with what was got and expected."""
    init, wide = save(tmp_path / "init.png", photo(1)), save(tmp_path / "wide.png", photo(1, 32, 48))
    text, array = tmp_path / "text.png", tmp_path / "array.npy"
    text.write_text("no image")
    np.save(array, np.zeros((4, 8, 8)))
    cut = tmp_path / "cut.png"
    cut.write_bytes(init.read_bytes()[:100])
    wrong: list[tuple[list[object], str]] = [
        (["--strength", 0.5], "strength 0.5 without an image to start from; give an image (--init)"),
        (["--init", init, "--strength", 0], "strength 0: expected above 0 to 1"),
        (["--init", init, "--strength", 1.5], "strength 1.5: expected above 0 to 1"),
        (["--init", init, "--strength", "nan"], "strength nan: expected above 0 to 1"),
        (["--init", init, "--strength", "much"], "invalid float value: 'much'"),
        (["--init", init, "--strength", 0.05, "--steps", 10], "the smallest that leaves one is 0.1"),
        (["--init", init, "--steps", 0], "0 steps: expected 1 to 1000"),
        (["--init", tmp_path / "missing.png"], "missing.png: cannot be read as an image"),
        (["--init", tmp_path], "cannot be read as an image"),
        (["--init", text], "text.png: cannot be read as an image"),
        (["--init", cut], "cut.png: cannot be read as an image"),
        (["--init", array], "cannot be read as latents (float64 [4, 8, 8], expected float32"),
        (["--init", tmp_path / "missing.npy"], "missing.npy: cannot be read as latents"),
        (["--init", wide], "an image of 32x48 pixels, expected 32x32"),
        (["--init", init, "--size", "32x48"], "an image of 32x32 pixels, expected 32x48"),
        (["--size", "64x64"], "has no graphs for images of 64x64, only for 32x32, 32x48, 48x48"),
        (["--size", "32"], "got '32', expected HEIGHTxWIDTH"),
        (["--size", "0x32"], "got '0x32', expected HEIGHTxWIDTH"),
        (["--size=-32x32"], "got '-32x32', expected HEIGHTxWIDTH"),
        (["--init", init, "--write-table", tmp_path / "t.json"], "--init with --write-table"),
        (["--strength", 1, "--write-table", tmp_path / "t.json"], "--strength with --write-table"),
    ]
    for arguments, message in wrong:
        labels = () if "--write-table" in arguments else ("--labels", 1)
        refused(message, folder, *labels, *arguments, "-o", tmp_path / "out.png", folder=tmp_path)
    arguments = ["--labels", 1, "--init", init, "-o", tmp_path / "out.png"]
    refused("has no encoder", bundles["fp32"], *arguments, folder=tmp_path)
    done = dit_sample(folder, "--from-image", init, "--size", "32x48", "-o", tmp_path / "out.png")
    assert (done.code, "--size with --from-image" in done.err) == (1, True)
