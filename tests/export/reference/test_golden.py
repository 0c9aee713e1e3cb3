"""Golden records: reproducible, small, made by the unpatched reference, and refused where the reference is no use."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from dit_export.checkpoints.sources import Source, load_checkpoint
from dit_export.reference.golden import PARTS, _record_trajectory, check_records
from dit_export.reference.loops import OfficialDiffusion, diffusers_ddpm
from dit_export.reference.magnitudes import magnitudes_of
from dit_export.reference.pipeline import Reference
from dit_export.reference.record_settings import RecordSettings
from torch import Tensor

from dit_runtime.bundle.reader import open_bundle
from dit_runtime.core.errors import ParityError
from dit_runtime.verify.metrics import relative_l2

EXPORTERS = ("dit_export.graphs", "dit_export.bundle")


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> Reference:
    return Reference(load_checkpoint(Source(str(checkpoint))))


def asked(reference: Reference) -> Tensor:
    """A guided prediction."""
    z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    with torch.inference_mode():
        e, _ = reference.predict(z.to(reference.table_dtype), torch.tensor([900, 20]), torch.tensor([1, 7]), 4.0)
    return e


def test_two_exports_have_the_same_records(bundles: dict[str, Path]) -> None:
    """Records come from seeds alone: two exports, here of two precisions, have the same hashes and the same floors."""
    first, second = (open_bundle(bundles[name]).manifest for name in ("fp32", "fp16"))
    golden = {name: spec.sha256 for name, spec in first.files.items() if name.startswith("golden")}
    assert len(golden) == 10
    assert golden == {name: second.files[name].sha256 for name in golden}
    assert first.floors == second.floors
    assert first.magnitudes == second.magnitudes


@pytest.mark.parametrize(
    ("name", "size", "expected"),
    [
        ("DiT-XL/2-256", 0, (1, 4, 2, 1, 2)),
        ("DiT-XL/2-256", 1, (1, 4, 2, 1, 2)),
        ("DiT-S/2-256", 0, (2, 20, 4, 2, 20)),
        ("DiT-S/2-256", 1, (2, 10, 2, 1, 10)),
    ],
)
def test_how_much_is_recorded_of_large_models(name: str, size: int, expected: tuple[int, ...]) -> None:
    """Images, steps and forwards; of how many trajectories PyTorch's errors are measured by steps, and how many."""
    checkpoint = load_checkpoint(Source(name, 0, image_sizes=((256, 256), (512, 512))))
    checkpoint = replace(checkpoint, model=checkpoint.at(checkpoint.sizes[size]))
    settings = RecordSettings.for_checkpoint(checkpoint, "fp16")
    assert (
        settings.images,
        settings.steps,
        settings.forward_images,
        settings.measured,
        settings.measured_steps,
    ) == expected


def test_every_step_has_a_floor(bundles: dict[str, Path]) -> None:
    """Of both trajectories, of the one without guidance, and of the image, in each precision."""
    wanted = {"ddim": 50, "ddpm": 50, "ddim step": 50, "ddpm denoised": 50, "unguided": 50, "image": 4}
    wanted |= {"strong": 50, "strong image": 2, "conditions": 1}
    for floors in open_bundle(bundles["fp32"]).manifest.floors.values():
        assert {name: len(floors[name]) for name in wanted} == wanted


def test_the_reference_process_has_no_graphs() -> None:
    """What makes the records never imports what is exported, so an error there cannot reach its own yardstick."""
    code = "import sys, dit_export.reference.process; print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    imported = set(done.stdout.split())
    assert "dit_export.reference.pipeline" in imported
    assert not [name for name in imported if name.startswith(EXPORTERS)]
    assert not [name for name in imported if name.partition(".")[0] in ("onnx", "onnx_ir", "onnxscript")]


def test_other_precisions_leave_the_reference_as_it_was(reference: Reference) -> None:
    """FP64, FP16 and BF16 differ from FP32 by about their own resolution, and afterwards not a bit is changed."""
    before = asked(reference)
    weights = [parameter.clone() for parameter in reference.transformer.parameters()]
    limits = {torch.float64: (1e-8, 5e-6), torch.float16: (1e-4, 2e-2), torch.bfloat16: (1e-3, 2e-1)}
    for dtype, (least, most) in limits.items():  # measured: 8.3e-7, 3.0e-3, 2.6e-2
        with reference.at_precision(dtype):
            error = relative_l2(asked(reference).double().numpy(), before.numpy())
        assert least < error < most, (dtype, error)
    assert torch.equal(asked(reference), before)
    for parameter, weight in zip(reference.transformer.parameters(), weights, strict=True):
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, weight)


def test_fp16_products_accumulate_in_fp32(reference: Reference) -> None:
    """FP16 is a GPU's: operands and results in FP16, sums in FP32, which a chain of FP16 additions is far from."""
    layer, x = torch.nn.Linear(4096, 1), torch.ones(1, 4096)
    torch.nn.init.constant_(layer.weight, 0.1)
    torch.nn.init.zeros_(layer.bias)
    with torch.inference_mode(), reference.at_precision(torch.float16):
        found = layer.half()(x.half())
    assert found.dtype == torch.float16
    assert float(found) == float(np.float16(4096 * float(np.float16(0.1))))


