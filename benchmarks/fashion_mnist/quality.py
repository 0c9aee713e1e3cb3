"""Measure the effect of a precision on the demo model's images: class accuracy and Fréchet distance, with intervals.

    python benchmarks/fashion_mnist/quality.py     # half an hour on two CPU cores; an interrupted run goes on
    python benchmarks/fashion_mnist/quality.py --int8 --output benchmarks/fashion_mnist/quality-int8.json

All contenders sample the same labels from the same seeds, and are compared in pairs of images. So their differences are
distinguished from chance with far fewer images than their figures alone would need. Accuracies are compared with
McNemar's exact test, distances by resampling pairs of images. Images are kept in ``--work``. The results are
``quality.json`` and, as a table, ``quality.md``.

With ``--int8`` the INT8 bundle is compared with the FP32 one, on ONNX Runtime, which rounds as the graph says and
multiplies in FP32, and on OpenVINO, which multiplies INT8. Otherwise FP16 is measured twice. ONNX Runtime on a CPU
computes some FP16 operations in FP32, and does not round between them.
The emulation rounds the result of every FP16 operation, as a GPU does.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from demo import CHECKPOINT, run_command, sample_with_pytorch
from dit_export.bisect.precision_trials import PrecisionTrials
from dit_export.checkpoints.sources import Source, load_checkpoint
from evaluator import CLASS_NAMES, frechet_distance, judge, load_evaluator, reference_statistics, statistics_of

from dit_runtime import Pipeline
from dit_runtime.backends.base import Engine
from dit_runtime.backends.open import open_engine
from dit_runtime.bundle.reader import Bundle, open_bundle
from dit_runtime.core.environment import describe_environment
from dit_runtime.core.errors import BundleError, EngineError
from dit_runtime.core.progress import Progress
from dit_runtime.core.replace import replace_file

HERE = Path(__file__).parent
Z95 = 1.959964  # the standard normal distribution's 97.5 % point
RESAMPLES = 1000
PYTORCH = "PyTorch FP32"

Array = np.ndarray[Any, np.dtype[Any]]
Interval = tuple[float, float]


def wilson(hits: int, count: int) -> Interval:
    """The 95 % interval of a proportion (Wilson 1927), which stays in [0, 1]."""
    share, z = hits / count, Z95**2 / count
    middle = (share + z / 2) / (1 + z)
    half = Z95 * math.sqrt(share * (1 - share) / count + z / (4 * count)) / (1 + z)
    return max(0.0, middle - half), min(1.0, middle + half)


def mcnemar(only_first: int, only_second: int) -> float:
    """The exact two-sided p-value of the hypothesis that two paired proportions are equal (McNemar 1947).

    Only the pairs count that exactly one of the two got right. Under the hypothesis, each of them is a fair coin.
    """
    pairs = only_first + only_second
    tail = sum(math.comb(pairs, k) for k in range(min(only_first, only_second) + 1))
    return min(1.0, 2 * tail / 2**pairs)


def resample(features: list[Array], real: tuple[Array, Array], resamples: int, advance: Callable[[], None]) -> Array:
    """Draw images with replacement, the same ones for all contenders, and return their Fréchet distances.

    Returns:
        Distances ``[resamples, contenders]``.
    """
    random = np.random.default_rng(0)
    distances = np.empty((resamples, len(features)))
    for row in distances:
        drawn = random.integers(len(features[0]), size=len(features[0]))
        row[:] = [frechet_distance(statistics_of(each[drawn]), real) for each in features]
        advance()
    return distances


def interval_around(value: float, draws: Array) -> Interval:
    """The 95 % interval of a value, from the standard deviation of its resamples.

    The interval is around the value and not around the resamples' mean, which is larger, because they repeat images.
    """
    half = Z95 * float(np.std(draws, ddof=1))
    return value - half, value + half


@dataclass(frozen=True)
class Contender:
    """One way to make the images.

    Attributes:
        name: of the contender.
        identity: all that its images depend on besides labels, seeds and settings.
        sample: labels and seeds → images.
    """

    name: str
    identity: str
    sample: Callable[[list[int], list[int]], Array]


def find_contenders(
    work: Path, steps: int, guidance: float, batch: int, threads: int, int8: bool = False
) -> Iterator[Contender]:
    """Yield the contenders that can run here. Their bundles are exported to ``work`` where they are missing."""
    if threads:
        torch.set_num_threads(threads)
    weights = load_checkpoint(Source(str(CHECKPOINT))).weights_sha256

    def sample_by_pytorch(labels: list[int], seeds: list[int]) -> Array:
        return sample_with_pytorch(labels, seeds, batch, steps, guidance)

    if not int8:
        yield Contender(PYTORCH, str(weights), sample_by_pytorch)

    def onnxruntime(bundle: Bundle) -> Engine:
        return open_engine(bundle, "onnxruntime", threads)

    def openvino(bundle: Bundle) -> Engine:
        return open_engine(bundle, "openvino", threads, "fp32" if int8 else "bf16")

    fp32 = bundle_at(work / "fp32.bundle", weights)
    engines: list[tuple[str, Bundle, Callable[[Bundle], Engine]]] = [("ONNX Runtime FP32", fp32, onnxruntime)]
    if int8:
        small = bundle_at(work / "int8.bundle", weights, "--int8", "--no-verify")
        engines += [("ONNX Runtime INT8", small, onnxruntime), ("OpenVINO INT8", small, openvino)]
    else:
        fp16 = bundle_at(work / "fp16.bundle", weights, "--fp16")
        engines += [
            ("ONNX Runtime FP16", fp16, onnxruntime),
            ("FP16 emulated", fp16, lambda bundle: PrecisionTrials(bundle, {}, threads=threads).engine_for()),
            ("OpenVINO BF16", fp16, openvino),
        ]
    if importlib.util.find_spec("openvino") is None:
        engines = [each for each in engines if not each[0].startswith("OpenVINO")]
    for name, bundle, open_for in engines:
        try:
            pipe = Pipeline(bundle, open_for(bundle))
        except EngineError as error:
            print(f"{name} is left out: {error}", flush=True)
            continue

        def sample(labels: list[int], seeds: list[int], pipe: Pipeline = pipe) -> Array:
            return pipe(labels, seeds, steps=steps, guidance=guidance, sampler="ddim")

        yield Contender(name, f"{bundle.digest} {pipe.engine.info.name}", sample)


def bundle_at(path: Path, weights: str | None, *flags: str) -> Bundle:
    """Open the checkpoint's bundle; export it where it is missing or of other weights."""
    try:
        bundle = open_bundle(path)
        if bundle.manifest.source.weights_sha256 == weights:
            return bundle
    except BundleError:
        pass
    run_command("dit-export", CHECKPOINT, *flags, "-o", path)
    return open_bundle(path)


