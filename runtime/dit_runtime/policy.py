"""Sample a robot's actions from observations: numpy code around an engine, for bundles of policies."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dit_runtime.backends.base import Engine
from dit_runtime.backends.conditioning import Observation
from dit_runtime.bundle.manifest import Manifest
from dit_runtime.bundle.precision import Precision
from dit_runtime.bundle.reader import Bundle
from dit_runtime.core.errors import SamplingError
from dit_runtime.core.text import one_line
from dit_runtime.pipeline import Pipeline, list_seeds
from dit_runtime.samplers.guidance import Branches, Guidance
from dit_runtime.samplers.noise import Float32
from dit_runtime.samplers.schedule import Schedule
from dit_runtime.sampling.requests import ImageRequest

FP16_MAX = 65504.0


class _ActionPipeline(Pipeline):
    """The sampling loop of a policy, whose latents are actions."""

    of_policies = True


class Policy:
    """A policy's bundle with an engine, ready to act. PyTorch is not imported.

    The observation is the vector that the policy's own encoder makes, and the actions are the network's own: both are
    normalized as in training. The conditioner runs once for all timesteps of a call.

    Args:
        bundle: a bundle's folder, or an opened bundle.
        engine, threads, precision: as ``Pipeline``'s.

    Raises:
        BundleError: the bundle is missing, incomplete or altered.
        SamplingError: the bundle is not a policy's.
        EngineError: the engine's name is unknown, its library is not installed, or there are too many threads.
        ParityError: an engine that is weakly typed does not match the reference.
    """

    def __init__(
        self,
        bundle: str | Path | Bundle,
        engine: str | Engine = "auto",
        threads: int = 0,
        precision: str | None = None,
    ) -> None:
        self._pipe = _ActionPipeline(bundle, engine, threads, precision=precision)
        if not self.manifest.model.observation:
            raise SamplingError(
                f"{self._pipe.bundle.path}: is a bundle of images, not a policy's; sample it with dit_runtime.Pipeline"
            )

    @property
    def manifest(self) -> Manifest:
        return self._pipe.manifest

    @property
    def engine(self) -> Engine:
        """The engine; ``auto`` chooses it at first use."""
        return self._pipe.engine

    @property
    def horizon(self) -> int:
        """How many actions a call gives."""
        return self.manifest.model.latent_size[1]

    @property
    def actions(self) -> int:
        """The numbers of one action."""
        return self.manifest.model.latent_channels

    @property
    def observation(self) -> int:
        """The numbers of an observation."""
        return self.manifest.model.observation

    def __call__(
        self,
        observation: Float32,
        seeds: Sequence[int] | int = 0,
        *,
        steps: int | None = None,
        sampler: str | Schedule | None = None,
        spacing: str | None = None,
        eta: float = 0.0,
        noise: Float32 | None = None,
    ) -> NDArray[np.float32]:
        """Sample a chunk of actions for each observation, all in one batch.

        Args:
            observation: float32 ``[B, O]``, or ``[O]`` for a batch of one.
            seeds: one for each observation, or a number N for the seeds N, N+1, …. The same observation and seed give
                the same actions, whatever else is in the batch.
            steps, sampler, spacing, eta: as ``Settings``; the defaults are the bundle's.
            noise: float32 ``[B, horizon, A]``, in place of the seeds' first draw.

        Returns:
            Actions, float32 ``[B, horizon, A]``.

        Raises:
            SamplingError: an argument does not fit the policy, or actions are not finite.
        """
        requests = self.prepare(observation, seeds, steps, sampler, spacing, eta, noise)
        self._pipe.check_batch(len(requests))
        latents = self._pipe.sample_latents(requests)  # (B, A, 1, horizon)
        return np.ascontiguousarray(latents[:, :, 0].transpose(0, 2, 1))

    def prepare(
        self,
        observation: Float32,
        seeds: Sequence[int] | int = 0,
        steps: int | None = None,
        sampler: str | Schedule | None = None,
        spacing: str | None = None,
        eta: float = 0.0,
        noise: Float32 | None = None,
    ) -> list[ImageRequest]:
        """Check the arguments of ``__call__``, and make a request for each observation."""
        observations = self._check_observation(observation)
        count = len(observations)
        given = list_seeds(seeds, count, "observation")
        schedule, _ = self._pipe.schedule_from_settings(
            {"steps": steps, "sampler": sampler, "spacing": spacing, "eta": eta}
        )
        weights = np.ones((len(schedule), 1, self.actions), np.float32)
        branches = Branches(np.zeros(1, np.int32), weights, np.ones(len(schedule), np.int64))
        draws = self._check_noise(noise, count)
        return [
            ImageRequest(
                labels={0: 1.0},
                seed=seed,
                schedule=schedule,
                guidance=Guidance(),
                negative_label=None,
                branches=branches,
                noise=None if draws is None else draws[index],
                observations=[Observation(observations[index])],
            )
            for index, seed in enumerate(given)
        ]

    def _check_observation(self, observation: Float32) -> Float32:
        """The observation as ``[B, O]``. Raises SamplingError for another shape or dtype, or numbers that cannot be."""
        found = _array_of("observation", observation)
        if found.dtype != np.float32 or found.ndim not in (1, 2) or found.shape[-1] != self.observation:
            raise SamplingError(
                f"observation: {found.dtype} {list(found.shape)}; expected float32 [B, {self.observation}], the vector "
                "that the policy's own observation encoder makes"
            )
        found = np.ascontiguousarray(found.reshape(-1, self.observation))
        if not len(found):
            raise SamplingError("observation: a batch of none; expected at least one observation")
        if not np.isfinite(found).all():
            row, place = np.argwhere(~np.isfinite(found))[0]
            raise SamplingError(
                f"observation: number {place + 1} of observation {row + 1} is {found[row, place]}; expected finite "
                "numbers"
            )
        fp16 = self.manifest.precision.precision_of("conditioner") == Precision.FP16
        if fp16 and (largest := float(np.abs(found).max())) > FP16_MAX:
            raise SamplingError(
                f"observation: a number of size {largest:g}, and this bundle's conditioner holds {FP16_MAX:g} in FP16; "
                "normalize observations as in training, or export with --keep-fp32 conditioner"
            )
        return found

    def _check_noise(self, noise: Float32 | None, count: int) -> Float32 | None:
        """Noise ``[B, horizon, A]`` as latents ``[B, A, 1, horizon]``."""
        if noise is None:
            return None
        found, shape = _array_of("noise", noise), (count, self.horizon, self.actions)
        if found.dtype != np.float32 or found.shape != shape or not np.isfinite(found).all():
            raise SamplingError(f"noise: {found.dtype} {list(found.shape)}; expected finite float32 {list(shape)}")
        return np.ascontiguousarray(found.transpose(0, 2, 1)[:, :, None])


def _array_of(name: str, given: object) -> NDArray[Any]:
    """An argument as an array, of whatever shape and dtype. Raises SamplingError for what makes none."""
    try:
        return np.asarray(given)
    except (
        ValueError,
        TypeError,
        RuntimeError,
    ) as error:  # rows of several lengths; a tensor on a GPU or with a gradient
        raise SamplingError(f"{name}: makes no array ({one_line(error)}); expected float32 numbers in rows") from error
