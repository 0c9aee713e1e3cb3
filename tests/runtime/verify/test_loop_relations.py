"""Faults of a sampling loop whose images differ: the step is sound, and what the loop gives it is not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.cuda_double import Machine, stored_on

from dit_engines.recipe import Recipe
from dit_runtime.backends.host_loop import HostLoop
from dit_runtime.backends.onnxruntime.engine import OnnxRuntimeEngine
from dit_runtime.backends.tensorrt.engine import TensorRtEngine
from dit_runtime.backends.tensorrt.loop import DeviceLoop
from dit_runtime.bundle.reader import Bundle, open_bundle
from dit_runtime.verify.effort import QUICK
from dit_runtime.verify.loop_relations import mixed_batch
from dit_runtime.verify.replay import Replay
from dit_runtime.verify.rung import Rung

RECIPE = Recipe("this", "8.7", (1, 4), (1, 2), 64)
Run = Callable[..., Any]
LOOPS = {"host": HostLoop, "device": DeviceLoop}


def use_first_guidance(run: Run, loop: Any, coefficients: Any, guidance: Any, *others: Any) -> Any:
    return run(loop, coefficients, np.repeat(guidance[:, :1], guidance.shape[1], axis=1), *others)


def use_first_coefficients(run: Run, loop: Any, coefficients: Any, *others: Any) -> Any:
    return run(loop, np.repeat(coefficients[:1], len(coefficients), axis=0), *others)


def use_second_rows_for_third(run: Run, loop: Any, coefficients: Any, guidance: Any, rows: Any, *others: Any) -> Any:
    rows = rows.copy()
    rows[:, 2:3] = rows[:, 1:2]
    return run(loop, coefficients, guidance, rows, *others)


def put_noise_first(run: Run, loop: Any, coefficients: Any, guidance: Any, rows: Any, noise: Any, drawing: Any) -> Any:
    """Noise goes to the first positions instead of those that draw it."""
    return run(loop, coefficients, guidance, rows, noise, list(range(len(drawing)))[::-1])


def keep_noise(run: Run, loop: Any, coefficients: Any, guidance: Any, rows: Any, noise: Any, drawing: Any) -> Any:
    """The noise of the first step is drawn for all."""
    first = loop.__dict__.setdefault("first_noise", noise)
    return run(loop, coefficients, guidance, rows, None if noise is None else first[: len(noise)], drawing)


def keep_first(keep: Run, loop: Any, positions: Sequence[int]) -> None:
    """The images that remain are the first ones."""
    keep(loop, list(range(len(positions))))


def forget_when_joined(add: Run, loop: Any, latents: Any) -> None:
    """An image that joins takes the latents of zero instead of its own."""
    add(loop, np.zeros_like(latents) if hasattr(loop, "begun") else latents)
    loop.begun = True


FAULTS = {
    "guidance of the first image": ("run_step", use_first_guidance),
    "coefficients of the first image": ("run_step", use_first_coefficients),
    "rows of another image": ("run_step", use_second_rows_for_third),
    "noise of another image": ("run_step", put_noise_first),
    "noise of the first step": ("run_step", keep_noise),
    "another image leaves": ("keep", keep_first),
    "an image that joins is lost": ("add", forget_when_joined),
}


@pytest.fixture(scope="module")
def bundle(bundles: dict[str, Path]) -> Bundle:
    return open_bundle(bundles["fp32"])


def judged(bundle: Bundle, kind: str, folder: Path) -> Rung:
    """The rung on ONNX Runtime's loop on the host, or on TensorRT's on the double of a device."""
    if kind == "host":
        return mixed_batch(Replay(bundle, OnnxRuntimeEngine(bundle, threads=1)), QUICK)
    machine = Machine()
    stored = stored_on(machine, bundle, folder / "plans", RECIPE)
    engine = TensorRtEngine(bundle, stored, machine.library, machine.cuda)
    rung = mixed_batch(Replay(bundle, engine), QUICK)
    engine.close()
    machine.check_closed()
    return rung


@pytest.mark.parametrize("kind", LOOPS)
def test_a_sound_loop_keeps_it(bundle: Bundle, kind: str, tmp_path: Path) -> None:
    """Images that join and leave, with samplers of their own, are what they are alone, on the host and on a device."""
    rung = judged(bundle, kind, tmp_path)
    assert rung.passed
    assert rung.value < 1e-6  # measured: 1.5e-7
    assert "3 images, 3 at once, dpmpp-3m ddpm ddim" in rung.detail


@pytest.mark.parametrize("kind", LOOPS)
@pytest.mark.parametrize("name", FAULTS)
def test_a_faulty_loop_breaks_it(
    bundle: Bundle, name: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loop that gives the step another image's numbers fails, on the host and on a device."""
    method, change = FAULTS[name]
    original = getattr(LOOPS[kind], method)
    monkeypatch.setattr(LOOPS[kind], method, lambda loop, *args: change(original, loop, *args))
    rung = judged(bundle, kind, tmp_path)
    assert not rung.passed
    assert "after row" in rung.detail
