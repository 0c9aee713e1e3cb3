"""What a fault does to images: how far the worst image is from the sound engine's, at many inputs."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from fault import Fault
from faulty_engine import Array

from dit_runtime import Pipeline
from dit_runtime.backends.base import Engine
from dit_runtime.backends.onnxruntime.engine import OnnxRuntimeEngine
from dit_runtime.bundle.manifest import ENCODER
from dit_runtime.bundle.reader import Bundle
from dit_runtime.core.errors import BundleError, SamplingError
from dit_runtime.sampling.requests import ImageRequest
from dit_runtime.verify.metrics import psnr

BATCHES = (1, 2, 3, 5, 7, 10)  # each makes all images anew
NOT_FINITE = "not finite"
NO_IMAGE = "no image"  # the bundle is not read


def make_requests(pipe: Pipeline) -> list[ImageRequest]:
    """Ten images of all classes of a small model: four samplers, steps and guidance scales; two mixtures."""
    groups = (
        ([0, 5, {1: 0.7, 2: 0.3}], {"sampler": "dpmpp-3m", "steps": 5, "guidance": 2.0}),
        ([3, 9], {"sampler": "ddpm", "steps": 4, "guidance": 1.0}),
        ([{4: 0.6, 6: 0.4}, 7, 8], {"sampler": "ddim", "steps": 6, "guidance": 4.0}),
        ([6, 1], {"sampler": "euler-ancestral", "steps": 3, "guidance": 6.0}),
    )
    found = []
    for first, (labels, settings) in enumerate(groups):
        found += pipe.prepare(labels, seeds=10 * first, **settings)  # type: ignore[arg-type]
    return found


def make_images(bundle: Bundle, engine: Engine) -> Iterator[Array]:
    """Images uint8 ``[N, H, W, 3]``: sampled with continuous batching and decoded, at each batch."""
    pipe = Pipeline(bundle, engine)
    requests = make_requests(pipe)
    for batch in BATCHES:
        found = dict(pipe.stream(requests, batch_size=batch))
        latents = np.stack([found[index] for index in range(len(requests))])
        decoder = engine.session("decoder")
        for first in range(0, len(latents), batch):
            yield decoder.run({"latents": latents[first : first + batch]}, ["images"])[0]


def encode_images(bundle: Bundle, engine: Engine) -> Iterator[Array]:
    """Recorded images encoded at each batch, with noise of the encoder's deviation, and decoded by a sound decoder."""
    images = bundle.records(ENCODER)["images"]
    noise = np.random.default_rng(0).standard_normal
    sound = OnnxRuntimeEngine(bundle, threads=1).session("decoder")
    names = [tensor.name for tensor in bundle.manifest.graphs[ENCODER].outputs]
    for batch in BATCHES:
        given = np.take(images, np.arange(batch), axis=0, mode="wrap")
        found = dict(zip(names, engine.session(ENCODER).run({"images": given}, names), strict=True))
        latents = found["mean"] + found["std"] * noise(found["mean"].shape).astype(np.float32)
        yield sound.run({"latents": latents.astype(np.float32)}, ["images"])[0]


def damage_of(fault: Fault, bundle: Bundle, sound: list[Array] | None = None) -> float | str:
    """PSNR in dB of the worst image with a fault against the sound engine's; infinity where all are equal.

    Args:
        fault: the fault.
        bundle: the bundle.
        sound: of ``make_sound_images``; None makes them.
    """
    expected = make_sound_images(fault, bundle) if sound is None else sound
    make = encode_images if fault.graph == ENCODER else make_images
    try:
        with fault.seeded(bundle) as (changed, engine):
            found = list(make(changed, engine))
    except SamplingError:
        return NOT_FINITE
    except BundleError:
        return NO_IMAGE
    return min(psnr(*pair) for batch in zip(found, expected, strict=True) for pair in zip(*batch, strict=True))


def make_sound_images(fault: Fault, bundle: Bundle) -> list[Array]:
    """What ``damage_of`` compares with."""
    make = encode_images if fault.graph == ENCODER else make_images
    return list(make(bundle, OnnxRuntimeEngine(bundle, threads=1)))
