"""A bundle: what ``dit-export`` writes and everything else reads.

    manifest.json          model, diffusion, graphs, precision, error budget, and size and SHA-256 of every other file
    graphs/*.onnx          conditioner, step, probe, decoder and maybe encoder; each with its weights beside it (probe:
                           the step's); step and probe once more for each further size, on the same weights
    golden/*.npz           what the PyTorch reference computed; in a folder of its own for each further size
    engines/               added later by ``dit-build`` and ``dit-verify``; not part of the bundle's digest

A bundle comes from elsewhere, so it is untrusted until checked: nothing in it is opened before its size and hash match
the manifest, and no path in it may lead outside.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from dit_runtime.bundle.manifest import (
    CONDITIONINGS,
    ENCODER,
    GRAPHS,
    PATHS,
    SCHEMA,
    SIZED_GRAPHS,
    AutoencoderSpec,
    DefaultsSpec,
    DiffusionSpec,
    FileSpec,
    GraphSpec,
    Manifest,
    ModelSpec,
    PrecisionSpec,
    SourceSpec,
    TensorSpec,
    check_consistency,
    manifest_from_json,
    name_for_size,
)
from dit_runtime.core.decode import DecodeError, json_from_bytes, read_bytes, schema_of
from dit_runtime.core.errors import BundleError
from dit_runtime.core.files import sha256_of

__all__ = [
    "CONDITIONINGS",
    "ENCODER",
    "ENGINES",
    "GOLDEN",
    "GRAPHS",
    "MANIFEST",
    "PATHS",
    "SCHEMA",
    "SIZED_GRAPHS",
    "TILE",
    "UNGUIDED",
    "AutoencoderSpec",
    "Bundle",
    "DefaultsSpec",
    "DiffusionSpec",
    "FileSpec",
    "GraphSpec",
    "Manifest",
    "ModelSpec",
    "PrecisionSpec",
    "SourceSpec",
    "TensorSpec",
    "manifest_from_json",
    "name_for_size",
    "open_bundle",
]

MANIFEST = "manifest.json"
MANIFEST_LIMIT = 16 << 20  # bytes: far above any, and little to read
ENGINES = "engines"
GOLDEN = "golden"
UNGUIDED = "unguided"  # the record of a trajectory without guidance, of the sampler that draws noise
TILE = "tile_"  # begins the name of a record of one tile of the decoder, with its side in latent pixels


@dataclass(frozen=True)
class Bundle:
    """An opened bundle, at one of its sizes.

    ``digest`` is the SHA-256 of the manifest file, which holds the hash of every other file. ``manifest`` is that
    file's, with ``model.latent_size`` and the graphs of the size in use. ``store``: where engines, verdicts and timings
    are kept; None is the bundle's own ``engines`` folder.
    """

    path: Path
    manifest: Manifest
    digest: str
    default_size: bool = True
    store: Path | None = None

    @property
    def engines(self) -> Path:
        """The store."""
        return self.store or self.path / ENGINES

    def at(self, image_size: tuple[int, int] | None) -> Bundle:
        """The bundle at another of its sizes, given as an image's height and width; None leaves it as it is.

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
                f"{self.path}: has no graphs for images of {image_size[0]}x{image_size[1]}, only {known}; export it "
                f"with --size {image_size[0]}x{image_size[1]}"
            )
        size = manifest.sizes[manifest.image_sizes.index(image_size)]
        graphs = {**manifest.graphs, **{name: manifest.graphs[name_for_size(name, size)] for name in SIZED_GRAPHS}}
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
        path = self.file(self._file_of_record(name))
        with np.load(path, allow_pickle=False) as stored:
            return dict(stored)

    def has_records(self, name: str) -> bool:
        """Whether there is a golden record of that name."""
        return self._file_of_record(name) in self.manifest.files

    def _file_of_record(self, name: str) -> str:
        folder = GOLDEN if self.default_size else name_for_size(GOLDEN, self.manifest.model.latent_size)
        return f"{folder}/{name}.npz"

    def check(self) -> None:
        """Check every file against the manifest."""
        for name in self.manifest.files:
            self.file(name)


def open_bundle(path: str | Path, store: Path | None = None) -> Bundle:
    """Read and check a bundle's manifest; the other files are checked when they are used.

    Args:
        path: the bundle's folder.
        store: where its engines are kept, for a bundle that cannot be written; None is its own ``engines`` folder.

    Raises:
        BundleError: no bundle there, unknown schema, or a manifest that does not hold together.
    """
    folder = Path(path)
    manifest_path = folder / MANIFEST
    if not folder.exists():
        raise BundleError(f"{folder}: no such bundle; make one with dit-export CHECKPOINT -o {folder}")
    if not manifest_path.is_file() or _leads_outside(folder, manifest_path):
        raise BundleError(f"{folder}: not a bundle (no {MANIFEST}); make one with dit-export CHECKPOINT -o {folder}")
    try:
        text = read_bytes(manifest_path, MANIFEST_LIMIT)
        raw = json_from_bytes(text)
        schema = schema_of(raw)
    except DecodeError as error:
        raise BundleError(f"{manifest_path}: not a manifest ({error}); copy or export the bundle again") from error
    if schema != SCHEMA:
        raise BundleError(
            f"{manifest_path}: schema {schema}, this version reads {SCHEMA}; export the bundle again or install the "
            "dit-export that wrote it"
        )
    try:
        manifest = manifest_from_json(raw)
        check_consistency(manifest)
    except ValueError as error:
        raise BundleError(f"{manifest_path}: damaged manifest ({error}); copy or export the bundle again") from error
    return Bundle(folder, manifest, hashlib.sha256(text).hexdigest(), store=store)


def _leads_outside(folder: Path, path: Path) -> bool:
    return not path.resolve().is_relative_to(folder.resolve())
