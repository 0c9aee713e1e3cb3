"""``dit-bench``: how long a verified engine takes, part by part. Without torch."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from dit_runtime.command import Parser, positive, print_json, run

EXAMPLES = ("dit-bench my.bundle", "dit-bench my.bundle --batch 4 --repeat 50 --json")


def main(argv: list[str] | None = None) -> None:
    """Entry point of the command."""
    run("dit-bench", lambda: _main(argv))


def _main(argv: list[str] | None) -> int:
    parser = Parser(
        "dit-bench",
        "Time the parts of sampling on a verified engine: conditioner, step with and without guidance, decoder. "
        "Refuses an engine that does not match the reference. Torch is not needed.",
        EXAMPLES,
    )
    parser.add_argument("bundle", type=Path, help="a bundle that dit-export wrote")
    parser.add_argument("--batch", type=positive, default=1, help="pictures in a call")
    parser.add_argument("--steps", type=positive, default=50, help="steps that the conditioner prepares")
    parser.add_argument("--repeat", type=positive, default=20, help="timed calls, after the first")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    args = parser.parse_args(argv)

    import numpy as np

    from dit_runtime.bundle import open_bundle
    from dit_runtime.guidance import branch_rows, guidance_weights
    from dit_runtime.progress import Progress
    from dit_runtime.schedule import schedule_for
    from dit_runtime.verdicts import machine, trusted_engine
    from dit_runtime.verify import trajectories_of

    bundle = open_bundle(args.bundle)
    engine = trusted_engine(bundle)
    model, diffusion = bundle.manifest.model, bundle.manifest.diffusion
    table = bundle.manifest.table.name
    schedule = schedule_for(trajectories_of(diffusion)[0], model, diffusion, args.steps)
    labels = (np.arange(args.batch) % model.classes).astype(np.int32)
    picture = (args.batch, model.latent_channels, *model.latent_size)
    random = np.random.default_rng(0)
    state = np.zeros((args.batch, 3, *picture[1:]), np.float32)
    state[:, 0] = random.standard_normal(picture)
    work: dict[str, Callable[[], Any]] = {}
    for scale, name in ((4.0, "step, guided (G=2)"), (1.0, "step, not guided (G=1)")):
        weights = guidance_weights(scale, args.batch, model.latent_channels, diffusion.guidance_channels)
        conditions, rows = branch_rows(labels, model.null_class, len(weights))
        pairs = {
            "timesteps": np.repeat(schedule.timesteps, len(conditions)),
            "labels": np.tile(conditions, len(schedule.timesteps)),
        }
        conditioner = engine.session("conditioner")
        if scale != 1:
            work[f"conditioner, {args.steps} steps"] = partial(conditioner.run, pairs, [table])
        inputs = {
            "state": state,
            "noise": np.zeros(picture, np.float32),
            "coefficients": np.repeat(schedule.coefficients[:1], args.batch, axis=0),
            "guidance": weights,
            "rows": rows,
            table: conditioner.run(pairs, [table])[0],
        }
        work[name] = partial(engine.session("step").run, inputs, ["next_state", "denoised"])
    work["decoder"] = partial(engine.session("decoder").run, {"latents": state[:, 0].copy()}, ["images"])

    times: dict[str, list[float]] = {name: [] for name in work}
    # Interleaved, so that a machine whose speed drifts treats all alike.
    with Progress("timing", (1 + args.repeat) * len(work)) as bar:
        for _ in range(1 + args.repeat):
            for name, call in work.items():
                start = time.perf_counter()
                call()
                times[name].append((time.perf_counter() - start) * 1e3)
                bar.advance()
    figures = {
        name: {
            "first_ms": round(values[0], 3),
            "p50_ms": round(float(np.percentile(values[1:], 50)), 3),
            "p95_ms": round(float(np.percentile(values[1:], 95)), 3),
        }
        for name, values in times.items()
    }
    if args.json:
        print_json(
            {
                "bundle": bundle.digest,
                "engine": engine.name,
                "verified": True,
                "precision": bundle.manifest.precision.name,
                "batch": args.batch,
                "repeat": args.repeat,
                "machine": {**machine(), "python": platform.python_version(), "numpy": np.__version__},
                "figures": figures,
            }
        )
        return 0
    print(f"{args.bundle}: {bundle.manifest.precision.name} on {engine.name} (verified), batch {args.batch}")
    print(f"{machine()['processor']}; {args.repeat} interleaved calls each, in ms")
    print(f"{'part':<26} {'first':>9} {'p50':>9} {'p95':>9}")
    for name, row in figures.items():
        print(f"{name:<26} {row['first_ms']:>9.2f} {row['p50_ms']:>9.2f} {row['p95_ms']:>9.2f}")
    return 0
