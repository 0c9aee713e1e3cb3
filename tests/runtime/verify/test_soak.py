"""A soak finds what is wrong at some work alone, makes that work small, and says how to do it again."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from support import soak_engines
from support.commands import run_command
from support.engines import info_of

from dit_runtime.backends.open import BACKENDS
from dit_runtime.bundle.reader import Bundle, open_bundle
from dit_runtime.commands.soak import duration
from dit_runtime.core.errors import SamplingError
from dit_runtime.samplers.by_name import DIFFUSION_SAMPLERS
from dit_runtime.verify.soak import soak
from dit_runtime.verify.soak_cases import SoakCase, SoakImage, cases_from_json, draw_case, json_from_cases, takes
from dit_runtime.verify.soak_host import DisturbedSession, Hosts
from dit_runtime.verify.soak_run import run_cases
from dit_runtime.verify.soak_shrink import shrink

ONE = SoakImage("ddim")
# A fault, and the kind of failure and the smallest case that has it.
FAULTS = {
    "wrong_at_batch_3": ("latents", SoakCase((ONE,) * 3, batch=3)),
    "stale_after_a_larger_batch": ("latents", SoakCase((ONE,) * 3, batch=2)),
    "one_thread_alone": ("error", SoakCase((ONE,), threads=2)),
    "decoder_after_a_release": ("images", SoakCase((ONE,), repeats=2, releases=("decoder",), decoded=1)),
    "step_after_a_release": ("repeat", SoakCase((ONE,), repeats=2, releases=("step",))),
}
WITHIN = 12  # cases


@pytest.fixture(scope="module")
def bundle(bundles: dict[str, Path]) -> Bundle:
    return open_bundle(bundles["fp32"])


@pytest.fixture
def seeded(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The engine ``faulty``, whose backend a test sets."""
    module = ModuleType("faulty")
    monkeypatch.setitem(sys.modules, "faulty", module)
    monkeypatch.setitem(BACKENDS, "faulty", "faulty")
    return module


@pytest.mark.parametrize("name", FAULTS)
def test_it_finds(name: str, bundles: dict[str, Path], seeded: ModuleType) -> None:
    """Each fault within a few cases; what is printed is the smallest case, and the command fails in the same way."""
    vars(seeded)["BACKEND"] = soak_engines.backend_with(getattr(soak_engines, name))
    done = run_command("dit-verify", bundles["fp32"], "--engine", "faulty", "--soak", "1m", "--json")
    assert done.returncode == 1, done.stderr
    found, (kind, smallest) = json.loads(done.stdout), FAULTS[name]
    assert (found["passed"], found["failure"]["kind"]) == (False, kind)
    assert found["case"] < WITHIN
    assert cases_from_json(found["shrunk"], open_bundle(bundles["fp32"]).manifest) == (smallest,)
    again = run_command(*shlex.split(found["command"]))
    assert (again.returncode, again.stdout[: len(kind) + 6]) == (1, f"FAIL: {kind}")
    vars(seeded)["BACKEND"] = soak_engines.backend_with(soak_engines.sound)
    assert run_command(*shlex.split(found["command"])).returncode == 0


def test_it_finds_a_wrong_mixture(bundle: Bundle) -> None:
    """Of an image that guides with two labels nothing else is left, since two branches do not show it."""
    found = soak(bundle, lambda at: soak_engines.FaultyEngine(at, soak_engines.third_branch_ignored), 60, 0, WITHIN)
    assert found.failure is not None
    assert found.shrunk is not None
    ((image,),) = (case.images for case in cases_from_json(found.shrunk, bundle.manifest))
    assert len(image.labels) == 2
    assert (image.sampler, image.steps, image.guidance, image.seed) == ("ddim", 1, 2.0, 0)


class Cancelling:
    """A step whose network predicts all but a hundredth of its latents, as trained ones do in pure noise."""

    def run(self, inputs: dict[str, np.ndarray], outputs: list[str]) -> list[np.ndarray]:
        (row,), (z,) = inputs["coefficients"], inputs["state"][:, 0]
        e = 0.99 * z
        found = {"denoised": row[0] * z + row[1] * e, "next_state": np.stack([n * z + n * e for n in row[11:14]])}
        return [found[name][None] for name in outputs]


@pytest.mark.parametrize("weight", [1.0, 4.0])
def test_an_error_that_the_sampler_multiplies_counts(weight: float) -> None:
    """One step from pure noise divides the network's error by a signal of nearly 0, in the slots and in ``denoised``;
    guidance multiplies it before."""
    size, factor = 1e-3, -157.0
    row = np.zeros((1, 17), np.float32)
    row[:, [0, 1, 11, 12]] = -factor, factor, factor, 2.0
    z = np.random.default_rng(0).standard_normal((4, 8, 8)).astype(np.float32)
    state = np.stack([z, z, z])[None]
    guidance = np.array([weight, 1 - weight], np.float32)[:, None, None] * np.ones((2, 1, 4), np.float32)
    session = DisturbedSession(Cancelling(), size, np.random.default_rng(1))  # type: ignore[arg-type]
    inputs = {"state": state, "coefficients": row, "guidance": guidance}
    denoised, next_state = session.run(inputs, ["denoised", "next_state"])
    # Of the latents' own noise only 157/100 is left.
    error = np.abs(denoised[0] + factor * 0.01 * z).max() / np.abs(z).max()
    gain = abs(weight) + abs(1 - weight)
    assert 0.9 * 157 * size * gain < error < 1.05 * 157 * size * gain
    assert np.abs(next_state[0, 2]).max() == 0  # a slot that the network has no part in


