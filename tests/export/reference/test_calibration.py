"""Calibration and the reference's own INT8, against plain loops over integers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from dit_export.checkpoints.checkpoint import checkpoint_at_sizes
from dit_export.checkpoints.sources import Checkpoint, Source, load_checkpoint
from dit_export.reference import calibration
from dit_export.reference.calibration import calibrate, count_calibration, find_factors, spec_for_checkpoint
from dit_export.reference.emulation import emulate_int8, linear_modules, norms_with_factors
from dit_export.reference.pipeline import Reference
from dit_export.reference.record_settings import CalibrationRequest

from dit_runtime.bundle.quantization import CalibrationSpec, linears_of
from dit_runtime.core.errors import CheckpointError, ParityError

SPEC = CalibrationSpec(seed=3, labels=(0, 9, 4), sampler="ddim", steps=2, guidance=1.5)


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def tiny(checkpoint: Path) -> Checkpoint:
    return load_checkpoint(Source(str(checkpoint)))


@pytest.fixture
def reference(tiny: Checkpoint) -> Reference:
    return Reference(tiny)


def test_ranges_are_those_of_the_inputs(reference: Reference) -> None:
    """Each timestep's range is the largest |x| that a layer reads there, in the images of every class and in null's."""
    advanced: list[int] = []
    found = calibrate([reference], SPEC, lambda name: True, lambda: advanced.append(1))
    assert len(advanced) == count_calibration(SPEC) == 2
    assert tuple(found.scales) == linears_of("adaln-zero", 2)
    seen: dict[str, list[float]] = {name: [] for name in found.scales}

    def see(name: str, inputs: tuple[torch.Tensor]) -> None:
        x = inputs[0] * found.factors.get(name, torch.ones(()))
        seen[name].append(max(map(abs, x.flatten().tolist())))

    for name, modules in linear_modules(reference).items():
        modules[-1].register_forward_pre_hook(lambda _, inputs, name=name: see(name, inputs))
    z = torch.stack([torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in (3, 4, 5)])
    labels = torch.tensor(SPEC.labels)
    for step in reference.loop("ddim", 2, []):
        e, v = reference.predict(z, torch.full((3,), step.t), labels, 1.5)
        z, _ = step.advance(e, v, z)
    assert np.array_equal(found.ranges[0], np.array(list(seen.values()), np.float32))
    assert found.timesteps.tolist() == [500.0, 0.0]
    for name, scale in found.scales.items():
        assert scale == np.float16(max(seen[name]) / 127)


def test_every_size_is_calibrated(tiny: Checkpoint, tmp_path: Path) -> None:
    """A scale is that of the largest range of all sizes; a record has its size's own, and the largest of all."""
    sized = checkpoint_at_sizes(tiny, ((32, 32), (48, 48)))
    references = [Reference(replace(sized, model=sized.at(size))) for size in sized.sizes]
    spec = replace(SPEC, steps=1)
    found = calibrate(references, spec, lambda _: True, lambda: None)
    assert len(found.ranges) == 2
    integers = emulate_int8(references[0], found.scales, found.factors)
    found.write(tmp_path / "record.npz", 1, integers, norms_with_factors(references[0], found.factors))
    with np.load(tmp_path / "record.npz") as record:
        largest = record["largest"]
        assert np.array_equal(record["ranges"], found.ranges[1])
        assert np.array_equal(record["scales"], np.float32(np.float16(largest / 127)))
    assert np.array_equal(largest, np.maximum(*(each.max(axis=1) for each in found.ranges)))
    assert all((each.max(axis=1) < largest).any() for each in found.ranges)  # neither size has all the largest


