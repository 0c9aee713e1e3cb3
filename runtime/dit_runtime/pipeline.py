"""Labels and seeds in, images out: sampling in numpy around an engine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from dit_runtime.backends.base import Engine
from dit_runtime.backends.open import engine_for
from dit_runtime.bundle.manifest import ENCODER, Manifest
from dit_runtime.bundle.reader import Bundle, open_bundle
from dit_runtime.core.errors import SamplingError
from dit_runtime.samplers.by_name import count_skipped_steps, schedule_for
from dit_runtime.samplers.guidance import Branches, Guidance, branches_from_labels
from dit_runtime.samplers.noise import CudaNoise, Float32
from dit_runtime.samplers.schedule import Schedule
from dit_runtime.sampling.batch import Advance, Batch
from dit_runtime.sampling.image_to_image import (
    STRENGTH,
    Init,
    Start,
    encode_inits,
    schedule_from_start,
)
from dit_runtime.sampling.labels import Label, number_from_label, weights_from_label
from dit_runtime.sampling.requests import ImageRequest
from dit_runtime.sampling.settings import Settings
from dit_runtime.sampling.tiles import check_tile, decode_in_tiles, images_from_decoded
from dit_runtime.verify.auto import check_choice, choose_engine

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Pipeline:
    """A bundle with an engine, ready to sample. Torch is not imported.

    Args:
        bundle: a bundle's folder, or an opened bundle.
        engine: ``auto`` (a verified one; verifies first if none is), an engine's name (taken as it is), or an
            ``Engine`` for this bundle at this size.
        threads: of the CPU, for an engine that is opened here; 0 lets it choose.
        size: height and width of images in pixels, one of ``manifest.image_sizes``; None is the first, or that of
            an opened bundle.
        precision: ``f32`` or ``bf16``, of an engine that is named and has a choice (OpenVINO); None is its default.
        once: each graph gives its memory back when its work is done: the conditioner before the loop, the step before
            the decoder. A second run loads them again.

    Raises:
        BundleError: the bundle is missing, incomplete or altered, or has no graphs for that size.
        EngineError: no such engine, or it is not installed.
    """

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
        check_choice(engine if isinstance(engine, str) else "", precision)
        self._threads = threads
        if engine != "auto":
            self.engine = engine_for(self.bundle, engine, threads, precision) if isinstance(engine, str) else engine

    @cached_property
    def engine(self) -> Engine:
        """The engine; ``auto`` is chosen when it is first needed, so that wrong arguments are said before.

        Raises:
            EngineError: no engine is installed.
            ParityError: none matches the reference.
        """
        return choose_engine(self.bundle, self._threads).engine

    @property
    def manifest(self) -> Manifest:
        return self.bundle.manifest

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image's latents."""
        return (self.manifest.model.latent_channels, *self.manifest.model.latent_size)

    def __call__(
        self, labels: Sequence[Label], seeds: Sequence[int] | int = 0, **settings: Unpack[Settings]
    ) -> NDArray[np.uint8]:
        """Sample images, all in one batch.

        Args:
            labels: one per image: a class number or name, or weights of several (``{"Sneaker": 0.7, 8: 0.3}``).
            seeds: one per image, or one number N for N, N+1, …. An image depends on its own seed only, which gives
                the noise of ``torch.Generator().manual_seed(seed)``.
            settings: ``steps``, ``guidance``, ``sampler``, …: the keys of ``Settings``.

        Returns:
            uint8 ``[N, H, W, 3]``.

        Raises:
            SamplingError: arguments that do not fit the model, or latents that are no longer finite.
        """
        images = self.prepare(labels, seeds, **settings)
        self.check_batch(len(images))
        return self.decode(self.sample_latents(images))

    def trajectory(
        self, labels: Sequence[Label], seeds: Sequence[int] | int = 0, **settings: Unpack[Settings]
    ) -> Iterator[tuple[int, Float32, Float32]]:
        """The loop beneath ``__call__``: yields ``(index, latents, denoised)`` after each completed step.

        ``latents`` and ``denoised`` (the current estimate of the clean latents) are float32 ``[N, C, H, W]`` and may be
        kept. Arguments are checked before this returns.
        """
        images = self.prepare(labels, seeds, **settings)
        self.check_batch(len(images))
        return self.iterate_steps(images)

    def iterate_steps(self, images: Sequence[ImageRequest]) -> Iterator[tuple[int, Float32, Float32]]:
        """``trajectory`` of images that share one schedule."""
        for completed, step in enumerate(self._run_steps(images, read=True)):
            yield completed, step.latents.copy(), step.denoised.copy()

    def sample_latents(self, images: Sequence[ImageRequest], completed: Callable[[], None] = lambda: None) -> Float32:
        """The last latents ``[N, C, H, W]`` of images that share one schedule.

        An engine that keeps latents on its device gives only these. ``completed`` is called after each completed step;
        on such an engine when it is queued, two steps before its end at most.
        """
        for step in self._run_steps(images, read=False):
            completed()
            last = step
        return last.latents.copy()

    def _run_steps(self, images: Sequence[ImageRequest], read: bool) -> Iterator[Advance]:
        """The completed steps of images that share one schedule."""
        released = False
        with Batch(self.engine, self.manifest) as batch:
            batch.add(list(enumerate(images)))
            while len(batch):
                step = batch.advance(read)
                if batch.failure is not None:
                    raise batch.failure
                if self.once and not released:  # the first call was given the rows of all, if they fit
                    self.engine.release("conditioner")
                    released = True
                if step.completed[0]:
                    yield step
        if self.once:
            self.engine.release("step")

    def stream(self, images: Iterable[ImageRequest], batch_size: int = 16) -> Iterator[tuple[int, Float32]]:
        """Continuous batching: images of any schedules and guidance share the engine's batch.

        An image that is finished makes room for the next one, so the batch stays full, and memory does not grow with
        the number of images: ``images`` may be a generator. The conditioning table takes at most 256 MiB, whatever
        the schedules (``loop.TABLE_BYTES``), and 32 MiB of it are computed in one call of the conditioner.

        Returns:
            (index, latents ``[C, H, W]``) of each image as it finishes; ``decode`` takes them.

        Raises:
            SamplingError: latents that are no longer finite; what was yielded before stands.
        """
        self.check_batch(batch_size)
        return self._stream(enumerate(images), batch_size)

    def _stream(self, waiting: Iterator[tuple[int, ImageRequest]], batch_size: int) -> Iterator[tuple[int, Float32]]:
        with Batch(self.engine, self.manifest) as batch:
            while True:
                batch.add(list(islice(waiting, batch_size - len(batch))))
                if not len(batch):
                    return
                step = batch.advance()
                for index in np.flatnonzero(step.finished):
                    yield step.keys[index], step.latents[index].copy()

    def decode(self, latents: Float32, tile: int | None = None, batch: int | None = None) -> NDArray[np.uint8]:
        """Latents ``[N, C, h, w]`` → uint8 images ``[N, H, W, 3]``.

        Args:
            latents: of any height and width.
            tile: side of the tiles to decode in, in latent pixels, at least 4; None, or a tile as large as the image,
                decodes it whole. Memory is one tile's, and the result close to the whole's but not the same: the
                decoder's group normalization and attention see one tile only.
            batch: images in one decoder call; None is all, or as many as the engine takes.

        Raises:
            SamplingError: tile or batch too small, or pixels that are not finite.
        """
        check_tile(tile)
        batch = min(len(latents), self.engine.info.max_batch or len(latents)) if batch is None else batch
        if batch < 1:
            raise SamplingError(f"{batch} images per decoder call: expected at least 1")
        parts = [self._decode(latents[start : start + batch], tile) for start in range(0, len(latents), batch)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _decode(self, latents: Float32, tile: int | None) -> NDArray[np.uint8]:
        session = self.engine.session("decoder")
        if tile is None or tile >= max(latents.shape[2:]):
            (images,) = session.run({"latents": latents}, ["images"])
            return images
        factor = self.manifest.autoencoder.factor
        decoded = decode_in_tiles(lambda part: session.run({"latents": part}, ["decoded"])[0], latents, tile, factor)
        if not np.isfinite(decoded).all():
            raise SamplingError(
                f"decoded pixels are not finite on {self.engine.info.name}; run dit-verify on this bundle and engine"
            )
        return images_from_decoded(decoded)

    def encode(self, images: NDArray[np.uint8]) -> Float32:
        """uint8 images ``[N, H, W, 3]`` → latents ``[N, C, h, w]``, the mean of the autoencoder's posterior.

        One image in one encoder call, so that the result is the same whatever is beside it.

        Raises:
            SamplingError: the bundle has no encoder.
        """
        if ENCODER not in self.manifest.graphs:
            raise SamplingError(
                f"{self.bundle.path}: has no encoder, to start from an image; export it with dit-export --encoder, or "
                "start from latents"
            )
        session = self.engine.session(ENCODER)
        return np.concatenate([session.run({"images": image[None]}, ["mean"])[0] for image in images])

    def inits(self, start: Start, count: int) -> list[Init]:
        """The setting ``init`` for ``count`` images, checked and encoded, to be used in several calls."""
        return encode_inits(start, count, self.manifest, self.encode)

    def prepare(
        self, labels: Sequence[Label], seeds: Sequence[int] | int = 0, **settings: Unpack[Settings]
    ) -> list[ImageRequest]:
        """Checked work for ``stream``: an image per label, with the arguments of ``__call__``."""
        count = len(labels)
        if not count:
            raise SamplingError("no labels: expected at least one class number or name")
        if isinstance(seeds, int | np.integer):
            seeds = range(int(seeds), int(seeds) + count)
        if len(seeds) != count:
            raise SamplingError(f"{len(seeds)} seeds for {count} labels: expected one seed per label, or one")
        defaults = self.manifest.defaults
        scale = settings.get("guidance")
        given = np.asarray(defaults.guidance if scale is None else scale, np.float64)
        if given.shape not in ((), (count,)):
            raise SamplingError(f"{given.size} guidance scales for {count} labels: expected one per label, or one")
        scales: list[float] = np.broadcast_to(given, count).tolist()
        interval = settings.get("guidance_interval") or (0.0, 1.0)
        shape = settings.get("guidance_schedule") or "constant"
        guidances = {value: Guidance(value, interval, shape) for value in scales}
        schedule, strength = self._schedule_from_settings(settings)
        start = settings.get("init")
        inits = [None] * count if start is None else self.inits(start, count)
        negative = settings.get("negative_label")
        against = None if negative is None else number_from_label(negative, self.manifest)
        noise = self.check_noise(settings.get("noise"), count)
        device, dtype = settings.get("noise_device") or "cpu", settings.get("noise_dtype") or "float32"
        if device not in ("cpu", "cuda") or dtype not in ("float32", "float16"):
            raise SamplingError(
                f"noise of device {device!r} in {dtype!r}: expected device cpu or cuda, and float32 or float16"
            )
        if device == "cuda":  # whether the seeds' draws can be known depends on their size
            CudaNoise(0, settings.get("cuda_threads")).normal(self.latent_shape)
        model, diffusion = self.manifest.model, self.manifest.diffusion
        conditioned: dict[object, Branches] = {}
        made = []
        for index, (label, seed, value) in enumerate(zip(labels, seeds, scales, strict=True)):
            weights = weights_from_label(label, self.manifest)
            key = (tuple(weights.items()), value)
            if key not in conditioned:
                conditioned[key] = branches_from_labels(weights, guidances[value], schedule, model, diffusion, against)
            made.append(
                ImageRequest(
                    labels=weights,
                    seed=int(seed),
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

    def _schedule_from_settings(self, settings: Settings) -> tuple[Schedule, float | None]:
        """The schedule of the settings, and the strength that was used for it."""
        defaults, given = self.manifest.defaults, settings.get("sampler")
        steps, eta, spacing = settings.get("steps"), settings.get("eta") or 0.0, settings.get("spacing")
        from_image, strength = settings.get("init") is not None, settings.get("strength")
        if strength is not None and not from_image:
            raise SamplingError(f"strength {strength:g} without an image to start from: name one (--init)")
        if isinstance(given, Schedule):
            if eta != 0 or spacing is not None or steps not in (None, given.steps):
                raise SamplingError(
                    f"a table of {given.steps} steps with steps {steps}, eta {eta:g}, spacing {spacing}: the table has "
                    "all of these in it; leave them out"
                )
            self._check_table(given)
            return schedule_from_start(given, from_image, strength)
        steps = defaults.steps if steps is None else steps
        skipped = 0
        if from_image:
            strength = STRENGTH if strength is None else strength
            skipped = count_skipped_steps(steps, strength)
        model, diffusion = self.manifest.model, self.manifest.diffusion
        return schedule_for(given or defaults.sampler, model, diffusion, steps, eta, spacing, skipped), strength

    def _check_table(self, table: Schedule) -> None:
        """Raises SamplingError for a table that is for another kind of model."""
        last = 1 if self.manifest.diffusion.path else len(self.manifest.diffusion.betas) - 1
        if table.timesteps.min() < 0 or table.timesteps.max() > last:
            raise SamplingError(
                f"a table with timesteps {table.timesteps.min():g} to {table.timesteps.max():g}: this model's are "
                f"0 to {last}; the table is for another kind of model"
            )
        if table.uses_variance and not self.manifest.model.learned_variance:
            raise SamplingError("a table that uses the learned variance (h is not 0), which this model does not have")

    def check_noise(self, noise: Float32 | None, count: int) -> Float32 | None:
        """Given noise for ``count`` images, ``[N, C, H, W]``.

        Raises:
            SamplingError: another shape or dtype, or not finite.
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
        """Raises SamplingError for no images, or more than the engine takes in one call."""
        if batch < 1:
            raise SamplingError(f"a batch of {batch}: expected at least 1")
        if self.engine.info.max_batch is not None and batch > self.engine.info.max_batch:
            raise SamplingError(
                f"a batch of {batch}: {self.engine.info.name} takes at most {self.engine.info.max_batch}; "
                f"use smaller batches (--batch-size {self.engine.info.max_batch}) or build an engine for more"
            )
