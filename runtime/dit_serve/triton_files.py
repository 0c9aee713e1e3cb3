"""Write a bundle as a model of Triton Inference Server: its configuration and its Python file.

    REPOSITORY/NAME/config.pbtxt     tensors, instances, queue, and how the bundle is served
    REPOSITORY/NAME/1/model.py       imports ``dit_serve.triton_model``
    REPOSITORY/NAME/1/bundle/        a copy of the bundle with its engines, unless it stays where it is

A model is written whole or not at all. Nothing is replaced but a model that this module wrote.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from dit_runtime.backends.open import BACKENDS
from dit_runtime.backends.tensorrt.open import TENSORRT
from dit_runtime.backends.tensorrt.store import read_engines
from dit_runtime.bundle.reader import ENGINES, MANIFEST, PLAIN, Bundle, open_bundle
from dit_runtime.core.errors import EngineError, OutputError
from dit_runtime.core.replace import check_writable, replace_folder
from dit_runtime.pipeline import check_makes_images

VERSION = "1"  # of the model, in Triton's sense
CONFIG, MODEL, BUNDLE = "config.pbtxt", "model.py", "bundle"
MODEL_TEXT = '''"""Written by dit-triton: the model is in the package dit_serve."""

from dit_serve.triton_model import TritonPythonModel

__all__ = ["TritonPythonModel"]
'''
# Each input's name, type and length; -1 is any. All but the labels may be left out.
INPUTS = (
    ("labels", "STRING", -1),
    ("seeds", "INT64", -1),
    ("steps", "INT32", 1),
    ("guidance", "FP64", 1),
    ("sampler", "STRING", 1),
    ("spacing", "STRING", 1),
    ("eta", "FP64", 1),
    ("guidance_interval", "FP64", 2),
    ("guidance_schedule", "STRING", 1),
    ("negative_label", "STRING", 1),
    ("previews", "INT32", 1),
    ("timeout", "FP64", 1),
    ("format", "STRING", 1),
)


@dataclass(frozen=True)
class TritonRequest:
    """How a bundle becomes a model of Triton.

    Attributes:
        bundle: the bundle's folder.
        repository: the folder of the model repository, in which the model's folder is made.
        name: of the model; None is the bundle's.
        gpus: an instance on each of so many GPUs; 0 is the CPU, None whatever Triton finds.
        instances: on each GPU, or on the CPU.
        batch_size: most images in an instance's running batch.
        most_waiting: most requests in Triton's queue.
        decoupled: whether each image is an answer of its own, sent when it is finished; else a request has one answer.
        in_place: whether the model reads the bundle where it is, and not a copy.
        force: whether a model of that name that this command wrote is replaced.
        engine, precision, store, size, threads: as ``Pipeline`` and ``open_bundle`` take them.
    """

    bundle: Path
    repository: Path
    name: str | None = None
    gpus: int | None = None
    instances: int = 1
    batch_size: int = 8
    most_waiting: int = 64
    decoupled: bool = True
    in_place: bool = False
    force: bool = False
    engine: str = "auto"
    precision: str | None = None
    store: Path | None = None
    size: tuple[int, int] | None = None
    threads: int = 0


@dataclass(frozen=True)
class WrittenModel:
    """A model in a repository: its folder, its name, and the engine that it will open."""

    folder: Path
    name: str
    engine: str


def write_model(request: TritonRequest) -> WrittenModel:
    """Write a bundle's model into a repository, whole or not at all.

    Raises:
        BundleError: the bundle is missing, incomplete or altered.
        SamplingError: the bundle is a policy's.
        EngineError: there is no engine of that name.
        OutputError: the repository cannot be written, or has a model of that name already.
    """
    bundle = open_bundle(request.bundle, request.store)
    check_makes_images(bundle)
    bundle = bundle.at(request.size)
    if request.engine != "auto" and request.engine not in BACKENDS:
        raise EngineError(f"engine {request.engine!r} is unknown; choose auto or one of {', '.join(BACKENDS)}")
    name = request.name or request.bundle.resolve().name.removesuffix(".bundle")
    if not re.fullmatch(r"[\w-][\w.-]{0,127}", name, re.ASCII):
        raise OutputError(f"name {name!r:.80}: expected letters, digits, and any of ._-; choose another --name")
    folder = request.repository / name
    _check_folder(folder, request.force)
    engine = _choose_engine(bundle, request.engine)
    with replace_folder(folder) as temporary:
        version = temporary / VERSION
        version.mkdir()
        (version / MODEL).write_text(MODEL_TEXT, encoding="utf-8")
        if not request.in_place:
            _copy_bundle(bundle, version / BUNDLE)
        (temporary / CONFIG).write_text(_make_config(request, name, engine, bundle), encoding="utf-8")
    return WrittenModel(folder, name, engine)


def _check_folder(folder: Path, force: bool) -> None:
    """Raises OutputError where a model's folder cannot be written, or is something that must not be replaced."""
    check_writable(folder)
    if not (folder.exists() or folder.is_symlink()):
        return
    try:
        ours = not folder.is_symlink() and (folder / VERSION / MODEL).read_text(encoding="utf-8") == MODEL_TEXT
    except (OSError, UnicodeDecodeError):
        ours = False
    if not ours:
        raise OutputError(f"{folder}: exists, and dit-triton did not write it; choose another --output or --name")
    if not force:
        raise OutputError(f"{folder}: exists; replace it with --force, or choose another --name")


