"""Sample images from labels and seeds: numpy code around an engine."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property, lru_cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dit_runtime.backends.base import Engine, check_threads
from dit_runtime.backends.profiles import BatchShape
from dit_runtime.bundle.manifest import ENCODER, Manifest
from dit_runtime.bundle.precision import QUANTIZED, Precision
from dit_runtime.bundle.reader import Bundle, open_bundle
from dit_runtime.core.errors import SamplingError
from dit_runtime.samplers.by_name import count_default_steps, count_skipped_steps, schedule_for
from dit_runtime.samplers.guidance import Branches, Guidance, branches_from_labels, check_guidance
from dit_runtime.samplers.noise import CudaNoise, Float32, check_seed
from dit_runtime.samplers.schedule import Schedule
from dit_runtime.sampling.batch import Advance, Batch
from dit_runtime.sampling.image_to_image import (
    STRENGTH,
    Init,
    Start,
    encode_inits,
    schedule_from_start,
)
from dit_runtime.sampling.labels import Label, list_labels, number_from_label, weights_from_label
from dit_runtime.sampling.requests import ImageRequest
from dit_runtime.sampling.settings import Settings, check_whole, scales_from_setting
from dit_runtime.sampling.tables import check_table, describe_difference
from dit_runtime.sampling.tiles import check_tile, decode_in_tiles, images_from_decoded
from dit_runtime.verify.auto import Choice, check_choice, choose_engine, open_named_engine

if TYPE_CHECKING:
    from typing_extensions import Unpack

logger = logging.getLogger(__name__)


class Pipeline:
    """A bundle with an engine, ready to sample. PyTorch is not imported.

    Args:
        bundle: a bundle's folder, or an opened bundle.
        engine: ``auto`` (the fastest engine with a passing verdict; the quick verification runs first where there is no
            verdict), an engine's name (used without a verdict, unless it is weakly typed), or an ``Engine`` for this
            bundle at this size.
        threads: threads of the CPU, for an engine that is opened here; 0 lets the engine choose.
        size: height and width of the images in pixels, one of ``manifest.image_sizes``; None is the first, or the size
            of an opened bundle.
        precision: ``fp32`` or ``bf16``, for an engine that is named and has a choice (OpenVINO); None is the engine's
            default.
        once: whether each graph frees its memory when its work is done: the conditioner before the loop, the step
            before the decoder. A second run loads the graphs again.

    Raises:
        BundleError: the bundle is missing, incomplete or altered, or has no graphs for that size.
        SamplingError: the bundle is a policy's.
        EngineError: the engine's name is unknown, its library is not installed, or there are too many threads.
        ParityError: an engine that is weakly typed does not match the reference.
    """

    of_policies = False  # whether bundles of policies are taken, whose latents are actions

    def __init__(
        self,
        bundle: str | Path | Bundle,
        engine: str | Engine = "auto",
        threads: int = 0,
        size: tuple[int, int] | None = None,
        precision: str | None = None,
        once: bool = False,
    ) -> None:
        self.once = once
        self.bundle = (bundle if isinstance(bundle, Bundle) else open_bundle(bundle)).at(size)
        if not self.of_policies:
            check_makes_images(self.bundle)
        check_choice(engine if isinstance(engine, str) else "", precision)
        check_threads(threads)
        self._threads = threads
        self._said = set[str]()  # lines that are logged once
        if engine != "auto":
            self.engine = (
                open_named_engine(self.bundle, engine, threads, precision) if isinstance(engine, str) else engine
            )

    @cached_property
    def engine(self) -> Engine:
        """The engine. ``auto`` chooses it at first use, so that errors in arguments are raised before that work.

        Raises:
            EngineError: no engine is installed.
            ParityError: no engine matches the reference.
        """
        return self.choice.engine

    @cached_property
    def choice(self) -> Choice:
        """What ``auto`` chooses, and why; it raises as ``engine`` does. An engine that was given has no choice."""
        return choose_engine(self.bundle, self._threads)

    @property
    def manifest(self) -> Manifest:
        return self.bundle.manifest

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image's latents."""
        return (self.manifest.model.latent_channels, *self.manifest.model.latent_size)

    def __call__(
        self, labels: Sequence[Label] | Label, seeds: Sequence[int] | int = 0, **settings: Unpack[Settings]
    ) -> NDArray[np.uint8]:
        """Sample images, all in one batch.

        Args:
            labels: one for each image: a class number or name, or weights of several classes
                (``{"Sneaker": 0.7, 8: 0.3}``). A label that is not in a list is one image's.
            seeds: one for each image, or a number N for the seeds N, N+1, …. A seed gives the noise of
                ``torch.Generator().manual_seed(seed)``, from -2⁶³ to 2⁶⁴-1. An image depends on its own seed only, not
                on the batch.
            settings: the keys of ``Settings``: ``steps``, ``guidance``, ``sampler``, ….

        Returns:
            Images, uint8 ``[N, H, W, 3]``.

        Raises:
            SamplingError: an argument does not fit the model, or latents are not finite.
        """
        images = self.prepare(labels, seeds, **settings)
        self.check_batch(len(images))
        return self.decode(self.sample_latents(images))

    def trajectory(
        self, labels: Sequence[Label] | Label, seeds: Sequence[int] | int = 0, **settings: Unpack[Settings]
    ) -> Iterator[tuple[int, Float32, Float32]]:
        """Sample like ``__call__``, and yield ``(index, latents, denoised)`` after each completed step.

        ``latents`` and ``denoised`` (the current estimate of the clean latents) are float32 ``[N, C, H, W]``. They are
        copies, which you may keep. The arguments are checked before this method returns. Arguments and errors are those
        of ``__call__``.
        """
        images = self.prepare(labels, seeds, **settings)
        self.check_batch(len(images))
        return self.iterate_steps(images)

    def iterate_steps(self, images: Sequence[ImageRequest]) -> Iterator[tuple[int, Float32, Float32]]:
        """``trajectory`` for prepared images that share one schedule."""
        for completed, step in enumerate(self._run_steps(images, read=True)):
            yield completed, step.latents.copy(), step.denoised.copy()

    def sample_latents(self, images: Sequence[ImageRequest], completed: Callable[[], None] = lambda: None) -> Float32:
        """Sample prepared images that share one schedule, and return their last latents, float32 ``[N, C, H, W]``.

        Args:
            images: from ``prepare``.
            completed: called after each completed step. An engine that keeps latents on its device calls it when the
                step is queued, at most two steps before the step is done.

        Raises:
            SamplingError: latents are not finite.
        """
        for step in self._run_steps(images, read=False):
            completed()
            last = step
        return last.latents.copy()

    def _run_steps(self, images: Sequence[ImageRequest], read: bool) -> Iterator[Advance]:
        """Run the rows of images that share one schedule, and yield the completed steps."""
        released = False
        needed = np.max([image.branches.needed for image in images], axis=0) if images else []
        for branches in sorted(set(map(int, needed))):
            self.trust((len(images), branches))
        with Batch(self.engine, self.manifest) as batch:
            batch.add(list(enumerate(images)))
            while len(batch):
                step = batch.advance(read)
                if batch.failure is not None:
                    raise batch.failure
                if (
                    self.once and not released
                ):  # the first step computed the conditioning table of all steps, if it fits
                    self.engine.release("conditioner")
                    released = True
                if step.completed[0]:
                    yield step
        if self.once:
            self.engine.release("step")

    def trust(self, shape: BatchShape) -> None:
        """Let an engine that ``auto`` chose be verified at this batch and branches, if nothing has visited them."""
        chosen = self.__dict__.get("choice")  # an engine that was given is used as it is
        if chosen is not None and chosen.trust is not None:
            chosen.trust.check(*shape)

    def stream(self, images: Iterable[ImageRequest], batch_size: int = 16) -> Iterator[tuple[int, Float32]]:
        """Sample with continuous batching: images with different schedules and guidance share the engine's batch.

        When an image is finished, it leaves the batch and the next one joins. So the batch stays full, and memory does
        not grow with the number of images. The conditioning table takes at most 256 MiB, and one call of the
        conditioner computes at most 32 MiB of it (``backends.conditioning.TableLimits``).

        Args:
            images: from ``prepare``; may be a generator.
            batch_size: most images in the batch.

        Returns:
            Yields (index, latents float32 ``[C, H, W]``) of each image when it is finished. ``decode`` takes latents.

        Raises:
            SamplingError: the batch is larger than the engine takes, or latents are not finite. The images that were
                yielded before are right.
        """
        self.check_batch(batch_size)
        return self._stream(enumerate(images), batch_size)

    def _stream(self, waiting: Iterator[tuple[int, ImageRequest]], batch_size: int) -> Iterator[tuple[int, Float32]]:
        with Batch(self.engine, self.manifest) as batch:
            while True:
                joining = list(islice(waiting, batch_size - len(batch)))
                batch.add(joining)
                if not len(batch):
                    return
                if batch.failure is None:
                    self.trust(batch.next_shape)
                step = batch.advance()
                for index in np.flatnonzero(step.finished):
                    yield step.keys[index], step.latents[index].copy()

    def decode(self, latents: Float32, tile: int | None = None, batch: int | None = None) -> NDArray[np.uint8]:
        """Decode latents ``[N, C, h, w]`` to uint8 images ``[N, H, W, 3]``.

        Args:
            latents: of any height and width.
            tile: side of the tiles to decode in, in latent pixels, at least 4. Decoding in tiles takes the memory of
                one tile. The image differs slightly from one that is decoded whole, because the decoder's group
                normalization and attention see one tile at a time. None, or a tile as large as the image, decodes the
                image whole.
            batch: most images in one call of the decoder; None is all images, or as many as the engine takes. An engine
                that ``auto`` chose gets fewer, where it is not verified with so many.

        Raises:
            SamplingError: the tile or the batch is too small, or pixels are not finite.
        """
        check_tile(tile)
        if batch is None:
            batch = min(len(latents), self.engine.info.max_batch or len(latents))
        if batch < 1:
            raise SamplingError(f"{batch} images in a call of the decoder: expected at least 1")
        chosen, parts, first = self.__dict__.get("choice"), list[NDArray[np.uint8]](), 0
        while first < len(latents):
            count = min(batch, len(latents) - first)
            if chosen is not None and chosen.trust is not None:
                count = chosen.trust.batch_to_decode(count)
            parts.append(self._decode(latents[first : first + count], tile))
            first += count
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _decode(self, latents: Float32, tile: int | None) -> NDArray[np.uint8]:
        session = self.engine.session("decoder")
        if tile is None or tile >= max(latents.shape[2:]):
            # The decoder turns pixels that are not finite into black ones: the uint8 images cannot show them.
            images, decoded = session.run({"latents": latents}, ["images", "decoded"])
            self._check_finite(decoded, "decoded pixels", "decoder")
            return images
        factor = self.manifest.autoencoder.factor
        decoded = decode_in_tiles(lambda part: session.run({"latents": part}, ["decoded"])[0], latents, tile, factor)
        self._check_finite(decoded, "decoded pixels", "decoder")
        return images_from_decoded(decoded)

    def _check_finite(self, values: Float32, what: str, unit: str) -> None:
        """Raises SamplingError for results of the decoder or the encoder that are not finite, in any image."""
        if np.isfinite(values).all():
            return
        cure = ""
        if self.manifest.precision.precision_of(unit) == Precision.FP16:
            fp16 = "--fp16 " if self.manifest.precision.name in QUANTIZED else ""
            cure = f"; where its numbers are beyond FP16's range, export again with {fp16}--keep-fp32 {unit}"
        raise SamplingError(
            f"{what} are not finite on {self.engine.info.name}; run dit-verify on this bundle and engine{cure}"
        )

    def encode(self, images: NDArray[np.uint8]) -> Float32:
        """Encode uint8 images ``[N, H, W, 3]`` to latents ``[N, C, h, w]``: the mean of the autoencoder's posterior.

        Each image has its own call of the encoder, so that its latents do not depend on the other images.

        Raises:
            SamplingError: the bundle has no encoder, or the latents are not finite.
        """
        if ENCODER not in self.manifest.graphs:
            raise SamplingError(
                f"{self.bundle.path}: has no encoder, which is needed to start from an image; export the bundle with "
                "dit-export --encoder, or start from latents"
            )
        session = self.engine.session(ENCODER)
        latents = np.concatenate([session.run({"images": image[None]}, ["mean"])[0] for image in images])
        self._check_finite(latents, "encoded latents", ENCODER)
        return latents

    def inits(self, start: Start, count: int) -> list[Init]:
        """Check and encode the setting ``init`` for ``count`` images once, to use it in several calls.

        Raises:
            SamplingError: ``start`` has another size, shape, dtype or number, or is not finite.
        """
        return encode_inits(start, count, self.manifest, self.encode)

    def prepare(
        self, labels: Sequence[Label] | Label, seeds: Sequence[int] | int = 0, **settings: Unpack[Settings]
    ) -> list[ImageRequest]:
        """Check the arguments of ``__call__``, and make an image request for each label, for ``stream``.

        Raises:
            SamplingError: an argument does not fit the model.
        """
        labels = list_labels(labels)
        count = len(labels)
        if not count:
            raise SamplingError("no labels: expected at least one class number or name")
        checked = list_seeds(seeds, count, "label")
        defaults = self.manifest.defaults
        scale = settings.get("guidance")
        scales = scales_from_setting(defaults.guidance if scale is None else scale, count)
        interval = settings.get("guidance_interval") or (0.0, 1.0)
        shape = settings.get("guidance_schedule") or "constant"
        guidances = {value: Guidance(value, interval, shape) for value in scales}
        schedule, strength = self.schedule_from_settings(settings)
        start = settings.get("init")
        self._note_use(schedule, list(guidances.values()), start is not None)
        inits = [None] * count if start is None else self.inits(start, count)
        negative = settings.get("negative_label")
        against = None if negative is None else number_from_label(negative, self.manifest)
        noise = self.check_noise(settings.get("noise"), count)
        device, dtype = settings.get("noise_device") or "cpu", settings.get("noise_dtype") or "float32"
        if device not in ("cpu", "cuda") or dtype not in ("float32", "float16"):
            raise SamplingError(
                f"noise of device {device!r} in {dtype!r}: expected device cpu or cuda, and float32 or float16"
            )
        if device == "cuda":  # raises for latents of a size whose draws this runtime cannot reproduce
            CudaNoise(0, settings.get("cuda_threads")).normal(self.latent_shape)
        model, diffusion = self.manifest.model, self.manifest.diffusion
        conditioned: dict[object, Branches] = {}
        made = []
        for index, (label, seed, value) in enumerate(zip(labels, checked, scales, strict=True)):
            weights = weights_from_label(label, self.manifest)
            key = (tuple(weights.items()), value)
            if key not in conditioned:
                check_guidance(guidances[value], weights, diffusion)
                conditioned[key] = branches_from_labels(weights, guidances[value], schedule, model, diffusion, against)
            made.append(
                ImageRequest(
                    labels=weights,
                    seed=seed,
                    schedule=schedule,
                    guidance=guidances[value],
                    negative_label=against,
                    branches=conditioned[key],
                    noise=None if noise is None else noise[index],
                    noise_device=device,
                    noise_dtype=dtype,
                    cuda_threads=settings.get("cuda_threads"),
                    init=inits[index],
                    strength=strength,
                )
            )
        return made

    def schedule_from_settings(self, settings: Settings) -> tuple[Schedule, float | None]:
        """The schedule that the settings ask for, and the strength that was used for it."""
        defaults, given = self.manifest.defaults, settings.get("sampler")
        steps, eta, spacing = settings.get("steps"), settings.get("eta") or 0.0, settings.get("spacing")
        from_image, strength = settings.get("init") is not None, settings.get("strength")
        if strength is not None and not from_image:
            raise SamplingError(f"strength {strength:g} without an image to start from; give an image (--init)")
        if isinstance(given, Schedule):
            if eta != 0 or spacing is not None or steps not in (None, given.steps):
                raise SamplingError(
                    f"a sampler table of {given.steps} steps with steps {steps}, eta {eta:g}, spacing {spacing}: a "
                    "sampler table decides all of these; leave them out"
                )
            check_table(given, self.manifest, self.bundle.digest)
            return schedule_from_start(given, from_image, strength)
        model, diffusion, sampler = (
            self.manifest.model,
            self.manifest.diffusion,
            defaults.sampler if given is None else given,
        )
        if steps is None:
            steps = count_default_steps(sampler, model, diffusion, defaults.steps, spacing)
        steps = check_whole(steps, "steps")
        skipped = 0
        if from_image:
            strength = STRENGTH if strength is None else strength
            skipped = count_skipped_steps(steps, strength)
        alike = isinstance(sampler, str) and isinstance(eta, float | int) and isinstance(spacing, str | None)
        make = _shared_schedule if alike else schedule_for  # which says what is wrong with them
        return make(sampler, model, diffusion, steps, eta, spacing, skipped), strength

    def _note_use(self, schedule: Schedule, guidances: Sequence[Guidance], from_image: bool) -> None:
        """Log once what a fitted table is used with and was not fitted for."""
        if schedule.fitted is None:
            return
        line = describe_difference(schedule.fitted, self.manifest, guidances, from_image)
        if line is not None and line not in self._said:
            self._said.add(line)
            logger.info(line)

    def check_noise(self, noise: Float32 | None, count: int) -> Float32 | None:
        """Check noise that the caller gives for ``count`` images, and return it as ``[N, C, H, W]``.

        Raises:
            SamplingError: the noise has another shape or dtype, or is not finite.
        """
        if noise is None:
            return None
        noise, shape = np.asarray(noise), self.latent_shape
        if noise.shape == shape:
            noise = noise[None]
        if noise.dtype != np.float32 or noise.shape != (count, *shape) or not np.isfinite(noise).all():
            raise SamplingError(f"noise: {noise.dtype} {list(noise.shape)}; expected finite float32 {[count, *shape]}")
        return noise

    def check_batch(self, batch: int) -> None:
        """Raises SamplingError for a batch of no images, or of more images than the engine takes in one call."""
        if batch < 1:
            raise SamplingError(f"a batch of {batch}: expected at least 1 image")
        if self.engine.info.max_batch is not None and batch > self.engine.info.max_batch:
            raise SamplingError(
                f"a batch of {batch}: {self.engine.info.name} takes at most {self.engine.info.max_batch}; "
                f"use smaller batches (--batch-size {self.engine.info.max_batch}) or build an engine for more"
            )


