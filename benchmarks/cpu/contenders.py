"""Run a DiT on a CPU in one of several ways. ``run.py`` starts a process for each way, and tells it what to do.

    python benchmarks/cpu/contenders.py CONTENDER --work FOLDER --threads N

The process reads one JSON request on each line, ``{"do": "step" | "decode" | "pictures", …}``, and answers each with a
JSON line. All contenders have the same inputs, ``inputs.npz`` in the work folder. Each does the whole work: guidance,
its own transformer, the DDIM update, and for whole images the decoder down to uint8.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

GUIDANCE, STEPS = 4.0, 50
Array = np.ndarray[Any, Any]


class Contender(Protocol):
    def step(self, latents: Array, labels: Array, index: int) -> Array:
        """Do one of STEPS guided DDIM steps on latents ``[B, C, H, W]``."""

    def decode(self, latents: Array) -> Array:
        """Decode latents to uint8 images ``[B, H, W, 3]``."""

    def make_images(self, latents: Array, labels: Array, steps: int) -> Array:
        """Do all steps, and decode."""


class Ours:
    """A bundle on one of dit-export's engines."""

    def __init__(self, work: Path, engine: str, threads: int, precision: str | None = None) -> None:
        from dit_runtime import open_bundle
        from dit_runtime.backends.open import engine_for
        from dit_runtime.pipeline import Pipeline
        from dit_runtime.samplers.by_name import schedule_for
        from dit_runtime.samplers.guidance import branch_rows, guidance_weights

        self.bundle = open_bundle(work / ("fp16.bundle" if precision == "bf16" else "fp32.bundle"))
        self.engine = engine_for(self.bundle, engine, threads, precision)
        self.pipeline = Pipeline(self.bundle, self.engine)
        self.model, self.diffusion = self.bundle.manifest.model, self.bundle.manifest.diffusion
        self.schedule = schedule_for("ddim", self.model, self.diffusion, STEPS)
        self.rows, self.weights = branch_rows, guidance_weights
        self.tables: dict[tuple[int, ...], Array] = {}

    def step(self, latents: Array, labels: Array, index: int) -> Array:
        batch, channels = latents.shape[:2]
        conditions, rows = self.rows(labels.astype(np.int32), self.model.null_class, 2)
        table = self.bundle.manifest.table.name
        key = (index, *labels.tolist())
        if key not in self.tables:  # computed once for all steps of an image, so not part of a step
            times = np.repeat(self.schedule.timesteps[index : index + 1], len(conditions))
            (self.tables[key],) = self.engine.session("conditioner").run(
                {"timesteps": times, "labels": conditions}, [table]
            )
            self.engine.release("conditioner")  # as dit-sample does
        state = np.zeros((batch, 3, *latents.shape[1:]), np.float32)
        state[:, 0] = latents
        (advanced,) = self.engine.session("step").run(
            {
                "state": state,
                "noise": np.zeros_like(latents),
                "coefficients": np.repeat(self.schedule.coefficients[index : index + 1], batch, axis=0),
                "guidance": self.weights(GUIDANCE, batch, channels, channels),
                "rows": rows,
                table: self.tables[key],
            },
            ["next_state"],
        )
        return advanced[:, 0]

    def decode(self, latents: Array) -> Array:
        return self.pipeline.decode(latents)

    def make_images(self, latents: Array, labels: Array, steps: int) -> Array:
        return self.pipeline(labels.tolist(), steps=steps, guidance=GUIDANCE, sampler="ddim", noise=latents)


class Loop:
    """The peers' loop: guidance, DDIM and decoding around a transformer, as in ``DiTPipeline``."""

    def __init__(self, work: Path) -> None:
        from diffusers import DDIMScheduler

        self.null = int(json.loads((work / "model.json").read_text())["null_class"])
        self.scheduler = DDIMScheduler(**json.loads((work / "model.json").read_text())["scheduler"])
        self.scheduler.set_timesteps(STEPS)

    def predict(self, latents: Array, timestep: int, labels: Array) -> Array:
        """Run the network on the doubled batch, and return its output ``[2B, C or 2C, H, W]``."""
        raise NotImplementedError

    def step(self, latents: Array, labels: Array, index: int) -> Array:
        import torch

        time_step = int(self.scheduler.timesteps[index])
        doubled = np.concatenate([labels, np.full_like(labels, self.null)])
        output = self.predict(np.concatenate([latents, latents]), time_step, doubled)
        given, null = np.split(output[:, : latents.shape[1]], 2)
        guided = null + GUIDANCE * (given - null)
        return self.scheduler.step(torch.from_numpy(guided), time_step, torch.from_numpy(latents)).prev_sample.numpy()

    def make_images(self, latents: Array, labels: Array, steps: int) -> Array:
        self.scheduler.set_timesteps(steps)
        for index in range(steps):
            latents = self.step(latents, labels, index)
        self.scheduler.set_timesteps(STEPS)
        return self.decode(latents)

    def decode(self, latents: Array) -> Array:
        raise NotImplementedError