def _choose_engine(bundle: Bundle, engine: str) -> str:
    """The engine to name in the configuration.

    Where plans were built for the bundle, ``auto`` is TensorRT: in a container with another version the model then says
    so when it is loaded, and does not run on a slower engine unseen.
    """
    if engine != "auto":
        return engine
    built = {stored.library for stored in read_engines(bundle)}
    return next((name for name, library in TENSORRT.items() if library in built), engine)


def _copy_bundle(bundle: Bundle, folder: Path) -> None:
    """Copy a bundle's files, each checked against the manifest, and its engine store."""
    for name in (MANIFEST, *bundle.manifest.files):
        target = folder.joinpath(*PurePosixPath(name).parts)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(bundle.path / MANIFEST if name == MANIFEST else bundle.file(name), target)
    open_bundle(folder)  # the manifest of this very moment
    if bundle.engines.is_dir():
        shutil.copytree(bundle.engines, folder / ENGINES, symlinks=True, ignore=_left_out)


def _left_out(folder: str, names: list[str]) -> set[str]:
    """What of an engine store is not copied: what is being written, other names of the graphs, and links."""
    return {name for name in names if name.startswith(".") or name == PLAIN or Path(folder, name).is_symlink()}


def _make_config(request: TritonRequest, name: str, engine: str, bundle: Bundle) -> str:
    """The model's configuration in protobuf's text format, in which JSON's strings are strings."""
    height, width = bundle.manifest.image_size
    parameters = {
        "bundle": str(request.bundle.resolve()) if request.in_place else "",
        "store": str(request.store.resolve()) if request.in_place and request.store else "",
        "engine": engine,
        "precision": request.precision or "",
        "size": f"{height}x{width}",
        "threads": str(request.threads),
        "batch_size": str(request.batch_size),
        "class_names": json.dumps(bundle.manifest.class_names),  # for clients, which may ask for the configuration
    }
    inputs = (
        f"  {{ name: {json.dumps(each)}, data_type: TYPE_{kind}, dims: [ {length} ]"
        f"{', optional: true' if each != 'labels' else ''} }}"
        for each, kind, length in INPUTS
    )
    outputs = (
        f'  {{ name: "images", data_type: TYPE_UINT8, dims: [ -1, {height}, {width}, 3 ] }}',
        '  { name: "png", data_type: TYPE_STRING, dims: [ -1 ] }',
        *(f'  {{ name: "{each}", data_type: TYPE_INT32, dims: [ -1 ] }}' for each in ("index", "step", "steps")),
        '  { name: "seed", data_type: TYPE_INT64, dims: [ -1 ] }',
        '  { name: "label", data_type: TYPE_STRING, dims: [ -1 ] }',
    )
    kind = "KIND_AUTO" if request.gpus is None else "KIND_GPU" if request.gpus else "KIND_CPU"
    gpus = f", gpus: [ {', '.join(map(str, range(request.gpus)))} ]" if request.gpus else ""
    values = (
        f"  {{ key: {json.dumps(key)}, value: {{ string_value: {json.dumps(value)} }} }}"
        for key, value in parameters.items()
    )
    lines = (
        "# Written by dit-triton.",
        f"name: {json.dumps(name)}",
        'backend: "python"',
        "max_batch_size: 0",  # the model batches step by step itself
        f"model_transaction_policy {{ decoupled: {json.dumps(request.decoupled)} }}",
        f"dynamic_batching {{ default_queue_policy {{ max_queue_size: {request.most_waiting} }} }}",
        f"instance_group [ {{ kind: {kind}, count: {request.instances}{gpus} }} ]",
        "input [",
        ",\n".join(inputs),
        "]",
        "output [",
        ",\n".join(outputs),
        "]",
        "parameters [",
        ",\n".join(values),
        "]",
    )
    return "\n".join(lines) + "\n"
