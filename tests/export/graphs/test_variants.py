"""Every conditioning, family and size against the oracle: the exported graphs and the whole loop, on ONNX Runtime.

The weights are the oracle's own, read from files by the exporter; nothing of the package stands on the other side.
"""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from diffusers import DiTTransformer2DModel
from dit_export.bundle import bundle_from_checkpoint
from dit_export.checkpoints.sources import Source
from dit_export.graphs.precision import FP16, FP32
from dit_export.reference.record_settings import Measurements
from safetensors.torch import save_file
from support.bundles import step_inputs
from support.commands import run_command, run_process
from support.oracle import (
    CONDITIONINGS,
    dit,
    guided,
    official_ddim,
    official_ddpm,
    random_weights,
    sincos_positions,
    sit_euler,
    sit_guided,
)

from dit_runtime import Pipeline
from dit_runtime.backends.base import Engine
from dit_runtime.backends.onnxruntime.engine import OnnxRuntimeEngine
from dit_runtime.backends.open import open_engine
from dit_runtime.bundle.reader import Bundle, open_bundle
from dit_runtime.core.errors import EngineError, SamplingError
from dit_runtime.verify.metrics import relative_error

HEADS, CLASSES, WIDTH = 4, 10, 64
SEVERAL_SIZES = ((32, 32), (24, 40), (48, 48))
DEFAULT = {("in-context", "fp32")}
BETAS = np.linspace(1e-4, 0.02, 1000)
# max|Δ| over the largest value; what was measured stands beside each comparison, the largest of all conditionings.
FORWARD_LIMIT = {"fp32": 2e-6, "fp16": 2e-3}
TRAJECTORY_LIMIT = {"fp32": 5e-6, "fp16": 5e-3}
# Kernels, waits and signals of two blocks, one and two branches, as TensorRT-RTX 1.7 builds them.
KERNELS = {
    "adaln-zero": [(21, 0)] * 2,
    "adaln": [(23, 0)] * 2,
    "cross-attention": [(32, 0)] * 2,
    "in-context": [(21, 0)] * 2,
}


def weights_of(conditioning: str, out_channels: int = 8, grid: tuple[int, int] = (4, 4)) -> dict[str, torch.Tensor]:
    return random_weights(
        3,
        width=WIDTH,
        depth=2,
        patch=2,
        channels=4,
        grid=grid,
        classes=CLASSES,
        out_channels=out_channels,
        conditioning=conditioning,
    )


def exported(
    folder: Path, checkpoint: Path, weights: dict[str, torch.Tensor], fp16: bool = False, **source: object
) -> Bundle:
    """A bundle without golden records: the oracle takes their place here."""
    file = folder / "weights.safetensors"
    save_file(weights, file)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dit_export.bundle.records_in_process", lambda *_: Measurements())
        return bundle_from_checkpoint(
            Source(str(file), heads=HEADS, autoencoder=str(checkpoint / "vae"), **source),  # type: ignore[arg-type]
            folder / "out.bundle",
            FP16 if fp16 else FP32,
        )


