"""LightningDiT against its oracle: the exported graphs and the shifted loop, on ONNX Runtime.

The network's oracle is ``support/oracle.py``, whose rotary positions are complex numbers; the loop is written out here.
Errors are max|Δ| over the largest value, and what was measured stands beside each limit.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from diffusers import AutoencoderKL
from dit_export.bundle import bundle_from_checkpoint
from dit_export.checkpoints.positions import ROTARY, is_rotary_table
from dit_export.checkpoints.random_weights import randomize
from dit_export.checkpoints.sources import Checkpoint, Source, load_checkpoint
from dit_export.checkpoints.weights import Weights as Stored
from dit_export.checkpoints.weights import stored_from_tensor
from dit_export.graphs.precision import FP16, FP32
from dit_export.reference.record_settings import Measurements
from onnx import numpy_helper
from support.bundles import edit_graph, signed, step_inputs
from support.commands import run_command
from support.engines import step_on_rtx
from support.oracle import Weights, guided, random_weights, sincos_positions

from dit_runtime import Pipeline
from dit_runtime.backends.onnxruntime.engine import OnnxRuntimeEngine
from dit_runtime.bundle.reader import Bundle
from dit_runtime.core.errors import CheckpointError
from dit_runtime.verify.metrics import relative_error
from dit_runtime.verify.verification import verify

CHANNELS, CLASSES, HEADS = 8, 10, 4
FORWARD_LIMIT = {"fp32": 2e-6, "fp16": 3e-3}
TRAJECTORY_LIMIT = {"fp32": 5e-6, "fp16": 5e-3}
SHIFT = 0.3
SIZES = ((8, 8), (12, 8))  # of images in pixels; the first is the trained one


def lightning_weights() -> Weights:
    """Patches of 1, RMSNorm, SwiGLU, rotary positions and norms of queries and keys."""
    return random_weights(
        3,
        width=64,
        depth=2,
        patch=1,
        channels=CHANNELS,
        grid=(4, 4),
        classes=CLASSES,
        out_channels=CHANNELS,
        conditioning="adaln-zero",
        qk_heads=HEADS,
        mlp_width=88,
        lightning=True,
    )


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An autoencoder of eight latent channels."""
    module = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(32, 32),
        latent_channels=CHANNELS,
    )
    randomize(module, 1)
    folder = tmp_path_factory.mktemp("vae")
    module.save_pretrained(folder)
    return str(folder)


def saved(folder: Path, weights: Weights, **arguments: object) -> Path:
    """A training checkpoint as LightningDiT's ``train.py`` writes it, with its configuration in sections."""
    config = {"transport": {"path_type": "Linear", "prediction": "velocity"}, "model": arguments}
    torch.save({"model": weights, "ema": weights, "config": config}, folder / "w.pt")
    return folder / "w.pt"


def loaded(file: Path, vae: str, **options: object) -> Checkpoint:
    return load_checkpoint(Source(str(file), autoencoder=vae, **options))  # type: ignore[arg-type]


def test_its_parameters_prove_it(tmp_path: Path, vae: str) -> None:
    """Family, parts and conventions without an option; another family and other parts contradict the file."""
    weights = lightning_weights()
    found = loaded(saved(tmp_path, weights, use_swiglu=True, use_rope=True, use_rmsnorm=True), vae)
    model, diffusion = found.model, found.diffusion
    assert (model.norm, model.mlp, model.qk_norm, model.rotary) == ("rms", "swiglu", "rms", True)
    assert (model.heads, model.mlp_width, model.patch_size, model.latent_channels) == (HEADS, 88, 1, CHANNELS)
    assert (found.family, diffusion.path, diffusion.time, diffusion.time_shift) == (
        "lightningdit",
        "linear",
        "noise-at-0",
        SHIFT,
    )
    assert (diffusion.guidance_channels, found.defaults.sampler, found.defaults.steps) == (3, "euler", 249)
    with pytest.raises(CheckpointError, match=r"its parameters \(.*\) say lightningdit, --family says sit"):
        loaded(saved(tmp_path, weights), vae, family="sit")
    with pytest.raises(CheckpointError, match="say use_rope = False, and the weights are with rotary positions"):
        loaded(saved(tmp_path, weights, use_rope=False), vae)
    weights["feat_rope.freqs_cos"] = weights["feat_rope.freqs_cos"].flip(0)
    with pytest.raises(CheckpointError, match="its rotary tables are not those of LightningDiT's code at 4x4 patches"):
        loaded(saved(tmp_path, weights), vae, image_sizes=((16, 16),))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_tables_of_every_dtype_are_known(dtype: torch.dtype) -> None:
    """The published code rounds tables of angles in float32, here at 512 pixels in heads of 72."""
    frequencies = 1.0 / 10000 ** (torch.arange(0, 36, 2).float() / 36)
    side = (torch.arange(32)[:, None] * frequencies).repeat_interleave(2, dim=1)  # (32, 36)
    angles = torch.cat([side[:, None].expand(32, 32, 36), side[None].expand(32, 32, 36)], dim=2).flatten(0, 1)
    tables = dict(zip(ROTARY, (angles.cos().to(dtype), angles.sin().to(dtype)), strict=True))

    def are_known() -> bool:
        stored = {key: stored_from_tensor(value) for key, value in tables.items()}
        return is_rotary_table(Stored("f", stored), (32, 32))

    assert are_known()
    tables[ROTARY[1]] = -tables[ROTARY[1]]
    assert not are_known()


