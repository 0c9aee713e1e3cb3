"""Families beyond DiT and SiT against their oracles: the exported graphs and the whole loop, on ONNX Runtime.

The network's oracle is ``support/oracle.py``, REPA's samplers are ``support/repa.py``; neither knows the package.
Errors are max|Δ| over the largest value, and what was measured stands beside each limit.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from diffusers import AutoencoderKL
from dit_export.bundle import bundle_from_checkpoint
from dit_export.checkpoints.sources import Source
from dit_export.graphs.precision import FP16, FP32
from dit_export.reference.record_settings import Measurements
from onnx import numpy_helper
from support import repa
from support.bundles import edit_graph, signed, step_inputs
from support.commands import run_command
from support.engines import step_on_rtx
from support.oracle import Weights, dit, guided, random_weights

from dit_runtime import Pipeline
from dit_runtime.backends.onnxruntime.engine import OnnxRuntimeEngine
from dit_runtime.bundle.reader import Bundle, open_bundle
from dit_runtime.verify.metrics import relative_error
from dit_runtime.verify.verification import verify

HEADS, CLASSES = 4, 10
OF = {"heads": HEADS, "conditioning": "adaln-zero"}
MEAN, STD = np.float32([0.5, -1.0, 0.25, 2.0]), np.float32([2.0, 0.5, 1.0, 3.0])
FORWARD_LIMIT = {"fp32": 2e-6, "fp16": 2e-3}
TRAJECTORY_LIMIT = {"fp32": 5e-6, "fp16": 5e-3}
DECODER_LIMIT = {"fp32": 2e-6, "fp16": 5e-3}


def repa_weights() -> Weights:
    return random_weights(
        3,
        width=64,
        depth=2,
        patch=2,
        channels=4,
        grid=(4, 4),
        classes=CLASSES,
        out_channels=4,
        conditioning="adaln-zero",
        qk_heads=HEADS,
    )


def repa_file(folder: Path) -> Path:
    """REPA-E's training checkpoint with all that it may hold: projectors, norms of queries and keys, statistics."""
    extra = {
        "projectors.0.0.weight": torch.ones(8, 64),
        "bn.running_mean": torch.from_numpy(MEAN),
        "bn.running_var": torch.from_numpy(STD) ** 2,
    }
    torch.save({"ema": {**repa_weights(), **extra}, "args": {"path_type": "linear"}}, folder / "repa.pt")
    return folder / "repa.pt"


@pytest.fixture(scope="module", params=["fp32", pytest.param("fp16", marks=pytest.mark.slow)])  # another export
def exported(request: pytest.FixtureRequest, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle of REPA-E's file without golden records: the oracles take their place here."""
    folder = tmp_path_factory.mktemp(f"repa-{request.param}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dit_export.bundle.records_in_process", lambda *_: Measurements())
        return bundle_from_checkpoint(
            Source(str(repa_file(folder)), autoencoder=str(checkpoint / "vae")),
            folder / "out.bundle",
            FP16 if request.param == "fp16" else FP32,
        )


def test_a_forward_is_the_oracles(exported: Bundle) -> None:
    """Norms of queries and keys, and guidance on all four channels, at times from noise to the image."""
    engine, precision = OnnxRuntimeEngine(exported, threads=1), exported.manifest.precision.name
    assert (exported.manifest.model.qk_norm, exported.manifest.diffusion.guidance_channels) == ("layer", 4)
    z = np.random.default_rng(1).standard_normal((3, 4, 8, 8)).astype(np.float32)
    t, labels = [1.0, 0.4, 0.01], [0, 4, 9]
    conditions = {"timesteps": np.float32(t * 2), "labels": np.int32([*labels, *[CLASSES] * 3])}
    (table,) = engine.session("conditioner").run(conditions, ["modulation"])
    inputs = {**step_inputs(z, 2), "rows": np.arange(6, dtype=np.int32).reshape(2, 3), "modulation": table}
    inputs["guidance"][0], inputs["guidance"][1] = 4.0, -3.0
    (e,) = engine.session("step").run(inputs, ["denoised"])
    wanted, _ = guided(
        repa_weights(),
        torch.from_numpy(z),
        torch.tensor(t),
        torch.tensor(labels),
        4.0,
        **OF,  # type: ignore[arg-type]
        null=CLASSES,
        guided_channels=4,
    )
    assert relative_error(e, wanted.numpy()) <= FORWARD_LIMIT[precision]  # measured: 5.1e-7 and 5.9e-4


@pytest.mark.parametrize("sampler", ["euler", "heun", "sde-euler"])
def test_a_trajectory_is_repas(exported: Bundle, sampler: str) -> None:
    """REPA's own loops with its guidance interval, free-running from seeds."""
    weights, labels, steps, interval = repa_weights(), torch.tensor([7, 2]), 10, (0.0, 0.7)

    def network(z: torch.Tensor, t: float, null: bool) -> torch.Tensor:
        y = torch.full_like(labels, CLASSES) if null else labels
        return dit(weights, z, torch.full((2,), t), y, **OF)  # type: ignore[arg-type]

    pipe = Pipeline(exported, OnnxRuntimeEngine(exported, threads=1))
    settings = {"steps": steps, "guidance": 1.8, "sampler": sampler, "guidance_interval": interval}
    found = [z for _, z, _ in pipe.trajectory([7, 2], [5, 6], **settings)]  # type: ignore[arg-type]
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]

    def draws() -> Iterator[torch.Tensor]:
        while True:
            yield torch.stack([torch.randn(4, 8, 8, generator=each) for each in generators])

    noise = draws()
    if sampler == "sde-euler":
        wanted = list(repa.sde(network, next(noise), steps, "linear", noise, 1.8, interval))
    else:
        wanted = list(repa.ode(network, next(noise), steps, sampler == "heun", 1.8, interval))
    errors = [relative_error(one, other.numpy()) for one, other in zip(found, wanted, strict=True)]
    assert max(errors) <= TRAJECTORY_LIMIT[exported.manifest.precision.name]  # measured: 3.4e-7 and 3.7e-4


