"""Time dit-export and its peers on a CPU, in turn and with the same inputs, and compare each with diffusers in FP32.

    python benchmarks/cpu/run.py --model xl --work build/cpu [--rounds 7] [--pictures 1,4] [--only "ours,eager"]

The script prepares the model (random weights for ``b`` and ``xl``, the committed weights for ``demo``), its bundle and
the plain exports once. Then it starts a process for every contender, and tells them in turn to do a step, to decode,
and to make images. It also measures the rate of matrix products of the model's own shapes, in the same run. It writes
MODEL.json, from which ``report.py`` makes the tables.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from contenders import CONTENDERS, STEPS

HERE = Path(__file__).parent
MODELS = {
    "demo": HERE.parent / "fashion_mnist" / "checkpoint",
    "b": "DiT-B/2-256",
    "xl": "DiT-XL/2-256",
}
PARTS = ("checkpoint", "fp32", "fp16", "plain")
REFERENCE = "diffusers, eager FP32"
LARGEST_BATCH = 4


def prepare(work: Path, model: str) -> None:
    """Make checkpoint, bundles, plain exports and inputs.

    Each part has its own process, because tracing leaves gigabytes of memory behind.
    """
    work.mkdir(parents=True, exist_ok=True)
    for part in PARTS:
        subprocess.run([sys.executable, __file__, "--model", model, "--work", str(work), "--part", part], check=True)
    latents = (LARGEST_BATCH, *json.loads((work / "model.json").read_text())["latent_shape"])
    random = np.random.default_rng(0)
    classes = json.loads((work / "model.json").read_text())["null_class"]
    np.savez(
        work / "inputs.npz",
        latents=random.standard_normal(latents).astype(np.float32),
        clean=random.standard_normal(latents).astype(np.float32) * 0.8,
        labels=random.integers(0, classes, LARGEST_BATCH),
    )


def make_checkpoint(work: Path, model: str) -> None:
    """Write the model as a ``DiTPipeline`` folder, and the facts that the peers need as ``model.json``."""
    from diffusers import DDIMScheduler, DiTPipeline
    from dit_export.checkpoints.sources import Source, load_checkpoint

    folder, source = work / "checkpoint", MODELS[model]
    if (work / "model.json").exists():
        return
    if isinstance(source, Path):
        folder.unlink(missing_ok=True)
        folder.symlink_to(source.resolve())
        config = json.loads((source / "scheduler" / "scheduler_config.json").read_text())
    else:
        checkpoint = load_checkpoint(Source(source, 0))
        assert checkpoint.transformer is not None
        scheduler = DDIMScheduler(beta_schedule="linear", beta_start=1e-4, beta_end=0.02, clip_sample=False)
        DiTPipeline(checkpoint.transformer(), checkpoint.autoencoder, scheduler).save_pretrained(folder)
        config = dict(scheduler.config)
    transformer = json.loads((folder / "transformer" / "config.json").read_text())
    facts = {
        "scheduler": {key: value for key, value in config.items() if not key.startswith("_")},
        "null_class": transformer["num_embeds_ada_norm"],
        "latent_shape": [transformer["in_channels"], transformer["sample_size"], transformer["sample_size"]],
    }
    (work / "model.json").write_text(json.dumps(facts))


def make_bundle(work: Path, precision: str) -> None:
    from dit_export.command import main as export

    bundle = work / f"{precision}.bundle"
    if not bundle.exists():
        flags = ["--fp16"] if precision == "fp16" else []
        export([str(work / "checkpoint"), *flags, "--no-verify", "-o", str(bundle)])


def make_plain(work: Path) -> None:
    """Export diffusers' transformer and decoder with ``torch.onnx.export`` alone, at opset 20."""
    import torch
    from contenders import load_reference
    from dit_export.graphs.tracing import quiet

    if (work / "plain-decoder.onnx").exists():
        return
    transformer, autoencoder = load_reference(work)
    channels, height, width = json.loads((work / "model.json").read_text())["latent_shape"]
    batch = torch.export.Dim("batch", min=1, max=64)

    class Transformer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = transformer

        def forward(self, sample: torch.Tensor, timestep: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            return self.inner(sample, timestep=timestep, class_labels=labels).sample

    class Decoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = autoencoder

        def forward(self, latents: torch.Tensor) -> torch.Tensor:
            return self.inner.decode(latents / autoencoder.config.scaling_factor).sample

    sample = torch.zeros(2, channels, height, width)
    numbers = torch.zeros(2, dtype=torch.int64)
    for name, module, examples, names in (
        ("transformer", Transformer(), (sample, numbers, numbers.clone()), ["sample", "timestep", "labels"]),
        ("decoder", Decoder(), (sample,), ["latents"]),
    ):
        with quiet(), torch.no_grad():
            program = torch.onnx.export(
                module,
                examples,
                dynamo=True,
                opset_version=20,
                input_names=names,
                output_names=["output"],
                dynamic_shapes=tuple({0: batch} for _ in examples),
            )
        assert program is not None
        program.save(work / f"plain-{name}.onnx", external_data=True)


class Process:
    """A contender's process. It is stopped while others work: its idle threads would spin and take cores from them."""

    def __init__(self, name: str, work: Path, threads: int) -> None:
        self.name = name
        argv = [sys.executable, str(HERE / "contenders.py"), name, "--work", str(work), "--threads", str(threads)]
        self.process = subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self.loaded = self._answer()

    def ask(self, **request: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.send_signal(signal.SIGCONT)
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name}: ended with {self.process.wait()}")
        self.process.send_signal(signal.SIGSTOP)
        return dict(json.loads(line))

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


@contextlib.contextmanager
def start_contenders(names: list[str], work: Path, threads: int) -> Iterator[list[Process]]:
    """Start the contenders' processes one after the other, each loaded and then stopped; close them at the end."""
    processes: list[Process] = []
    try:
        for name in names:
            processes.append(Process(name, work, threads))
            print(f"{name}: loaded in {processes[-1].loaded['load_s']:.1f} s", file=sys.stderr)
        yield processes
    finally:
        for process in processes:
            process.close()


def time_in_turn(processes: list[Process], rounds: int, **request: Any) -> dict[str, dict[str, Any]]:
    """Time a request on every contender, in turn.

    The first answer is reported apart. Median, fastest and slowest are over the rounds; each round has the reverse
    order of the round before. With 0 rounds they are those of the first answer. Each result is also compared with the
    reference's.
    """
    first, memory = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for process in processes:
            answer = process.ask(**request, save=str(Path(folder) / f"{processes.index(process)}.npy"))
            first[process.name], memory[process.name] = answer["seconds"], answer["memory"]
            print(f"{request}: {process.name}: {answer['seconds']:.3f} s", file=sys.stderr)
        results = [np.load(Path(folder) / f"{index}.npy") for index in range(len(processes))]
    names = [process.name for process in processes]
    expected = results[names.index(REFERENCE)]
    times: dict[str, list[float]] = {name: [] if rounds else [first[name]] for name in names}
    for index in range(rounds):
        for process in processes if index % 2 else processes[::-1]:
            process.ask(**request)  # not timed: other contenders have used the caches meanwhile
            answer = process.ask(**request)
            times[process.name].append(answer["seconds"])
            memory[process.name] = answer["memory"]
        print(f"{request}: round {index + 1} of {rounds}", file=sys.stderr)
    return {
        name: {
            "first_s": round(first[name], 4),
            "median_s": round(statistics.median(times[name]), 4),
            "fastest_s": round(min(times[name]), 4),
            "slowest_s": round(max(times[name]), 4),
            "memory": memory[name],
            "difference": measure_difference(result, expected),
        }
        for name, result in zip(names, results, strict=True)
    }


def measure_difference(found: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> dict[str, float | None]:
    """The difference of two results.

    For latents it is the largest difference divided by the largest magnitude. For images it is their PSNR in dB; None
    where they are the same.
    """
    if found.dtype == np.uint8:
        error = float(np.mean((found.astype(float) - expected.astype(float)) ** 2))
        return {"psnr_db": round(10 * np.log10(255**2 / error), 1) if error else None}
    return {"relative": float(np.abs(found - expected).max() / np.abs(expected).max())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="demo")
    parser.add_argument("--work", type=Path, default=Path("build/cpu"))
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds of steps and decoding")
    parser.add_argument("--pictures", default="1", help="batches of whole images, such as 1,4; 0 for none")
    parser.add_argument("--fp32-pictures", help="the same for the contenders in FP32, if other batches")
    parser.add_argument("--threads", type=int, default=0, help="of each contender, 0 for its own choice")
    parser.add_argument("--only", help="parts of contenders' names, separated by commas; the reference is always there")
    parser.add_argument("--output", type=Path, help="default: MODEL.json beside this file")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    work = args.work if args.part else args.work / args.model
    if args.part == "checkpoint":
        make_checkpoint(work, args.model)
    elif args.part in ("fp32", "fp16"):
        make_bundle(work, args.part)
    elif args.part == "plain":
        make_plain(work)
    else:
        compare(args, work)


def compare(args: argparse.Namespace, work: Path) -> None:
    from dit_runtime import open_bundle
    from dit_runtime.bench.gemm import measure_gemm_rates, shapes_of
    from dit_runtime.bundle.macs import count_step_gmac
    from dit_runtime.core.environment import describe_environment
    from dit_runtime.core.replace import replace_file

    prepare(work, args.model)
    wanted = [part.strip() for part in args.only.split(",")] if args.only else [""]
    names = [name for name in CONTENDERS if name == REFERENCE or any(part in name for part in wanted)]
    model = open_bundle(work / "fp32.bundle").manifest.model
    report: dict[str, Any] = {
        "model": str(MODELS[args.model] if isinstance(MODELS[args.model], str) else "demo (Fashion-MNIST)"),
        "rounds": args.rounds,
        "steps": STEPS,
        "environment": describe_environment(args.threads),
        "guided_step_gflop": round(4 * count_step_gmac(model), 2),
    }
    shapes = shapes_of(model, 2)
    # All contenders together do not fit in memory: mapped weights would be read from disk again and again.
    for precision in ("bf16", "fp32"):
        group = [name for name in names if name == REFERENCE or (precision == "bf16") == ("BF16" in name)]
        with start_contenders(group, work, args.threads) as processes:
            rates = measure_gemm_rates(shapes, precision)
            found = {"step": time_in_turn(processes, args.rounds, do="step", batch=1, index=0)}
            rates += measure_gemm_rates(shapes, precision)
            found["decode"] = time_in_turn(processes, max(1, args.rounds // 2), do="decode", batch=1)
            images = args.fp32_pictures if precision == "fp32" and args.fp32_pictures else args.pictures
            for batch in (int(text) for text in images.split(",")):
                if batch:
                    for process in processes:
                        process.ask(do="pictures", batch=batch, steps=1)  # compiles for this batch
                    found[f"pictures_{batch}"] = time_in_turn(processes, 0, do="pictures", batch=batch, steps=STEPS)
        report[precision] = {
            "loaded": {process.name: process.loaded for process in processes},
            "gemm": [asdict(rate) for rate in rates],
            **found,
        }
    target = args.output or HERE / f"{args.model}.json"
    with replace_file(target) as file:
        file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(target)


if __name__ == "__main__":
    main()
