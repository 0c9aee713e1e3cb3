"""lerobot's multi-task DiT policy against its oracle: the files, the exported graphs, ``Policy`` and its loops.

The network's oracle is ``support/policies.py``, in NumPy, whose rotary positions are complex numbers. The schedulers
are diffusers' own. Errors are max|Δ| over the largest value, and what was measured stands beside each limit.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from dit_export.bundle import bundle_from_checkpoint
from dit_export.checkpoints import policy_folder
from dit_export.checkpoints.positions import ROTARY, Positions
from dit_export.checkpoints.sources import Checkpoint, Source, load_checkpoint
from dit_export.graphs.from_weights import conditioner_from_weights, step_from_weights
from dit_export.graphs.precision import FP16, FP32
from dit_export.reference.pipeline import Reference
from dit_export.reference.record_settings import Measurements
from onnx import numpy_helper
from support.bundles import edit_graph, signed
from support.commands import run_command
from support.engines import step_on_rtx
from support.policies import (
    ACTIONS,
    DIFFUSION,
    FLOW,
    HORIZON,
    OBSERVATION,
    policy_config,
    policy_weights,
    predict,
    save_policy,
)

from dit_engines.command import main as build
from dit_runtime import Pipeline, Policy
from dit_runtime.backends.onnxruntime.engine import OnnxRuntimeEngine
from dit_runtime.bundle.reader import Bundle, open_bundle
from dit_runtime.commands.soak import SoakRequest, run_soak
from dit_runtime.core.errors import BundleError, CheckpointError, SamplingError
from dit_runtime.output.ray_shards import write_shards_on_ray
from dit_runtime.output.request import ClusterRequest, LabelledImages, OutputRequest, SampleRequest, ShardSettings
from dit_runtime.verify.metrics import relative_error
from dit_runtime.verify.verification import verify
from dit_serve.ray_serve import app
from dit_serve.triton_files import TritonRequest, write_model

FORWARD_LIMIT = 2e-6  # measured: 3.9e-7
TRAJECTORY_LIMIT = 2e-5
KINDS: dict[str, dict[str, Any]] = {
    "ddim": {},
    "ddpm": {"noise_scheduler_type": "DDPM", "prediction_type": "sample", "clip_sample_range": 0.7},
    "flow": FLOW,
}
OBSERVATIONS = np.random.default_rng(3).standard_normal((3, OBSERVATION)).astype(np.float32)


def loaded(folder: Path, rotary: bool = True, positions: bool = False, **changes: Any) -> Checkpoint:
    weights = policy_weights(rotary, positions)
    return load_checkpoint(Source(str(save_policy(folder, weights, policy_config(rotary, positions, **changes)))))


def test_a_policys_folder_is_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Shapes, configuration and scheduler; the encoder and the normalizers are named as the user's."""
    (tmp_path / "policy_preprocessor.json").write_text("{}")
    with caplog.at_level(logging.INFO, "dit_runtime"):
        found = loaded(tmp_path)
    model, diffusion = found.model, found.diffusion
    assert (model.observation, model.time_width, model.latent_channels, model.latent_size) == (11, 16, 3, (1, 8))
    assert (model.heads, model.rotary, model.clips, model.has_null) == (4, True, True, False)
    assert (found.defaults.sampler, found.defaults.steps, found.defaults.guidance) == ("ddim", 10, 1.0)
    assert diffusion.options.clip_bound == 1.0
    scheduler = DDIMScheduler(**{key: value for key, value in DIFFUSION.items() if key in DDIMScheduler().config})
    assert np.allclose(diffusion.betas, scheduler.betas.numpy(), rtol=1e-6)  # float32
    assert "left out the observation encoder, which stays yours: 1 tensors" in caplog.text
    assert "observations go in normalized, and actions come out normalized" in caplog.text
    file = load_checkpoint(Source(str(tmp_path / "model.safetensors")))
    assert (file.family, file.name) == ("multi-task-dit", "model")


