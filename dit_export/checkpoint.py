"""Checkpoints: from a folder, a hub id or a preset to diffusers' own modules, unpatched.

Both the exporter and the reference start here, each in its own process. Weights are FP32 in memory, whatever the file
holds.
"""

from __future__ import annotations

import json
import math
import re
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTTransformer2DModel
from diffusers.utils import logging
from torch import nn

from dit_runtime.bundle import AutoencoderSpec, DiffusionSpec, ModelSpec
from dit_runtime.errors import CheckpointError
from dit_runtime.files import sha256_of

# Peebles & Xie 2022, table 1: layers, width, heads.
PRESETS = {
    "DiT-S": (12, 384, 6),
    "DiT-B": (12, 768, 12),
    "DiT-L": (24, 1024, 16),
    "DiT-XL": (28, 1152, 16),
}
PATCH_SIZES = (2, 4, 8)
IMAGE_SIZES = (256, 512)
SUPPORTED = "expected a diffusers DiTPipeline folder (transformer/, vae/, scheduler/)"

# The Stable Diffusion VAE, which every published DiT uses.
STABLE_DIFFUSION_VAE: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 256,
    "scaling_factor": 0.18215,
}
LINEAR_BETAS = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02, "clip_sample": False}


@dataclass(frozen=True)
class Checkpoint:
    """diffusers' modules in FP32 evaluation mode, and where they came from."""

    name: str
    revision: str | None
    weights_sha256: str | None
    transformer: DiTTransformer2DModel
    autoencoder: AutoencoderKL
    scheduler: DDIMScheduler
    class_names: tuple[str, ...]

    @property
    def model(self) -> ModelSpec:
        config = self.transformer.config
        width = config.num_attention_heads * config.attention_head_dim
        out_channels = config.out_channels or config.in_channels
        return ModelSpec(
            conditioning="adaln-zero",
            latent_channels=config.in_channels,
            latent_size=(config.sample_size, config.sample_size),
            patch_size=config.patch_size,
            width=width,
            depth=config.num_layers,
            heads=config.num_attention_heads,
            mlp_width=4 * width,
            classes=config.num_embeds_ada_norm,
            learned_variance=out_channels == 2 * config.in_channels,
        )

    @property
    def diffusion(self) -> DiffusionSpec:
        config = self.scheduler.config
        return DiffusionSpec(
            betas=betas_of(config),
            prediction_type=config.prediction_type,
            guidance_channels=self.transformer.config.in_channels,
            timestep_spacing=config.timestep_spacing,
            steps_offset=config.steps_offset,
            set_alpha_to_one=config.set_alpha_to_one,
        )

    @property
    def autoencoder_spec(self) -> AutoencoderSpec:
        config, (height, width) = self.autoencoder.config, self.model.latent_size
        factor = 2 ** (len(config.block_out_channels) - 1)
        return AutoencoderSpec(
            name="AutoencoderKL",
            scaling_factor=config.scaling_factor,
            shift_factor=config.shift_factor or 0.0,
            image_size=(height * factor, width * factor),
        )


def load_checkpoint(source: str, random_seed: int | None = None) -> Checkpoint:
    """A checkpoint from a folder, a hub id (``owner/name[@revision]``) or, with ``random_seed``, a preset.

    Raises:
        CheckpointError: nothing there, unreadable, or not a model that is supported.
    """
    if random_seed is not None:
        return _random_checkpoint(source, random_seed)
    folder, name, revision = Path(source), source, None
    if not folder.exists():
        if PRESET.fullmatch(source):
            raise CheckpointError(f"{source}: a preset has no weights of its own; add --random-weights SEED")
        if not re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w.-]+)?", source) or source.startswith("."):
            raise CheckpointError(f"{source}: no such checkpoint; {SUPPORTED}, a hub id or a preset")
        folder, name, revision = _from_hub(source)
    if not folder.is_dir():
        raise CheckpointError(f"{source}: is a file; {SUPPORTED}")
    return _from_folder(folder, name if revision else folder.resolve().name, revision)


PRESET = re.compile(r"(DiT-(?:S|B|L|XL))/([248])-(256|512)")


def _random_checkpoint(source: str, seed: int) -> Checkpoint:
    match = PRESET.fullmatch(source)
    if match is None:
        raise CheckpointError(
            f"{source}: not a preset; with --random-weights expected one of {', '.join(PRESETS)}, "
            "with patch size and picture size, such as DiT-XL/2-256"
        )
    depth, width, heads = PRESETS[match[1]]
    patch, latent = int(match[2]), int(match[3]) // 8
    transformer = {
        "num_attention_heads": heads,
        "attention_head_dim": width // heads,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": depth,
        "sample_size": latent,
        "patch_size": patch,
        "num_embeds_ada_norm": 1000,
    }
    with _SkippedInitialization():
        dit = DiTTransformer2DModel(**transformer)
        autoencoder = AutoencoderKL(**STABLE_DIFFUSION_VAE)
    randomize(dit, seed)
    randomize(autoencoder, seed + 1)
    return Checkpoint(
        name=f"{source} (random weights, seed {seed})",
        revision=None,
        weights_sha256=None,
        transformer=_ready(dit),
        autoencoder=_ready(autoencoder),
        scheduler=DDIMScheduler(**LINEAR_BETAS),
        class_names=(),
    )


