"""Inputs of the step beyond the golden records: images that differ in everything, and each one's result alone.

The result of an image alone, in a batch of one without guidance, is what the golden records anchor. From it follows
what every other call of the step must give: any batch, any place, any branches, guidance and sampler.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dit_runtime.backends.base import Array
from dit_runtime.backends.step import step_inputs
from dit_runtime.samplers.schedule import B_E, COEFFICIENTS, LOG_SIGMA_V, NOISE
from dit_runtime.verify.conditions import with_second_times
from dit_runtime.verify.replay import RecordedInputs, Replay

LARGEST_EXPONENT = 40.0  # of exp(h·v); exp(88) is float32's largest number


class Prediction(NamedTuple):
    """The guided network output ``e [B, C, H, W]``, and the variance channels ``v [B, C, H, W]`` of branch 0."""

    e: Array
    v: Array


class Expected(NamedTuple):
    """A result that follows from others, and to what its rounding errors are relative.

    Attributes:
        value: float64.
        scale: the sum of its terms' largest values.
        norm: the sum of its terms' norms.
    """

    value: Array
    scale: float
    norm: float


def factor_to_read_variance(v: Array) -> np.float32:
    """The factor h with which v is read from the noise's scale exp(h·v).

    exp and log round relative to 1, however small v is, so h is large.
    """
    largest = float(np.abs(v).max(initial=0))
    return np.float32(2.0 ** np.clip(np.floor(np.log2(LARGEST_EXPONENT / max(largest, 1e-3))), -6, 6))


def coefficients_to_predict(batch: int, factor: np.float32) -> Array:
    """The coefficients ``[B, 17]`` under which ``denoised`` is e, and the next latents are exp(factor·v)·noise."""
    coefficients = np.zeros((batch, COEFFICIENTS), np.float32)
    coefficients[:, [B_E, NOISE]] = 1
    coefficients[:, LOG_SIGMA_V] = factor
    return coefficients


def variance_from_latents(latents: Array, factor: np.float32) -> Array:
    """v of the next latents under ``coefficients_to_predict`` with a noise of ones."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.log(latents) / factor)


class MadeImages:
    """Images with latents, timestep and label of their own. The first ones are those of the record ``forward_1``.

    Conditions are numbered: ``own(image)`` is the image's timestep with its label, ``null(image)`` with the null class.

    Attributes:
        state: float32 ``[N, 3, C, H, W]``; all three slots are filled.
        noise: float32 ``[N, C, H, W]``.
        timesteps, labels: ``[2·N]``, of the conditions; most timesteps are no whole numbers. Those of a model of two
            times are ``[2·N, 2]``.
        table: the conditions' rows of the conditioning table, as the engine computes them.
    """

    def __init__(self, replay: Replay, count: int) -> None:
        self.replay, self.count = replay, count
        manifest = replay.bundle.manifest
        record = replay.bundle.records("forward_1")
        recorded, random = RecordedInputs.from_record(record), np.random.default_rng(15)
        known, shape = min(count, len(recorded.latents)), recorded.latents.shape[1:]
        self.state = random.standard_normal((count, 3, *shape)).astype(np.float32)
        self.state[:known, 0] = recorded.latents[:known]
        self.noise = random.standard_normal((count, *shape)).astype(np.float32)
        last = len(manifest.diffusion.betas) - 1 if manifest.diffusion.betas else 1
        timesteps = random.uniform(0.01, 0.99, count).astype(np.float32) * np.float32(last)
        labels = random.integers(0, manifest.model.classes, count).astype(np.int32)
        if manifest.model.times > 1:
            timesteps = with_second_times(timesteps, random)
        timesteps[:known], labels[:known] = recorded.timesteps[:known], recorded.labels[:known]
        self.timesteps = np.concatenate([timesteps, timesteps])
        self.labels = np.concatenate([labels, np.full_like(labels, manifest.model.null_class)])
        self.table = replay.compute_table(self.timesteps, self.labels)
        self._factor = factor_to_read_variance(2 * record["v"])
        self._alone: dict[tuple[int, int], Prediction] = {}

    def own(self, image: int) -> int:
        """The condition of an image: its timestep and label."""
        return image

    def null(self, image: int) -> int:
        """The condition of an image's timestep and the null class."""
        return self.count + image

    def run(
        self,
        images: Sequence[int],
        conditions: Array,
        weights: Array,
        coefficients: Array,
        noise: Array | None = None,
        rows: Array | None = None,
        table: Array | None = None,
    ) -> tuple[Array, Array]:
        """Run the step once, and return ``next_state [B, 3, C, H, W]`` and ``denoised [B, C, H, W]``.

        Args:
            images: the image in each place of the batch.
            conditions: ``[G, B]``, the condition of each branch of each place.
            weights: ``[G, B, C]``, the weight of each branch.
            coefficients: ``[B, 17]``, or ``[B, 19]`` with a clip.
            noise: ``[B, C, H, W]``; None is zeros.
            rows: ``[G, B]``, where the conditions are in ``table``; None makes a table of the conditions alone.
            table: the conditioning table.
        """
        replay, index = self.replay, list(images)
        if table is None:
            # The order in the table is the reverse of the order in the batch: a row's index must not be the place's.
            needed, rows = np.unique(-conditions, return_inverse=True)
            table, rows = self.table[-needed], rows.reshape(conditions.shape)
        assert rows is not None
        inputs = step_inputs(
            replay.bundle.manifest,
            self.state[index],
            coefficients.astype(np.float32),
            weights.astype(np.float32),
            rows.astype(np.int32),
            table,
            noise,
        )
        next_state, denoised = replay.engine.session("step").run(inputs, ["next_state", "denoised"])
        return next_state, denoised

    def predict(
        self,
        images: Sequence[int],
        conditions: Array,
        weights: Array,
        rows: Array | None = None,
        table: Array | None = None,
    ) -> Prediction:
        """Predict e and v in one call. Arguments are those of ``run``."""
        coefficients = coefficients_to_predict(len(images), self._factor)
        ones = np.ones_like(self.noise[list(images)])
        next_state, e = self.run(images, conditions, weights, coefficients, ones, rows, table)
        return Prediction(e, variance_from_latents(next_state[:, 0], self._factor))

    def predict_alone(self, image: int, condition: int) -> Prediction:
        """e and v ``[C, H, W]`` of one image and one condition, in a batch of one without guidance."""
        key = (image, condition)
        if key not in self._alone:
            weights = np.ones((1, 1, self.state.shape[2]))
            e, v = self.predict([image], np.array([[condition]]), weights)
            self._alone[key] = Prediction(e[0], v[0])
        return self._alone[key]

    def expect(self, image: int, conditions: Array, weights: Array) -> Expected:
        """What e must be for conditions ``[G]`` with weights ``[G, C]``: the sum of the branches' own results."""
        terms = [
            weight[:, None, None] * self.predict_alone(image, int(condition)).e.astype(np.float64)
            for condition, weight in zip(conditions, weights, strict=True)
            if weight.any()
        ]
        return expected_from_terms(terms)


def expected_from_terms(terms: Sequence[Array]) -> Expected:
    """The sum of terms."""
    scale = sum(float(np.abs(term).max()) for term in terms)
    return Expected(np.sum(terms, axis=0), scale, sum(float(np.linalg.norm(term)) for term in terms))
