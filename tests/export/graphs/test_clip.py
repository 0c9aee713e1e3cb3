"""Checkpoints whose scheduler clips, against the unpatched schedulers end to end; and a clip that is left out."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import onnx
import pytest
import torch
from dit_export.bundle import bundle_from_checkpoint
from dit_export.checkpoints.checkpoint import Checkpoint
from dit_export.checkpoints.sources import Source, load_checkpoint
from dit_export.graphs.model import sampler_update
from dit_export.graphs.precision import FP32
from dit_export.reference.record_settings import Measurements
from support.bundles import edit_graph, signed
from support.commands import run_command

from dit_runtime import Pipeline, read_table, write_table
from dit_runtime.backends.onnxruntime.engine import OnnxRuntimeEngine
from dit_runtime.bundle.reader import Bundle
from dit_runtime.core.errors import SamplingError
from dit_runtime.samplers.by_name import schedule_for
from dit_runtime.samplers.schedule import NO_BOUND, widen_rows
from dit_runtime.sampling.tables import check_table
from dit_runtime.verify.metrics import relative_error
from dit_runtime.verify.updates import draw_rows, expect_update
from dit_runtime.verify.verification import verify

STEPS, LABELS, SEEDS = 12, [7, 1, 4], [5, 6, 7]
LIMIT = 2e-5  # measured: 1.2e-5 and 6.0e-6
CLIPS: dict[str, dict[str, Any]] = {
    "ddim": {"_class_name": "DDIMScheduler", "clip_sample": True, "clip_sample_range": 0.8},
    "ddpm": {
        "_class_name": "DDPMScheduler",
        "clip_sample": True,
        "variance_type": "fixed_small",
        "beta_schedule": "squaredcos_cap_v2",
    },
}


def with_clip(checkpoint: Path, folder: Path, sampler: str) -> Path:
    shutil.copytree(checkpoint, folder)
    config, index = folder / "scheduler" / "scheduler_config.json", folder / "model_index.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **CLIPS[sampler]}))
    listed = {"scheduler": ["diffusers", CLIPS[sampler]["_class_name"]]}
    index.write_text(json.dumps({**json.loads(index.read_text()), **listed}))
    return folder


@pytest.mark.parametrize("slot", [0, 1, 2])
def test_the_exported_update_is_the_formula(slot: int) -> None:
    """Rows that clip, and rows whose bound no number is beyond, in one batch; fails if a slot takes another's clip."""
    random = np.random.default_rng(slot)
    state = random.standard_normal((4, 3, 2, 3, 3)).astype(np.float32)
    e, noise = (random.standard_normal((4, 2, 3, 3)).astype(np.float32) for _ in range(2))
    rows = draw_rows(4, np.zeros(1), 0, clips=True)
    rows[2:, 17:] = NO_BOUND, 0
    found = sampler_update(*(torch.from_numpy(each) for each in (state, noise, rows, e)), None)
    for image, row in enumerate(rows):
        expected = expect_update(state[image], e[image], np.zeros_like(e[image]), row, noise[image])
        assert relative_error(found[0][image, slot].numpy(), expected[slot].value) <= 1e-6  # measured: 1.6e-7
        assert relative_error(found[1][image].numpy(), expected[3].value) <= 1e-6
    plain = sampler_update(*(torch.from_numpy(each[2:]) for each in (state, noise, rows[:, :17], e)), None)
    assert torch.equal(plain[0], found[0][2:])
    assert torch.equal(plain[1], found[1][2:])


