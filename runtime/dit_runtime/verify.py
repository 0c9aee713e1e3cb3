"""Replay a bundle's golden records on an engine and compare: noise, blocks, forward, steps, trajectory, pictures.

The records hold what the unpatched PyTorch reference computed in FP32; the limits are the bundle's own
(``tolerances`` of the manifest). Nothing here needs torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dit_runtime.bundle import ENCODER, Bundle, DiffusionSpec
from dit_runtime.engines import Array, Engine
from dit_runtime.guidance import branch_rows, guidance_weights
from dit_runtime.noise import Float32, TorchNoise
from dit_runtime.progress import Progress
from dit_runtime.schedule import Schedule, schedule_for
from dit_runtime.table import A_Z, B_E, COEFFICIENTS, LOG_SIGMA_V, NOISE


def trajectories_of(diffusion: DiffusionSpec) -> tuple[str, str]:
    """The samplers whose trajectories are recorded: a deterministic one, and one that draws noise."""
    return ("euler", "sde-euler") if diffusion.path else ("ddim", "ddpm")


@dataclass(frozen=True)
class Rung:
    """One comparison. It passes at or below ``limit``, or with ``unit`` ``dB`` or ``share`` at or above it."""

    name: str
    value: float
    limit: float
    unit: str
    detail: str = ""

    @property
    def passed(self) -> bool:
        if not np.isfinite(self.value):
            return self.unit == "dB" and self.value == np.inf  # identical pictures
        return bool(self.value >= self.limit if self.unit in ("dB", "share") else self.value <= self.limit)

    def as_json(self) -> dict[str, Any]:
        values = asdict(self)
        values["value"] = self.value if np.isfinite(self.value) else str(self.value)
        return {**values, "passed": self.passed}


def verify(bundle: Bundle, engine: Engine, quick: bool = False) -> Iterator[Rung]:
    """The rungs from the bottom up, each yielded when it is measured.

    ``quick`` leaves out blocks and teacher-forced steps, which say where a fault is rather than whether there is one.

    Raises:
        BundleError: a record is missing or altered.
        EngineError: the engine cannot run a graph.
    """
    replay = _Replay(bundle, engine)
    limits = bundle.manifest.tolerances
    if not quick:
        yield replay.blocks(limits["blocks"])
    for branches in (1, 2):
        yield from replay.forward(branches, limits["forward"])
    first, *_ = samplers = trajectories_of(bundle.manifest.diffusion)
    for sampler in samplers:
        record = bundle.records(sampler)
        schedule = replay.schedule(sampler, record)
        yield replay.noise(sampler, record, schedule, limits["noise"])
        if not quick:
            yield replay.teacher_forced(sampler, record, schedule, limits["teacher_forced"])
        latents, rung = replay.free_running(sampler, record, schedule, limits["free_running"])
        yield rung
        if sampler == first:
            final = latents
    yield from replay.pictures(final, first, limits)
    if ENCODER in bundle.manifest.graphs:
        yield replay.encoder(limits["encoder"])


def verified(bundle: Bundle, engine: Engine, quick: bool = False) -> list[Rung]:
    """All rungs of ``verify``, with a progress bar."""
    rungs = []
    with Progress(f"verifying on {engine.name}", _rung_count(bundle, quick)) as bar:
        for rung in verify(bundle, engine, quick):
            rungs.append(rung)
            bar.advance()
    return rungs


def _rung_count(bundle: Bundle, quick: bool) -> int:
    """How many rungs ``verify`` yields: for progress bars."""
    forward = 4 if bundle.manifest.model.learned_variance else 2
    return forward + 4 + 4 + (ENCODER in bundle.manifest.graphs) + (0 if quick else 3)


class _Replay:
    """The engine's step evaluated on recorded inputs."""

    def __init__(self, bundle: Bundle, engine: Engine) -> None:
        self.bundle, self.engine, self.model = bundle, engine, bundle.manifest.model

    def schedule(self, sampler: str, record: dict[str, Array]) -> Schedule:
        steps = int(record["steps"])
        return schedule_for(sampler, self.model, self.bundle.manifest.diffusion, steps)

    def step(
        self,
        graph: str,
        outputs: list[str],
        latents: Array,
        timesteps: Array,
        labels: Array,
        guidance: float,
        coefficients: Array,
        noise: Array | None = None,
    ) -> list[Array]:
        """The step (or probe) on latents ``[B, C, H, W]``, each picture with its own timestep and coefficients."""
        batch, channels = latents.shape[:2]
        weights = guidance_weights(guidance, batch, channels, self.bundle.manifest.diffusion.guidance_channels)
        conditions, rows = branch_rows(labels.astype(np.int32), self.model.null_class, len(weights))
        name = self.bundle.manifest.table.name
        # A row per (picture's timestep, condition): simple, and the records are small.
        (table,) = self.engine.session("conditioner").run(
            {
                "timesteps": np.repeat(timesteps.astype(np.float32), len(conditions)),
                "labels": np.tile(conditions, batch),
            },
            [name],
        )
        state = np.zeros((batch, 3, *latents.shape[1:]), np.float32)
        state[:, 0] = latents
        return self.engine.session(graph).run(
            {
                "state": state,
                "noise": np.zeros_like(state[:, 0]) if noise is None else noise,
                "coefficients": coefficients,
                "guidance": weights,
                "rows": (rows + np.arange(batch) * len(conditions)).astype(np.int32),
                name: table,
            },
            outputs,
        )

    def blocks(self, limit: float) -> Rung:
        record = self.bundle.records("blocks")
        names = [f"blocks.{index}" for index in range(self.model.depth)]
        outputs = self.step(
            "probe",
            names,
            record["latents"],
            record["timesteps"],
            record["labels"],
            float(record["guidance"]),
            np.zeros((len(record["latents"]), COEFFICIENTS), np.float32),
        )
        stride = int(record["token_stride"])
        errors = [
            relative_error(found[:, ::stride], expected)
            for found, expected in zip(outputs, record["outputs"], strict=True)
        ]
        worst = int(np.argmax(np.nan_to_num(errors, nan=np.inf)))
        return Rung("blocks", errors[worst], limit, "relative", f"worst: block {worst} of {len(names)}")

    def forward(self, branches: int, limit: float) -> Iterator[Rung]:
        record = self.bundle.records(f"forward_{branches}")
        batch = len(record["latents"])
        coefficients = np.zeros((batch, COEFFICIENTS), np.float32)
        coefficients[:, [B_E, LOG_SIGMA_V, NOISE]] = 1  # denoised = e, and next z = exp(v) with unit noise
        next_state, e = self.step(
            "step",
            ["next_state", "denoised"],
            record["latents"],
            record["timesteps"],
            record["labels"],
            float(record["guidance"]),
            coefficients,
            np.ones_like(record["latents"]),
        )
        times = "timesteps " + " ".join(f"{t:g}" for t in record["timesteps"])
        yield Rung(f"forward G={branches}", relative_error(e, record["e"]), limit, "relative", times)
        if self.model.learned_variance:
            with np.errstate(divide="ignore", invalid="ignore"):
                v = np.log(next_state[:, 0])
            yield Rung(f"forward G={branches} variance", relative_error(v, record["v"]), limit, "relative", times)

    def noise(self, sampler: str, record: dict[str, Array], schedule: Schedule, limit: float) -> Rung:
        """Our noise from the recorded seeds against what PyTorch drew."""
        picture = record["latents"].shape[2:]
        streams = [TorchNoise(int(seed)) for seed in record["seeds"]]
        drawn = [np.stack([stream.normal(picture) for stream in streams])]
        drawn += [np.stack([stream.normal(picture) for stream in streams]) for _ in range(schedule.draws_noise.sum())]
        recorded = np.concatenate([record["latents"][:1], record["noise"][schedule.draws_noise]])
        return Rung(f"{sampler} noise", relative_error(np.stack(drawn), recorded), limit, "relative", "from the seeds")

    def _advanced(self, record: dict[str, Array], schedule: Schedule, index: int, latents: Array) -> list[Array]:
        batch = len(latents)
        next_state, denoised = self.step(
            "step",
            ["next_state", "denoised"],
            latents,
            np.repeat(schedule.timesteps[schedule.rows[index]], batch),
            record["labels"],
            float(record["guidance"]),
            np.repeat(schedule.coefficients[index : index + 1], batch, axis=0),
            record["noise"][index],
        )
        return [next_state[:, 0], denoised]

    def teacher_forced(self, sampler: str, record: dict[str, Array], schedule: Schedule, limit: float) -> Rung:
        """Every step from the reference's own latents: errors do not add up, so a bad step shows by its number."""
        errors = []
        for index in range(len(schedule)):
            latents, denoised = self._advanced(record, schedule, index, record["latents"][index])
            # Near pure noise, a·z and b·e are hundreds and cancel to a few: rounding is relative to the terms.
            terms = abs(float(schedule.coefficients[index, A_Z])) * float(np.abs(record["latents"][index]).max())
            errors.append(
                max(
                    relative_error(latents, record["latents"][index + 1]),
                    relative_error(denoised, record["denoised"][index], terms),
                )
            )
        worst = int(np.argmax(np.nan_to_num(errors, nan=np.inf)))
        detail = f"worst: step {worst + 1} of {len(errors)}"
        return Rung(f"{sampler} teacher-forced", errors[worst], limit, "relative", detail)

    def free_running(
        self, sampler: str, record: dict[str, Array], schedule: Schedule, limit: float
    ) -> tuple[Array, Rung]:
        latents = record["latents"][0]
        for index in range(len(schedule)):
            latents, _ = self._advanced(record, schedule, index, latents)
        error = relative_error(latents, record["latents"][-1])
        detail = f"after {len(schedule)} steps, guidance {float(record['guidance']):g}"
        return latents, Rung(f"{sampler} free-running", error, limit, "relative", detail)

    def pictures(self, final: Float32, sampler: str, limits: dict[str, float]) -> Iterator[Rung]:
        """The decoder on the reference's latents, then the pictures of our own trajectory."""
        record = self.bundle.records("images")
        decoder = self.engine.session("decoder")
        (decoded,) = decoder.run({"latents": record["latents"]}, ["decoded"])
        yield Rung("decoder", relative_error(decoded, record["decoded"]), limits["decoder"], "relative")
        (images,) = decoder.run({"latents": final}, ["images"])
        yield Rung("image PSNR", psnr(images, record["images"]), limits["image_psnr"], "dB", f"{sampler}, free-running")
        within = float(np.mean(np.abs(images.astype(int) - record["images"].astype(int)) <= 1))
        yield Rung("image within one level", within, limits["image_one_level"], "share", f"{sampler}, free-running")
        spread = float(images.std())
        yield Rung("image is not constant", 1.0 if spread > 0 else 0.0, 1.0, "share", f"deviation {spread:.1f} levels")

    def encoder(self, limit: float) -> Rung:
        """Pictures → latents, and of a posterior its deviation."""
        record = self.bundle.records(ENCODER)
        names = [tensor.name for tensor in self.bundle.manifest.graphs[ENCODER].outputs]
        found = self.engine.session(ENCODER).run({"images": record["images"]}, names)
        errors = [relative_error(value, record[name]) for value, name in zip(found, names, strict=True)]
        worst = int(np.argmax(np.nan_to_num(errors, nan=np.inf)))
        return Rung(ENCODER, errors[worst], limit, "relative", f"worst: {names[worst]}")


