"""Guidance against the paper's formula, e = ε_∅ + s·Σᵢ wᵢ·(ε_i − ε_∅), in a loop written by hand.

The reference is diffusers' transformer and scheduler, each image alone, with s(τ) written out again from the papers
(Ho & Salimans 2022, Kynkäänniemi et al. 2024, Wang et al. 2024, Liu et al. 2022); it shares nothing with the weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.guidance import NULL, Scale, Wanted, constant, recorded, reference_latents, relative, within
from support.optional import diffusers, torch
from support.schedules import DIFFUSION, LEARNED, official_timesteps

from dit_runtime import Pipeline, schedule_for
from dit_runtime.backends.onnxruntime.engine import OnnxRuntimeEngine
from dit_runtime.bundle.reader import Bundle
from dit_runtime.core.errors import SamplingError
from dit_runtime.samplers.guidance import Guidance, branches_from_labels
from dit_runtime.sampling.labels import weights_from_label
from dit_runtime.sampling.settings import Settings

# max|Δ| of the last latents, relative to the reference's largest.
LATENTS_LIMIT = 1e-5  # measured: 1.9e-6


def linear(s: float) -> Scale:
    return lambda tau: 1 + (s - 1) * 2 * (1 - tau)


def cosine(s: float) -> Scale:
    return lambda tau: 1 + (s - 1) * (1 + math.cos(math.pi * tau))


def latents(pipe: Pipeline, labels: Sequence[Any], seeds: Sequence[int], **sampling: Any) -> np.ndarray:
    *_, (_, last, _) = pipe.trajectory(labels, seeds, **sampling)
    return last


def assert_reference(pipe: Pipeline, transformer: Any, wanted: Sequence[Wanted], steps: int, **sampling: Any) -> None:
    """The pipeline's latents of these images, made in one batch, are the reference's."""
    reference = {key: sampling[key] for key in ("sampler", "eta") if key in sampling}
    expected = reference_latents(transformer, wanted, steps, **reference)
    labels, seeds = [dict(image.labels) for image in wanted], [image.seed for image in wanted]
    found = latents(pipe, labels, seeds, steps=steps, **{"sampler": "ddim", **sampling})
    assert relative(found, expected) <= LATENTS_LIMIT


def test_each_image_has_its_own_scale(pipe: Pipeline, transformer: Any) -> None:
    """Fails if a batch of different scales (none, unconditional, below 1, strong) mixes up any of its images."""
    scales, labels = [1.0, 0.0, 0.3, 2.5, 7.0], [3, 0, 9, 5, 3]
    wanted = [
        Wanted({label: 1.0}, 20 + i, constant(s)) for i, (label, s) in enumerate(zip(labels, scales, strict=True))
    ]
    assert_reference(pipe, transformer, wanted, 12, guidance=scales)


def test_a_scale_below_one_is_not_ignored(checkpoint: Path, pipe: Pipeline, transformer: Any) -> None:
    """Fails if s ≤ 1 is conditional sampling as in DiTPipeline, which guides above 1 only: here it is the formula."""
    reference = diffusers.DiTPipeline.from_pretrained(checkpoint)
    reference.set_progress_bar_config(disable=True)
    ignored = reference([4], guidance_scale=0.4, generator=torch.Generator().manual_seed(3), num_inference_steps=8)
    unguided, guided = (reference_latents(transformer, [Wanted({4: 1.0}, 3, constant(s))], 8) for s in (1.0, 0.4))
    assert np.abs(np.asarray(ignored.images[0]).astype(int) - pipe.decode(unguided)[0]).max() <= 1
    assert relative(latents(pipe, [4], [3], steps=8, guidance=0.4, sampler="ddim"), guided) <= LATENTS_LIMIT
    assert relative(unguided, guided) > 0.01  # measured: 0.054


@pytest.mark.parametrize(("guidance", "branch"), [(0.0, NULL), (1.0, 4)])
def test_no_guidance_costs_one_branch(pipe: Pipeline, transformer: Any, guidance: float, branch: int) -> None:
    """Fails if scale 0 is not the null class alone, or scale 1 the label alone, in half the work."""
    with recorded(pipe) as calls:
        found = latents(pipe, [4], [1], steps=6, guidance=guidance, sampler="ddim")
    assert calls == [(1, 1)] * 6
    assert relative(found, reference_latents(transformer, [Wanted({branch: 1.0}, 1)], 6)) <= LATENTS_LIMIT


def test_the_interval_is_in_noise_time(pipe: Pipeline, transformer: Any) -> None:
    """Fails if guidance acts outside its interval, or the steps there cost a second branch."""
    taus = np.arange(900, -1, -100) / 999
    inside = (taus >= 0.3) & (taus <= 0.7)
    wanted = [
        Wanted({4: 1.0}, 5, within(0.3, 0.7, constant(3.0))),
        Wanted({7: 1.0}, 6, within(0.3, 0.7, constant(2.0))),
    ]
    with recorded(pipe) as calls:
        assert_reference(pipe, transformer, wanted, 10, guidance=[3.0, 2.0], guidance_interval=(0.3, 0.7))
    assert calls == [(2, 2) if guided else (1, 2) for guided in inside]
    assert 0 < inside.sum() < 10


@pytest.mark.parametrize(("edge", "guided"), [(0.0, 4), (1.0, 0)])
def test_the_intervals_ends_are_inside(pipe: Pipeline, edge: float, guided: int) -> None:
    """Fails if the noise times 0 (the last step) and 1 (the first) are left out of an interval that ends there."""
    with recorded(pipe) as calls:
        latents(pipe, [4], [5], steps=5, sampler="ddpm", guidance=2.0, guidance_interval=(edge, edge))
    assert calls == [(2 if index == guided else 1, 1) for index in range(5)]


@pytest.mark.parametrize(("shape", "formula"), [("linear", linear), ("cosine", cosine)])
def test_guidance_schedules(pipe: Pipeline, transformer: Any, shape: str, formula: Callable[[float], Scale]) -> None:
    """Fails if the scale does not follow its schedule over the noise time, with and without an interval."""
    wanted = [Wanted({2: 1.0}, 8, formula(3.0)), Wanted({6: 1.0}, 9, formula(0.5))]
    assert_reference(pipe, transformer, wanted, 10, guidance=[3.0, 0.5], guidance_schedule=shape)
    cut = [replace(image, scale=within(0.2, 0.8, image.scale)) for image in wanted]
    interval: dict[str, Any] = {"guidance_interval": (0.2, 0.8), "guidance_schedule": shape}
    assert_reference(pipe, transformer, cut, 10, guidance=[3.0, 0.5], **interval)


@pytest.mark.parametrize("shape", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 4.0])
def test_a_schedule_keeps_the_mean_scale(shape: str, scale: float) -> None:
    """Fails if a schedule guides more or less on average than the scale that was asked for."""
    middles = (np.arange(1000) + 0.5) / 1000
    assert abs(Guidance(scale, shape=shape).scales(middles).mean() - scale) <= 1e-12  # measured: 1.8e-15
    assert Guidance(scale, shape=shape).scales(np.array([1.0])) == pytest.approx(1.0 if shape != "constant" else scale)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
@pytest.mark.parametrize("labels", [{3: 0.7, 5: 0.3}, {5: 0.3, 3: 0.7}, {1: 1.0, 8: 0.75, 2: -0.5}])
def test_several_labels(pipe: Pipeline, transformer: Any, sampler: str, labels: dict[int, float]) -> None:
    """Fails if composed labels are not summed with their weights, or v is not the first label's (DDPM's noise)."""
    wanted = [Wanted(labels, 30, constant(2.0)), Wanted({4: 1.0}, 31, constant(3.0))]
    assert_reference(pipe, transformer, wanted, 10, sampler=sampler, guidance=[2.0, 3.0])


def test_labels_are_named_with_their_weights(pipe: Pipeline) -> None:
    """Fails if numbers, names, text and weights of one mixture do not mean the same, the first label first."""
    found = [
        weights_from_label(label, pipe.manifest)
        for label in ("3:0.75+5:0.25", "class 3:0.75 + kind 5:0.25", {"kind 3": 0.75, 5: 0.25}, {3: 0.75, "5": 0.25})
    ]
    assert [list(weights.items()) for weights in found] == [[(3, 0.75), (5, 0.25)]] * 4
    assert weights_from_label("Class 1+9", pipe.manifest) == {1: 0.5, 9: 0.5}
    assert all(weights_from_label(label, pipe.manifest) == {7: 1.0} for label in ("7", 7, "class 7"))


def test_classes_of_one_name(pipe: Pipeline) -> None:
    """ImageNet has two cranes: the error has their numbers. For an unknown name the error has what is near it."""
    names = ("crane", "tench, Tinca tinca", "golden retriever", *map(str, range(3, 9)), "Crane, a bird")
    manifest = replace(pipe.manifest, class_names=names)
    for label in ("crane", "CRANE ", "crane+tench", {"crane": 1.0}):
        with pytest.raises(SamplingError, match=r"label 'crane ?': 2 classes have that name, 0, 9; expected one of"):
            weights_from_label(label if isinstance(label, dict) else label.lower(), manifest)
    assert weights_from_label("a bird", manifest) == {9: 1.0}
    for label, near in (
        ("golden retreiver", "golden retriever$"),
        ("tinca", "tench, Tinca tinca$"),
        ("xyz", "crane; tench"),
    ):
        with pytest.raises(SamplingError, match=f"0 classes have that name; expected a number or one of: {near}"):
            weights_from_label(label, manifest)


def test_weights_of_one_need_no_null_branch(pipe: Pipeline) -> None:
    """Fails if the rounding of 0.7 + 0.2 + 0.1 costs a null branch, or a sum other than 1 goes without one."""
    for labels, branch_count in (("0:0.7+1:0.2+2:0.1", 3), ("0:0.7+1:0.2", 3), ("0:0.5+1:0.5", 2)):
        with recorded(pipe) as calls:
            latents(pipe, [labels], [0], steps=2, guidance=1.0, sampler="ddim")
        assert calls == [(branch_count, 1)] * 2


def test_a_negative_label(pipe: Pipeline, transformer: Any) -> None:
    """Fails if guidance away from a class still goes away from the null class."""
    wanted = [Wanted({2: 1.0}, 40, constant(2.5), against=6), Wanted({1: 0.6, 3: 0.4}, 41, constant(0.0), against=6)]
    assert_reference(pipe, transformer, wanted, 10, guidance=[2.5, 0.0], negative_label="kind 6")


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_three_guided_channels(bundles: dict[str, Path], transformer: Any, sampler: str) -> None:
    """Fails if a model that guides three of four channels (the official code) has its fourth guided, or mixed."""
    bundle = Pipeline(bundles["fp32"], "onnxruntime").bundle
    manifest = replace(bundle.manifest, diffusion=replace(bundle.manifest.diffusion, guidance_channels=3))
    three = Pipeline(Bundle(bundle.path, manifest, bundle.digest), OnnxRuntimeEngine(bundle, threads=1))
    wanted = [Wanted({4: 1.0}, 50, constant(3.0)), Wanted({2: 0.6, 7: 0.4}, 51, constant(0.5))]
    expected = reference_latents(transformer, wanted, 10, sampler, guided=3)
    found = latents(three, [4, {2: 0.6, 7: 0.4}], [50, 51], steps=10, guidance=[3.0, 0.5], sampler=sampler)
    assert relative(found, expected) <= LATENTS_LIMIT


def test_weights_of_three_guided_channels() -> None:
    """Fails if the first label does not give the unguided channel whole, with nothing of the others."""
    schedule = schedule_for("ddim", LEARNED, DIFFUSION, 4)
    found = branches_from_labels(
        {3: 0.75, 5: 0.25}, Guidance(2.0), schedule, LEARNED, replace(DIFFUSION, guidance_channels=3)
    )
    assert found.labels.tolist() == [3, 5, NULL]
    assert found.weights.dtype == np.float32
    assert found.weights.tolist() == [[[1.5, 1.5, 1.5, 1], [0.5, 0.5, 0.5, 0], [-1, -1, -1, 0]]] * 4
    assert found.needed.tolist() == [3] * 4


@given(
    labels=st.dictionaries(st.integers(0, 9), st.floats(-2, 2), min_size=1, max_size=4),
    scale=st.floats(0.01, 20),
    ends=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    shape=st.sampled_from(["constant", "linear", "cosine"]),
    guided=st.sampled_from([3, 4]),
)
@settings(max_examples=100, deadline=None)
def test_weights_are_the_formula(
    labels: dict[int, float], scale: float, ends: tuple[float, float], shape: str, guided: int
) -> None:
    """Fails if any labels, scale, interval or schedule give weights other than the formula's, or drop one."""
    low, high = sorted(ends)
    schedule = schedule_for("ddpm", LEARNED, DIFFUSION, 7)
    spec = replace(DIFFUSION, guidance_channels=guided)
    found = branches_from_labels(labels, Guidance(scale, (low, high), shape), schedule, LEARNED, spec)
    plain = within(low, high, {"constant": constant, "linear": linear, "cosine": cosine}[shape](scale))
    for index, t in enumerate(official_timesteps(7)[::-1]):
        s, needed = plain(t / 999), int(found.needed[index])
        weights = np.zeros((len(labels) + 1, 4))
        weights[: len(labels), :guided] = s * np.array(list(labels.values()))[:, None]
        weights[-1, :guided] = 1 - s * sum(labels.values())
        weights[0, guided:] = 1
        used = np.zeros_like(weights)
        used[:needed] = found.weights[index, :needed]
        assert np.abs(used - weights).max() <= 1e-6 * max(1.0, np.abs(weights).max())
        assert found.labels[:needed].tolist() == [*labels, NULL][:needed]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"guidance": math.nan}, "guidance nan: expected a number from 0"),
        ({"guidance": math.inf}, "guidance inf"),
        ({"guidance": -0.5}, r"guidance -0\.5"),
        ({"guidance": [1.0, math.nan]}, "guidance nan"),
        ({"guidance_interval": (0.7, 0.3)}, r"guidance interval 0\.7 to 0\.3: expected 0 ≤ LO ≤ HI ≤ 1"),
        ({"guidance_interval": (-0.1, 0.5)}, r"interval -0\.1 to 0\.5"),
        ({"guidance_interval": (0.5, 1.5)}, r"interval 0\.5 to 1\.5"),
        ({"guidance_interval": (math.nan, 0.5)}, "interval nan"),
        ({"guidance_interval": (0.0, math.nan)}, "interval 0 to nan"),
        ({"guidance_schedule": "quadratic"}, "'quadratic' is unknown; choose one of constant, linear, cosine"),
        ({"guidance": 0.0, "sampler": "ddpm"}, "guidance 0 with sampler ddpm: the variance"),
        ({"guidance": [2.0, 0.0], "sampler": "ddpm"}, "guidance 0 with sampler ddpm"),
        ({"guidance": [1.0, 2.0, 3.0]}, "3 guidance scales for 2 labels"),
        ({"guidance": [1.0]}, "1 guidance scales for 2 labels"),
        ({"negative_label": 10}, "label 10: expected 0 to 9"),
        ({"negative_label": "cat"}, "label 'cat': 0 classes"),
    ],
)
def test_guidance_that_is_refused(pipe: Pipeline, settings: dict[str, Any], message: str) -> None:
    """Fails if guidance that has no meaning is sampled with, or refused without what was got and expected."""
    with pytest.raises(SamplingError, match=message) as refusal:
        pipe.trajectory([1, 2], **{"sampler": "ddim", **settings})
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ("3:0.5+3:0.5", "names a class twice"),
        ("3:0.5+kind 3:0.5", "distinct classes"),
        ("3:half+5:half", r"expected LABEL:WEIGHT\+LABEL:WEIGHT"),
        ("3:nan+5:0.5", "finite weights"),
        ("3:0.5+cat:0.5", "label 'cat': 0 classes"),
        ("3:0.5+10:0.5", "label 10: expected 0 to 9"),
        ("3;0.5", "0 classes"),
        ("3:0.7+5", r"expected LABEL:WEIGHT\+LABEL:WEIGHT"),
        ("²", "label '²': 0 classes"),
        ("3:0.5+--5:0.5", "label '--5': 0 classes"),
        ("9" * 5000, "0 classes"),
        (3.5, "label 3.5: expected a class number or name"),
        (None, "label None: expected a class number or name"),
        ({}, "distinct classes with finite weights"),
        ({3: math.inf}, "finite weights"),
    ],
)
def test_labels_that_are_refused(pipe: Pipeline, label: Any, message: str) -> None:
    """Fails if a mixture that names nothing, or a class twice, is sampled."""
    with pytest.raises(SamplingError, match=message):
        pipe.trajectory([label])


