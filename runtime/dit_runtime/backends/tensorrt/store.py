"""Read the engine store. Everything in it is checked before any of it is given to an inference library.

    engines/NAME/engine.json    the sidecar: what the plans were built from, with what, for what, and their hashes
    engines/NAME/*.plan         a plan for each graph

A plan is native code for one library, version and GPU. So a sidecar is trusted only when all its values are valid, and
a plan only when it has the size and hash that the sidecar names. ``StoredEngine.check_device`` must pass before either
is used.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from dit_runtime.backends.profiles import Profile, Profiles
from dit_runtime.bundle.manifest import GraphSpec, Manifest
from dit_runtime.bundle.reader import ENGINES, MANIFEST, Bundle
from dit_runtime.core.decode import Amount, DecodeError, Natural, Positive, Range, decode, read_json, schema_of, show
from dit_runtime.core.errors import EngineError
from dit_runtime.core.files import sha256_of
from dit_runtime.core.reading import SIDECAR_BYTES, FileError

SCHEMA = 2
SIDECAR = "engine.json"
PRODUCTS = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT-RTX"}

Sizes = tuple[Annotated[int, Range(0, 1 << 20)], ...]  # a shape in the sidecar; the graphs take no longer axis


@dataclass(frozen=True)
class StoredGraph:
    """A plan: its file, its optimization profiles, and the device memory that it takes.

    Attributes:
        graph: name of the graph.
        plan, plan_bytes, plan_sha256: the file's name, size and hash.
        profiles: the optimization profiles.
        weights_bytes: device memory of the weights, by the builder.
        activation_bytes: device memory of the activations of each profile at its largest shapes, by the builder.
    """

    graph: str
    plan: str
    plan_bytes: int
    plan_sha256: str
    profiles: tuple[Profile, ...]
    weights_bytes: int
    activation_bytes: tuple[int, ...]

    def profiles_of(self, spec: GraphSpec) -> Profiles:
        """The optimization profiles, with the axis names of the graph's manifest entry."""
        return Profiles(spec.inputs, self.profiles)


