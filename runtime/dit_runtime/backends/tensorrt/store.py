"""The engine store: what ``dit-build`` wrote, read and checked before any of it is given to an inference library.

    engines/NAME/engine.json    the sidecar: what the plans were built from, with what and for what, and their hashes
    engines/NAME/*.plan         one for each graph

A plan is native code for one library, version and GPU. So a sidecar is untrusted until it is whole, a plan until it has
the size and hash that the sidecar says, and neither is of use until ``StoredEngine.check_device`` has passed.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dit_runtime.backends.profiles import Profile, Profiles
from dit_runtime.bundle.manifest import GraphSpec
from dit_runtime.bundle.reader import ENGINES, MANIFEST, Bundle
from dit_runtime.core.decode import Amount, DecodeError, Natural, Positive, decode, read_json, schema_of
from dit_runtime.core.errors import EngineError
from dit_runtime.core.files import sha256_of

SCHEMA = 1
SIDECAR = "engine.json"
SIDECAR_LIMIT = 16 << 20  # bytes: far above any, and little to read
PRODUCTS = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT-RTX"}

Sizes = tuple[Natural, ...]  # a shape in a file


@dataclass(frozen=True)
class StoredGraph:
    """A plan: its file's name, size and hash, its optimization profiles, and what it takes of the device's memory.

    ``weights_bytes`` and, for each profile at its largest shapes, ``activation_bytes`` are the builder's own figures.
    """

    graph: str
    plan: str
    plan_bytes: int
    plan_sha256: str
    profiles: tuple[Profile, ...]
    weights_bytes: int
    activation_bytes: tuple[int, ...]

    def profiles_of(self, spec: GraphSpec) -> Profiles:
        """The optimization profiles, with the axes as the manifest names them."""
        return Profiles(spec.inputs, self.profiles)


@dataclass(frozen=True)
class StoredEngine:
    """A folder of the store, by its sidecar.

    ``bundle`` is the digest of the bundle at image size ``image_size``; ``library`` and ``version`` are those of
    ``tensorrt_api``; ``gpu`` and ``driver`` are None where the plans were built ahead of time, for any GPU of
    ``compute_capability``.
    """

    folder: Path
    bundle: str
    image_size: tuple[int, int]
    library: str
    version: str
    target: str
    compute_capability: str
    gpu: str | None
    driver: str | None
    recipe: dict[str, Any]
    graphs: dict[str, StoredGraph]

    def tile_for(self, latent_size: tuple[int, int]) -> tuple[int, int] | None:
        """Height and width of the tiles that the decoder is for; None for whole images, or without a decoder."""
        if "decoder" not in self.graphs:
            return None
        (height, width), *others = {tuple(each["latents"][2][2:]) for each in self.graphs["decoder"].profiles}
        return None if (height, width) == latent_size or others else (height, width)

    def find_plan(self, graph: str) -> Path:
        """The path of a graph's plan, checked against the sidecar: a plain file of its size, and its SHA-256.

        Raises:
            EngineError: no such graph, or not the file that was built.
        """
        path = self.locate_plan(graph)
        self.check_plan(graph, sha256_of(path))
        return path

    def locate_plan(self, graph: str) -> Path:
        """The path of a graph's plan, a plain file of the size that the sidecar says; for ``check_plan``.

        Raises:
            EngineError: no such graph, or not such a file.
        """
        if graph not in self.graphs:
            raise EngineError(
                f"{self.folder}: has no plan of the {graph}, only of {', '.join(self.graphs)}; run {self._make_command()}"
            )
        stored = self.graphs[graph]
        path = self.folder / stored.plan
        if path.is_symlink() or not path.is_file():
            raise EngineError(f"{path}: missing, or not a plain file; run {self._make_command()}")
        if (size := path.stat().st_size) != stored.plan_bytes:
            raise EngineError(f"{path}: {size} bytes, expected {stored.plan_bytes}; run {self._make_command()}")
        return path

    def check_plan(self, graph: str, sha256: str) -> None:
        """Raises EngineError where a plan's content does not have the SHA-256 that the sidecar says."""
        stored = self.graphs[graph]
        if sha256 != stored.plan_sha256:
            raise EngineError(
                f"{self.folder / stored.plan}: altered (SHA-256 {sha256[:12]}…, expected {stored.plan_sha256[:12]}…); "
                f"run {self._make_command()}"
            )

    def check_device(self, library: str, version: str, compute_capability: str, gpu: str | None) -> None:
        """Whether the plans can run here, asked before any is deserialized.

        A plan of TensorRT needs the library's exact version and the GPU it was built on; one of TensorRT-RTX the exact
        version and the compute capability it was built for, or one of them where they are several (``8.6,8.9``).

        Args:
            library: that would deserialize the plans, as ``tensorrt_api.TensorRT.name``.
            version: the library's, as ``tensorrt_api.TensorRT.version``.
            compute_capability: the GPU's, such as ``8.7``.
            gpu: the GPU's name; None leaves it out of the comparison.

        Raises:
            EngineError: both values, and the command that builds for this device.
        """
        same_library = (self.library, self.version) == (library, version)
        same_gpu = compute_capability in self.compute_capability.split(",")
        if self.library == "tensorrt" and same_gpu and None not in (gpu, self.gpu):
            same_gpu = gpu == self.gpu
        if same_library and same_gpu:
            return
        built = describe_platform(self.library, self.version, self.compute_capability, self.gpu)
        here = describe_platform(library, version, compute_capability, gpu)
        command = self._make_command(library, compute_capability)
        raise EngineError(f"{self.folder}: built for {built}, this is {here}; run {command}")

    def _make_command(self, library: str | None = None, compute_capability: str | None = None) -> str:
        """The command that builds this engine again, or for another library and compute capability."""
        store = self.folder.parent
        if store.name == ENGINES and (store.parent / MANIFEST).is_file():
            place = [str(store.parent)]
        else:
            place = ["BUNDLE", "--store", str(store)]
        target = ["--target", self.target]
        if (library or self.library) == "tensorrt_rtx":
            target = ["--target", "rtx", "--compute-capability", compute_capability or self.compute_capability]
        elif library is not None:
            target = ["--target", "this"]
        size = ["--size", f"{self.image_size[0]}x{self.image_size[1]}"]
        return shlex.join(["dit-build", *place, *target, *size])


