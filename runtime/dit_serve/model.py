"""One bundle that is served: its pipeline, its batcher, and its images as PNG files with their records."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dit_runtime.output.images import png_from_image
from dit_runtime.output.provenance import BatchPosition, entry_from_request, text_from_entries
from dit_runtime.output.request import DecodeSettings
from dit_runtime.pipeline import Pipeline
from dit_runtime.samplers.schedule import Schedule
from dit_runtime.sampling.requests import ImageRequest
from dit_serve.batcher import Batcher, JobQueue


class ServedModel:
    """A bundle that is served, wherever its images are made.

    Attributes:
        name: in requests.
        pipe: prepares requests.
        tables: sampler tables by their names.
        batcher: takes its jobs.

    Raises:
        SamplingError: a table does not fit the bundle.
    """

    def __init__(
        self, name: str, pipe: Pipeline, batcher: JobQueue, tables: Mapping[str, Schedule] | None = None
    ) -> None:
        self.name, self.pipe, self.tables = name, pipe, dict(tables or {})
        for table in self.tables.values():
            pipe.prepare([0], 0, sampler=table)
        self.batcher = batcher

    def png(
        self,
        image: NDArray[np.uint8],
        request: ImageRequest | None = None,
        eta: float = 0.0,
        batches: tuple[int, int] | None = None,
    ) -> bytes:
        """An image ``[H, W, 3]`` as PNG, with the record of its request.

        The record's ``batch`` says how to make the image again: alone, which gives the same. Its ``batches`` are those
        of ``Finished``, in which it really was.
        """
        if request is None:
            return png_from_image(image)
        position = BatchPosition(1, 0, tuple(request.branches.needed.tolist()))
        entry = {**entry_from_request(self.pipe, request, eta, DecodeSettings(), position), **self.maker_of(request)}
        if batches is not None:
            entry["batches"] = list(batches)
        return png_from_image(image, text_from_entries([entry], image))

    def maker_of(self, request: ImageRequest) -> Mapping[str, Any]:
        """What an image's record says of its maker, where it was not made by ``pipe``."""
        return {}


class Model(ServedModel):
    """A bundle that is served by its own batcher in this process.

    Attributes:
        pipe: ready to sample.
        batcher: which runs its jobs.

    Raises:
        SamplingError: a table does not fit the bundle, or the engine does not take batches of that size.
    """

    batcher: Batcher

    def __init__(
        self,
        name: str,
        pipe: Pipeline,
        batch_size: int,
        most_waiting: int,
        tables: Mapping[str, Schedule] | None = None,
    ) -> None:
        super().__init__(name, pipe, Batcher(pipe, batch_size, most_waiting), tables)
