"""Checkpoints: from a folder, a file, a hub id or a preset to one description of the model and its weights.

Both the exporter and the reference start here, each in its own process. Weights have the official names and are read
one by one (``weights.py``); what each source means by them stays its own (``Numerics``, guidance, sampler).
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTTransformer2DModel
from torch import Tensor

from dit_export.checkpoints.diffusers_folder import (
    Autoencoder,
    autoencoder_spec,
    diffusers_from_official,
    diffusion_spec,
    json_object,
    load_autoencoder,
    load_module,
    load_scheduler,
    model_spec,
    official_from_diffusers,
    ready,
    transformer_config,
    transformer_weights,
)
from dit_export.checkpoints.layouts import (
    EMBEDDERS,
    PRESETS,
    SUPPORTED,
    Numerics,
    official_shapes,
    official_spec,
)
from dit_export.checkpoints.positions import diffusers_table, official_table
from dit_export.checkpoints.random_weights import SkippedInitialization, random_tensors, randomize
from dit_export.checkpoints.weights import (
    PICKLES,
    SAFE,
    Stored,
    Weights,
    checked_hash,
    files_of_module,
    training_arguments,
    weights_from_file,
)
from dit_runtime.bundle.manifest import (
    CONDITIONINGS,
    PATHS,
    AutoencoderSpec,
    DefaultsSpec,
    DiffusionSpec,
    ModelSpec,
)
from dit_runtime.core.errors import CheckpointError

FAMILIES = ("diffusers", "official", "sit")
PRESET = re.compile(r"([DS]iT-(?:S|B|L|XL))/([248])-(256|512)")
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+(@[\w.-]+)?")
OFFICIAL_VAE = "stabilityai/sd-vae-ft-mse"  # of the official sample.py
LARGEST_SIDE = 16384  # of an image, in pixels
TABLE_LIMIT = 1e-4  # largest difference of a positional table from the formula's for other sizes to be computed by it

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

DEFAULTS = {
    # DiTPipeline's default guidance scale, with the 50 DDIM steps that its scheduler is used with.
    "diffusers": DefaultsSpec(sampler="ddim", steps=50, guidance=4.0),
    # The official sample.py.
    "official": DefaultsSpec(sampler="ddpm", steps=250, guidance=4.0),
    # SiT's sample.py has an adaptive solver, which no table holds; the paper also uses Heun's.
    "sit": DefaultsSpec(sampler="heun", steps=50, guidance=4.0),
}


@dataclass(frozen=True)
class Source:
    """What to export, and what the source itself does not say.

    Attributes:
        name: a diffusers folder, a ``.pt`` or ``.safetensors`` file, a hub id (``owner/name[@revision]``) or a preset.
        random_seed: of a preset's weights.
        family: ``diffusers``, ``official`` or ``sit``; None is official for files, sit for presets of SiT, diffusers
            for all else.
        heads: attention heads, for shapes that are no preset of the paper.
        autoencoder: a folder or hub id with the VAE; None is the pipeline's own, or the official default.
        variant: of diffusers weights files, such as ``fp16``.
        sha256: the hash that the transformer's weights file must have.
        path: of a SiT: ``linear``, ``gvp`` or ``vp``; None is linear.
        guidance_channels: how many channels guidance acts on, 0 for all; None is the reference's own.
        image_sizes: heights and widths of images in pixels; none is the trained size.
        conditioning, classes, learned_variance: of a preset; None is adaLN-Zero, 1000 and learned.
        tiles: sides in latent pixels of the decoder's tiles that are recorded, for engines that are built for them.
    """

    name: str
    random_seed: int | None = None
    family: str | None = None
    heads: int | None = None
    autoencoder: str | None = None
    variant: str | None = None
    sha256: str | None = None
    path: str | None = None
    guidance_channels: int | None = None
    image_sizes: tuple[tuple[int, int], ...] = ()
    conditioning: str | None = None
    classes: int | None = None
    learned_variance: bool | None = None
    tiles: tuple[int, ...] = (32,)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Source:
        values = json.loads(text)
        sizes = tuple((int(h), int(w)) for h, w in values["image_sizes"])
        return Source(**{**values, "image_sizes": sizes, "tiles": tuple(values["tiles"])})


@dataclass(frozen=True)
class Checkpoint:
    """A model, its weights by official name, and where they came from.

    Attributes:
        name, revision, weights_sha256: of the source.
        family: whose conventions the model follows.
        model: its shape at the first size.
        trained_size: latent size (height, width) of its own positional table.
        sizes: latent sizes to export, the first is the model's.
        channels: output channels of the network, used or not.
        numerics, diffusion, defaults: the reference's own.
        weights: by official name; see ``official_from_diffusers`` for embedder copies.
        autoencoder: diffusers' module, unpatched.
        class_names: one per class, or none.
        scheduler: diffusers' own, of the diffusers family.
        transformer: loads diffusers' own transformer, of the diffusers family.
    """

    name: str
    revision: str | None
    weights_sha256: str | None
    family: str
    model: ModelSpec
    trained_size: tuple[int, int]
    sizes: tuple[tuple[int, int], ...]
    channels: int
    numerics: Numerics
    diffusion: DiffusionSpec
    defaults: DefaultsSpec
    weights: Weights
    autoencoder: Autoencoder
    class_names: tuple[str, ...] = ()
    scheduler: DDIMScheduler | None = None
    transformer: Callable[[], DiTTransformer2DModel] | None = None

    @property
    def copies_differ(self) -> bool:
        """Whether the source's copies of the embedders, one in each block, are not the same."""
        return f"blocks.0.{EMBEDDERS[0]}" in self.weights

    @property
    def autoencoder_spec(self) -> AutoencoderSpec:
        return autoencoder_spec(self.autoencoder)

    @property
    def reference(self) -> str:
        """What the golden records are made with."""
        if self.family == "diffusers":
            text = (
                "diffusers DiTTransformer2DModel, autoencoder and scheduler in DiTPipeline's loop, FP32, null = classes"
            )
            usual = self.model.latent_channels
        else:
            usual = 3
            model = "facebookresearch/DiT's model" if self.family == "official" else "willisma/SiT's model"
            if self.model.conditioning != "adaln-zero":
                model = f"the paper's {self.model.conditioning} DiT with the official numerics"
            path = f", {self.diffusion.path} path" if self.diffusion.path else ""
            loop = "respaced diffusion" if self.family == "official" else "fixed-step samplers"
            text = f"{model} and {loop}{path}, diffusers autoencoder, FP32"
        guided = self.diffusion.guidance_channels
        return text if guided == usual else f"{text}, guidance on {guided} of {self.model.latent_channels} channels"

    def at(self, size: tuple[int, int]) -> ModelSpec:
        """The model's shape at a latent size."""
        return replace(self.model, latent_size=size)

    def position(self, size: tuple[int, int]) -> Tensor:
        """The positional table ``[1, T, D]`` at a latent size, as the reference has it or computes it."""
        spec = self.at(size)
        if self.family == "diffusers":
            return diffusers_table(spec.width, spec.grid, self.trained_size[0] // spec.patch_size)
        return self.weights["pos_embed"] if size == self.trained_size else official_table(spec.width, spec.grid)


def load_checkpoint(source: Source) -> Checkpoint:
    """A checkpoint, checked but for the weights' values, which are checked as they are read.

    Raises:
        CheckpointError: nothing there, unreadable, not a model that is supported, or options that do not fit it.
    """
    for what, value, known in (
        ("path", source.path, PATHS),
        ("family", source.family, FAMILIES),
        ("conditioning", source.conditioning, CONDITIONINGS),
    ):
        if value is not None and value not in known:
            raise CheckpointError(f"{what} {value!r} is unknown; expected one of {', '.join(known)}")
    if source.random_seed is not None:
        checkpoint = _preset(source)
    else:
        path, name, revision = _located(source.name)
        _refuse(source, "describe a preset", "conditioning", "classes", "learned_variance")
        checkpoint = _from_folder(source, path, name, revision) if path.is_dir() else _from_file(source, path)
    channels = checkpoint.model.latent_channels
    if checkpoint.autoencoder.config.latent_channels != channels:
        raise CheckpointError(
            f"{source.name}: {channels} latent channels, the autoencoder has "
            f"{checkpoint.autoencoder.config.latent_channels}; name the one it was trained with (--vae)"
        )
    if source.guidance_channels is not None:
        guided = source.guidance_channels or channels
        if guided > channels:
            raise CheckpointError(f"guidance on {guided} channels: expected at most {channels}, the latents'")
        diffusion = replace(checkpoint.diffusion, guidance_channels=guided)
        checkpoint = replace(checkpoint, diffusion=diffusion)
    return _with_sizes(checkpoint, source.image_sizes)


def _refuse(source: Source, why: str, *options: str) -> None:
    """Raises CheckpointError for options that say nothing of this source: ignored, they would be believed."""
    for option in options:
        if getattr(source, option) is not None:
            name = "fixed-variance" if option == "learned_variance" else option
            raise CheckpointError(f"{source.name}: --{name} is there to {why}; leave it out")


def _with_sizes(checkpoint: Checkpoint, image_sizes: tuple[tuple[int, int], ...]) -> Checkpoint:
    """The checkpoint at the sizes that were asked for."""
    if not image_sizes:
        return checkpoint
    step = checkpoint.autoencoder_spec.factor * checkpoint.model.patch_size
    sizes = []
    for height, width in image_sizes:
        if height % step or width % step or not step <= min(height, width) <= max(height, width) <= LARGEST_SIDE:
            raise CheckpointError(
                f"size {height}x{width}: expected multiples of {step}, a patch of this model in pixels, up to "
                f"{LARGEST_SIDE}"
            )
        factor = checkpoint.autoencoder_spec.factor
        sizes.append((height // factor, width // factor))
    if len(set(sizes)) != len(sizes):
        raise CheckpointError("sizes: one is there twice; name each once")
    elsewhere = checkpoint.family != "diffusers" and any(size != checkpoint.trained_size for size in sizes)
    if elsewhere and not _is_formula(checkpoint.weights, checkpoint.at(checkpoint.trained_size).grid):
        raise CheckpointError(
            f"{checkpoint.name}: its positional table is not the sines and cosines of the official code, so it has "
            "none for another size; leave --size out"
        )
    return replace(checkpoint, sizes=tuple(sizes), model=checkpoint.at(sizes[0]))


def _is_formula(weights: Weights, grid: tuple[int, int]) -> bool:
    """Whether the positional table is the official formula's at a grid, in the precision it is stored in."""
    table, stored = weights["pos_embed"], weights.stored["pos_embed"].read().dtype
    _, tokens, width = table.shape
    if width % 4 or grid[0] * grid[1] != tokens:
        return False
    return bool((table - official_table(width, grid).to(stored).float()).abs().max() <= TABLE_LIMIT)


def _trained_grid(source: Source, weights: Weights, patch: int, factor: int) -> tuple[int, int]:
    """Rows and columns of an official positional table: of those with as many tokens, the one whose values it has.

    A learned table tells nothing: it is taken to be square, or of the one size that was asked for and has its tokens.
    """
    tokens = weights.shapes["pos_embed"][1]
    asked = [(height // factor // patch, width // factor // patch) for height, width in source.image_sizes]
    possible = [(rows, tokens // rows) for rows in range(1, tokens + 1) if tokens % rows == 0]
    possible.sort(key=lambda grid: (grid[0] != grid[1], grid not in asked))
    for grid in possible:
        if _is_formula(weights, grid):
            return grid
    fitting = {grid for grid in asked if grid[0] * grid[1] == tokens}
    if possible[0][0] == possible[0][1]:
        return possible[0]
    if len(fitting) != 1:
        raise CheckpointError(
            f"{source.name}: a positional table of {tokens} tokens is not square; say what it was trained at with "
            "--size HEIGHTxWIDTH"
        )
    return fitting.pop()


def _located(name: str) -> tuple[Path, str, str | None]:
    """The path of a source, its name for the record, and the revision of a hub id."""
    path = Path(name)
    if path.is_dir():
        return path, path.resolve().name, None
    if path.is_file():
        if path.suffix not in (SAFE, *PICKLES):
            raise CheckpointError(f"{name}: is a {path.suffix or 'plain'} file; {SUPPORTED}")
        return path, path.stem, None
    if PRESET.fullmatch(name):
        raise CheckpointError(f"{name}: a preset has no weights of its own; add --random-weights SEED")
    if not HUB_ID.fullmatch(name):
        raise CheckpointError(f"{name}: no such checkpoint; {SUPPORTED}, a hub id or a preset")
    return _from_hub(name)


PIPELINE_PARTS = ("model_index.json", "transformer/config.json", "vae/config.json", "scheduler/scheduler_config.json")


def _from_hub(
    source: str,
    patterns: tuple[str, ...] = ("model_index.json", "transformer/*", "vae/*", "scheduler/*"),
    parts: tuple[str, ...] = PIPELINE_PARTS,
) -> tuple[Path, str, str]:
    """A hub repository's files; the cache is used as it is when all ``parts`` are in it."""
    from huggingface_hub import snapshot_download

    name, _, revision = source.partition("@")
    options: dict[str, Any] = {"revision": revision or None, "allow_patterns": list(patterns)}
    try:
        try:
            folder = snapshot_download(name, local_files_only=True, **options)
            cached = all((Path(folder) / part).is_file() for part in parts)
        except Exception:  # noqa: BLE001  # not cached: its exception types vary with the version
            cached = False
        if not cached:
            folder = snapshot_download(name, **options)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{source}: no such folder, and as a hub id it is neither cached nor reachable ({reason}); "
            "check the name, or download it and give the folder"
        ) from error
    # The snapshot's folder is named after its commit.
    return Path(folder), name, Path(folder).name


def _from_folder(source: Source, folder: Path, name: str, revision: str | None) -> Checkpoint:
    if source.family not in (None, "diffusers"):
        raise CheckpointError(f"{folder}: is a folder, which --family {source.family} does not have; give the file")
    _refuse(source, "describe files with the official names", "heads", "path")
    index = json_object(folder / "model_index.json")
    if (kind := index.get("_class_name")) != "DiTPipeline":
        raise CheckpointError(f"{folder}: is a {kind}; {SUPPORTED}")
    config = transformer_config(folder / "transformer")
    scheduler = load_scheduler(folder / "scheduler" / "scheduler_config.json")
    sha256 = checked_hash(files_of_module(folder / "transformer", source.variant), source.sha256)
    tensors = transformer_weights(folder / "transformer", config, source.variant)
    own = load_autoencoder(folder / "vae", source.variant) if source.autoencoder is None else None
    names = index.get("id2label") or {}
    if not isinstance(names, dict):
        raise CheckpointError(f"{folder}/model_index.json: id2label is no object; expected class names by number")
    classes = tuple(str(names.get(str(number), number)) for number in range(config.num_embeds_ada_norm))
    return _from_diffusers(
        config,
        official_from_diffusers(str(folder / "transformer"), tensors, config.num_layers),
        own or _autoencoder(source),
        scheduler,
        functools.partial(load_module, folder / "transformer", DiTTransformer2DModel, source.variant),
        name=name,
        revision=revision,
        weights_sha256=sha256,
        class_names=classes if names else (),
    )


def _from_diffusers(
    config: Any,
    weights: Weights,
    autoencoder: Autoencoder,
    scheduler: DDIMScheduler,
    transformer: Callable[[], DiTTransformer2DModel],
    **described: Any,
) -> Checkpoint:
    spec = model_spec(config)
    return Checkpoint(
        family="diffusers",
        model=spec,
        trained_size=spec.latent_size,
        sizes=(spec.latent_size,),
        channels=spec.output_channels,
        numerics=Numerics(frequency_shift=1.0, mlp_eps=config.norm_eps),
        diffusion=diffusion_spec(scheduler.config, spec.latent_channels),
        defaults=DEFAULTS["diffusers"],
        weights=weights,
        autoencoder=autoencoder,
        scheduler=scheduler,
        transformer=transformer,
        **described,
    )


def _from_file(source: Source, file: Path) -> Checkpoint:
    family = source.family or "official"
    if family == "diffusers":
        raise CheckpointError(f"{file}: is a file; with --family diffusers expected a DiTPipeline folder")
    _refuse(source, "choose among a diffusers folder's files", "variant")
    if family != "sit":
        _refuse(source, "describe a SiT (--family sit)", "path")
    sha256 = checked_hash([file], source.sha256)
    weights = Weights(str(file), weights_from_file(file, ema=True))
    _check_arguments(source, family, training_arguments(file))
    autoencoder = _autoencoder(source)
    factor = autoencoder_spec(autoencoder).factor
    spec, channels = official_spec(
        str(file),
        weights.shapes,
        heads=source.heads,
        learned_variance=family == "official",
        grid=lambda patch: _trained_grid(source, weights, patch, factor),
    )
    return _official(source, family, spec, channels, weights, autoencoder, file.stem, sha256)


def _check_arguments(source: Source, family: str, said: dict[str, Any]) -> None:
    """Raises CheckpointError where a training checkpoint's own arguments speak of another model than is exported."""
    model, path = str(said.get("model", "")), str(said.get("path_type", "")).lower()
    if model.startswith("SiT") and family != "sit":
        raise CheckpointError(f"{source.name}: was trained as {model}; export it with --family sit")
    if family == "sit" and said.get("prediction", "velocity") != "velocity":
        raise CheckpointError(f"{source.name}: predicts the {said['prediction']}; only velocity models are supported")
    if family == "sit" and path in PATHS and path != (source.path or PATHS[0]):
        raise CheckpointError(f"{source.name}: was trained on the {path} path; export it with --path {path}")


def _official(
    source: Source,
    family: str,
    spec: ModelSpec,
    channels: int,
    weights: Weights,
    autoencoder: Autoencoder,
    name: str,
    sha256: str | None,
) -> Checkpoint:
    if family == "official":
        scheduler = DDIMScheduler(**LINEAR_BETAS)
        diffusion = replace(diffusion_spec(scheduler.config, 3), timestep_spacing="official", steps_offset=0)
    else:
        diffusion = DiffusionSpec((), "velocity", 3, "uniform", 0, True, source.path or PATHS[0])
    diffusion = replace(diffusion, guidance_channels=min(3, spec.latent_channels))
    return Checkpoint(
        name=name,
        revision=None,
        weights_sha256=sha256,
        family=family,
        model=spec,
        trained_size=spec.latent_size,
        sizes=(spec.latent_size,),
        channels=channels,
        numerics=Numerics(),
        diffusion=diffusion,
        defaults=DEFAULTS[family],
        weights=weights,
        autoencoder=autoencoder,
    )


def _autoencoder(source: Source) -> Autoencoder:
    """The autoencoder that ``--vae`` names, or the official default."""
    name = source.autoencoder or OFFICIAL_VAE
    folder = Path(name)
    if not folder.is_dir():
        try:
            patterns = ("config.json", "diffusion_pytorch_model*", "vae/*")
            folder, _, _ = _from_hub(name, patterns, ("config.json",))
        except CheckpointError as error:
            raise CheckpointError(
                f"autoencoder {error}; a file has none of its own: name a folder with --vae"
            ) from error
    return load_autoencoder(folder, source.variant)


def _preset(source: Source) -> Checkpoint:
    match = PRESET.fullmatch(source.name)
    if match is None:
        raise CheckpointError(
            f"{source.name}: not a preset; with --random-weights expected one of {', '.join(PRESETS)}, "
            "with patch size and image size, such as DiT-XL/2-256"
        )
    assert source.random_seed is not None
    _refuse(source, "describe a file", "heads", "variant", "sha256")
    conditioning = source.conditioning or "adaln-zero"
    learned = source.learned_variance is not False
    sit = match[1].startswith("SiT")
    family = source.family or ("sit" if sit else "diffusers" if conditioning == "adaln-zero" else "official")
    if family == "diffusers" and conditioning != "adaln-zero":
        raise CheckpointError(f"conditioning {conditioning}: diffusers has none such; use --family official")
    if sit != (family == "sit"):
        raise CheckpointError(f"{source.name} with --family {family}: expected a preset of the same family")
    if not sit:
        _refuse(source, "describe a SiT", "path")
    if source.autoencoder is None:
        with SkippedInitialization():
            autoencoder: Autoencoder = AutoencoderKL(**STABLE_DIFFUSION_VAE)
        randomize(autoencoder, source.random_seed + 1)
        ready(autoencoder)
    else:
        autoencoder = _autoencoder(source)
    depth, width, heads = PRESETS[match[1].replace("SiT", "DiT")]
    latent = int(match[3]) // autoencoder_spec(autoencoder).factor
    spec = ModelSpec(
        conditioning=conditioning,
        latent_channels=4,
        latent_size=(latent, latent),
        patch_size=int(match[2]),
        width=width,
        depth=depth,
        heads=heads,
        mlp_width=4 * width,
        classes=source.classes or 1000,
        learned_variance=learned and not sit,
    )
    name = f"{source.name} ({conditioning}, random weights, seed {source.random_seed})"
    channels = 2 * spec.latent_channels if sit and learned else spec.output_channels
    tensors = random_tensors(official_shapes(spec, channels), source.random_seed)
    tensors["pos_embed"] = Stored(tensors["pos_embed"].shape, lambda: official_table(spec.width, spec.grid))
    weights = Weights(source.name, tensors)
    if family != "diffusers":
        return _official(source, family, spec, channels, weights, autoencoder, name, None)
    config = {
        "num_attention_heads": heads,
        "attention_head_dim": width // heads,
        "in_channels": spec.latent_channels,
        "out_channels": spec.output_channels,
        "num_layers": depth,
        "sample_size": latent,
        "patch_size": spec.patch_size,
        "num_embeds_ada_norm": spec.classes,
    }

    def transformer() -> DiTTransformer2DModel:
        with SkippedInitialization():
            module = DiTTransformer2DModel(**config)
        module.load_state_dict(diffusers_from_official(weights, depth), assign=True)  # no second copy in memory
        loaded: DiTTransformer2DModel = ready(module)
        return loaded

    with torch.device("meta"):
        filled = DiTTransformer2DModel(**config).config
    return _from_diffusers(
        filled,
        weights,
        autoencoder,
        DDIMScheduler(**LINEAR_BETAS),
        transformer,
        name=name,
        revision=None,
        weights_sha256=None,
    )
