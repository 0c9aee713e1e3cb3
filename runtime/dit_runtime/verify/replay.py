"""Run a bundle's graphs on the inputs of golden records, at every shape at which the engine must be right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dit_runtime.backends.base import Array, Engine, EngineInfo
from dit_runtime.backends.conditioning import Observation
from dit_runtime.backends.profiles import BatchShape
from dit_runtime.backends.step import compute_table, state_from_latents, step_inputs
from dit_runtime.bundle.reader import OBSERVATIONS, TILE, Bundle
from dit_runtime.core.errors import EngineError
from dit_runtime.samplers.guidance import branch_rows, guidance_weights
from dit_runtime.samplers.schedule import COEFFICIENTS
from dit_runtime.verify.budget import budget_for, precision_for_limits
from dit_runtime.verify.visits import ObservedEngine


def choose_shapes(info: EngineInfo, graph: str, usual: int, branches: Sequence[int] = (1,)) -> list[BatchShape]:
    """Choose the ``(batch, branches)`` at which a graph is verified.

    They are the least, usual, largest and an interior shape of every optimization profile. A graph without profiles is
    verified with one image and with the usual batch, for each number of branches.

    Args:
        info: of the engine.
        graph: name of the graph.
        usual: the usual batch, for a graph without profiles.
        branches: the numbers of branches, for a graph without profiles.
    """
    if graph in info.profiles:
        return info.shapes_of(graph)
    return [(batch, count) for count in branches for batch in sorted({1, info.batch_of(usual)})]


def cover_with_batches(count: int, batch: int) -> list[NDArray[np.int64]]:
    """Split ``count`` images into batches of one size. The last batch is filled up with the first images.

    Returns:
        The images' indices in each batch, int64 ``[batch]``.
    """
    return [(first + np.arange(batch)) % count for first in range(0, count, batch)]


def show_time(time: Array) -> str:
    """A timestep, or both times of a model that gets two, for a message."""
    return " and ".join(f"{value:g}" for value in np.atleast_1d(time).tolist())


@dataclass(frozen=True)
class RecordedInputs:
    """Inputs of the network from a golden record.

    Attributes:
        latents: float32 ``[B, C, H, W]``.
        timesteps, labels: ``[B]``; timesteps of a model of two times ``[B, 2]``.
        guidance: the guidance scale of all images.
    """

    latents: Array
    timesteps: Array
    labels: Array
    guidance: float

    @staticmethod
    def from_record(record: Mapping[str, Array]) -> RecordedInputs:
        return RecordedInputs(record["latents"], record["timesteps"], record["labels"], float(record["guidance"]))

    def select(self, index: Array | slice) -> RecordedInputs:
        """The inputs of the images at ``index``, in that order."""
        return RecordedInputs(self.latents[index], self.timesteps[index], self.labels[index], self.guidance)


class Replay:
    """Runs an engine's graphs on recorded inputs. Batches above the engine's limit run in parts.

    Attributes:
        engine: the engine; what it is asked is noted in ``visits``.
        budget: the bundle's limits for this engine.
        tile: height and width of the tiles that the engine's decoder was built for; None for whole images.
        observations: float32 ``[K, O]``, those that a policy's labels number; None of a model of classes.

    Raises:
        BundleError: the bundle has no limits for the engine's precision.
        EngineError: the engine's decoder is for tiles of which the bundle has no golden record.
    """

    def __init__(self, bundle: Bundle, engine: Engine) -> None:
        self.bundle, self.engine, self.model = bundle, ObservedEngine(engine), bundle.manifest.model
        self.visits = self.engine.visits
        self.budget = budget_for(bundle, precision_for_limits(bundle, engine.info))
        self.tile = engine.info.tile
        self.observations: Array | None = None
        if self.model.observation:
            self.observations = bundle.records(OBSERVATIONS)["observations"]
        self._images = "images"
        if self.tile is not None:
            side = max(self.tile)
            self._images = f"{TILE}{side}"
            if not bundle.has_records(self._images):
                raise EngineError(
                    f"{engine.info.name}: its decoder is for tiles of {side}, and the bundle has no golden record of "
                    f"such a tile; export the bundle with dit-export --decode-tile {side}, or use the engine without a "
                    "verdict with --engine"
                )

    def list_observations(self) -> list[Observation] | None:
        """The observations as a request has them; None of a model of classes."""
        return None if self.observations is None else [Observation(each) for each in self.observations]

    def read_decoder_record(self) -> dict[str, Array]:
        """Read the decoder's golden record (``latents``, ``decoded``, ``images``), of whole images or of tiles."""
        return self.bundle.records(self._images)

    def crop_to_tile(self, latents: Array) -> Array:
        """Crop latents ``[N, C, H, W]`` to the part that the decoder's golden record has: the first tile, or all."""
        if self.tile is None:
            return latents
        height, width = self.tile
        return latents[: len(self.read_decoder_record()["latents"]), :, :height, :width]

    def name_of_floors(self, kind: str) -> str:
        """The name of the floors of a kind, ``decoder`` or ``image``, for whole images or for tiles."""
        return kind if self.tile is None else f"{self._images} {kind}"

    def compute_table(self, timesteps: Array, labels: Array) -> Array:
        """Compute the conditioning table ``[R, …]`` for pairs of timestep ``[R]`` or ``[R, 2]`` and label ``[R]``."""
        return compute_table(self.engine, self.bundle.manifest, timesteps, labels, self.observations)

    def run_step(
        self, images: RecordedInputs, coefficients: Array, noise: Array | None = None, branches: int = 0
    ) -> tuple[Array, Array]:
        """Run the step, and return ``next_state [B, 3, C, H, W]`` and ``denoised [B, C, H, W]``.

        Args:
            images: latents, timesteps, labels and guidance.
            coefficients: ``[B, 17]``, or ``[B, 19]`` with a clip: the sampler's numbers of each image.
            noise: ``[B, C, H, W]``; None is zeros.
            branches: the least number of branches.
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
        """Run the probe, and return each block's output ``[G·B, T, D]``.

        Args:
            images: latents, timesteps, labels and guidance.
            table: the conditioning table ``[G·B, …]``, a row for each branch and image.
        """
        batch = len(images.latents)
        inputs = self.make_inputs(images, np.zeros((batch, COEFFICIENTS), np.float32))
        spec = self.bundle.manifest.table
        inputs[spec.name] = table.astype(spec.dtype)
        inputs["rows"] = np.arange(len(table), dtype=np.int32).reshape(-1, batch)
        return self.engine.session("probe").run(inputs, [f"blocks.{index}" for index in range(self.model.depth)])

    def make_inputs(
        self, images: RecordedInputs, coefficients: Array, noise: Array | None = None, branches: int = 0
    ) -> dict[str, Array]:
        """Make the inputs of step and probe, with a conditioning table that the engine computes.

        Arguments are those of ``run_step``. Branches beyond those that the guidance needs repeat the last branch, and
        share its weight.
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
        # The conditioning table has a row for every image and condition, with repeats: simple, and records are small.
        table = self.compute_table(np.repeat(images.timesteps, len(conditions), axis=0), np.tile(conditions, batch))
        numbers = (rows + np.arange(batch) * len(conditions)).astype(np.int32)
        state = state_from_latents(images.latents)
        return step_inputs(self.bundle.manifest, state, coefficients, weights, numbers, table, noise)

    def run_decoder(self, latents: Array, output: str) -> Array:
        """Decode latents ``[N, C, h, w]``, and return the decoder's output ``decoded`` or ``images``."""
        most = self.engine.info.batch_of(len(latents))
        parts = [latents[first : first + most] for first in range(0, len(latents), most)]
        return np.concatenate([self.engine.session("decoder").run({"latents": part}, [output])[0] for part in parts])
