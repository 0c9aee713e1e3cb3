"""Rank the engines that can run a bundle here by the time of a guided step, and keep the times.

    STORE/speeds/KEY.json    milliseconds of each engine's guided step

KEY is the hash of bundle, size, machine, libraries and threads, so that the times of another machine or version are not
used. Where the store cannot be written, each process measures again.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from dit_runtime.backends.base import Array, Candidate
from dit_runtime.backends.open import BACKENDS, backend_named, engine_for, find_candidates
from dit_runtime.backends.step import state_from_latents, step_inputs
from dit_runtime.bundle.manifest import Manifest
from dit_runtime.bundle.precision import Precision
from dit_runtime.bundle.reader import Bundle
from dit_runtime.core.decode import Amount, DecodeError, decode, read_json
from dit_runtime.core.errors import EngineError, OutputError
from dit_runtime.core.machine import describe_machine, has_nvidia_driver
from dit_runtime.core.progress import Progress
from dit_runtime.core.reading import SPEEDS_BYTES
from dit_runtime.core.replace import clear_litter, replace_file
from dit_runtime.samplers.guidance import guidance_weights
from dit_runtime.samplers.schedule import COEFFICIENTS

SPEEDS = "speeds"
LEAST_ENGINE = "onnxruntime"  # the engine that a machine without any should install
CALLS = 3  # timed calls, after one that is not timed
SLOW = 2.0  # an engine this many times slower than the fastest so far is not timed further
NEAR = 1.1  # engines within this factor count as equally fast, and the one that is expected to be faster comes first


@dataclass(frozen=True)
class Speed:
    """The time of an engine's guided step for one image.

    Attributes:
        name, precision: as in ``backends.base.Candidate``.
        engine: the engine's full name, with library, version and device.
        step_ms: milliseconds, the median of the timed calls.
    """

    name: str
    precision: Precision | None
    engine: str
    step_ms: Amount


def rank_by_speed(bundle: Bundle, threads: int = 0, say: Callable[[str], None] = lambda line: None) -> list[Speed]:
    """Rank the engines that can run the step here, the fastest first. They are timed on first use, then read back.

    Args:
        bundle: at the size in use.
        threads: threads of the CPU; 0 lets each engine choose.
        say: called with a line for the timing, and for each installed engine that cannot run the step.

    Raises:
        EngineError: no engine is installed, or none can run the step.
    """
    path = _path_of_record(bundle, threads)
    clear_litter(path.parent)
    speeds = _read(path, bundle.engines)
    if speeds is None:
        speeds = _measure(bundle, threads, say)
        text = json.dumps([asdict(speed) for speed in speeds], indent=1) + "\n"
        with contextlib.suppress(OutputError), replace_file(path, bundle.engines) as file:
            file.write_text(text, encoding="utf-8")
    return speeds


def sort_by_speed(speeds: list[Speed]) -> list[Speed]:
    """Sort by speed, the fastest first. Engines within the factor ``NEAR`` of the fastest keep their order."""
    left, found = list(speeds), []
    while left:
        best = min(speed.step_ms for speed in left)
        found.append(next(speed for speed in left if speed.step_ms <= NEAR * best))
        left.remove(found[-1])
    return found


def _measure(bundle: Bundle, threads: int, say: Callable[[str], None]) -> list[Speed]:
    found: list[Speed] = []
    reasons = []
    able = [candidate for candidate in find_candidates(bundle) if not candidate.built]
    if not able:
        engine_for(bundle, LEAST_ENGINE, threads)  # raises an error that says how to install the engine
    say(f"{bundle.path}: first use here, timing a guided step of each engine")
    with Progress("timing a step of each engine", len(able)) as bar:
        for candidate in able:
            try:
                speed = _time_step(bundle, candidate, threads, min((speed.step_ms for speed in found), default=None))
                found.append(speed)
            except EngineError as error:
                reasons.append(str(error))
                say(f"{candidate.name} is not used: {error}")
            bar.advance()
    if not found:
        raise EngineError("; ".join(reasons))
    return sort_by_speed(found)


def _time_step(bundle: Bundle, candidate: Candidate, threads: int, best: float | None) -> Speed:
    engine = engine_for(bundle, candidate.name, threads, candidate.precision)
    taken: list[float] = []
    try:
        session, inputs = engine.session("step"), make_step_inputs(bundle.manifest)
        session.run(inputs, ["next_state"])
        for _ in range(CALLS):
            start = time.perf_counter()
            session.run(inputs, ["next_state"])
            taken.append((time.perf_counter() - start) * 1e3)
            if best is not None and taken[-1] > SLOW * best:
                break
    finally:
        engine.close()
    return Speed(candidate.name, candidate.precision, engine.info.name, round(statistics.median(taken), 3))


def make_step_inputs(manifest: Manifest) -> dict[str, Array]:
    """Make inputs of the step graph for one image with guidance. The time of a step does not depend on their values."""
    model, table = manifest.model, manifest.table
    latents = np.random.default_rng(0).standard_normal((1, model.latent_channels, *model.latent_size))
    return step_inputs(
        manifest,
        state_from_latents(latents.astype(np.float32)),
        np.zeros((1, COEFFICIENTS), np.float32),
        guidance_weights(4.0, 1, model.latent_channels, manifest.diffusion.guidance_channels),
        np.array([[0], [1]], np.int32),
        np.zeros((2, *(int(axis) for axis in table.shape[1:])), np.dtype(table.dtype)),
    )


def _path_of_record(bundle: Bundle, threads: int) -> Path:
    libraries = sorted({library for name in BACKENDS for library in backend_named(name).libraries})
    versions = {name: version for name in libraries for version in _versions_of(name)}
    size, machine = bundle.manifest.model.latent_size, describe_machine()
    facts = [bundle.digest, size, machine, versions, threads, has_nvidia_driver()]
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    return bundle.engines / SPEEDS / f"{key}.json"


def _versions_of(distribution: str) -> Iterator[str]:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        yield importlib.metadata.version(distribution)


def _read(path: Path, store: Path) -> list[Speed] | None:
    try:
        found = list(decode(tuple[Speed, ...], read_json(path, SPEEDS_BYTES, within=store)))
    except DecodeError:
        return None
    return found if found and all(speed.name in BACKENDS for speed in found) else None