def describe_platform(library: str, version: str, compute_capability: str, gpu: str | None) -> str:
    """What plans are for, in words: ``sm_87 (Orin) with TensorRT 10.3.0``."""
    cores = ", ".join(f"sm_{item.replace('.', '')}" for item in compute_capability.split(","))
    return f"{cores}{f' ({gpu})' if gpu else ''} with {PRODUCTS.get(library, library)} {version}"


def read_engines(
    bundle: Bundle, store: Path | None = None, skipped: Callable[[str], None] | None = None
) -> list[StoredEngine]:
    """The engines of a bundle at its size in use, sorted by folder; none of their plans is opened.

    Args:
        bundle: whose engines.
        store: where they are kept; None is the bundle's own ``engines`` folder.
        skipped: told of each folder whose sidecar is damaged, in a line.
    """
    engines = []
    for folder in sorted((store or bundle.engines).glob(f"*/{SIDECAR}")):
        try:
            engine = read_engine(folder.parent)
        except EngineError as error:
            if skipped is not None:
                skipped(str(error))
            continue
        if (engine.bundle, engine.image_size) == (bundle.digest, bundle.manifest.image_size):
            engines.append(engine)
    return engines


def read_engine(folder: Path) -> StoredEngine:
    """The engine of one folder, its sidecar checked to be whole.

    Raises:
        EngineError: no sidecar, of another schema, or damaged.
    """
    return engine_from_sidecar(folder, read_sidecar(folder))


