"""Judge few-step tables by images of the demo model: PSNR to the teacher, class accuracy and Fréchet distance.

    python benchmarks/few_steps.py      # all parts: hours on two CPU cores; an interrupted run goes on
    python benchmarks/few_steps.py --named 3    # what docs/few-steps.md shows, and further step counts

A part is a guidance scale and a number of steps. ``dit_runtime.tuning`` fits a table to images of other seeds; then the
teacher, the table and the named samplers of as many evaluations make the same labels from the same seeds. Accuracies
and distances are compared with the teacher's in pairs (``fashion_mnist/quality.py``). Every part's figures go into
``few_steps.json`` as soon as they are there; the table ``few_steps.md`` and the plot are made from it.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "fashion_mnist"))

from evaluator import CLASS_NAMES, judge, load_evaluator  # noqa: E402  # they lie in the demo's folder
from quality import compare  # noqa: E402

from dit_runtime import Pipeline  # noqa: E402
from dit_runtime.commands.tune import teacher_from_text  # noqa: E402
from dit_runtime.core.environment import describe_environment  # noqa: E402
from dit_runtime.core.replace import replace_file  # noqa: E402
from dit_runtime.samplers.schedule import Schedule  # noqa: E402
from dit_runtime.tuning.judge import decode_all, mean_squares, named_schedules, psnr_of, sample_with  # noqa: E402
from dit_runtime.tuning.request import TuneRequest  # noqa: E402
from dit_runtime.tuning.tune import TEACHERS, fit_table  # noqa: E402

FIRST_FITTED = 1_000_000  # the fit's seeds, far from those of the images that are judged
STEPS = (4, 5, 6, 8, 10, 15)
SCALES = (1.5, 2.5, 4.0)
TEACHER = "teacher"
SAMPLERS = "ddim", "euler"  # of a diffusion and a velocity model; only labels and noise are taken from their requests
RESAMPLES = 1000


def run_part(pipe: Pipeline, args: argparse.Namespace, scale: float, steps: int) -> dict[str, Any]:
    """The figures of all contenders at one guidance scale and number of steps."""
    labels = [index % len(CLASS_NAMES) for index in range(args.images)]
    teacher = teacher_images(pipe, args, scale, labels)
    start = time.monotonic()
    request = TuneRequest(steps, args.teacher, args.pictures, guidance=(scale,), seed=FIRST_FITTED)
    tuned = fit_table(pipe, request)
    fit_seconds = time.monotonic() - start
    # The best on the fit's held-out images; the table first.
    best = [each.name for each in tuned.judgement.named[: args.named]]
    named = [(name, schedule) for name, schedule in named_schedules(pipe, steps) if name in best or name in args.always]
    contenders: list[tuple[str, Schedule]] = [("fitted table", tuned.schedule), *named]
    evaluator = load_evaluator()
    judgements = {TEACHER: judge(evaluator, teacher)}
    levels, seconds = {}, {}
    requests = pipe.prepare(labels, 0, steps=steps, sampler=SAMPLERS[is_flow(pipe)], guidance=scale)
    for name, schedule in contenders:
        begun = time.monotonic()
        images = decode_all(pipe, sample_with(pipe, requests, schedule, args.batch), args.batch)
        seconds[name] = (time.monotonic() - begun) / len(images)
        judgements[name] = judge(evaluator, images)
        levels[name] = level_with_interval(mean_squares(images, teacher))
    rows = compare(judgements, np.array(labels), RESAMPLES)
    for row in rows[1:]:
        row.update(psnr_db=levels[row["name"]], seconds_per_image=seconds[row["name"]])
    return {
        "guidance": scale,
        "steps": steps,
        "images": args.images,
        "fit_seconds": fit_seconds,
        "start": tuned.start,
        "starts_db": tuned.starts_db,
        "searched_db": tuned.searched_db,
        "rows": rows,
    }


def compare_scales(pipe: Pipeline, args: argparse.Namespace, steps: int) -> None:
    """Print the PSNR at each guidance scale of each scale's own table, and of one that was fitted to all of them."""
    labels = [index % len(CLASS_NAMES) for index in range(args.images)]
    tables = {
        scales: fit_table(
            pipe, TuneRequest(steps, args.teacher, args.pictures, guidance=scales, seed=FIRST_FITTED)
        ).schedule
        for scales in [*((scale,) for scale in args.guidance), tuple(args.guidance)]
    }
    for scale in args.guidance:
        teacher = teacher_images(pipe, args, scale, labels)
        requests = pipe.prepare(labels, 0, steps=steps, sampler=SAMPLERS[is_flow(pipe)], guidance=scale)
        for scales, table in tables.items():
            images = decode_all(pipe, sample_with(pipe, requests, table, args.batch), args.batch)
            level, low, high = level_with_interval(mean_squares(images, teacher))
            names = ", ".join(f"{each:g}" for each in scales)
            print(f"| {steps} | {scale:g} | fitted to {names} | {level:.1f} dB ({low:.1f}–{high:.1f}) |", flush=True)