def test_objectives_are_read(tmp_path: Path) -> None:
    """DDPM with its own variance, unclipped; and flow matching, whose time runs from the noise at 0."""
    ddpm = loaded(tmp_path / "a", noise_scheduler_type="DDPM", num_inference_steps=None, clip_sample=False)
    assert (ddpm.defaults.sampler, ddpm.defaults.steps, ddpm.model.clips) == ("ddpm", 100, False)
    assert ddpm.diffusion.options.variance_type == "fixed_small"
    flow = loaded(tmp_path / "b", positions=True, **FLOW)
    assert (flow.diffusion.path, flow.diffusion.time, flow.defaults.sampler) == ("linear", "noise-at-0", "euler")
    assert loaded(tmp_path / "c", **{**FLOW, "integration_method": "rk4"}).defaults.sampler == "heun"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"horizon": 0}, "horizon 0, expected 1 or more"),
        ({"horizon": 10**9}, "horizon 1000000000, expected 4096 at most"),
        ({"horizon": "8"}, "horizon: got '8', expected a whole number"),
        ({"num_heads": 5}, "5 heads for width 64"),
        ({"hidden_dim": 32}, "says hidden_dim = 32, and the weights are of 64"),
        ({"num_layers": 3}, "says num_layers = 3, and the weights are of 2"),
        ({"use_rope": False}, "says use_rope = False, and the weights are of True"),
        ({"use_positional_encoding": True}, "says use_positional_encoding = True"),
        ({"output_features": {"action": {"shape": [4]}}}, r"actions of shape \[4\], and the weights are of \[3\]"),
        ({"objective": "consistency"}, "objective 'consistency'; expected diffusion or flow_matching"),
        ({"noise_scheduler_type": "DPM"}, "noise_scheduler_type 'DPM'; expected DDPM or DDIM"),
        ({"beta_schedule": "exp"}, "beta_schedule: got 'exp'"),
        ({"clip_sample_range": -1.0}, "clip_sample_range -1; expected a number from 1e-06"),
        ({"rope_base": 0}, "rope_base 0; expected a number above 1"),
        ({"rope_base": "10000"}, "rope_base: got '10000', expected a finite number"),
        ({**FLOW, "sigma_min": 0.1}, "with sigma_min 0.1; expected euler"),
        ({**FLOW, "integration_method": "dopri5"}, "integration_method 'dopri5'"),
        ({"num_inference_steps": 0}, "0 steps"),
        ({"num_inference_steps": 101}, "num_inference_steps 101; expected num_train_timesteps 100 at most"),
        ({"prediction_type": "v_prediction"}, "prediction_type 'v_prediction'; expected epsilon or sample"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        loaded(tmp_path, **changes)
    assert "\n" not in str(caught.value)


def test_what_is_no_whole_policy_is_refused(tmp_path: Path) -> None:
    """Keys that are missing or spare, a configuration that says too little or is not there, and other options."""
    weights, config = policy_weights(), policy_config()
    less = {name: tensor for name, tensor in weights.items() if "blocks.1.mlp.2.bias" not in name}
    with pytest.raises(CheckpointError, match=r"1 missing keys \(transformer_blocks.1.mlp.2.bias\)"):
        load_checkpoint(Source(str(save_policy(tmp_path / "a", less, config))))
    with pytest.raises(CheckpointError, match=r"1 unexpected keys \(critic.weight\)"):
        load_checkpoint(Source(str(save_policy(tmp_path / "b", {**weights, "critic.weight": torch.ones(2)}, config))))
    del config["horizon"]
    with pytest.raises(CheckpointError, match="says no horizon, which no shape tells"):
        load_checkpoint(Source(str(save_policy(tmp_path / "c", weights, config))))
    folder = save_policy(tmp_path / "d", weights, policy_config())
    for options, message in (
        ({"family": "sit"}, "is a policy of lerobot's multi-task DiT, --family says sit"),
        ({"autoencoder": "x"}, "leave --vae and"),
        ({"image_sizes": ((8, 8),)}, "leave --size out"),
        ({"tiles": (8,)}, "without a decoder; leave --decode-tile out"),
    ):
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(Source(str(folder), **options))  # type: ignore[arg-type]
    file = folder / "model.safetensors"
    torch.save({"weight": torch.ones(1)}, folder / "model.pt")
    with pytest.raises(CheckpointError, match=r"expected a policy's weights in a .safetensors file"):
        load_checkpoint(Source(str(folder / "model.pt"), family="multi-task-dit"))
    (folder / "config.json").unlink()
    for options in ({"autoencoder": "x"}, {"family": "multi-task-dit"}):
        with pytest.raises(CheckpointError, match=r"no config.json beside it; expected that of lerobot's multi_task_d"):
            load_checkpoint(Source(str(file), **options))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", [".", "model.safetensors"])
def test_a_damaged_configuration_is_named(name: str, tmp_path: Path) -> None:
    """As a folder and as a file: cut off, and no object; and one of another policy."""
    path, whole = save_policy(tmp_path, policy_weights(), policy_config()) / name, json.dumps(policy_config())
    other = "model_index.json: missing" if path.is_dir() else "config.json: says type 'act'; expected that of lerobot's"
    for content, message in ((whole[:200], "not JSON"), ("[1]", "not a JSON object"), ('{"type": "act"}', other)):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(Source(str(path)))


def test_a_model_that_no_bundle_holds_is_refused(tmp_path: Path) -> None:
    """By the manifest's own ranges, before the export: here an action of more numbers than they allow."""
    weights = policy_weights()
    weights["noise_predictor.input_proj.weight"] = torch.ones(64, 4097)
    weights["noise_predictor.output_proj.weight"] = torch.ones(4097, 64)
    weights["noise_predictor.output_proj.bias"] = torch.ones(4097)
    config = policy_config(output_features={})
    with pytest.raises(CheckpointError, match=r"latent_channels: got 4097, expected .* a bundle holds no such model"):
        load_checkpoint(Source(str(save_policy(tmp_path, weights, config))))


def run_modules(checkpoint: Checkpoint, z: np.ndarray, t: np.ndarray, weights: Any = None) -> np.ndarray:
    """The exported modules' prediction of latents ``[N, A, 1, T]``."""
    weights = checkpoint.weights if weights is None else weights
    spec, count = checkpoint.model, len(z)
    conditioner = conditioner_from_weights(spec, checkpoint.numerics, FP32, weights)
    rotary = torch.stack([weights[name] for name in ROTARY]) if spec.rotary else None
    positions = Positions(weights["pos_embed"], rotary)
    step = step_from_weights(spec, checkpoint.numerics, FP32, weights, positions)
    state, coefficients = torch.zeros(count, 3, *z.shape[1:]), torch.zeros(count, 17)
    state[:, 0], coefficients[:, 1] = torch.from_numpy(z), 1
    table = conditioner(torch.from_numpy(t), torch.from_numpy(OBSERVATIONS[:count]))
    rows, guidance = torch.arange(count)[None], torch.ones(1, count, ACTIONS)
    e: torch.Tensor = step(state, torch.zeros_like(state[:, 0]), coefficients, guidance, rows, table)[1]
    return e.numpy()


@pytest.mark.parametrize(("rotary", "positions"), [(True, False), (False, True), (True, True), (False, False)])
def test_network_and_reference_are_the_oracles(rotary: bool, positions: bool, tmp_path: Path) -> None:
    """Both of PyTorch's implementations, which share no code, against NumPy's."""
    checkpoint = loaded(tmp_path, rotary, positions)
    z = np.random.default_rng(1).standard_normal((3, ACTIONS, 1, HORIZON)).astype(np.float32)
    t = np.float32([0, 37, 99])
    x = z[:, :, 0].transpose(0, 2, 1)
    wanted = predict(policy_weights(rotary, positions), x, t, OBSERVATIONS, rotary).transpose(0, 2, 1)[:, :, None]
    reference = Reference(checkpoint)
    reference.observations = torch.from_numpy(OBSERVATIONS)
    with torch.inference_mode():
        assert relative_error(run_modules(checkpoint, z, t), wanted) <= FORWARD_LIMIT
        own, _ = reference.predict(torch.from_numpy(z), torch.from_numpy(t), torch.arange(3), 1.0)
    assert relative_error(own.numpy(), wanted) <= FORWARD_LIMIT
    assert np.abs(wanted).max() > 0.1


@pytest.mark.parametrize(
    ("name", "mistake"),
    [
        ("t_embedder.mlp.0.weight", lambda tensor: tensor.roll(8, 1)),
        ("blocks.0.attn.qkv.weight", lambda tensor: tensor.unflatten(0, (3, 4, 8, 2)).transpose(2, 3).flatten(0, 3)),
        ("feat_rope.freqs_sin", lambda tensor: -tensor),
    ],
)
def test_the_order_of_channels_matters(name: str, mistake: Callable[..., torch.Tensor], tmp_path: Path) -> None:
    """Cosines for sines, rotary positions on the other halves of heads, turned the other way: far from the oracle."""
    checkpoint = loaded(tmp_path)
    z = np.random.default_rng(1).standard_normal((3, ACTIONS, 1, HORIZON)).astype(np.float32)
    t = np.float32([1, 37, 99])
    with torch.inference_mode():
        right = run_modules(checkpoint, z, t)
        wrong = run_modules(checkpoint, z, t, {**checkpoint.weights, name: mistake(checkpoint.weights[name])})
    assert relative_error(wrong, right) > 1e-3


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Bundle]:
    """Bundles without golden records, each exported once."""
    found: dict[str, Bundle] = {}

    def export(kind: str) -> Bundle:
        if kind not in found:
            folder = tmp_path_factory.mktemp(f"policy-{kind}")
            config = policy_config(**KINDS[kind.removesuffix("-fp16")])
            source = Source(str(save_policy(folder / "p", policy_weights(), config)))
            precision = FP16 if kind.endswith("-fp16") else FP32
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("dit_export.bundle.records_in_process", lambda *_: Measurements())
                found[kind] = bundle_from_checkpoint(source, folder / "p.bundle", precision)
        return found[kind]

    return export


