"""Relations of decoder and encoder: an image's result does not depend on batch, place and the other images."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from dit_runtime.backends.base import Array
from dit_runtime.bundle.manifest import ENCODER
from dit_runtime.verify.effort import Effort, list_batches
from dit_runtime.verify.metrics import LEVELS
from dit_runtime.verify.relation import Relation
from dit_runtime.verify.replay import Replay
from dit_runtime.verify.rung import Rung

SMALL = 5  # batches up to this one are called in two orders


def decoder_batches(replay: Replay, effort: Effort) -> Iterator[Rung]:
    """Float images at every batch and place against those decoded alone, and uint8 images against their floats."""
    batches = list_batches(replay.engine.info, "decoder", effort.decoded, effort.sampled)
    latents = make_latents(replay.read_decoder_record()["latents"], max(batches))
    session = replay.engine.session("decoder")
    floors = replay.name_of_floors("decoder")
    relation, off, worst = Relation(replay.budget, "decoder batches"), 0.0, "nothing"
    # Both outputs in one call, as the pipeline asks for them.
    outputs = ["images", "decoded"]
    alone = np.concatenate([session.run({"latents": one[None]}, outputs)[1] for one in latents])
    for batch in batches:
        for places in _orders_of(batch):
            images, decoded = session.run({"latents": latents[places]}, outputs)
            for place, image in enumerate(places):
                where = f"image {place + 1} at batch {batch}"
                wanted = alone[image]
                scale, norm = float(np.abs(alone).max()), float(np.linalg.norm(wanted))
                relation.add("decoder", floors, decoded[place], wanted, where, scale, norm)
                difference = _levels_between(images[place], decoded[place])
                if not difference <= off:
                    off, worst = difference, where
    visited = f"batches {' '.join(map(str, batches))}"
    yield relation.rung(visited)
    yield Rung(
        "uint8 batches",
        off,
        replay.budget.tolerance_of("image_bias"),
        "levels",
        f"mean |Δ| from the rounded floats; {'all are equal' if not off else f'worst: {worst}'}; {visited}",
    )


def encoder_batches(replay: Replay, effort: Effort) -> Rung:
    """Latents of images at every batch and place against those encoded alone."""
    recorded = replay.bundle.records(ENCODER)["images"]
    batches = list_batches(replay.engine.info, ENCODER, effort.decoded, effort.sampled)
    images = make_latents(recorded.transpose(0, 3, 1, 2), max(batches)).transpose(0, 2, 3, 1)
    names = [tensor.name for tensor in replay.bundle.manifest.graphs[ENCODER].outputs]
    session, relation = replay.engine.session(ENCODER), Relation(replay.budget, "encoder batches")
    alone = [session.run({"images": np.ascontiguousarray(image[None])}, names) for image in images]
    for batch in batches:
        for places in _orders_of(batch):
            found = session.run({"images": np.ascontiguousarray(images[places])}, names)
            for place, image in enumerate(places):
                for name, values, wanted in zip(names, found, alone[image], strict=True):
                    scale, norm = float(np.abs(wanted).max()), float(np.linalg.norm(wanted))
                    where = f"{name} of image {place + 1} at batch {batch}"
                    relation.add("encoder", ENCODER, values[place], wanted[0], where, scale, norm)
    return relation.rung(f"batches {' '.join(map(str, batches))}")


def make_latents(recorded: Array, count: int) -> Array:
    """Make ``count`` different latents ``[N, C, h, w]`` from recorded ones, each in more and more orientations."""
    turns = [recorded, recorded[..., ::-1], recorded[..., ::-1, :], recorded[..., ::-1, ::-1]]
    moved = [np.roll(each, shift, axis=-1) for shift in range(recorded.shape[-1]) for each in turns]
    found = np.concatenate(moved[: -(-count // len(recorded))])[:count]
    return np.ascontiguousarray(found)


def _orders_of(batch: int) -> list[Array]:
    """The orders of a batch's images that are called: theirs, and in small batches the reverse."""
    order = np.arange(batch)
    return [order, order[::-1]] if 1 < batch <= SMALL else [order]


def _levels_between(images: NDArray[np.uint8], decoded: Array) -> float:
    """The mean distance in levels of a uint8 image ``[H, W, 3]`` from the float image ``[3, H, W]`` that it shows."""
    if images.shape != (*decoded.shape[1:], decoded.shape[0]) or not np.isfinite(decoded).all():
        return np.inf
    expected = np.rint(np.clip(decoded.astype(np.float64) / 2 + 0.5, 0, 1) * LEVELS).transpose(1, 2, 0)
    return float(np.abs(images - expected).mean())
