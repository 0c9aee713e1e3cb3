"""Measure the thresholds of the error budget: the ratio of engines' errors to PyTorch's own, over many draws.

    python benchmarks/budget.py --draws 10 --output benchmarks/budget.json
    python benchmarks/budget.py --velocity 3 --draws 3 --output benchmarks/budget-velocity.json
    python benchmarks/budget.py --velocity 1 --rough --draws 2 --output benchmarks/budget-rough.json
    python benchmarks/budget.py --bf16 --draws 3 --output benchmarks/budget-bf16.json
    python benchmarks/budget.py --int8 --draws 3 --output benchmarks/budget-int8.json
    python benchmarks/budget.py --fp8 --draws 3 --output benchmarks/budget-fp8.json

Each draw makes new golden records from other seeds, timesteps, labels and guidance scales, with PyTorch's own errors on
them. The first draw has the seeds and scales of an exported bundle. Each draw then verifies FP32 and FP16 bundles of
the Fashion-MNIST model and of a random model on every engine that is installed. The ratios of guided rungs are divided
by the factor that ``Budget.threshold_of`` allows for their guidance scale. The threshold of a kind of rung is twice the
largest ratio of all draws, rounded up to two digits, and at least 1. ``runtime/dit_runtime/verify/limits.py`` holds the
thresholds.

Trajectories that draw noise have a row of their own as well, undivided. With ``--velocity N`` the models are N random
SiTs of the linear path and N of the trigonometric one (``random_models.py``). Their run sets no threshold; it shows how
much of the factor √2 of such trajectories (``Budget.threshold_of``) is needed.

With ``--bf16`` the bundles are BF16, and PyTorch's own errors are those of a BF16 network and an FP16 autoencoder. The
ratios of the FP16 bundles that OpenVINO runs in BF16 have the same thresholds.

With ``--int8`` and ``--fp8`` the bundles are INT8 or FP8, and PyTorch's own errors are those of its emulation, with the
scales of the bundle's calibration.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from itertools import takewhile
from pathlib import Path

import numpy as np
import torch
from dit_export.bundle import bundle_from_checkpoint
from dit_export.checkpoints.random_weights import randomize
from dit_export.checkpoints.sources import Source, load_checkpoint
from dit_export.graphs.precision import BF16, FP16, FP32, make_quantized_policy
from dit_export.reference.golden import write_records
from dit_export.reference.record_settings import RecordSettings

from dit_runtime.backends.base import Engine
from dit_runtime.backends.open import open_engine
from dit_runtime.bundle.manifest import FileSpec
from dit_runtime.bundle.precision import Precision
from dit_runtime.bundle.quantization import factors_by_layer, linears_of
from dit_runtime.bundle.reader import (
    CALIBRATION,
    GOLDEN,
    MANIFEST,
    Bundle,
    open_bundle,
)
from dit_runtime.core.environment import describe_environment
from dit_runtime.core.errors import EngineError
from dit_runtime.core.files import sha256_of
from dit_runtime.core.progress import Progress
from dit_runtime.core.replace import replace_file
from dit_runtime.verify.replay import Replay
from dit_runtime.verify.rung import Rung
from dit_runtime.verify.verification import verify
from random_models import KINDS as MODELS
from random_models import make_random_source

DEMO = Path(__file__).parent / "fashion_mnist" / "checkpoint"
GUIDANCE = (1.5, 4.0, 7.5)
ENGINES = (("onnxruntime", None), ("openvino", "f32"), ("openvino", "bf16"))
KINDS = {
    "conditioner": "conditioner",
    "embedding": "embedding",
    "blocks": "blocks",
    "variance": "variance",
    "forward": "forward",
    "teacher-forced": "teacher_forced",
    "free-running": "free_running",
    "decoder": "decoder",
    "image PSNR": "image",
    "encoder": "encoder",
}
DRAWING = ("ddpm free-running", "sde-euler free-running")  # rungs of trajectories that draw noise
UNDIVIDED = "drawing noise, undivided"  # their ratios to PyTorch's error, whatever the guidance scale allows
FIRST_RELATION = "classes and timesteps"  # from here on rungs have no series of ratios


def make_random_checkpoint(folder: Path) -> Path:
    """Make a ``DiTPipeline`` folder with seeded random weights: 8 blocks of width 192, 16×16 latents, 100 classes."""
    from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    transformer = DiTTransformer2DModel(
        num_attention_heads=6,
        attention_head_dim=32,
        in_channels=4,
        out_channels=8,
        num_layers=8,
        sample_size=16,
        patch_size=2,
        num_embeds_ada_norm=100,
    )
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    autoencoder = AutoencoderKL(**blocks, block_out_channels=(32, 64), latent_channels=4, scaling_factor=0.5)
    randomize(transformer, 0)
    randomize(autoencoder, 1)
    scheduler = DDIMScheduler(beta_schedule="linear", beta_start=1e-4, beta_end=0.02, clip_sample=False)
    DiTPipeline(transformer, autoencoder, scheduler).save_pretrained(folder)
    return folder


def list_models(velocity: int, rough: bool, work: Path) -> dict[str, Source]:
    """The two DiTs by name, or so many random SiTs of each path that is not nearly a DiT's."""
    if not velocity:
        checkpoints = {"fashion_mnist": DEMO, "random": make_random_checkpoint(work / "checkpoint")}
        return {name: Source(str(checkpoint)) for name, checkpoint in checkpoints.items()}
    kinds = [kind for kind in MODELS if kind.path in ("linear", "gvp")]
    return {
        f"{kind.name} {seed}": make_random_source(kind, seed, work / f"{kind.path}-{seed}", rough=rough)
        for seed in range(velocity)
        for kind in kinds
    }