def policy_of(bundle: Bundle) -> Policy:
    return Policy(bundle, OnnxRuntimeEngine(bundle, threads=1))


def test_actions_depend_on_their_own_observation_and_seed(exports: Callable[[str], Bundle]) -> None:
    """The shapes of what goes in and comes out; a batch is its parts, to the bit."""
    policy = policy_of(exports("ddim"))
    assert (policy.horizon, policy.actions, policy.observation) == (HORIZON, ACTIONS, OBSERVATION)
    actions = policy(OBSERVATIONS, 7)
    assert (actions.shape, actions.dtype) == ((3, HORIZON, ACTIONS), np.float32)
    assert np.abs(actions).max() <= 1.0  # the last step gives a clipped estimate
    assert np.array_equal(policy(OBSERVATIONS, 7), actions)
    assert np.array_equal(policy(OBSERVATIONS[1], 8)[0], actions[1])
    assert np.array_equal(policy(OBSERVATIONS[::-1].copy(), [9, 8, 7])[::-1], actions)
    assert not np.allclose(policy(OBSERVATIONS[[0, 0, 0]], 7)[1], actions[1])
    assert not np.allclose(policy(OBSERVATIONS, 8), actions)
    drawn = [torch.randn(ACTIONS, 1, HORIZON, generator=torch.Generator().manual_seed(seed)) for seed in (7, 8, 9)]
    noise = np.ascontiguousarray(torch.stack(drawn)[:, :, 0].transpose(1, 2).numpy())
    assert relative_error(policy(OBSERVATIONS, 7, noise=noise), actions) <= TRAJECTORY_LIMIT  # measured: 1.3e-6
    assert policy(OBSERVATIONS, 7, steps=3, sampler="dpmpp-2m").shape == actions.shape
    assert np.array_equal(policy(OBSERVATIONS, 7, steps=10, sampler="ddim"), actions)


