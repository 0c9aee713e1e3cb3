"""``dit-verify --sampler``: does the engine's loop do what the numbers of a sampler table say?"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dit_runtime.commands.common import print_json
from dit_runtime.core.errors import ParityError


@dataclass(frozen=True)
class TableRequest:
    """Replay a sampler table on an engine."""

    bundle: Path
    store: Path | None
    engine: str
    precision: str | None
    size: tuple[int, int] | None
    table: Path
    as_json: bool


def run_replay(request: TableRequest) -> int:
    """Replay the table, and print what was found."""
    from dit_runtime.bundle.reader import open_bundle
    from dit_runtime.core.text import join_lines
    from dit_runtime.samplers.schedule import read_table
    from dit_runtime.verify.rung import format_rungs
    from dit_runtime.verify.table_replay import rungs_of_table

    table, bundle = read_table(request.table), open_bundle(request.bundle, request.store)
    bundle.check()
    name, rungs = rungs_of_table(bundle.at(request.size), request.engine, request.precision, table)
    if request.as_json:
        passed = all(rung.passed for rung in rungs)
        print_json({"engine": name, "passed": passed, "rungs": [rung.as_json() for rung in rungs]})
    else:
        print(join_lines([f"{request.table}: {table.steps} steps, on {name}", *format_rungs(rungs).split("\n")]))
    if failed := [rung.name for rung in rungs if not rung.passed]:
        raise ParityError(f"{request.table}: {failed[0]} fails on {name}; run dit-verify on the whole bundle")
    return 0
