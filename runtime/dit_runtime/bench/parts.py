"""How long the parts of an engine take, and how long whole images take, inside and outside the engine."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np

from dit_runtime.backends.base import Engine
from dit_runtime.backends.step import compute_table, state_from_latents, step_inputs
from dit_runtime.bench.gemm import measure_gemm_rates, shapes_of
from dit_runtime.bench.timing import MOST_WARMUPS, ClockedEngine, time_calls, timing_of
from dit_runtime.bundle.macs import count_linear_gmac, count_step_gmac
from dit_runtime.bundle.precision import Precision
from dit_runtime.bundle.quantization import linears_of
from dit_runtime.bundle.reader import Bundle
from dit_runtime.core.progress import Progress
from dit_runtime.pipeline import Pipeline
from dit_runtime.policy import Policy
from dit_runtime.samplers.by_name import schedule_for
from dit_runtime.samplers.guidance import branch_rows, guidance_weights
from dit_runtime.sampling.settings import Settings
from dit_runtime.verify.verification import trajectories_of

GUIDED, PLAIN, DECODER = "step, guided (G=2)", "step, not guided (G=1)", "decoder"


def time_parts(bundle: Bundle, engine: Engine, batch: int, steps: int, repeat: int) -> dict[str, Any]:
    """A ``Timing`` of each part: the conditioner for ``steps`` guided steps, the step with and without guidance, and
    the decoder.

    For an engine that keeps its loop on the device, the time of a step is a whole loop's time divided by its steps.
    An engine that was built without guidance has no guided step, and no conditioner for guided steps; a pipeline has no
    guided step of a model with guidance in its weights. An engine that
    was built for tiles decodes one tile.
    """
    model, diffusion = bundle.manifest.model, bundle.manifest.diffusion
    schedule = schedule_for(trajectories_of(diffusion)[0], model, diffusion, steps)
    labels = (np.arange(batch) % model.classes).astype(np.int32)
    image = (batch, model.latent_channels, *model.latent_size)
    state = state_from_latents(np.random.default_rng(0).standard_normal(image).astype(np.float32))
    work: dict[str, Callable[[], Any]] = {}
    whole: dict[str, Callable[[], Any]] = {}
    resident = engine.info.loop_on_device
    for scale, name in ((4.0, GUIDED), (1.0, PLAIN)):
        if name == GUIDED and not engine.info.has_branches(2):
            continue
        weights = guidance_weights(scale, batch, model.latent_channels, diffusion.guidance_channels)
        conditions, rows = branch_rows(labels, model.null_class, len(weights))
        pairs = np.repeat(schedule.timesteps, len(conditions), axis=0), np.tile(conditions, len(schedule.timesteps))
        if scale != 1:
            work[f"conditioner, {steps} steps"] = partial(compute_table, engine, bundle.manifest, *pairs)
        if resident and scale != 1 and diffusion.guidance_inside:
            continue  # a pipeline has no such step
        if resident:  # a session's call uploads the whole conditioning table, the loop does not
            pipe = Pipeline(bundle, engine)
            settings: Settings = {"steps": steps, "guidance": scale}
            if not model.has_null:
                settings["negative_label"] = model.null_class
            whole[name] = partial(pipe.sample_latents, pipe.prepare(labels.tolist(), **settings))
            continue
        coefficients = np.repeat(schedule.coefficients[:1], batch, axis=0)
        table = compute_table(engine, bundle.manifest, *pairs)
        inputs = step_inputs(bundle.manifest, state, coefficients, weights, rows, table)
        work[name] = partial(engine.session("step").run, inputs, ["next_state", "denoised"])
    height, width = engine.info.tile or model.latent_size
    latents = {"latents": state[:, 0, :, :height, :width].copy()}
    work[DECODER] = partial(engine.session("decoder").run, latents, ["images", "decoded"])  # as a pipeline asks
    found = dict(time_calls(work, repeat, f"timing parts, batch {batch}"))
    for name, timing in time_calls(whole, max(repeat // 4, 3), f"timing loops, batch {batch}").items():
        found[name] = timing.of_each(steps)
    return found


def time_policy(bundle: Bundle, engine: Engine, batch: int, steps: int, repeat: int) -> dict[str, Any]:
    """A ``Timing`` of a policy's conditioner for ``steps`` timesteps, and of its step."""
    manifest, model = bundle.manifest, bundle.manifest.model
    schedule = schedule_for(manifest.defaults.sampler, model, manifest.diffusion, steps)
    given = _draw_observations(bundle, batch)
    numbers = np.tile(np.arange(batch), len(schedule.timesteps))
    times = np.repeat(schedule.timesteps, batch)
    table = compute_table(engine, manifest, times, numbers, given)
    actions = (batch, model.latent_channels, *model.latent_size)
    inputs = step_inputs(
        manifest,
        state_from_latents(np.random.default_rng(0).standard_normal(actions).astype(np.float32)),
        np.repeat(schedule.coefficients[:1], batch, axis=0),
        guidance_weights(1.0, batch, model.latent_channels, model.latent_channels),
        np.arange(batch, dtype=np.int32)[None],
        table,
    )
    return time_calls(
        {
            f"conditioner, {steps} steps": partial(compute_table, engine, manifest, times, numbers, given),
            "step": partial(engine.session("step").run, inputs, ["next_state", "denoised"]),
        },
        repeat,
        f"timing parts, batch {batch}",
    )