@pytest.mark.slow  # as many cases as it takes to judge memory
def test_it_finds_memory_that_is_kept(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine whose results are right, and whose memory grows with every step; cases enough to judge it are few."""
    monkeypatch.setattr("dit_runtime.verify.soak.LEAST_CASES", 16)
    limit = 16 << 20

    def open_at(at: Bundle) -> soak_engines.FaultyEngine:
        return soak_engines.FaultyEngine(at, soak_engines.keeps_memory)

    found = soak(bundle, open_at, 60, 0, 20, limit)
    assert found.failure is not None
    assert (found.failure.kind, found.cases) == ("memory", 16)
    assert found.shrunk is not None
    (case,) = cases_from_json(found.shrunk, bundle.manifest)
    assert case.images == (ONE,)
    again = run_cases(bundle, open_at, [case], Hosts(), memory_bytes=limit)
    assert again is not None
    assert again.kind == "memory"


def test_a_sound_engine_passes(bundles: dict[str, Path], seeded: ModuleType) -> None:
    """The text says what ran; the same seed runs the same cases."""
    vars(seeded)["BACKEND"] = soak_engines.backend_with(soak_engines.sound)
    done = run_command("dit-verify", bundles["fp32"], "--engine", "faulty", "--soak", "1.5s", "--seed", "3")
    assert done.returncode == 0, done.stdout
    assert done.stdout.splitlines()[-1] == "pass: the engine gave the host's results"
    assert "seed 3: " in done.stdout
    assert "repeats are bit-equal" in done.stdout


def test_sizes_and_start_images(sized_bundle: Path) -> None:
    """Cases at a size of their own, and images that start from an image through the encoder."""
    bundle = open_bundle(sized_bundle)
    images = (SoakImage("ddim", 4, strength=0.5), SoakImage("unipc", 3, guidance=2.0))
    cases = [SoakCase(images, size, 2, decoded=2) for size in ((32, 48), (48, 48))]

    def flipped(memory: dict, graph: str, inputs: dict, run: soak_engines.Run) -> list[np.ndarray]:
        return [one[..., ::-1] for one in run()] if graph == "encoder" else run()

    for fault, expected in ((soak_engines.sound, None), (flipped, "encoder")):
        found = run_cases(bundle, lambda at, fault=fault: soak_engines.FaultyEngine(at, fault), cases, Hosts())
        assert (found and found.kind) == expected


def test_cases_are_legal(bundle: Bundle) -> None:
    """Every case is one that the engine takes, is the same whenever it is drawn, and survives JSON; together they
    visit every sampler."""
    info, manifest = info_of("small", max_batch=3), bundle.manifest
    cases = [draw_case(7, index, manifest, info, None) for index in range(40)]
    assert cases == [draw_case(7, index, manifest, info, None) for index in range(40)]
    assert max(case.batch for case in cases) == 3
    assert all(takes(info, case.batch, 1) for case in cases)
    assert cases_from_json(json_from_cases(cases), manifest) == tuple(cases)
    assert {image.sampler for case in cases for image in case.images} == set(DIFFUSION_SAMPLERS)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not JSON"),
        ("[]", "an empty list"),
        ("3", "got 3, expected an object"),
        ('{"images": []}', "0 images"),
        ('{"images": [{}]}', "sampler: missing"),
        ('{"images": [{"sampler": "ddim", "step": 1}]}', "step: unknown"),
        ('{"images": [{"sampler": "euler"}]}', "sampler euler with a model of"),
        ('{"images": [{"sampler": "ddim", "labels": [[10, 1]]}]}', "label 10"),
        ('{"images": [{"sampler": "ddim"}], "batch": 0}', "batch: got 0"),
        ('{"images": [{"sampler": "ddim"}], "releases": ["probe"]}', "releases 'probe'"),
        ('{"images": [{"sampler": "ddim", "strength": 0.5}]}', "has no encoder"),
    ],
)
def test_a_wrong_case_is_refused(bundle: Bundle, text: str, said: str) -> None:
    with pytest.raises(SamplingError, match=r"^soak case: |^sampler |^label ") as error:
        cases_from_json(text, bundle.manifest)
    assert said in str(error.value)


def test_times() -> None:
    assert [duration(text) for text in ("90", "90s", "1.5m", "2h")] == [90, 90, 90, 7200]


@pytest.mark.parametrize("text", ["", "m", "0", "-1s", "nan", "inf", "1e9h", " 1", "10 m", "1d"])
def test_a_wrong_time_is_refused(text: str) -> None:
    done = run_command("dit-verify", "my.bundle", f"--soak={text}")
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert "expected a time such as 90s, 10m or 1h" in done.stderr


@pytest.mark.parametrize("option", ["--quick", "--size=32x32", "--report=page.html", "--soak-case={}"])
def test_options_that_it_does_not_heed_are_refused(option: str) -> None:
    done = run_command("dit-verify", "my.bundle", "--soak", "1m", option)
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert "takes --engine, --precision, --seed" in done.stderr


def test_shrinking_keeps_earlier_cases_that_matter() -> None:
    """A case that fails after another one alone comes out with that one, each as small as it can be."""
    large = SoakCase((SoakImage("unipc", 5, seed=4), SoakImage("ddpm", 7)), batch=2)

    def fails(cases: tuple[SoakCase, ...]) -> bool:
        return len(cases) > 1 and any(len(case.images) == 2 for case in cases[:-1])

    assert shrink((large,) * 4, fails, "ddim") == (SoakCase((ONE, ONE)), SoakCase((ONE,)))
