"""A bundle: what ``dit-export`` writes and everything else reads.

    manifest.json          model, diffusion, graphs, precision, tolerances, and size and SHA-256 of every other file
    graphs/*.onnx          conditioner, step, probe, decoder and maybe encoder; each with its weights beside it (probe:
                           the step's); step and probe once more for each further size, on the same weights
    golden/*.npz           what the PyTorch reference computed; in a folder of its own for each further size
    engines/               added later by ``dit-build`` and ``dit-verify``; not part of the bundle's digest

A bundle comes from elsewhere, so it is untrusted until checked: nothing in it is opened before its size and hash match
the manifest, and no path in it may lead outside.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import numpy as np

from dit_runtime.errors import BundleError
from dit_runtime.files import sha256_of

SCHEMA = 3
MANIFEST = "manifest.json"
ENGINES = "engines"
GOLDEN = "golden"
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
    """``factor`` is picture pixels per latent pixel; the other two are inside the graphs, and here for the record."""

    name: str
    scaling_factor: float
    shift_factor: float
    factor: int


@dataclass(frozen=True)
class PrecisionSpec:
    """``fp32`` or ``fp16``, and the named units that stay FP32."""

    name: str
    keep_fp32: tuple[str, ...]


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

    ``sizes``: the latent sizes (height, width) that there are graphs for; the first is ``model.latent_size``.
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
    tolerances: dict[str, float]
    files: dict[str, FileSpec] = field(default_factory=dict)

    @property
    def table(self) -> TensorSpec:
        """The conditioning table, as the conditioner gives it and the step takes it."""
        return self.graphs["conditioner"].outputs[0]

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of a picture in pixels."""
        return self.image_sizes[self.sizes.index(self.model.latent_size)]

    @property
    def image_sizes(self) -> tuple[tuple[int, int], ...]:
        """``sizes`` in pixels."""
        factor = self.autoencoder.factor
        return tuple((height * factor, width * factor) for height, width in self.sizes)

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


@dataclass(frozen=True)
class Bundle:
    """An opened bundle, at one of its sizes.

    ``digest`` is the SHA-256 of the manifest file, which holds the hash of every other file. ``manifest`` is that
    file's, with ``model.latent_size`` and the graphs of the size in use.
    """

    path: Path
    manifest: Manifest
    digest: str
    default_size: bool = True

    def at(self, image_size: tuple[int, int] | None) -> Bundle:
        """The bundle at another of its sizes, given as a picture's height and width; None leaves it as it is.

        Raises:
            BundleError: no graphs for that size.
        """
        manifest = self.manifest
        if image_size is None or image_size == manifest.image_size:
            return self
        if not self.default_size:
            raise BundleError(
                f"{self.path}: is open at {manifest.image_size[0]}x{manifest.image_size[1]} already; open it again for "
                f"{image_size[0]}x{image_size[1]}"
            )
        if image_size not in manifest.image_sizes:
            known = ", ".join(f"{height}x{width}" for height, width in manifest.image_sizes)
            raise BundleError(
                f"{self.path}: has no graphs for pictures of {image_size[0]}x{image_size[1]}, only {known}; export it "
                f"with --size {image_size[0]}x{image_size[1]}"
            )
        size = manifest.sizes[manifest.image_sizes.index(image_size)]
        graphs = {**manifest.graphs, **{name: manifest.graphs[sized(name, size)] for name in SIZED_GRAPHS}}
        return replace(
            self,
            manifest=replace(manifest, model=replace(manifest.model, latent_size=size), graphs=graphs),
            default_size=False,
        )

    def file(self, name: str) -> Path:
        """The path of a file that the manifest vouches for, checked against it: size, then SHA-256."""
        spec = self.manifest.files.get(name)
        if spec is None:
            raise BundleError(f"{self.path}: the manifest names no file {name!r}; export the bundle again")
        path = self.path.joinpath(*PurePosixPath(name).parts)
        if _leads_outside(self.path, path):
            raise BundleError(f"{path}: is a link out of the bundle; a bundle must hold its own files")
        if not path.is_file():
            raise BundleError(f"{path}: missing, but named in {MANIFEST}; copy or export the bundle again")
        if (size := path.stat().st_size) != spec.bytes:
            raise BundleError(f"{path}: {size} bytes, expected {spec.bytes}; copy or export the bundle again")
        if (found := sha256_of(path)) != spec.sha256:
            raise BundleError(
                f"{path}: altered (SHA-256 {found[:12]}…, expected {spec.sha256[:12]}…); copy the bundle again"
            )
        return path

    def graph(self, name: str) -> Path:
        """The path of a graph, with its ONNX file and its weights checked."""
        spec = self.manifest.graphs[name]
        self.file(spec.weights)
        return self.file(spec.file)

    def records(self, name: str) -> dict[str, np.ndarray[Any, Any]]:
        """The arrays of a golden record: ``golden/NAME.npz``, or that of the size in use."""
        folder = GOLDEN if self.default_size else sized(GOLDEN, self.manifest.model.latent_size)
        path = self.file(f"{folder}/{name}.npz")
        with np.load(path, allow_pickle=False) as stored:
            return dict(stored)

    def check(self) -> None:
        """Check every file against the manifest."""
        for name in self.manifest.files:
            self.file(name)


