"""The TensorRT engine and its resident loop on a double (``cuda_double``) that enforces the contract of both APIs."""

from __future__ import annotations

import ast
import functools
import gc
import hashlib
import inspect
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.batches import ROW, marked, mixed
from support.commands import bindings, run_command
from support.cuda_double import Cuda as DoubleCuda
from support.cuda_double import Machine, stored_on

from dit_engines.recipe import Recipe, recipe_for
from dit_runtime import Pipeline, open_bundle
from dit_runtime.backends.conditioning import TableLimits
from dit_runtime.backends.onnxruntime.engine import OnnxRuntimeEngine
from dit_runtime.backends.tensorrt import (
    cuda,
    device,
)
from dit_runtime.backends.tensorrt import (
    graphs as device_graphs,
)
from dit_runtime.backends.tensorrt import (
    open as tensorrt_engine,
)
from dit_runtime.backends.tensorrt.engine import TensorRtEngine
from dit_runtime.backends.tensorrt.loop import DeviceLoop
from dit_runtime.backends.tensorrt.store import SIDECAR
from dit_runtime.bench.parts import (
    DECODER,
    PLAIN,
    time_images,
    time_parts,
)
from dit_runtime.bundle.reader import Bundle
from dit_runtime.core.errors import EngineError, ParityError, SamplingError
from dit_runtime.verify.auto import Trust, choose_engine
from dit_runtime.verify.replay import Replay
from dit_runtime.verify.verdicts import path_of_verdict
from dit_runtime.verify.verification import _rung_count, verification_of

RECIPES = {
    # Batches 1 and 2 to 4, with and without guidance: four profiles of the step.
    "ranges": Recipe("this", "8.7", (1, 4), (1, 2), 64),
    # Each combination of 1, 4 and 1, 2 exactly: a batch of 3 is filled up to 4.
    "static": Recipe("this", "8.7", (1, 4), (1, 2), 64, static=True),
    # TensorRT 10.3 on JetPack 6: one profile, the batch fixed, guidance dynamic.
    "one profile": Recipe("this", "8.7", (4,), (1, 2), 64, several_profiles=False),
    # Several labels at once.
    "branches": Recipe("this", "8.7", (1, 4), (1, 2, 3), 64),
    # Guided only: an unguided step runs a second branch without a weight.
    "guided": Recipe("this", "8.7", (4,), (2,), 64),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "ddim": {"sampler": "ddim", "steps": 8, "guidance": 1.5},
    "ddpm": {"sampler": "ddpm", "steps": 8, "guidance": 2.5},
    "interval": {"sampler": "ddpm", "steps": 9, "guidance": 2.0, "guidance_interval": (0.4, 1.0)},
    "unguided": {"sampler": "dpmpp-3m", "steps": 6, "guidance": 1.0},
}


# Where rows of the table are computed in other chunks than the host's: ONNX Runtime rounds a single row differently.
CHUNKS_LIMIT = 1e-6  # measured: 4.8e-8


class Bench:
    """A bundle on the double and on ONNX Runtime."""

    def __init__(
        self,
        path: Path,
        folder: Path,
        recipe: Recipe = RECIPES["ranges"],
        library: str = "tensorrt",
        **options: Any,
    ) -> None:
        self.machine = Machine(library=library)
        self.bundle: Bundle = open_bundle(path)
        self.stored = stored_on(self.machine, self.bundle, folder / "plans", recipe)
        self.engine = self.made(**options)
        self.pipe = Pipeline(self.bundle, self.engine)
        self.host = Pipeline(self.bundle, OnnxRuntimeEngine(self.bundle, threads=1))

    def made(self, **options: Any) -> TensorRtEngine:
        return TensorRtEngine(self.bundle, self.stored, self.machine.library, self.machine.cuda, **options)

    def graphs(self) -> list[tuple[int, int]]:
        (steps,) = self.engine._loops
        return sorted(steps.graphs)

    def same(self, labels: list[Any], seeds: int, limit: float = 0.0, **settings: Any) -> None:
        """The latents after each step and the images are the host's: bit for bit, or relative to the largest."""
        found = list(self.pipe.trajectory(labels, seeds, **settings))
        expected = list(self.host.trajectory(labels, seeds, **settings))
        assert [index for index, _, _ in found] == [index for index, _, _ in expected]
        for (_, *values), (_, *others) in zip(found, expected, strict=True):
            for value, other in zip(values, others, strict=True):
                assert np.abs(value - other).max() <= limit * np.abs(other).max()
        images = (pipe(labels, seeds, **settings).astype(int) for pipe in (self.pipe, self.host))
        assert np.abs(next(images) - next(images)).max() <= (1 if limit else 0)


@pytest.fixture
def bench(bundles: dict[str, Path], tmp_path: Path) -> Iterator[Bench]:
    """The FP32 bundle; at the end everything must be given back."""
    bench = Bench(bundles["fp32"], tmp_path)
    yield bench
    bench.engine.close()
    bench.machine.check_closed()


