"""``dit-verify --soak`` and ``--soak-case``: random work on an engine for a time, and a case of it again."""

from __future__ import annotations

import argparse
import shlex
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dit_runtime.commands.common import print_json

if TYPE_CHECKING:  # imported when the arguments are parsed, so that --help is quick
    from dit_runtime.bundle.reader import Bundle
    from dit_runtime.verify.soak import SoakResult

UNITS = {"s": 1, "m": 60, "h": 3600}
LONGEST_S = 1e7  # some months


@dataclass(frozen=True)
class SoakRequest:
    """Soak an engine for ``seconds``, or run the cases ``case`` once; the other fields are the command's arguments."""

    bundle: Path
    store: Path | None
    engine: str
    precision: str | None
    seconds: float
    seed: int
    case: str | None
    as_json: bool


def duration(text: str) -> float:
    """An argparse type: seconds, from ``90``, ``90s``, ``10m`` or ``1h``."""
    number, unit = (text[:-1], text[-1]) if text[-1:] in UNITS else (text, "s")
    try:
        seconds = float(number) * UNITS[unit] if number.strip() == number else 0.0
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= LONGEST_S:
        raise argparse.ArgumentTypeError(f"got {text!r:.80}, expected a time such as 90s, 10m or 1h")
    return seconds


def run_soak(request: SoakRequest) -> int:
    """Soak, or run a case again, and print what was found."""
    from dit_runtime.bundle.reader import open_bundle
    from dit_runtime.pipeline import check_makes_images
    from dit_runtime.verify.auto import open_to_verify
    from dit_runtime.verify.soak import soak

    open_at = open_to_verify(request.engine, request.precision)
    bundle = open_bundle(request.bundle, request.store)
    check_makes_images(bundle, "run dit-verify without --soak")
    bundle.check()
    if request.case is not None:
        return _run_cases(bundle, request, request.case)
    result = soak(bundle, open_at, request.seconds, request.seed)
    command = command_for(request, result)
    if request.as_json:
        print_json({**result.as_json(), "command": command})
    else:
        print(format_soak(request.bundle, result))
        if command is not None:
            print(command)  # whole: it is to be run
    return 0 if result.passed else 1


def _run_cases(bundle: Bundle, request: SoakRequest, text: str) -> int:
    from dit_runtime.verify.auto import open_to_verify
    from dit_runtime.verify.soak_cases import cases_from_json
    from dit_runtime.verify.soak_host import Hosts
    from dit_runtime.verify.soak_run import run_cases

    cases, hosts = cases_from_json(text, bundle.manifest), Hosts()
    try:
        failure = run_cases(bundle, open_to_verify(request.engine, request.precision), cases, hosts)
    finally:
        hosts.close()
    if request.as_json:
        print_json({"bundle": bundle.digest, "passed": failure is None, "failure": failure and asdict(failure)})
    else:
        print("pass: the case gives the host's results" if failure is None else f"FAIL: {failure.kind}: {failure.text}")
    return 0 if failure is None else 1


def command_for(request: SoakRequest, result: SoakResult) -> str | None:
    """The command that fails in the same way: the smallest case, or where none was found the soak itself."""
    if result.failure is None:
        return None
    words = ["dit-verify", str(request.bundle), "--engine", request.engine]
    if request.precision is not None:
        words += ["--precision", request.precision]
    if request.store is not None:
        words += ["--store", str(request.store)]
    if result.shrunk is not None:
        return shlex.join([*words, "--soak-case", result.shrunk])
    return shlex.join([*words, "--soak", f"{request.seconds:g}s", "--seed", str(result.seed)])


def format_soak(bundle: Path, result: SoakResult) -> str:
    """What a soak found, for a terminal; the last line is the verdict."""
    from dit_runtime.core.text import join_lines

    visited = "; ".join(f"{name} {' '.join(map(str, values))}" for name, values in result.coverage.items() if values)
    lines = [
        f"{bundle}: limits of {result.precision}, on {result.engine}, against onnxruntime, each image alone",
        f"seed {result.seed}: {result.cases} cases, {result.images} images, {result.rows} steps in "
        f"{result.seconds:.0f} s; {result.skipped} skipped, whose results are not finite on the host",
        f"visited: {visited}" if visited else "visited: nothing",
        f"largest share of a limit {result.used:.2g}; repeats are {'' if result.exact else 'not '}bit-equal",
    ]
    if result.memory:
        first, half = result.memory[0] >> 20, max(result.memory[: (len(result.memory) + 1) // 2]) >> 20
        lines.append(f"memory: {first} MiB at first, {half} in the first half, {result.memory[-1] >> 20} at the end")
    if result.failure is None:
        nothing = f"FAIL: no case ended in {result.seconds:.0f} s; give the soak more time"
        lines.append("pass: the engine gave the host's results" if result.cases else nothing)
    else:
        again = "" if result.shrunk is not None else "; it did not come again on a new engine"
        lines.append(f"FAIL: case {result.case}, {result.failure.kind}: {result.failure.text}{again}")
    return join_lines(lines)
