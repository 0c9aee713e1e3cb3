"""MeanFlow against its oracle: the exported modules, its sampler around them, and the bundle that a command makes.

The network's oracle is ``support/oracle.py``; the loop is written out here. Errors are max|Δ| over the largest value,
and what was measured stands beside each limit.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from dit_export.checkpoints.layouts import Numerics
from dit_export.checkpoints.positions import Positions
from dit_export.checkpoints.sources import Checkpoint
from dit_export.graphs.from_weights import conditioner_from_weights, step_from_weights
from dit_export.graphs.precision import FP32
from dit_export.reference.pipeline import Reference
from support.bundles import edit_graph, signed
from support.commands import run_command
from support.engines import step_on_rtx
from support.official_files import HEADS, Weights, loaded, weights_of
from support.oracle import dit

from dit_runtime import Pipeline, open_bundle
from dit_runtime.backends.onnxruntime.engine import OnnxRuntimeEngine
from dit_runtime.core.errors import SamplingError
from dit_runtime.samplers.by_name import schedule_for
from dit_runtime.samplers.flow import mean_flow
from dit_runtime.samplers.schedule import Schedule
from dit_runtime.verify.metrics import relative_error
from dit_runtime.verify.verification import verify

LIMIT = 2e-6  # measured: 4.2e-7 of a forward, 1.7e-7 of a trajectory
NULL = 10
SAID = ("--family", "meanflow", "--path", "linear", "--second-time", "t-r", "--heads", str(HEADS))


def mean_flow_weights() -> Weights:
    """Gates that are open, and an embedder of its own for the second time."""
    return weights_of(out_channels=4, second_time=True)


@pytest.fixture(scope="module")
def vae(checkpoint: Path) -> str:
    return str(checkpoint / "vae")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("meanflow") / "w.pt"
    torch.save(mean_flow_weights(), path)
    return path


def oracle(z: torch.Tensor, t: float, r: float, labels: list[int]) -> torch.Tensor:
    """u(z_t, r, t) of a model that embeds t and t − r."""
    times = torch.tensor([[t, t - r]] * len(labels))
    return dit(mean_flow_weights(), z, times, torch.tensor(labels), heads=HEADS, conditioning="adaln-zero")


class Modules:
    """The modules that are exported, as an engine runs them."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        spec, weights = checkpoint.model, checkpoint.weights
        self.conditioner = conditioner_from_weights(spec, Numerics(), FP32, weights)
        self.step = step_from_weights(spec, Numerics(), FP32, weights, Positions(weights["pos_embed"]))

    def run(self, z: torch.Tensor, times: torch.Tensor, labels: list[int], row: torch.Tensor) -> torch.Tensor:
        """The state after a row, of one branch."""
        table = self.conditioner(times, torch.tensor(labels, dtype=torch.int32))
        rows = torch.arange(len(z), dtype=torch.int32)[None]
        state = torch.zeros(len(z), 3, *z.shape[1:])
        state[:, 0] = z
        guidance = torch.ones(1, *z.shape[:2])
        following, denoised, *_ = self.step(state, torch.zeros_like(z), row, guidance, rows, table)
        return torch.stack([following[:, 0], denoised])

    def sample(self, z: torch.Tensor, schedule: Schedule, labels: list[int]) -> torch.Tensor:
        """The last latents of a schedule."""
        for times, row in zip(schedule.times, schedule.coefficients, strict=True):
            batch = len(z)
            z = self.run(
                z, torch.tensor([times.tolist()] * batch), labels, torch.from_numpy(row[None]).repeat(batch, 1)
            )[0]
        return z


@pytest.fixture(scope="module")
def checkpoint_of_file(file: Path, vae: str) -> Checkpoint:
    return loaded(file, vae, family="meanflow", path="linear", second_time="t-r")


def noise(count: int) -> torch.Tensor:
    return torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(1))


def test_a_forward_is_the_oracles(checkpoint_of_file: Checkpoint) -> None:
    """The modules and the reference of golden records, at times in the middle and at the whole step; and null."""
    modules, reference = Modules(checkpoint_of_file), Reference(checkpoint_of_file)
    predict = torch.zeros(3, 17)
    predict[:, 1] = 1
    labels, z = [0, 4, NULL], noise(3)
    with torch.inference_mode():
        for t, r in ((1.0, 0.0), (0.7, 0.25), (0.4, 0.4)):
            wanted = oracle(z, t, r, labels).numpy()
            times = torch.tensor([[t, t - r]] * 3)
            found = modules.run(z, times, labels, predict)[1].numpy()
            assert relative_error(found, wanted) <= LIMIT
            assert relative_error(reference.evaluate(z, times, torch.tensor(labels)).numpy(), wanted) <= LIMIT
            table = reference.compute_table(times, torch.tensor(labels))
            conditions = modules.conditioner(times, torch.tensor(labels, dtype=torch.int32))
            assert relative_error(conditions.numpy(), table.numpy()) <= LIMIT


