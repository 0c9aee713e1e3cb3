"""The exported graphs against the unpatched diffusers modules, on ONNX Runtime."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from diffusers import DiTTransformer2DModel
from dit_export.checkpoints.sources import Checkpoint, Source, load_checkpoint
from safetensors.torch import load_file, save_file
from support.bundles import step_inputs

from dit_runtime.backends.onnxruntime.engine import OnnxRuntimeEngine
from dit_runtime.bundle.reader import Bundle, open_bundle
from dit_runtime.verify.metrics import relative_error

# Largest relative error of a forward against diffusers in FP32.
# max|Δ| over the largest value; measured: 7.8e-7 and 5.2e-4 (forward), 1.1e-6 and 8.8e-4 (decoder)
FORWARD_LIMIT = {"fp32": 2e-6, "fp16": 2e-3}


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> Checkpoint:
    return load_checkpoint(Source(str(checkpoint)))


@pytest.fixture
def bundle(bundle_path: Path) -> Bundle:
    return open_bundle(bundle_path)


@pytest.fixture
def engine(bundle: Bundle) -> OnnxRuntimeEngine:
    return OnnxRuntimeEngine(bundle, threads=1)


def predicted(
    transformer: DiTTransformer2DModel, z: np.ndarray, timesteps: list[float], labels: list[int]
) -> np.ndarray:
    """diffusers' own output ``[N, 2C, H, W]``."""
    with torch.inference_mode():
        return transformer(
            torch.from_numpy(z), timestep=torch.tensor(timesteps), class_labels=torch.tensor(labels)
        ).sample.numpy()


def test_names_and_axes_are_the_documented_ones(bundle: Bundle) -> None:
    """Inputs, outputs and dynamic dimensions of the ONNX files are what the bundle format promises."""
    expected = {
        "conditioner": ({"timesteps": ["rows"], "labels": ["rows"]}, {"modulation": ["rows", 14, 64]}),
        "step": (
            {
                "state": ["batch", 3, 4, 8, 8],
                "noise": ["batch", 4, 8, 8],
                "coefficients": ["batch", 17],
                "guidance": ["branches", "batch", 4],
                "rows": ["branches", "batch"],
                "modulation": ["rows", 14, 64],
            },
            {"next_state": ["batch", 3, 4, 8, 8], "denoised": ["batch", 4, 8, 8]},
        ),
        "decoder": (
            {"latents": ["batch", 4, "height", "width"]},
            {"images": ["batch", "4*height", "4*width", 3], "decoded": ["batch", 3, "4*height", "4*width"]},
        ),
    }
    for name, (inputs, outputs) in expected.items():
        graph = onnx.load(bundle.graph(name), load_external_data=False).graph
        assert {item.name: axes(item) for item in graph.input} == inputs
        assert {item.name: axes(item) for item in graph.output} == outputs
        spec = bundle.manifest.graphs[name]
        assert {tensor.name: list(tensor.shape) for tensor in spec.inputs} == inputs
        assert {tensor.name: list(tensor.shape) for tensor in spec.outputs} == outputs


def axes(value: onnx.ValueInfoProto) -> list[int | str]:
    return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]


def test_graphs_say_nothing_of_the_machine_that_made_them(bundle: Bundle) -> None:
    """No stack trace, path or exporter note is left, the opset is readable by TensorRT 10.3, nodes name their block."""
    for name in bundle.manifest.graphs:
        path = bundle.graph(name)
        model = onnx.load(path, load_external_data=False)
        assert not model.metadata_props
        assert not any(node.metadata_props or node.doc_string for node in model.graph.node)
        assert not re.search(rb"\.py|site-packages|/home|/root|stack_trace", path.read_bytes())
        assert [item.version for item in model.opset_import if item.domain == ""] == [20]
        assert not any(node.op_type == "Attention" for node in model.graph.node)
        locations = {e.value for t in model.graph.initializer for e in t.external_data if e.key == "location"}
        assert locations <= {Path(bundle.manifest.graphs[name].weights).name}
    names = {node.name for node in onnx.load(bundle.graph("step"), load_external_data=False).graph.node}
    assert {"blocks.0.attn.qkv/MatMul", "blocks.1.mlp/Gelu", "final/MatMul"} <= names