def sized(name: str, size: tuple[int, int]) -> str:
    """The name of a graph or folder of a size that is not the bundle's first."""
    return f"{name}-{size[0]}x{size[1]}"


def open_bundle(path: str | Path) -> Bundle:
    """Read and check a bundle's manifest; the other files are checked when they are used.

    Raises:
        BundleError: no bundle there, unknown schema, or a manifest that does not hold together.
    """
    folder = Path(path)
    manifest_path = folder / MANIFEST
    if not folder.exists():
        raise BundleError(f"{folder}: no such bundle; make one with dit-export CHECKPOINT -o {folder}")
    if not manifest_path.is_file() or _leads_outside(folder, manifest_path):
        raise BundleError(f"{folder}: not a bundle (no {MANIFEST}); make one with dit-export CHECKPOINT -o {folder}")
    text = manifest_path.read_bytes()
    try:
        raw = json.loads(text)
        schema = raw["schema"]
    except (ValueError, KeyError, TypeError) as error:
        raise BundleError(f"{manifest_path}: not a manifest ({error}); copy or export the bundle again") from error
    if schema != SCHEMA:
        raise BundleError(
            f"{manifest_path}: schema {schema!r}, this version reads {SCHEMA}; export the bundle again or install the "
            "dit-export that wrote it"
        )
    try:
        manifest = manifest_from_json(raw)
        _check_consistency(manifest)
    except (ValueError, KeyError, TypeError) as error:
        raise BundleError(
            f"{manifest_path}: damaged manifest ({type(error).__name__}: {error}); copy or export the bundle again"
        ) from error
    return Bundle(folder, manifest, hashlib.sha256(text).hexdigest())


def manifest_from_json(raw: Mapping[str, Any]) -> Manifest:
    """Raises ValueError, KeyError or TypeError for anything that is not a manifest of this schema."""
    model = dict(raw["model"], latent_size=_pair(raw["model"]["latent_size"]))
    diffusion = dict(raw["diffusion"], betas=tuple(float(beta) for beta in raw["diffusion"]["betas"]))
    precision = dict(raw["precision"], keep_fp32=tuple(raw["precision"]["keep_fp32"]))
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
        tolerances={name: float(value) for name, value in raw["tolerances"].items()},
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


def _graph(raw: Mapping[str, Any]) -> GraphSpec:
    def tensors(items: Any) -> tuple[TensorSpec, ...]:
        return tuple(TensorSpec(item["name"], item["dtype"], tuple(item["shape"])) for item in items)

    return GraphSpec(str(raw["file"]), str(raw["weights"]), tensors(raw["inputs"]), tensors(raw["outputs"]))


def _check_consistency(manifest: Manifest) -> None:
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
    if (diffusion.prediction_type == "velocity") != (diffusion.path in PATHS):
        raise ValueError(f"prediction type {diffusion.prediction_type!r} with path {diffusion.path!r}")
    *betas, last = diffusion.betas or (0.5,)
    if diffusion.path is None and not (diffusion.betas and all(0 < beta < 1 for beta in betas) and 0 < last <= 1):
        raise ValueError("betas must lie between 0 and 1")
    if len(manifest.class_names) not in (0, model.classes):
        raise ValueError(f"{len(manifest.class_names)} class names for {model.classes} classes")


def _leads_outside(folder: Path, path: Path) -> bool:
    return not path.resolve().is_relative_to(folder.resolve())