def draw_records(bundle: Bundle, source: Source, draw: int) -> tuple[Bundle, float]:
    """Replace a bundle's golden records by those of a draw; return the bundle and the records' guidance scale."""
    guidance, scales, factors = GUIDANCE[draw % len(GUIDANCE)], None, None
    settings = RecordSettings(2, 10, 6, 2, 10, seed=draw, guidance=guidance, forward_guidance=guidance)
    if bundle.manifest.calibration is not None:
        record, model = bundle.records(CALIBRATION), bundle.manifest.model
        by_layer = factors_by_layer(record["factors"], model.conditioning, model.width, model.mlp_width)
        factors = {name: torch.from_numpy(each.copy()) for name, each in by_layer.items()}
        scales = dict(zip(linears_of(model.conditioning, model.depth), record["scales"].tolist(), strict=True))
        settings = replace(settings, precisions=(bundle.manifest.precision.name, "bf16"))
    elif bundle.manifest.precision.name == Precision.BF16:
        settings = replace(settings, precisions=("bf16",), fp16_autoencoder=True)
    target, name = bundle.path / GOLDEN, bundle.manifest.precision.name
    measured = write_records(
        load_checkpoint(source), settings, target, True, lambda: None, (), scales, factors, precision=name
    )
    return update_manifest(bundle, measured.floors), guidance


