"""``dit-tune``: a few-step table for a bundle, fitted to its own trajectory of many steps. Without torch."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dit_runtime.commands.common import (
    ENGINE_HELP,
    PRECISION_HELP,
    PRECISIONS,
    STORE_HELP,
    Parser,
    image_size,
    positive,
    print_json,
    run,
    seed_number,
    thread_count,
)
from dit_runtime.core.text import join_lines

if TYPE_CHECKING:
    from dit_runtime.tuning.judge import Judged
    from dit_runtime.tuning.request import Teacher
    from dit_runtime.tuning.tune import Tuned

EXAMPLES = (
    "dit-tune my.bundle --steps 8 -o few.json",
    "dit-tune my.bundle --until 40dB --guidance 1.5 4 --pictures 64 -o few.json",
)


def main(argv: list[str] | None = None) -> None:
    """Entry point of the command."""
    run("dit-tune", lambda: _main(argv))


def _main(argv: list[str] | None) -> int:
    args = _parser().parse_args(argv)

    from dit_runtime.bundle.reader import open_bundle
    from dit_runtime.pipeline import Pipeline
    from dit_runtime.samplers.schedule import write_table
    from dit_runtime.tuning.request import TuneRequest
    from dit_runtime.tuning.tune import fit_table, fit_until, require_best

    _check_output(args.output)
    request = TuneRequest(
        steps=args.steps,
        teacher=args.teacher,
        pictures=args.pictures,
        labels=tuple(args.labels) if args.labels else None,
        guidance=tuple(args.guidance) if args.guidance else None,
        guidance_interval=(args.guidance_interval[0], args.guidance_interval[1]),
        seed=args.seed,
        batch_size=args.batch_size,
    )
    pipe = Pipeline(open_bundle(args.bundle, args.store), args.engine, args.threads, args.size, args.precision)
    tuned = fit_table(pipe, request) if args.until is None else fit_until(pipe, request, args.until)
    if not args.json:
        print(_text_from_tuned(tuned))
    if tuned.is_best:
        write_table(tuned.schedule, args.output)
    if args.json:
        print_json({"file": str(args.output) if tuned.is_best else None, **_json_from_tuned(tuned)})
    require_best(tuned)
    if not args.json:
        print(join_lines([f"{args.output}: {tuned.schedule.steps} steps; dit-sample --sampler {args.output}"]))
    return 0


def _check_output(path: Path) -> None:
    """Raises OutputError, before minutes of work, for a table that could not be written, or not be named again."""
    from dit_runtime.core.errors import OutputError
    from dit_runtime.core.replace import check_writable

    if path.suffix != ".json" or path.is_dir():
        what = "is a folder" if path.is_dir() else "has no name of a sampler table"
        raise OutputError(f"{path}: {what}; expected a file NAME.json, which --sampler takes; choose another --output")
    check_writable(path)


def _text_from_tuned(tuned: Tuned) -> str:
    held = tuned.schedule.fitted
    assert held is not None
    starts = ", ".join(f"{name} {level:.1f} dB" for name, level in tuned.starts_db.items())
    lines = [
        f"{held.held_out.pictures} held-out images against {held.teacher}, with 95 % intervals over images:",
        f"{'sampler':<28} {'PSNR':>8}  {'interval':<16} {'latents':>9}  behind the table",
        _line(tuned.judgement.table),
        *(f"{_line(each)}  {_behind(each)}" for each in tuned.judgement.named),
        f"times: {starts}; searched from {tuned.start} {tuned.searched_db:.1f} dB, on images of the fit; "
        f"{tuned.evaluations} evaluations and {tuned.state_bytes / 2**20:.0f} MiB of the teacher's latents",
    ]
    return join_lines(lines)


def _line(judged: Judged) -> str:
    interval = f"{judged.low_db:.1f} to {judged.high_db:.1f}"
    return f"{judged.name:<28} {judged.psnr_db:>5.1f} dB  {interval:<16} {judged.latent_error:>9.2e}"


def _behind(judged: Judged) -> str:
    return f"{judged.behind_db:.1f} dB ({judged.behind_low_db:.1f} to {judged.behind_high_db:.1f})"


def _json_from_tuned(tuned: Tuned) -> dict[str, Any]:
    def plain(judged: Judged) -> dict[str, Any]:
        values = {**vars(judged)}
        del values["errors"]
        return values

    schedule, judgement = tuned.schedule, tuned.judgement
    assert schedule.fitted is not None
    return {
        "steps": schedule.steps,
        "timesteps": schedule.timesteps[schedule.rows].tolist(),
        "table": plain(judgement.table),
        "named": [plain(each) for each in judgement.named],
        "start": tuned.start,
        "starts_db": tuned.starts_db,
        "searched_db": tuned.searched_db,
        "evaluations": tuned.evaluations,
        "state_bytes": tuned.state_bytes,
        "fitted": asdict(schedule.fitted),
    }


def _parser() -> Parser:
    parser = Parser(
        "dit-tune",
        "Fit a sampler table of few steps to a bundle: its images come as near as they can to those that the bundle "
        "makes in many steps, nearer than any named sampler's of as many steps, or no table is written. Torch is not "
        "needed.",
        EXAMPLES,
    )
    parser.add_argument("bundle", type=Path, help="a bundle that dit-export wrote")
    _add_fit_arguments(parser)
    _add_engine_arguments(parser)
    parser.add_argument("-o", "--output", type=Path, default=Path("few.json"), metavar="JSON", help="the sampler table")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    return parser


def _add_fit_arguments(parser: Parser) -> None:
    group = parser.add_argument_group("what to fit")
    count = group.add_mutually_exclusive_group()
    count.add_argument("--steps", type=positive, default=8, metavar="N", help="network evaluations of the table")
    count.add_argument(
        "--until", type=_decibels, metavar="DB", help="the fewest steps whose held-out images reach so much, as 40dB"
    )
    group.add_argument(
        "--teacher",
        type=teacher_from_text,
        metavar="SAMPLER:STEPS[:SPACING]",
        help="what to come near to (default: ddim:200; of velocity models heun:100)",
    )
    group.add_argument(
        "--pictures", type=positive, default=32, metavar="N", help="half are fitted, half held out to judge the table"
    )
    group.add_argument("--labels", nargs="+", metavar="LABEL", help="of the images in turn (default: all classes)")
    group.add_argument(
        "--guidance",
        type=float,
        nargs="+",
        metavar="SCALE",
        help="of the images in turn: one table serves all these scales (default: the bundle's)",
    )
    group.add_argument(
        "--guidance-interval",
        type=float,
        nargs=2,
        default=(0.0, 1.0),
        metavar=("LO", "HI"),
        help="guide only at noise times from LO to HI: 1 is pure noise, 0 the image",
    )
    group.add_argument("--seed", type=seed_number, default=0, help="of the first image; the next count up from it")
    group.add_argument("--size", type=image_size, metavar="HEIGHTxWIDTH", help="of the images (default: the first)")


def _add_engine_arguments(parser: Parser) -> None:
    group = parser.add_argument_group("with what to run")
    group.add_argument("--engine", default="auto", help=f"{ENGINE_HELP}; auto takes only an engine that is verified")
    group.add_argument("--precision", choices=PRECISIONS, metavar="{fp32,bf16}", help=PRECISION_HELP)
    group.add_argument("--store", type=Path, metavar="DIR", help=f"{STORE_HELP}; the teacher's latents are kept there")
    group.add_argument("--threads", type=thread_count(0), default=0, help="of the CPU; 0 lets the engine choose")
    group.add_argument("--batch-size", type=positive, default=16, help="images in one engine call")


def _decibels(text: str) -> float:
    """An argparse type: a PSNR, as ``40dB``."""
    try:
        level = float(text.lower().removesuffix("db"))
    except ValueError:
        level = 0.0
    if not 0 < level < 100:
        raise argparse.ArgumentTypeError(f"got {text!r:.80}, expected a PSNR above 0 and below 100, such as 40dB")
    return level


def teacher_from_text(text: str) -> Teacher:
    """An argparse type: a sampler's name, a number of steps and perhaps a spacing, as ``ddim:200``."""
    name, steps, *spacing = text.split(":")[:3] if text.count(":") in (1, 2) else ("", "")
    if not (name and steps.isdecimal() and len(steps) < 9 and int(steps) and all(spacing)):
        raise argparse.ArgumentTypeError(
            f"got {text!r:.80}, expected SAMPLER:STEPS, such as ddim:200, or SAMPLER:STEPS:SPACING"
        )
    return (name, int(steps), spacing[0]) if spacing else (name, int(steps))


if __name__ == "__main__":
    main()