def read_sidecar(folder: Path) -> dict[str, Any]:
    """A sidecar's JSON, with what only ``dit-build`` reads of it.

    Raises:
        EngineError: none there, no JSON, or of another schema.
    """
    path = folder / SIDECAR
    try:
        if folder.is_symlink() or path.is_symlink():
            raise DecodeError("a link")
        raw: dict[str, Any] = read_json(path, SIDECAR_LIMIT)
        schema = schema_of(raw)
    except DecodeError as error:
        raise EngineError(f"{path}: not a sidecar ({error}); remove {folder} and run dit-build again") from error
    if schema != SCHEMA:
        raise EngineError(f"{path}: schema {schema}, this version reads {SCHEMA}; run dit-build again")
    return raw


@dataclass(frozen=True)
class GraphRecord:
    """A graph as the sidecar's file has it. ``seconds`` and ``audit`` are for ``dit-build``."""

    graph: str
    plan: str
    plan_bytes: Natural
    plan_sha256: str
    seconds: Amount
    profiles: tuple[dict[str, tuple[Sizes, Sizes, Sizes]], ...]
    audit: dict[str, Any]
    weights_bytes: Natural
    activation_bytes: tuple[Natural, ...]


@dataclass(frozen=True)
class EngineRecord:
    """The sidecar's file. ``identity``, ``timing_cache`` and ``tf32`` are for ``dit-build``."""

    schema: int
    bundle: str
    image_size: tuple[Positive, Positive]
    library: Literal["tensorrt", "tensorrt_rtx"]
    version: str
    target: str
    compute_capability: str
    gpu: str | None
    driver: str | None
    recipe: dict[str, Any]
    identity: dict[str, Any]
    timing_cache: dict[str, str]
    tf32: bool
    graphs: tuple[GraphRecord, ...]


def engine_from_sidecar(folder: Path, raw: Mapping[str, Any]) -> StoredEngine:
    """Raises EngineError for a sidecar that does not hold together."""
    try:
        record = decode(EngineRecord, raw)
        if not record.graphs:
            raise ValueError("graphs: got none, expected at least one")
        return StoredEngine(
            folder=folder,
            bundle=record.bundle,
            image_size=record.image_size,
            library=record.library,
            version=record.version,
            target=record.target,
            compute_capability=record.compute_capability,
            gpu=record.gpu,
            driver=record.driver,
            recipe=record.recipe,
            graphs={graph.graph: _graph_from_record(graph) for graph in record.graphs},
        )
    except ValueError as error:
        raise EngineError(f"{folder / SIDECAR}: damaged ({error}); remove {folder} and run dit-build again") from error


def _graph_from_record(record: GraphRecord) -> StoredGraph:
    """Raises ValueError for a plan outside the engine's folder, and profiles that no plan has."""
    plan = record.plan
    if plan in ("", ".", "..") or "\\" in plan or Path(plan).name != plan:
        raise ValueError(f"plan {plan!r} leads out of its folder")
    if not record.profiles or len(record.activation_bytes) != len(record.profiles):
        raise ValueError(f"{len(record.activation_bytes)} activation sizes for {len(record.profiles)} profiles")
    for profile in record.profiles:
        for name, (least, usual, largest) in profile.items():
            if not len(least) == len(usual) == len(largest) or not all(map(_rises, least, usual, largest)):
                raise ValueError(f"profile of {name!r}: {least}, {usual}, {largest} does not rise")
    return StoredGraph(
        graph=record.graph,
        plan=plan,
        plan_bytes=record.plan_bytes,
        plan_sha256=record.plan_sha256,
        profiles=record.profiles,
        weights_bytes=record.weights_bytes,
        activation_bytes=record.activation_bytes,
    )


def _rises(least: int, usual: int, largest: int) -> bool:
    return least <= usual <= largest
