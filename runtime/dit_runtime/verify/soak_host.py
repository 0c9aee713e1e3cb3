"""The host's results of a soak's work: ONNX Runtime on the CPU, each image alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import islice

import numpy as np

from dit_runtime.backends.base import Array, Engine, Session
from dit_runtime.backends.conditioning import TableLimits
from dit_runtime.backends.host_loop import HostLoop
from dit_runtime.backends.open import open_engine
from dit_runtime.bundle.manifest import ENCODER, Manifest
from dit_runtime.bundle.reader import Bundle
from dit_runtime.core.errors import SamplingError
from dit_runtime.samplers.schedule import A_Z, B_E, BOUND, CLEAN, CLIPPED, INPUT, LOG_SIGMA
from dit_runtime.sampling.batch import Batch
from dit_runtime.sampling.requests import ImageRequest
from dit_runtime.verify.metrics import relative_error
from dit_runtime.verify.soak_cases import SoakImage, start_image

REFERENCE = "onnxruntime"
MOST_KEPT = 256  # results that are kept, so that shrinking a case does not compute them again

Check = Callable[[], None]  # called between steps; raises TimeOverError when the time is over


class UnusableError(Exception):
    """The host's own results of a case are not finite, so that there is nothing to compare with."""


class TimeOverError(Exception):
    """The time is over in the midst of a case."""


class Host:
    """The host for a bundle at one size. It keeps some of its results.

    Raises:
        EngineError: ONNX Runtime is not installed.
    """

    def __init__(self, bundle: Bundle) -> None:
        self._manifest, self._engine = bundle.manifest, open_engine(bundle, REFERENCE, threads=1)
        self._kept: dict[tuple[str, SoakImage], Array] = {}

    def close(self) -> None:
        """Free all memory."""
        self._engine.close()

    def load(self, graph: str) -> None:
        """Load a graph before several threads ask for it."""
        self._engine.session(graph)

    def latents_of(self, image: SoakImage, request: ImageRequest, check: Check) -> Array:
        """The last latents ``[C, h, w]`` of an image.

        Raises:
            UnusableError: they are not finite.
        """
        return self._keep("latents", image, lambda: self._sample(self._engine, request, check))

    def start_of(self, image: SoakImage) -> Array:
        """The latents ``[C, h, w]`` of the image that ``image`` starts from."""
        return self._keep("start", image, lambda: encode(self._engine, start_image(image, self._manifest)))

    def decode(self, latents: Array) -> tuple[Array, Array]:
        """One image's uint8 pixels ``[1, H, W, 3]``, and its pixels before rounding, from latents ``[C, h, w]``."""
        return decode(self._engine, latents[None], 1)

    def spread_of(self, image: SoakImage, request: ImageRequest, size: float, check: Check) -> float:
        """How many times a disturbance of a relative ``size`` in every step is in the image's last latents."""
        disturbed = _DisturbedEngine(self._engine, self._manifest, size, image.seed)
        expected = self.latents_of(image, request, check)
        return relative_error(self._sample(disturbed, request, check), expected) / size

    def _sample(self, engine: Engine, request: ImageRequest, check: Check) -> Array:
        try:
            return sample(engine, self._manifest, [request], 1, check)[0]
        except SamplingError as error:
            raise UnusableError from error

    def _keep(self, what: str, image: SoakImage, compute: Callable[[], Array]) -> Array:
        if (what, image) not in self._kept:
            while len(self._kept) >= MOST_KEPT:
                del self._kept[next(iter(self._kept))]
            self._kept[what, image] = compute()
        return self._kept[what, image]


class Hosts:
    """The host at each size, opened when it is first asked for. The host of one size is open at a time."""

    def __init__(self) -> None:
        self._host: Host | None = None
        self._size: tuple[int, int] | None = None

    def at(self, bundle: Bundle) -> Host:
        """The host for a bundle at its size in use."""
        if self._host is None or self._size != bundle.manifest.image_size:
            self.close()
            self._host, self._size = Host(bundle), bundle.manifest.image_size
        return self._host

    def close(self) -> None:
        """Close the host that is open."""
        if self._host is not None:
            self._host.close()
            self._host = None