@pytest.mark.parametrize(
    ("observation", "settings", "message"),
    [
        (OBSERVATIONS[:, :10], {}, r"float32 \[3, 10\]; expected float32 \[B, 11\], the vector"),
        (OBSERVATIONS.astype(np.float64), {}, r"float64 \[3, 11\]; expected float32"),
        (OBSERVATIONS.tolist(), {}, "float64"),
        ([[1, 2], [3]], {}, "observation: makes no array"),
        (torch.ones(OBSERVATION, requires_grad=True), {}, "observation: makes no array"),
        (OBSERVATIONS, {"noise": [[1, 2], [3]]}, "noise: makes no array"),
        (OBSERVATIONS[None], {}, r"float32 \[1, 3, 11\]"),
        (OBSERVATIONS[:0], {}, "a batch of none"),
        (np.where(np.arange(11) == 4, np.float32(np.nan), OBSERVATIONS), {}, "number 5 of observation 1 is nan"),
        (np.where(np.arange(11) == 0, np.float32(np.inf), OBSERVATIONS), {}, "number 1 of observation 1 is inf"),
        (OBSERVATIONS, {"seeds": [1]}, "1 seeds for 3 observations: expected one seed per observation"),
        (OBSERVATIONS, {"seeds": 1.5}, "seed"),
        (OBSERVATIONS, {"steps": 0}, "0 steps: expected 1 to 100"),
        (OBSERVATIONS, {"steps": 2.0}, "steps 2.0: expected a whole number"),
        (OBSERVATIONS, {"sampler": "euler"}, "sampler euler with a model of prediction type 'epsilon'"),
        (OBSERVATIONS, {"noise": np.zeros((3, ACTIONS, HORIZON), np.float32)}, r"expected finite float32 \[3, 8, 3\]"),
    ],
)
def test_wrong_arguments_are_one_line(
    observation: Any, settings: dict[str, Any], message: str, exports: Callable[[str], Bundle]
) -> None:
    with pytest.raises(SamplingError, match=message) as caught:
        policy_of(exports("ddim"))(observation, **settings)
    assert "\n" not in str(caught.value)


