"""What an engine prepares before the first request: every batch that may be asked of it, and nothing after that."""

from __future__ import annotations

import queue
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.cuda_double import Machine, stored_on
from support.waiting import SECONDS

from dit_engines.recipe import Recipe
from dit_runtime import Pipeline
from dit_runtime.backends.tensorrt.engine import TensorRtEngine
from dit_runtime.bundle.reader import open_bundle
from dit_serve.batcher import Batcher
from dit_serve.jobs import Finished, Job
from dit_serve.warm_up import warm_up


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


def test_images_are_the_same_after_it(bundles: dict[str, Path]) -> None:
    pipe = Pipeline(bundles["fp32"], "onnxruntime", threads=1)
    before = pipe([1, 2], 3, steps=2)
    assert warm_up(pipe, 4) == [(4, 2), (4, 1)]
    assert np.array_equal(pipe([1, 2], 3, steps=2), before)
