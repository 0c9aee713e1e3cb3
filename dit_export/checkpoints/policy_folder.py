"""Reads a policy of huggingface/lerobot's multi-task DiT: ``config.json`` and ``model.safetensors``.

The network's tensors (``noise_predictor.``) get the official names. The observation encoder's are left out: the bundle
takes the vector that it makes. Shapes tell width, depth and the observation's length; ``config.json`` tells what no
shape does, and is compared with the weights in the rest.

Two of lerobot's conventions are another order of the same numbers, and are translated in the weights: sines before
cosines in the timestep's features, and rotary positions that turn channel i with channel i + d/2 of a head, which
become neighbors.
"""

from __future__ import annotations

import functools
import json
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from dit_export.checkpoints.checkpoint import Checkpoint
from dit_export.checkpoints.diffusers_folder.scheduler import check_betas, check_clip, diffusion_from_config
from dit_export.checkpoints.diffusers_folder.scheduler_options import check_config
from dit_export.checkpoints.diffusers_modules import explain_config_errors, read_json_object
from dit_export.checkpoints.families import FAMILIES
from dit_export.checkpoints.formats import CheckpointFormat, Location
from dit_export.checkpoints.key_errors import check_shapes, error_for_keys, short_name
from dit_export.checkpoints.layouts import Numerics
from dit_export.checkpoints.positions import ROTARY
from dit_export.checkpoints.source import Source
from dit_export.checkpoints.weights import SAFE, StoredTensor, Weights, check_sha256, read_weights_file
from dit_runtime.bundle.manifest import DefaultsSpec, DiffusionSpec, ModelSpec
from dit_runtime.core.decode import DecodeError, decode
from dit_runtime.core.errors import CheckpointError
from dit_runtime.samplers.options import DDIM, DDPM

logger = logging.getLogger("dit_runtime.export")  # a command prints what is logged below dit_runtime

FAMILY = "multi-task-dit"
CONFIG, WEIGHTS = "config.json", "model.safetensors"
KIND = "multi_task_dit"  # what lerobot's configuration says of itself
MOST_ACTIONS = 4096  # of a chunk
OBSERVATIONS = 16  # recorded ones, which verification takes in place of classes
NETWORK, _ENCODER = "noise_predictor.", "observation_encoder."
_SCHEDULERS = {"DDPM": DDPM, "DDIM": DDIM}
_PREDICTIONS = ("epsilon", "sample")  # lerobot raises for others
_NORMALIZERS = ("policy_preprocessor.json", "policy_postprocessor.json")


@dataclass(frozen=True)
class _Config:
    """A value of ``config.json`` by its name, checked when it is asked for."""

    path: Path
    values: Mapping[str, Any]

    def get(self, name: str, kind: Any) -> Any:
        if name not in self.values:
            raise CheckpointError(
                f"{self.path}: says no {name}, which no shape tells; expected it as lerobot writes it"
            )
        try:
            return decode(kind, self.values[name], name)
        except DecodeError as error:
            raise CheckpointError(f"{self.path}: {error}; correct it") from error

    def check(self, name: str, found: Any, kind: Any = int) -> None:
        """Check that what the file says, if it says it, is what the weights have."""
        if name in self.values and self.get(name, kind) != found:
            raise CheckpointError(
                f"{self.path}: says {name} = {self.values[name]!r:.60}, and the weights are of {found!r}; they do not "
                "belong together"
            )


def _recognizes(location: Location) -> bool:
    path = location.path
    if path is None or not (path.is_dir() or path.suffix == SAFE):
        return False
    config = (path if path.is_dir() else path.parent) / CONFIG
    if not config.is_file() or (path.is_dir() and (path / "model_index.json").exists()):
        return False
    try:
        return read_json_object(config).get("type") == KIND
    except CheckpointError:
        if path.is_dir():
            raise  # no other format's folder has such a file
        return False  # a file of another format may lie beside anything; `error_without_config` reads it again