def evaluated(
    bundle: Bundle,
    z: np.ndarray,
    t: list[float],
    labels: list[int],
    weights: np.ndarray,
    engine: Engine | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """e and the variance of the step graph for ``weights [G, B, C]``; branch 1 is the null class."""
    engine = engine or OnnxRuntimeEngine(bundle, threads=1)
    branches, batch = weights.shape[:2]
    null = [bundle.manifest.model.null_class] * batch
    name = bundle.manifest.table.name
    (table,) = engine.session("conditioner").run(
        {"timesteps": np.float32(t * branches), "labels": np.int32((labels + null)[: branches * batch])}, [name]
    )
    inputs = step_inputs(z, branches)
    inputs["guidance"] = weights.astype(np.float32)
    inputs["coefficients"][:, 15:] = 1  # next z = exp(v)·noise
    inputs["noise"] = np.ones_like(z)
    rows = np.arange(branches * batch, dtype=np.int32).reshape(branches, batch)
    next_state, e = engine.session("step").run({**inputs, "rows": rows, name: table}, ["next_state", "denoised"])
    return e, np.log(next_state[:, 0])


def guidance_of(scale: float, batch: int, channels: int) -> np.ndarray:
    weights = np.zeros((2, batch, 4))
    weights[0] = 1
    weights[0, :, :channels], weights[1, :, :channels] = scale, 1 - scale
    return weights


@pytest.fixture(scope="module")
def variant(request: pytest.FixtureRequest, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The bundle of a conditioning in a precision; in FP32 at three sizes, the trained one first."""
    conditioning, precision = request.param
    folder, fp16 = tmp_path_factory.mktemp("-".join(request.param)), precision == "fp16"
    return exported(
        folder, checkpoint, weights_of(conditioning), fp16, image_sizes=((32, 32),) if fp16 else SEVERAL_SIZES
    )


def variants(*precisions: str) -> pytest.MarkDecorator:
    """A test of every conditioning; each of these takes an export, and the default run takes two of eight."""
    cases = [
        pytest.param(case, id="-".join(case), marks=() if case in DEFAULT else pytest.mark.slow)
        for case in product(CONDITIONINGS, precisions)
    ]
    return pytest.mark.parametrize("variant", cases, indirect=True)


@variants("fp32", "fp16")
def test_a_forward_is_the_oracles(variant: Bundle) -> None:
    """Guided prediction on three channels, variance and the fourth channel of the conditional branch, any timestep."""
    precision, conditioning = variant.manifest.precision.name, variant.manifest.model.conditioning
    weights = weights_of(conditioning)
    random = np.random.default_rng(1)
    z = random.standard_normal((3, 4, 8, 8)).astype(np.float32)
    t, labels = [999.0, 500.0, 3.0], [0, 4, 9]
    e, v = evaluated(variant, z, t, labels, guidance_of(4.0, 3, 3))
    expected_e, expected_v = guided(
        weights, torch.from_numpy(z), torch.tensor(t), torch.tensor(labels), 4.0, **of(conditioning), null=CLASSES
    )
    assert expected_v is not None
    # measured: 1.7e-6 and 9.0e-4 (e), 4.8e-7 and 7.0e-4 (variance)
    assert relative_error(e, expected_e.numpy()) <= FORWARD_LIMIT[precision]
    assert relative_error(v, expected_v.numpy()) <= FORWARD_LIMIT[precision]


@variants("fp16")
def test_openvino_runs_it(variant: Bundle) -> None:
    """The same forward with the FP16 tensors in FP32 and in BF16; a conditioning table in FP16 stays so outside."""
    z = np.random.default_rng(1).standard_normal((2, 4, 8, 8)).astype(np.float32)
    given = (z, [999.0, 3.0], [0, 9], guidance_of(4.0, 2, 3))
    expected, _ = evaluated(variant, *given)
    table = variant.manifest.table
    # measured: 4.3e-4 and 7.6e-3, the largest of all conditionings
    for precision, limit in (("fp32", 2e-3), ("bf16", 3e-2)):
        try:
            engine = open_engine(variant, "openvino", threads=1, precision=precision)
        except EngineError as error:
            assert "has no BF16" in str(error)  # noqa: PT017
            continue
        found, _ = evaluated(variant, *given, engine)
        assert relative_error(found, expected) <= limit
        conditions = {"timesteps": np.float32([1, 2]), "labels": np.int32([3, 4])}
        assert engine.session("conditioner").run(conditions, [table.name])[0].dtype == table.dtype


def of(conditioning: str) -> dict[str, object]:
    return {"heads": HEADS, "conditioning": conditioning}


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
@variants("fp32", "fp16")
def test_a_trajectory_is_the_oracles(variant: Bundle, sampler: str) -> None:
    """The official respaced loops, free-running from a seed, with guidance 1.5 on three channels."""
    precision, conditioning = variant.manifest.precision.name, variant.manifest.model.conditioning
    weights, steps = weights_of(conditioning), 10
    labels = torch.tensor([7, 2])

    def predict(z: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        return guided(weights, z, t, labels, 1.5, **of(conditioning), null=CLASSES)  # type: ignore[arg-type]

    pipe = Pipeline(variant, OnnxRuntimeEngine(variant, threads=1))
    found = [latents for _, latents, _ in pipe.trajectory([7, 2], [5, 6], steps=steps, guidance=1.5, sampler=sampler)]
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    draws = [torch.stack([torch.randn(4, 8, 8, generator=g) for g in generators]) for _ in range(steps)]
    if sampler == "ddim":
        expected = official_ddim(predict, draws[0], BETAS, steps)
    else:
        expected = official_ddpm(predict, draws[0], BETAS, steps, draws[1:], True)
    errors = [relative_error(mine, theirs.numpy()) for mine, theirs in zip(found, expected[1:], strict=True)]
    # measured, the largest of all steps: 5.4e-7 and 6.0e-4
    assert max(errors) <= TRAJECTORY_LIMIT[precision]


@variants("fp32", "fp16")
def test_rtx_builds_each_variant(variant: Bundle, tmp_path: Path) -> None:
    """The real builder compiles every variant; in FP16 each self- and cross-attention is one fused kernel."""
    pytest.importorskip("tensorrt_rtx")
    from dit_engines.build import engine_from_bundle
    from dit_engines.recipe import recipe_for

    built = engine_from_bundle(variant, recipe_for("rtx", "8.9", 2, (1, 2), 64), tmp_path / "store")
    (step,) = (graph for graph in built.graphs if graph.graph == "step")
    model, fp16 = variant.manifest.model, variant.manifest.precision.name == "fp16"
    assert model.attentions == (4 if model.conditioning == "cross-attention" else 2)
    assert [profile.fused_attention for profile in step.audit.profiles] == [model.attentions if fp16 else 0] * 2
    if fp16:
        assert [(p.kernels, p.synchronizations) for p in step.audit.profiles] == KERNELS[model.conditioning]


def test_sits_velocity_and_time(checkpoint: Path, tmp_path: Path) -> None:
    """``--family sit``: half of the output is dropped, time runs unscaled from 0 to 1, Euler's trajectory is SiT's."""
    weights = weights_of("adaln-zero")
    bundle = exported(tmp_path, checkpoint, weights, family="sit", path="linear", time="noise-at-0")
    model = bundle.manifest.model
    assert (model.learned_variance, bundle.manifest.diffusion.path) == (False, "linear")
    labels = torch.tensor([1, 8])

    def predict(z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return sit_guided(weights, z, t, labels, 2.0, heads=HEADS, null=CLASSES)

    z = torch.stack([torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in (3, 4)])
    expected = sit_euler(predict, z, 12)
    pipe = Pipeline(bundle, OnnxRuntimeEngine(bundle, threads=1))
    found = [z for _, z, _ in pipe.trajectory([1, 8], [3, 4], steps=12, guidance=2.0, sampler="euler")]
    errors = [relative_error(mine, theirs.numpy()) for mine, theirs in zip(found, expected[1:], strict=True)]
    assert max(errors) <= TRAJECTORY_LIMIT["fp32"]  # measured: 2.7e-7


@pytest.mark.slow  # an export for each
@pytest.mark.parametrize("channels", ["3", "all"])
def test_guidance_channels_are_recorded(checkpoint: Path, tmp_path: Path, channels: str) -> None:
    """``--guidance-channels`` overrides the reference's, and the manifest says so."""
    weights = weights_of("adaln-zero")
    bundle = exported(tmp_path, checkpoint, weights, guidance_channels=0 if channels == "all" else 3)
    count = 4 if channels == "all" else 3
    assert bundle.manifest.diffusion.guidance_channels == count
    assert ("guidance on 4 of 4 channels" in bundle.manifest.source.reference) == (channels == "all")
    pipe = Pipeline(bundle, OnnxRuntimeEngine(bundle, threads=1))
    (first, *_) = pipe.trajectory([5], 9, steps=10, guidance=3.0, sampler="ddim")
    z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(9))
    y = torch.tensor([5])
    expected = official_ddim(
        lambda z, t: guided(weights, z, t, y, 3.0, **of("adaln-zero"), null=CLASSES, guided_channels=count),  # type: ignore[arg-type]
        z,
        BETAS,
        10,
    )[1]
    assert relative_error(first[1], expected.numpy()) <= TRAJECTORY_LIMIT["fp32"]  # measured: 6.3e-7


@variants("fp32")
def test_several_sizes_on_one_weight_file(variant: Bundle) -> None:
    """Other and non-square sizes have the official table's values at their grid, and share the first one's weights."""
    conditioning = variant.manifest.model.conditioning
    weights, graphs = weights_of(conditioning), variant.path / "graphs"
    assert {path.name for path in graphs.glob("*.weights")} == {
        "conditioner.weights",
        "step.weights",
        "decoder.weights",
    }
    for name in ("step-6x10", "probe-6x10", "step-12x12"):
        model = onnx.load(graphs / f"{name}.onnx", load_external_data=False)
        inline = sum(t.ByteSize() for t in model.graph.initializer if not t.external_data)
        assert inline <= 60_000  # a table of 144 tokens is 36 864 bytes; the weights are 400 000
    random = np.random.default_rng(2)
    for size in SEVERAL_SIZES:
        at = variant.at(size)
        latent = at.manifest.model.latent_size
        assert latent == (size[0] // 4, size[1] // 4)
        z = random.standard_normal((2, 4, *latent)).astype(np.float32)
        e, _ = evaluated(at, z, [700.0, 20.0], [3, 6], guidance_of(2.0, 2, 3))
        table = sincos_positions(latent[0] // 2, latent[1] // 2, WIDTH)
        expected, _ = guided(
            {**weights, "pos_embed": table},
            torch.from_numpy(z),
            torch.tensor([700.0, 20.0]),
            torch.tensor([3, 6]),
            2.0,
            **of(conditioning),  # type: ignore[arg-type]
            null=CLASSES,
        )
        assert relative_error(e, expected.numpy()) <= FORWARD_LIMIT["fp32"]  # measured: 8.0e-7


def test_other_sizes_of_diffusers(sized_bundle: Path, transformer: DiTTransformer2DModel) -> None:
    """Square sizes are diffusers' own forward's, which squeezes positions into the trained range."""
    bundle = open_bundle(sized_bundle).at((48, 48))
    z = np.random.default_rng(3).standard_normal((1, 4, 12, 12)).astype(np.float32)
    e, v = evaluated(bundle, z, [400.0], [2], np.ones((1, 1, 4)))
    with torch.inference_mode():
        output = transformer(torch.from_numpy(z), torch.tensor([400.0]), torch.tensor([2])).sample.numpy()
    assert relative_error(np.concatenate([e, v], 1), output) <= FORWARD_LIMIT["fp32"]  # measured: 3.9e-7


@pytest.mark.slow  # an export in a process of its own, at two sizes and with encoder
def test_the_whole_job_with_the_command(checkpoint: Path, tmp_path: Path) -> None:
    """Golden records of a variant diffusers does not have, at two sizes, with encoder: exported, verified, sampled."""
    file, bundle = tmp_path / "cross.safetensors", tmp_path / "cross.bundle"
    save_file(weights_of("cross-attention"), file)
    done = run_process(
        *("dit-export", file, "--heads", str(HEADS), "--vae", checkpoint, "--fp16", "--encoder", "--json"),
        *("--size", "32x32", "24x40", "-o", bundle),
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    names = {rung["name"] for rung in report["rungs"]}
    assert {"32x32 blocks", "24x40 forward G=2", "24x40 encoder", "32x32 ddpm free-running"} <= names
    assert report["passed"]
    assert (bundle / "golden-6x10" / "forward_2.npz").is_file()
    manifest = open_bundle(bundle).manifest
    assert manifest.source.reference.startswith("the paper's cross-attention DiT")
    assert manifest.table.dtype == "float16"
    assert (manifest.defaults.sampler, manifest.defaults.steps) == ("ddpm", 250)


@pytest.mark.slow  # another export; test_sits_velocity_and_time has one
def test_a_sit_with_the_command(checkpoint: Path, tmp_path: Path) -> None:
    """A training checkpoint's EMA weights as a SiT: its own samplers in the records, its own defaults."""
    file, weights = tmp_path / "sit.pt", weights_of("adaln-zero")
    torch.save({"model": {key: 2 * value for key, value in weights.items()}, "ema": weights}, file)
    done = run_command(
        *("dit-export", file, "--family", "sit", "--path", "gvp", "--time", "noise-at-0", "--heads", str(HEADS)),
        *("--vae", checkpoint / "vae", "-o", tmp_path / "sit.bundle"),
    )
    assert done.returncode == 0, done.stderr + done.stdout
    assert "willisma/SiT's model and fixed-step samplers, gvp path" in done.stdout
    assert "sde-euler free-running" in done.stdout
    timed = run_command("dit-bench", tmp_path / "sit.bundle", "--steps", "3", "--repeat", "2")
    assert timed.returncode == 0, timed.stderr
    pipe = Pipeline(tmp_path / "sit.bundle", "onnxruntime", threads=1)
    assert pipe([3], steps=4).shape == (1, 32, 32, 3)
    expected = dit(weights, torch.ones(1, 4, 8, 8), torch.tensor([0.25]), torch.tensor([3]), **of("adaln-zero"))  # type: ignore[arg-type]
    e, _ = evaluated(pipe.bundle, np.ones((1, 4, 8, 8), np.float32), [0.25], [3], np.ones((1, 1, 4)))
    assert relative_error(e, expected[:, :4].numpy()) <= FORWARD_LIMIT["fp32"]  # measured: 4.2e-7


@pytest.mark.slow  # another export
def test_a_model_without_null_class(checkpoint: Path, tmp_path: Path) -> None:
    """Its last row is a class: the graphs give the oracle's numbers for it, records agree, guidance is refused."""
    file, weights = tmp_path / "plain.pt", weights_of("adaln-zero")
    torch.save({"ema": weights, "args": {"num_classes": CLASSES + 1}}, file)
    vae = checkpoint / "vae"
    done = run_command("dit-export", file, "--heads", HEADS, "--vae", vae, "-o", tmp_path / "plain.bundle")
    assert done.returncode == 0, done.stderr + done.stdout
    assert "no row of the label table is the null class: the model is exported without guidance" in done.stderr
    assert "FP32, no null class, on onnxruntime" in done.stdout
    pipe = Pipeline(tmp_path / "plain.bundle", "onnxruntime", threads=1)
    assert (pipe.manifest.model.classes, pipe.manifest.defaults.guidance) == (CLASSES + 1, 1.0)
    assert pipe([CLASSES], steps=4).shape == (1, 32, 32, 3)
    with pytest.raises(SamplingError, match="no null class to guide away from"):
        pipe([CLASSES], steps=4, guidance=2.0)
    expected = dit(weights, torch.ones(1, 4, 8, 8), torch.tensor([25]), torch.tensor([CLASSES]), **of("adaln-zero"))  # type: ignore[arg-type]
    e, _ = evaluated(pipe.bundle, np.ones((1, 4, 8, 8), np.float32), [25], [CLASSES], np.ones((1, 1, 4)))
    assert relative_error(e, expected[:, :4].numpy()) <= FORWARD_LIMIT["fp32"]  # measured: 2.7e-7
