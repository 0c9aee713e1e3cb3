"""A bisection as text for people."""

from __future__ import annotations

import math
from pathlib import Path

from dit_export.bisect.bisection import Bisection
from dit_export.bisect.kernel_cost import KernelCost
from dit_export.bisect.quantization_bisection import STANDS_OUT, QuantizationBisection
from dit_runtime.bundle.reader import Bundle
from dit_runtime.core.text import join_lines
from dit_runtime.verify.budget import FP16_MAX

EMULATION = (
    "FP16 is emulated: results are rounded to FP16, sums inside a kernel are FP32; overflow inside one is not seen"
)

EXACT = "the checkpoint's"
INEXACT = "as INT8 rounded them; name the checkpoint too, and what their rounding costs is measured as well"
CANCELLED = (
    "the images are no nearer: along a trajectory the errors of layers cancel in part, and of few images it is chance "
    "how far; with --least-psnr images decide"
)
MOST_LISTED = 8  # layers, of those that cost most


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


def format_quantization_bisection(bisection: QuantizationBisection, bundle: Bundle, output: Path) -> str:
    """A bisection of an INT8 bundle as sentences and a list; ``output`` is the list's file."""
    lines = [
        f"{bundle.path}: int8 on {bisection.engine}, {len(bisection.layers)} layers, {bisection.trials} evaluations in "
        f"{bisection.seconds:.0f} s",
        "weights of layers in FP16: " + (EXACT if bisection.exact else INEXACT),
        "layers that cost most in INT8, each alone:",
        *(f"  {each.unit:<24} {each}" for each in bisection.layers[:MOST_LISTED]),
    ]
    kept = bisection.findings
    if kept:
        lines.append("to keep in FP16:")
        lines += [f"  {each.unit:<24} +{each.weights_bytes / 1e6:.2f} MB" for each in kept]
        more, (before, after) = sum(each.weights_bytes for each in kept), bisection.int8_gmac
        lines.append(
            f"cost: weights +{more / 1e6:.2f} MB ({more / bisection.weights_bytes:.1%} of the step's "
            f"{bisection.weights_bytes / 1e6:.1f} MB); INT8 multiply-adds of a branch {before:.3g} → {after:.3g} GMAC "
            f"({after / before - 1:.1%})"
        )
    elif bisection.wanted.least_psnr is not None:
        lines.append("images reach the level that is wanted as they are: no layer needs to be kept in FP16")
    else:
        lines.append(_say_why_none(bisection))
    arrow = " → {}" if kept else ""
    error, psnr = bisection.error, bisection.psnr
    gain = f"error of the guided prediction against FP32: {error[0]:.2%}{arrow.format(f'{error[1]:.2%}')}"
    if psnr is not None:
        gain += f"; worst image {psnr[0]:.1f} dB{arrow.format(f'{psnr[1]:.1f} dB')}"
    lines.append(gain)
    if kept and psnr is not None and psnr[1] <= psnr[0]:
        lines.append(CANCELLED)
    if kept:
        lines.append(f"{output}: now dit-export CHECKPOINT --int8 --keep-fp16 {output}")
    return join_lines(lines)


def _say_why_none(bisection: QuantizationBisection) -> str:
    over = max(bisection.layers, key=lambda each: each.worth)
    if over.worth < STANDS_OUT:
        return (
            f"no layer stands out, none costs {STANDS_OUT:g} times its share of the multiply-adds: nothing is worth "
            "keeping in FP16"
        )
    return (
        f"{over.unit} stands out and is {over.macs:.1%} of the INT8 multiply-adds, more than is to be kept in FP16: "
        f"add --most-fp16 {math.ceil(1000 * over.macs) / 1000:g}"
    )


def _describe_cost(cost: KernelCost | None) -> str:
    if cost is None:
        return ""
    return (
        f"; a guided step {cost.kernels[0]} → {cost.kernels[1]} kernels, fused attention {cost.fused_attention[0]} → "
        f"{cost.fused_attention[1]} ({cost.builder}, ahead of time)"
    )
