"""A bundle's graphs on an engine, evaluated on recorded inputs at the batch sizes that the engine must be right at.

An engine with optimization profiles tells of them by a method ``profiles(graph)``: for each profile the least, usual
and largest ``(batch, branches)``; ``rows`` take the batch's place for the conditioner, and branches are 1 where a graph
has none. An engine without that method takes any shape up to ``max_batch``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dit_runtime.backends.open import Array, Engine
from dit_runtime.backends.tensorrt.store import StoredEngine
from dit_runtime.bundle.reader import TILE, Bundle
from dit_runtime.core.errors import EngineError
from dit_runtime.samplers.guidance import branch_rows, guidance_weights
from dit_runtime.samplers.schedule import COEFFICIENTS
from dit_runtime.verify.budget import budget_for, precision_of

Shape = tuple[int, int]  # (batch, branches)


def shapes_to_verify(engine: Engine, graph: str, usual: int, branches: Sequence[int] = (1,)) -> list[Shape]:
    """The ``(batch, branches)`` at which a graph must be right.

    Least, usual, largest and an interior one of every optimization profile; without profiles a single image and the
    ``usual`` batch, for each number of ``branches``.
    """
    profiles = getattr(engine, "profiles", None)
    if profiles is None:
        most = engine.max_batch or usual
        return [(batch, count) for count in branches for batch in sorted({1, min(usual, most)})]
    shapes: list[Shape] = []
    for least, typical, largest in profiles(graph):
        interior = ((least[0] + largest[0]) // 2, (least[1] + largest[1]) // 2)
        shapes += [tuple(shape) for shape in (least, typical, interior, largest)]
    return list(dict.fromkeys(shapes))


def compute_table(engine: Engine, name: str, timesteps: Array, labels: Array) -> Array:
    """Rows of the conditioning table ``name``, in calls of as many as the engine takes at once."""
    profiles = getattr(engine, "profiles", None)
    most = len(timesteps) if profiles is None else max(largest for _, _, (largest, _) in profiles("conditioner"))
    session = engine.session("conditioner")
    parts = []
    for first in range(0, len(timesteps), most):
        part = slice(first, first + most)
        inputs = {"timesteps": timesteps[part].astype(np.float32), "labels": labels[part].astype(np.int32)}
        parts += session.run(inputs, [name])
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def has_branches(engine: Engine, branches: int) -> bool:
    """Whether an engine runs steps of so many guidance branches."""
    profiles = getattr(engine, "profiles", None)
    return profiles is None or any(largest >= branches for _, _, (_, largest) in profiles("step"))


def tile_of(stored: StoredEngine | None, latent_size: Shape) -> Shape | None:
    """Height and width of the tiles that a built engine's decoder is for; None where it decodes whole images."""
    if stored is None or "decoder" not in stored.graphs:
        return None
    (height, width), *others = {tuple(each["latents"][2][2:]) for each in stored.graphs["decoder"].profiles}
    return None if (height, width) == latent_size or others else (height, width)


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
    def of(record: Mapping[str, Array]) -> RecordedInputs:
        return RecordedInputs(record["latents"], record["timesteps"], record["labels"], float(record["guidance"]))

    def at(self, index: Array | slice) -> RecordedInputs:
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
        self.budget = budget_for(bundle, precision_of(bundle, engine))
        self.tile = tile_of(getattr(engine, "stored", None), self.model.latent_size)
        self._images = "images"
        if self.tile is not None:
            side = max(self.tile)
            self._images = f"{TILE}{side}"
            if not bundle.has_records(self._images):
                raise EngineError(
                    f"{engine.name}: its decoder is for tiles of {side}, of which the bundle has no record; export "
                    f"with dit-export --decode-tile {side}, or name the engine (--engine) to use it unverified"
                )

    def decoder_record(self) -> dict[str, Array]:
        """The record of latents, ``decoded`` and ``images`` in the size that the engine decodes."""
        return self.bundle.records(self._images)

    def crop_to_tile(self, latents: Array) -> Array:
        """Of latents ``[N, C, H, W]`` what that record is of: the first images' first tile, or all."""
        if self.tile is None:
            return latents
        height, width = self.tile
        return latents[: len(self.decoder_record()["latents"]), :, :height, :width]

    def floors_of(self, kind: str) -> str:
        """The name of the floors of ``decoder`` or ``image`` in that size."""
        return kind if self.tile is None else f"{self._images} {kind}"

    def table(self, timesteps: Array, labels: Array) -> Array:
        """The conditioning table of pairs: timesteps ``[R]`` and labels ``[R]``."""
        return compute_table(self.engine, self.bundle.manifest.table.name, timesteps, labels)

    def step(
        self, images: RecordedInputs, coefficients: Array, noise: Array | None = None, branches: int = 0
    ) -> tuple[Array, Array]:
        """``next_state`` and ``denoised`` of images with a row of coefficients each ``[B, 17]``.

        ``branches``: at least so many.
        """
        batch = len(images.latents)
        most = self.engine.max_batch or batch
        noise = np.zeros_like(images.latents) if noise is None else noise
        found = []
        for first in range(0, batch, most):
            part = slice(first, first + most)
            inputs = self.inputs(images.at(part), coefficients[part], noise[part], branches)
            found.append(self.engine.session("step").run(inputs, ["next_state", "denoised"]))
        next_state, denoised = (np.concatenate(parts) for parts in zip(*found, strict=True))
        return next_state, denoised

    def blocks(self, images: RecordedInputs, table: Array) -> list[Array]:
        """Each block's output ``[G·B, T, D]``, from a table with a row for each branch and image ``[G·B, …]``."""
        batch = len(images.latents)
        inputs = self.inputs(images, np.zeros((batch, COEFFICIENTS), np.float32))
        spec = self.bundle.manifest.table
        inputs[spec.name] = table.astype(spec.dtype)
        inputs["rows"] = np.arange(len(table), dtype=np.int32).reshape(-1, batch)
        return self.engine.session("probe").run(inputs, [f"blocks.{index}" for index in range(self.model.depth)])

    def inputs(
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
        table = self.table(np.repeat(images.timesteps, len(conditions)), np.tile(conditions, batch))
        state = np.zeros((batch, 3, *images.latents.shape[1:]), np.float32)
        state[:, 0] = images.latents
        return {
            "state": state,
            "noise": np.zeros_like(images.latents) if noise is None else noise,
            "coefficients": coefficients,
            "guidance": weights,
            "rows": (rows + np.arange(batch) * len(conditions)).astype(np.int32),
            self.bundle.manifest.table.name: table,
        }

    def decoder(self, latents: Array, output: str) -> Array:
        """Latents → ``decoded`` or ``images``."""
        most = self.engine.max_batch or len(latents)
        parts = [latents[first : first + most] for first in range(0, len(latents), most)]
        return np.concatenate([self.engine.session("decoder").run({"latents": part}, [output])[0] for part in parts])