@dataclass(frozen=True)
class StoredEngine:
    """A set of plans in the engine store, as its sidecar describes it.

    Attributes:
        folder: that holds the sidecar and the plans.
        bundle: digest of the bundle that the plans were built from.
        image_size: height and width of the images in pixels.
        library, version: as in ``api.TensorRT``.
        target: name of the target.
        compute_capability: of the GPU, or several with commas between them.
        gpu, driver: of the GPU; None for plans that were built ahead of time, for any GPU of that compute capability.
        recipe: of ``dit-build``.
        graphs: the plans by graph.
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

    def profiles(self, manifest: Manifest) -> dict[str, Profiles]:
        """The optimization profiles of each graph.

        Raises:
            EngineError: a plan is of a graph that the bundle does not have, or its profiles are of other inputs.
        """
        found = {}
        for name, stored in self.graphs.items():
            spec = manifest.graphs.get(name)
            inputs = None if spec is None else {tensor.name: len(tensor.shape) for tensor in spec.inputs}
            if spec is None or any(
                {key: len(points[0]) for key, points in profile.items()} != inputs for profile in stored.profiles
            ):
                raise EngineError(
                    f"{self.folder / SIDECAR}: its plan of the {name} does not fit the bundle's graphs; run "
                    f"{self._make_command()}"
                )
            found[name] = stored.profiles_of(spec)
        return found

    def tile_for(self, latent_size: tuple[int, int]) -> tuple[int, int] | None:
        """Height and width of the tiles that the decoder was built for; None for whole images, or without a decoder."""
        if "decoder" not in self.graphs:
            return None
        (size, *others) = {tuple(each["latents"][2][2:]) for each in self.graphs["decoder"].profiles}
        height, width = size
        return None if size == latent_size or others else (height, width)

    def find_plan(self, graph: str) -> Path:
        """The path of a graph's plan, with its size and SHA-256 checked against the sidecar.

        Raises:
            EngineError: the engine has no plan of the graph, or the file is not the one that was built.
        """
        path = self.locate_plan(graph)
        try:
            found = sha256_of(path, self.graphs[graph].plan_bytes, within=self.folder)
        except FileError as error:
            raise EngineError(f"{path}: {error}; run {self._make_command()}") from error
        self.check_plan(graph, found)
        return path

    def locate_plan(self, graph: str) -> Path:
        """The path of a graph's plan, with only its size checked. Call ``check_plan`` with the content's hash.

        Raises:
            EngineError: the engine has no plan of the graph, or the path is not a plain file of that size.
        """
        if graph not in self.graphs:
            raise EngineError(
                f"{self.folder}: has no plan of the {graph}, only of {', '.join(self.graphs)}; run "
                f"{self._make_command()}"
            )
        stored = self.graphs[graph]
        path = self.folder / stored.plan
        if path.is_symlink() or not path.is_file():
            raise EngineError(f"{path}: missing, or not a plain file; run {self._make_command()}")
        if (size := path.stat().st_size) != stored.plan_bytes:
            raise EngineError(f"{path}: {size} bytes, expected {stored.plan_bytes}; run {self._make_command()}")
        return path

    def check_plan(self, graph: str, sha256: str) -> None:
        """Raises EngineError where the SHA-256 of a plan's content is not the sidecar's."""
        stored = self.graphs[graph]
        if sha256 != stored.plan_sha256:
            raise EngineError(
                f"{self.folder / stored.plan}: altered (SHA-256 {sha256[:12]}…, expected {stored.plan_sha256[:12]}…); "
                f"run {self._make_command()}"
            )

    def check_device(self, library: str, version: str, compute_capability: str, gpu: str | None) -> None:
        """Check that the plans can run here, before any of them is deserialized.

        A plan of TensorRT needs the library's exact version, and the GPU that it was built on. A plan of TensorRT-RTX
        needs the exact version, and one of the compute capabilities that it was built for (``8.6,8.9``).

        Args:
            library: name of the library here, as ``api.TensorRT.name``.
            version: its version, as ``api.TensorRT.version``.
            compute_capability: of the GPU here, such as ``8.7``.
            gpu: name of the GPU here; None is not compared.

        Raises:
            EngineError: the plans cannot run here. The message has both platforms, and the command that builds an
                engine for this one.
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
        """The command that builds this engine again, or builds it for another library and compute capability."""
        store = self.folder.parent
        if store.name == ENGINES and (store.parent / MANIFEST).is_file():
            bundle = [str(store.parent)]
        else:
            bundle = ["BUNDLE", "--store", str(store)]
        target = ["--target", self.target]
        if (library or self.library) == "tensorrt_rtx":
            target = ["--target", "rtx", "--compute-capability", compute_capability or self.compute_capability]
        elif library is not None:
            target = ["--target", "this"]
        size = ["--size", f"{self.image_size[0]}x{self.image_size[1]}"]
        return shlex.join(["dit-build", *bundle, *target, *size])


def describe_platform(library: str, version: str, compute_capability: str, gpu: str | None) -> str:
    """Describe what plans run on: ``sm_87 (Orin) with TensorRT 10.3.0``."""
    cores = ", ".join(f"sm_{item.replace('.', '')}" for item in compute_capability.split(","))
    return f"{cores}{f' ({gpu})' if gpu else ''} with {PRODUCTS.get(library, library)} {version}"


def read_engines(
    bundle: Bundle, store: Path | None = None, skipped: Callable[[str], None] | None = None
) -> list[StoredEngine]:
    """Read the sidecars of a bundle's engines at its size in use, sorted by folder. No plan is opened.

    Args:
        bundle: at the size in use.
        store: the engine store; None is the bundle's own ``engines`` folder.
        skipped: called with a line for each folder whose sidecar is damaged.
    """
    engines = []
    for folder in sorted((store or bundle.engines).glob(f"*/{SIDECAR}")):
        if folder.parent.name.startswith("."):
            continue  # being written, or about to be removed
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
    """Read and check the sidecar of one engine.

    Raises:
        EngineError: there is no sidecar, or it is damaged or of another schema.
    """
    return engine_from_record(folder, read_record(folder))


