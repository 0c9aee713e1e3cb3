"""``dit-bench``: how long a verified engine takes, part by part and picture by picture. Without torch."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dit_runtime.command import ENGINE_HELP, STORE_HELP, Parser, positive, print_json, run

if TYPE_CHECKING:
    from dit_runtime.bundle import Bundle
    from dit_runtime.engines import Engine

EXAMPLES = (
    "dit-bench my.bundle",
    "dit-bench my.bundle --batch 1,2,4 --sweep --markdown bench.md --plot bench.png",
    "dit-bench my.bundle --engine onnxruntime --repeat 50 --json > bench.json",
)
GUIDED, PLAIN, DECODER = "step, guided (G=2)", "step, not guided (G=1)", "decoder"
SWEEP_STEPS = (10, 25, 50)


def main(argv: list[str] | None = None) -> None:
    """Entry point of the command."""
    run("dit-bench", lambda: _main(argv))


def _main(argv: list[str] | None) -> int:
    parser = Parser(
        "dit-bench",
        "Time a verified engine: conditioner, step with and without guidance, decoder, and whole pictures with what is "
        "spent outside the engine. Refuses an engine that does not match the reference. Torch is not needed.",
        EXAMPLES,
    )
    parser.add_argument("bundle", type=Path, help="a bundle that dit-export wrote")
    parser.add_argument("--engine", default="auto", help=ENGINE_HELP)
    parser.add_argument("--precision", choices=("f32", "bf16"), help="of OpenVINO (default: the bundle's or nearest)")
    parser.add_argument("--store", type=Path, metavar="DIR", help=STORE_HELP)
    parser.add_argument("--threads", type=int, default=0, help="of the CPU; 0 lets the engine choose")
    parser.add_argument("--batch", type=_batches, default="1", help="pictures in a call, one or several: 1,2,4")
    parser.add_argument("--steps", type=positive, default=50, help="of a whole picture")
    parser.add_argument("--repeat", type=positive, default=20, help="timed calls of each part, after the warm-up")
    parser.add_argument("--pictures", type=int, default=3, help="timed runs of whole pictures; 0 leaves them out")
    parser.add_argument("--sweep", action="store_true", help="also whole pictures of other step counts and sizes")
    parser.add_argument("--no-gemm", action="store_true", help="do not measure the rate of matrix products")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables as Markdown")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw them (.png, .svg or .pdf; needs matplotlib)")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    args = parser.parse_args(argv)

    from dit_runtime.bench_report import as_markdown, as_text, check_plot, plot
    from dit_runtime.bundle import open_bundle
    from dit_runtime.environment import environment
    from dit_runtime.files import check_writable, replaced_file
    from dit_runtime.timing import memory_use
    from dit_runtime.verdicts import trusted_engine

    for file in (args.markdown, args.plot):
        if file is not None:
            check_writable(file)
    if args.plot is not None:
        check_plot(args.plot)
    bundle = open_bundle(args.bundle, args.store)
    engine = trusted_engine(bundle, args.threads, args.engine, args.precision)
    manifest = bundle.manifest
    parts = {batch: parts_of(bundle, engine, batch, args.steps, args.repeat) for batch in args.batch}
    report: dict[str, Any] = {
        "bundle": bundle.digest,
        "model": manifest.source.name,
        "image_size": manifest.image_size,
        "precision": manifest.precision.name,
        "engine": engine.name,
        "verified": True,
        "steps": args.steps,
        "environment": environment(args.threads),
        "parts": {batch: {name: asdict(timing) for name, timing in found.items()} for batch, found in parts.items()},
    }
    if args.pictures > 0:
        report["pictures"] = {
            batch: pictures_of(bundle, engine, batch, args.steps, args.pictures) for batch in args.batch
        }
    if args.sweep:
        batch = args.batch[0]
        report["step_counts"] = {
            steps: pictures_of(bundle, engine, batch, steps, max(args.pictures, 1)) for steps in SWEEP_STEPS
        }
        report["sizes"] = {}
        for size in manifest.image_sizes:
            at = bundle.at(size)
            other = (
                engine if size == manifest.image_size else trusted_engine(at, args.threads, args.engine, args.precision)
            )
            timings = parts_of(at, other, batch, args.steps, args.repeat)
            report["sizes"][f"{size[0]}x{size[1]}"] = {
                "tokens": at.manifest.model.tokens,
                **{name: asdict(timing) for name, timing in timings.items()},
            }
    if not args.no_gemm:
        report["gemm"] = gemm_of(bundle, engine, parts)
    report["memory_bytes"] = memory_use()
    if args.markdown is not None:
        with replaced_file(args.markdown) as file:
            file.write_text(as_markdown(report), encoding="utf-8")
    if args.plot is not None:
        plot(report, args.plot)
    if args.json:
        print_json(report)
    else:
        print(as_text(report))
    return 0


def _batches(text: str) -> tuple[int, ...]:
    try:
        batches = tuple(sorted({int(item) for item in text.split(",")}))
    except ValueError:
        batches = ()
    if not batches or batches[0] < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected whole numbers from 1, such as 1,2,4")
    return batches


def parts_of(bundle: Bundle, engine: Engine, batch: int, steps: int, repeat: int) -> dict[str, Any]:
    """A ``Timing`` of each part: conditioner of ``steps`` guided steps, step with and without guidance, decoder.

    Of an engine whose loop stays on its device, a step is a whole loop's time over its steps. One that was built
    without guidance has no guided step, and no conditioner of such; one built for tiles decodes one tile.
    """
    import numpy as np

    from dit_runtime.guidance import branch_rows, guidance_weights
    from dit_runtime.pipeline import Pipeline
    from dit_runtime.replay import conditioned, has_branches, tile_of
    from dit_runtime.schedule import schedule_for
    from dit_runtime.timing import timed
    from dit_runtime.verify import trajectories_of

    model, diffusion = bundle.manifest.model, bundle.manifest.diffusion
    table = bundle.manifest.table.name
    schedule = schedule_for(trajectories_of(diffusion)[0], model, diffusion, steps)
    labels = (np.arange(batch) % model.classes).astype(np.int32)
    picture = (batch, model.latent_channels, *model.latent_size)
    state = np.zeros((batch, 3, *picture[1:]), np.float32)
    state[:, 0] = np.random.default_rng(0).standard_normal(picture)
    work: dict[str, Callable[[], Any]] = {}
    whole: dict[str, Callable[[], Any]] = {}
    resident = hasattr(engine, "steps")
    for scale, name in ((4.0, GUIDED), (1.0, PLAIN)):
        if name == GUIDED and not has_branches(engine, 2):
            continue
        weights = guidance_weights(scale, batch, model.latent_channels, diffusion.guidance_channels)
        conditions, rows = branch_rows(labels, model.null_class, len(weights))
        pairs = np.repeat(schedule.timesteps, len(conditions)), np.tile(conditions, len(schedule.timesteps))
        if scale != 1:
            work[f"conditioner, {steps} steps"] = partial(conditioned, engine, table, *pairs)
        if resident:  # a call of the session would upload the whole table, which the loop does not
            pipe = Pipeline(bundle, engine)
            whole[name] = partial(pipe.finished, pipe.pictures(labels.tolist(), steps=steps, guidance=scale))
            continue
        inputs = {
            "state": state,
            "noise": np.zeros(picture, np.float32),
            "coefficients": np.repeat(schedule.coefficients[:1], batch, axis=0),
            "guidance": weights,
            "rows": rows,
            table: conditioned(engine, table, *pairs),
        }
        work[name] = partial(engine.session("step").run, inputs, ["next_state", "denoised"])
    height, width = tile_of(getattr(engine, "stored", None), model.latent_size) or model.latent_size
    latents = {"latents": state[:, 0, :, :height, :width].copy()}
    work[DECODER] = partial(engine.session("decoder").run, latents, ["images"])
    found = dict(timed(work, repeat, f"timing parts, batch {batch}"))
    for name, timing in timed(whole, max(repeat // 4, 3), f"timing loops, batch {batch}").items():
        found[name] = timing.of_each(steps)
    return found


def pictures_of(bundle: Bundle, engine: Engine, batch: int, steps: int, runs: int) -> dict[str, Any]:
    """Whole pictures, after one run that is not counted: seconds of a run, and where they went."""
    import numpy as np

    from dit_runtime.pipeline import Pipeline
    from dit_runtime.progress import Progress
    from dit_runtime.replay import has_branches, tile_of
    from dit_runtime.timing import ClockedEngine, timing_of

    resident, clocked = hasattr(engine, "steps"), ClockedEngine(engine)
    guidance = None if has_branches(engine, 2) else 1.0
    tile = tile_of(getattr(engine, "stored", None), bundle.manifest.model.latent_size)
    pipeline = Pipeline(bundle, engine if resident else clocked)
    labels = [index % bundle.manifest.model.classes for index in range(batch)]
    seconds: list[float] = []
    spent: dict[str, list[float]] = {}
    step_ms: list[float] = []
    with Progress(f"timing pictures, batch {batch}, {steps} steps", 1 + runs) as bar:
        for _ in range(1 + runs):
            for calls in clocked.milliseconds.values():
                calls.clear()
            start = time.perf_counter()
            latents = pipeline.finished(pipeline.pictures(labels, steps=steps, guidance=guidance))
            looped = time.perf_counter()
            pipeline.decode(latents, None if tile is None else max(tile))
            seconds.append(time.perf_counter() - start)
            bar.advance()
            if resident:  # what is queued is not what is done: the loop's time is known when its latents are here
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


def gemm_of(bundle: Bundle, engine: Engine, parts: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """The fastest product of the model's own shapes here, and the guided step's rate as a share of it, by batch."""
    from dit_runtime.gemm import gemm_rates, shapes_of
    from dit_runtime.macs import step_gmac

    if hasattr(engine, "steps"):
        return {}  # the rates are the CPU's
    model = bundle.manifest.model
    precision = getattr(engine, "precision", None)
    precision = "bf16" if precision == "bf16" else "fp32"
    rates = gemm_rates(shapes_of(model, 2 * max(parts)), precision, engine.threads)
    if not rates:
        return {}
    best = max(rates, key=lambda rate: rate.gflops)
    shares = {}
    for batch, timings in parts.items():
        gflops = 2 * 2 * batch * step_gmac(model) / (timings[GUIDED].p50_ms / 1e3)
        shares[batch] = {"step_gflops": round(gflops, 1), "share": round(gflops / best.gflops, 4)}
    return {"best": asdict(best), "rates": [asdict(rate) for rate in rates], "guided_step": shares}
