"""A whole benchmark: from a request to the report that the command prints, writes and draws."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dit_runtime.backends.base import Engine
from dit_runtime.bench.parts import compare_with_gemm, time_images, time_parts, time_policy, time_policy_calls
from dit_runtime.bench.timing import Timing
from dit_runtime.bundle.reader import Bundle, open_bundle
from dit_runtime.core.environment import describe_environment
from dit_runtime.core.errors import SamplingError
from dit_runtime.core.machine import memory_use
from dit_runtime.samplers.by_name import count_default_steps
from dit_runtime.verify.auto import choose_engine
from dit_runtime.verify.verification import trajectories_of

STEPS = 50
SWEEP_STEPS = (10, 25, 50)
POLICY_CALLS = 1000  # whole calls of a policy, of which the worst is reported


@dataclass(frozen=True)
class BenchmarkRequest:
    """What to time.

    Attributes:
        bundle: its folder.
        engine: ``auto`` or an engine's name; it is verified before it is timed.
        precision: of an engine that has a choice; None is its default.
        store: where engines and verdicts are kept; None is the bundle's own folder.
        threads: of the CPU; 0 lets the engine choose.
        batches: images in a call, each timed by itself, in rising order.
        steps: of a whole image; None is ``STEPS``, or fewer where the model has fewer training timesteps.
        repeat: timed calls of each part.
        image_runs: timed runs of whole images; 0 leaves them out.
        sweep: also time other step counts and image sizes, with the smallest batch.
        gemm: also measure how fast matrix products are here.
    """

    bundle: Path
    engine: str = "auto"
    precision: str | None = None
    store: Path | None = None
    threads: int = 0
    batches: tuple[int, ...] = (1,)
    steps: int | None = None
    repeat: int = 20
    image_runs: int = 3
    sweep: bool = False
    gemm: bool = True


def benchmark(request: BenchmarkRequest) -> dict[str, Any]:
    """Time the engine of a request.

    Returns:
        The report, as ``dit-bench --json`` prints it; ``bench.report`` makes text, Markdown and plots of it.

    Raises:
        BundleError: the bundle is missing, incomplete or altered.
        EngineError: no such engine, or it is not installed.
        ParityError: the engine does not match the reference.
    """
    bundle = open_bundle(request.bundle, request.store)
    engine = _open_engine(request, bundle)
    if bundle.manifest.model.observation:
        return _benchmark_policy(request, bundle, engine)
    steps = _count_steps(bundle, STEPS) if request.steps is None else request.steps
    parts = {batch: time_parts(bundle, engine, batch, steps, request.repeat) for batch in request.batches}
    report: dict[str, Any] = {
        **_facts_of(request, bundle, engine, steps),
        "parts": {batch: _json_from_timings(timings) for batch, timings in parts.items()},
    }
    if request.image_runs > 0:
        report["pictures"] = {
            batch: time_images(bundle, engine, batch, steps, request.image_runs) for batch in request.batches
        }
    if request.sweep:
        report["step_counts"] = _time_step_counts(request, bundle, engine)
        report["sizes"] = _time_sizes(request, bundle, engine, steps)
    if request.gemm:
        report["gemm"] = compare_with_gemm(bundle, engine, parts)
    report["memory_bytes"] = memory_use()
    return report


def _benchmark_policy(request: BenchmarkRequest, bundle: Bundle, engine: Engine) -> dict[str, Any]:
    """A policy's report: by default of its own sampler and steps, whose calls must come in time."""
    if request.sweep:
        raise SamplingError(
            f"{bundle.path}: is a policy's bundle, which has one size; name the steps instead (--steps)"
        )
    manifest = bundle.manifest
    steps = manifest.defaults.steps if request.steps is None else request.steps
    parts = {batch: time_policy(bundle, engine, batch, steps, request.repeat) for batch in request.batches}
    report = {
        **_facts_of(request, bundle, engine, steps),
        "actions": [manifest.model.latent_size[1], manifest.model.latent_channels],
        "parts": {batch: _json_from_timings(timings) for batch, timings in parts.items()},
        "calls": {batch: time_policy_calls(bundle, engine, batch, steps, POLICY_CALLS) for batch in request.batches},
    }
    return {**report, "memory_bytes": memory_use()}


def _facts_of(request: BenchmarkRequest, bundle: Bundle, engine: Engine, steps: int) -> dict[str, Any]:
    return {
        "bundle": bundle.digest,
        "model": bundle.manifest.source.name,
        "image_size": bundle.manifest.image_size,
        "precision": bundle.manifest.precision.name,
        "engine": engine.info.name,
        "verified": True,
        "steps": steps,
        "environment": describe_environment(request.threads),
    }


def _open_engine(request: BenchmarkRequest, bundle: Bundle) -> Engine:
    return choose_engine(bundle, request.threads, request.engine, request.precision).engine


def _time_step_counts(request: BenchmarkRequest, bundle: Bundle, engine: Engine) -> dict[int, Any]:
    """Whole images of other step counts, of those that the model has."""
    runs = max(request.image_runs, 1)
    counts = dict.fromkeys(_count_steps(bundle, steps) for steps in SWEEP_STEPS)
    return {steps: time_images(bundle, engine, request.batches[0], steps, runs) for steps in counts}


def _count_steps(bundle: Bundle, steps: int) -> int:
    """``steps``, or as many as both the timed schedule and the bundle's own sampler can run."""
    manifest = bundle.manifest
    samplers = (trajectories_of(manifest.diffusion)[0], manifest.defaults.sampler)
    return min(count_default_steps(name, manifest.model, manifest.diffusion, steps) for name in samplers)


def _time_sizes(request: BenchmarkRequest, bundle: Bundle, engine: Engine, steps: int) -> dict[str, Any]:
    """The parts at each image size of the bundle; ``engine`` is the one of the size in use."""
    found = {}
    for size in bundle.manifest.image_sizes:
        at = bundle.at(size)
        own = engine if size == bundle.manifest.image_size else _open_engine(request, at)
        timings = time_parts(at, own, request.batches[0], steps, request.repeat)
        found[f"{size[0]}x{size[1]}"] = {"tokens": at.manifest.model.tokens, **_json_from_timings(timings)}
    return found


def _json_from_timings(timings: Mapping[str, Timing]) -> dict[str, Any]:
    return {name: asdict(timing) for name, timing in timings.items()}