class Diffusers(Loop):
    """diffusers' own modules in eager mode or compiled: ``fp32``, ``autocast``, ``bf16`` or ``compile``."""

    def __init__(self, work: Path, mode: str, threads: int) -> None:
        import torch

        super().__init__(work)
        if threads:
            torch.set_num_threads(threads)
        self.transformer, self.autoencoder = load_reference(work)
        self.dtype = torch.float32 if mode in ("fp32", "autocast") else torch.bfloat16
        self.autocast = mode == "autocast"
        self.transformer.to(self.dtype)
        # Nobody runs a decoder with BF16 weights, so wherever BF16 is asked for, the decoder runs in autocast.
        self.decoder_autocast = mode != "fp32"
        if mode == "compile":
            self.transformer.compile(dynamic=False)
            self.autoencoder.decoder.compile(dynamic=False)

    def predict(self, latents: Array, timestep: int, labels: Array) -> Array:
        import torch

        with torch.inference_mode(), self._cast(self.autocast):
            output = self.transformer(
                torch.from_numpy(latents).to(self.dtype),
                timestep=torch.full((len(latents),), timestep),
                class_labels=torch.from_numpy(labels.astype(np.int64)),
            ).sample
        return output.float().numpy()

    def decode(self, latents: Array) -> Array:
        import torch

        with torch.inference_mode(), self._cast(self.decoder_autocast):
            scaled = torch.from_numpy(latents) / self.autoencoder.config.scaling_factor
            images = self.autoencoder.decode(scaled).sample.float()
        pixels = (images / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
        return (pixels * 255).round().astype(np.uint8)

    @staticmethod
    def _cast(wanted: bool) -> contextlib.AbstractContextManager[Any]:
        import torch

        return torch.autocast("cpu", torch.bfloat16) if wanted else contextlib.nullcontext()


class Plain(Loop):
    """A plain export of diffusers' modules (``torch.onnx.export``) on ONNX Runtime or OpenVINO."""

    def __init__(self, work: Path, library: str, precision: str, threads: int) -> None:
        super().__init__(work)
        self.run = {name: _open(work / f"plain-{name}.onnx", library, precision, threads) for name in PLAIN}

    def predict(self, latents: Array, timestep: int, labels: Array) -> Array:
        times = np.full(len(latents), timestep, np.int64)
        return self.run["transformer"]({"sample": latents, "timestep": times, "labels": labels.astype(np.int64)})

    def decode(self, latents: Array) -> Array:
        images = self.run["decoder"]({"latents": latents})
        return (np.clip(images / 2 + 0.5, 0, 1).transpose(0, 2, 3, 1) * 255).round().astype(np.uint8)


PLAIN = ("transformer", "decoder")


def _open(path: Path, library: str, precision: str, threads: int) -> Callable[[dict[str, Array]], Array]:
    if library == "onnxruntime":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level, options.intra_op_num_threads = 3, threads
        session = onnxruntime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])
        return lambda inputs: session.run(None, inputs)[0]
    from dit_runtime.backends.openvino.engine import load_core

    settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY"}
    if threads:
        settings["INFERENCE_NUM_THREADS"] = threads
    compiled = load_core().compile_model(os.fspath(path), "CPU", settings)
    request = compiled.create_infer_request()
    return lambda inputs: np.array(request.infer(inputs)[0])


def load_reference(work: Path) -> tuple[Any, Any]:
    """Load diffusers' transformer and autoencoder from the work folder's checkpoint, in FP32."""
    import torch
    from diffusers import AutoencoderKL, DiTTransformer2DModel

    folder = work / "checkpoint"
    transformer = DiTTransformer2DModel.from_pretrained(folder / "transformer", torch_dtype=torch.float32)
    autoencoder = AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=torch.float32)
    return transformer.eval(), autoencoder.eval()


CONTENDERS: dict[str, Callable[[Path, int], Contender]] = {
    "ours: OpenVINO BF16": lambda work, threads: Ours(work, "openvino", threads, "bf16"),
    "ours: OpenVINO FP32": lambda work, threads: Ours(work, "openvino", threads, "f32"),
    "ours: ONNX Runtime FP32": lambda work, threads: Ours(work, "onnxruntime", threads),
    "diffusers, eager FP32": lambda work, threads: Diffusers(work, "fp32", threads),
    "diffusers, autocast BF16": lambda work, threads: Diffusers(work, "autocast", threads),
    "diffusers, BF16 weights": lambda work, threads: Diffusers(work, "bf16", threads),
    "diffusers, torch.compile BF16": lambda work, threads: Diffusers(work, "compile", threads),
    "plain export, ONNX Runtime FP32": lambda work, threads: Plain(work, "onnxruntime", "f32", threads),
    "plain export, OpenVINO FP32": lambda work, threads: Plain(work, "openvino", "f32", threads),
    "plain export, OpenVINO BF16": lambda work, threads: Plain(work, "openvino", "bf16", threads),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("contender", choices=CONTENDERS)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=0)
    args = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # lines that libraries print must not be read as answers
    from dit_runtime.core.machine import memory_use

    start = time.perf_counter()
    contender = CONTENDERS[args.contender](args.work, args.threads)
    inputs = dict(np.load(args.work / "inputs.npz"))

    def answer(**values: Any) -> None:
        print(json.dumps(values), file=answers, flush=True)

    answer(load_s=time.perf_counter() - start, memory=memory_use())
    for line in sys.stdin:
        request = json.loads(line)
        batch = request["batch"]
        latents, labels = inputs["latents"][:batch], inputs["labels"][:batch]
        start = time.perf_counter()
        if request["do"] == "step":
            result = contender.step(latents, labels, request.get("index", 0))
        elif request["do"] == "decode":
            result = contender.decode(inputs["clean"][:batch])
        else:
            result = contender.make_images(latents, labels, request["steps"])
        seconds = time.perf_counter() - start
        if request.get("save"):
            np.save(request["save"], result)
        answer(seconds=seconds, memory=memory_use())


if __name__ == "__main__":
    main()