def check_makes_images(bundle: Bundle, instead: str = "use dit_runtime.Policy(bundle)(observation)") -> None:
    """Raises SamplingError for a policy's bundle, with what to do ``instead``."""
    if bundle.manifest.model.observation:
        raise SamplingError(
            f"{bundle.path}: is a policy's bundle, which takes observations and gives actions, not images; {instead}"
        )


def list_seeds(seeds: Sequence[int] | int, count: int, what: str) -> list[int]:
    """A seed for each of ``count`` labels or observations, as ``what`` says: those that are given, or N, N+1, ….

    Raises:
        SamplingError: seeds that are none, or another number of them.
    """
    if isinstance(seeds, np.ndarray):
        seeds = seeds.tolist()
    if isinstance(seeds, str | bytes) or not isinstance(seeds, Iterable):
        first = check_seed(seeds)
        seeds = range(first, first + count)
    seeds = list(seeds)
    if len(seeds) != count:
        raise SamplingError(f"{len(seeds)} seeds for {count} {what}s: expected one seed per {what}, or one number")
    return [check_seed(seed) for seed in seeds]


@lru_cache(maxsize=64)
def _shared_schedule(*arguments: Any) -> Schedule:
    """``schedule_for``, once for all requests that are alike: making a schedule costs more than the rest of a request.

    Images with the very same schedule also share the preparation of their steps.
    """
    schedule = schedule_for(*arguments)
    for values in vars(schedule).values():
        if isinstance(values, np.ndarray):
            values.flags.writeable = False
    return schedule
