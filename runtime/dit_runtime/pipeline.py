"""Labels and seeds in, pictures out: sampling in numpy around an engine."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import numpy as np
from numpy.typing import NDArray

from dit_runtime.bundle import Bundle, Manifest, open_bundle
from dit_runtime.engines import Engine, open_engine
from dit_runtime.errors import SamplingError
from dit_runtime.guidance import Branches, Guidance, branches
from dit_runtime.loop import Batch, Picture
from dit_runtime.noise import CudaNoise, Float32
from dit_runtime.schedule import Schedule, schedule_for
from dit_runtime.verdicts import trusted_engine

if TYPE_CHECKING:
    from typing_extensions import Unpack

Label = int | str | Mapping[int | str, float]


class Settings(TypedDict, total=False):
    """How pictures are sampled. What is left out, or None, has its default: the bundle's for the first three.

    Keys:
        steps: sampling steps.
        sampler: a name of ``dit_runtime.SAMPLERS``, or a ``Schedule`` of your own (``read_table``, ``flow.flow_sde``).
        guidance: classifier-free guidance scale s, one for all pictures or one each; see ``Guidance``.
        spacing: which timesteps are visited; see ``schedule_for``.
        eta: DDIM's stochasticity, 0 to 1.
        guidance_interval: noise times (LO, HI) outside which nothing is guided, at half the cost.
        guidance_schedule: ``constant``, ``linear`` or ``cosine``.
        negative_label: a class to guide away from, in place of the null class.
        noise: float32 ``[N, C, H, W]`` in place of the seeds' first draw; later draws are then the seeds' from their
            first, as when diffusers is given latents.
        noise_device: ``cpu`` or ``cuda``: whose PyTorch generator the seeds stand for.
        noise_dtype: ``float32`` or ``float16``: the dtype PyTorch draws in.
        cuda_threads: resident threads of the CUDA device, for latents of more than 4096 values; see ``CudaNoise``.
    """

    steps: int | None
    sampler: str | Schedule | None
    spacing: str | None
    eta: float
    guidance: float | Sequence[float] | None
    guidance_interval: tuple[float, float]
    guidance_schedule: str
    negative_label: int | str | None
    noise: Float32 | None
    noise_device: str
    noise_dtype: str
    cuda_threads: int | None


class Pipeline:
    """A bundle with an engine, ready to sample. Torch is not imported.

    Args:
        bundle: a bundle's folder, or an opened bundle.
        engine: ``auto`` (a verified one; verifies first if none is), an engine's name (taken as it is), or an
            ``Engine``.
        threads: of the CPU, for an engine that is opened here; 0 lets it choose.

    Raises:
        BundleError: the bundle is missing, incomplete or altered.
        EngineError: no such engine, or it is not installed.
        ParityError: ``auto`` found no engine that matches the reference.
    """

    def __init__(self, bundle: str | Path | Bundle, engine: str | Engine = "auto", threads: int = 0) -> None:
        self.bundle = bundle if isinstance(bundle, Bundle) else open_bundle(bundle)
        if engine == "auto":
            self.engine: Engine = trusted_engine(self.bundle, threads)
        else:
            self.engine = open_engine(self.bundle, engine, threads) if isinstance(engine, str) else engine

    @property
    def manifest(self) -> Manifest:
        return self.bundle.manifest

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one picture's latents."""
        return (self.manifest.model.latent_channels, *self.manifest.model.latent_size)

    def __call__(
        self, labels: Sequence[Label], seeds: Sequence[int] | int = 0, **settings: Unpack[Settings]
    ) -> NDArray[np.uint8]:
        """Sample pictures, all in one batch.

        Args:
            labels: one per picture: a class number or name, or weights of several (``{"Sneaker": 0.7, 8: 0.3}``).
            seeds: one per picture, or one number N for N, N+1, …. A picture depends on its own seed only, which gives
                the noise of ``torch.Generator().manual_seed(seed)``.
            settings: ``steps``, ``guidance``, ``sampler``, …: the keys of ``Settings``.

        Returns:
            uint8 ``[N, H, W, 3]``.

        Raises:
            SamplingError: arguments that do not fit the model, or latents that are no longer finite.
        """
        for _, latents, _ in self.trajectory(labels, seeds, **settings):
            final = latents
        return self.decode(final)

    def trajectory(
        self, labels: Sequence[Label], seeds: Sequence[int] | int = 0, **settings: Unpack[Settings]
    ) -> Iterator[tuple[int, Float32, Float32]]:
        """The loop beneath ``__call__``: yields ``(index, latents, denoised)`` after each completed step.

        ``latents`` and ``denoised`` (the current estimate of the clean latents) are float32 ``[N, C, H, W]`` and may be
        kept. Arguments are checked before this returns.
        """
        pictures = self.pictures(labels, seeds, **settings)
        self.check_batch(len(pictures))
        return self.advanced(pictures)

    def advanced(self, pictures: Sequence[Picture]) -> Iterator[tuple[int, Float32, Float32]]:
        """``trajectory`` of pictures that share one schedule."""
        batch = Batch(self.engine, self.manifest)
        batch.add(list(enumerate(pictures)))
        completed = 0
        while len(batch):
            step = batch.advance()
            if batch.failure is not None:
                raise batch.failure
            if step.completed[0]:
                yield completed, step.latents.copy(), step.denoised.copy()
                completed += 1

    def stream(self, pictures: Iterable[Picture], batch_size: int = 16) -> Iterator[tuple[int, Float32]]:
        """Continuous batching: pictures of any schedules and guidance share the engine's batch.

        A picture that is finished makes room for the next one, so the batch stays full, and memory does not grow with
        the number of pictures: ``pictures`` may be a generator. The conditioning table takes at most 256 MiB, whatever
        the schedules (``loop.TABLE_BYTES``), and 32 MiB of it are computed in one call of the conditioner.

        Returns:
            (index, latents ``[C, H, W]``) of each picture as it finishes; ``decode`` takes them.

        Raises:
            SamplingError: latents that are no longer finite; what was yielded before stands.
        """
        self.check_batch(batch_size)
        return self._streamed(enumerate(pictures), batch_size)

    def _streamed(self, waiting: Iterator[tuple[int, Picture]], batch_size: int) -> Iterator[tuple[int, Float32]]:
        batch = Batch(self.engine, self.manifest)
        while True:
            batch.add(list(islice(waiting, batch_size - len(batch))))
            if not len(batch):
                return
            step = batch.advance()
            for index in np.flatnonzero(step.finished):
                yield step.keys[index], step.latents[index].copy()

    def decode(self, latents: Float32) -> NDArray[np.uint8]:
        """Latents ``[N, C, H, W]`` → uint8 pictures ``[N, H, W, 3]``."""
        (images,) = self.engine.session("decoder").run({"latents": latents}, ["images"])
        return images

    def pictures(
        self, labels: Sequence[Label], seeds: Sequence[int] | int = 0, **settings: Unpack[Settings]
    ) -> list[Picture]:
        """Checked work for ``stream``: a picture per label, with the arguments of ``__call__``."""
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
        schedule = self._schedule(settings)
        negative = settings.get("negative_label")
        against = None if negative is None else self.label_number(negative)
        noise = self.checked_noise(settings.get("noise"), count)
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
            weights = self.label_weights(label)
            key = (tuple(weights.items()), value)
            if key not in conditioned:
                conditioned[key] = branches(weights, guidances[value], schedule, model, diffusion, against)
            made.append(
                Picture(
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
                )
            )
        return made

    def label_weights(self, label: Label) -> dict[int, float]:
        """The classes of a label and their weights; text such as ``3:0.7+5:0.3`` or ``Bag+Coat`` names several."""
        if isinstance(label, str) and "+" in label and not self._named(label):
            parts = [part.strip() for part in label.split("+")]
            split = [part.rsplit(":", 1) for part in parts]
            if all(":" not in part for part in parts):
                split = [[part, str(1 / len(parts))] for part in parts]
            try:
                label = {name: float(weight) for name, weight in split}
            except ValueError as error:
                raise SamplingError(f"label {label!r}: expected LABEL:WEIGHT+LABEL:WEIGHT, as 3:0.7+5:0.3") from error
            if len(label) != len(parts):
                raise SamplingError(f"label {'+'.join(parts)!r}: names a class twice; expected each once, weighted")
        if not isinstance(label, Mapping):
            return {self.label_number(label): 1.0}
        weights = {self.label_number(name): float(weight) for name, weight in label.items()}
        if not weights or len(weights) != len(label) or not all(np.isfinite(weight) for weight in weights.values()):
            raise SamplingError(f"label {dict(label)!r}: expected distinct classes with finite weights")
        return weights

    def label_number(self, label: int | str) -> int:
        """The class number of a label given as number, numeral or name (upper and lower case are the same)."""
        classes = self.manifest.model.classes
        if isinstance(label, str) and not (label.isascii() and label.removeprefix("-").isdigit() and len(label) < 9):
            matches, names = self._named(label), self.manifest.class_names
            if len(matches) != 1:
                known = "; ".join(names[:10]) if names else "none in this bundle"
                raise SamplingError(
                    f"label {label!r}: {len(matches)} classes have that name; expected a number or one of: {known}"
                )
            return matches[0]
        try:
            number = int(label) if isinstance(label, str) else operator.index(label)
        except TypeError as error:
            raise SamplingError(f"label {label!r}: expected a class number or name") from error
        if not 0 <= number < classes:
            raise SamplingError(f"label {number}: expected 0 to {classes - 1}, the classes of this model")
        return number

    def _named(self, label: str) -> list[int]:
        """The classes of that name. ImageNet's names are synonyms with commas: "tench, Tinca tinca"."""
        wanted = label.strip().casefold()
        return [
            index
            for index, name in enumerate(self.manifest.class_names)
            if wanted in (name.casefold(), *(part.strip().casefold() for part in name.split(",")))
        ]

    def _schedule(self, settings: Settings) -> Schedule:
        defaults, given = self.manifest.defaults, settings.get("sampler")
        steps, eta, spacing = settings.get("steps"), settings.get("eta") or 0.0, settings.get("spacing")
        if isinstance(given, Schedule):
            if eta != 0 or spacing is not None or steps not in (None, given.steps):
                raise SamplingError(
                    f"a table of {given.steps} steps with steps {steps}, eta {eta:g}, spacing {spacing}: the table has "
                    "all of these in it; leave them out"
                )
            last = 1 if self.manifest.diffusion.path else len(self.manifest.diffusion.betas) - 1
            if given.timesteps.min() < 0 or given.timesteps.max() > last:
                raise SamplingError(
                    f"a table with timesteps {given.timesteps.min():g} to {given.timesteps.max():g}: this model's are "
                    f"0 to {last}; the table is for another kind of model"
                )
            if given.uses_variance and not self.manifest.model.learned_variance:
                raise SamplingError(
                    "a table that uses the learned variance (h is not 0), which this model does not have"
                )
            return given
        steps = defaults.steps if steps is None else steps
        return schedule_for(
            given or defaults.sampler, self.manifest.model, self.manifest.diffusion, steps, eta, spacing
        )

    def checked_noise(self, noise: Float32 | None, count: int) -> Float32 | None:
        """Given noise for ``count`` pictures, ``[N, C, H, W]``.

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
        """Raises SamplingError for no pictures, or more than the engine takes in one call."""
        if batch < 1:
            raise SamplingError(f"a batch of {batch}: expected at least 1")
        if self.engine.max_batch is not None and batch > self.engine.max_batch:
            raise SamplingError(
                f"a batch of {batch}: {self.engine.name} takes at most {self.engine.max_batch}; "
                f"use smaller batches (--batch-size {self.engine.max_batch}) or build an engine for more"
            )