def randomize(module: nn.Module, seed: int) -> None:
    """Seeded weights under which every part acts: scaled by fan-in, gates and modulations not zero.

    diffusers' copies of the timestep and label embedders get the same weights, as converted checkpoints have them.
    """
    generator = torch.Generator().manual_seed(seed)
    copied: dict[str, torch.Tensor] = {}
    for name, parameter in module.named_parameters():
        key = re.sub(r"transformer_blocks\.\d+\.norm1\.emb\.", "emb.", name)
        if key != name and key in copied:
            parameter.data.copy_(copied[key])
            continue
        with torch.no_grad():
            if parameter.ndim > 1:
                parameter.normal_(0, 1 / math.sqrt(parameter[0].numel()), generator=generator)
            elif "norm" in name and name.endswith("weight"):
                parameter.fill_(1).add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
            else:
                parameter.normal_(0, 0.02, generator=generator)
        if key != name:
            copied[key] = parameter.data


class _SkippedInitialization:
    """Leave torch's own weight initialization out: the weights are overwritten at once."""

    def __enter__(self) -> None:
        self._saved = {kind: kind.reset_parameters for kind in (nn.Linear, nn.Conv2d, nn.Embedding)}
        for kind in self._saved:
            kind.reset_parameters = lambda self: None  # type: ignore[method-assign]

    def __exit__(self, *_: object) -> None:
        for kind, original in self._saved.items():
            kind.reset_parameters = original  # type: ignore[method-assign]


def _from_hub(source: str) -> tuple[Path, str, str]:
    from huggingface_hub import snapshot_download

    name, _, revision = source.partition("@")
    patterns = ["model_index.json", *(f"{part}/*" for part in ("transformer", "vae", "scheduler"))]
    options: dict[str, Any] = {"revision": revision or None, "allow_patterns": patterns}
    try:
        try:
            folder = snapshot_download(name, local_files_only=True, **options)
        except Exception:  # noqa: BLE001  # not cached: its exception types vary with the version
            folder = snapshot_download(name, **options)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{source}: no such folder, and as a hub id it is neither cached nor reachable ({reason}); "
            f"check the name, or download it and give the folder; {SUPPORTED}"
        ) from error
    # The snapshot's folder is named after its commit.
    return Path(folder), name, Path(folder).name


def _from_folder(folder: Path, name: str, revision: str | None) -> Checkpoint:
    index = _json(folder / "model_index.json")
    kind = index.get("_class_name")
    if kind != "DiTPipeline":
        raise CheckpointError(f"{folder}: is a {kind}; {SUPPORTED}")
    _check_transformer(folder / "transformer" / "config.json")
    autoencoder_kind = _json(folder / "vae" / "config.json").get("_class_name")
    if autoencoder_kind != "AutoencoderKL":
        raise CheckpointError(f"{folder}/vae: is a {autoencoder_kind}; expected an AutoencoderKL")
    scheduler = _scheduler(folder / "scheduler" / "scheduler_config.json")
    hashes = []
    modules: list[nn.Module] = []
    for part, module_class in (("transformer", DiTTransformer2DModel), ("vae", AutoencoderKL)):
        modules.append(_module(folder / part, module_class))
        files = sorted([*(folder / part).glob("*.safetensors"), *(folder / part).glob("*.bin")])
        hashes += [sha256_of(file) for file in files]
    transformer, autoencoder = modules
    assert isinstance(transformer, DiTTransformer2DModel)
    assert isinstance(autoencoder, AutoencoderKL)
    names = index.get("id2label") or {}
    classes = transformer.config.num_embeds_ada_norm
    class_names = tuple(str(names.get(str(number), number)) for number in range(classes)) if names else ()
    return Checkpoint(
        name,
        revision,
        hashes[0] if len(hashes) == 1 else "+".join(hashes),
        transformer,
        autoencoder,
        scheduler,
        class_names,
    )