def read_sidecar(folder: Path) -> dict[str, Any]:
    """Read a sidecar's JSON.

    Raises:
        EngineError: there is no sidecar, or it is not JSON or of another schema.
    """
    path = folder / SIDECAR
    try:
        if folder.is_symlink() or path.is_symlink():
            raise DecodeError("a link")
        raw: dict[str, Any] = read_json(path, SIDECAR_BYTES, within=folder)
        schema = schema_of(raw)
    except DecodeError as error:
        raise EngineError(f"{path}: not a sidecar ({error}); remove {folder} and run dit-build again") from error
    if schema != SCHEMA:
        raise EngineError(f"{path}: schema {schema}, this version reads {SCHEMA}; run dit-build again")
    return raw


@dataclass(frozen=True)
class GraphRecord:
    """A graph's entry in ``engine.json``. Only ``dit-build`` uses ``seconds``, ``audit`` and ``doubts``."""

    graph: str
    plan: str
    plan_bytes: Natural
    plan_sha256: str
    seconds: Amount
    profiles: tuple[dict[str, tuple[Sizes, Sizes, Sizes]], ...]
    audit: dict[str, Any]
    weights_bytes: Natural
    activation_bytes: tuple[Natural, ...]
    doubts: tuple[str, ...]


@dataclass(frozen=True)
class CacheRecord:
    """The timing cache of a build: its file's name and hash."""

    file: str
    sha256: str


@dataclass(frozen=True)
class EngineRecord:
    """The content of ``engine.json``. Only ``dit-build`` uses ``identity``, ``timing_cache`` and ``tf32``."""

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
    timing_cache: CacheRecord | None
    tf32: bool
    graphs: tuple[GraphRecord, ...]


def read_record(folder: Path) -> EngineRecord:
    """Read the whole content of a sidecar.

    Raises:
        EngineError: there is no sidecar, or it is damaged or of another schema.
    """
    raw = read_sidecar(folder)
    try:
        return decode(EngineRecord, raw)
    except DecodeError as error:
        raise _damaged(folder, error) from error


def _damaged(folder: Path, error: ValueError) -> EngineError:
    return EngineError(f"{folder / SIDECAR}: damaged ({error}); remove {folder} and run dit-build again")


def engine_from_record(folder: Path, record: EngineRecord) -> StoredEngine:
    """Make a ``StoredEngine`` from a sidecar's content. Raises EngineError where its values do not fit each other."""
    try:
        if not record.graphs:
            raise ValueError("graphs: got none, expected at least one")
        if len({graph.graph for graph in record.graphs}) != len(record.graphs):
            raise ValueError("graphs: got one twice, expected each once")
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
        raise _damaged(folder, error) from error


def _graph_from_record(record: GraphRecord) -> StoredGraph:
    """Raises ValueError for a plan outside the engine's folder, and for profiles that no plan can have."""
    plan = record.plan
    if plan in ("", ".", "..") or "\\" in plan or Path(plan).name != plan or not plan.isprintable():
        raise ValueError(f"plan {show(plan)} is outside its engine's folder")
    if not record.profiles or len(record.activation_bytes) != len(record.profiles):
        raise ValueError(f"{len(record.activation_bytes)} activation sizes for {len(record.profiles)} profiles")
    for profile in record.profiles:
        for name, (least, usual, largest) in profile.items():
            if not len(least) == len(usual) == len(largest) or not all(map(_rises, least, usual, largest)):
                raise ValueError(f"profile of {show(name)}: {show([least, usual, largest])} does not rise")
        if record.graph == "decoder" and len(profile.get("latents", ((),))[0]) != len("NCHW"):
            raise ValueError("profile of the decoder: expected latents of four axes")
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