def time_policy_calls(bundle: Bundle, engine: Engine, batch: int, steps: int, calls: int) -> dict[str, Any]:
    """The ``Timing`` of whole calls of a policy, observations in and actions out, and their jitter, p99 - p50.

    Each call has observations of its own, as a robot's has: nothing of the call before serves.
    """
    policy = Policy(bundle, engine)
    given = iter(_draw_observations(bundle, (calls + MOST_WARMUPS + 2) * batch).reshape(-1, batch, policy.observation))
    work = {"call": lambda: policy(next(given), steps=steps)}
    timing = time_calls(work, calls, f"timing calls, batch {batch}")["call"]
    return {**asdict(timing), "jitter_ms": round(timing.p99_ms - timing.p50_ms, 3)}


def _draw_observations(bundle: Bundle, count: int) -> Any:
    return np.random.default_rng(1).standard_normal((count, bundle.manifest.model.observation)).astype(np.float32)


def time_images(bundle: Bundle, engine: Engine, batch: int, steps: int, runs: int) -> dict[str, Any]:
    """Seconds of a run that makes ``batch`` whole images, and where they go; the first run is reported apart."""
    resident, clocked = engine.info.loop_on_device, ClockedEngine(engine, bundle.manifest)
    guidance = None if engine.info.has_branches(2) else 1.0
    tile = engine.info.tile
    timed: Engine = engine if resident else clocked
    pipeline = Pipeline(bundle, timed)
    labels = [index % bundle.manifest.model.classes for index in range(batch)]
    seconds: list[float] = []
    spent: dict[str, list[float]] = {}
    step_ms: list[float] = []
    with Progress(f"timing images, batch {batch}, {steps} steps", 1 + runs) as bar:
        for _ in range(1 + runs):
            for calls in clocked.milliseconds.values():
                calls.clear()
            start = time.perf_counter()
            latents = pipeline.sample_latents(pipeline.prepare(labels, steps=steps, guidance=guidance))
            looped = time.perf_counter()
            pipeline.decode(latents, None if tile is None else max(tile))
            seconds.append(time.perf_counter() - start)
            bar.advance()
            if resident:  # steps are only queued: the loop's time is known when its latents arrive
                inside = {"loop on the device": looped - start, "decoder": start + seconds[-1] - looped}
                calls = [(looped - start) / steps * 1e3]
            else:
                inside = {graph: sum(calls) / 1e3 for graph, calls in clocked.milliseconds.items()}
                calls = clocked.milliseconds["step"]
            if len(seconds) > 1:
                step_ms += calls
                for name, value in {**inside, "outside the engine": seconds[-1] - sum(inside.values())}.items():
                    spent.setdefault(name, []).append(value)
    first, *counted = seconds
    middle = float(np.median(counted))
    return {
        "first_s": round(first, 6),
        "runs": len(counted),
        "run": asdict(timing_of([value * 1e3 for value in counted], first * 1e3)),
        "step": asdict(timing_of(step_ms, step_ms[0])),
        "seconds_a_picture": round(middle / batch, 6),
        "pictures_a_second": round(batch / middle, 4),
        "split_s": {name: round(float(np.median(values)), 6) for name, values in spent.items()},
    }


def compare_with_gemm(bundle: Bundle, engine: Engine, parts: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """The fastest matrix product of the model's shapes on this CPU, and for each batch the guided step's rate as a
    share of it; empty for an engine on a GPU, or without a library for the engine's precision.

    Of an INT8 bundle the limit is mixed: the quantized layers at the fastest INT8 product, all else at the fastest one
    of the engine's precision. Where nothing multiplies INT8 here, it is the latter alone.
    """
    if engine.info.device != "CPU":
        return {}  # the rates are the CPU's
    manifest, model = bundle.manifest, bundle.manifest.model
    shapes, threads = shapes_of(model, 2 * max(parts)), engine.info.threads
    rates = measure_gemm_rates(shapes, engine.info.precision, threads)
    if not rates:
        return {}
    linears = linears_of(model.conditioning, model.depth)
    quantized = sum(count_linear_gmac(model, name) for name in linears if manifest.precision.quantizes(name))
    is_int8 = manifest.precision.name == Precision.INT8 and quantized
    own = measure_gemm_rates(shapes, Precision.INT8, threads) if is_int8 else []
    best, work = max(rates, key=lambda rate: rate.gflops), count_step_gmac(model)
    found: dict[str, Any] = {"best": asdict(best), "rates": [asdict(rate) for rate in (*rates, *own)]}
    limit = best.gflops
    if own:
        int8, share = max(own, key=lambda rate: rate.gflops), quantized / work
        limit = mix_rates(share, int8.gflops, best.gflops)
        found |= {"int8": asdict(int8), "int8_share": round(share, 4), "limit_gflops": round(limit, 1)}
    shares = {}
    for batch, timings in parts.items():
        gflops = 2 * 2 * batch * work / (timings[GUIDED].p50_ms / 1e3)
        shares[batch] = {"step_gflops": round(gflops, 1), "share": round(gflops / limit, 4)}
    return {**found, "guided_step": shares}


def mix_rates(share: float, first: float, second: float) -> float:
    """The rate of work of which a share, 0 to 1, runs at the first rate, and then the rest at the second."""
    return 1 / (share / first + (1 - share) / second)
