"""Cases of a soak: random legal work as values that JSON holds, so that a failing case can be run again."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Annotated, Any

import numpy as np

from dit_runtime.backends.base import Array, EngineInfo
from dit_runtime.bundle.macs import count_step_gmac
from dit_runtime.bundle.manifest import ENCODER, Manifest
from dit_runtime.core.decode import DecodeError, Natural, Positive, Range, decode, json_from_bytes
from dit_runtime.core.errors import SamplingError
from dit_runtime.samplers.by_name import TAKES_ETA, count_skipped_steps, samplers_for, schedule_for
from dit_runtime.samplers.guidance import SHAPES, Guidance, branches_from_labels, check_guidance
from dit_runtime.samplers.noise import check_seed
from dit_runtime.samplers.schedule import Schedule
from dit_runtime.samplers.spacing import DIFFUSERS, KARRAS, OFFICIAL
from dit_runtime.sampling.image_to_image import Init
from dit_runtime.sampling.labels import number_from_label, weights_from_label
from dit_runtime.sampling.requests import ImageRequest

SPACINGS = (None, *DIFFUSERS, KARRAS, *OFFICIAL)
MOST_IMAGES, MOST_BATCH, MOST_THREADS, MOST_REPEATS = 64, 1024, 64, 100_000
RELEASED = ("conditioner", "step", "decoder")
CASES_OF_A_SIZE = 8  # cases that follow each other at one size of the bundle, since each change opens an engine
WORK_GMAC = 4000.0  # of the step, for one case: some seconds on a large model
LEAST_ROWS, MOST_ROWS = 8, 200  # rows of all images of a case together
TRIES = 100


@dataclass(frozen=True)
class SoakImage:
    """One image of a case; the fields are those of ``Settings``.

    Attributes:
        labels: pairs of a class number and its weight.
        strength: the share of the steps to run on a start image, which is made from the seed; None starts from noise.
    """

    sampler: str
    steps: Positive = 1
    labels: tuple[tuple[int, float], ...] = ((0, 1.0),)
    seed: int = 0
    guidance: float = 1.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    guidance_schedule: str = "constant"
    negative_label: int | None = None
    spacing: str | None = None
    eta: float = 0.0
    strength: float | None = None


@dataclass(frozen=True)
class SoakCase:
    """Images, and how they are run.

    Attributes:
        images: in the order in which they join the batch.
        size: height and width of the images in pixels; None is the bundle's first size.
        batch: most images in the batch; the others join when one is finished.
        threads: threads that run the images at the same time on one engine, each in another order.
        repeats: how often each thread runs them.
        releases: graphs that are released before each repeat but the first.
        decoded: images in one call of the decoder; 0 decodes none.
    """

    images: tuple[SoakImage, ...]
    size: tuple[Positive, Positive] | None = None
    batch: Annotated[int, Range(1, MOST_BATCH)] = 1
    threads: Annotated[int, Range(1, MOST_THREADS)] = 1
    repeats: Annotated[int, Range(1, MOST_REPEATS)] = 1
    releases: tuple[str, ...] = ()
    decoded: Natural = 0


def json_from_cases(cases: Sequence[SoakCase]) -> str:
    """Cases as one line of JSON: an object, or a list of several. Fields with their default are left out."""
    plain = []
    for case in cases:
        values = _without_defaults(case)
        values["images"] = [_without_defaults(image) for image in case.images]
        plain.append(values)
    return json.dumps(plain[0] if len(plain) == 1 else plain)


def cases_from_json(text: str, manifest: Manifest) -> tuple[SoakCase, ...]:
    """The cases that ``json_from_cases`` wrote, or a user.

    Raises:
        SamplingError: not JSON, a field is unknown or has a wrong value, or the model cannot run it.
    """
    try:
        raw = json_from_bytes(text.encode(errors="surrogateescape"))
        given = raw if isinstance(raw, list) else [raw]
        cases = tuple(decode(SoakCase, _filled(item), "case") for item in given)
    except DecodeError as error:
        raise SamplingError(f"soak case: {error}; give one that dit-verify --soak printed") from error
    for case in cases:
        _check(case, manifest)
    if not cases:
        raise SamplingError("soak case: an empty list, expected at least one case")
    return cases


def _without_defaults(value: SoakCase | SoakImage) -> dict[str, Any]:
    values = asdict(value)
    return {field.name: values[field.name] for field in fields(value) if values[field.name] != field.default}


def _filled(raw: object) -> object:
    """A case with all its fields, for ``decode``: those that were left out have their defaults."""
    if not isinstance(raw, dict):
        return raw
    images = raw.get("images")
    if isinstance(images, list):
        images = [{**_defaults(SoakImage("")), **image} if isinstance(image, dict) else image for image in images]
    filled = {**_defaults(SoakCase(())), **raw}
    return {**filled, "images": images} if "images" in raw else filled


def _defaults(value: SoakCase | SoakImage) -> dict[str, Any]:
    """The fields that have a default, as JSON has them."""
    values: dict[str, Any] = json.loads(json.dumps(asdict(value)))
    return {name: item for name, item in values.items() if name not in ("images", "sampler")}


def _check(case: SoakCase, manifest: Manifest) -> None:
    """Raises SamplingError for what the model cannot run. The sizes are checked where the bundle is opened at them."""
    if not 1 <= len(case.images) <= MOST_IMAGES:
        raise SamplingError(f"soak case: {len(case.images)} images, expected 1 to {MOST_IMAGES}")
    if unknown := [graph for graph in case.releases if graph not in RELEASED]:
        raise SamplingError(f"soak case: releases {unknown[0]!r:.80}, expected only {', '.join(RELEASED)}")
    if any(image.strength is not None for image in case.images) and ENCODER not in manifest.graphs:
        raise SamplingError("soak case: an image has a strength, and the bundle has no encoder; leave strength out")
    for image in case.images:
        request_for(image, manifest, lambda _: _zeros(manifest))


def _zeros(manifest: Manifest) -> Array:
    return np.zeros((manifest.model.latent_channels, *manifest.model.latent_size), np.float32)


def start_image(image: SoakImage, manifest: Manifest) -> Array:
    """The image that an image of a case starts from, uint8 ``[H, W, 3]``: blocks of random colours."""
    height, width = manifest.image_size
    blocks = np.random.default_rng(image.seed % 2**64).integers(0, 256, (-(-height // 8), -(-width // 8), 3), np.uint8)
    return blocks.repeat(8, axis=0).repeat(8, axis=1)[:height, :width]


def request_for(
    image: SoakImage,
    manifest: Manifest,
    encode: Callable[[SoakImage], Array],
    known: dict[tuple[object, ...], Schedule] | None = None,
) -> ImageRequest:
    """The request of an image.

    Args:
        image: of a case.
        manifest: of the bundle at the case's size.
        encode: latents ``[C, h, w]`` of the image to start from.
        known: schedules that were made before; images with one schedule then share it, as those of a user do.

    Raises:
        SamplingError: the model cannot run the image.
    """
    model, diffusion = manifest.model, manifest.diffusion
    skipped = 0 if image.strength is None else count_skipped_steps(image.steps, image.strength)
    key = (image.sampler, image.steps, image.eta, image.spacing, skipped)
    known = {} if known is None else known
    if key not in known:
        known[key] = schedule_for(image.sampler, model, diffusion, image.steps, image.eta, image.spacing, skipped)
    guidance = Guidance(image.guidance, image.guidance_interval, image.guidance_schedule)
    negative = None if image.negative_label is None else number_from_label(image.negative_label, manifest)
    weights = weights_from_label(dict(image.labels), manifest)
    check_guidance(guidance, weights, diffusion)
    return ImageRequest(
        labels=weights,
        seed=check_seed(image.seed),
        schedule=known[key],
        guidance=guidance,
        negative_label=negative,
        branches=branches_from_labels(weights, guidance, known[key], model, diffusion, negative),
        init=None if image.strength is None else Init(encode(image), "soak"),
        strength=image.strength,
    )


def simplest_sampler(manifest: Manifest) -> str:
    """A sampler of this kind of model that has no memory and draws no noise."""
    return samplers_for(manifest.diffusion)[0]


def takes(info: EngineInfo, batch: int, branches: int) -> bool:
    """Whether an engine's step takes so many images with so many branches."""
    if info.max_batch is not None and batch > info.max_batch:
        return False
    ranges = info.profiles["step"].ranges() if "step" in info.profiles else ()
    return not ranges or any(each.largest[0] >= batch and each.largest[1] >= branches for each in ranges)


