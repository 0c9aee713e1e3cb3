"""Bisects a bundle and writes the list of units that ``dit-export --keep-fp32`` or ``--keep-fp16`` takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from dit_export.bisect.bisection import Bisection, bisection_of
from dit_export.bisect.fp32_weights import GRAPHS, weights_from_checkpoint
from dit_export.bisect.graph_edits import Array
from dit_export.bisect.kernel_cost import measure_kernel_cost
from dit_export.bisect.quantization_bisection import QuantizationBisection, Wanted, quantization_bisection_of
from dit_export.checkpoints.sources import Source, load_checkpoint
from dit_runtime.bundle.precision import Precision
from dit_runtime.bundle.reader import Bundle
from dit_runtime.core.errors import CheckpointError
from dit_runtime.core.replace import check_writable, replace_file

Weights = Mapping[str, Mapping[str, Array]]


def find_keep_list(
    bundle: Bundle, source: Source | None, output: Path, wanted: Wanted | None = None
) -> Bisection | QuantizationBisection:
    """Find the units to keep in FP32 of an FP16 bundle, or in FP16 of an INT8 bundle; write them to ``output``.

    Args:
        bundle: the bundle at the size in use.
        source: the checkpoint that was exported, for its weights. None takes the bundle's own weights, as FP16 or INT8
            rounded them.
        output: the list's file; it is not written if nothing is to be kept.
        wanted: of an INT8 bundle, how much is kept; None is the usual share.

    Raises:
        OutputError: ``output`` cannot be written.
        CheckpointError: the checkpoint cannot be read, the bundle was made from other weights, or ``wanted`` is given
            of a bundle that is not INT8, or it is BF16 or FP8.
        ParityError: keeping all units is not enough.
    """
    int8 = bundle.manifest.precision.name == Precision.INT8
    if wanted is not None and not int8:
        raise CheckpointError(
            f"{bundle.path}: is {bundle.manifest.precision.name}; --most-fp16 and --least-psnr are for INT8 bundles. "
            "Of others the list is the shortest that keeps the error budget"
        )
    if (own := bundle.manifest.precision.name) in (Precision.BF16, Precision.FP8):
        raise CheckpointError(
            f"{bundle.path}: is {own}; --bisect finds what FP16 or INT8 breaks, so give it the checkpoint's export "
            "with --fp16 or --int8"
        )
    check_writable(output)
    graphs = ("probe",) if int8 else GRAPHS
    weights = None if source is None else weights_from_checkpoint(load_checkpoint(source), bundle, graphs)
    return _bisect_int8(bundle, weights, output, wanted) if int8 else _bisect_fp16(bundle, weights, output)


def _bisect_fp16(bundle: Bundle, weights: Weights | None, output: Path) -> Bisection:
    bisection = bisection_of(bundle, weights)
    if not bisection.findings:
        return bisection
    reasons = {finding.unit: str(finding) for finding in bisection.findings}
    write_keep_list(output, bundle, "FP32", "--fp16 --keep-fp32", bisection.keep_fp32, reasons)
    return replace(bisection, cost=measure_kernel_cost(bundle, list(reasons), weights))


def _bisect_int8(bundle: Bundle, weights: Weights | None, output: Path, wanted: Wanted | None) -> QuantizationBisection:
    bisection = quantization_bisection_of(bundle, None if weights is None else weights["probe"], wanted)
    if bisection.findings:
        reasons = {finding.unit: str(finding) for finding in bisection.findings}
        write_keep_list(output, bundle, "FP16", "--int8 --keep-fp16", bisection.keep_fp16, reasons)
    return bisection


def write_keep_list(
    path: Path, bundle: Bundle, precision: str, options: str, units: Sequence[str], reasons: Mapping[str, str]
) -> None:
    """Write the file that ``dit-export`` takes with ``options``; a unit without a reason is one that is kept already.

    Raises:
        OutputError: the file cannot be written.
    """
    lines = [
        f"# Units of {bundle.manifest.source.name} to keep in {precision}, for dit-export {options}.",
        f"# Found by dit-export --bisect in the bundle with digest {bundle.digest}.",
        *(f"{unit}  # {reasons.get(unit, 'kept already')}" for unit in units),
    ]
    with replace_file(path) as file:
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