def _module(folder: Path, kind: type[Any]) -> Any:
    """A diffusers module from its folder: safetensors, or ``.bin`` read with ``weights_only``."""
    stored = list(folder.glob("*.safetensors")) or list(folder.glob("*.bin"))
    if not stored:
        raise CheckpointError(f"{folder}: no weights (*.safetensors or *.bin); {SUPPORTED}")
    for file in stored:
        if file.suffix == ".bin":
            _check_pickle(file)
    safe = stored[0].suffix == ".safetensors"
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # what it would warn of is an error here
    try:
        module, report = kind.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=safe, local_files_only=True, output_loading_info=True
        )
    except Exception as error:  # safetensors, torch and diffusers each raise their own
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{folder}: cannot be read ({reason}); download or copy it again") from error
    finally:
        logging.set_verbosity(verbosity)
    for problem in ("missing_keys", "unexpected_keys"):
        if keys := sorted(report[problem]):
            shown = ", ".join(keys[:10]) + (" …" if len(keys) > 10 else "")
            raise CheckpointError(
                f"{folder}: {len(keys)} {problem.replace('_', ' ')} ({shown}); expected a {kind.__name__}"
            )
    for name, parameter in module.named_parameters():
        if not torch.isfinite(parameter).all():
            raise CheckpointError(f"{folder}: {name} holds NaN or infinity; this checkpoint is damaged")
    return _ready(module)


def _check_pickle(file: Path) -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old pickle protocols
            torch.load(file, map_location="meta", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:
        # torch's own message advises to switch the protection off.
        raise CheckpointError(
            f"{file}: not a plain weights file: reading it could execute code, or it is damaged; "
            "convert it to safetensors where you trust it"
        ) from error


def _check_transformer(path: Path) -> None:
    config = _json(path)
    kind = config.get("_class_name")
    if kind != "DiTTransformer2DModel" and not (
        kind == "Transformer2DModel" and config.get("norm_type") == "ada_norm_zero"
    ):
        raise CheckpointError(f"{path}: is a {kind}; expected a class-conditional DiTTransformer2DModel")
    expected = {
        "norm_type": "ada_norm_zero",
        "activation_fn": "gelu-approximate",
        "attention_bias": True,
        "upcast_attention": False,
        "norm_elementwise_affine": False,
    }
    for key, value in expected.items():
        if (found := config.get(key, value)) != value:
            raise CheckpointError(f"{path}: {key} is {found!r}; only {value!r} is supported")
    channels, out = config.get("in_channels", 4), config.get("out_channels")
    if out not in (None, channels, 2 * channels):
        raise CheckpointError(
            f"{path}: {out} output channels for {channels} latent channels; expected as many or twice"
        )


def _scheduler(path: Path) -> DDIMScheduler:
    config = _json(path)
    for key in ("clip_sample", "thresholding"):
        # DDIMScheduler and DDPMScheduler clip unless told not to: the file may leave the key out.
        clips = key == "clip_sample" and config.get("_class_name") in ("DDIMScheduler", "DDPMScheduler")
        if config.get(key, clips):
            raise CheckpointError(
                f"{path}: {key} is not supported (it is not linear in the network's output); set it to false"
            )
    if (prediction := config.get("prediction_type", "epsilon")) not in ("epsilon", "v_prediction"):
        raise CheckpointError(
            f"{path}: prediction type {prediction!r} is not supported; expected 'epsilon' or 'v_prediction'"
        )
    if config.get("rescale_betas_zero_snr") and prediction == "epsilon":
        raise CheckpointError(
            f"{path}: rescale_betas_zero_snr with epsilon prediction: at the first timestep the noise says nothing "
            "about the picture; expected prediction_type 'v_prediction', or rescale_betas_zero_snr false"
        )
    known = {key: value for key, value in config.items() if not key.startswith("_")}
    names = DDIMScheduler().config.keys()
    return DDIMScheduler(**{key: value for key, value in known.items() if key in names})


def betas_of(config: Any) -> tuple[float, ...]:
    """The forward process's betas in float64 from a diffusers scheduler configuration, rescaled if it says so."""
    betas = torch.tensor(_scheduled_betas(config), dtype=torch.float64)
    if config.rescale_betas_zero_snr:
        # Lin et al. 2023 (arXiv 2305.08891), algorithm 1: √ᾱ is shifted to end at 0 and scaled to begin where it did.
        root = (1 - betas).cumprod(0).sqrt()
        alpha_bar = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
        betas = 1 - alpha_bar / torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
    return tuple(betas.tolist())


def _scheduled_betas(config: Any) -> tuple[float, ...]:
    if config.trained_betas is not None:
        return tuple(float(beta) for beta in config.trained_betas)
    count = config.num_train_timesteps
    if config.beta_schedule == "linear":
        betas = torch.linspace(config.beta_start, config.beta_end, count, dtype=torch.float64)
    elif config.beta_schedule == "scaled_linear":
        betas = torch.linspace(config.beta_start**0.5, config.beta_end**0.5, count, dtype=torch.float64) ** 2
    elif config.beta_schedule == "squaredcos_cap_v2":
        times = torch.arange(count + 1, dtype=torch.float64) / count
        alpha_bar = torch.cos((times + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)
    else:
        raise CheckpointError(
            f"beta schedule {config.beta_schedule!r} is not supported; expected linear or scaled_linear"
        )
    return tuple(betas.tolist())


def _ready(module: nn.Module) -> Any:
    return module.eval().requires_grad_(False)


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"{path}: missing; {SUPPORTED}")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON ({error}); download or copy it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: not a JSON object; download or copy it again")
    return value