def draw_size(seed: int, index: int, sizes: Sequence[tuple[int, int]]) -> tuple[int, int] | None:
    """The size of the case ``index``, one of the bundle's; None where the bundle has one alone."""
    if len(sizes) == 1:
        return None
    return sizes[int(np.random.default_rng([seed, index // CASES_OF_A_SIZE, 1]).integers(len(sizes)))]


def draw_case(seed: int, index: int, manifest: Manifest, info: EngineInfo, size: tuple[int, int] | None) -> SoakCase:
    """The case ``index`` of a seed: legal work for this bundle and engine, and the same whenever it is drawn.

    Raises:
        SamplingError: no legal work was found.
    """
    rng = np.random.default_rng([seed, index])
    rows = int(np.clip(WORK_GMAC / (2 * count_step_gmac(manifest.model)), LEAST_ROWS, MOST_ROWS))
    most = int(rng.choice([1, 2, 3, 4, 5, 6, 7, 8, 12, 16]))
    shared = _draw_image(rng, manifest, info, rows) if rng.random() < 0.4 else None  # all images of one schedule
    images: list[SoakImage] = []
    for _ in range(int(rng.integers(1, most + 3))):
        drawn = _draw_image(rng, manifest, info, rows, shared)
        rows -= drawn.steps
        if rows < 0 and images:
            break
        images.append(drawn)
    branches = max(request_for(image, manifest, lambda _: _zeros(manifest)).branches.needed.max() for image in images)
    while not takes(info, most, int(branches)):
        most -= 1
        if most < 1:
            raise SamplingError(f"{info.name} takes no batch with {branches} guidance branches")
    threads = int(rng.choice([1, 1, 1, 2, 3]))
    repeats = int(rng.choice([1, 1, 2, 3]))
    releases = tuple(graph for graph in RELEASED if rng.random() < 0.3) if repeats > 1 and threads == 1 else ()
    decoded = min(int(rng.integers(0, most + 1)), len(images))
    return SoakCase(tuple(images), size, most, threads, repeats, releases, decoded)


def _draw_image(
    rng: np.random.Generator, manifest: Manifest, info: EngineInfo, rows: int, like: SoakImage | None = None
) -> SoakImage:
    """An image that the model and the engine can run, in ``rows`` steps at most; with the schedule of ``like``."""
    for _ in range(TRIES):
        drawn = _draw_settings(rng, manifest, max(rows, 2))
        if like is not None:
            drawn = SoakImage(**{**vars(drawn), **{name: getattr(like, name) for name in ("sampler", "steps", "eta")}})
            drawn = SoakImage(**{**vars(drawn), "spacing": like.spacing, "strength": like.strength})
        try:
            request = request_for(drawn, manifest, lambda _: _zeros(manifest))
        except SamplingError:
            continue  # settings that the sampler's reference cannot run
        if takes(info, 1, int(request.branches.needed.max())):
            return drawn
    raise SamplingError(f"{info.name}: no legal work was found in {TRIES} tries")


def _draw_settings(rng: np.random.Generator, manifest: Manifest, rows: int) -> SoakImage:
    flow, classes = bool(manifest.diffusion.path), manifest.model.classes
    sampler = str(rng.choice(samplers_for(manifest.diffusion)))
    chosen = rng.permutation(classes)[: min(int(rng.choice([1, 1, 1, 2, 3])), classes)].tolist()
    shares = rng.uniform(0.2, 1.0, len(chosen))
    weights = [round(float(share), 2) for share in shares / shares.sum()]
    low, high = (round(float(time), 2) for time in np.sort(rng.random(2)))
    guided = rng.random() < 0.75
    limited = guided and rng.random() < 0.3
    return SoakImage(
        sampler=sampler,
        steps=int(min(np.exp(rng.uniform(0, np.log(20))), rows)),
        labels=tuple(zip(chosen, weights if len(chosen) > 1 else [1.0], strict=True)),
        seed=int(rng.integers(2**32)),
        guidance=round(float(rng.uniform(1.1, 6)), 1) if guided else 1.0,
        guidance_interval=(low, high) if limited else (0.0, 1.0),
        guidance_schedule=str(rng.choice(SHAPES)) if guided and rng.random() < 0.4 else "constant",
        negative_label=int(rng.integers(classes)) if guided and rng.random() < 0.15 else None,
        spacing=None if flow or rng.random() < 0.5 else SPACINGS[int(rng.integers(len(SPACINGS)))],
        eta=round(float(rng.random()), 2) if sampler in TAKES_ETA and rng.random() < 0.4 else 0.0,
        strength=round(float(rng.uniform(0.3, 1)), 2) if ENCODER in manifest.graphs and rng.random() < 0.25 else None,
    )


def coverage_of(case: SoakCase) -> Mapping[str, set[Any]]:
    """The values of each field that decides an engine's work."""
    return {
        "batches": {min(case.batch, len(case.images))},
        "sizes": set() if case.size is None else {"x".join(map(str, case.size))},
        "threads": {case.threads},
        "samplers": {image.sampler for image in case.images},
        "labels of an image": {len(image.labels) for image in case.images},
        "classes": {number for image in case.images for number, _ in image.labels},
    }
