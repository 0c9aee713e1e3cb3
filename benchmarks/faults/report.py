"""Format the results of ``run.py``.

    python benchmarks/faults/report.py

Writes README.md beside results.json.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dit_runtime.core.replace import replace_file

HERE = Path(__file__).parent
HEAD = """# Seeded faults

Faults that engines and exporters have had or could have, one at a time: the first rung of `dit-verify` that fails, and
what the fault does to images. Damage is the PSNR of the worst image against the sound engine's: ten images of four
samplers, guidance 1 to 6, with one or two labels, sampled with continuous batching and decoded at batches 1, 2, 3, 5, 7
and 10. "none" means that all these images are equal: the fault is at an input that they do not have, or below a level
of their pixels. "not finite" means that sampling stops with an error. For faults where no record is, from "one class
reads its neighbour's row" on, the rung is the first relation that fails; the rungs of the records before the relations
were not run.
"""

INT8 = "INT8"
INT8_HEAD = """Faults of quantization, in a copy of a bundle's files or in an engine. "refused" and "no image" mean
that the bundle is not read."""


def format_document() -> str:
    """The page, from results.json."""
    results = json.loads((HERE / "results.json").read_text(encoding="utf-8"))
    return "\n".join([HEAD, *_lines(results)]) + "\n"


def _lines(results: dict[str, Any]) -> Iterator[str]:
    bundles: list[str] = [title for title in results["bundles"] if title != INT8]
    yield f"On {results['engine']}, the tiny model with random weights of the tests. {_count(results)}"
    yield ""
    yield f"| fault | {' | '.join(f'{name}: first to fail | damage' for name in bundles)} |"
    yield f"|---|{'---|---|' * len(bundles)}"
    for name, cells in results["faults"].items():
        if INT8 not in cells:
            columns = [_cell(cells.get(each)) for each in bundles]
            yield f"| {name} | {' | '.join(columns)} |"
    if INT8 in results["bundles"]:
        yield from ("", "## In an INT8 bundle", "", INT8_HEAD, "")
        yield from ("| fault | first to fail | damage |", "|---|---|---|")
        for name, cells in results["faults"].items():
            if INT8 in cells:
                yield f"| {name} | {_cell(cells[INT8])} |"
    if passing := {
        name: cells for name, cells in results["faults"].items() if any(cell["why"] for cell in cells.values())
    }:
        yield ""
        yield "## Those that pass, and why they may"
        yield ""
        for name, cells in passing.items():
            for bundle, cell in cells.items():
                if cell["why"]:
                    yield f"- {name}, {bundle}: {cell['why']}."


def _cell(cell: dict[str, Any] | None) -> str:
    return f"{cell['rung']} | {_damage(cell['damage'])}" if cell else "no such graph | "


def _count(results: dict[str, Any]) -> str:
    cells = [cell for each in results["faults"].values() for cell in each.values()]
    caught = sum(not cell["why"] for cell in cells)
    return f"{len(results['faults'])} faults, {len(cells)} verifications, {caught} of which fail."


def _damage(value: float | str | None) -> str:
    if value is None:
        return "none"
    return value if isinstance(value, str) else f"{value:.1f} dB"


if __name__ == "__main__":
    with replace_file(HERE / "README.md") as file:
        file.write_text(format_document(), encoding="utf-8")