def test_images_and_actions_are_not_confused(exports: Callable[[str], Bundle]) -> None:
    bundle = exports("ddim")
    with pytest.raises(SamplingError, match=r"is a policy's bundle.* use dit_runtime.Policy\(bundle\)\(observation\)"):
        Pipeline(bundle, OnnxRuntimeEngine(bundle, threads=1))


def test_another_size_has_another_next_step(exports: Callable[[str], Bundle]) -> None:
    with pytest.raises(BundleError, match="is a policy's bundle, whose actions have one size; leave --size out"):
        exports("ddim").at((64, 64))


@pytest.mark.parametrize("change", [{"latent_size": [2, 4]}, {"patch_size": 2}])
def test_actions_are_one_row(change: dict[str, Any], exports: Callable[[str], Bundle], tmp_path: Path) -> None:
    """Of a manifest, before its graphs are looked at."""
    manifest = json.loads((exports("ddim").path / "manifest.json").read_text())
    manifest["model"] |= change
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match=r"a policy of latents [12] high with patch size [12]; expected 1 and 1"):
        open_bundle(tmp_path)


def test_what_makes_images_elsewhere_refuses_a_policy_at_once(
    exports: Callable[[str], Bundle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before a model is written for Triton, workers start on Ray, or a soak."""
    pytest.importorskip("prometheus_client")
    pytest.importorskip("starlette")
    monkeypatch.setitem(sys.modules, "ray.serve", ModuleType("ray.serve"))
    bundle = exports("ddim").path
    sample = SampleRequest(
        bundle,
        LabelledImages(("0",)),
        OutputRequest(tmp_path / "o", shards=ShardSettings(1)),
        cluster=ClusterRequest("x:1"),
    )
    for refuse in (
        lambda: write_model(TritonRequest(bundle, tmp_path)),
        lambda: app({"bundle": str(bundle)}),
        lambda: write_shards_on_ray(sample),
        lambda: run_soak(SoakRequest(bundle, None, "onnxruntime", None, 1.0, 0, None, False)),
    ):
        with pytest.raises(SamplingError, match=r"is a policy's bundle, which takes observations"):
            refuse()
    assert not list(tmp_path.iterdir())


def test_tiles_of_no_decoder_are_refused(exports: Callable[[str], Bundle], capsys: pytest.CaptureFixture[str]) -> None:
    """By dit-build, as a plan and as commands, before anything is built; the export is above."""
    for more in ([], ["--print-trtexec"]):
        with pytest.raises(SystemExit):
            build([str(exports("ddim").path), "--decode-tile", "8", *more])
        assert "without a decoder; leave --decode-tile out" in capsys.readouterr().err


def test_the_pages_example_runs(
    exports: Callable[[str], Bundle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """docs/policies.md, as written, on a bundle of the name that it has there."""
    page = (Path(__file__).parents[3] / "docs" / "policies.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    shutil.copytree(exports("ddim").path, tmp_path / "policy.bundle")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(example, "policies.md", "exec"), names)
    assert names["actions"].shape == (1, HORIZON, ACTIONS)


def follow(kind: str, steps: int, seeds: list[int]) -> np.ndarray:
    """Actions ``[B, T, A]`` of the unpatched scheduler, or of Euler's method written out, around the oracle."""
    config, weights = policy_config(**KINDS[kind]), policy_weights()
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    z = torch.stack([torch.randn(ACTIONS, 1, HORIZON, generator=generator) for generator in generators])

    def network(latents: torch.Tensor, t: float) -> torch.Tensor:
        x, times = latents[:, :, 0].transpose(1, 2).numpy(), np.full(len(seeds), t, np.float32)
        e = predict(weights, x, times, OBSERVATIONS[: len(seeds)])
        return torch.from_numpy(e).float().transpose(1, 2)[:, :, None]

    if kind == "flow":
        for index in range(steps):
            z = z + network(z, index / steps) / steps
    else:
        own = {key: config[key] for key in config if key in DDPMScheduler().config}
        scheduler: Any = DDPMScheduler(**own) if kind == "ddpm" else DDIMScheduler(**own)
        scheduler.set_timesteps(steps)
        for t in scheduler.timesteps:
            z = scheduler.step(network(z, float(t)), t, z, generator=generators).prev_sample
    return z[:, :, 0].transpose(1, 2).numpy()


@pytest.mark.parametrize("kind", ["ddim", *(pytest.param(each, marks=pytest.mark.slow) for each in ("ddpm", "flow"))])
def test_actions_are_the_unpatched_schedulers(kind: str, exports: Callable[[str], Bundle]) -> None:
    """The policy's own sampler, steps and clip; slow: an export each."""
    found = policy_of(exports(kind))(OBSERVATIONS, [4, 5, 6])
    assert relative_error(found, follow(kind, 10, [4, 5, 6])) <= TRAJECTORY_LIMIT


@pytest.mark.slow  # an export in FP16 and a build
def test_rtx_fuses_every_attention(exports: Callable[[str], Bundle], tmp_path: Path) -> None:
    """The real builder: rotary positions, observations and the clip leave each attention one fused kernel in FP16."""
    pytest.importorskip("tensorrt_rtx")
    profiles = step_on_rtx(exports("ddim-fp16"), tmp_path / "store")
    assert [(p.synchronizations, p.fused_attention) for p in profiles] == [(0, 2)] * 2


@pytest.fixture(scope="module")
def verified(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Bundles with golden records, as the command exports and verifies them."""
    found: dict[str, Path] = {}

    def export(kind: str) -> Path:
        if kind not in found:
            folder = tmp_path_factory.mktemp(f"policy-records-{kind}")
            source = save_policy(folder / "p", policy_weights(), policy_config(**KINDS[kind]))
            done = run_command("dit-export", source, "-o", folder / "p.bundle")
            assert done.returncode == 0, done.stderr + done.stdout
            assert "lerobot's multi-task DiT" in done.stdout
            found[kind] = folder / "p.bundle"
        return found[kind]

    return export


def ignore_observations(graph: onnx.GraphProto) -> None:
    for node in graph.node:
        for index, name in enumerate(node.input):
            if name == "observations":
                node.input[index] = "ignored"
    graph.node.insert(0, onnx.helper.make_node("Sub", ["observations", "observations"], ["ignored"], "ignored"))


def turn_the_wrong_way(graph: onnx.GraphProto) -> None:
    """Negate the rotary sines, which are 0 at the first action."""
    for tensor in graph.initializer:
        if list(tensor.dims) == [HORIZON, 16] and not tensor.external_data:
            array = numpy_helper.to_array(tensor)
            if not array[0].any():
                tensor.CopyFrom(numpy_helper.from_array(-array, tensor.name))


def edit_diffusion(bundle: Path, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    change(manifest["diffusion"])
    (bundle / "manifest.json").write_text(json.dumps(manifest))


FAULTS: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "observation ignored": ("ddim", lambda b: edit_graph(b, "conditioner", ignore_observations), "conditioner"),
    "turned the wrong way": (
        "ddim",
        lambda b: [edit_graph(b, name, turn_the_wrong_way) for name in ("step", "probe")],
        "blocks",
    ),
    "clip left out": ("ddim", lambda b: edit_diffusion(b, lambda d: d.pop("options")), "ddim teacher-forced"),
    "time reversed": ("flow", lambda b: edit_diffusion(b, lambda d: d.update(time="noise-at-1")), "euler teacher-fo"),
}


@pytest.mark.slow  # exports with records
@pytest.mark.parametrize("fault", FAULTS)
def test_a_seeded_fault_is_caught(fault: str, verified: Callable[[str], Path], tmp_path: Path) -> None:
    """Golden records are the family's own: what a family has alone cannot be wrong unseen."""
    kind, change, rung = FAULTS[fault]
    shutil.copytree(verified(kind), tmp_path / "bundle")
    change(tmp_path / "bundle")
    bundle = signed(tmp_path / "bundle")
    failed = next((each.name for each in verify(bundle, OnnxRuntimeEngine(bundle, threads=1)) if not each.passed), "")
    assert failed.startswith(rung)


@pytest.mark.slow  # an export with records
def test_auto_chooses_an_engine(verified: Callable[[str], Path]) -> None:
    """Verdicts, the choice and a command that reads the bundle need neither decoder nor classes."""
    bundle = open_bundle(verified("ddim"))
    assert Policy(bundle)(OBSERVATIONS).shape == (3, HORIZON, ACTIONS)
    for command in (["dit-verify", "--info"], ["dit-bench"]):
        done = run_command(command[0], verified("ddim"), *command[1:])
        assert done.returncode == 0, done.stderr
    assert "jitter (p99 - p50)" in done.stdout


def test_recorded_observations_are_as_many_as_the_file_says(tmp_path: Path) -> None:
    """Verification takes them in place of classes."""
    assert loaded(tmp_path).model.classes == policy_folder.OBSERVATIONS