def test_its_kin_are_not_assumed(tmp_path: Path, vae: str) -> None:
    """Its parameters alone prove no direction of time; with parts of REPA's training they are another model."""
    weights = lightning_weights()
    torch.save(weights, tmp_path / "alone.pt")
    with pytest.raises(
        CheckpointError, match=r"which its kin have too.* say --family lightningdit --path linear for a"
    ):
        loaded(tmp_path / "alone.pt", vae, path="linear")
    assert loaded(tmp_path / "alone.pt", vae, family="lightningdit", path="linear").family == "lightningdit"
    mixed = {**weights, "projectors.0.0.weight": torch.ones(8, 64)}
    with pytest.raises(CheckpointError, match=r"holds parts of a training of REPA \(proj.*\) and of a LightningDiT \("):
        loaded(saved(tmp_path, mixed), vae)
    with pytest.raises(CheckpointError, match=r"has a LightningDiT's parameters, and its .* say repa; not supported"):
        loaded(saved(tmp_path, weights, encoder_depth=8), vae)


def test_what_does_not_fit_is_refused(tmp_path: Path, vae: str) -> None:
    """Rotary tables of another grid, halves of a part, modulation without shift."""
    weights = lightning_weights()
    other = {**weights, **{f"feat_rope.freqs_{name}": torch.ones(25, 16) for name in ("cos", "sin")}}
    with pytest.raises(CheckpointError, match=r"feat_rope.freqs_cos \[25, 16\], expected \[16, 16\]"):
        loaded(saved(tmp_path, other), vae)
    half = {name: tensor for name, tensor in weights.items() if name != "blocks.1.mlp.w3.bias"}
    with pytest.raises(CheckpointError, match=r"1 missing keys \(blocks.1.mlp.w3.bias\)"):
        loaded(saved(tmp_path, half), vae)
    plain = {name: tensor[:256] if "blocks.0.adaLN" in name else tensor for name, tensor in weights.items()}
    with pytest.raises(CheckpointError, match=r"expected 384 rows \(a LightningDiT without shift is"):
        loaded(saved(tmp_path, plain), vae)