@pytest.fixture(scope="module", params=list(CLIPS))
def clipping(
    request: pytest.FixtureRequest, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Checkpoint, Bundle]:
    """A checkpoint with a sampler that clips, and its bundle without golden records."""
    folder = tmp_path_factory.mktemp(f"clip-{request.param}")
    source = Source(str(with_clip(checkpoint, folder / "source", request.param)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dit_export.bundle.records_in_process", lambda *_: Measurements())
        return request.param, load_checkpoint(source), bundle_from_checkpoint(source, folder / "out.bundle", FP32)


@pytest.mark.slow  # two exports
def test_latents_are_the_unpatched_schedulers(clipping: tuple[str, Checkpoint, Bundle], checkpoint: Path) -> None:
    """A trajectory of the folder's own sampler; most x₀ are beyond the bound."""
    sampler, source, bundle = clipping
    pipe = Pipeline(bundle, OnnxRuntimeEngine(bundle, threads=1))
    assert pipe.manifest.defaults.sampler == sampler
    found = [z for _, z, _ in pipe.trajectory(LABELS, SEEDS, steps=STEPS, guidance=1.0)]
    assert source.transformer is not None
    transformer, config = source.transformer(), CLIPS[sampler]
    kind = getattr(diffusers, config["_class_name"])
    scheduler = kind.from_config({**json.loads((checkpoint / "scheduler/scheduler_config.json").read_text()), **config})
    scheduler.set_timesteps(STEPS)
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    z = torch.stack([torch.randn(4, 8, 8, generator=generator) for generator in generators])
    errors, clipped = [], []
    with torch.inference_mode():
        for t, own in zip(scheduler.timesteps, found, strict=True):
            e = transformer(z, timestep=t[None].repeat(3), class_labels=torch.tensor(LABELS)).sample[:, :4]
            step = scheduler.step(e, t, z, generator=generators)
            z = step.prev_sample
            clipped.append(
                float((step.pred_original_sample.abs() == scheduler.config.clip_sample_range).float().mean())
            )
            errors.append(relative_error(own, z.numpy()))
    assert max(errors) <= LIMIT
    assert max(clipped) > 0.5, "little was clipped, so little was compared"


@pytest.mark.slow  # an export
def test_a_table_with_a_clip_is_for_bundles_that_clip(clipping: tuple[str, Checkpoint, Bundle], tmp_path: Path) -> None:
    """A written table is read back to the bit; a bundle whose step does not clip refuses it in one line."""
    sampler, _, own = clipping
    manifest = own.manifest
    schedule = schedule_for(sampler, manifest.model, manifest.diffusion, STEPS)
    write_table(schedule, tmp_path / "t.json")
    table = read_table(tmp_path / "t.json")
    assert table.clips
    assert np.array_equal(table.coefficients, schedule.coefficients)
    pipe = Pipeline(own, OnnxRuntimeEngine(own, threads=1))
    named, by_table = (
        pipe.prepare([1], steps=steps, sampler=each) for steps, each in ((STEPS, sampler), (None, table))
    )
    assert np.array_equal(pipe.sample_latents(named), pipe.sample_latents(by_table))
    plain = replace(manifest, model=replace(manifest.model, clips=False))
    with pytest.raises(SamplingError, match=r"rows of 19 numbers, which clip: the step of this bundle does not clip"):
        check_table(table, plain, own.digest)


def test_rows_are_widened_once() -> None:
    rows = np.ones((2, 17), np.float32)
    assert widen_rows(rows, clips=False) is rows
    wide = widen_rows(rows, clips=True)
    assert wide[:, 17:].tolist() == [[np.float32(NO_BOUND), 0]] * 2
    assert widen_rows(wide, clips=True) is wide


def leave_out(graph: onnx.GraphProto) -> None:
    """Let every consumer of the clipped estimate read the estimate itself."""
    low = next(node for node in graph.node if node.op_type == "Max")
    high = next(node for node in graph.node if node.op_type == "Min")
    inner = next(name for name in low.input if "neg" not in name)
    for node in graph.node:
        for index, name in enumerate(node.input):
            if name == high.output[0]:
                node.input[index] = inner
    graph.node.append(onnx.helper.make_node("Identity", [inner], [high.output[0]], "kept"))
    graph.node.remove(high)


@pytest.mark.slow  # an export with records
def test_golden_records_clip(checkpoint: Path, tmp_path: Path) -> None:
    """The export passes against its own references; a graph without the clip fails first in the sampler's update."""
    source = with_clip(checkpoint, tmp_path / "source", "ddim")
    done = run_command("dit-export", source, "-o", tmp_path / "c.bundle")
    assert done.returncode == 0, done.stderr + done.stdout
    assert "all 19 coefficients" in done.stdout
    for name in ("step", "probe"):
        edit_graph(tmp_path / "c.bundle", name, leave_out)
    bundle = signed(tmp_path / "c.bundle")
    rungs = verify(bundle, OnnxRuntimeEngine(bundle, threads=1))
    first = next(rung for rung in rungs if not rung.passed)
    assert first.name == "sampler update"
