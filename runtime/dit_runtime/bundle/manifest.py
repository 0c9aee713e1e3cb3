"""The types of ``manifest.json``: the model, the graphs with their inputs and outputs, and the limits of verification.

A manifest is untrusted. Reading it raises an error for every value that is missing, unknown or inconsistent.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import PurePosixPath
from typing import Any

from dit_runtime.bundle.precision import EXPORTED, Precision, is_kept
from dit_runtime.core.decode import Amount, Natural, Positive, decode

SCHEMA = 5
GRAPHS = ("conditioner", "step", "probe", "decoder")
ENCODER = "encoder"
SIZED_GRAPHS = ("step", "probe")  # each is traced for one latent size; the other graphs take any size
CONDITIONINGS = ("adaln-zero", "adaln", "cross-attention", "in-context")
PATHS = ("linear", "gvp", "vp")


@dataclass(frozen=True)
class ModelSpec:
    """The transformer's architecture and shape.

    Attributes:
        conditioning: one of ``CONDITIONINGS``, the paper's four.
        latent_channels, latent_size: of the latents; the size is height and width in latent pixels.
        patch_size: side of a patch in latent pixels.
        width: the hidden size D.
        depth, heads: the number of blocks, and of attention heads in each.
        mlp_width: width of the MLP's hidden layer.
        classes: the number of classes, without the null class.
        learned_variance: whether the network also predicts the variance.
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
        """The number of patches along height and width."""
        return self.latent_size[0] // self.patch_size, self.latent_size[1] // self.patch_size

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def attentions(self) -> int:
        """The number of attention operations in one forward."""
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
    """The forward process, the quantity that the network predicts, and the reference scheduler's conventions.

    Attributes:
        betas: one float64 for each training timestep; a last beta of 1 means zero terminal SNR. Empty with a ``path``.
        prediction_type: ``epsilon``, ``v_prediction``, or ``velocity`` for a model with a ``path``.
        guidance_channels: the number of latent channels that classifier-free guidance acts on, from the first.
        timestep_spacing, steps_offset, set_alpha_to_one: diffusers' scheduler settings of the same names.
            A spacing of ``default`` is one that the checkpoint does not state: each sampler has its own.
        path: SiT's ``linear``, ``gvp`` or ``vp``; None for a model with betas.
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
    """An input or output of a graph. An axis of ``shape`` is a size, or the name of a dynamic dimension."""

    name: str
    dtype: str
    shape: tuple[Natural | str, ...]


@dataclass(frozen=True)
class GraphSpec:
    """A graph: its ONNX file, the file of its weights, and its inputs and outputs."""

    file: str
    weights: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True)
class AutoencoderSpec:
    """The autoencoder. ``factor`` is image pixels per latent pixel.

    The graphs apply the scaling and shift factors themselves; they are here for the record.
    """

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
        """The precision in which a named unit, such as ``blocks.17.mlp``, is computed."""
        return Precision.FP32 if is_kept(unit, self.keep_fp32) else self.name


@dataclass(frozen=True)
class SourceSpec:
    """Where the weights came from, and which implementation is their reference."""

    name: str
    revision: str | None
    reference: str
    weights_sha256: str | None


@dataclass(frozen=True)
class DefaultsSpec:
    """The defaults of sampling."""

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
    """The content of ``manifest.json``. ``docs/bundle-format.md`` specifies every field.

    Attributes:
        sizes: the latent sizes (height, width) that the bundle has graphs for; the first is ``model.latent_size``.
        tolerances: by precision and kind of rung, the largest error that an engine may have.
        thresholds: by precision and kind of rung, the largest ratio of an engine's error to PyTorch's own error.
        floors: by precision and record, PyTorch's own error in that precision: the relative L2 of each block, image or
            step. The floor of FP32 is against FP64, the other floors are against FP32. The name of a record of a
            further size has the suffix of that size's graphs.
        magnitudes: by unit of the precision policy, the largest |x| that enters or leaves one of its matrix products
            on the reference's own trajectory. ``blocks.N`` is the residual stream after block N.
        files: size and SHA-256 of every other file of the bundle.
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
        """The tensor of the conditioning table: the conditioner's output, and an input of step and probe."""
        return self.graphs["conditioner"].outputs[0]

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of an image in pixels, at the size in use."""
        return self.image_sizes[self.sizes.index(self.model.latent_size)]

    @property
    def image_sizes(self) -> tuple[tuple[int, int], ...]:
        """``sizes`` in pixels."""
        factor = self.autoencoder.factor
        return tuple((height * factor, width * factor) for height, width in self.sizes)

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def name_for_size(name: str, size: tuple[int, int]) -> str:
    """The name of a graph, record or folder for a latent size that is not the bundle's first."""
    return f"{name}-{size[0]}x{size[1]}"


def manifest_from_json(raw: Mapping[str, Any]) -> Manifest:
    """Decode a manifest. Raises DecodeError where a value does not have the type that ``Manifest`` declares.

    ``check_consistency`` checks that the values fit each other.
    """
    return decode(Manifest, raw)


def check_consistency(manifest: Manifest) -> None:
    """Raises ValueError where values of a manifest do not fit each other."""
    model, diffusion = manifest.model, manifest.diffusion
    for name in manifest.files:
        parts = PurePosixPath(name).parts
        if not parts or name.startswith("/") or ".." in parts or "\\" in name or ":" in name:
            raise ValueError(f"file name {name!r} leads outside the bundle")
    if manifest.precision.name not in EXPORTED:
        raise ValueError(f"precision {manifest.precision.name}: not implemented, expected {' or '.join(EXPORTED)}")
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