def test_parts_of_the_images_have_one_range(reference: Reference, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images that do not fit into one evaluation are calibrated as if they did: each with its own noise."""
    spec = replace(SPEC, steps=1)
    together = calibrate([reference], spec, lambda name: True, lambda: None)
    monkeypatch.setattr(calibration, "TOGETHER", 2)
    apart = calibrate([reference], spec, lambda name: True, lambda: None)
    assert count_calibration(spec) == 2
    assert np.allclose(apart.ranges[0], together.ranges[0], rtol=1e-5)
    assert apart.ranges[0].shape == (8, 1)


def test_a_seed_gives_the_same_ranges(reference: Reference) -> None:
    """The same seed and labels give the same ranges, another seed other ones."""
    first, again, other = (
        calibrate([reference], CalibrationSpec(seed, (0, 9), "ddim", 1, 1.5), lambda name: True, lambda: None).ranges[0]
        for seed in (0, 0, 1)
    )
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_all_classes_are_calibrated(tiny: Checkpoint) -> None:
    """All of a few classes; fewer when asked for fewer, spread over them; never one of several."""
    assert spec_for_checkpoint(tiny, CalibrationRequest()).labels == tuple(range(10))
    asked = spec_for_checkpoint(tiny, CalibrationRequest(seed=5, images=3))
    assert (asked.labels, asked.seed, asked.steps) == ((0, 4, 9), 5, 50)
    with pytest.raises(CheckpointError, match="calibration on 1 image, which is one of 10 classes"):
        spec_for_checkpoint(tiny, CalibrationRequest(images=1))


def test_factors_even_channels_out() -> None:
    """Powers of 2 about the root of weight over input, whose mean is 1, and none beyond the bounds or of no input."""
    inputs, weights = torch.tensor([1.0, 16.0, 1.0, 1.0]), torch.tensor([1.0, 1.0, 16.0, 1.0])
    assert find_factors(inputs, weights).tolist() == [1.0, 0.25, 4.0, 1.0]
    assert find_factors(torch.tensor([0.0, 1.0, 1e30]), torch.ones(3)).tolist() == [1.0, 64.0, 2.0**-6]
    assert find_factors(torch.ones(3), torch.tensor([1.0, 3.0, 1.0])).tolist() == [1.0, 2.0, 1.0]


def test_numbers_that_are_not_finite(reference: Reference) -> None:
    """NaN inside the model is named with its layer and timestep, and not taken as a range."""
    modules = linear_modules(reference)
    modules["blocks.1.mlp.fc1"][0].bias = torch.nn.Parameter(
        torch.full_like(modules["blocks.1.mlp.fc1"][0].bias, torch.nan)
    )
    with pytest.raises(ParityError, match=r"not finite at timestep 500, first in the input of blocks.1.mlp.fc2"):
        calibrate([reference], SPEC, lambda name: True, lambda: None)


def test_an_input_that_is_always_zero(reference: Reference) -> None:
    """A layer that reads only zeros has no scale: it is named, unless it stays FP16."""
    attention = reference.blocks[0].attn1.to_v
    attention.weight.data.zero_()
    attention.bias.data.zero_()
    with pytest.raises(CheckpointError, match=r"input of blocks.0.attn.proj is 0 .* --keep-fp16 blocks.0.attn.proj"):
        calibrate([reference], SPEC, lambda name: True, lambda: None)
    kept = calibrate([reference], SPEC, lambda name: name != "blocks.0.attn.proj", lambda: None)
    assert kept.scales["blocks.0.attn.proj"] > 0


def test_the_emulation_multiplies_integers(reference: Reference) -> None:
    """A layer's output is the product of rounded integers, scaled: computed here in whole numbers."""
    name = "blocks.1.mlp.fc2"
    (module,) = linear_modules(reference)[name]
    weight, bias = module.weight.double().numpy().copy(), module.bias.double().numpy().copy()
    x = torch.linspace(-3, 3, 2 * 256).reshape(2, 256)
    scale = float(np.float16(2.5 / 127))  # some of x are beyond it
    factors = 2.0 ** (torch.arange(256) % 5 - 2)
    emulate_int8(reference, {name: scale}, {name: factors})
    weight, even = weight / factors.double().numpy(), (x * factors).double().numpy()
    by_row = (np.abs(weight).max(axis=1) / 127).astype(np.float16).astype(float)
    whole = np.clip(np.round(even / scale), -128, 127).astype(np.int64)
    rows = np.round(weight / by_row[:, None]).astype(np.int64)
    expected = (whole @ rows.T) * by_row * scale + bias
    assert np.abs(module(x).numpy() - expected).max() <= 1e-5 * np.abs(expected).max()  # measured: 1.4e-7
    assert np.abs(module(x.double()).numpy() - expected).max() <= 1e-7 * np.abs(expected).max()


def test_a_kept_layer_is_not_emulated(reference: Reference, tiny: Checkpoint) -> None:
    """Only the layers that have a scale change; the others give the FP32 model's numbers bit by bit."""
    other, x = Reference(tiny), torch.randn(1, 16, 64, generator=torch.Generator().manual_seed(0))
    emulate_int8(reference, {"blocks.0.attn.qkv": 0.02}, {})
    mine, originals = linear_modules(reference), linear_modules(other)
    for name in mine:
        if mine[name][0].in_features != 64:
            continue
        same = torch.equal(mine[name][0](x), originals[name][0](x))
        assert same == (name != "blocks.0.attn.qkv")