def test_float64_loops_draw_the_same_noise() -> None:
    """A sampler in float64 has float32's noise: its trajectory is the same up to float32's rounding."""
    betas = np.linspace(1e-4, 0.02, 1000)
    config = {"num_train_timesteps": 1000, "beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}

    def walked(dtype: torch.dtype, loop: Callable[[list[torch.Generator]], object]) -> Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
        z = torch.full((2, 4, 4, 4), 0.5, dtype=dtype)
        for step in loop(generators):
            z, _ = step.advance(0.1 * z, 0.2 * torch.ones_like(z), z)
        assert z.dtype == dtype
        return z

    class Config(dict):
        num_train_timesteps = 1000

    settings = Config(config)
    loops = {
        "diffusers": lambda tables: lambda generators: diffusers_ddpm(settings, 8, True, generators, tables),
        "official": lambda tables: (
            lambda generators: OfficialDiffusion(
                tuple(betas), 8, torch.float32 if tables is None else torch.float64
            ).ddpm(True, generators)
        ),
    }
    for name, loop in loops.items():
        error = relative_l2(
            walked(torch.float64, loop(tuple(betas))).numpy(), walked(torch.float32, loop(None)).double().numpy()
        )
        assert 0 < error < 1e-4, name  # measured: 2.9e-7, 1.5e-7


def test_magnitudes_name_what_is_large(reference: Reference) -> None:
    """A unit's magnitude is the largest number that enters or leaves its products; the residual stream has its own."""
    block = reference.blocks[1]
    saved = block.ff.net[2].bias.data.clone()
    block.ff.net[2].bias.data[3] = 5e4
    try:
        with magnitudes_of(reference, encoder=False) as largest:
            asked(reference)
    finally:
        block.ff.net[2].bias.data = saved
    assert largest["blocks.1.mlp"] == pytest.approx(5e4, rel=0.01)
    assert largest["blocks.1"] > 1e3
    assert largest["blocks.0.mlp"] < 100
    assert {"patch_embed", "conditioner", "blocks.0.attn", "final"} <= set(largest)
    assert "encoder" not in largest


def test_attention_scores_are_counted(reference: Reference) -> None:
    """Queries and keys within FP16's range whose products are not: the scores are what an FP16 graph holds."""
    attention, size = reference.blocks[0].attn1, reference.spec.width // reference.spec.heads
    saved = {name: value.clone() for name, value in attention.state_dict().items()}
    with torch.no_grad():
        for part in (attention.to_q, attention.to_k):
            part.weight.zero_()
            part.bias.fill_(150)
    try:
        with magnitudes_of(reference, encoder=False) as largest:
            asked(reference)
    finally:
        attention.load_state_dict(saved)
    assert largest["blocks.0.attn"] == pytest.approx(150 * 150 * size**0.5)
    assert largest["blocks.1.attn"] < 1000


def test_a_reference_that_is_no_use_is_refused() -> None:
    """A record that is not finite and a constant image are errors of the reference, said before anything is made."""
    good = {"images": {"images": np.random.default_rng(0).integers(0, 255, (2, 8, 8, 3)).astype(np.uint8)}}
    check_records("model", good)
    with pytest.raises(ParityError, match=r"itself is not finite \(ddim, latents\)"):
        check_records("model", {**good, "ddim": {"latents": np.array([1.0, np.inf])}})
    black = good["images"]["images"].copy()
    black[1] = 0
    with pytest.raises(ParityError, match="image 2 is constant"):
        check_records("model", {"images": {"images": black}})


def test_records_are_small(bundles: dict[str, Path]) -> None:
    """Records of a small model stay below 5 MB, and those of a large one are short."""
    manifest = open_bundle(bundles["fp32"]).manifest
    assert (
        sum(spec.bytes for name, spec in manifest.files.items() if name.startswith("golden")) < 5e6
    )  # measured: 0.9 MB
    settings = RecordSettings.for_checkpoint(load_checkpoint(Source("DiT-XL/2-256", random_seed=0)), "fp16")
    assert (settings.images, settings.steps, settings.forward_images) == (1, 4, 2)
    assert settings.precisions == ("fp16", "bf16")  # not FP64, which takes twice the memory


def test_a_record_of_every_condition(bundles: dict[str, Path], reference: Reference) -> None:
    """Its rows are those that an evaluation of the whole network computes, for every class and timestep."""
    record = open_bundle(bundles["fp32"]).records("conditions")
    assert set(record["labels"].tolist()) == set(range(reference.classes + 1))
    assert set(record["timesteps"].tolist()) >= set(range(1000))
    assert (record["timesteps"] % 1 != 0).sum() >= 60
    some = np.array([0, 500, 1063])
    times, labels = torch.from_numpy(record["timesteps"][some]), torch.from_numpy(record["labels"][some])
    with reference.observe() as seen:
        reference.predict(torch.zeros(3, 4, 8, 8), times, labels, 1.0)
    rows = reference.table_from_observation(seen)
    assert torch.equal(reference.compute_table(times, labels), rows)
    flat = rows.flatten(1).double().numpy()
    signs = np.random.PCG64(0).random_raw(flat.shape[1] * 8 // 64).astype("<u8").tobytes()
    bits = np.array([[byte >> (7 - bit) & 1 for bit in range(8)] for byte in signs], float).reshape(-1, 8)
    assert np.allclose(flat @ (2 * bits - 1), record["projections"][some], rtol=1e-5, atol=1e-5)  # measured: 4e-7
    assert np.allclose(np.linalg.norm(flat, axis=1), record["norms"][some], rtol=1e-6)


def test_labels_of_single_images_are_spread(reference: Reference) -> None:
    """A large model's trajectories have one image each, of another class; the strong one has two steps."""
    large = RecordSettings.for_checkpoint(load_checkpoint(Source("DiT-XL/2-256", 0)), "fp16")
    assert (large.strong.guidance, large.strong.images, large.strong.steps) == (8.0, 1, 2)
    with torch.inference_mode():
        parts = [
            _record_trajectory(reference, replace(large, steps=2), "ddim", lambda: None, part) for part in range(PARTS)
        ]
    assert [int(part["labels"][0]) for part in parts] == [9, 1, 4, 6]