def make_images(contender: Contender, args: argparse.Namespace, bar: Progress) -> Array:
    """Make uint8 images ``[N, 32, 32, 3]`` of labels 0, 1, … 9, 0, … and seeds 0, 1, …; read those in ``--work``."""
    settings = json.dumps([contender.identity, args.guidance, args.steps, args.batch])
    name = contender.name.lower().replace(" ", "-")
    folder = args.work / f"{name}-{hashlib.sha256(settings.encode()).hexdigest()[:12]}"
    chunks = []
    for first in range(0, args.samples, args.batch):
        seeds = list(range(first, min(first + args.batch, args.samples)))
        path = folder / f"{seeds[0]:05d}-{seeds[-1]:05d}.npy"
        if not path.exists():
            made = contender.sample([seed % len(CLASS_NAMES) for seed in seeds], seeds)
            with replace_file(path) as file:
                np.save(file, made)
        chunks.append(np.load(path, allow_pickle=False))
        bar.advance()
    return np.concatenate(chunks)


def compare(judgements: dict[str, tuple[Array, Array]], labels: Array, resamples: int) -> list[dict[str, Any]]:
    """Compute each contender's figures, and its differences from the first contender.

    Args:
        judgements: by name, the evaluator's classes ``[N]`` and features ``[N, 64]``, of the same labels and seeds.
        labels: ``[N]``, the labels that were asked for.
        resamples: how many resamples the intervals of distances come from.
    """
    reference = reference_statistics()
    real = reference["mean"], reference["covariance"]
    features = [each for _, each in judgements.values()]
    with Progress("resampling", resamples) as bar:
        draws = resample(features, real, resamples, bar.advance)
    first, rows = next(iter(judgements)), []
    base = judgements[first][0] == labels
    base_distance = frechet_distance(statistics_of(features[0]), real)
    for index, (name, (classes, own)) in enumerate(judgements.items()):
        right = classes == labels
        distance = frechet_distance(statistics_of(own), real)
        low, high = interval_around(distance, draws[:, index])
        row: dict[str, Any] = {
            "name": name,
            "accuracy": float(right.mean()),
            "accuracy_interval": wilson(int(right.sum()), len(labels)),
            "frechet_distance": distance,
            "frechet_interval": (max(0.0, low), high),
        }
        if name != first:
            lost, won = int((base & ~right).sum()), int((right & ~base).sum())
            difference = distance - base_distance
            row["against"] = {
                "name": first,
                "only_it_right": lost,
                "only_this_right": won,
                "accuracy_difference": float(right.mean() - base.mean()),
                "mcnemar_p": mcnemar(lost, won),
                "frechet_difference": difference,
                "frechet_difference_interval": interval_around(difference, draws[:, index] - draws[:, 0]),
            }
        rows.append(row)
    return rows


