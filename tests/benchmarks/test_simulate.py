"""The simulation of fleets, against what can be worked out by hand, and a loop of its own that steps through time."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks" / "serving"


@pytest.fixture(scope="module")
def simulate() -> Any:
    spec = importlib.util.spec_from_file_location("serving_simulate", FOLDER / "simulate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_a_request_alone_takes_its_own_time(simulate: Any) -> None:
    """Its steps, its decoder, the front and the way between them; nothing else."""
    costs = simulate.Costs(base_ms=4, each_ms=1, branches=2, front_ms=3, hop_ms=20, decode_ms=5)
    latencies, busy = simulate.simulate(costs, 3, 2, [(1.0, 10)])
    assert latencies[0] == pytest.approx(10 * 0.006 + 0.005 + 0.003 + 0.020)
    assert latencies[0] == pytest.approx(costs.alone_seconds(10))
    assert 0 < busy < 1 / 3


def test_a_running_batch_as_a_plain_loop_has_it(simulate: Any) -> None:
    """One engine: who joins at which step, and when each is finished, by a loop that is written another way."""
    costs = simulate.Costs(front_ms=0, hop_ms=0, batch_size=3)
    arrivals = simulate.arrivals_at(30.0, 60, seed=4)
    latencies, _ = simulate.simulate(costs, 1, 1, arrivals)
    now, left, finished = 0.0, {}, {}
    waiting = list(range(len(arrivals)))
    while waiting or left:
        if not left:
            now = max(now, arrivals[waiting[0]][0])
        while waiting and len(left) < 3 and arrivals[waiting[0]][0] <= now:
            request = waiting.pop(0)
            left[request] = arrivals[request][1]
        now += (costs.base_ms + costs.each_ms * costs.branches * len(left)) / 1e3
        for request in list(left):
            left[request] -= 1
            if not left[request]:
                finished[request] = now
                del left[request]
    assert latencies == pytest.approx([finished[index] - at for index, (at, _) in enumerate(arrivals)])


def test_a_front_serves_one_request_at_a_time(simulate: Any) -> None:
    """Two requests at once: with one front the second waits for the first."""
    costs = simulate.Costs(front_ms=50, hop_ms=0)
    for fronts, expected in ((1, 0.05), (2, 0.0)):
        latencies, _ = simulate.simulate(costs, 2, fronts, [(0.0, 10), (0.0, 10)])
        assert latencies[1] - latencies[0] == pytest.approx(expected)


def test_the_fleet_is_the_smallest_that_keeps_to_the_target(simulate: Any) -> None:
    """And it has at least the engines that the work itself needs."""
    costs = simulate.Costs()
    found = simulate.find_gpus(costs, 60.0, 2.0, 8.0)
    assert found["gpus"] >= 60.0 / costs.images_per_second()
    assert found["p95_s"] <= 2.0 * found["p95_alone_s"]
    arrivals = simulate.arrivals_at(60.0, 480)
    latencies, _ = simulate.simulate(costs, found["gpus"] - 1, found["fronts"], arrivals)
    assert (
        np.quantile(latencies, 0.95) > 2.0 * found["p95_alone_s"] or found["gpus"] - 1 < 60 / costs.images_per_second()
    )