def test_the_probe_shares_the_steps_weights(bundle: Bundle) -> None:
    """The probe adds outputs, not another copy of the weights."""
    graphs = bundle.manifest.graphs
    assert graphs["probe"].weights == graphs["step"].weights
    assert [tensor.name for tensor in graphs["probe"].outputs][2:] == ["blocks.0", "blocks.1"]


def test_weights_leave_the_loop(bundle: Bundle, transformer: DiTTransformer2DModel) -> None:
    """The step's weight file holds neither embedders nor modulation weights, and nothing twice."""
    names = ("attn1", "ff.", "pos_embed", "proj_out_2")
    elements = sum(p.numel() for n, p in transformer.named_parameters() if any(name in n for name in names))
    elements += transformer.pos_embed.pos_embed.numel()
    size = bundle.manifest.files[bundle.manifest.graphs["step"].weights].bytes
    per_element = size / elements
    assert per_element <= (2.3 if bundle.manifest.precision.name == "fp16" else 4.1)


@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("branches", [1, 2, 3])
def test_any_batch_and_any_branches(
    bundle: Bundle, engine: OnnxRuntimeEngine, transformer: DiTTransformer2DModel, batch: int, branches: int
) -> None:
    """Batch and guidance branches are dynamic; every image has its own timestep, labels and weights."""
    random = np.random.default_rng(batch * 10 + branches)
    z = random.standard_normal((batch, 4, 8, 8)).astype(np.float32)
    timesteps = random.integers(0, 1000, (branches, batch))
    labels = random.integers(0, 11, (branches, batch))
    inputs = step_inputs(z, branches)
    inputs["guidance"] = random.uniform(-1, 2, inputs["guidance"].shape).astype(np.float32)
    inputs["coefficients"][:, 2] = 1  # next z = s0 + exp(v)·noise
    inputs["coefficients"][:, 15] = inputs["coefficients"][:, 16] = 1
    inputs["noise"] = np.ones_like(z)
    order = random.permutation(branches * batch)  # rows may lie anywhere in the table
    (table,) = engine.session("conditioner").run(
        {
            "timesteps": timesteps.reshape(-1)[order].astype(np.float32),
            "labels": labels.reshape(-1)[order].astype(np.int32),
        },
        ["modulation"],
    )
    rows = np.argsort(order).reshape(branches, batch).astype(np.int32)
    next_state, e = engine.session("step").run(
        {**inputs, "rows": rows, "modulation": table}, ["next_state", "denoised"]
    )
    outputs = [predicted(transformer, z, list(t), list(y)) for t, y in zip(timesteps, labels, strict=True)]
    expected = sum(
        weights[..., None, None] * output[:, :4] for weights, output in zip(inputs["guidance"], outputs, strict=True)
    )
    limit = FORWARD_LIMIT[bundle.manifest.precision.name]
    assert relative_error(e, expected) <= limit
    assert relative_error(next_state[:, 0] - z, np.exp(outputs[0][:, 4:])) <= limit
    assert not next_state[:, 1:].any()


def test_the_sampler_update_is_the_documented_one(engine: OnnxRuntimeEngine) -> None:
    """denoised = a·s₀ + b·e; s' = A·s + B·e; s'₀ += exp(g + h·v)·k·noise, with all 17 numbers different per image."""
    random = np.random.default_rng(3)
    z = random.standard_normal((3, 4, 8, 8)).astype(np.float32)
    inputs = step_inputs(z, 1)
    (table,) = engine.session("conditioner").run(
        {"timesteps": np.float32([900, 400, 10]), "labels": np.int32([1, 2, 10])}, ["modulation"]
    )
    inputs |= {"rows": np.int32([[0, 1, 2]]), "modulation": table}
    step = engine.session("step")
    (e,) = step.run(inputs, ["denoised"])
    probe = inputs["coefficients"].copy()
    probe[:, 15:] = 1
    next_state, _ = step.run(inputs | {"coefficients": probe, "noise": np.ones_like(z)}, ["next_state", "denoised"])
    v = np.log(next_state[:, 0])
    state = random.standard_normal((3, 3, 4, 8, 8)).astype(np.float32)
    state[:, 0] = z
    noise = random.standard_normal(z.shape).astype(np.float32)
    c = random.uniform(-1, 1, (3, 17)).astype(np.float32)
    found, denoised = step.run(inputs | {"state": state, "noise": noise, "coefficients": c}, ["next_state", "denoised"])
    for image in range(3):
        a, b = c[image, :2]
        matrix, gains = c[image, 2:11].reshape(3, 3), c[image, 11:14]
        g, h, k = c[image, 14:]
        expected = np.einsum("ij,jchw->ichw", matrix, state[image]) + gains[:, None, None, None] * e[image]
        expected[0] += np.exp(g + h * v[image]) * k * noise[image]
        assert relative_error(denoised[image], a * z[image] + b * e[image]) <= 2e-7  # measured: 0
        assert relative_error(found[image], expected) <= 2e-7  # measured: 9.3e-8


