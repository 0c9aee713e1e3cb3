"""What an engine prepares before the first request: every batch that may be asked of it, and nothing after that."""

from __future__ import annotations

import queue
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.cuda_double import Machine, stored_on
from support.waiting import SECONDS

from dit_engines.recipe import Recipe
from dit_runtime import Pipeline
from dit_runtime.backends.tensorrt.engine import TensorRtEngine
from dit_runtime.bundle.precision import Precision
from dit_runtime.bundle.reader import open_bundle
from dit_runtime.core.errors import SamplingError
from dit_runtime.verify import auto
from dit_runtime.verify.speed import Speed
from dit_serve.batcher import Batcher
from dit_serve.jobs import Finished, Job
from dit_serve.warm_up import open_pipeline, warm_up


@pytest.mark.parametrize("most", [4, 12])
def test_no_graph_is_captured_for_a_request(most: int, bundles: dict[str, Path], tmp_path: Path) -> None:
    """TensorRT captures at start whatever a server's batches need, also where that is more than the usual number."""
    machine, bundle = Machine(), open_bundle(bundles["fp32"])
    engine = TensorRtEngine(
        bundle,
        stored_on(machine, bundle, tmp_path, Recipe("this", "8.7", (1, most), (1, 2), 64)),
        machine.library,
        machine.cuda,
    )
    pipe = Pipeline(bundle, engine)
    assert len(warm_up(pipe, most)) == 2 * most
    captured = machine.calls["begin_capture"]
    assert captured >= 2 * most
    events: queue.Queue[Any] = queue.Queue()
    with Batcher(pipe, most, most) as batcher:
        images = [
            image
            for seed in range(most)
            for image in pipe.prepare([seed % 10], seed, steps=2 + seed, sampler="ddim", guidance=1.0 + seed % 2)
        ]
        batcher.submit([Job(image, events.put) for image in images])
        done = 0
        while done < most:
            done += isinstance(events.get(timeout=SECONDS), Finished)
    assert machine.calls["begin_capture"] == captured
    engine.close()
    machine.check_closed()


@pytest.mark.parametrize("engine", ["openvino", "auto"])
def test_openvino_is_compiled_for_any_batch(
    engine: str, bundles: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice in all, with guidance and without; and an image of a batch is the one that it is alone."""
    pytest.importorskip("openvino", reason="pip install 'dit-export[openvino]'")
    bundle = open_bundle(bundles["fp32"], tmp_path)
    monkeypatch.setattr(auto, "find_candidates", lambda bundle: [])
    speed = Speed("openvino", Precision.FP32, "openvino", 1.0)
    monkeypatch.setattr(auto, "rank_by_speed", lambda *_: [speed])
    monkeypatch.setattr(auto, "_passes", lambda *_: {})  # a verification takes seconds, and is tested elsewhere
    pipe = open_pipeline(bundle, engine, threads=1)
    assert pipe.engine.info.name.endswith("CPU fp32 for any batch")
    assert warm_up(pipe, 3) == [(3, 2), (3, 1)]
    compiled: list[str] = []
    compile_graph = pipe.engine.compile
    monkeypatch.setattr(
        pipe.engine, "compile", lambda graph, shapes: compiled.append(graph) or compile_graph(graph, shapes)
    )
    images = [
        *pipe.prepare([1, 2], [5, 6], steps=2, guidance=3.0),
        *pipe.prepare([3], [7], steps=3, guidance=1.0, sampler="ddim"),
    ]
    together = dict(pipe.stream(images, batch_size=3))
    alone = [dict(pipe.stream([image]))[0] for image in images]
    assert not compiled
    for index, latents in enumerate(alone):
        assert np.array_equal(together[index], latents)


def test_images_are_the_same_after_it(bundles: dict[str, Path]) -> None:
    pipe = Pipeline(bundles["fp32"], "onnxruntime", threads=1)
    before = pipe([1, 2], 3, steps=2)
    assert warm_up(pipe, 4) == [(4, 2), (4, 1)]
    assert np.array_equal(pipe([1, 2], 3, steps=2), before)


@pytest.mark.parametrize("change", ["guidance in its weights", "no null class"])
def test_a_model_that_cannot_be_guided(change: str, bundles: dict[str, Path]) -> None:
    """It is served too: no guided step is run ahead, which its pipeline would refuse."""
    bundle = open_bundle(bundles["fp32"])
    manifest = bundle.manifest
    if change == "no null class":  # the label table's last row is a class then
        changed = replace(manifest, model=replace(manifest.model, has_null=False, classes=manifest.model.classes + 1))
    else:
        changed = replace(manifest, diffusion=replace(manifest.diffusion, guidance_inside=True))
    pipe = Pipeline(replace(bundle, manifest=changed), "onnxruntime", threads=1)
    assert warm_up(pipe, 2) == [(2, 1)]
    with pytest.raises(SamplingError, match=r"guidance 2: .* use guidance 1"):
        pipe.prepare([1], 0, steps=2, guidance=2.0)
