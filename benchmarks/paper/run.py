"""Repeat the paper's observations with small models: four conditionings, three sizes, 5 to 250 sampling steps.

    apt-get install dataset-fashion-mnist        # 60 000 + 10 000 grey 28×28 images, MIT licence, © 2017 Zalando SE
    pip install -e '.[export,cpu,report]'
    python benchmarks/paper/run.py               # about an hour and a half on two CPU cores

The stages are: latents, training, export by ``dit-export``, sampling by the runtime, and judging. A stage is skipped
when its result exists in ``--work``. Then the script writes ``results.json``, the plot and the README's tables. The
README's prose is written by hand.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import report
import torch
from diffusers import AutoencoderKL
from dit_export.checkpoints.positions import official_table
from dit_export.reference.official_model import DiT
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dit_runtime import Pipeline
from dit_runtime.bundle.macs import count_gmac
from dit_runtime.bundle.manifest import ModelSpec
from dit_runtime.core.replace import replace_file

HERE = Path(__file__).parent
DEMO = HERE.parent / "fashion_mnist"
sys.path.insert(0, str(DEMO))  # the demo's data set, loss and judge are scripts beside each other, not a package

from evaluator import frechet_distance, judge, load_evaluator, reference_statistics, statistics_of  # noqa: E402
from train import (  # noqa: E402
    CHECKPOINT,
    NULL_CLASS,
    Training,
    images_from_idx,
    images_of,
    latents_of,
    save_weights,
    train_denoiser,
)

IMAGES = 2000  # of each model and number of steps
RESAMPLES = 200
SAMPLERS = {"ddpm": (5, 10, 25, 50, 100, 250), "ddim": (5, 10, 25, 50)}  # the paper's, and the deterministic one


@dataclass(frozen=True)
class Model:
    """One model to train; ``seed`` is that of its initialization and of the noise in its training."""

    name: str
    conditioning: str
    depth: int
    width: int
    seed: int = 0

    @property
    def heads(self) -> int:
        return self.width // 32

    @property
    def spec(self) -> ModelSpec:
        return ModelSpec(
            conditioning=self.conditioning,
            latent_channels=4,
            latent_size=(8, 8),
            patch_size=2,
            width=self.width,
            depth=self.depth,
            heads=self.heads,
            mlp_width=4 * self.width,
            classes=NULL_CLASS,
            learned_variance=True,
        )


MODELS = (
    Model("large", "adaln-zero", 6, 128),  # first: two workers then end at about the same time
    Model("base-cross-attention", "cross-attention", 4, 96),
    Model("base", "adaln-zero", 4, 96),
    Model("base-adaln", "adaln", 4, 96),
    Model("base-in-context", "in-context", 4, 96),
    Model("small", "adaln-zero", 2, 64),
    # Two conditionings again with another seed, to see how much of a difference is chance in the training.
    Model("base-in-context-again", "in-context", 4, 96, seed=1),
    Model("base-again", "adaln-zero", 4, 96, seed=1),
)


def initialize(spec: ModelSpec, seed: int) -> DiT:
    """Make a DiT with the official initialization (``models.py``: ``initialize_weights``)."""
    torch.manual_seed(2 + 100 * seed)
    model = DiT(spec)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    nn.init.xavier_uniform_(model.x_embedder.proj.weight.flatten(1))
    nn.init.zeros_(model.x_embedder.proj.bias)
    nn.init.normal_(model.y_embedder.embedding_table.weight, std=0.02)
    nn.init.normal_(model.t_embedder.mlp[0].weight, std=0.02)
    nn.init.normal_(model.t_embedder.mlp[2].weight, std=0.02)
    if spec.conditioning == "adaln-zero":  # what the name says; plain adaLN keeps the common initialization
        for block in model.blocks:
            nn.init.zeros_(block.adaLN_modulation[1].weight)
    if spec.conditioning in ("adaln", "adaln-zero"):
        nn.init.zeros_(model.final_layer.adaLN_modulation[1].weight)
    nn.init.zeros_(model.final_layer.linear.weight)
    model.pos_embed.data.copy_(official_table(spec.width, spec.grid))
    return model


class RecordedTraining(Training):
    """The demo's training, which also records its running loss every 100 steps."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.losses: list[tuple[int, float]] = []

    def step(self, loss: Tensor) -> None:
        super().step(loss)
        if self.count % 100 == 0 or self.count == self.steps:
            self.losses.append((self.count, round(self.mean, 5)))