def update_manifest(bundle: Bundle, floors: dict[str, dict[str, list[float]]]) -> Bundle:
    """Write the present files' hashes and these floors into a bundle's manifest, and open the bundle again."""
    files = {
        name: FileSpec((bundle.path / name).stat().st_size, sha256_of(bundle.path / name))
        for name in bundle.manifest.files
    }
    series = {name: {key: tuple(values) for key, values in each.items()} for name, each in floors.items()}
    manifest = replace(bundle.manifest, files=files, floors=series)
    (bundle.path / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    return open_bundle(bundle.path)


def engines_for(bundle: Bundle) -> Iterator[Engine]:
    for name, precision in ENGINES:
        if precision == "bf16" and bundle.manifest.precision.name == "fp32":
            continue
        try:
            yield open_engine(bundle, name, threads=1, precision=precision)
        except EngineError as error:
            print(f"left out: {error}")


def kind_of(rung: Rung) -> str | None:
    return next((kind for word, kind in KINDS.items() if word in rung.name), None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=10)
    parser.add_argument("--velocity", type=int, default=0, help="random SiTs of each path, instead of the two DiTs")
    parser.add_argument("--rough", action="store_true", help="random SiTs whose trajectories multiply errors")
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--bf16", action="store_true", help="BF16 bundles, instead of FP32 and FP16")
    choice.add_argument("--int8", action="store_true", help="INT8 bundles, instead of FP32 and FP16")
    choice.add_argument("--fp8", action="store_true", help="FP8 bundles, instead of FP32 and FP16")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "budget.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    # engine → kind → guidance → ratios
    ratios: dict[str, dict[str, dict[float, list[float]]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    count = 2 * max(args.velocity, 1)
    quantized = {Precision.INT8: args.int8, Precision.FP8: args.fp8}
    policies = tuple(make_quantized_policy(name, ()) for name, asked in quantized.items() if asked)
    policies = policies or ((BF16,) if args.bf16 else (FP32, FP16))
    with tempfile.TemporaryDirectory() as work, Progress("draws", count * args.draws) as bar:
        models = list_models(args.velocity, args.rough, Path(work))
        for model, source in models.items():
            bundles = [
                bundle_from_checkpoint(source, Path(work) / f"{model} {precision.name}.bundle", precision, encoder=True)
                for precision in policies
            ]
            for draw in range(args.draws):
                first, guidance = draw_records(bundles[0], source, draw)
                bundles[0] = first
                for second in bundles[1:]:
                    for file in (first.path / GOLDEN).iterdir():
                        (second.path / GOLDEN / file.name).write_bytes(file.read_bytes())
                    floors = {name: dict(series) for name, series in first.manifest.floors.items()}
                    bundles[1] = update_manifest(second, floors)
                for bundle in bundles:
                    for engine in engines_for(bundle):  # of this draw: an engine notices that its bundle was changed
                        budget = Replay(bundle, engine).budget
                        kinds = ratios[f"{budget.precision}, {engine.info.name}"]
                        for rung in takewhile(lambda rung: rung.name != FIRST_RELATION, verify(bundle, engine)):
                            kind = kind_of(rung)
                            if kind is None or rung.threshold is None or "ratio" not in rung.series:
                                continue
                            allowed = rung.threshold / budget.thresholds[kind]
                            of_scale = 1.0 if allowed == 1 or "unguided" in rung.name else guidance
                            kinds[kind][of_scale] += [ratio / allowed for ratio in rung.series["ratio"]]
                            if rung.name.startswith(DRAWING):
                                kinds[UNDIVIDED][of_scale] += rung.series["ratio"]
                        engine.close()
                bar.advance()
                print(f"{model}, draw {draw}: guidance {guidance:g}", flush=True)
    report = {name: {kind: summarize(scales) for kind, scales in kinds.items()} for name, kinds in ratios.items()}
    print(
        f"{'engine':<44} {'rung':<24} {'ratios':>7} {'median':>7} {'p99':>7} {'largest':>8}  largest by guidance scale"
    )
    for name, kinds in report.items():
        for kind, row in kinds.items():
            scales = "  ".join(f"{scale}: {value:.2f}" for scale, value in row["largest_by_guidance"].items())
            print(
                f"{name:<44} {kind:<24} {row['ratios']:>7} {row['median']:>7.2f} {row['p99']:>7.2f} "
                f"{row['largest']:>8.2f}  {scales}"
            )
    thresholds: dict[str, dict[str, float]] = defaultdict(dict)
    for name, kinds in report.items():
        precision = name.partition(",")[0]
        for kind, row in kinds.items():
            if kind == UNDIVIDED:
                continue
            wanted = round_up(2 * row["largest"])
            thresholds[precision][kind] = max(thresholds[precision].get(kind, 0.0), wanted)
    print(json.dumps(thresholds, indent=1))
    with replace_file(args.output) as file:
        content = {
            "draws": args.draws,
            "environment": describe_environment(),
            "ratios": report,
            "thresholds": thresholds,
        }
        file.write_text(json.dumps(content, indent=1) + "\n")


def summarize(scales: dict[float, list[float]]) -> dict[str, object]:
    values = np.concatenate([np.asarray(each) for each in scales.values()])
    return {
        "ratios": len(values),
        "median": round(float(np.median(values)), 3),
        "p99": round(float(np.percentile(values, 99)), 3),
        "largest": round(float(values.max()), 3),
        "largest_by_guidance": {f"{scale:g}": round(max(each), 3) for scale, each in sorted(scales.items())},
    }


def round_up(value: float) -> float:
    """Round up to two digits; at least 1, because an engine need not be better than PyTorch."""
    value = max(value, 1.0)
    step = 10 ** (math.floor(math.log10(value)) - 1)
    return round(math.ceil(value / step - 1e-9) * step, 6)


if __name__ == "__main__":
    main()