@pytest.mark.parametrize("recipe", ["ranges", "static", "one profile", "guided"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_loop_is_the_hosts(bundles: dict[str, Path], tmp_path: Path, recipe: str, precision: str) -> None:
    """Every sampler, guidance, batch size and set of profiles gives ONNX Runtime's own latents and images."""
    bench = Bench(bundles[precision], tmp_path, RECIPES[recipe])
    for labels in ([3], [1, 2, 3]):
        for seeds, settings in enumerate(SETTINGS.values()):
            bench.same(labels, seeds, **settings)
    for labels in ([3], [1, 2, 3]):  # by now nothing moves, and graphs stay
        bench.pipe(labels, **SETTINGS["interval"])
    expected = {
        "ranges": [(1, 1), (1, 2), (3, 1), (3, 2)],
        "static": [(1, 1), (1, 2), (4, 1), (4, 2)],
        "one profile": [(4, 1), (4, 2)],
        "guided": [(1, 2), (3, 2)],
    }
    assert bench.graphs() == expected[recipe]
    bench.engine.close()
    bench.machine.check_closed()


def test_starting_from_images(bench: Bench) -> None:
    """Image-to-image starts on the device where it starts on the host."""
    latents = np.random.default_rng(5).standard_normal((2, 4, 8, 8), np.float32)
    for sampler in ("ddim", "ddpm"):
        bench.same([4, 5], 3, init=latents, strength=0.6, sampler=sampler, steps=10, guidance=1.5)


@pytest.mark.parametrize("fixed", [False, True])
def test_continuous_batching(bundles: dict[str, Path], tmp_path: Path, fixed: bool) -> None:
    """Images that join and leave a running batch, of eight samplers, are the host's, in a batch that is fixed too."""
    recipe = RECIPES["branches"]
    bench = Bench(bundles["fp32"], tmp_path, replace(recipe, batches=(4,), several_profiles=False) if fixed else recipe)
    images = mixed(bench.host)
    expected = dict(bench.host.stream(images, 3))
    found = list(bench.pipe.stream(images, 3))
    assert [index for index, _ in found] == list(expected)
    for index, latents in found:
        assert np.array_equal(latents, expected[index]), f"image {index}"
    bench.engine.close()
    bench.machine.check_closed()


def test_sessions(bench: Bench) -> None:
    """A single call gives what ONNX Runtime gives, in any profile and filled up to the least of one."""
    rng = np.random.default_rng(0)
    pairs = {"timesteps": np.arange(5, dtype=np.float32) * 90, "labels": np.array([0, 3, 9, 10, 1], np.int32)}
    (table,) = bench.engine.session("conditioner").run(pairs, ["modulation"])
    assert np.array_equal(table, bench.host.engine.session("conditioner").run(pairs, ["modulation"])[0])
    for recipe in ("ranges", "static"):
        other = Bench(bench.bundle.path, bench.stored.folder.parent / recipe, RECIPES[recipe])
        for batch, branches in ((1, 1), (1, 2), (2, 2), (3, 1), (4, 2)):
            inputs = {
                "state": rng.standard_normal((batch, 3, 4, 8, 8), np.float32),
                "noise": rng.standard_normal((batch, 4, 8, 8), np.float32),
                "coefficients": rng.standard_normal((batch, 17), np.float32) / 4,
                "guidance": rng.standard_normal((branches, batch, 4), np.float32),
                "rows": rng.integers(0, 5, (branches, batch)).astype(np.int32),
                "modulation": table,
            }
            outputs = ["denoised", "next_state"]
            expected = other.host.engine.session("step").run(inputs, outputs)
            for value, same in zip(other.engine.session("step").run(inputs, outputs), expected, strict=True):
                assert np.array_equal(value, same)
            latents = {"latents": inputs["noise"]}
            for name in ("images", "decoded"):
                (value,) = other.engine.session("decoder").run(latents, [name])
                assert np.array_equal(value, other.host.engine.session("decoder").run(latents, [name])[0])
        other.engine.close()
        other.machine.check_closed()


def test_the_bundles_own_records(bundle_path: Path, tmp_path: Path) -> None:
    """The acceptance test of a device, dit-verify, passes at every profile's shapes."""
    bench = Bench(bundle_path, tmp_path, RECIPES["ranges"])
    profiles = bench.engine.info.profiles
    assert profiles["conditioner"].ranges() == [((1, 1), (64, 1), (64, 1))]
    assert profiles["step"].ranges()[3] == ((2, 2), (4, 2), (4, 2))
    rungs = verification_of(bench.bundle, bench.engine).rungs
    assert [rung.name for rung in rungs if not rung.passed] == []
    names = {rung.name for rung in rungs}
    assert {"conditioner", "ddim teacher-forced"} <= names
    assert not names & {"embedding", "blocks"}  # they need the probe, which is for ONNX Runtime and OpenVINO
    assert any("batches 1 2 4 3" in rung.detail for rung in rungs)
    assert bench.machine.calls["launch"] > 0  # the trajectories are the loop's own, not single calls
    bench.engine.close()
    bench.machine.check_closed()


def test_a_fault_of_the_loop_alone_is_seen(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise that the device's loop forgets fails the trajectory that draws it; single calls, which are right, pass."""
    monkeypatch.setattr("dit_runtime.backends.tensorrt.loop.DeviceLoop._upload_noise", lambda *arguments: None)
    rungs = verification_of(bench.bundle, bench.engine).rungs
    failed = [rung.name for rung in rungs if not rung.passed]
    assert failed == ["ddpm free-running", "ddpm free-running, unguided", "mixed batch"]


def test_the_loop_is_trusted_at_its_own_shapes(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loop that is wrong with three images without guidance alone, which no trajectory has, is seen; and ``auto``
    asks it there although single calls of the step are trusted."""
    right = DeviceLoop.run_step

    def wrong(self: DeviceLoop, coefficients: Any, guidance: Any, rows: Any, *others: Any) -> Any:
        factor = np.float32(1.2 if rows.shape == (1, 3) else 1)
        return right(self, coefficients * factor, guidance, rows, *others)

    monkeypatch.setattr(DeviceLoop, "run_step", wrong)
    rungs = verification_of(bench.bundle, bench.engine).rungs
    assert [rung.name for rung in rungs if not rung.passed] == ["mixed batch"]
    assert "of 3" in next(rung.detail for rung in rungs if not rung.passed)
    trust = Trust(bench.bundle, bench.engine, {"step": [(2, 1), (3, 1), (3, 2)], "loop": [(1, 1)]})
    trust.check(2, 1)
    trust.check(3, 2)
    assert trust.shapes["loop"] == [(1, 1), (2, 1), (3, 2)]
    with pytest.raises(ParityError, match="wrong at a batch of 3 with 1 branches: mixed batch"):
        trust.check(3, 1)


def test_an_engine_without_guidance_is_verified(bundles: dict[str, Path], tmp_path: Path) -> None:
    """By what needs none: the network, the sampler's update and noise, a trajectory, the decoder."""
    bench = Bench(bundles["fp32"], tmp_path, recipe_for("rtx", "8.9", 2, (1,), 64))
    rungs = verification_of(bench.bundle, bench.engine).rungs
    assert [rung.name for rung in rungs] == [
        "conditioner",
        "forward G=1",
        "forward G=1 variance",
        "sampler update",
        "ddim noise",
        "ddpm noise",
        "ddpm free-running, unguided",
        "decoder",
        "uint8 images",
        "classes and timesteps",
        "conditioner calls",
        "batch invariance",
        "rows of the table",
        "sampler of each image",
        "repeated call",
        "mixed batch",
        "decoder batches",
        "uint8 batches",
    ]
    assert len(rungs) == _rung_count(Replay(bench.bundle, bench.engine), quick=False)
    assert all(rung.passed for rung in rungs)
    assert rungs[6].ratio is not None
    assert bench.machine.calls["launch"] > 0  # the loop's own
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dit_runtime.backends.tensorrt.loop.DeviceLoop._upload_noise", lambda *arguments: None)
        failed = [
            rung.name for rung in verification_of(bench.bundle, bench.engine, quick=True).rungs if not rung.passed
        ]
    assert failed == ["ddpm free-running, unguided", "mixed batch"]
    bench.engine.close()
    bench.machine.check_closed()


@pytest.mark.slow  # an export, and two builds for each of two tiles
def test_an_engine_for_tiles_is_verified(checkpoint: Path, tmp_path: Path) -> None:
    """By a recorded tile, against PyTorch's decoding of that tile alone; one for other tiles says what is recorded."""
    path = tmp_path / "tiles.bundle"
    done = run_command("dit-export", checkpoint, "--decode-tile", "4", "6", "--no-verify", "-o", path)
    assert done.returncode == 0, done.stderr
    for tile in (4, 6):
        bench = Bench(path, tmp_path / str(tile), recipe_for("rtx", "8.9", 2, (1, 2), 64, decode_tile=tile))
        rungs = {rung.name: rung for rung in verification_of(bench.bundle, bench.engine).rungs}
        assert [name for name, rung in rungs.items() if not rung.passed] == []
        assert f"tiles of {tile}x{tile}, batches 1 2" in rungs["decoder"].detail
        assert None not in (rungs["decoder"].ratio, rungs["image PSNR"].ratio)  # PyTorch's own errors are known
        assert rungs["image PSNR"].value > 75  # measured: 80 dB, one level in one pixel
        parts = time_parts(bench.bundle, bench.engine, 1, 3, 1)
        assert time_images(bench.bundle, bench.engine, 1, 3, 1)["split_s"].keys() >= {"loop on the device", "decoder"}
        assert DECODER in parts
        session = bench.engine.session("decoder")
        run = session.run
        session.run = lambda inputs, outputs, run=run: run({"latents": inputs["latents"][..., ::-1]}, outputs)
        failed = [rung.name for rung in verification_of(bench.bundle, bench.engine).rungs if not rung.passed]
        assert failed[0] == "decoder"
        bench.engine.close()
        bench.machine.check_closed()
    bench = Bench(path, tmp_path / "other", recipe_for("rtx", "8.9", 2, (1, 2), 64, decode_tile=5))
    with pytest.raises(
        EngineError, match=r"tiles of 5, and the bundle has no golden record of such a tile; export .* 5,"
    ):
        verification_of(bench.bundle, bench.engine)
    bench.engine.close()


def test_auto_leaves_engines_that_lack_something(
    bundles: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One without guidance, or for tiles, is for whoever names it; ``auto`` says so and takes another."""
    for recipe, words in (
        (recipe_for("rtx", "8.9", 2, (1,), 64), "was built without guidance; choose it with --engine tensorrt"),
        (recipe_for("rtx", "8.9", 2, (1, 2), 64, decode_tile=4), "was built for tiles (--decode-tile 4); choose it"),
    ):
        bench = Bench(bundles["fp32"], tmp_path / str(recipe.decode_tile), recipe)
        with monkeypatch.context() as patch:
            offer(bench, patch)
            choice = choose_engine(bench.bundle)
            assert not choice.engine.info.name.startswith("tensorrt")
        assert words in " ".join(choice.found_out)
        bench.engine.close()
        bench.machine.check_closed()


def offer(bench: Bench, patch: pytest.MonkeyPatch) -> None:
    """Let ``auto`` find the double's engine."""
    machine = bench.machine
    (bench.stored.folder / SIDECAR).write_text("{}")
    patch.setattr(tensorrt_engine, "read_engines", lambda *_: [bench.stored])
    opened = functools.partial(
        tensorrt_engine.engine_from_store, cuda=machine.cuda, import_library=lambda name: machine.library
    )
    patch.setattr(tensorrt_engine, "engine_from_store", opened)


def test_timing_an_engine_without_guidance(bundles: dict[str, Path], tmp_path: Path) -> None:
    """There is no guided step, and images are made without."""
    bench = Bench(bundles["fp32"], tmp_path, recipe_for("rtx", "8.9", 2, (1,), 64))
    assert set(time_parts(bench.bundle, bench.engine, 1, 3, 1)) == {PLAIN, DECODER}
    assert time_images(bench.bundle, bench.engine, 1, 3, 1)["runs"] == 1
    bench.engine.close()


def test_every_branch_has_a_weight_when_it_is_verified(bundles: dict[str, Path], tmp_path: Path) -> None:
    """A third branch that is wrong is seen, though the records have two."""
    bench = Bench(bundles["fp32"], tmp_path, RECIPES["branches"])
    assert [
        rung.name for rung in verification_of(bench.bundle, bench.engine, quick=True).rungs if not rung.passed
    ] == []
    session = bench.engine.session("step")
    run = session.run

    def wrong(inputs: Any, outputs: Any) -> Any:
        rows = inputs["rows"].copy()
        rows[2:] = rows[:1]
        return run({**inputs, "rows": rows}, outputs)

    session.run = wrong
    failed = [rung.name for rung in verification_of(bench.bundle, bench.engine, quick=True).rungs if not rung.passed]
    assert failed[:1] == ["forward G=2"]
    bench.engine.close()
    bench.machine.check_closed()


def test_a_verdict_is_on_the_very_plans(bench: Bench) -> None:
    """Plans that were built again in the same folder, with other kernels perhaps, have no verdict yet."""
    before = path_of_verdict(bench.bundle, bench.engine)
    step = replace(bench.stored.graphs["step"], plan_sha256="0" * 64)
    bench.stored = replace(bench.stored, graphs={**bench.stored.graphs, "step": step})
    again = bench.made()
    assert again.info.name == bench.engine.info.name
    assert path_of_verdict(bench.bundle, again) != before
    again.close()


@pytest.mark.parametrize(("sampler", "noise"), [("ddim", 0), ("ddpm", 1)])
def test_what_the_host_calls(bench: Bench, sampler: str, noise: int) -> None:
    """A run of one schedule uploads once, launches a graph a step and one for its images, and waits no more often for
    20 steps than for 10.

    A step is four calls: what it writes may be written, its inputs, its graph, a mark; and one more for noise, which
    the last does not draw. For its images a run waits for the run inputs' memory, the latents, the batch's end, the
    decoder's memory, the images; uploads two images, the first row, the inputs of the other rows, the decoder's
    latents; and downloads state, denoised, images, and the decoder's floats, which tell whether its pixels are finite.
    """
    for steps in (20, 10, 20, 10):  # captures, and fills the table
        bench.pipe([1, 2], steps=steps, sampler=sampler, guidance=1.5)
    calls = bench.machine.calls
    for steps in (10, 10, 20, 20):
        calls.clear()
        bench.pipe([1, 2], steps=steps, sampler=sampler, guidance=1.5)
        if calls["enqueue"]:
            continue  # a table that was full is filled again
        assert calls == {
            **{"wait": steps + 1, "copy": steps - 1, "launch": steps + 1, "record": steps + 1},
            **{"clear": 2, "upload": 5 + noise * (steps - 1), "synchronize": 5, "download": 4},
        }


def test_the_decoder_is_captured(bench: Bench) -> None:
    """From the second call of a shape on a decoder's call is a CUDA graph, with the same images; padding and all."""
    rng, calls = np.random.default_rng(0), bench.machine.calls
    ours, host = bench.engine.session("decoder"), bench.host.engine.session("decoder")

    def decode(batch: int) -> tuple[int, int]:
        latents = {"latents": rng.standard_normal((batch, 4, 8, 8), np.float32)}
        calls.clear()
        for found, same in zip(ours.run(latents, ["images"]), host.run(latents, ["images"]), strict=True):
            assert np.array_equal(found, same)
        return calls["begin_capture"], calls["launch"]

    assert [decode(batch) for batch in (4, 4, 4)] == [(0, 0), (1, 1), (0, 1)]
    assert [decode(batch) for batch in (1, 1, 1, 4, 3)] == [(0, 0), (1, 1), (0, 1), (0, 1), (0, 0)]
    assert decode(1) == (0, 1)
    assert dict(calls) == {"synchronize": 2, "upload": 1, "launch": 1, "download": 1}
    bench.pipe([1], **SETTINGS["ddim"])
    assert decode(1) == (0, 1)
    bench.engine.release("decoder")
    assert not bench.machine.weights["decoder"]
    assert [decode(batch) for batch in (1, 1, 1)] == [(0, 0), (1, 1), (0, 1)]


def test_a_call_tells_only_what_changed(bench: Bench) -> None:
    """Memory, shapes and addresses that a context has are not set again."""
    calls, rng = bench.machine.calls, np.random.default_rng(0)

    def compute(rows: int) -> list[int]:
        pairs = {
            "timesteps": rng.integers(0, 1000, rows).astype(np.float32),
            "labels": rng.integers(0, 10, rows).astype(np.int32),
        }
        calls.clear()
        (found,) = bench.engine.session("conditioner").run(pairs, ["modulation"])
        assert np.array_equal(found, bench.host.engine.session("conditioner").run(pairs, ["modulation"])[0])
        return [calls[name] for name in ("set_device_memory", "set_input_shape", "set_tensor_address", "enqueue")]

    assert compute(6) == [1, 2, 3, 1]
    assert compute(6) == [0, 0, 0, 1]
    assert compute(5) == [0, 2, 2, 1]
    bench.pipe([1], **SETTINGS["ddim"])
    assert compute(5)[1:] == [2, 3, 1]  # the loop has used the same context, or unloaded it
    assert compute(5) == [0, 0, 0, 1]


def test_the_conditioner_is_gone_before_the_loop(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its weights are freed before the step's are loaded; only one that has to come back stays."""
    launched: list[dict[str, list[int]]] = []
    launch = bench.machine.cuda.launch

    def noting(graph: int, stream: int) -> None:
        launched.append({name: list(sizes) for name, sizes in bench.machine.weights.items()})
        launch(graph, stream)

    monkeypatch.setattr(bench.machine.cuda, "launch", noting)
    loads = []
    for label in (1, 2, 2):
        launched.clear()
        bench.machine.calls.clear()
        bench.pipe([label], steps=5, sampler="ddim", guidance=1.5)
        loads.append((bench.machine.calls["deserialize"], launched[0]["conditioner"], launched[-1]["step"]))
    # Three plans at first; then the conditioner again for another label; then nothing.
    assert loads == [(3, [], [200_000]), (1, [100_000], [200_000]), (0, [100_000], [200_000])]


@pytest.mark.parametrize("rows", [5, 9, 40])
def test_a_table_that_is_too_small(bench: Bench, monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """A table that must be dropped and filled again within a run, or that grows, changes nothing."""
    monkeypatch.setattr("dit_runtime.sampling.batch.LIMITS", TableLimits(ROW * rows, ROW * 4))
    for count in (1, 3):
        for settings in ({"steps": 4, "guidance": 1.0}, {"steps": 12, "guidance": 2.0}):
            bench.same([1, 2, 3][:count], 7, CHUNKS_LIMIT, sampler="ddpm", **settings)
    assert bench.machine.calls["deserialize"] <= 4
    (steps,) = bench.engine._loops
    assert steps._memory.shape[0] <= rows


def test_rows_that_do_not_end_at_an_aligned_address(bundles: dict[str, Path], tmp_path: Path) -> None:
    """The conditioner writes at aligned addresses only, whatever the size of a row."""
    bench = Bench(bundles["fp32"], tmp_path)
    steps = bench.engine.open_loop(TableLimits(ROW * 40, ROW * 4))
    assert steps._memory.granule == 1  # 3584 bytes are 14 times 256
    steps._memory.granule = 4
    steps.close()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dit_runtime.sampling.batch.LIMITS", TableLimits(ROW * 40, ROW * 4))
        # Three steps' nine rows; from 12 on what five steps need besides; then all again, from the beginning.
        for asked, rows in ((3, [*range(9)]), (5, [*range(9), *range(12, 24)]), (7, [*range(21)])):
            bench.same([1, 2], 7, CHUNKS_LIMIT, sampler="ddim", steps=asked, guidance=2.0)
            assert sorted(steps.table._rows.values()) == rows
    bench.engine.close()
    bench.machine.check_closed()


def test_memory_does_not_grow(bench: Bench) -> None:
    """Runs after the first take no more of the device, and an image that fails gives back what it had."""
    used = []
    for seed in range(4):
        bench.pipe([1, 2, 3], seed, steps=6, sampler="ddpm", guidance=1.5)
        list(bench.pipe.stream(bench.pipe.prepare([1, 2], seed, steps=3, sampler="ddim", guidance=1.0), 1))
        used.append((bench.machine.used, len(bench.machine.pinned), len(bench.machine.graphs)))
    assert used[2:] == used[1:-1]
    assert len(bench.engine._loops) == 1


def test_activations_share_one_block(bench: Bench) -> None:
    """There is one block for all contexts, as large as the largest profile in use: here the decoder's."""
    bench.pipe([1, 2, 3], steps=4, sampler="ddim", guidance=1.5)
    sizes = bench.stored.graphs["decoder"].activation_bytes
    assert bench.engine.device.activations.size == sizes[1]
    assert bench.engine.device.activations.moves <= 2  # the conditioner's, then the largest of the loop
    before = bench.engine.device.activations.moves
    bench.pipe([1, 2], steps=4, sampler="ddim", guidance=1.5)
    assert bench.engine.device.activations.moves == before


def test_few_graphs_are_kept(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The least recently used graph makes room, and is captured again when it is needed."""
    monkeypatch.setattr(device_graphs, "MOST_GRAPHS", 2)
    monkeypatch.setattr(device_graphs, "OF_A_BATCH", 0)
    for labels in ([1], [1, 2], [1, 2, 3], [1]):
        bench.same(labels, 0, sampler="ddim", steps=3, guidance=1.5)
    assert bench.graphs() == [(1, 2), (3, 2)]
    assert bench.machine.calls["begin_capture"] == 5  # once more for the decoder, whose batch of one comes again
    assert len(bench.machine.graphs) == 3


def test_without_graphs(bundles: dict[str, Path], tmp_path: Path) -> None:
    """The loop that is not captured gives the same."""
    bench = Bench(bundles["fp32"], tmp_path, captured=False)
    bench.same([1, 2, 3], 5, **SETTINGS["interval"])
    assert bench.machine.calls["begin_capture"] == 0
    bench.engine.close()
    bench.machine.check_closed()


@pytest.fixture
def rtx(bundles: dict[str, Path], tmp_path: Path) -> Iterator[Bench]:
    """The FP32 bundle on TensorRT-RTX; at the end everything must be given back."""
    bench = Bench(bundles["fp32"], tmp_path, library="tensorrt_rtx")
    yield bench
    bench.engine.close()
    bench.machine.check_closed()


def test_rtx_compiles_each_graph_once(rtx: Bench) -> None:
    """All contexts of a plan share what was compiled, and the next engine finds it beside the plan."""
    rtx.same([1, 2, 3], 5, **SETTINGS["interval"])
    assert rtx.machine.calls["compile"] == 3
    rtx.engine.close()
    (kept,) = rtx.stored.folder.glob("step-*.kernels")

    def compiled() -> int:
        before = rtx.machine.calls["compile"]
        engine = rtx.made()
        Pipeline(rtx.bundle, engine)([1], **SETTINGS["ddim"])
        engine.close()
        return rtx.machine.calls["compile"] - before

    assert compiled() == 0
    kept.write_bytes(b"damaged")
    assert compiled() == 1
    assert compiled() == 0
    content = kept.read_bytes()
    elsewhere = rtx.stored.folder.parent / "elsewhere"
    kept.rename(elsewhere)
    kept.symlink_to(elsewhere)
    assert compiled() == 1  # a link out of the engine's folder is neither read nor written
    assert elsewhere.read_bytes() == content
    kept.unlink()
    rtx.machine.facts = replace(rtx.machine.facts, driver="another")
    assert compiled() == 3
    rtx.engine = rtx.made()


def test_rtx_that_cannot_be_captured(rtx: Bench) -> None:
    """A context of TensorRT-RTX that says it cannot be captured runs without a CUDA graph."""
    rtx.machine.capturable = False
    rtx.same([1, 2, 3], 5, **SETTINGS["interval"])
    assert rtx.machine.calls["begin_capture"] == 0


def test_threads_take_turns(bench: Bench) -> None:
    """Batches in four threads on one engine, each with memory of its own, are those made alone."""
    expected = {seed: bench.host([seed % 10], seed, **SETTINGS["ddpm"]) for seed in range(8)}
    found: dict[int, np.ndarray] = {}
    errors: list[BaseException] = []

    def sample(first: int) -> None:
        try:
            for seed in (first, first + 4):
                found[seed] = bench.pipe([seed % 10], seed, **SETTINGS["ddpm"])
        except BaseException as error:  # noqa: BLE001  # shown by the assertion below
            errors.append(error)

    threads = [threading.Thread(target=sample, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert all(np.array_equal(found[seed], expected[seed]) for seed in expected)
    assert 1 <= len(bench.engine._loops) <= 4


def test_batches_interleave(bench: Bench) -> None:
    """Two trajectories at once on one engine, step by step in turns, do not see each other."""
    one, other = (bench.pipe.trajectory([label], label, **SETTINGS["ddpm"]) for label in (3, 7))
    same_one, same_other = (bench.host.trajectory([label], label, **SETTINGS["ddpm"]) for label in (3, 7))
    for found in zip(one, other, same_one, same_other, strict=True):
        assert np.array_equal(found[0][1], found[2][1])
        assert np.array_equal(found[1][1], found[3][1])
    assert len(bench.engine._loops) == 2


def test_engines_are_independent(bench: Bench) -> None:
    """Two engines on one device share nothing: closing one leaves the other's memory and graphs."""
    other = bench.made()
    pipe = Pipeline(bench.bundle, other)
    first = pipe([1], **SETTINGS["ddim"])
    assert np.array_equal(bench.pipe([1], **SETTINGS["ddim"]), first)
    other.close()
    other.close()  # once more is nothing
    assert np.array_equal(bench.pipe([1], **SETTINGS["ddim"]), first)


def test_an_engine_that_is_dropped(bundles: dict[str, Path], tmp_path: Path) -> None:
    """An engine that nobody closes gives its memory back when nobody has it any more."""
    bench = Bench(bundles["fp32"], tmp_path)
    bench.pipe([1], **SETTINGS["ddim"])
    machine = bench.machine
    assert machine.used > 0
    del bench
    gc.collect()
    machine.check_closed()


def exploding(steps: int) -> Any:
    """A table that multiplies the latents by a million in each row: they overflow in the seventh."""
    schedule = marked(0, list(np.linspace(900, 100, steps)))
    coefficients = schedule.coefficients.copy()
    coefficients[:, 2] = 1e6
    return replace(schedule, coefficients=coefficients)


def test_latents_that_are_no_numbers(bench: Bench) -> None:
    """They end the run at its end or when they are read, and what finished beside them stands."""
    with pytest.raises(SamplingError, match=r"not finite after step 9 of 9 on tensorrt 10\.3\.0 Double, plans plans"):
        bench.pipe([1, 2], sampler=exploding(9), guidance=1.0)
    shown = []
    with pytest.raises(SamplingError, match=r"not finite after step [57] of 9") as error:  # ONNX Runtime 1.23: step 5
        shown.extend(bench.pipe.trajectory([1, 2], sampler=exploding(9), guidance=1.0))
    assert f"after step {len(shown) + 1} of 9" in str(error.value)
    images = [
        *bench.pipe.prepare([1], 3, steps=8, sampler="ddim", guidance=1.0),
        *bench.pipe.prepare([2], 4, sampler=exploding(9), guidance=1.0),
    ]
    finished = []
    with pytest.raises(SamplingError, match=r"not finite after step 8 of 9 .* \(seed 4\)"):
        finished.extend(index for index, _ in stream(bench, images, finished))
    assert finished == [0]
    bench.same([1, 2], 3, **SETTINGS["ddpm"])  # the loop is as good as before


def stream(bench: Bench, images: list[Any], finished: list[int]) -> Iterator[tuple[int, Any]]:
    """Notes each image as it comes, since what an error interrupts is lost."""
    for index, _ in bench.pipe.stream(images, 2):
        finished.append(index)
    yield from ()


def test_latents_are_read_in_time(bench: Bench) -> None:
    """Latents of an earlier step are refused, not replaced by later ones."""
    from dit_runtime.sampling.batch import Batch

    with Batch(bench.engine, bench.bundle.manifest) as batch:
        batch.add(list(enumerate(bench.pipe.prepare([1], steps=3, sampler="ddim", guidance=1.0))))
        first = batch.advance()
        second = batch.advance()
        with pytest.raises(SamplingError, match="only the latents of the last step are on the device"):
            _ = first.latents
        kept = second.latents
        batch.advance()
        assert second.latents is not None
        assert np.array_equal(second.latents, kept)


def test_what_does_not_fit_the_device(bundles: dict[str, Path], tmp_path: Path) -> None:
    """Plans of another bundle, GPU or version, altered ones and swapped ones are one line each, before they run."""
    bench = Bench(bundles["fp32"], tmp_path)
    machine, stored = bench.machine, bench.stored

    def refused(match: str, **changes: Any) -> None:
        with pytest.raises(EngineError, match=match) as failure:
            TensorRtEngine(bench.bundle, replace(stored, **changes), machine.library, machine.cuda)
        assert "\n" not in str(failure.value)

    refused("built from bundle 000000000000 for 32x32 images, this is", bundle="0" * 64)
    refused("for 64x64 images, this is .* for 32x32", image_size=(64, 64))
    refused(r"built for sm_89 .*, this is sm_87 \(Double\).* dit-build", compute_capability="8.9")
    refused(r"TensorRT 10\.16\.2.*10\.3\.0", version="10.16.2")

    plan = stored.folder / "step.plan"
    content = plan.read_bytes()
    plan.write_bytes(content[:-1] + b"?")
    with pytest.raises(EngineError, match=r"step\.plan: altered"):
        bench.pipe([1], **SETTINGS["ddim"])
    for wrong, match in (
        (b"", r"step\.plan: cannot be read \(.*empty file\); run dit-build again"),
        (b"no plan at all", r"step\.plan: the plan cannot be loaded here \(Serialization assertion magicTag"),
        ((stored.folder / "decoder.plan").read_bytes(), r"step\.plan: has a tensor 'latents' of float32"),
    ):
        plan.write_bytes(wrong)
        digest = hashlib.sha256(wrong).hexdigest()
        machine.vouched.add(digest)
        step = replace(stored.graphs["step"], plan_bytes=len(wrong), plan_sha256=digest)
        other = replace(stored, graphs={**stored.graphs, "step": step})
        with (
            TensorRtEngine(bench.bundle, other, machine.library, machine.cuda) as engine,
            pytest.raises(EngineError, match=match) as failure,
        ):
            Pipeline(bench.bundle, engine)([1], **SETTINGS["ddim"])
        assert "\n" not in str(failure.value)
        del failure  # its traceback holds what was loaded
    plan.write_bytes(content)
    bench.same([1], 0, **SETTINGS["ddim"])
    bench.engine.close()
    machine.check_closed()


def test_what_the_engine_cannot_do(bench: Bench) -> None:
    """Shapes outside the profiles, another dtype, a graph without a plan: what was asked, and what there is."""
    with pytest.raises(EngineError, match=r"has no plan of the probe, only of conditioner, step, decoder"):
        bench.engine.session("probe")
    with pytest.raises(SamplingError, match=r"a batch of 5: tensorrt .* takes at most 4"):
        bench.pipe([1] * 5)
    latents = np.zeros((1, 4, 9, 8), np.float32)
    with pytest.raises(EngineError, match=r"decoder takes batch 1, height 9, width 8, only batch 1, height 8,"):
        bench.engine.session("decoder").run({"latents": latents}, ["images"])
    with pytest.raises(EngineError, match=r"input latents is float64, expected float32"):
        bench.engine.session("decoder").run({"latents": np.zeros((1, 4, 8, 8))}, ["images"])
    # More images than the decoder takes at once are decoded in parts.
    many = np.random.default_rng(1).standard_normal((6, 4, 8, 8), np.float32)
    assert np.array_equal(bench.pipe.decode(many), bench.host.decode(many))
    many[5, 0, 1, 1] = np.nan  # in the last part
    with pytest.raises(SamplingError, match=r"decoded pixels are not finite on tensorrt 10\.3\.0 Double"):
        bench.pipe.decode(many)


def test_too_little_memory(bundles: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An allocation that fails is one line, leaves nothing behind, and the engine goes on when there is room again."""
    monkeypatch.setattr(device, "SMALL_BYTES", 30_000)
    bench = Bench(bundles["fp32"], tmp_path)
    images = bench.host([1, 2], 3, **SETTINGS["ddpm"])
    facts, failures = bench.machine.facts, 0
    for room in range(40_000, 1_200_000, 40_000):
        bench.machine.facts = replace(facts, memory_bytes=room)
        if (found := sampled(bench, [1, 2])) is not None:
            break
        failures += 1
    assert 3 <= failures < 25
    assert np.array_equal(found, images)
    bench.engine.close()
    bench.machine.check_closed()


def sampled(bench: Bench, labels: list[int]) -> Any:
    """Images, or None where the device's memory is too small."""
    try:
        return bench.pipe(labels, 3, **SETTINGS["ddpm"])
    except EngineError as error:
        if "cudaErrorMemoryAllocation" not in str(error) and "of the GPU's memory" not in str(error):
            raise
        return None


def test_weights_make_room_for_each_other(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the conditioner does not fit beside the step, another batch's labels have them loaded in turns."""
    machine, expected = bench.machine, [bench.host([label], 3, **SETTINGS["ddpm"]) for label in (1, 2, 2)]
    assert np.array_equal(bench.pipe([1], 3, **SETTINGS["ddpm"]), expected[0])
    loaded = sum(sum(sizes) for sizes in machine.weights.values())
    assert loaded == 500_000  # step and decoder
    machine.facts = replace(machine.facts, memory_bytes=machine.used + 150_000)
    monkeypatch.setattr(device, "SMALL_BYTES", 30_000)
    loads = []
    for images in expected[1:]:
        machine.calls.clear()
        assert np.array_equal(bench.pipe([2], 3, **SETTINGS["ddpm"]), images)
        loads.append(machine.calls["deserialize"])
    # The conditioner takes the step's place, and the step the conditioner's; for the same label again nothing moves.
    assert loads == [2, 0]
    assert len(bench.engine._loops) == 1


def test_room_is_made_within_a_batch(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images of other labels that join a running batch evict the step, whose latents stay where they are."""
    monkeypatch.setattr(device, "SMALL_BYTES", 30_000)
    monkeypatch.setattr("dit_runtime.sampling.batch.LIMITS", TableLimits(ROW * 40))
    labels = [[3], [1, 2, 4], [5], [6, 7]]
    settings = ({"steps": 3 + index, "guidance": 1.5, "sampler": "ddpm"} for index in range(len(labels)))
    images = [each for own, how in zip(labels, settings, strict=True) for each in bench.host.prepare(own, 3, **how)]
    expected = dict(bench.host.stream(images, 3))
    assert np.array_equal(bench.pipe([1], 3, **SETTINGS["ddpm"]), bench.host([1], 3, **SETTINGS["ddpm"]))
    bench.machine.facts = replace(bench.machine.facts, memory_bytes=bench.machine.used + 60_000)
    bench.machine.calls.clear()
    found = dict(bench.pipe.stream(images, 3))
    assert all(np.array_equal(found[index], expected[index]) for index in expected)
    assert bench.machine.calls["deserialize"] > 4  # conditioner and step in turns


def test_memory_that_ran_out_leaves_nothing_stale(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A larger batch for whose activations there is no room, and then the first one again: on memory that is there."""
    monkeypatch.setattr(device, "SMALL_BYTES", 0)
    one = bench.host([1], 3, **SETTINGS["ddpm"])
    assert np.array_equal(bench.pipe([1], 3, **SETTINGS["ddpm"]), one)
    facts, failures = bench.machine.facts, 0
    for room in range(400_000, 1_200_000, 20_000):
        bench.machine.facts = replace(facts, memory_bytes=room)
        if sampled(bench, [1, 2, 3, 4]) is not None:
            break
        failures += 1
        bench.machine.facts = facts
        assert np.array_equal(bench.pipe([1], 3, **SETTINGS["ddpm"]), one)
    assert 0 < failures < 39


@pytest.mark.parametrize("count", [2, 3])
def test_a_first_batch_that_is_filled_up(bundles: dict[str, Path], tmp_path: Path, count: int) -> None:
    """The memory that is asked for is the profile's, which takes more images than there are."""
    bench = Bench(bundles["fp32"], tmp_path, RECIPES["static"])
    labels = list(range(count))
    expected = bench.host(labels, 3, **SETTINGS["ddim"])
    assert np.abs(bench.pipe(labels, 3, **SETTINGS["ddim"]).astype(int) - expected).max() <= 1
    bench.engine.close()
    bench.machine.check_closed()


def test_a_batch_that_does_not_fit(bench: Bench) -> None:
    """The need of the batch that was asked for is said before its step is loaded, with one that would fit."""
    bench.machine.facts = replace(bench.machine.facts, memory_bytes=640_000)
    with pytest.raises(EngineError, match=r"plans: batch 4 needs .* are available; batch 1 fits"):
        bench.pipe([1, 2, 3, 4], **SETTINGS["ddim"])
    assert not bench.machine.weights.get("step")


WORK = (
    "allocate",
    "allocate_pinned",
    "create_event",
    "upload",
    "download",
    "copy",
    "clear",
    "launch",
    "record",
    "wait",
    "synchronize",
)
CAPTURE = ("begin_capture", "end_capture")


def test_a_call_that_fails_anywhere(bundles: dict[str, Path], tmp_path: Path) -> None:
    """Whichever call of CUDA fails first, the error is told, nothing is lost, and all is given back at the end."""
    expected: Any = None
    for count in range(1000):
        bench = Bench(bundles["fp32"], tmp_path)
        left = count

        def failing(original: Any, *arguments: Any) -> Any:
            nonlocal left
            left -= 1
            if left == -1:
                raise EngineError(f"CUDA, {original.__name__}: cudaErrorUnknown")
            return original(*arguments)

        def asked(bench: Bench = bench) -> Any:
            return bench.pipe([1, 2], 3, sampler="ddpm", steps=3, guidance=2.5, guidance_interval=(0.5, 1.0))

        with pytest.MonkeyPatch.context() as patch:
            for name in (*WORK, *CAPTURE):
                original = getattr(bench.machine.cuda, name)
                patch.setattr(bench.machine.cuda, name, functools.partial(failing, original))
            failure: str | None = None
            try:
                expected = asked()
            except EngineError as error:
                failure = str(error)
        if failure is not None:
            assert "cudaErrorUnknown" in failure
            assert not bench.machine.capturing
            again = asked()
            expected = again if expected is None else expected
            assert np.array_equal(again, expected)
        bench.engine.close()
        bench.machine.check_closed()
        if failure is None:
            break
    assert 60 <= count < 1000


def test_a_closed_engine(bench: Bench) -> None:
    """After its end an engine says so, in place of working on another stream."""
    bench.engine.close()
    with pytest.raises(EngineError, match="is closed"):
        bench.pipe([1], **SETTINGS["ddim"])
    with pytest.raises(EngineError, match="is closed"):
        bench.engine.session("decoder").run({"latents": np.zeros((1, 4, 8, 8), np.float32)}, ["images"])


def test_a_capture_that_fails(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the library refuses while it is captured is told with its reason, and the stream is usable afterwards."""
    from support.cuda_double import Context

    original = Context.execute_async_v3

    def refusing(self: Context, stream: int) -> bool:
        if stream in bench.machine.capturing:
            self.engine.logger.log(1, "a layer\ncannot be captured")
            return False
        return original(self, stream)

    with monkeypatch.context() as patch:
        patch.setattr(Context, "execute_async_v3", refusing)
        with pytest.raises(EngineError, match=r"could not be started \(a layer cannot be captured\)"):
            bench.pipe([1], **SETTINGS["ddim"])
    bench.same([1], 0, **SETTINGS["ddim"])


def test_the_double_is_the_interface() -> None:
    """The double, the real thing and the interface have the same methods with the same parameters."""

    def methods(kind: type) -> dict[str, list[str]]:
        return {
            name: list(inspect.signature(value).parameters)
            for name, value in vars(kind).items()
            if not name.startswith("_") and callable(value)
        }

    assert methods(cuda.Cuda) == methods(cuda.CudaRuntime) == methods(DoubleCuda)
    assert len(methods(cuda.Cuda)) == 21


GENERATIONS = ["cuda-bindings-12.8", "cuda-bindings-12.9", "cuda-bindings-13.5"]
LOOKED_UP = """
import json, sys
import numpy as np
from dit_runtime.backends.tensorrt import cuda
from dit_runtime.core.errors import EngineError
names, calls = json.load(sys.stdin)
result = {"missing": [], "refused": {}}
runtime = cuda._import_runtime()
for name in names:
    value = runtime
    for part in name.split("."):
        value = getattr(value, part, None)
    if value is None:
        result["missing"].append(name)
properties = runtime.cudaDeviceProp()
numbers = ("major", "minor", "integrated", "multiProcessorCount")
result["properties"] = [type(getattr(properties, n)).__name__ for n in ("name", *numbers)]
try:
    cuda.read_device()
except EngineError as error:
    result["no driver"] = str(error)
bare = object.__new__(cuda.CudaRuntime)
bare._rt = runtime
for name, arguments in calls.items():
    values = [np.zeros(8, np.uint8) if argument is None else argument for argument in arguments]
    try:
        getattr(bare, name)(*values)
        result["refused"][name] = "nothing"
    except Exception as error:
        result["refused"][name] = f"{type(error).__name__}: {error}"
print(json.dumps(result))
"""


def used_of_cuda() -> set[str]:
    """Every name of cuda-bindings in ``cuda.py``: attributes of ``self._rt``, and functions named to ``_call``."""
    names = set()
    tree = ast.parse(Path(cuda.__file__).read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        parts: list[str] = []
        value: ast.AST = node
        while isinstance(value, ast.Attribute):
            parts.insert(0, value.attr)
            value = value.value
        if parts[:1] == ["_rt"] and len(parts) > 1:
            names.add(".".join(parts[1:]))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "_call":
            names.add(ast.literal_eval(node.args[1]))
    return names


@pytest.mark.parametrize("generation", GENERATIONS)
def test_every_name_of_cuda_exists(generation: str) -> None:
    """cuda-bindings of CUDA 12 and 13 have each name that is used, and take the arguments that it is called with."""
    names = used_of_cuda()
    assert {"cudaMemcpyAsync", "cudaGraphInstantiate", "cudaError_t.cudaSuccess"} <= names
    assert len(names) >= 30
    handle, address = 16, 4096
    calls: dict[str, list[int | None]] = {
        **{"read_device": [], "allocate": [8], "free": [address], "allocate_pinned": [8], "free_pinned": [None]},
        **{"create_stream": [], "destroy_stream": [handle], "create_event": [], "destroy_event": [handle]},
        **{"record": [handle, handle], "wait": [handle], "synchronize": [handle]},
        **{"upload": [address, None, handle], "download": [None, address, handle]},
        **{"copy": [address, 2 * address, 8, handle], "clear": [address, 8, handle]},
        **{"begin_capture": [handle], "end_capture": [handle]},
        **{"launch": [handle, handle], "destroy_graph": [handle]},
    }
    folders = [os.fspath(bindings(generation)), os.fspath(bindings("cuda-pathfinder"))]
    done = subprocess.run(
        [sys.executable, "-c", LOOKED_UP],
        input=json.dumps([sorted(names), calls]),
        env={**os.environ, "PYTHONPATH": os.pathsep.join(folders)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["missing"] == []
    assert result["properties"] == ["bytes", "int", "int", "int", "int"]
    if "no driver" not in result:
        pytest.skip("there is a driver here: see tests/runtime/backends/test_gpu.py")
    assert result["no driver"].startswith("no NVIDIA driver that works here (")
    # Not a TypeError: number and kinds of the arguments are right.
    assert set(result["refused"]) | {"abandon_capture"} == set(vars(cuda.CudaRuntime)) & set(vars(DoubleCuda)) - {
        name for name in vars(DoubleCuda) if name.startswith("_")
    }
    for name, refused in result["refused"].items():
        assert refused.startswith("EngineError: no NVIDIA driver that works here ("), name


def test_without_cuda_bindings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without cuda-bindings the error says what to install on which device."""
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    with pytest.raises(EngineError, match=r"cuda-bindings is not installed .*\[jetson6\].*\[jetson7\].*\[tensorrt\]"):
        cuda.read_device()


class Failing:
    """A CUDA runtime of which one function fails."""

    class cudaError_t:
        cudaSuccess = 0

    class Status:
        name = "cudaErrorMemoryAllocation"

    def cudaMalloc(self, size: int) -> tuple[object, None]:
        return (self.Status(), None)

    def cudaGetErrorString(self, status: object) -> tuple[int, bytes]:
        return (0, b"out of memory")


def test_an_error_of_cuda_says_what_was_done() -> None:
    """CUDA's own name and text, what was attempted and what to do are in one line."""
    runtime = object.__new__(cuda.CudaRuntime)
    runtime._rt = Failing()
    with pytest.raises(EngineError) as failure:
        runtime.allocate(1 << 30)
    assert str(failure.value) == (
        "CUDA, allocating 1073741824 bytes: cudaErrorMemoryAllocation (out of memory); use a smaller batch; on a "
        "Jetson with free memory, drop the file cache (sudo sysctl vm.drop_caches=3) or reboot"
    )


def test_a_driver_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA's error 35 says which package to change, on JetPack 6 and elsewhere."""
    runtime = object.__new__(cuda.CudaRuntime)
    runtime._rt = Failing()
    monkeypatch.setattr(Failing.Status, "name", "cudaErrorInsufficientDriver")
    with pytest.raises(EngineError, match=r"35\): there is none, .*; on JetPack 6 pip install 'cuda-bindings==12.8"):
        runtime.allocate(1)


def test_a_profile_that_is_refused(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bindings raise RuntimeError where the library refuses a profile; its logger's reason is in the line."""
    from support.cuda_double import Context

    def refuse(self: Context, index: int, stream: int) -> bool:
        self.engine.logger.log(1, "CUDA is out of memory")
        raise RuntimeError("set_optimization_profile_async failed")

    monkeypatch.setattr(Context, "set_optimization_profile_async", refuse)
    with pytest.raises(EngineError, match=r"no execution context .*profile 0: set_opt.* \(CUDA is out of memory\)"):
        bench.pipe([1], **SETTINGS["ddim"])


def test_a_runtime_that_cannot_start(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where CUDA cannot start the bindings raise TypeError: one line with the logger's reason and the next step."""

    def fail(logger: Any) -> None:
        logger.log(1, "CUDA initialization failure with error: 35")
        raise TypeError("pybind11::init(): factory function returned nullptr")

    monkeypatch.setattr(bench.machine.library.module, "Runtime", fail)
    with pytest.raises(EngineError, match=r"runtime of tensorrt 10.3.0 cannot start .*nvidia-smi \(CUDA init.*: 35\)"):
        bench.made()


def test_plans_of_other_graphs_are_refused(bench: Bench) -> None:
    """A sidecar that does not fit the bundle's graphs is one line, and leaves nothing on the device."""
    graphs = bench.stored.graphs
    (profile,) = graphs["conditioner"].profiles
    lacking = replace(graphs["conditioner"], profiles=({"labels": profile["labels"]},))
    for altered in ({**graphs, "other": graphs["step"]}, {**graphs, "conditioner": lacking}):
        stored = replace(bench.stored, graphs=altered)
        with pytest.raises(EngineError, match=r"does not fit the bundle's graphs; run dit-build"):
            TensorRtEngine(bench.bundle, stored, bench.machine.library, bench.machine.cuda)
    assert len(bench.machine.queues) == 1  # the stream of the bench's own engine