def make_latents(data: Path, work: Path) -> Path:
    """Stage 1: encode the training images to scaled posterior means and deviations with the committed autoencoder."""
    stored = work / "latents.safetensors"
    if not stored.exists():
        images, labels = images_from_idx(data, "train")
        autoencoder = AutoencoderKL.from_pretrained(CHECKPOINT / "vae", dtype=torch.float32).eval()
        means, deviations = latents_of(autoencoder, images)
        factor = autoencoder.config.scaling_factor
        scaled = {"means": means * factor, "deviations": deviations * factor, "labels": labels}
        save_file({name: value.contiguous() for name, value in scaled.items()}, stored)
    return stored


def train(model: Model, stored: Path, work: Path, steps: int) -> str:
    """Stage 2: train one model; store its average weights and its losses.

    All models see the same batches. Models of one seed also see the same noise.
    """
    torch.set_num_threads(1)  # two small models train faster side by side than each on two threads
    network = initialize(model.spec, model.seed)
    compiled = torch.compile(network, dynamic=False)

    def forward(x: Tensor, timestep: Tensor, class_labels: Tensor) -> SimpleNamespace:
        return SimpleNamespace(sample=compiled(x, timestep, class_labels))

    training = RecordedTraining(model.name, network, steps, rate=1e-3, ema=0.999, weight_decay=0.0)
    torch.manual_seed(4 + 100 * model.seed)
    average = train_denoiser(training, forward, **load_file(stored))
    seconds = round(time.monotonic() - training.start)
    metrics = {"steps": steps, "seconds": seconds, "losses": training.losses}
    (work / f"{model.name}.json").write_text(json.dumps(metrics) + "\n")
    save_weights(average, work / f"{model.name}.safetensors")
    return f"{model.name}: trained in {seconds} s, loss {training.losses[-1][1]}"


def export(model: Model, work: Path) -> str:
    """Stage 3: export one model to a bundle with ``dit-export``, which verifies it."""
    executable = shutil.which("dit-export", path=str(Path(sys.executable).parent)) or "dit-export"
    weights, bundle = work / f"{model.name}.safetensors", work / f"{model.name}.bundle"
    vae = CHECKPOINT / "vae"
    argv = [executable, weights, "--heads", str(model.heads), "--vae", vae, "-o", bundle]
    done = subprocess.run(argv, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise RuntimeError(f"dit-export {weights} failed with {done.returncode}:\n{done.stdout}{done.stderr}")
    return f"{model.name}: exported and verified"


def wilson(hits: int, count: int) -> tuple[float, float]:
    """The 95 % interval of a proportion (Wilson 1927)."""
    z, p = 1.96, hits / count
    centre, half = p + z * z / (2 * count), z * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count))
    return (centre - half) / (1 + z * z / count), (centre + half) / (1 + z * z / count)


def bootstrap(features: np.ndarray, real: tuple[np.ndarray, np.ndarray]) -> tuple[float, tuple[float, float]]:
    """The Fréchet distance of features ``[N, 64]`` and its 95 % interval: ± 1.96 deviations of 200 resamples.

    The interval is not of the resamples' percentiles: a resample repeats images, which makes its distance larger than
    the sample's own.
    """
    distance = frechet_distance(statistics_of(features), real)
    random = np.random.default_rng(0)
    draws = [random.integers(len(features), size=len(features)) for _ in range(RESAMPLES)]
    half = 1.96 * float(np.std([frechet_distance(statistics_of(features[draw]), real) for draw in draws], ddof=1))
    return distance, (distance - half, distance + half)


