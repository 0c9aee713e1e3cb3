"""``manifest.json``, typed: what a bundle is, what its graphs take and give, and how closely they must match.

A manifest comes from elsewhere: reading it raises for anything that does not hold together.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import PurePosixPath
from typing import Any

from dit_runtime.bundle.precision import Precision, is_kept
from dit_runtime.core.decode import Amount, Natural, Positive, decode

SCHEMA = 5
GRAPHS = ("conditioner", "step", "probe", "decoder")
ENCODER = "encoder"
SIZED_GRAPHS = ("step", "probe")  # traced for one size each; the others take any
CONDITIONINGS = ("adaln-zero", "adaln", "cross-attention", "in-context")
PATHS = ("linear", "gvp", "vp")


@dataclass(frozen=True)
class ModelSpec:
    """The transformer's shape. Sizes are in latent pixels; ``width`` is the hidden size D.

    ``conditioning`` is one of ``CONDITIONINGS``, the paper's four.
    """

    conditioning: str
    latent_channels: Positive
    latent_size: tuple[Positive, Positive]
    patch_size: Positive
    width: Positive
    depth: Positive
    heads: Positive
    mlp_width: Positive
    classes: Natural
    learned_variance: bool

    @property
    def grid(self) -> tuple[int, int]:
        """Patches per column and row."""
        return self.latent_size[0] // self.patch_size, self.latent_size[1] // self.patch_size

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def attentions(self) -> int:
        """Attention operations in one forward."""
        return self.depth * (2 if self.conditioning == "cross-attention" else 1)

    @property
    def output_channels(self) -> int:
        return self.latent_channels * (2 if self.learned_variance else 1)

    @property
    def null_class(self) -> int:
        """The label of the unconditional branch."""
        return self.classes


@dataclass(frozen=True)
class DiffusionSpec:
    """The forward process and what the network predicts, with the reference scheduler's conventions.

    ``betas``: float64, one per training timestep; a last one of 1 is zero terminal SNR. ``prediction_type``:
    ``epsilon``, ``v_prediction``, or ``velocity`` with a ``path`` (SiT's ``linear``, ``gvp`` or ``vp``) in place of
    betas. ``guidance_channels``: how many latent channels classifier-free guidance acts on, from the first.
    ``timestep_spacing``, ``steps_offset`` and ``set_alpha_to_one`` are diffusers' scheduler settings of the same names.
    """

    betas: tuple[float, ...]
    prediction_type: str
    guidance_channels: Natural
    timestep_spacing: str
    steps_offset: int
    set_alpha_to_one: bool
    path: str | None = None


@dataclass(frozen=True)
class TensorSpec:
    """A graph input or output: axes are sizes or the names of dynamic dimensions."""

    name: str
    dtype: str
    shape: tuple[Natural | str, ...]


@dataclass(frozen=True)
class GraphSpec:
    """An ONNX file of the bundle, the file with its weights, and its tensors."""

    file: str
    weights: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True)
class AutoencoderSpec:
    """``factor`` is image pixels per latent pixel; the other two are inside the graphs, and here for the record."""

    name: str
    scaling_factor: float
    shift_factor: float
    factor: Positive


@dataclass(frozen=True)
class PrecisionSpec:
    """The precision of the graphs, and the named units that stay FP32."""

    name: Precision
    keep_fp32: tuple[str, ...]

    def precision_of(self, unit: str) -> Precision:
        """What a named unit, such as ``blocks.17.mlp``, is computed in."""
        return Precision.FP32 if is_kept(unit, self.keep_fp32) else self.name


@dataclass(frozen=True)
class SourceSpec:
    """Where the weights came from and which implementation is their reference."""

    name: str
    revision: str | None
    reference: str
    weights_sha256: str | None


@dataclass(frozen=True)
class DefaultsSpec:
    """What sampling uses where its caller says nothing."""

    sampler: str
    steps: Positive
    guidance: float


@dataclass(frozen=True)
class FileSpec:
    """A file's size and SHA-256."""

    bytes: Natural
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """``manifest.json``, typed.

    Attributes:
        sizes: the latent sizes (height, width) that there are graphs for; the first is ``model.latent_size``.
        tolerances: by precision and kind of rung, the most that an engine may be off, whatever PyTorch is.
        thresholds: by precision and kind of rung, how many times PyTorch's own error an engine's may be.
        floors: by precision and record, PyTorch's own error in that precision: relative L2 of each block, image or
            step. FP32's is against FP64, the others' against FP32. A record of a further size is named as its graphs.
        magnitudes: of each unit of the precision policy, the largest |x| that enters or leaves a product of matrices on
            the reference's own trajectory; ``blocks.N`` is the residual stream after that block.
    """

    schema: int
    producer: dict[str, str]
    source: SourceSpec
    model: ModelSpec
    sizes: tuple[tuple[Positive, Positive], ...]
    diffusion: DiffusionSpec
    autoencoder: AutoencoderSpec
    precision: PrecisionSpec
    defaults: DefaultsSpec
    class_names: tuple[str, ...]
    graphs: dict[str, GraphSpec]
    tolerances: dict[str, dict[str, Amount]]
    thresholds: dict[str, dict[str, Amount]]
    floors: dict[str, dict[str, tuple[Amount, ...]]]
    magnitudes: dict[str, Amount]
    files: dict[str, FileSpec] = field(default_factory=dict)

    @property
    def table(self) -> TensorSpec:
        """The conditioning table, as the conditioner gives it and the step takes it."""
        return self.graphs["conditioner"].outputs[0]

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of an image in pixels."""
        return self.image_sizes[self.sizes.index(self.model.latent_size)]

    @property
    def image_sizes(self) -> tuple[tuple[int, int], ...]:
        """``sizes`` in pixels."""
        factor = self.autoencoder.factor
        return tuple((height * factor, width * factor) for height, width in self.sizes)

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def name_for_size(name: str, size: tuple[int, int]) -> str:
    """The name of a graph or folder of a size that is not the bundle's first."""
    return f"{name}-{size[0]}x{size[1]}"


def manifest_from_json(raw: Mapping[str, Any]) -> Manifest:
    """Raises DecodeError where a value is not what ``Manifest`` declares; ``check_consistency`` asks for the rest."""
    return decode(Manifest, raw)


def check_consistency(manifest: Manifest) -> None:
    """Raises ValueError for parts that do not fit each other."""
    model, diffusion = manifest.model, manifest.diffusion
    for name in manifest.files:
        parts = PurePosixPath(name).parts
        if not parts or name.startswith("/") or ".." in parts or "\\" in name or ":" in name:
            raise ValueError(f"file name {name!r} leads outside the bundle")
    if model.conditioning not in CONDITIONINGS:
        raise ValueError(f"conditioning {model.conditioning!r}")
    if not manifest.sizes or manifest.sizes[0] != model.latent_size:
        raise ValueError(f"sizes {manifest.sizes} do not begin with {model.latent_size}")
    expected = [*GRAPHS, *(name_for_size(name, size) for size in manifest.sizes[1:] for name in SIZED_GRAPHS)]
    if missing := [name for name in expected if name not in manifest.graphs]:
        raise ValueError(f"no graph {missing[0]!r}")
    table = [tensor.name for tensor in manifest.graphs["conditioner"].outputs]
    for name in expected:
        inputs = [tensor.name for tensor in manifest.graphs[name].inputs]
        if name.startswith(SIZED_GRAPHS) and (len(table) != 1 or table[0] not in inputs):
            raise ValueError(f"graph {name!r} does not take the conditioner's output")
    for graph in manifest.graphs.values():
        for file in (graph.file, graph.weights):
            if file not in manifest.files:
                raise ValueError(f"graph file {file!r} has no hash")
    for limits in (manifest.tolerances, manifest.thresholds):
        if manifest.precision.name not in limits:
            raise ValueError(f"no limits for {manifest.precision.name!r}")
    if (diffusion.prediction_type == "velocity") != (diffusion.path in PATHS):
        raise ValueError(f"prediction type {diffusion.prediction_type!r} with path {diffusion.path!r}")
    *betas, last = diffusion.betas or (0.5,)
    if diffusion.path is None and not (diffusion.betas and all(0 < beta < 1 for beta in betas) and 0 < last <= 1):
        raise ValueError("betas must lie between 0 and 1")
    if len(manifest.class_names) not in (0, model.classes):
        raise ValueError(f"{len(manifest.class_names)} class names for {model.classes} classes")