FAULTS_OF_TIMES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "none": lambda times: times,
    "swapped": lambda times: times[:, ::-1],
    "without the second": lambda times: times * [1, 0],
    "r in place of t - r": lambda times: np.stack([times[:, 0], times[:, 0] - times[:, 1]], axis=1),
    "reversed": lambda times: np.stack([1 - times[:, 0], times[:, 1]], axis=1),
}


@pytest.mark.parametrize("fault", FAULTS_OF_TIMES)
@pytest.mark.parametrize("steps", [2, 5])
def test_a_trajectory_is_the_published_one(checkpoint_of_file: Checkpoint, steps: int, fault: str) -> None:
    """Free-running, by the sampler's table around the exported modules; the reference's own loop agrees."""
    diffusion, labels, first = checkpoint_of_file.diffusion, [7, 2], noise(2)
    schedule = schedule_for("meanflow", checkpoint_of_file.model, diffusion, steps)
    changed = np.ascontiguousarray(FAULTS_OF_TIMES[fault](schedule.timesteps), np.float32)
    schedule = replace(schedule, timesteps=changed)
    reference = Reference(checkpoint_of_file)
    with torch.inference_mode():
        z = own = first
        for index, step in enumerate(reference.loop("meanflow", steps, [])):
            t, r = 1 - index / steps, 1 - (index + 1) / steps
            z = z - (t - r) * oracle(z, t, r, labels)
            own, _ = step.advance(*reference.predict(own, step.times_of(2), torch.tensor(labels), 1.0), own)
        assert relative_error(own.numpy(), z.numpy()) <= LIMIT
        error = relative_error(Modules(checkpoint_of_file).sample(first, schedule, labels).numpy(), z.numpy())
    assert error <= LIMIT if fault == "none" else error > 1e-3  # measured: 1.7e-2 at least


def test_the_second_embedder_is_used(checkpoint_of_file: Checkpoint) -> None:
    """A conditioner that leaves it out, or exchanges the two, is far from the reference's table."""
    modules, reference = Modules(checkpoint_of_file), Reference(checkpoint_of_file)
    times, labels = torch.tensor([[0.9, 0.5], [0.3, 0.3]]), torch.tensor([1, 2])
    with torch.inference_mode():
        wanted = reference.compute_table(times, labels).numpy()
        embedder = modules.conditioner.embedders[0]
        embedder.fc1, embedder.second_fc1 = embedder.second_fc1, embedder.fc1
        exchanged = modules.conditioner(times, labels.int()).numpy()
        embedder.fc1, embedder.second_fc1 = embedder.second_fc1, embedder.fc1
        torch.nn.init.zeros_(embedder.second_fc2.weight)
        left_out = modules.conditioner(times, labels.int()).numpy()
    assert relative_error(exchanged, wanted) > 1e-2
    assert relative_error(left_out, wanted) > 1e-2


