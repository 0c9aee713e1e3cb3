"""Makes golden records in a process of its own, which never imports the modules and graphs that are exported.

When the process ends, its memory is free again for tracing. Its last line on stdout is JSON: the measurements, or the
error that stopped it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from dit_export.checkpoints.sources import Source, load_checkpoint
from dit_export.reference.golden import write_records
from dit_export.reference.record_settings import CHEAP_GMAC, Measurements, RecordSettings
from dit_runtime.bundle.macs import count_step_gmac
from dit_runtime.bundle.manifest import name_for_size
from dit_runtime.bundle.reader import GOLDEN
from dit_runtime.core.children import command_of_module
from dit_runtime.core.errors import CheckpointError, DiTError, ParityError
from dit_runtime.core.progress import Progress, show_progress
from dit_runtime.core.replace import hold_folder

FAILED = 3  # exit status after an error that the last line tells
ERRORS = {kind.__name__: kind for kind in (CheckpointError, ParityError)}


def records_in_process(source: Source, folder: Path, encoder: bool, precision: str) -> Measurements:
    """Make the records in a fresh interpreter; its progress bar appears on stderr.

    Args:
        source: the checkpoint.
        folder: the records go into its folder ``golden``, and into a folder of their own for each further size.
        encoder: whether the encoder is recorded too.
        precision: the precision of the export, ``fp32`` or ``fp16``.

    Raises:
        CheckpointError: the checkpoint cannot be read, or the process was killed.
        ParityError: the PyTorch reference itself is unusable.
    """
    command = command_of_module("dit_export.reference.process", os.fspath(folder), json.dumps(encoder), precision)
    finished = subprocess.run(command, input=source.to_json(), stdout=subprocess.PIPE, text=True, check=False)
    lines = finished.stdout.splitlines()
    if finished.returncode not in (0, FAILED) or not lines:
        raise CheckpointError(
            f"{source.name}: the reference process ended with {finished.returncode}; "
            "most likely it ran out of memory, or was killed"
        )
    result: dict[str, Any] = json.loads(lines[-1])  # libraries may have printed lines before
    if finished.returncode == FAILED:
        raise ERRORS.get(result["error"], DiTError)(result["message"])
    return Measurements(**result)


def make_records(source: Source, folder: Path, encoder: bool, precision: str) -> Measurements:
    """Make the records of each size in this process; the arguments are those of ``records_in_process``."""
    checkpoint = load_checkpoint(source)
    if count_step_gmac(checkpoint.model) <= CHEAP_GMAC:
        torch.set_num_threads(1)  # a model this small would spend more time on waiting for threads than on computing
    models = [replace(checkpoint, model=checkpoint.at(size)) for size in checkpoint.sizes]
    settings = [RecordSettings.for_checkpoint(model, precision) for model in models]
    measurements: Measurements | None = None
    with Progress("PyTorch reference", sum(each.work for each in settings)) as bar:
        for model, each in zip(models, settings, strict=True):
            size = model.model.latent_size
            target = folder / (GOLDEN if measurements is None else name_for_size(GOLDEN, size))
            target.mkdir()
            found = write_records(model, each, target, encoder, bar.advance, source.tiles)
            measurements = found if measurements is None else measurements.add_size(found, size)
    assert measurements is not None
    return measurements


def _main() -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent answers Ctrl-C, and ends this process
    show_progress()
    folder, encoder, precision = sys.argv[1:]
    source = Source.from_json(sys.stdin.read())
    try:
        with hold_folder(Path(folder)):  # the parent may be killed, and another export begin
            result = asdict(make_records(source, Path(folder), json.loads(encoder), precision))
    except DiTError as error:
        print(json.dumps({"error": type(error).__name__, "message": str(error)}))
        return FAILED
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(_main())