def teacher_images(pipe: Pipeline, args: argparse.Namespace, scale: float, labels: list[int]) -> np.ndarray:
    """The teacher's images; they are kept in ``--work``."""
    path = args.work / f"teacher-{scale:g}-{len(labels)}-{pipe.bundle.digest[:8]}.npy"
    if path.exists():
        kept: np.ndarray = np.load(path, allow_pickle=False)
        return kept
    sampler, steps, *spacing = args.teacher or TEACHERS[is_flow(pipe)]
    settings = {"sampler": sampler, "steps": steps, "spacing": spacing[0] if spacing else None}
    requests = pipe.prepare(labels, 0, guidance=scale, **settings)
    parts = [
        pipe.decode(pipe.sample_latents(requests[at : at + args.batch])) for at in range(0, len(labels), args.batch)
    ]
    with replace_file(path) as file:
        np.save(file, np.concatenate(parts))
    return np.concatenate(parts)


def is_flow(pipe: Pipeline) -> bool:
    """Whether the bundle is a velocity model's."""
    return pipe.manifest.diffusion.path is not None


def level_with_interval(errors: np.ndarray) -> tuple[float, float, float]:
    """PSNR of all images together, and its 95 % interval over images."""
    chosen = np.random.default_rng(0).integers(0, len(errors), (RESAMPLES, len(errors)))
    low, high = np.percentile(psnr_of(errors[chosen].mean(axis=1)), [2.5, 97.5])
    return float(psnr_of(float(errors.mean()))), float(low), float(high)


def format_markdown(parts: Sequence[dict[str, Any]]) -> str:
    """The figures of all parts as a Markdown table."""
    lines = [
        "| guidance | steps | sampler | PSNR to the teacher | class accuracy | Fréchet distance | its difference |",
        "|--:|--:|---|--:|--:|--:|--:|",
    ]
    for part in parts:
        rows = sorted(part["rows"][1:], key=lambda row: -row["psnr_db"][0])
        for row in [*rows, part["rows"][0]]:
            level = "–" if "psnr_db" not in row else "{:.1f} dB ({:.1f}–{:.1f})".format(*row["psnr_db"])
            difference = "–"
            if "against" in row:
                low, high = row["against"]["frechet_difference_interval"]
                difference = f"{row['against']['frechet_difference']:+.2f} ({low:+.2f} to {high:+.2f})"
            lines.append(
                f"| {part['guidance']:g} | {part['steps']} | {row['name']} | {level} | {row['accuracy']:.3f} | "
                f"{row['frechet_distance']:.2f} | {difference} |"
            )
    return "\n".join(lines) + "\n"


def draw_plot(parts: Sequence[dict[str, Any]], path: Path) -> None:
    """PSNR to the teacher against network evaluations: the table and the best named sampler, by guidance scale."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8.4, 4), constrained_layout=True)
    for index, scale in enumerate(sorted({part["guidance"] for part in parts})):
        own = sorted((part for part in parts if part["guidance"] == scale), key=lambda part: part["steps"])
        steps = [part["steps"] for part in own]
        fitted = [part["rows"][1]["psnr_db"][0] for part in own]
        named = [max(row["psnr_db"][0] for row in part["rows"][2:]) for part in own]
        axes.plot(steps, fitted, f"C{index}o-", label=f"fitted table, guidance {scale:g}")
        axes.plot(steps, named, f"C{index}s--", label=f"nearest named sampler, guidance {scale:g}")
    axes.set(xlabel="network evaluations", ylabel="PSNR to the teacher, dB")
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize="small")
    with replace_file(path) as file:
        figure.savefig(file, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, default=Path("build/demo/fp32.bundle"), help="of demo.py")
    parser.add_argument("--work", type=Path, default=Path("build/few_steps"), help="figures and the teacher's images")
    parser.add_argument("--teacher", type=teacher_from_text, help="as dit-tune's; with a --work of its own")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--pictures", type=int, default=32, help="of the fit, half of them held out there")
    parser.add_argument("--steps", type=int, nargs="+", default=STEPS)
    parser.add_argument("--guidance", type=float, nargs="+", default=SCALES)
    parser.add_argument("--named", type=int, default=100, help="the best so many named samplers of each part")
    parser.add_argument("--always", nargs="*", default=["dpmpp-2m karras", "ddim leading"], help="named ones beside")
    parser.add_argument(
        "--scales", action="store_true", help="tables of each guidance scale and of all, at every scale"
    )
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--threads", type=int, default=0)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    pipe = Pipeline(args.bundle, "onnxruntime", args.threads)
    if args.scales:
        for steps in args.steps:
            compare_scales(pipe, args, steps)
        return
    path = args.work / "few_steps.json"
    result = json.loads(path.read_text()) if path.exists() else {"environment": describe_environment(), "parts": []}
    for scale in args.guidance:
        for steps in args.steps:
            key = (scale, steps, args.images)
            if key not in [(part["guidance"], part["steps"], part["images"]) for part in result["parts"]]:
                result["parts"].append(run_part(pipe, args, scale, steps))
                with replace_file(path) as file:
                    file.write_text(json.dumps(result, indent=1) + "\n")
            done = [part for part in result["parts"] if part["images"] == args.images]
            done.sort(key=lambda part: (part["guidance"], part["steps"]))
            (args.work / "few_steps.md").write_text(format_markdown(done))
            draw_plot(done, args.work / "few_steps.png")
            print(format_markdown([part for part in done if (part["guidance"], part["steps"]) == (scale, steps)]))


if __name__ == "__main__":
    main()