@pytest.fixture(scope="module")
def verified(file: Path, vae: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with golden records, as the command exports and verifies it."""
    folder = tmp_path_factory.mktemp("meanflow-records")
    done = run_command("dit-export", file, *SAID, "--vae", vae, "-o", folder / "m.bundle")
    assert done.returncode == 0, done.stderr + done.stdout
    assert "zhuyu-cs/MeanFlow's SiT and sampler, linear path" in done.stdout
    return folder / "m.bundle"


@pytest.mark.slow  # an export with records
def test_a_bundle_samples_in_one_step(verified: Path, tmp_path: Path) -> None:
    """The defaults are one unguided step; guidance and other samplers are refused; the other commands take it."""
    pipe = Pipeline(open_bundle(verified), OnnxRuntimeEngine(open_bundle(verified), threads=1))
    z = torch.stack([torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in (5, 6)])
    (only,) = pipe.trajectory([7, 2], [5, 6])
    wanted = z - oracle(z, 1.0, 0.0, [7, 2])
    assert relative_error(only[1], wanted.numpy()) <= LIMIT
    assert np.array_equal(only[1], only[2])
    assert pipe([{1: 0.7, 2: 0.3}], 0, steps=2).shape == (1, 32, 32, 3)
    with pytest.raises(SamplingError, match="guidance 4: guidance was trained into this model's weights"):
        pipe([1], 0, guidance=4.0)
    with pytest.raises(SamplingError, match=r"sampler euler with a model of two times.*: expected one of meanflow"):
        pipe([1], 0, sampler="euler")
    for command in (
        ("dit-sample", verified, "--labels", "1", "-o", tmp_path / "a.png"),
        ("dit-sample", verified, "--steps", "2", "--write-table", tmp_path / "t.json"),
        ("dit-sample", verified, "--labels", "1", "--sampler", tmp_path / "t.json", "-o", tmp_path / "b.png"),
        ("dit-verify", verified, "--info"),
        ("dit-verify", verified, "--engine", "onnxruntime", "--sampler", tmp_path / "t.json"),
        ("dit-bench", verified, "--engine", "onnxruntime", "--steps", "1", "--repeat", "1"),
    ):
        done = run_command(*command)
        assert done.returncode == 0, (command, done.stderr + done.stdout)
    assert (tmp_path / "a.png").is_file()
    done = run_command("dit-tune", verified, "--steps", "2", "-o", tmp_path / "few.json")
    assert done.returncode == 1
    assert "gets two times and predicts the average velocity" in done.stderr


def swap_times(graph: onnx.GraphProto) -> None:
    """Let each timestep embedder take the other one's features."""
    weights = {
        name: [n for n in graph.node if n.name.startswith(f"embedders.0.{name}/")] for name in ("fc1", "second_fc1")
    }
    first, second = (next(node for node in nodes if node.op_type in ("Gemm", "MatMul")) for nodes in weights.values())
    first.input[0], second.input[0] = second.input[0], first.input[0]


def leave_second_out(graph: onnx.GraphProto) -> None:
    """Let the second time be embedded as 0 is."""
    for node in graph.node:
        if node.name.startswith("embedders.0.second_fc1/") and node.op_type in ("Gemm", "MatMul"):
            first = next(n for n in graph.node if n.name.startswith("embedders.0.fc1/") and n.op_type == node.op_type)
            node.input[0] = first.input[0]


def say(bundle: Path, before: str, after: str) -> None:
    text = (bundle / "manifest.json").read_text()
    assert before in text
    (bundle / "manifest.json").write_text(text.replace(before, after))


def reverse_time(patch: pytest.MonkeyPatch) -> None:
    """Let the sampler count time from the image."""

    def reversed_flow(*arguments: Any) -> Schedule:
        schedule = mean_flow(*arguments)
        return replace(schedule, timesteps=np.abs(np.float32([1, 0]) - schedule.timesteps))

    patch.setattr("dit_runtime.samplers.by_name.mean_flow", reversed_flow)


FAULTS: dict[str, tuple[Callable[[Path, pytest.MonkeyPatch], object], str]] = {
    "times swapped": (lambda b, _: edit_graph(b, "conditioner", swap_times), "conditioner"),
    "second time left out": (lambda b, _: edit_graph(b, "conditioner", leave_second_out), "conditioner"),
    "r in place of t - r": (
        lambda b, _: say(b, '"second_time": "t-r"', '"second_time": "r"'),
        "meanflow teacher-forced",
    ),
    "time reversed": (lambda _, patch: reverse_time(patch), "meanflow teacher-forced"),
}


@pytest.mark.slow  # an export with records
@pytest.mark.parametrize("fault", FAULTS)
def test_a_seeded_fault_is_caught(fault: str, verified: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Golden records are the family's own: what a family has alone cannot be wrong unseen."""
    change, rung = FAULTS[fault]
    shutil.copytree(verified, tmp_path / "bundle")
    change(tmp_path / "bundle", monkeypatch)
    bundle = signed(tmp_path / "bundle")
    failed = [each.name for each in verify(bundle, OnnxRuntimeEngine(bundle, threads=1)) if not each.passed]
    assert failed
    assert failed[0].startswith(rung), failed


@pytest.mark.slow  # an export in FP16 and a build
def test_rtx_fuses_every_attention(file: Path, vae: str, tmp_path: Path) -> None:
    """The real builder: a second time leaves the step as it is, and each attention one fused kernel in FP16."""
    pytest.importorskip("tensorrt_rtx")
    done = run_command("dit-export", file, *SAID, "--vae", vae, "--fp16", "--no-verify", "-o", tmp_path / "m.bundle")
    assert done.returncode == 0, done.stderr + done.stdout
    profiles = step_on_rtx(open_bundle(tmp_path / "m.bundle"), tmp_path / "store")
    assert [(p.synchronizations, p.fused_attention) for p in profiles] == [(0, 2)] * 2


@pytest.mark.slow  # an export with calibration
def test_int8_is_calibrated_on_its_own_trajectory(file: Path, vae: str, tmp_path: Path) -> None:
    """INT8 acts on the blocks alone, which are a SiT's; ranges are of steps of every length, without guidance."""
    done = run_command("dit-export", file, *SAID, "--vae", vae, "--int8", "-o", tmp_path / "m.bundle")
    assert done.returncode == 0, done.stderr + done.stdout
    assert "INT8 weights" in done.stdout
    bundle = open_bundle(tmp_path / "m.bundle")
    assert bundle.manifest.calibration is not None
    assert (bundle.manifest.calibration.steps, bundle.manifest.calibration.guidance) == (7, 1.0)
    assert bundle.records("calibration")["timesteps"].tolist() == [1, 1, 0.5, 1, 0.75, 0.5, 0.25]
