"""What a bundle is, and what there is of engines and verdicts for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dit_runtime.backends.tensorrt.store import described, stored_engines
from dit_runtime.bundle.reader import GOLDEN, Bundle
from dit_runtime.core.machine import describe_machine
from dit_runtime.verify.verdicts import stored_verdicts


def bundle_info(bundle: Bundle) -> dict[str, Any]:
    """The facts of ``dit-verify --info``, as JSON has them."""
    manifest = bundle.manifest
    damaged: list[str] = []
    engines = [
        {
            "folder": str(engine.folder),
            "image_size": list(engine.image_size),
            "built_for": described(engine.library, engine.version, engine.compute_capability, engine.gpu),
            "plans_bytes": {name: graph.plan_bytes for name, graph in engine.graphs.items()},
        }
        for size in manifest.image_sizes
        for engine in stored_engines(bundle.at(size), None, damaged.append)
    ]
    golden = [spec.bytes for name, spec in manifest.files.items() if name.startswith(GOLDEN)]
    model = manifest.model
    return {
        "bundle": bundle.digest,
        "source": manifest.source.name,
        "reference": manifest.source.reference,
        "precision": manifest.precision.name,
        "keep_fp32": list(manifest.precision.keep_fp32),
        "model": {
            "conditioning": model.conditioning,
            "depth": model.depth,
            "width": model.width,
            "heads": model.heads,
            "patch_size": model.patch_size,
            "classes": model.classes,
            "learned_variance": model.learned_variance,
        },
        "prediction": manifest.diffusion.prediction_type,
        "image_sizes": [list(size) for size in manifest.image_sizes],
        "defaults": {
            "sampler": manifest.defaults.sampler,
            "steps": manifest.defaults.steps,
            "guidance": manifest.defaults.guidance,
        },
        "weights_bytes": {name: manifest.files[graph.weights].bytes for name, graph in manifest.graphs.items()},
        "golden_bytes": sum(golden),
        "budgets": sorted(name for name, floors in manifest.floors.items() if floors),
        "largest": dict(sorted(manifest.magnitudes.items(), key=lambda item: -item[1])[:1]),
        "producer": manifest.producer,
        "engines": engines,
        "damaged": damaged,
        "verdicts": [
            {**verdict, "here": verdict["machine"] == describe_machine()} for verdict in stored_verdicts(bundle)
        ],
    }


def format_info(path: Path, info: dict[str, Any]) -> str:
    """The same for people."""
    model, defaults = info["model"], info["defaults"]
    sizes = ", ".join(f"{height}x{width}" for height, width in info["image_sizes"])
    parts = ("conditioner", "step", "decoder", "encoder")
    weights = [f"{name} {info['weights_bytes'][name] / 1e6:.1f} MB" for name in parts if name in info["weights_bytes"]]
    kept = f", {', '.join(info['keep_fp32'])} in FP32" if info["precision"] == "fp16" else ""
    lines = [
        f"{path}: {info['source']}, {info['precision']}{kept}",
        f"digest      {info['bundle']}",
        f"reference   {info['reference']}",
        f"model       {model['conditioning']}, {model['depth']} blocks of width {model['width']}, "
        f"{model['heads']} heads, patch {model['patch_size']}, {model['classes']} classes, "
        f"predicts {info['prediction']}{' and the variance' if model['learned_variance'] else ''}",
        f"images    {sizes}; by default {defaults['sampler']}, {defaults['steps']} steps, guidance "
        f"{defaults['guidance']:g}",
        f"weights     {', '.join(weights)}",
        f"records     {info['golden_bytes'] / 1e6:.1f} MB; PyTorch's own errors in "
        f"{', '.join(info['budgets']) or 'no precision'}",
    ]
    lines += [f"largest |x| {value:.4g}, in {unit}" for unit, value in info["largest"].items()]
    for engine in info["engines"]:
        size = sum(engine["plans_bytes"].values()) / 1e6
        height, width = engine["image_size"]
        lines.append(f"engine      {engine['folder']}: {engine['built_for']}, {height}x{width}, plans {size:.1f} MB")
    lines += [f"damaged     {text}" for text in info["damaged"]]
    if not info["engines"]:
        lines.append("engine      none was built; dit-build makes TensorRT's")
    for verdict in info["verdicts"]:
        height, width = verdict["image_size"]
        outcome = "passed" if verdict["passed"] else f"FAILED {', '.join(verdict['failed'])}"
        where = "here" if verdict["here"] else f"on {verdict['machine'].get('processor', 'another machine')}"
        kind = "quick verify" if verdict["quick"] else "verify"
        lines.append(
            f"verdict     {verdict['engine']}, {height}x{width}: {outcome} ({kind} {where}, {verdict['time']})"
        )
    if not info["verdicts"]:
        lines.append(f"verdict     none yet; run dit-verify {path}")
    return "\n".join(lines)
