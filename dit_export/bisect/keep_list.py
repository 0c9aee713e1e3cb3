"""Bisects a bundle and writes the list of units that ``dit-export --keep-fp32`` takes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from dit_export.bisect.bisection import Bisection, bisection_of
from dit_export.bisect.fp32_weights import weights_from_checkpoint
from dit_export.bisect.kernel_cost import measure_kernel_cost
from dit_export.checkpoints.sources import Source, load_checkpoint
from dit_runtime.bundle.precision import Precision
from dit_runtime.bundle.reader import Bundle
from dit_runtime.core.errors import CheckpointError
from dit_runtime.core.replace import check_writable, replace_file


def find_keep_list(bundle: Bundle, source: Source | None, output: Path) -> Bisection:
    """Find the units of an FP16 bundle to keep in FP32, and write them to ``output`` if there are any.

    Args:
        bundle: the bundle at the size in use.
        source: the checkpoint that was exported, for the FP32 weights of units in FP32. None takes the bundle's own
            weights, which are rounded to FP16.
        output: the list's file.

    Raises:
        OutputError: ``output`` cannot be written.
        CheckpointError: the checkpoint cannot be read, the bundle was made from other weights, or it is INT8.
        ParityError: the bundle does not keep its error budget even with all units in FP32.
    """
    if bundle.manifest.precision.name == Precision.INT8:
        raise CheckpointError(
            f"{bundle.path}: is INT8; --bisect finds what FP16 breaks, so give it the checkpoint's export with --fp16"
        )
    check_writable(output)
    weights = None if source is None else weights_from_checkpoint(load_checkpoint(source), bundle)
    bisection = bisection_of(bundle, weights)
    if not bisection.findings:
        return bisection
    write_keep_list(output, bisection, bundle)
    units = [finding.unit for finding in bisection.findings]
    return replace(bisection, cost=measure_kernel_cost(bundle, units, weights))


def write_keep_list(path: Path, bisection: Bisection, bundle: Bundle) -> None:
    """Write the file that ``dit-export --keep-fp32`` takes.

    Raises:
        OutputError: the file cannot be written.
    """
    reasons = {finding.unit: str(finding) for finding in bisection.findings}
    lines = [
        f"# Units of {bundle.manifest.source.name} to keep in FP32, for dit-export --fp16 --keep-fp32.",
        f"# Found by dit-export --bisect in the bundle with digest {bundle.digest}.",
        *(f"{unit}  # {reasons.get(unit, 'kept already')}" for unit in bisection.keep_fp32),
    ]
    with replace_file(path) as file:
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