def test_numpys_numbers_and_none(pipe: Pipeline) -> None:
    """Fails if a number of numpy's is not one, or None is not the default that ``Settings`` says it is."""
    nothing = dict.fromkeys(Settings.__annotations__)
    (found,) = pipe.prepare([np.int64(3)], np.int64(7), **nothing)
    (wanted,) = pipe.prepare([3], [7])
    assert (found.labels, found.seed, found.guidance) == (wanted.labels, wanted.seed, wanted.guidance)
    assert (found.noise_device, found.noise_dtype) == ("cpu", "float32")
    assert found.schedule.coefficients.tobytes() == wanted.schedule.coefficients.tobytes()
    images = pipe.prepare([1, 2], np.array([5, 6]), guidance=np.array([2, 3.5], np.float32))
    assert [(image.seed, image.guidance.scale) for image in images] == [(5, 2), (6, 3.5)]
    assert pipe.prepare([1], guidance=np.float32(2.5))[0].guidance.scale == 2.5


def test_scale_zero_needs_every_channel_guided() -> None:
    """Fails if scale 0 leaves out the conditional branch that an unguided channel still needs."""
    schedule = schedule_for("ddim", LEARNED, DIFFUSION, 4)
    with pytest.raises(SamplingError, match="channels that are not guided"):
        branches_from_labels({3: 1.0}, Guidance(0.0), schedule, LEARNED, replace(DIFFUSION, guidance_channels=3))
    assert branches_from_labels({3: 1.0}, Guidance(0.0), schedule, LEARNED, DIFFUSION).labels.tolist() == [NULL]


def test_a_model_without_null_class_is_not_guided() -> None:
    """Fails if a class is taken for the null class: only a class that is named can be guided away from."""
    model = replace(LEARNED, has_null=False)
    schedule = schedule_for("ddim", model, DIFFUSION, 4)
    for labels, scale in (({3: 1.0}, 4.0), ({3: 1.0}, 0.0), ({3: 1.0}, 0.5), ({3: 0.7, 5: 0.7}, 1.0)):
        with pytest.raises(SamplingError, match="this model has no null class to guide away from; use guidance 1"):
            branches_from_labels(labels, Guidance(scale), schedule, model, DIFFUSION)
        assert branches_from_labels(labels, Guidance(scale), schedule, model, DIFFUSION, negative=7).labels[-1] == 7
    for labels in ({3: 1.0}, {3: 0.7, 5: 0.3}):
        found = branches_from_labels(labels, Guidance(1.0), schedule, model, DIFFUSION)
        assert found.labels.tolist() == list(labels)