@pytest.fixture(scope="module", params=["fp32", "fp16"])
def exported(request: pytest.FixtureRequest, vae: str, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle without golden records: the oracle takes their place here."""
    folder = tmp_path_factory.mktemp(f"lightning-{request.param}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dit_export.bundle.records_in_process", lambda *_: Measurements())
        return bundle_from_checkpoint(
            Source(str(saved(folder, lightning_weights())), autoencoder=vae, image_sizes=SIZES),
            folder / "out.bundle",
            FP16 if request.param == "fp16" else FP32,
        )


def predict(z: torch.Tensor, t: float, labels: list[int], scale: float) -> torch.Tensor:
    """The oracle's velocity, guided on three of eight channels; its positions are those of the latents' size."""
    times, y = torch.full((len(labels),), t), torch.tensor(labels)
    weights = {**lightning_weights(), "pos_embed": sincos_positions(*z.shape[2:], width=64)}
    return guided(weights, z, times, y, scale, heads=HEADS, conditioning="adaln-zero", null=CLASSES)[0]


@pytest.mark.slow  # an export
@pytest.mark.parametrize("size", SIZES)
def test_a_forward_is_the_oracles(exported: Bundle, size: tuple[int, int]) -> None:
    """Every part at a time in the middle, guided on three channels, at the trained size and beside it."""
    at = exported.at(size)
    engine = OnnxRuntimeEngine(at, threads=1)
    z = np.random.default_rng(1).standard_normal((3, CHANNELS, *at.manifest.model.latent_size)).astype(np.float32)
    labels = [0, 4, 9]
    conditions = {"timesteps": np.full(6, 0.4, np.float32), "labels": np.int32([*labels, *[CLASSES] * 3])}
    (table,) = engine.session("conditioner").run(conditions, ["modulation"])
    inputs = {**step_inputs(z, 2), "rows": np.arange(6, dtype=np.int32).reshape(2, 3), "modulation": table}
    inputs["guidance"][0, :, :3], inputs["guidance"][1, :, :3] = 4.0, -3.0
    (e,) = engine.session("step").run(inputs, ["denoised"])
    wanted = predict(torch.from_numpy(z), 0.4, labels, 4.0).numpy()
    assert relative_error(e, wanted) <= FORWARD_LIMIT[exported.manifest.precision.name]  # measured: 5.7e-7 and 8.4e-4


@pytest.mark.slow  # an export
def test_a_trajectory_is_shifted_eulers(exported: Bundle) -> None:
    """LightningDiT's grid and its guidance interval, which begins at a time of 0.11 after the noise."""
    steps, labels = 10, [7, 2]
    pipe = Pipeline(exported, OnnxRuntimeEngine(exported, threads=1))
    settings = {"steps": steps, "guidance": 3.0, "sampler": "euler", "guidance_interval": (0.0, 0.89)}
    found = [z for _, z, _ in pipe.trajectory(labels, [5, 6], **settings)]  # type: ignore[arg-type]
    z = torch.stack([torch.randn(CHANNELS, 4, 4, generator=torch.Generator().manual_seed(seed)) for seed in (5, 6)])
    times = [SHIFT * u / (1 + (SHIFT - 1) * u) for u in np.linspace(0, 1, steps + 1)]
    assert times[2] < 0.11 < times[4]
    errors = []
    for index in range(steps):
        scale = 1.0 if times[index] < 0.11 else 3.0
        z = z + (times[index + 1] - times[index]) * predict(z, times[index], labels, scale)
        errors.append(relative_error(found[index], z.numpy()))
    assert max(errors) <= TRAJECTORY_LIMIT[exported.manifest.precision.name]  # measured: 2.5e-7 and 1.3e-3


@pytest.mark.slow  # an export in FP16 and a build
@pytest.mark.parametrize("exported", ["fp16"], indirect=True)
def test_rtx_fuses_every_attention(exported: Bundle, tmp_path: Path) -> None:
    """The real builder: norms and rotary positions leave each attention one fused kernel in FP16."""
    pytest.importorskip("tensorrt_rtx")
    profiles = step_on_rtx(exported, tmp_path / "store")
    assert [(p.kernels, p.synchronizations, p.fused_attention) for p in profiles] == [(27, 0, 2)] * 2


@pytest.fixture(scope="module")
def verified(vae: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same file with golden records, as the command exports and verifies it."""
    folder = tmp_path_factory.mktemp("lightning-records")
    done = run_command(
        "dit-export",
        saved(folder, lightning_weights()),
        "--vae",
        vae,
        "--size",
        "8x8",
        "12x8",
        *("-o", folder / "l.bundle"),
    )
    assert done.returncode == 0, done.stderr + done.stdout
    assert "12x8 blocks" in done.stdout
    assert "hustvl/LightningDiT's model and fixed-step samplers, linear path" in done.stdout
    return folder / "l.bundle"


@pytest.mark.slow  # another export, with calibration
def test_int8_knows_its_layers(vae: str, tmp_path: Path) -> None:
    """SwiGLU's layers have names of their own in the file; INT8's rungs compare them with the reference's."""
    file = saved(tmp_path, lightning_weights())
    done = run_command("dit-export", file, "--vae", vae, "--int8", "-o", tmp_path / "l.bundle")
    assert done.returncode == 0, done.stderr + done.stdout
    assert "INT8 weights" in done.stdout


def swap_halves(graph: onnx.GraphProto) -> None:
    """Let SiLU act on the second half of each block's ``w12``."""
    nodes = {node.name: node for node in graph.node}
    for name in [name for name in nodes if name.endswith(".mlp/Sigmoid")]:
        silu, product = (nodes[name.replace("Sigmoid", kind)] for kind in ("Mul", "Mul.1"))
        first = nodes[name].input[0]
        second = next(each for each in product.input if each != silu.output[0])
        nodes[name].input[0] = second
        for node, before, after in ((silu, first, second), (product, second, first)):
            node.input[list(node.input).index(before)] = after


def turn_the_wrong_way(graph: onnx.GraphProto) -> None:
    """Negate the rotary sines, which are 0 at the first token."""
    for tensor in graph.initializer:
        if list(tensor.dims) == [16, 16] and not tensor.external_data:
            array = numpy_helper.to_array(tensor)
            if not array[0].any():
                tensor.CopyFrom(numpy_helper.from_array(-array, tensor.name))


def unshift(bundle: Path) -> None:
    text = (bundle / "manifest.json").read_text()
    assert '"time_shift": 0.3' in text
    (bundle / "manifest.json").write_text(text.replace('"time_shift": 0.3', '"time_shift": 1.0'))


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "times not shifted": (unshift, "euler teacher-forced"),
    "turned the wrong way": (
        lambda b: [edit_graph(b, name, turn_the_wrong_way) for name in ("step", "probe")],
        "blocks",
    ),
    "halves of SwiGLU swapped": (lambda b: [edit_graph(b, name, swap_halves) for name in ("step", "probe")], "blocks"),
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
    assert failed
    assert failed[0].startswith(rung), failed
