"""A bundle's graphs on an engine, evaluated on recorded inputs at the batch sizes that the engine must be right at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dit_runtime.backends.base import Array, Engine, EngineInfo
from dit_runtime.backends.profiles import BatchShape
from dit_runtime.backends.step import compute_table, state_from_latents, step_inputs
from dit_runtime.bundle.reader import TILE, Bundle
from dit_runtime.core.errors import EngineError
from dit_runtime.samplers.guidance import branch_rows, guidance_weights
from dit_runtime.samplers.schedule import COEFFICIENTS
from dit_runtime.verify.budget import budget_for, precision_for_limits


def choose_shapes(info: EngineInfo, graph: str, usual: int, branches: Sequence[int] = (1,)) -> list[BatchShape]:
    """The ``(batch, branches)`` at which a graph must be right.

    Least, usual, largest and an interior one of every optimization profile; without profiles a single image and the
    ``usual`` batch, for each number of ``branches``.
    """
    if graph in info.profiles:
        return info.shapes_of(graph)
    return [(batch, count) for count in branches for batch in sorted({1, info.batch_of(usual)})]


def cover_with_batches(count: int, batch: int) -> list[NDArray[np.int64]]:
    """Batches of a size that together have each of ``count`` images, one after the other and from the first again."""
    return [(first + np.arange(batch)) % count for first in range(0, count, batch)]


@dataclass(frozen=True)
class RecordedInputs:
    """What the network is asked about: latents ``[B, C, H, W]``, timesteps ``[B]``, labels ``[B]``, one guidance."""

    latents: Array
    timesteps: Array
    labels: Array
    guidance: float

    @staticmethod
    def from_record(record: Mapping[str, Array]) -> RecordedInputs:
        return RecordedInputs(record["latents"], record["timesteps"], record["labels"], float(record["guidance"]))

    def select(self, index: Array | slice) -> RecordedInputs:
        """Some of the images, in another order or several times."""
        return RecordedInputs(self.latents[index], self.timesteps[index], self.labels[index], self.guidance)


class Replay:
    """The engine's graphs on recorded inputs. Batches above the engine's limit run in parts.

    Attributes:
        budget: what the bundle allows an engine of this precision.
        tile: height and width of the tiles that its decoder was built for, None for whole images.

    Raises:
        BundleError: the bundle has no limits for the engine's precision.
        EngineError: the bundle has no record of such tiles.
    """

    def __init__(self, bundle: Bundle, engine: Engine) -> None:
        self.bundle, self.engine, self.model = bundle, engine, bundle.manifest.model
        self.budget = budget_for(bundle, precision_for_limits(bundle, engine.info))
        self.tile = engine.info.tile
        self._images = "images"
        if self.tile is not None:
            side = max(self.tile)
            self._images = f"{TILE}{side}"
            if not bundle.has_records(self._images):
                raise EngineError(
                    f"{engine.info.name}: its decoder is for tiles of {side}, of which the bundle has no record; "
                    f"export with dit-export --decode-tile {side}, or name the engine (--engine) to use it unverified"
                )

    def read_decoder_record(self) -> dict[str, Array]:
        """The record of latents, ``decoded`` and ``images`` in the size that the engine decodes."""
        return self.bundle.records(self._images)

    def crop_to_tile(self, latents: Array) -> Array:
        """Of latents ``[N, C, H, W]`` what that record is of: the first images' first tile, or all."""
        if self.tile is None:
            return latents
        height, width = self.tile
        return latents[: len(self.read_decoder_record()["latents"]), :, :height, :width]

    def name_of_floors(self, kind: str) -> str:
        """The name of the floors of ``decoder`` or ``image`` in that size."""
        return kind if self.tile is None else f"{self._images} {kind}"

    def compute_table(self, timesteps: Array, labels: Array) -> Array:
        """The conditioning table of pairs: timesteps ``[R]`` and labels ``[R]``."""
        return compute_table(self.engine, self.bundle.manifest, timesteps, labels)

    def run_step(
        self, images: RecordedInputs, coefficients: Array, noise: Array | None = None, branches: int = 0
    ) -> tuple[Array, Array]:
        """``next_state`` and ``denoised`` of images with a row of coefficients each ``[B, 17]``.

        ``branches``: at least so many.
        """
        batch = len(images.latents)
        most = self.engine.info.batch_of(batch)
        noise = np.zeros_like(images.latents) if noise is None else noise
        found = []
        for first in range(0, batch, most):
            part = slice(first, first + most)
            inputs = self.make_inputs(images.select(part), coefficients[part], noise[part], branches)
            found.append(self.engine.session("step").run(inputs, ["next_state", "denoised"]))
        next_state, denoised = (np.concatenate(parts) for parts in zip(*found, strict=True))
        return next_state, denoised

    def run_blocks(self, images: RecordedInputs, table: Array) -> list[Array]:
        """Each block's output ``[G·B, T, D]``, from a table with a row for each branch and image ``[G·B, …]``."""
        batch = len(images.latents)
        inputs = self.make_inputs(images, np.zeros((batch, COEFFICIENTS), np.float32))
        spec = self.bundle.manifest.table
        inputs[spec.name] = table.astype(spec.dtype)
        inputs["rows"] = np.arange(len(table), dtype=np.int32).reshape(-1, batch)
        return self.engine.session("probe").run(inputs, [f"blocks.{index}" for index in range(self.model.depth)])

    def make_inputs(
        self, images: RecordedInputs, coefficients: Array, noise: Array | None = None, branches: int = 0
    ) -> dict[str, Array]:
        """The inputs of step and probe, the conditioning table computed by the engine.

        ``branches`` as in ``step``: those beyond what the guidance needs repeat its last and share that one's weight.
        """
        batch, channels = images.latents.shape[:2]
        guided = self.bundle.manifest.diffusion.guidance_channels
        weights = guidance_weights(images.guidance, batch, channels, guided)
        labels = images.labels.astype(np.int32)
        conditions, rows = branch_rows(labels, self.model.null_class, len(weights))
        if (more := branches - len(weights)) > 0:
            weights = np.pad(weights, ((0, more), (0, 0), (0, 0)), mode="edge")
            weights[-more - 1 :] /= more + 1
            rows = np.pad(rows, ((0, more), (0, 0)), mode="edge")
        # A row per (image's timestep, condition): simple, and the records are small.
        table = self.compute_table(np.repeat(images.timesteps, len(conditions)), np.tile(conditions, batch))
        numbers = (rows + np.arange(batch) * len(conditions)).astype(np.int32)
        state = state_from_latents(images.latents)
        return step_inputs(self.bundle.manifest, state, coefficients, weights, numbers, table, noise)

    def run_decoder(self, latents: Array, output: str) -> Array:
        """Latents → ``decoded`` or ``images``."""
        most = self.engine.info.batch_of(len(latents))
        parts = [latents[first : first + most] for first in range(0, len(latents), most)]
        return np.concatenate([self.engine.session("decoder").run({"latents": part}, [output])[0] for part in parts])
