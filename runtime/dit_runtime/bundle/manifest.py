"""``manifest.json``, typed: what a bundle is, what its graphs take and give, and how closely they must match.

A manifest comes from elsewhere: reading it raises for anything that does not hold together.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import PurePosixPath
from typing import Any, TypeVar

from dit_runtime.bundle.precision import Precision, is_kept

SCHEMA = 5
GRAPHS = ("conditioner", "step", "probe", "decoder")
ENCODER = "encoder"
SIZED_GRAPHS = ("step", "probe")  # traced for one size each; the others take any
CONDITIONINGS = ("adaln-zero", "adaln", "cross-attention", "in-context")
PATHS = ("linear", "gvp", "vp")

T = TypeVar("T")


@dataclass(frozen=True)
class ModelSpec:
    """The transformer's shape. Sizes are in latent pixels; ``width`` is the hidden size D.

    ``conditioning`` is one of ``CONDITIONINGS``, the paper's four.
    """

    conditioning: str
    latent_channels: int
    latent_size: tuple[int, int]
    patch_size: int
    width: int
    depth: int
    heads: int
    mlp_width: int
    classes: int
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
    guidance_channels: int
    timestep_spacing: str
    steps_offset: int
    set_alpha_to_one: bool
    path: str | None = None


@dataclass(frozen=True)
class TensorSpec:
    """A graph input or output: axes are sizes or the names of dynamic dimensions."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


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
    factor: int


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
    steps: int
    guidance: float


@dataclass(frozen=True)
class FileSpec:
    """A file's size and SHA-256."""

    bytes: int
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
    sizes: tuple[tuple[int, int], ...]
    diffusion: DiffusionSpec
    autoencoder: AutoencoderSpec
    precision: PrecisionSpec
    defaults: DefaultsSpec
    class_names: tuple[str, ...]
    graphs: dict[str, GraphSpec]
    tolerances: dict[str, dict[str, float]]
    thresholds: dict[str, dict[str, float]]
    floors: dict[str, dict[str, tuple[float, ...]]]
    magnitudes: dict[str, float]
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


def sized(name: str, size: tuple[int, int]) -> str:
    """The name of a graph or folder of a size that is not the bundle's first."""
    return f"{name}-{size[0]}x{size[1]}"


def manifest_from_json(raw: Mapping[str, Any]) -> Manifest:
    """Raises ValueError, KeyError or TypeError for anything that is not a manifest of this schema."""
    model = dict(raw["model"], latent_size=_pair(raw["model"]["latent_size"]))
    diffusion = dict(raw["diffusion"], betas=tuple(float(beta) for beta in raw["diffusion"]["betas"]))
    precision = dict(
        raw["precision"], name=Precision(raw["precision"]["name"]), keep_fp32=tuple(raw["precision"]["keep_fp32"])
    )
    return Manifest(
        schema=SCHEMA,
        producer=dict(raw["producer"]),
        source=_built(SourceSpec, raw["source"]),
        model=_built(ModelSpec, model),
        sizes=tuple(_pair(size) for size in raw["sizes"]),
        diffusion=_built(DiffusionSpec, diffusion),
        autoencoder=_built(AutoencoderSpec, raw["autoencoder"]),
        precision=_built(PrecisionSpec, precision),
        defaults=_built(DefaultsSpec, raw["defaults"]),
        class_names=tuple(str(name) for name in raw["class_names"]),
        graphs={name: _graph(graph) for name, graph in raw["graphs"].items()},
        tolerances={name: _numbers(limits) for name, limits in raw["tolerances"].items()},
        thresholds={name: _numbers(limits) for name, limits in raw["thresholds"].items()},
        floors={name: _series(floors) for name, floors in raw["floors"].items()},
        magnitudes=_numbers(raw["magnitudes"]),
        files={name: _built(FileSpec, spec) for name, spec in raw["files"].items()},
    )


def _built(kind: type[T], values: Mapping[str, Any]) -> T:
    names = {item.name for item in fields(kind)}  # type: ignore[arg-type]  # every kind here is a dataclass
    if set(values) != names:
        raise ValueError(f"{kind.__name__} has {sorted(values)}, expected {sorted(names)}")
    return kind(**values)


def _pair(values: Any) -> tuple[int, int]:
    first, second = (int(value) for value in values)
    return first, second


def _numbers(raw: Mapping[str, Any]) -> dict[str, float]:
    numbers = {str(name): float(value) for name, value in raw.items()}
    if wrong := [name for name, value in numbers.items() if not 0 <= value < math.inf]:
        raise ValueError(f"{wrong[0]} is {numbers[wrong[0]]}")
    return numbers


def _series(raw: Mapping[str, Any]) -> dict[str, tuple[float, ...]]:
    series = {str(name): tuple(float(value) for value in values) for name, values in raw.items()}
    if wrong := [name for name, values in series.items() if not all(0 <= value < math.inf for value in values)]:
        raise ValueError(f"floor of {wrong[0]} is not finite")
    return series


def _graph(raw: Mapping[str, Any]) -> GraphSpec:
    def tensors(items: Any) -> tuple[TensorSpec, ...]:
        return tuple(TensorSpec(item["name"], item["dtype"], tuple(item["shape"])) for item in items)

    return GraphSpec(str(raw["file"]), str(raw["weights"]), tensors(raw["inputs"]), tensors(raw["outputs"]))


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
    expected = [*GRAPHS, *(sized(name, size) for size in manifest.sizes[1:] for name in SIZED_GRAPHS)]
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
            raise ValueError(f"no limits for {manifest.precision.name}")
    if (diffusion.prediction_type == "velocity") != (diffusion.path in PATHS):
        raise ValueError(f"prediction type {diffusion.prediction_type!r} with path {diffusion.path!r}")
    *betas, last = diffusion.betas or (0.5,)
    if diffusion.path is None and not (diffusion.betas and all(0 < beta < 1 for beta in betas) and 0 < last <= 1):
        raise ValueError("betas must lie between 0 and 1")
    if len(manifest.class_names) not in (0, model.classes):
        raise ValueError(f"{len(manifest.class_names)} class names for {model.classes} classes")
