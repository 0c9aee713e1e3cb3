"""Makes golden records in a process of its own, which never imports the modules and graphs that are exported.

When the process ends, its memory is free again for tracing. Its last line on stdout is JSON: the measurements, or the
error that stopped it. The module ``child`` is what it runs.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dit_export.checkpoints.sources import Source, load_checkpoint
from dit_export.reference.golden import write_records
from dit_export.reference.record_settings import CHEAP_GMAC, Measurements, RecordSettings
from dit_runtime.bundle.macs import count_step_gmac
from dit_runtime.bundle.manifest import name_for_size
from dit_runtime.bundle.reader import GOLDEN
from dit_runtime.core.children import command_of_module, run_child
from dit_runtime.core.errors import CheckpointError, DiTError
from dit_runtime.core.progress import Progress

ERRORS = {kind.__name__: kind for kind in DiTError.__subclasses__()}


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
        DiTError: the records cannot be written.
    """
    command = command_of_module("dit_export.reference.child", os.fspath(folder), json.dumps(encoder), precision)
    finished = run_child(command, source.to_json())
    result = _read_answer(finished.stdout)
    if "error" in result:
        raise ERRORS.get(result["error"], DiTError)(result["message"])
    if finished.returncode or not result:
        raise CheckpointError(
            f"{source.name}: the reference process ended with {finished.returncode}; "
            "most likely it ran out of memory, or was killed"
        )
    return Measurements(**result)


def _read_answer(out: str) -> dict[str, Any]:
    """The document on the last line, since libraries may print lines before it; empty if the process was killed."""
    try:
        answer: dict[str, Any] = json.loads(out.splitlines()[-1])
    except (IndexError, ValueError):
        return {}
    return answer


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
