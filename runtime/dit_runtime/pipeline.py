"""Labels and seeds in, pictures out: the sampling loop, in numpy around an engine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dit_runtime.bundle import Bundle, Manifest, open_bundle
from dit_runtime.engines import Array, Engine, open_engine
from dit_runtime.errors import SamplingError
from dit_runtime.guidance import branch_rows, guidance_weights
from dit_runtime.noise import Float32, TorchNoise
from dit_runtime.schedule import Schedule, schedule_for
from dit_runtime.verdicts import trusted_engine

# The conditioning table of DiT-XL/2 takes 783 KB a row: longer schedules and larger batches compute it in pieces.
TABLE_BYTES = 256 << 20


@dataclass(frozen=True)
class Request:
    """Checked sampling arguments: ``labels [N]`` int32, one seed per picture, and one schedule for all."""

    labels: NDArray[np.int32]
    seeds: tuple[int, ...]
    guidance: float
    schedule: Schedule


class Pipeline:
    """A bundle with an engine, ready to sample. Torch is not imported.

    Args:
        bundle: a bundle's folder, or an opened bundle.
        engine: ``auto`` (a verified one; verifies first if none is), an engine's name (taken as it is), or an
            ``Engine``.

    Raises:
        BundleError: the bundle is missing, incomplete or altered.
        EngineError: no such engine, or it is not installed.
        ParityError: ``auto`` found no engine that matches the reference.
    """

    def __init__(self, bundle: str | Path | Bundle, engine: str | Engine = "auto") -> None:
        self.bundle = bundle if isinstance(bundle, Bundle) else open_bundle(bundle)
        if engine == "auto":
            self.engine: Engine = trusted_engine(self.bundle)
        else:
            self.engine = open_engine(self.bundle, engine) if isinstance(engine, str) else engine

    @property
    def manifest(self) -> Manifest:
        return self.bundle.manifest

    def __call__(
        self,
        labels: Sequence[int | str],
        seeds: Sequence[int] | int = 0,
        steps: int | None = None,
        guidance: float | None = None,
        sampler: str | None = None,
        eta: float = 0.0,
    ) -> NDArray[np.uint8]:
        """Sample pictures, all in one batch.

        Args:
            labels: class numbers or class names, one per picture.
            seeds: one per picture, or one number N for N, N+1, …. A picture depends on its own seed only, which gives
                the noise of ``torch.Generator().manual_seed(seed)``.
            steps: sampling steps; None takes the bundle's default, as for guidance and sampler.
            guidance: classifier-free guidance scale s in ε_∅ + s·(ε_c − ε_∅); 1 skips the unconditional branch.
            sampler: ``ddim`` or ``ddpm``.
            eta: DDIM's stochasticity, 0 to 1.

        Returns:
            uint8 ``[N, H, W, 3]``.

        Raises:
            SamplingError: arguments that do not fit the model, or latents that are no longer finite.
        """
        *_, (_, latents, _) = self.trajectory(labels, seeds, steps, guidance, sampler, eta)
        return self.decode(latents)

    def trajectory(
        self,
        labels: Sequence[int | str],
        seeds: Sequence[int] | int = 0,
        steps: int | None = None,
        guidance: float | None = None,
        sampler: str | None = None,
        eta: float = 0.0,
    ) -> Iterator[tuple[int, Float32, Float32]]:
        """The loop beneath ``__call__``: yields ``(index, latents, denoised)`` after each completed step.

        ``latents`` and ``denoised`` (the current estimate of the clean latents) are float32 ``[N, C, H, W]`` and may be
        kept. Arguments are checked before this returns.
        """
        request = self.request(labels, seeds, steps, guidance, sampler, eta)
        return self._evaluated(request)

    def decode(self, latents: Float32) -> NDArray[np.uint8]:
        """Latents ``[N, C, H, W]`` → uint8 pictures ``[N, H, W, 3]``."""
        (images,) = self.engine.session("decoder").run({"latents": latents}, ["images"])
        return images

    def request(
        self,
        labels: Sequence[int | str],
        seeds: Sequence[int] | int,
        steps: int | None,
        guidance: float | None,
        sampler: str | None,
        eta: float,
    ) -> Request:
        """Checked arguments, with the bundle's defaults filled in."""
        defaults, model = self.manifest.defaults, self.manifest.model
        steps = defaults.steps if steps is None else steps
        guidance = defaults.guidance if guidance is None else guidance
        numbers = [self.label_number(label) for label in labels]
        if not numbers:
            raise SamplingError("no labels: expected at least one class number or name")
        if self.engine.max_batch is not None and len(numbers) > self.engine.max_batch:
            raise SamplingError(
                f"a batch of {len(numbers)}: {self.engine.name} takes at most {self.engine.max_batch}; "
                f"use --batch-size {self.engine.max_batch} or build an engine for more"
            )
        if not isinstance(seeds, int) and len(seeds) != len(numbers):
            raise SamplingError(f"{len(seeds)} seeds for {len(numbers)} labels: expected one seed per label, or one")
        each = tuple(range(seeds, seeds + len(numbers))) if isinstance(seeds, int) else tuple(seeds)
        if not (np.isfinite(guidance) and guidance > 0):
            raise SamplingError(f"guidance {guidance}: expected a finite number above 0; 1 is no guidance")
        schedule = schedule_for(sampler or defaults.sampler, model, self.manifest.diffusion, steps, eta)
        return Request(np.array(numbers, np.int32), each, float(guidance), schedule)

    def label_number(self, label: int | str) -> int:
        """The class number of a label given as number, numeral or name (upper and lower case are the same)."""
        classes, names = self.manifest.model.classes, self.manifest.class_names
        if isinstance(label, str) and not label.lstrip("-").isdigit():
            wanted = label.strip().casefold()
            # ImageNet's names are synonyms with commas: "tench, Tinca tinca".
            matches = [
                index
                for index, name in enumerate(names)
                if wanted in (name.casefold(), *(part.strip().casefold() for part in name.split(",")))
            ]
            if len(matches) != 1:
                known = "; ".join(names[:10]) if names else "none in this bundle"
                raise SamplingError(
                    f"label {label!r}: {len(matches)} classes have that name; expected a number or one of: {known}"
                )
            return matches[0]
        number = int(label)
        if not 0 <= number < classes:
            raise SamplingError(f"label {number}: expected 0 to {classes - 1}, the classes of this model")
        return number

    def _evaluated(self, request: Request) -> Iterator[tuple[int, Float32, Float32]]:
        model, schedule = self.manifest.model, request.schedule
        batch, picture = len(request.labels), (model.latent_channels, *model.latent_size)
        streams = [TorchNoise(seed) for seed in request.seeds]
        state = np.zeros((batch, 3, *picture), np.float32)
        state[:, 0] = [stream.normal(picture) for stream in streams]
        weights = guidance_weights(
            request.guidance, batch, model.latent_channels, self.manifest.diffusion.guidance_channels
        )
        conditions, rows = branch_rows(request.labels, model.null_class, len(weights))
        silence = np.zeros((batch, *picture), np.float32)
        step = self.engine.session("step")
        row_bytes = 4 * (6 * model.depth + 2) * model.width
        window = max(1, TABLE_BYTES // (row_bytes * len(conditions)))
        table, start, completed = np.empty(0), 0, 0
        for index in range(len(schedule)):
            position = int(schedule.rows[index])
            if index == 0 or not start <= position < start + window:
                start = position - position % window
                table = self._conditioned(schedule.timesteps[start : start + window], conditions)
            noise = silence
            if schedule.draws_noise[index]:
                noise = np.stack([stream.normal(picture) for stream in streams])
            state, denoised = step.run(
                {
                    "state": state,
                    "noise": noise,
                    "coefficients": np.repeat(schedule.coefficients[index : index + 1], batch, axis=0),
                    "guidance": weights,
                    "rows": rows + np.int32((position - start) * len(conditions)),
                    "modulation": table,
                },
                ["next_state", "denoised"],
            )
            if not np.isfinite(state).all():
                raise SamplingError(
                    f"latents are not finite after step {index + 1} of {len(schedule)} on {self.engine.name}; "
                    "run dit-verify on this bundle and engine"
                )
            if schedule.completes_step[index]:
                yield completed, state[:, 0].copy(), denoised
                completed += 1

    def _conditioned(self, timesteps: Float32, conditions: NDArray[np.int32]) -> Array:
        """The conditioning table: for each timestep a row per condition."""
        (table,) = self.engine.session("conditioner").run(
            {
                "timesteps": np.repeat(timesteps, len(conditions)),
                "labels": np.tile(conditions, len(timesteps)),
            },
            ["modulation"],
        )
        return table