def relative_error(found: Array, expected: Array, scale: float = 0.0) -> float:
    """max |Δ| over the largest expected magnitude, or ``scale`` if larger; infinite where a side is not finite."""
    if found.shape != expected.shape or not (np.isfinite(found).all() and np.isfinite(expected).all()):
        return float("inf")
    difference = np.abs(found.astype(np.float64) - expected.astype(np.float64)).max()
    return float(difference / max(np.abs(expected).max(), scale, 1e-30))


def psnr(found: NDArray[np.uint8], expected: NDArray[np.uint8]) -> float:
    """Peak signal-to-noise ratio of uint8 pictures in dB; infinite for identical ones."""
    if found.shape != expected.shape:
        return float("-inf")
    error = float(np.mean((found.astype(np.float64) - expected.astype(np.float64)) ** 2))
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))


def format_table(rungs: list[Rung]) -> str:
    """The rungs as a table for people."""
    texts: dict[str, Callable[[float], str]] = {"dB": "{:.1f} dB".format, "share": "{:.2%}".format}
    width = max(24, *(len(rung.name) for rung in rungs))
    lines = [f"{'rung':<{width}}  {'measured':>10}  {'limit':>10}  verdict"]
    for rung in rungs:
        text = texts.get(rung.unit, "{:.2e}".format)
        verdict = "pass" if rung.passed else "FAIL"
        detail = f"  {rung.detail}" if rung.detail else ""
        lines.append(
            f"{rung.name:<{width}}  {text(rung.value):>10}  {text(rung.limit):>10}  {verdict:<7}{detail}".rstrip()
        )
    return "\n".join(lines)