def test_statistics_are_applied(exported: Bundle, checkpoint: Path) -> None:
    """The decoder gets latents with each channel's spread and mean, and no other scaling."""
    z = np.random.default_rng(2).standard_normal((2, 4, 8, 8)).astype(np.float32)
    (decoded,) = OnnxRuntimeEngine(exported, threads=1).session("decoder").run({"latents": z}, ["decoded"])
    own = torch.from_numpy(z * STD[:, None, None] + MEAN[:, None, None])
    with torch.inference_mode():
        wanted = AutoencoderKL.from_pretrained(checkpoint / "vae").eval().decode(own).sample.numpy()
    limit = DECODER_LIMIT[exported.manifest.precision.name]
    assert relative_error(decoded, wanted) <= limit  # measured: 1.3e-6 and 7.1e-4


@pytest.mark.slow  # an export in FP16 and a build
@pytest.mark.parametrize("exported", ["fp16"], indirect=True)
def test_rtx_fuses_every_attention(exported: Bundle, tmp_path: Path) -> None:
    """The real builder: norms of queries and keys leave each attention one fused kernel in FP16."""
    pytest.importorskip("tensorrt_rtx")
    profiles = step_on_rtx(exported, tmp_path / "store")
    assert [profile.fused_attention for profile in profiles] == [2, 2]
    # Two kernels more a block than without the norms.
    assert [(profile.kernels, profile.synchronizations) for profile in profiles] == [(25, 0)] * 2


@pytest.fixture(scope="module")
def verified(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same file with golden records, as the command exports and verifies it, with its encoder."""
    folder = tmp_path_factory.mktemp("repa-records")
    file, output = repa_file(folder), folder / "repa.bundle"
    done = run_command("dit-export", file, "--vae", checkpoint / "vae", "--encoder", "-o", output)
    assert done.returncode == 0, done.stderr + done.stdout
    assert "left out the projectors of REPA's training" in done.stderr
    assert "sihyun-yu/REPA's SiT and samplers, linear path" in done.stdout
    assert "sde-euler free-running" in done.stdout
    return output


def bypass(graph: onnx.GraphProto, part: str) -> None:
    """Let the nodes of a module hand their input on."""
    for node in graph.node:
        if part in node.name and node.op_type == "LayerNormalization":
            node.op_type = "Identity"
            del node.input[1:], node.attribute[:], node.output[1:]


def forget_statistics(graph: onnx.GraphProto) -> None:
    for tensor in graph.initializer:
        if list(tensor.dims) == [1, 4, 1, 1]:
            plain = np.ones if (numpy_helper.to_array(tensor) > 0).all() else np.zeros
            tensor.CopyFrom(numpy_helper.from_array(plain((1, 4, 1, 1), np.float32), tensor.name))


def in_manifest(before: str, after: str) -> Callable[[Path], None]:
    def change(bundle: Path) -> None:
        text = (bundle / "manifest.json").read_text()
        assert before in text
        (bundle / "manifest.json").write_text(text.replace(before, after))

    return change


def in_graphs(change: Callable[[onnx.GraphProto], None], *names: str) -> Callable[[Path], None]:
    return lambda bundle: [edit_graph(bundle, name, change) for name in names] and None


FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "time reversed": (in_manifest('"noise-at-1"', '"noise-at-0"'), "euler teacher-forced"),
    "three channels guided": (in_manifest('"guidance_channels": 4', '"guidance_channels": 3'), "forward G=2"),
    "queries not normalized": (in_graphs(lambda graph: bypass(graph, "q_norm"), "step", "probe"), "blocks"),
    "statistics not applied": (in_graphs(forget_statistics, "decoder"), "decoder"),
}


@pytest.mark.slow  # an export with records
@pytest.mark.parametrize("fault", FAULTS)
def test_a_seeded_fault_is_caught(fault: str, verified: Path, tmp_path: Path) -> None:
    """Golden records are the family's own: what a family has alone cannot be wrong unseen."""
    change, rung = FAULTS[fault]
    shutil.copytree(verified, tmp_path / "bundle")
    change(tmp_path / "bundle")
    bundle = signed(tmp_path / "bundle")
    failed = [each.name for each in verify(bundle, OnnxRuntimeEngine(bundle, threads=1)) if not each.passed]
    assert failed[0].startswith(rung), failed


@pytest.mark.slow  # an export with records
def test_without_a_fault_nothing_fails(verified: Path) -> None:
    """The records and the whole loop of the bundle as it is, encoder and all; its defaults are REPA's."""
    bundle = open_bundle(verified)
    assert all(rung.passed for rung in verify(bundle, OnnxRuntimeEngine(bundle, threads=1)))
    done = run_command("dit-sample", verified, "--labels", "3", "--seed", "1", "-o", verified.parent / "image.png")
    assert done.returncode == 0, done.stderr
    defaults = bundle.manifest.defaults
    assert (defaults.sampler, defaults.steps, defaults.guidance) == ("euler", 50, 1.5)
