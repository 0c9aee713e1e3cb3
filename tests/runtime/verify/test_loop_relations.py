"""Faults of a sampling loop on a device: the step is sound, and what the loop gives it is not.

``tests/benchmarks/test_faults.py`` has the same faults in the loop on the host.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from engine_mistakes import LOOP_FAULTS, in_loop
from support.cuda_double import Machine, stored_on

from dit_engines.recipe import Recipe
from dit_runtime.backends.tensorrt.engine import TensorRtEngine
from dit_runtime.backends.tensorrt.loop import DeviceLoop
from dit_runtime.bundle.reader import open_bundle
from dit_runtime.verify.effort import QUICK
from dit_runtime.verify.loop_relations import mixed_batch
from dit_runtime.verify.replay import Replay
from dit_runtime.verify.rung import Rung

RECIPE = Recipe("this", "8.7", (1, 4), (1, 2), 64)
# Of the loop's three methods, the everyday run has one fault each.
EVERYDAY = (
    "the loop puts noise to the first images",
    "the loop keeps other images than those that remain",
    "the loop loses an image that joins",
)


def judged(path: Path, folder: Path) -> Rung:
    """The rung of TensorRT's loop on the double of a device."""
    bundle, machine = open_bundle(path), Machine()
    stored = stored_on(machine, bundle, folder / "plans", RECIPE)
    engine = TensorRtEngine(bundle, stored, machine.library, machine.cuda)
    rung = mixed_batch(Replay(bundle, engine), QUICK)
    engine.close()
    machine.check_closed()
    return rung


def test_a_sound_loop_on_a_device_keeps_it(bundles: dict[str, Path], tmp_path: Path) -> None:
    """Images that join and leave, with samplers of their own, are what they are alone."""
    rung = judged(bundles["fp32"], tmp_path)
    assert rung.passed
    assert rung.value < 1e-6  # measured: 1.5e-7
    assert "3 images, 3 at once, dpmpp-3m ddpm ddim" in rung.detail


@pytest.mark.parametrize(
    "name",
    [
        # The others change what the same method is given.
        pytest.param(name, marks=() if name in EVERYDAY else pytest.mark.slow)
        for name in LOOP_FAULTS
    ],
)
def test_a_faulty_loop_on_a_device_breaks_it(
    bundles: dict[str, Path], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loop that gives the step another image's numbers, or loses an image, fails."""
    change, method = LOOP_FAULTS[name]
    for patch in in_loop(change, method, DeviceLoop):
        monkeypatch.setattr(*patch)
    rung = judged(bundles["fp32"], tmp_path)
    assert not rung.passed
    assert "after row" in rung.detail