def sample(
    engine: Engine, manifest: Manifest, requests: Sequence[ImageRequest], most: int, check: Check
) -> list[Array]:
    """The last latents ``[C, h, w]`` of each image. At most ``most`` are in the batch; others join as images finish."""
    found: dict[int, Array] = {}
    waiting = iter(enumerate(requests))
    with Batch(engine, manifest) as batch:
        batch.add(list(islice(waiting, most)))
        while len(batch):
            check()
            step = batch.advance()
            for index in np.flatnonzero(step.finished):
                found[step.keys[index]] = step.latents[index].copy()
            batch.add(list(islice(waiting, most - len(batch))))
    return [found[index] for index in range(len(requests))]


def decode(engine: Engine, latents: Array, most: int) -> tuple[Array, Array]:
    """uint8 images ``[N, H, W, 3]`` and pixels before rounding, ``most`` images in one call."""
    parts = [latents[first : first + most] for first in range(0, len(latents), most)]
    found = [engine.session("decoder").run({"latents": part}, ["images", "decoded"]) for part in parts]
    images, pixels = (np.concatenate(each) for each in zip(*found, strict=True))
    return images, pixels


def encode(engine: Engine, pixels: Array) -> Array:
    """Latents ``[C, h, w]`` of an image ``[H, W, 3]``."""
    (mean,) = engine.session(ENCODER).run({"images": pixels[None]}, ["mean"])
    found: Array = mean[0]
    return found


class _DisturbedEngine:
    """The host with noise of a relative ``size`` in each step's latents and network output."""

    def __init__(self, host: Engine, manifest: Manifest, size: float, seed: int) -> None:
        self.info, self._host, self._manifest = host.info, host, manifest
        self._size, self._rng = size, np.random.default_rng(seed % 2**64)

    def session(self, graph: str) -> Session:
        session = self._host.session(graph)
        return DisturbedSession(session, self._size, self._rng) if graph == "step" else session

    def release(self, graph: str) -> None:
        self._host.release(graph)

    def open_loop(self, limits: TableLimits) -> HostLoop:
        return HostLoop(self, self._manifest, limits)

    def close(self) -> None:
        """The host stays open."""


class DisturbedSession:
    """The step with noise in the latents that it gets, and in the network's output before the sampler's formula.

    The latents' noise shows what is chaotic. The output's noise shows what a sampler multiplies: the first step from
    pure noise divides by a signal of nearly 0.
    """

    def __init__(self, session: Session, size: float, rng: np.random.Generator) -> None:
        self._session, self._size, self._rng = session, size, rng

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> list[Array]:
        state, coefficients = inputs["state"].copy(), inputs["coefficients"][:, :, None, None, None]
        state[:, 0] += self._draw(state[:, 0], 1.0)
        found = self._session.run({**inputs, "state": state}, ["next_state", "denoised"])
        next_state, denoised = (value.copy() for value in found)
        factor = coefficients[:, B_E]
        e = (denoised - coefficients[:, A_Z] * state[:, 0]) / np.where(factor == 0, np.inf, factor)
        gain = max(1.0, float(np.abs(inputs["guidance"]).sum(axis=0).max()))
        noise = self._draw(e, gain)
        next_state += coefficients[:, INPUT:LOG_SIGMA] * noise[:, None]
        disturbed = denoised + factor * noise
        if coefficients.shape[1] == CLIPPED:
            disturbed = np.clip(disturbed, -coefficients[:, BOUND], coefficients[:, BOUND])
            next_state[:, 0] += coefficients[:, CLEAN] * (disturbed - denoised)
        denoised = disturbed
        named = {"next_state": next_state, "denoised": denoised}
        return [named[name] for name in outputs]

    def _draw(self, values: Array, gain: float) -> Array:
        spread = self._size * gain * np.abs(values).max()
        noise: Array = (spread * self._rng.uniform(-1, 1, values.shape)).astype(np.float32)
        return noise