def _load(source: Source, location: Location) -> Checkpoint:
    path = location.path
    assert path is not None
    folder, file = (path, path / WEIGHTS) if path.is_dir() else (path.parent, path)
    if source.family not in (None, FAMILY):
        raise CheckpointError(f"{path}: is a policy of lerobot's multi-task DiT, --family says {source.family}")
    if source.autoencoder is not None or source.guidance_channels is not None:
        raise CheckpointError(
            f"{path}: is a policy, without autoencoder and guidance; leave --vae and --guidance-channels out"
        )
    if not file.is_file():
        raise CheckpointError(f"{file}: missing; expected the weights beside {CONFIG}, as lerobot saves a policy")
    config = _Config(folder / CONFIG, read_json_object(folder / CONFIG))
    tensors = _take_network(file, read_weights_file(file).tensors)
    sha256 = check_sha256([file], source.sha256)
    own = Weights(str(file), tensors)
    model = _spec_of(config, str(file), own.shapes)
    base = config.get("rope_base", float) if model.rotary else Numerics().rotary_base
    if not base > 1:
        raise CheckpointError(f"{config.path}: rope_base {base:g}; expected a number above 1")
    scheduler, diffusion, defaults = _process_of(config, model.latent_channels)
    if any((folder / name).exists() for name in _NORMALIZERS):
        logger.info(
            "%s: its normalizers (%s) stay yours: observations go in normalized, and actions come out normalized",
            folder,
            " and ".join(_NORMALIZERS),
        )
    numerics = Numerics(frequency_shift=1.0, rotary_base=base)
    return Checkpoint(
        name=location.name,
        revision=location.revision,
        weights_sha256=sha256,
        family=FAMILY,
        model=model,
        trained_size=model.latent_size,
        sizes=(model.latent_size,),
        channels=model.latent_channels,
        numerics=numerics,
        diffusion=diffusion,
        defaults=defaults,
        weights=Weights(str(file), _official_from_own(own, model, numerics)),
        autoencoder=None,
        scheduler=scheduler,
        own_weights=own,
    )


def error_without_config(file: Path) -> CheckpointError:
    """The error for a policy's weights without a configuration that fits: none, of another type, or unreadable."""
    config, wanted = file.parent / CONFIG, f"that of lerobot's {KIND}, which tells what no shape does"
    if not config.exists():
        return CheckpointError(f"{file}: no {CONFIG} beside it; expected {wanted}; give the policy's folder")
    try:
        kind = read_json_object(config).get("type")
    except CheckpointError as error:
        return error
    if kind == KIND:
        return CheckpointError(f"{file}: expected a policy's weights in a {SAFE} file, as lerobot saves them")
    return CheckpointError(f"{config}: says type {kind!r:.60}; expected {wanted}; give the policy's own folder")


