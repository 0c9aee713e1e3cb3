"""Makes golden records in a process of its own, which never imports the modules and graphs that are exported.

When the process ends, its memory is free again for tracing. Its last line on stdout is JSON: the measurements, or the
error that stopped it. The module ``child`` is what it runs.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dit_export.checkpoints.source import USUAL_TILES
from dit_export.checkpoints.sources import Checkpoint, Source, load_checkpoint
from dit_export.reference.calibration import Calibration, calibrate, count_calibration, spec_for_checkpoint
from dit_export.reference.emulation import IntegerWeight, emulate, norms_with_factors
from dit_export.reference.golden import write_records
from dit_export.reference.pipeline import Reference
from dit_export.reference.record_settings import CHEAP_GMAC, CalibrationRequest, Measurements, RecordSettings
from dit_runtime.bundle.macs import count_step_gmac
from dit_runtime.bundle.manifest import PrecisionSpec, name_for_size
from dit_runtime.bundle.precision import QUANTIZED, Precision
from dit_runtime.bundle.quantization import FORMATS
from dit_runtime.bundle.reader import CALIBRATION, GOLDEN
from dit_runtime.core.children import command_of_module, run_child
from dit_runtime.core.errors import CheckpointError, DiTError
from dit_runtime.core.progress import Progress

ERRORS = {kind.__name__: kind for kind in DiTError.__subclasses__()}


def records_in_process(
    source: Source,
    folder: Path,
    encoder: bool,
    precision: str,
    calibration: CalibrationRequest | None = None,
) -> Measurements:
    """Make the records in a fresh interpreter; its progress bar appears on stderr.

    Args:
        source: the checkpoint.
        folder: the records go into its folder ``golden``, and into a folder of their own for each further size.
        encoder: whether the encoder is recorded too.
        precision: the precision of the export, one of ``EXPORTED``.
        calibration: how an export in INT8 or FP8 is calibrated; its ranges are a record too.

    Raises:
        CheckpointError: the checkpoint cannot be read, or the process was killed.
        ParityError: the PyTorch reference itself is unusable.
        DiTError: the records cannot be written.
    """
    asked = json.dumps(asdict(calibration or CalibrationRequest()))
    command = command_of_module("dit_export.reference.child", os.fspath(folder), json.dumps(encoder), precision, asked)
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


def make_records(
    source: Source, folder: Path, encoder: bool, precision: str, calibration: CalibrationRequest | None = None
) -> Measurements:
    """Make the records of each size in this process; the arguments are those of ``records_in_process``."""
    checkpoint = load_checkpoint(source)
    if count_step_gmac(checkpoint.model) <= CHEAP_GMAC:
        torch.set_num_threads(1)  # a model this small would spend more time on waiting for threads than on computing
    models = [replace(checkpoint, model=checkpoint.at(size)) for size in checkpoint.sizes]
    settings = [RecordSettings.for_checkpoint(model, precision) for model in models]
    measurements: Measurements | None = None
    ranges, scales = None, None
    integers: dict[str, IntegerWeight] = {}
    norms = torch.zeros(0)
    if precision in QUANTIZED:
        request = calibration or CalibrationRequest()
        policy = PrecisionSpec(Precision(precision), (), request.keep_fp16)
        ranges, integers, norms = _calibrate(models, request, policy)
        scales = {name: ranges.scales[name] for name in integers}
    with Progress("PyTorch reference", sum(each.work for each in settings)) as bar:
        for index, (model, each) in enumerate(zip(models, settings, strict=True)):
            size = model.model.latent_size
            target = folder / (GOLDEN if measurements is None else name_for_size(GOLDEN, size))
            target.mkdir()
            if ranges is not None:
                ranges.write(target / f"{CALIBRATION}.npz", index, integers, norms)
            found = write_records(
                model,
                each,
                target,
                encoder,
                bar.advance,
                USUAL_TILES if source.tiles is None else source.tiles,
                scales,
                None if ranges is None else ranges.factors,
                precision,
            )
            measurements = found if measurements is None else measurements.add_size(found, size)
    assert measurements is not None
    return measurements if ranges is None else replace(measurements, calibration=asdict(ranges.spec))


def _calibrate(
    models: Sequence[Checkpoint], request: CalibrationRequest, policy: PrecisionSpec
) -> tuple[Calibration, dict[str, IntegerWeight], Tensor]:
    """The ranges and scales of the linear layers at all sizes, what tells the quantized layers' integers, and norms.

    The last are ``norms_with_factors``.
    """
    spec, reference = spec_for_checkpoint(models[0], request), Reference(models[0])
    references = chain([reference], map(Reference, models[1:]))
    with Progress("calibrating", len(models) * count_calibration(spec)) as bar, torch.inference_mode():
        found = calibrate(references, spec, policy.quantizes, bar.advance, FORMATS[policy.name].largest)
    quantized = {name: scale for name, scale in found.scales.items() if policy.quantizes(name)}
    norms = norms_with_factors(reference, found.factors)
    return found, emulate(reference, policy.name, quantized, found.factors), norms
