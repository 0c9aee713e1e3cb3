"""A bisection as text for people."""

from __future__ import annotations

from pathlib import Path

from dit_export.bisect.bisection import Bisection
from dit_export.bisect.kernel_cost import KernelCost
from dit_runtime.bundle.reader import Bundle
from dit_runtime.core.text import join_lines
from dit_runtime.verify.budget import FP16_MAX

EMULATION = (
    "FP16 is emulated: results are rounded to FP16, sums inside a kernel are FP32; overflow inside one is not seen"
)


def format_bisection(bisection: Bisection, bundle: Bundle, output: Path) -> str:
    """A bisection as a table and sentences; ``output`` is the list's file."""
    lines = [
        f"{bundle.path}: {bundle.manifest.precision.name} on {bisection.engine}, {bisection.trials} trials in "
        f"{bisection.seconds:.0f} s"
    ]
    columns = {"as it is": bisection.rungs, "all FP32": bisection.fp32}
    if bisection.findings:
        columns["kept FP32"] = bisection.kept
    lines.append("  ".join([f"{'rung':<24}", *(f"{title:>10}" for title in (*columns, "limit"))]))
    for rung, *all_of_it in zip(bisection.rungs, *columns.values(), strict=True):
        values = [*(rung.text(each.value) for each in all_of_it), rung.text(rung.limit)]
        verdict = "pass" if rung.passed else f"FAIL  {rung.first_over or ''}".rstrip()
        lines.append("  ".join([f"{rung.name:<24}", *(f"{value:>10}" for value in values), verdict]))
    if bisection.findings:
        lines.append("to keep in FP32:")
        lines += [f"  {finding.unit:<20} {finding}" for finding in bisection.findings]
        more = sum(finding.weights_bytes for finding in bisection.findings)
        share = f"{more / bisection.weights_bytes:.1%} of the bundle's {bisection.weights_bytes / 1e6:.1f} MB"
        lines.append(f"cost: weights +{more / 1e6:.2f} MB ({share})" + _describe_cost(bisection.cost))
    else:
        lines.append("nothing breaks the budget: no unit needs to be kept in FP32")
    if bisection.closest:
        near = (f"{name} {value:.3g} ({value / FP16_MAX:.2%})" for name, value in bisection.closest)
        lines.append(f"closest to FP16's range: {'; '.join(near)}")
    lines.append(EMULATION)
    if bisection.findings:
        lines.append(f"{output}: now dit-export CHECKPOINT --fp16 --keep-fp32 {output}")
    return join_lines(lines)


def _describe_cost(cost: KernelCost | None) -> str:
    if cost is None:
        return ""
    return (
        f"; a guided step {cost.kernels[0]} → {cost.kernels[1]} kernels, fused attention {cost.fused_attention[0]} → "
        f"{cost.fused_attention[1]} ({cost.builder}, ahead of time)"
    )
