"""``dit-verify --info``: what a bundle is, and which engines and verdicts there are for it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dit_runtime.backends.tensorrt.store import describe_platform, read_engines
from dit_runtime.bundle.reader import GOLDEN, Bundle
from dit_runtime.core.machine import describe_machine
from dit_runtime.core.text import join_lines
from dit_runtime.samplers.by_name import count_default_steps
from dit_runtime.verify.verdicts import Verdict, read_verdicts

PARTS = ("conditioner", "step", "decoder", "encoder")


def bundle_info(bundle: Bundle) -> dict[str, Any]:
    """The facts of ``dit-verify --info``, as its JSON has them."""
    manifest = bundle.manifest
    engines, damaged = _engines_of(bundle)
    return {
        "bundle": bundle.digest,
        "source": manifest.source.name,
        "reference": manifest.source.reference,
        "precision": manifest.precision.name,
        "keep_fp32": list(manifest.precision.keep_fp32),
        "keep_fp16": list(manifest.precision.keep_fp16),
        "model": _model_of(bundle),
        "prediction": manifest.diffusion.prediction_type,
        "second_time": manifest.diffusion.second_time,
        "guidance_inside": manifest.diffusion.guidance_inside,
        "image_sizes": [list(size) for size in manifest.image_sizes],
        "defaults": {
            "sampler": manifest.defaults.sampler,
            "steps": count_default_steps(
                manifest.defaults.sampler, manifest.model, manifest.diffusion, manifest.defaults.steps
            ),
            "guidance": manifest.defaults.guidance,
        },
        "weights_bytes": {name: manifest.files[graph.weights].bytes for name, graph in manifest.graphs.items()},
        "golden_bytes": sum(spec.bytes for name, spec in manifest.files.items() if name.startswith(GOLDEN)),
        "budgets": sorted(name for name, floors in manifest.floors.items() if floors),
        "largest": dict(sorted(manifest.magnitudes.items(), key=lambda item: -item[1])[:1]),
        "producer": manifest.producer,
        "engines": engines,
        "damaged": damaged,
        "verdicts": [_verdict_facts(verdict) for verdict in read_verdicts(bundle)],
    }


def _verdict_facts(verdict: Verdict) -> dict[str, Any]:
    return {
        "engine": verdict.engine,
        "image_size": list(verdict.image_size),
        "machine": verdict.machine,
        "time": verdict.time,
        "quick": verdict.quick,
        "passed": verdict.passed,
        "failed": list(verdict.failed),
        "here": verdict.machine == describe_machine(),
    }


def _model_of(bundle: Bundle) -> dict[str, Any]:
    model = bundle.manifest.model
    return {
        "conditioning": model.conditioning,
        "depth": model.depth,
        "width": model.width,
        "heads": model.heads,
        "patch_size": model.patch_size,
        "classes": model.classes,
        "learned_variance": model.learned_variance,
        "observation": model.observation,
        "actions": [model.latent_size[1], model.latent_channels] if model.observation else None,
    }


def _engines_of(bundle: Bundle) -> tuple[list[dict[str, Any]], list[str]]:
    """The engines that were built for the bundle, and one line for each engine that is damaged."""
    damaged: list[str] = []
    engines = [
        {
            "folder": str(engine.folder),
            "image_size": list(engine.image_size),
            "built_for": describe_platform(engine.library, engine.version, engine.compute_capability, engine.gpu),
            "plans_bytes": {name: graph.plan_bytes for name, graph in engine.graphs.items()},
        }
        for size in bundle.manifest.image_sizes
        for engine in read_engines(bundle.at(size), None, damaged.append)
    ]
    return engines, damaged


def format_info(path: Path, info: dict[str, Any]) -> str:
    """The facts of ``bundle_info`` for a terminal."""
    return join_lines([*_model_lines(path, info), *_engine_lines(info), *_verdict_lines(path, info)])


def _show_prediction(info: dict[str, Any]) -> str:
    if info["second_time"] is None:
        return str(info["prediction"])
    guided = ", guidance in its weights" if info["guidance_inside"] else ""
    return f"the average {info['prediction']} from t, with {info['second_time']} beside it{guided}"


def _model_lines(path: Path, info: dict[str, Any]) -> Iterator[str]:
    model, defaults = info["model"], info["defaults"]
    kept = "" if info["precision"] == "fp32" else f", {', '.join(info['keep_fp32'])} in FP32"
    kept += f", {', '.join(info['keep_fp16'])} in FP16" if info["keep_fp16"] else ""
    yield f"{path}: {info['source']}, {info['precision']}{kept}"
    yield f"digest      {info['bundle']}"
    yield f"reference   {info['reference']}"
    condition = f"{model['classes']} classes"
    if model["actions"]:
        condition = f"observations of {model['observation']} numbers"
    yield (
        f"model       {model['conditioning']}, {model['depth']} blocks of width {model['width']}, "
        f"{model['heads']} heads, patch {model['patch_size']}, {condition}, "
        f"predicts {_show_prediction(info)}{' and the variance' if model['learned_variance'] else ''}"
    )
    sizes = ", ".join(f"{height}x{width}" for height, width in info["image_sizes"])
    made = f"images      {sizes}"
    if model["actions"]:
        made = f"actions     {model['actions'][0]} of {model['actions'][1]} numbers"
    yield (f"{made}; by default {defaults['sampler']}, {defaults['steps']} steps, guidance {defaults['guidance']:g}")
    weights = [f"{name} {info['weights_bytes'][name] / 1e6:.1f} MB" for name in PARTS if name in info["weights_bytes"]]
    yield f"weights     {', '.join(weights)}"
    budgets = ", ".join(info["budgets"]) or "no precision"
    yield f"records     {info['golden_bytes'] / 1e6:.1f} MB; PyTorch's own errors in {budgets}"
    for unit, value in info["largest"].items():
        yield f"largest |x| {value:.4g}, in {unit}"


def _engine_lines(info: dict[str, Any]) -> Iterator[str]:
    for engine in info["engines"]:
        size = sum(engine["plans_bytes"].values()) / 1e6
        height, width = engine["image_size"]
        yield f"engine      {engine['folder']}: {engine['built_for']}, {height}x{width}, plans {size:.1f} MB"
    for text in info["damaged"]:
        yield f"damaged     {text}"
    if not info["engines"]:
        yield "engine      none was built; dit-build builds TensorRT engines"


def _verdict_lines(path: Path, info: dict[str, Any]) -> Iterator[str]:
    for verdict in info["verdicts"]:
        height, width = verdict["image_size"]
        outcome = "passed" if verdict["passed"] else f"FAILED {', '.join(verdict['failed'])}"
        where = "here" if verdict["here"] else f"on {verdict['machine'].get('processor', 'another machine')}"
        kind = "quick verify" if verdict["quick"] else "verify"
        yield f"verdict     {verdict['engine']}, {height}x{width}: {outcome} ({kind} {where}, {verdict['time']})"
    if not info["verdicts"]:
        yield f"verdict     none yet; run dit-verify {path}"
