"""A dry run as text for people."""

from __future__ import annotations

from collections.abc import Iterator
from textwrap import fill

from dit_export.dry_run import CalibrationEstimate, DryRun, Roofline, SizeEstimate
from dit_runtime.bundle.manifest import ENCODER
from dit_runtime.bundle.precision import Precision
from dit_runtime.core.text import join_lines

COLUMNS = 110
LABEL = 14  # columns of a fact's name
WORK_OF = {"conditioner": "a row of the table", "step": "a branch", "decoder": "an image", ENCODER: "an image"}


def format_dry_run(estimate: DryRun) -> str:
    """A dry run as text for a terminal; sentences are at most 110 columns wide."""
    facts = _facts_of(estimate)
    filled = [fill(f"{name:<{LABEL}}{text}", COLUMNS, subsequent_indent=" " * LABEL) for name, text in facts.items()]
    lines = "\n".join(filled).split("\n")
    own = any(graph.quantized_bytes is not None for graph in estimate.graphs)
    title = f" {estimate.precision.upper():>10}" if own else ""
    half = "BF16" if estimate.precision == Precision.BF16 else "FP16"
    lines += ["", f"{'graph':<12} {'parameters':>10} {'FP32':>10} {half:>10}{title} {'GMAC':>9}"]
    lines += [
        f"{graph.name:<12} {_show_count(graph.parameters):>10} {_show_bytes(graph.fp32_bytes):>10} "
        f"{_show_bytes(graph.fp16_bytes):>10}"
        + ("" if graph.quantized_bytes is None else f" {_show_bytes(graph.quantized_bytes):>10}")
        + f" {_show_number(graph.gmac):>9} {WORK_OF[graph.name]}"
        for graph in estimate.graphs
    ]
    for size in estimate.sizes:
        lines += _lines_of_size(size, _describe_step(estimate))
    return join_lines(lines)


def _facts_of(estimate: DryRun) -> dict[str, str]:
    model = estimate.model
    kept = f"; in FP32 {', '.join(estimate.keep_fp32)}" if estimate.keep_fp32 else ""
    kept += f"; in FP16 {', '.join(estimate.keep_fp16)}" if estimate.keep_fp16 else ""
    condition = f"{model.classes} classes"
    if model.observation:
        condition = f"observations of {model.observation} numbers, {model.tokens} actions of {model.latent_channels}"
        copies = "nothing: the source has one timestep embedder"
    elif estimate.embedder_copies == 1:
        copies = (
            f"nothing: the source has {'one timestep' if model.times == 1 else 'two timestep'} and one label embedder"
        )
    elif estimate.embedders > 1:
        copies = f"nothing: the {estimate.embedder_copies} copies of the embedders differ, so each is kept"
    else:
        copies = (
            f"{estimate.embedder_copies} copies of the embedders → 1: {_show_count(estimate.deduplicated_parameters)} "
            f"parameters, {_show_bytes(estimate.deduplicated_bytes)}"
        )
    row = "×".join(str(axis) for axis in estimate.table_shape)
    steps = ", ".join(
        f"{count} step{'s' if count > 1 else ''} {_show_bytes(size)}" for count, size in estimate.table_bytes.items()
    )
    rows = "one row a step" if model.observation else "with guidance, two rows a step"
    if estimate.branches == 1 and not model.observation:
        rows = "guidance is in the weights: a row a step"
    return {
        "model": f"{model.conditioning}, {model.depth} blocks of width {model.width}, {model.heads} heads, patches of "
        f"{model.patch_size}, {condition}",
        "source": f"{estimate.family}, {_show_count(estimate.source_parameters)} parameters as stored",
        "precision": estimate.precision + kept,
        **({} if estimate.calibration is None else {"calibration": _describe_calibration(estimate.calibration)}),
        "deduplicated": copies,
        "hoisted": f"{estimate.hoisted_share:.1%} of the transformer's parameters: run once, not in every step",
        "table": f"{estimate.table}, a row {row} {estimate.table_dtype}, {_show_bytes(estimate.table_row_bytes)}; "
        f"{rows}: {steps}",
    }


def _describe_calibration(calibration: CalibrationEstimate) -> str:
    spec, classes = calibration.spec, len(set(calibration.spec.labels))
    work = f"{calibration.evaluations} evaluations of a branch, {_show_number(calibration.gmac)} GMAC in PyTorch"
    return (
        f"{len(spec.labels)} images of {classes} classes, {spec.steps} steps of {spec.sampler}, guidance "
        f"{spec.guidance:g}: {work}"
    )


def _describe_step(estimate: DryRun) -> str:
    if estimate.model.observation:
        return "step of one chunk"
    return f"{'guided step' if estimate.branches > 1 else 'step'} of one image"


def _lines_of_size(size: SizeEstimate, step: str) -> Iterator[str]:
    height, width = size.image_size or size.latent_size
    decoder = "" if size.decoder_gmac is None else f", decoder {_show_number(size.decoder_gmac)} an image"
    yield ""
    yield (
        f"{height}x{width}{' latents' if size.image_size is None else ''}: {size.tokens} tokens; GMAC: forward "
        f"{_show_number(size.gmac)} a branch{decoder}; positional table {_show_bytes(size.position_bytes)}"
    )
    yield f"roofline of a {step} in FP16, ms; memory with the conditioner inside, and hoisted"
    yield (
        f"{'device':<24} {'SM':>5} {'memory':>8} {'GB/s':>7} {'TFLOPS':>7} {'compute':>8} {'inside':>8} "
        f"{'hoisted':>8} {'bound':>8}"
    )
    yield from map(_line_of_roofline, size.rooflines)


def _line_of_roofline(line: Roofline) -> str:
    return (
        f"{line.device.name:<24} {line.device.compute_capability:>5} {line.device.memory_gb:>5g} GB "
        f"{line.device.bandwidth_gb_s:>7g} {_show_number(line.device.fp16_tflops):>7} "
        f"{_show_number(line.compute_ms):>8} {_show_number(line.memory_inside_ms):>8} "
        f"{_show_number(line.memory_hoisted_ms):>8} {_show_number(line.bound_ms):>8} {line.bound_by}"
    )


def _show_count(number: int) -> str:
    return f"{number / 1e6:.1f} M" if number >= 1e6 else f"{number / 1e3:.1f} k"


def _show_bytes(number: int) -> str:
    return f"{number / 1e6:.1f} MB" if number >= 1e6 else f"{number / 1e3:.1f} kB"


def _show_number(value: float) -> str:
    return f"{value:.2f}" if value >= 1 else f"{value:.3g}"
