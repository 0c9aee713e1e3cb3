"""The guided network output e of any latents at any timestep, from the engine's step: rows that hand e out as it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from dit_runtime.pipeline import Pipeline
from dit_runtime.samplers.guidance import Branches, branches_from_labels
from dit_runtime.samplers.noise import Float32
from dit_runtime.samplers.schedule import E, Schedule, make_row, schedule_from_rows
from dit_runtime.sampling.batch import Batch
from dit_runtime.sampling.requests import ImageRequest

MOST_KEPT = 4096  # schedules of one row and branches that are kept: a search comes back to the same times


class Network:
    """The network with guidance, as a function of latents, timestep and image. A context manager: it holds a batch.

    Args:
        pipe: with the bundle and its engine.
        images: from ``Pipeline.prepare``: labels, guidance and noise of each image; their schedules are not used.
        batch_size: most latents in one call of the engine.

    Attributes:
        evaluations: latents that the network was asked about so far.
    """

    def __init__(self, pipe: Pipeline, images: Sequence[ImageRequest], batch_size: int) -> None:
        self.images, self.evaluations = list(images), 0
        self._pipe, self._batch_size = pipe, pipe.engine.info.batch_of(batch_size)
        self._batch = Batch(pipe.engine, pipe.manifest)
        self._rows: dict[float, Schedule] = {}
        self._branches: dict[tuple[object, ...], Branches] = {}

    def __enter__(self) -> Network:
        return self

    def __exit__(self, *error: object) -> None:
        self._batch.__exit__(*error)

    def evaluate(self, latents: Float32, times: Sequence[float], indices: Sequence[int]) -> Float32:
        """e, float32 ``[M, C, H, W]``, of latents ``[M, C, H, W]``, each at its timestep, for the image of its index.

        Raises:
            SamplingError: an output is not finite.
        """
        outputs = np.empty_like(latents)
        for first in range(0, len(latents), self._batch_size):
            part = range(first, min(first + self._batch_size, len(latents)))
            requests = [self._request(latents[at], times[at], indices[at]) for at in part]
            self._batch.add(list(enumerate(requests)))
            self._pipe.trust(self._batch.next_shape)
            outputs[part.start : part.stop] = self._batch.advance(read=True).latents
            if self._batch.failure is not None:  # of one image; the others are finished
                raise self._batch.failure
        self.evaluations += len(latents)
        return outputs

    def _request(self, latents: Float32, time: float, index: int) -> ImageRequest:
        image = self.images[index]
        if len(self._rows) + len(self._branches) > MOST_KEPT:
            self._rows.clear()
            self._branches.clear()
        if (schedule := self._rows.get(time)) is None:
            schedule = self._rows[time] = schedule_from_rows("network", "one", [time], [make_row(E, E)], [[0, 1]])
        key = (time, tuple(image.labels.items()), image.guidance, image.negative_label)
        if (branches := self._branches.get(key)) is None:
            model, diffusion = self._pipe.manifest.model, self._pipe.manifest.diffusion
            branches = self._branches[key] = branches_from_labels(
                image.labels, image.guidance, schedule, model, diffusion, image.negative_label
            )
        return replace(image, schedule=schedule, branches=branches, noise=latents, init=None)