def format_markdown(result: dict[str, Any]) -> str:
    """Format the figures as a Markdown table."""
    first = result["precisions"][0]["name"]
    lines = [
        f"{result['samples']} images each, DDIM {result['steps']} steps, guidance {result['guidance']:g}, the same "
        f"labels and seeds for all; 95 % intervals; differences are from {first} and in pairs.",
        "",
        "| | class accuracy | Fréchet distance | accuracy: pairs lost, won, p | Fréchet distance: difference |",
        "|---|--:|--:|--:|--:|",
    ]
    for row in result["precisions"]:
        low, high = row["accuracy_interval"]
        near, far = row["frechet_interval"]
        cells = [row["name"], f"{row['accuracy']:.3f} ({low:.3f}–{high:.3f})"]
        cells.append(f"{row['frechet_distance']:.3f} ({near:.3f}–{far:.3f})")
        if against := row.get("against"):
            least, most = against["frechet_difference_interval"]
            lost, won, p = against["only_it_right"], against["only_this_right"], against["mcnemar_p"]
            cells.append(f"−{lost}, +{won}, p = {p:.2g}")
            cells.append(f"{against['frechet_difference']:+.4f} ({least:+.4f} to {most:+.4f})")
        else:
            cells += ["–", "–"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--int8", action="store_true", help="INT8 against FP32, in place of the other precisions")
    parser.add_argument("--samples", type=int, default=1000, help="images of each precision")
    parser.add_argument("--guidance", type=float, default=1.5)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--threads", type=int, default=0, help="of each contender; 0 lets it choose")
    parser.add_argument("--resamples", type=int, default=RESAMPLES, help="of the intervals of distances")
    parser.add_argument("--work", type=Path, default=Path("build/quality"), help="images and bundles")
    parser.add_argument("--output", type=Path, default=HERE / "quality.json")
    args = parser.parse_args()
    evaluator = load_evaluator()
    labels = np.arange(args.samples) % len(CLASS_NAMES)
    judgements = {}
    for contender in find_contenders(args.work, args.steps, args.guidance, args.batch, args.threads, args.int8):
        with Progress(contender.name, math.ceil(args.samples / args.batch)) as bar:
            judgements[contender.name] = judge(evaluator, make_images(contender, args, bar))
    result = {
        "samples": args.samples,
        "guidance": args.guidance,
        "steps": args.steps,
        "sampler": "ddim",
        "resamples": args.resamples,
        "environment": describe_environment(args.threads),
        "precisions": compare(judgements, labels, args.resamples),
    }
    with replace_file(args.output) as file:
        file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    with replace_file(args.output.with_suffix(".md")) as file:
        file.write_text(format_markdown(result), encoding="utf-8")
    print(format_markdown(result), end="")


if __name__ == "__main__":
    main()