def _take_network(file: Path, tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The network's tensors, by their names in it. The log names the encoder that is left out."""
    network = {name.removeprefix(NETWORK): item for name, item in tensors.items() if name.startswith(NETWORK)}
    left = [name for name in tensors if name.startswith(_ENCODER)]
    if not network:
        raise error_for_keys(str(file), tensors, [f"{NETWORK}input_proj.weight"], [])
    if others := [name for name in tensors if not name.startswith((NETWORK, _ENCODER))]:
        raise error_for_keys(str(file), tensors, [], others)
    if left:
        count = sum(math.prod(tensors[name].shape) for name in left)
        logger.info(
            "%s: left out the observation encoder, which stays yours: %d tensors (%s, …), %.1f M parameters",
            file,
            len(left),
            short_name(left[0]),
            count / 1e6,
        )
    return network


def _spec_of(config: _Config, file: str, shapes: Mapping[str, tuple[int, ...]]) -> ModelSpec:
    """The model that the shapes and the configuration describe."""
    essential = (
        "input_proj.weight",
        "time_mlp.1.weight",
        "transformer_blocks.0.adaLN_modulation.1.weight",
        "transformer_blocks.0.mlp.0.weight",
    )
    if missing := [name for name in essential if len(shapes.get(name, ())) != 2 or not all(shapes[name])]:
        raise error_for_keys(file, shapes, missing, [])
    width, actions = shapes["input_proj.weight"]
    time, hidden = shapes["time_mlp.1.weight"][1], shapes["transformer_blocks.0.mlp.0.weight"][0]
    inputs = shapes["transformer_blocks.0.adaLN_modulation.1.weight"][1]
    numbers = {name.split(".")[1] for name in shapes if name.startswith("transformer_blocks.")}
    depth, horizon, heads = len(numbers), config.get("horizon", int), config.get("num_heads", int)
    rotary = "transformer_blocks.0.attn.qkv_proj.weight" in shapes
    if horizon > MOST_ACTIONS:
        raise CheckpointError(f"{config.path}: horizon {horizon}, expected {MOST_ACTIONS} at most")
    for name, value in (("horizon", horizon), ("num_heads", heads), ("observation", inputs - time), ("time", time - 3)):
        if value < 1:
            raise CheckpointError(f"{file}: {name} {value}, expected 1 or more")
    if width % heads or (rotary and width // heads % 2) or time % 2:
        raise CheckpointError(
            f"{config.path}: {heads} heads for width {width}, and a timestep of {time} numbers; expected heads that "
            "divide the width, into even parts where positions are rotary, and an even timestep"
        )
    for name, found in (("hidden_dim", width), ("num_layers", depth), ("timestep_embed_dim", time)):
        config.check(name, found)
    config.check("use_rope", rotary, bool)
    config.check("use_positional_encoding", "pos_embedding" in shapes, bool)
    features = config.values.get("output_features")
    action = features.get("action") if isinstance(features, dict) else None
    stated = action.get("shape") if isinstance(action, dict) else None
    if stated not in (None, [actions]):
        raise CheckpointError(
            f"{config.path}: says actions of shape {stated!r:.60}, and the weights are of {[actions]}; they do not "
            "belong together"
        )
    spec = ModelSpec(
        conditioning="adaln-zero",
        latent_channels=actions,
        latent_size=(1, horizon),
        patch_size=1,
        width=width,
        depth=depth,
        heads=heads,
        mlp_width=hidden,
        classes=OBSERVATIONS,
        learned_variance=False,
        has_null=False,
        rotary=rotary,
        observation=inputs - time,
        time_width=time,
    )
    try:
        decode(ModelSpec, json.loads(json.dumps(asdict(spec))))  # as the manifest's reader checks it
    except DecodeError as error:
        raise CheckpointError(f"{file}: {error}; a bundle holds no such model") from error
    check_shapes(file, shapes, own_shapes(spec, "pos_embedding" in shapes))
    return spec


def own_shapes(spec: ModelSpec, has_positions: bool) -> dict[str, tuple[int, ...]]:
    """Name and shape of each of the network's parameters in lerobot's file."""
    d, time, inputs = spec.width, spec.time_width, spec.time_width + spec.observation
    linears = {
        "input_proj": (d, spec.latent_channels),
        "time_mlp.1": (2 * time, time),
        "time_mlp.3": (time, 2 * time),
        "output_proj": (spec.latent_channels, d),
    }
    shapes: dict[str, tuple[int, ...]] = {"pos_embedding": (1, spec.tokens, d)} if has_positions else {}
    for index in range(spec.depth):
        block = f"transformer_blocks.{index}"
        if spec.rotary:
            linears |= {f"{block}.attn.qkv_proj": (3 * d, d), f"{block}.attn.out_proj": (d, d)}
        else:
            linears[f"{block}.multihead_attn.out_proj"] = (d, d)
            shapes[f"{block}.multihead_attn.in_proj_weight"] = (3 * d, d)
            shapes[f"{block}.multihead_attn.in_proj_bias"] = (3 * d,)
        linears |= {f"{block}.mlp.0": (spec.mlp_width, d), f"{block}.mlp.2": (d, spec.mlp_width)}
        linears[f"{block}.adaLN_modulation.1"] = (6 * d, inputs)
    for name, (outputs, own_inputs) in linears.items():
        shapes |= {f"{name}.weight": (outputs, own_inputs), f"{name}.bias": (outputs,)}
    return shapes


def _official_from_own(own: Weights, spec: ModelSpec, numerics: Numerics) -> dict[str, StoredTensor]:
    """The network's tensors by official name, in the order of channels that the exported modules have."""
    head = spec.width // spec.heads

    def made(name: str, change: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> StoredTensor:
        return StoredTensor(shape, lambda: change(own[name]))

    def as_it_is(name: str) -> StoredTensor:
        return made(name, lambda tensor: tensor, own.shapes[name])

    def interleave(qkv: Tensor) -> Tensor:
        """Rows of queries and keys so that the channels i and i + d/2 of a head are neighbors."""
        q, k, v = qkv.unflatten(0, (3, spec.heads, head)).unbind(0)
        order = torch.arange(head).unflatten(0, (2, -1)).T.flatten()
        return torch.stack([q[:, order], k[:, order], v]).flatten(0, 2)

    found = {
        "x_embedder.proj.weight": made(
            "input_proj.weight", lambda t: t[:, :, None, None], (spec.width, spec.latent_channels, 1, 1)
        ),
        "x_embedder.proj.bias": as_it_is("input_proj.bias"),
        # lerobot's features are sines, then cosines.
        "t_embedder.mlp.0.weight": made(
            "time_mlp.1.weight", lambda t: t.roll(spec.time_width // 2, 1), own.shapes["time_mlp.1.weight"]
        ),
        "t_embedder.mlp.0.bias": as_it_is("time_mlp.1.bias"),
        "pos_embed": as_it_is("pos_embedding") if "pos_embedding" in own else _stored_zeros(1, spec.tokens, spec.width),
    }
    names = {"t_embedder.mlp.2": "time_mlp.3", "final_layer.linear": "output_proj"}
    attention = "attn" if spec.rotary else "multihead_attn"
    for index in range(spec.depth):
        block, theirs = f"blocks.{index}", f"transformer_blocks.{index}"
        names |= {
            f"{block}.attn.proj": f"{theirs}.{attention}.out_proj",
            f"{block}.mlp.fc1": f"{theirs}.mlp.0",
            f"{block}.mlp.fc2": f"{theirs}.mlp.2",
            f"{block}.adaLN_modulation.1": f"{theirs}.adaLN_modulation.1",
        }
        for kind in ("weight", "bias"):
            name = f"{theirs}.attn.qkv_proj.{kind}" if spec.rotary else f"{theirs}.multihead_attn.in_proj_{kind}"
            turned = made(name, interleave, own.shapes[name])
            found[f"{block}.attn.qkv.{kind}"] = turned if spec.rotary else as_it_is(name)
    found |= {
        f"{name}.{kind}": as_it_is(f"{theirs}.{kind}") for name, theirs in names.items() for kind in ("weight", "bias")
    }
    if spec.rotary:
        frequencies = numerics.rotary_base ** -(torch.arange(0, head, 2, dtype=torch.float64) / head)
        angles = torch.outer(torch.arange(spec.tokens, dtype=torch.float64), frequencies).repeat_interleave(2, dim=1)
        for name, function in zip(ROTARY, (torch.cos, torch.sin), strict=True):
            table = function(angles).float()
            found[name] = StoredTensor(tuple(table.shape), functools.partial(torch.clone, table))
    return found


def _stored_zeros(*shape: int) -> StoredTensor:
    return StoredTensor(shape, lambda: torch.zeros(shape))


def _process_of(config: _Config, actions: int) -> tuple[DDIMScheduler | None, DiffusionSpec, DefaultsSpec]:
    """The scheduler, the forward process and the defaults of sampling that the configuration describes."""
    objective = config.get("objective", str)
    if objective == "flow_matching":
        method, spread = config.get("integration_method", str), config.get("sigma_min", float)
        if method not in ("euler", "rk4") or spread != 0:
            raise CheckpointError(
                f"{config.path}: integration_method {method!r:.40} with sigma_min {spread:g}; expected euler (or rk4, "
                "which is sampled with Heun's method) and sigma_min 0"
            )
        if method == "rk4":
            logger.info("%s: integrates by rk4, which no sampler here does; the default is heun", config.path)
        diffusion = DiffusionSpec((), "velocity", actions, "uniform", 0, True, "linear")
        steps = config.get("num_integration_steps", int)
        return None, diffusion, _defaults(config, "euler" if method == "euler" else "heun", steps)
    if objective != "diffusion":
        raise CheckpointError(f"{config.path}: objective {objective!r:.60}; expected diffusion or flow_matching")
    name = config.get("noise_scheduler_type", str)
    if (kind := _SCHEDULERS.get(name)) is None:
        raise CheckpointError(f"{config.path}: noise_scheduler_type {name!r:.60}; expected DDPM or DDIM")
    options = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "prediction_type")
    values = {key: config.get(key, Any) for key in (*options, "clip_sample", "clip_sample_range")}
    if values["prediction_type"] not in _PREDICTIONS:
        raise CheckpointError(
            f"{config.path}: prediction_type {values['prediction_type']!r:.60}; expected {' or '.join(_PREDICTIONS)}"
        )
    check_config(config.path, kind, values)
    check_betas(config.path, values)
    check_clip(config.path, values)
    with explain_config_errors(config.path):
        scheduler = DDIMScheduler(**values)
        if kind == DDPM:
            scheduler.register_to_config(variance_type="fixed_small")  # the default of diffusers' DDPMScheduler
        diffusion = diffusion_from_config(scheduler.config, actions)
    steps, most = config.get("num_inference_steps", int | None), values["num_train_timesteps"]
    if steps is not None and steps > most:
        raise CheckpointError(
            f"{config.path}: num_inference_steps {steps}; expected num_train_timesteps {most} at most"
        )
    return scheduler, diffusion, _defaults(config, name.lower(), most if steps is None else steps)


def _defaults(config: _Config, sampler: str, steps: int) -> DefaultsSpec:
    if not 1 <= steps <= 10_000:
        raise CheckpointError(f"{config.path}: {steps} steps; expected 1 to 10000")
    return DefaultsSpec(sampler=sampler, steps=steps, guidance=FAMILIES[FAMILY].defaults.guidance)


FORMAT = CheckpointFormat(options=frozenset({"sha256"}), recognizes=_recognizes, load=_load)