def sample(model: Model, work: Path, steps: int, sampler: str) -> dict[str, Any]:
    """Stage 4: sample images of one bundle with the runtime, and judge them. All have the same labels and seeds."""
    torch.set_num_threads(1)
    start = time.monotonic()
    pipe = Pipeline(work / f"{model.name}.bundle", threads=1)
    labels = np.arange(IMAGES) % NULL_CLASS
    chunks = np.split(np.arange(IMAGES), IMAGES // 250)
    images = np.concatenate(
        [pipe(labels[chunk].tolist(), chunk.tolist(), steps=steps, guidance=1.0, sampler=sampler) for chunk in chunks]
    )
    seconds = time.monotonic() - start
    classes, features = judge(load_evaluator(), images)
    reference = reference_statistics()
    hits = int((classes == labels).sum())
    distance, interval = bootstrap(features, (reference["mean"], reference["covariance"]))
    np.savez(work / f"{model.name}-{sampler}-{steps}.npz", classes=classes, features=features.astype(np.float32))
    return {
        "model": model.name,
        "sampler": sampler,
        "steps": steps,
        "gmac": round(count_gmac(model.spec), 9),
        "gmac_steps": round(count_gmac(model.spec) * steps, 6),
        "accuracy": hits / IMAGES,
        "accuracy_interval": [round(end, 4) for end in wilson(hits, IMAGES)],
        "distance": round(distance, 4),
        "distance_interval": [round(end, 4) for end in interval],
        "seconds": round(seconds, 1),
    }


def measure_reconstructions(data: Path) -> dict[str, float]:
    """Measure the limit for every model: test images through the autoencoder, in sets as large as a model's samples."""
    images, labels = images_from_idx(data, "t10k")
    autoencoder = AutoencoderKL.from_pretrained(CHECKPOINT / "vae", dtype=torch.float32).eval()
    classes, features = judge(load_evaluator(), images_of(autoencoder, latents_of(autoencoder, images)[0]))
    reference = reference_statistics()
    sets = np.split(features, len(features) // IMAGES)
    distances = [frechet_distance(statistics_of(s), (reference["mean"], reference["covariance"])) for s in sets]
    accuracy = float((classes == labels.numpy()).mean())
    return {"accuracy": accuracy, "distance": round(float(np.mean(distances)), 4), "sets": len(sets)}


def describe_machine() -> str:
    """The processor's name and its cores."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"


def store_json(path: Path, value: Any) -> None:
    with replace_file(path) as file:
        file.write_text(json.dumps(value, indent=1) + "\n")


def iterate_finished(pool: ProcessPoolExecutor, what: str, jobs: Mapping[Future[Any], float]) -> Iterator[Any]:
    """Yield results as jobs finish, with a line of progress for each. ``jobs``: futures, and the work that each is."""
    start, done = time.monotonic(), 0.0
    for number, job in enumerate(as_completed(jobs), 1):
        done += jobs[job]
        spent = time.monotonic() - start
        left = spent / done * (sum(jobs.values()) - done)
        print(f"{what} {number}/{len(jobs)}  {spent:.0f} s, {left:.0f} s left", flush=True)
        yield job.result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--work", type=Path, default=Path("build/paper"), help="intermediate weights and bundles")
    parser.add_argument("--steps", type=int, default=5000, help="training steps of each model")
    parser.add_argument("--workers", type=int, default=2, help="models that are trained or sampled at once")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    work: Path = args.work

    stored = make_latents(args.data, work)
    with ProcessPoolExecutor(args.workers, multiprocessing.get_context("spawn")) as pool:
        cost = {model.name: count_gmac(model.spec) for model in MODELS}
        missing = [model for model in MODELS if not (work / f"{model.name}.safetensors").exists()]
        jobs = {pool.submit(train, model, stored, work, args.steps): cost[model.name] for model in missing}
        for line in iterate_finished(pool, "trained", jobs):
            print(line, flush=True)

        missing = [model for model in MODELS if not (work / f"{model.name}.bundle").exists()]
        for line in iterate_finished(pool, "exported", {pool.submit(export, model, work): 1.0 for model in missing}):
            print(line, flush=True)

        kept = work / "samples.json"
        rows: list[dict[str, Any]] = json.loads(kept.read_text()) if kept.exists() else []
        known = {(row["model"], row["sampler"], row["steps"]) for row in rows}
        wanted = [
            (model, sampler, steps)
            for sampler, counts in SAMPLERS.items()
            for steps in sorted(counts, reverse=True)  # longest first: the workers end together
            for model in MODELS
            if (model.name, sampler, steps) not in known and (not model.seed or (sampler, steps) == ("ddpm", 250))
        ]
        jobs = {pool.submit(sample, m, work, steps, sampler): cost[m.name] * steps for m, sampler, steps in wanted}
        for row in iterate_finished(pool, "sampled", jobs):
            rows.append(row)
            store_json(kept, rows)
            print(f"{row['model']}, {row['sampler']} {row['steps']}: {row['accuracy']}, {row['distance']}", flush=True)

    kept = work / "reconstructions.json"
    if not kept.exists():
        store_json(kept, measure_reconstructions(args.data))
    models = {}
    for model in MODELS:
        trained = json.loads((work / f"{model.name}.json").read_text())
        models[model.name] = {
            "conditioning": model.conditioning,
            "depth": model.depth,
            "width": model.width,
            "heads": model.heads,
            "seed": model.seed,
            "parameters": sum(p.numel() for p in DiT(model.spec).parameters() if p.requires_grad),
            "gmac": round(cost[model.name], 9),
            "seconds": trained["seconds"],
            "loss": trained["losses"][-1][1],
            "losses": trained["losses"],
        }
    rows.sort(key=lambda row: (list(SAMPLERS).index(row["sampler"]), list(models).index(row["model"]), row["steps"]))
    results = {
        "machine": describe_machine(),
        "training_steps": args.steps,
        "batch": 128,
        "pictures": IMAGES,
        "guidance": 1.0,
        "models": models,
        "reconstructions": json.loads(kept.read_text()),
        "samples": rows,
    }
    store_json(report.RESULTS, results)
    report.write_report()


if __name__ == "__main__":
    main()