def test_the_decoder_makes_pipeline_images(bundle: Bundle, engine: OnnxRuntimeEngine, reference: Checkpoint) -> None:
    """uint8 NHWC images are those of diffusers' decode, clamp and numpy_to_pil."""
    latents = np.random.default_rng(5).standard_normal((3, 4, 8, 8)).astype(np.float32)
    images, decoded = engine.session("decoder").run({"latents": latents}, ["images", "decoded"])
    with torch.inference_mode():
        scaled = torch.from_numpy(latents) / reference.autoencoder.config.scaling_factor
        expected = reference.autoencoder.decode(scaled).sample
    assert relative_error(decoded, expected.numpy()) <= FORWARD_LIMIT[bundle.manifest.precision.name]
    expected_images = ((expected / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy() * 255).round().astype(np.uint8)
    assert images.dtype == np.uint8
    difference = np.abs(images.astype(int) - expected_images.astype(int))
    assert difference.max() <= (1 if bundle.manifest.precision.name == "fp32" else 2)


def test_the_decoder_casts_after_its_activations(bundles: dict[str, Path]) -> None:
    """Between a norm and its activation is no cast, for which TensorRT-RTX would keep the whole tensor in FP32."""
    graph = onnx.load(open_bundle(bundles["fp16"]).graph("decoder"), load_external_data=False).graph
    casts = {node.output[0] for node in graph.node if node.op_type == "Cast"}
    activations = [node for node in graph.node if node.op_type == "Sigmoid"]
    assert len(activations) == 17  # two in each of 8 residual blocks, and the last
    assert not any(node.input[0] in casts for node in activations)


def test_different_embedder_copies_stay_different(checkpoint: Path, tmp_path: Path) -> None:
    """A fine-tune may change diffusers' per-block embedder copies: then the conditioner keeps each, and stays exact."""
    from dit_export.graphs.from_weights import conditioner_from_weights, step_from_weights
    from dit_export.graphs.precision import FP32

    path = Path(shutil.copytree(checkpoint, tmp_path / "tuned"))
    file = path / "transformer" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    state["transformer_blocks.1.norm1.emb.class_embedder.embedding_table.weight"] *= 1.5
    state["transformer_blocks.1.norm1.emb.timestep_embedder.linear_1.bias"] += 0.1
    save_file(state, file)
    tuned = load_checkpoint(Source(str(path)))
    spec, numerics = tuned.model, tuned.numerics
    conditioner = conditioner_from_weights(spec, numerics, FP32, tuned.weights)
    assert len(conditioner.embedders) == spec.depth
    step = step_from_weights(spec, numerics, FP32, tuned.weights, tuned.positions(spec.latent_size))
    z = np.random.default_rng(7).standard_normal((2, 4, 8, 8)).astype(np.float32)
    inputs = step_inputs(z, 1)
    with torch.inference_mode():
        table = conditioner(torch.tensor([800.0, 30.0]), torch.tensor([4, 9], dtype=torch.int32))
        arrays = [torch.from_numpy(inputs[name]) for name in ("state", "noise", "coefficients", "guidance")]
        _, e, *_ = step(*arrays, torch.tensor([[0, 1]], dtype=torch.int32), table)
    assert tuned.transformer is not None
    # measured: 2.5e-7
    assert relative_error(e.numpy(), predicted(tuned.transformer(), z, [800.0, 30.0], [4, 9])[:, :4]) <= 1e-6
